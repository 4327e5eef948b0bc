"""Which layers suffer most from losing their multiplications, and the best recipe for a budget.

`sensitivity` changes one layer at a time, calibrates it, and measures how much the model's output changes and how much
cheaper the model becomes. `search_recipe` then chooses what becomes of each layer, so that the total cost stays within
a budget and the sum of squared errors is smallest (a knapsack problem with one choice for each layer).

Squared errors add up as long as they are small and independent of each other. So their sum is an estimate, good enough
to rank recipes. Counted costs (energy) add up exactly. Latencies are measured on this device layer by layer: in frozen
form, or compiled with the smallest part of the model around the layer that can be compiled.
"""

from __future__ import annotations

import copy
import fnmatch
import glob
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shiftadd3d._errors import UserError
from shiftadd3d._progress import passing_bar
from shiftadd3d._report import RichReport
from shiftadd3d.nn.activations import (
    Forward,
    InputStatistics,
    as_batches,
    call_model,
    evaluating,
    gather_statistics,
    trace_inputs,
)
from shiftadd3d.nn.calibrate import calibrate_layers_, round_layer_
from shiftadd3d.nn.compiled import compile as compile_model
from shiftadd3d.nn.cost import ENERGY_COSTS, Costs, count_inputs, operations_of
from shiftadd3d.nn.counting import counting
from shiftadd3d.nn.freeze import freeze_
from shiftadd3d.nn.moe import measure_latencies
from shiftadd3d.nn.reparam import Recipe, Rule, reparameterize_
from shiftadd3d.nn.shift import ShiftLayer

if TYPE_CHECKING:
    from rich.console import Group

CANDIDATES = (Rule("*", "shift", 4, 1), Rule("*", "shift", 4, 2), Rule("*", "moe", 4, 1), Rule("*", "add"))
"""Default candidates: one power of two, two of them, a mixture, and additive attention."""

# The fields of a recipe that put a primitive wherever it can stand.
_PLACES: dict[str, tuple[str, ...]] = {
    "shift": ("attention_linear", "mlp", "other_linear"),
    "moe": ("attention_linear", "mlp"),
    "add": ("attention",),
}
Latencies = Literal["latency", "compiled latency"]
"""Measured costs: seconds of single frozen layers, or of executables (`shiftadd3d.compile`)."""

_RESOLUTION = 8000  # costs that are told apart between the cheapest recipe and the float model


@dataclass(frozen=True)
class LayerSensitivity:
    """The effect of one change of one layer on the model, while all else is float."""

    name: str
    rules: tuple[Rule, ...]
    """The change, as rules of a recipe."""
    error: float
    """Root mean square of the change of the outputs, divided by that of the outputs."""
    cost: float
    """Change of the cost of one input. Negative values are cheaper."""

    @property
    def label(self) -> str:
        """A short name of the change, such as "shift 2 x 4"."""
        return " + ".join(_label(rule) for rule in self.rules)


@dataclass(frozen=True)
class RecipeChoice:
    """The recipe for a budget, with its expected error and cost."""

    recipe: Recipe
    error: float
    """Estimated error of the outputs, as in `LayerSensitivity`."""
    cost: float
    """Cost of one input."""


