"""The quality of models, from the JSON files of evaluations, to compare with energy and latency."""

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
    """One number. Higher is better."""

    name: str
    """top-1, a share of pictures, or PSNR in dB."""
    value: float
    source: str
    """The file of the evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """A quality, and the model and recipe that it belongs to, as far as they are known."""

    quality: Quality
    models: tuple[str, ...]
    """Names that the model may have; empty if any name will do."""
    recipe: str | None

    def is_of(self, model: str, recipe: str) -> bool:
        named = not self.models or any(model == name or _same_path(model, name) for name in self.models)
        return named and self.recipe in (None, recipe)


def read_evaluation(word: str) -> Evaluation:
    """Read an evaluation.

    Args:
        word: ``FILE.json``. Write ``RECIPE=FILE.json`` or ``MODEL:RECIPE=FILE.json`` if the file does not say what was
            evaluated, or uses another name.

    Raises:
        UserError: no such file, or not the file of an evaluation.
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
    """The evaluation of each model in each recipe.

    Raises:
        UserError: an evaluation fits no model or several, two fit the same model, or they measure different things.
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
