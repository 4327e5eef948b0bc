"""How good models are, from the JSON files that evaluations write: what a report sets energy and latency against."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftadd3d._errors import UserError

_EXPECTED = (
    "expected what `shiftadd3d evaluate --json`, `shiftadd3d eval-scenes --json` or `ns-eval --output-path` wrote, as "
    "FILE.json, RECIPE=FILE.json or MODEL:RECIPE=FILE.json"
)


@dataclass(frozen=True)
class Quality:
    """One number; the higher, the better."""

    name: str
    """top-1, a share of pictures, or PSNR in dB."""
    value: float
    source: str
    """The file that it comes from."""


@dataclass(frozen=True)
class Evaluation:
    """A quality, and which model in which recipe has it, as far as that is known."""

    quality: Quality
    models: tuple[str, ...]
    """Names that the model may go by; none if any will do."""
    recipe: str | None

    def is_of(self, model: str, recipe: str) -> bool:
        named = not self.models or any(model == name or _same_path(model, name) for name in self.models)
        return named and self.recipe in (None, recipe)


def read_evaluation(word: str) -> Evaluation:
    """Read an evaluation.

    Args:
        word: ``FILE.json``, or ``RECIPE=FILE.json`` or ``MODEL:RECIPE=FILE.json`` where the file does not say what was
            evaluated, or calls it otherwise.

    Raises:
        UserError: no such file, or none of an evaluation.
    """
    label, _, name = word.rpartition("=") if not Path(word).is_file() else ("", "", word)
    path = Path(name)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the evaluation {path}: {error.strerror or error}; {_EXPECTED}") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); {_EXPECTED}") from None
    quality = _quality(facts, str(path))
    if quality is None:
        raise UserError(f"{path} holds no top-1 and no PSNR; {_EXPECTED}")
    if label:
        model, _, recipe = label.rpartition(":")
        return Evaluation(quality, (model,) if model else (), recipe)
    models = tuple(str(facts[key]) for key in ("checkpoint", "architecture") if facts.get(key))
    recipe = (facts["recipe"] or "mult") if "recipe" in facts else None
    return Evaluation(quality, models, recipe)


def _quality(facts: Any, source: str) -> Quality | None:
    if not isinstance(facts, dict):
        return None
    if _is_number(facts.get("top1")):
        return Quality("top-1", float(facts["top1"]), source)
    results = facts.get("results")
    if isinstance(results, dict) and _is_number(results.get("psnr")):
        return Quality("PSNR", float(results["psnr"]), source)
    scenes = facts.get("scenes")
    if isinstance(scenes, list) and scenes and all(isinstance(each, dict) for each in scenes):
        values = [each.get("psnr") for each in scenes]
        if all(_is_number(value) for value in values):
            return Quality("PSNR", sum(values) / len(values), source)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _same_path(one: str, other: str) -> bool:
    first, second = Path(one), Path(other)
    return first.exists() and second.exists() and first.resolve() == second.resolve()


def assign(evaluations: Sequence[Evaluation], profiled: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Quality]:
    """Which evaluation belongs to which model in which recipe.

    Raises:
        UserError: one fits none or several of them, two fit the same, or they measure different things.
    """
    found: dict[tuple[str, str], Quality] = {}
    names = ", ".join(f"{model}:{recipe}" for model, recipe in profiled)
    for each in evaluations:
        fitting = [one for one in profiled if each.is_of(*one)]
        source = each.quality.source
        if len(fitting) != 1:
            how_many = "none" if not fitting else "several"
            raise UserError(f"{source} is of {how_many} of {names}: say which by --quality MODEL:RECIPE={source}")
        if fitting[0] in found:
            raise UserError(f"{source} and {found[fitting[0]].source} are both of {':'.join(fitting[0])}: name one")
        found[fitting[0]] = each.quality
    kinds = dict.fromkeys(quality.name for quality in found.values())
    if len(kinds) > 1:
        raise UserError(f"evaluations measure {' and '.join(kinds)}: compare models by one of them")
    return found
