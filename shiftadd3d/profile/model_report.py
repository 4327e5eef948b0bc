"""Compare models recipe by recipe: their operations, their data traffic, and their energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from shiftadd3d._errors import UserError
from shiftadd3d._report import RichReport
from shiftadd3d.nn import FrozenMoE, MoE, OperationReport, Recipe, count_operations
from shiftadd3d.nn.routing import ray_shares, routing_maps
from shiftadd3d.profile.accelerator import Accelerator
from shiftadd3d.profile.energy import ACCOUNTS, LEVELS, Account, EnergyReport, energy
from shiftadd3d.profile.latency import Latency, Peak, device_of, measure_latencies, measure_peak
from shiftadd3d.profile.machine import machine_facts
from shiftadd3d.profile.parts import ROOT, part_depth, part_of, parts_of
from shiftadd3d.profile.quality import Evaluation, Quality, assign
from shiftadd3d.profile.subjects import Subject

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

RECIPES = ("mult", "add", "add+shift", "add+shift-attn+moe")
"""Default recipes. All are compared with the first."""


UNCHANGED = (
    "no attention and no perceptron of this model is of a class that recipes know. `register_attention` and "
    "`register_mlp` name more (docs/own-model.md)."
)
"""Note for recipes that change nothing in a model."""


@dataclass(frozen=True)
class Routing:
    """The routing of one mixture for the input."""

    layer: str
    experts: tuple[str, ...]
    share: float
    """Share of the tokens that went to the first expert."""
    map: list[list[float]] | None
    """The same for each patch or ray of the picture, row by row; None if tokens belong to no picture."""


@dataclass(frozen=True)
class Profile:
    """One model in one recipe."""

    model: str
    recipe: str
    weights: str
    """Where the weights come from."""
    operations: OperationReport
    energy: dict[Account, EnergyReport]
    """Energy by each account."""
    depth: int
    """Components in the names of the model's parts (`part_depth`)."""
    routing: tuple[Routing, ...] = ()
    latency: dict[str, Latency] = field(default_factory=dict)
    """Latency by form."""
    quality: Quality | None = None

    @property
    def is_unchanged(self) -> bool:
        """Whether the recipe found nothing to change, so that every product still multiplies."""
        is_dense = self.operations.mult == self.operations.add
        return self.recipe != "mult" and is_dense and not self.routing  # a router may send all tokens to Mult

    @property
    def work(self) -> dict[str, float]:
        """Operations for one input: multiplications, shifts and additions of products, and elementwise operations."""
        return _work((self.operations,), self.operations.inputs)

    def parts(self, peak: Peak | None) -> list[dict[str, Any]]:
        """The work and cost of each part for one input, in plain types.

        Time spent in parts without work of their own, such as containers, counts for the model itself.
        """
        inputs = self.operations.inputs
        names = [
            name for name in parts_of([layer.name for layer in self.operations.layers], self.depth) if name != ROOT
        ]
        rows = []
        for part in [*names, ROOT]:
            layers = [layer for layer in self.operations.layers if part_of(layer.name, self.depth) == part]
            row: dict[str, Any] = {"part": part, "work": _work(layers, inputs), "pj": {}}
            for account, report in self.energy.items():
                priced = [layer.pj for layer in report.layers if part_of(layer.name, self.depth) == part]
                row["pj"][account] = {level: sum(pj.get(level, 0.0) for pj in priced) / inputs for level in LEVELS}
            if peak is not None:
                row["roofline_seconds"] = peak.seconds(layers) / inputs
                row["seconds"] = {
                    form: sum(time for name, time in latency.parts.items() if (name if name in names else ROOT) == part)
                    for form, latency in self.latency.items()
                }
            rows.append(row)
        return rows


def _work(parts: Sequence[Any], inputs: int) -> dict[str, float]:
    work = {kind: sum(getattr(part, kind) for part in parts) / inputs for kind in ("mult", "shift", "add")}
    elementwise = sum(sum(counts.values()) for part in parts for counts in part.elementwise.values())
    return {**work, "elementwise": elementwise / inputs}