@dataclass(frozen=True)
class SensitivityReport(RichReport):
    """The measurements of `sensitivity`. Printing shows a table."""

    base: Recipe
    float_cost: float
    """Cost of one input of the model as it is."""
    unit: str
    layers: tuple[LayerSensitivity, ...]

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        table = Table("module", "becomes", "error", "saved", title_justify="left")
        table.title = "relative error of the model's output, and share of its cost saved, if one layer changes"
        table.columns[2].justify = table.columns[3].justify = "right"
        for name in dict.fromkeys(layer.name for layer in self.layers):
            for layer in self.layers:
                if layer.name == name:
                    saved = -layer.cost / self.float_cost if self.float_cost else 0.0
                    table.add_row(name, layer.label, f"{layer.error:.2%}", f"{saved:.1%}")
        return Group(table, f"cost of one input as it is: {self.float_cost:,.4g} {self.unit}")

    def best_recipe(self, budget: float, *, absolute: bool = False) -> RecipeChoice:
        """The recipe with the least estimated error whose cost is within `budget`.

        A larger budget never gives a larger estimate.

        Args:
            budget: share of the model's cost, above 0 and at most 1. If `absolute`, the cost of one input.
            absolute: see `budget`.

        Raises:
            UserError: for an impossible budget, or one below the cost of the cheapest recipe.
        """
        if not (math.isfinite(budget) and budget > 0 and (absolute or budget <= 1)):
            limits = "a positive cost" if absolute else "a share of the model's cost, above 0 and at most 1"
            raise UserError(f"the budget must be {limits}, not {budget!r}")
        frontier = _frontier(_units(self.layers))
        least = self.float_cost + frontier[0].cost
        limit = budget if absolute else budget * self.float_cost
        limit *= 1 + 1e-9  # budgets that are met exactly are met
        if limit < least:
            share = f" ({least / self.float_cost:.1%} of the model's)" if self.float_cost else ""
            raise UserError(
                f"a budget of {limit:.4g} {self.unit} is out of reach: the cheapest recipe costs {least:.4g} "
                f"{self.unit}{share}"
            )
        chosen = [choice for choice in frontier if self.float_cost + choice.cost <= limit][-1]
        return RecipeChoice(
            replace(self.base, name=f"searched-{budget:g}", rules=(*self.base.rules, *chosen.rules)),
            math.sqrt(chosen.squared_error),
            self.float_cost + chosen.cost,
        )


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    candidates: Sequence[Rule] = CANDIDATES,
    *,
    base: Recipe | None = None,
    costs: Costs | Latencies = ENERGY_COSTS["float32"],
    forward: Forward | None = None,
    inputs: int | None = None,
    verbose: bool = True,
) -> SensitivityReport:
    """Measure what each candidate costs and saves, layer by layer, with all other layers unchanged.

    Shift weights are calibrated on `batches` as in `calibrate_`, and routers are fitted. The model is unchanged
    afterwards. This takes one pass over the batches for each layer and candidate, and a few more for mixtures.

    Args:
        model: any module, with its float weights.
        batches: example inputs, as for `calibrate_`.
        candidates: rules to try. Each is tried on the layers that its pattern names and that it fits. With "add",
            attention modules are also tried with each "shift" candidate for their linear layers.
        base: a recipe for options and excluded layers. It must not change anything itself.
        costs: prices of the work: `OperationCosts`, or `shiftadd3d.profile.energy.AccountCosts`, which includes data
            traffic. Or "latency": seconds, measured for each layer on the inputs of the first batch. Or "compiled
            latency": seconds of the smallest part of the model around a layer that `shiftadd3d.compile` compiles both
            with the change and without. If not even the whole model compiles, "latency" is used, with a warning.
        forward: called with (model, batch) to run the model instead.
        inputs: number of inputs in all batches; None for the sum of the first dimensions of their first tensors.

    Returns:
        The report.

    Raises:
        UserError: if there are no batches or no candidates, a candidate fits nothing, `base` changes something, or the
            outputs hold no floats; and as `calibrate_`.
    """
    batches = as_batches(batches)
    base = Recipe() if base is None else base
    if not candidates:
        raise UserError("there are no candidates: give rules to try, such as Rule('*', 'shift')")
    if idle := [rule for rule in candidates if rule.primitive not in _PLACES]:
        raise UserError(f"a candidate must say one of {', '.join(_PLACES)}, not {idle[0].primitive}: {idle[0]}")
    if costs not in get_args(Latencies) and not isinstance(costs, Costs):
        known = ", ".join(map(repr, get_args(Latencies)))
        raise UserError(f"costs must be one of {known}, or have a unit and a price, not {costs!r}")
    inputs = sum(count_inputs(batch) for batch in batches) if inputs is None else inputs
    trials = _Trials(model, batches, base, costs, forward, inputs)
    unit = "s" if trials.costs is None else trials.costs.unit
    report = SensitivityReport(base, trials.float_cost, unit, tuple(trials.run(candidates, verbose)))
    if verbose:
        report.show()
    return report


def search_recipe(
    model: nn.Module,
    batches: Iterable[Any],
    budget: float,
    *,
    absolute: bool = False,
    candidates: Sequence[Rule] = CANDIDATES,
    base: Recipe | None = None,
    costs: Costs | Latencies = ENERGY_COSTS["float32"],
    forward: Forward | None = None,
    inputs: int | None = None,
    verbose: bool = True,
) -> Recipe:
    """Find out what should become of each layer, so that the model stays within a budget with the least error.

    To try several budgets, call `sensitivity` once and `SensitivityReport.best_recipe` for each.

    Args:
        budget: share of the model's cost, above 0 and at most 1. If `absolute`, the cost of one input in the unit of
            `costs`, such as picojoules or seconds.
        others: as in `sensitivity`.

    Returns:
        A recipe with one rule for each layer that changes, for `calibrate_` or `reparameterize_`. `count_operations`
        then counts the promised cost. For mixtures, this is true on average over the batches, after `calibrate_` has
        fitted their routers.

    Raises:
        UserError: if the budget cannot be met; and as `sensitivity`.
    """
    report = sensitivity(
        model, batches, candidates, base=base, costs=costs, forward=forward, inputs=inputs, verbose=verbose
    )
    choice = report.best_recipe(budget, absolute=absolute)
    if verbose:
        share = f" ({choice.cost / report.float_cost:.1%})" if report.float_cost else ""
        print(
            f"{len(choice.recipe.rules)} rules; {choice.cost:,.4g} {report.unit}{share}, estimated error "
            f"{choice.error:.2%}"
        )
    return choice.recipe


class _Option(NamedTuple):
    """One thing that may become of a part of the model."""

    rules: tuple[Rule, ...]
    squared_error: float
    cost: float


def _units(layers: Sequence[LayerSensitivity]) -> list[list[_Option]]:
    """The options of each part of the model that is decided on by itself.

    A module that can change as a whole (a perceptron into a mixture, say) and the layers inside it are one part.
    """
    own: dict[str, list[_Option]] = {}
    for layer in layers:
        if math.isfinite(layer.error):
            own.setdefault(layer.name, []).append(_Option(layer.rules, layer.error**2, layer.cost))

    def units(names: Sequence[str]) -> list[list[_Option]]:
        outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
        found = []
        for name in outer:
            inner = _frontier(units([other for other in names if other.startswith(f"{name}.")]))
            found.append([*inner, *own[name]])
        return found

    return units(list(own))


def _frontier(units: Iterable[Sequence[_Option]]) -> list[_Option]:
    """Choices of one option from each unit that no other choice beats in both cost and error, the cheapest first.

    The first and the last one, all float, are exact. Where there are more than can be told apart on a scale of
    `_RESOLUTION` costs, the cheapest of those with one cost stays.
    """
    frontier = [_Option((), 0.0, 0.0)]
    for options in units:
        choices = [
            _Option(some.rules + option.rules, some.squared_error + option.squared_error, some.cost + option.cost)
            for some, option in itertools.product(frontier, options)
        ]
        choices.sort(key=lambda choice: (choice.cost, choice.squared_error))
        step = (choices[-1].cost - choices[0].cost) / _RESOLUTION
        frontier = []
        least, bound = math.inf, -math.inf
        for choice in choices:
            if choice.squared_error < least and (choice.cost >= bound or choice.squared_error == 0):
                frontier.append(choice)
                least, bound = choice.squared_error, choice.cost + step
    return frontier