@dataclass(frozen=True)
class ProfileReport(RichReport):
    """The results of `profile`. Printing shows a table for each model."""

    setting: str
    """The input of the models, in words."""
    unit: str
    """The unit that all numbers refer to, such as a picture."""
    accelerator: Accelerator
    profiles: tuple[Profile, ...]
    peak: Peak | None = None
    """Peak of this machine, if latencies were measured."""

    def baseline(self, profile: Profile) -> Profile:
        """The same model in the first recipe."""
        return next(other for other in self.profiles if other.model == profile.model)

    def as_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "setting": self.setting,
            "unit": self.unit,
            "accelerator": self.accelerator.name,
            "assumptions": {account: found.assumptions for account, found in self.profiles[0].energy.items()},
            "machine": None if self.peak is None else machine_facts(),
            "peak": None if self.peak is None else asdict(self.peak),
            "profiles": [],
        }
        for each in self.profiles:
            base = self.baseline(each)
            facts["profiles"].append(
                {
                    "model": each.model,
                    "recipe": each.recipe,
                    "weights": each.weights,
                    "is_unchanged": each.is_unchanged,
                    "work": each.work,
                    "bytes": _bytes(each),
                    "energy": {
                        account: {**found.as_dict(), "saved": found.saved(base.energy[account])}
                        for account, found in each.energy.items()
                    },
                    "latency": {
                        form: {**asdict(latency.total), "joules": latency.joules}
                        for form, latency in each.latency.items()
                    },
                    "roofline_seconds": self.peak
                    and self.peak.seconds(each.operations.layers) / each.operations.inputs,
                    "quality": each.quality and asdict(each.quality),
                    "parts": each.parts(self.peak),
                    "routing": [asdict(router) for router in each.routing],
                    "operations": each.operations.as_dict(),
                }
            )
        return facts

    def __rich__(self) -> Group:
        from rich.console import Group

        parts: list[Any] = []
        for model in dict.fromkeys(each.model for each in self.profiles):
            chosen = [each for each in self.profiles if each.model == model]
            parts += [f"[bold]{model}[/bold]: one {self.unit} ({self.setting})"]
            parts += [_work_table(chosen), self._energy_table(chosen), _levels_table(chosen)]
            if self.peak is not None:
                parts.append(self._latency_table(chosen, self.peak))
            if same := [each.recipe for each in chosen if each.is_unchanged]:
                verb = "change" if len(same) > 1 else "changes"
                parts.append(f"{' and '.join(same)} {verb} nothing here: {UNCHANGED}\n")
        notes = [f"{account}: {found.assumptions}" for account, found in self.profiles[0].energy.items()]
        if self.peak is not None:
            notes.append(
                f"roofline: {self.peak.operations_per_second / 1e9:,.1f} G operations and "
                f"{self.peak.bytes_per_second / 1e9:,.1f} GB a second, as torch reaches on {self.peak.place}"
            )
        return Group(
            *parts, *notes, "elementwise work: norms, softmax, activation functions, sums; apart from products"
        )

    def _energy_table(self, profiles: Sequence[Profile]) -> Table:
        table = _table("energy, uJ", *(name for account in ACCOUNTS for name in (account, "saved")))
        for each in profiles:
            cells = []
            for account, found in each.energy.items():
                saved = found.saved(self.baseline(each).energy[account])
                cells += [_short(found.total / 1e6), f"{saved:.1%}"]
            table.add_row(each.recipe, *cells)
        return table

    def _latency_table(self, profiles: Sequence[Profile], peak: Peak) -> Table:
        forms = list(dict.fromkeys(form for each in profiles for form in each.latency))
        has_quality = any(each.quality for each in profiles)
        measured = [
            form for form in forms if any(form in each.latency and each.latency[form].joules for each in profiles)
        ]
        table = _table(
            "latency, ms",
            *forms,
            "roofline",
            *(f"{form}, mJ" for form in measured),
            *(["quality"] if has_quality else []),
        )
        for each in profiles:
            times = [each.latency[form].total.median if form in each.latency else None for form in forms]
            cells = ["" if time is None else _short(time * 1e3) for time in times]
            cells.append(_short(_roofline(each, peak) * 1e3))
            joules = [each.latency[form].joules if form in each.latency else None for form in measured]
            cells += ["" if value is None else _short(value * 1e3) for value in joules]
            quality = "" if each.quality is None else f"{each.quality.value:.4g}"
            table.add_row(each.recipe, *cells, *([quality] if has_quality else []))
        return table


def _roofline(profile: Profile, peak: Peak) -> float:
    """Seconds of one input."""
    return peak.seconds(profile.operations.layers) / profile.operations.inputs


def _bytes(profile: Profile) -> dict[str, float]:
    """Bytes of one input: weights that products read, activations that they read and write, and all else moves."""
    moved, inputs = profile.operations.moved_bytes, profile.operations.inputs
    return {
        "weights": moved["weight_bytes"] / inputs,
        "activations": (moved["input_bytes"] + moved["output_bytes"]) / inputs,
        "elementwise": moved["elementwise_bytes"] / inputs,
    }


def _work_table(profiles: Sequence[Profile]) -> Table:
    table = _table("millions of", "mult", "shift", "add", "other", "weights, KiB", "data, KiB")
    for each in profiles:
        moved = _bytes(each)
        cells = [_short(count / 1e6) for count in each.work.values()]
        table.add_row(each.recipe, *cells, *(_short(moved[name] / 1024) for name in ("weights", "activations")))
    return table