class _Trials:
    """One model, changed in one place at a time."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        base: Recipe,
        costs: Costs | Latencies,
        forward: Forward | None,
        inputs: int,
    ) -> None:
        self.model, self.batches, self.base, self.forward, self.inputs = model, batches, base, forward, inputs
        self.costs = None if isinstance(costs, str) else costs
        self._calls: dict[str, list[_Call]] = {}
        # The model as it is, and what of it has been compiled: None for what cannot be.
        self._before = copy.deepcopy(model) if costs == "compiled latency" else None
        self._executables: dict[str, nn.Module | None] = {}
        self._uncompiled: list[str] = []
        self.reference, self.float_cost = self._run()
        if not any(self.reference):
            raise UserError("the model's output holds no floats to compare: return them by forward=")
        if self.costs is None:
            whole = _Replay(model, [((batches[0],), {})], lambda model, batch: call_model(model, batch, forward))
            if compiled := self._executable_before(""):
                whole = _Replay(compiled, self._recorded_calls(""))
            self.float_cost = self._seconds(whole)[0]

    def run(self, candidates: Sequence[Rule], verbose: bool) -> Iterator[LayerSensitivity]:
        planned = self._plan(candidates)
        with passing_bar(verbose) as progress:
            task = progress.add_task("looking at activations", total=len(planned))
            # What a mere rounding of one layer needs to know is the same for all formats.
            statistics = self._statistics([name for name, rules in planned if rules[0].primitive == "shift"])
            for name, rules in planned:
                original = self.model.get_submodule(name)
                with self._changed(name, rules, statistics.get(name) if rules[0].primitive == "shift" else None):
                    outputs, cost = self._run()
                    change = cost - self.float_cost if self.costs else self._seconds_added(name, original)
                layer = LayerSensitivity(name, rules, _relative_error(outputs, self.reference), change)
                progress.update(task, advance=1, description=f"{name}: {layer.label}")
                yield layer
        if self._uncompiled:
            warnings.warn(
                f"{len(self._uncompiled)} of {len(planned)} changes, such as that of {self._uncompiled[0]}, are in no "
                "part of this model that can be compiled before and after: they are timed as frozen layers",
                RuntimeWarning,
                stacklevel=3,
            )

    def _plan(self, candidates: Sequence[Rule]) -> list[tuple[str, tuple[Rule, ...]]]:
        """All changes to try: a module's name, and the rules that change it."""
        settled = reparameterize_(copy.deepcopy(self.model), self.base, verbose=False).layers
        if settled:
            raise UserError(
                f"the base recipe {self.base.name!r} changes {settled[0].name} itself: it may only give options and "
                "excluded layers"
            )
        planned: list[tuple[str, tuple[Rule, ...]]] = []
        for candidate in candidates:
            places = dict.fromkeys(_PLACES[candidate.primitive], candidate.primitive)
            everywhere = replace(self.base, **places)
            for layer in reparameterize_(copy.deepcopy(self.model), everywhere, verbose=False).layers:
                if not fnmatch.fnmatchcase(layer.name, candidate.pattern):
                    continue
                rule = replace(candidate, pattern=glob.escape(layer.name))
                planned.append((layer.name, (rule,)))
                if candidate.primitive == "add":
                    shifts = [other for other in candidates if other.primitive == "shift"]
                    planned += [(layer.name, (rule, replace(shift, pattern=rule.pattern))) for shift in shifts]
        if not planned:
            raise UserError("no candidate fits any layer of this model: " + ", ".join(map(repr, candidates)))
        return planned

    def _statistics(self, names: Sequence[str]) -> dict[str, InputStatistics]:
        layers = {name: self.model.get_submodule(name) for name in names}
        with evaluating(self.model):
            trace = trace_inputs(self.model, layers, self.batches, self.forward)
            leaders = {group[0]: layers[group[0]] for group in trace.groups}
            statistics = gather_statistics(self.model, leaders, self.batches, trace, self.forward)
        return {name: statistics[group[0]] for group in trace.groups for name in group}

    @contextmanager
    def _changed(self, name: str, rules: tuple[Rule, ...], statistics: InputStatistics | None) -> Iterator[None]:
        """While this lasts, the module called `name` is what `rules` say, calibrated."""
        original = self.model.get_submodule(name)
        places = [
            (parent, attribute)
            for parent in self.model.modules()
            for attribute, child in parent._modules.items()
            if child is original
        ]
        stand_in = copy.deepcopy(original)  # new layers share their weights with the old ones
        try:
            for parent, attribute in places:
                setattr(parent, attribute, stand_in)
            old = set(self.model.modules())
            reparameterize_(self.model, replace(self.base, rules=(*self.base.rules, *rules)), verbose=False)
            new = {name: module for name, module in self.model.named_modules() if module not in old}
            with evaluating(self.model):
                changed = new[name]
                if statistics is not None and isinstance(changed, ShiftLayer):
                    round_layer_(changed, statistics, name)
                else:
                    calibrate_layers_(self.model, new, self.batches, forward=self.forward)
            yield
        finally:
            for parent, attribute in places:
                setattr(parent, attribute, original)

    def _run(self) -> tuple[list[list[Tensor]], float]:
        """The floats that the model gives for each batch, and what one input costs by the operations it takes."""
        outputs: list[list[Tensor]] = []
        with evaluating(self.model), counting(self.model) if self.costs else nullcontext({}) as work:
            for batch in self.batches:
                leaves = pytree.tree_leaves(call_model(self.model, batch, self.forward))
                outputs.append([leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()])
        total = sum(layer.cost(self.costs) for layer in operations_of(work)) if self.costs else 0.0
        return outputs, total / self.inputs

    def _seconds_added(self, name: str, original: nn.Module) -> float:
        """How much longer one input takes with what now stands at `name`, once frozen, than with `original`."""
        if self._before is not None:
            for part in _around(name):
                before = self._executable_before(part)
                after = None if before is None else self._executable(self.model, part)
                if before is not None and after is not None:
                    calls = self._recorded_calls(part)
                    without, having = self._seconds(_Replay(before, calls), _Replay(after, calls))
                    return having - without
            self._uncompiled.append(name)
        container = nn.ModuleDict({"changed": copy.deepcopy(self.model.get_submodule(name))})
        freeze_(container, verbose=False)
        calls = self._recorded_calls(name)
        before, after = self._seconds(_Replay(original, calls), _Replay(container["changed"], calls))
        return after - before

    def _executable_before(self, name: str) -> nn.Module | None:
        """The part called `name` of the model as it is, compiled; None if that cannot be, or is not asked for."""
        if self._before is not None and name not in self._executables:
            self._executables[name] = self._executable(self._before, name)
        return self._executables.get(name)

    def _executable(self, model: nn.Module, name: str) -> nn.Module | None:
        """The part called `name` of a model, frozen and compiled for what the first batch calls it with."""
        calls = self._recorded_calls(name)
        if not calls or any(kwargs or not all(isinstance(x, Tensor) for x in args) for args, kwargs in calls):
            return None
        container = nn.ModuleDict({"part": copy.deepcopy(model.get_submodule(name))}).eval()
        freeze_(container, verbose=False)
        with warnings.catch_warnings(), suppress(UserError):  # what is on another device, or takes no batches
            warnings.simplefilter("ignore", RuntimeWarning)  # that it runs as before: then there is nothing to time
            compiled = compile_model(container["part"], calls[0][0])
            return compiled if compiled.is_compiled else None
        return None

    def _recorded_calls(self, name: str) -> list[_Call]:
        """Arguments with which the model calls the module at `name` for the first batch."""
        if name not in self._calls:
            calls = self._calls[name] = []
            module = self.model.get_submodule(name)
            hook = module.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
            with evaluating(self.model):
                call_model(self.model, self.batches[0], self.forward)
            hook.remove()
        return self._calls[name]

    def _seconds(self, *replays: _Replay) -> tuple[float, ...]:
        """Seconds that one input takes, for each of `replays` of what the first batch does."""
        example = next(self.model.parameters())  # tells which device to wait for
        seconds = measure_latencies(replays, example)
        return tuple(second * len(self.batches) / self.inputs for second in seconds)