def _levels_table(profiles: Sequence[Profile]) -> Table:
    table = _table("accelerator, uJ", *(level.replace("elementwise", "other") for level in LEVELS))
    for each in profiles:
        pj = each.energy["accelerator"].pj
        table.add_row(each.recipe, *(_short(pj[level] / 1e6) for level in LEVELS))
    return table


def _short(number: float) -> str:
    """In few characters: what is large has no decimals."""
    digits = 0 if abs(number) >= 1000 else 1 if abs(number) >= 100 else 2
    return f"{number:,.{digits}f}" if abs(number) >= 0.1 or not number else f"{number:.3g}"


def _table(first: str, *others: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    # As narrow as can be: a terminal of 80 columns shows all of it.
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table


def profile(
    subjects: Sequence[Subject],
    recipes: Sequence[str] = RECIPES,
    *,
    accelerator: Accelerator,
    forms: Sequence[str] = (),
    evaluations: Sequence[Evaluation] = (),
) -> ProfileReport:
    """Count the work of models in each recipe, and its energy by each account.

    Args:
        subjects: the models.
        recipes: what becomes of their layers. All recipes are compared with the first.
        accelerator: the accelerator of the account with data traffic.
        forms: forms to time the models in, from `shiftadd3d.profile.latency.FORMS`.
        evaluations: the quality of the models.

    Raises:
        UserError: no models or recipes, models with different inputs, a model that fails, an unknown form, or
            evaluations of something else.
    """
    if not subjects or not recipes:
        raise UserError("there is nothing to profile: name at least one model and one recipe")
    first = subjects[0]
    for other in subjects[1:]:
        if (other.unit, other.setting) != (first.unit, first.setting):
            raise UserError(
                f"{first.name} sees {first.setting}, but {other.name} {other.setting}: profile models beside each "
                "other that see the same"
            )
    for name in recipes:
        Recipe.parse(name)  # before the first of them is counted
    pairs = [(subject.name, recipe) for subject in subjects for recipe in subject.recipes or recipes]
    if doubled := [pair for pair in pairs if pairs.count(pair) > 1]:
        raise UserError(f"{doubled[0][0]} in recipe {doubled[0][1]} is named twice; name it once")
    qualities = assign(evaluations, pairs)
    peak: Peak | None = None
    found: list[Profile] = []
    for subject in subjects:
        counted: dict[str, tuple[nn.Module, Any, OperationReport]] = {}
        routing: dict[str, tuple[Routing, ...]] = {}
        for recipe in subject.recipes or recipes:
            counted[recipe] = _count(subject, recipe)
            routing[recipe] = _routing(subject, counted[recipe][0])
        depth = part_depth(layer.name for _, _, operations in counted.values() for layer in operations.layers)
        latencies: dict[str, dict[str, Latency]] = {}
        if forms:
            models = {recipe: (model, batch) for recipe, (model, batch, _) in counted.items()}
            peak = peak or measure_peak(device_of(next(iter(models.values()))[0]))
            latencies = measure_latencies(models, forms, inputs=subject.inputs, depth=depth)
        for recipe, (_, _, operations) in counted.items():
            reports: dict[Account, EnergyReport] = {
                account: energy(operations, account, accelerator) for account in ACCOUNTS
            }
            found.append(
                Profile(
                    subject.name,
                    recipe,
                    subject.weights,
                    operations,
                    reports,
                    depth,
                    routing[recipe],
                    latencies.get(recipe, {}),
                    qualities.get((subject.name, recipe)),
                )
            )
    return ProfileReport(first.setting, first.unit, accelerator, tuple(found), peak)


def _routing(subject: Subject, model: nn.Module) -> tuple[Routing, ...]:
    """What routers did in the last forward pass."""
    experts = {
        name: module.expert_names for name, module in model.named_modules() if isinstance(module, (MoE, FrozenMoE))
    }
    if subject.unit == "ray":
        found = []
        for layer, shares in ray_shares(model, subject.inputs).items():
            grid = None if subject.grid is None else shares.reshape(subject.grid).tolist()
            found.append(Routing(layer, experts[layer], float(shares.mean()), grid))
        return tuple(found)
    return tuple(
        Routing(each.layer, each.experts, each.share(0), (each.assignment == 0).astype(float).tolist())
        for each in routing_maps(model)
    )


def count(subject: Subject, recipe: str) -> OperationReport:
    """The work of a model in one recipe for its input.

    Raises:
        UserError: the recipe does not fit, or the model fails.
    """
    return _count(subject, recipe)[2]


def _count(subject: Subject, recipe: str) -> tuple[nn.Module, Any, OperationReport]:
    """The model, its input, and what it does with that."""
    model = subject.make(recipe)
    try:
        batch = subject.batch(model)
        return model, batch, count_operations(model, batch, inputs=subject.inputs)
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{subject.name} in recipe {recipe} fails with {subject.setting}: {reason}") from error