_Call = tuple[tuple, dict]
"""Arguments of a module, by position and by keyword."""


def _around(name: str) -> Iterator[str]:
    """The qualified names of a module and of all that it is in, up to the model itself."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


class _Replay(nn.Module):
    """Calls a module again as it has been called before."""

    def __init__(
        self,
        module: nn.Module,
        calls: list[_Call],
        call: Callable[..., Any] = lambda module, *args, **kwargs: module(*args, **kwargs),
    ) -> None:
        super().__init__()
        self.module, self._calls, self._call = module, calls, call

    def forward(self, _: Tensor) -> None:
        for args, kwargs in self._calls:
            self._call(self.module, *args, **kwargs)


def _relative_error(outputs: list[list[Tensor]], reference: list[list[Tensor]]) -> float:
    """Root of the mean, over the tensors of an output, of squared change over square. Infinite if not a number."""
    ratios = []
    for got, wanted in zip(zip(*outputs, strict=True), zip(*reference, strict=True), strict=True):
        scale = sum(float(w.double().square().sum()) for w in wanted)
        change = sum(float((g - w).double().square().sum()) for g, w in zip(got, wanted, strict=True))
        if scale > 0:
            ratios.append(change / scale)
    error = math.sqrt(sum(ratios) / len(ratios)) if ratios else 0.0
    return error if math.isfinite(error) else math.inf


def _label(rule: Rule) -> str:
    bits = f" {rule.bits}" if rule.terms in (None, 1) else f" {rule.terms} x {rule.bits}"
    return rule.primitive + (bits if rule.bits is not None else "")
