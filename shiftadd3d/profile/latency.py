"""How long models take on this machine, as a whole and part by part, in several forms.

A form is a way to run a model: as it was made (eager), frozen by `freeze_`, or compiled into one executable. The forms
of all recipes take turns (`shiftadd3d.profile.timing`). Times of parts come from separate calls, in which hooks read
the clock. An executable has only one part.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd3d._errors import UserError
from shiftadd3d.nn import (
    AddAttention,
    FrozenConvMlp,
    FrozenMlp,
    FrozenModule,
    FrozenMoE,
    LayerOperations,
    PackedShiftLayer,
    freeze_,
)
from shiftadd3d.nn.activations import call_model
from shiftadd3d.nn.compiled import compile as compile_model
from shiftadd3d.profile.meter import CardMeter, Meter, PackageMeter
from shiftadd3d.profile.parts import ROOT, part_of
from shiftadd3d.profile.timing import Spread, clock, copy_rate, interleaved, product_rate

_ROUNDS_OF_PARTS = 5


def _eager(model: nn.Module, _batch: Any) -> nn.Module | None:
    return None if _is_frozen(model) else model


def _frozen(model: nn.Module, _batch: Any) -> nn.Module:
    frozen = copy.deepcopy(model)
    freeze_(frozen, verbose=False)
    return frozen


def _compiled(model: nn.Module, batch: Any) -> nn.Module | None:
    if not isinstance(batch, Tensor):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that it runs as before: then there is nothing to time
        compiled = compile_model(_frozen(model, batch), batch)
    return compiled if compiled.is_compiled else None


FORMS: dict[str, Callable[[nn.Module, Any], nn.Module | None]] = {
    "eager": _eager,
    "frozen": _frozen,
    "compiled": _compiled,
}
"""By the name of a form: makes the function to be timed from a model and its batch, without changing the model. It
returns None if the model has no such form."""


@dataclass(frozen=True)
class Latency:
    """Seconds for one input."""

    total: Spread
    parts: dict[str, float]
    """Median seconds of each part itself. Their sum is near the total, but includes reading the clock."""
    joules: float | None = None
    """Measured joules for one input, including the idle power of the machine; None if it has no meter."""


@dataclass(frozen=True)
class Peak:
    """The measured peak of the machine, on the device and with the threads that models use."""

    operations_per_second: float
    """Multiplications and additions per second in a float32 product of large matrices."""
    bytes_per_second: float
    """Bytes read and written per second in a copy of a large tensor."""
    threads: int
    card: str | None = None
    """The graphics card's name; None for the processor."""

    @property
    def place(self) -> str:
        """The device and threads in words."""
        return self.card or f"{self.threads} {'thread' if self.threads == 1 else 'threads'}"

    def seconds(self, layers: Sequence[LayerOperations]) -> float:
        """The roofline: the least time for products at the peak, or for moving all their data and that of elementwise
        work.

        Kernels that fuse layers or use narrower formats can be faster.
        """
        operations = sum(2 * layer.products for layer in layers)
        moved = sum(
            layer.weight_bytes + layer.input_bytes + layer.output_bytes + layer.elementwise_bytes for layer in layers
        )
        return max(operations / self.operations_per_second, moved / self.bytes_per_second)


def measure_peak(device: torch.device | None = None) -> Peak:
    """Time torch's product of large matrices and its copy of a large tensor. The default device is the processor."""
    kind = "cpu" if device is None else device.type
    card = torch.cuda.get_device_name(device) if kind == "cuda" else None
    return Peak(product_rate(kind, torch.float32), copy_rate(kind), torch.get_num_threads(), card)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's weights; the processor if it has no weights."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def find_meter(device: torch.device) -> Meter | None:
    """The meter for the energy of a device; None if there is none."""
    if device.type == "cuda":
        return CardMeter.find(str(torch.cuda.get_device_properties(device).uuid))
    return PackageMeter.find()


def measure_latencies(
    models: Mapping[str, tuple[nn.Module, Any]], forms: Sequence[str], *, inputs: int, depth: int, seconds: float = 2.0
) -> dict[str, dict[str, Latency]]:
    """Time models in some forms.

    Args:
        models: by name, such as that of a recipe: the model in evaluation mode and its batch, all on one device.
        forms: some of `FORMS`.
        inputs: number of inputs in a batch.
        depth: number of components in the names of parts (`part_depth`).
        seconds: roughly how long the whole models take turns.

    Returns:
        The times of one input for each model and form. A frozen model has no eager form, and some models cannot be
        compiled.

    Raises:
        UserError: an unknown form, or a model that cannot be brought into it.
    """
    if unknown := [form for form in forms if form not in FORMS]:
        raise UserError(f"there is no form {unknown[0]!r} of a model; expected some of {', '.join(FORMS)}")
    runs: dict[tuple[str, str], tuple[nn.Module, Any]] = {
        (name, form): (made, batch)
        for name, (model, batch) in models.items()
        for form in forms
        if (made := FORMS[form](model, batch)) is not None
    }
    device = next((device_of(model) for model, _ in models.values()), torch.device("cpu"))
    calls = {f"{name} {form}": lambda run=run: call_model(*run) for (name, form), run in runs.items()}
    found: dict[str, dict[str, Latency]] = {}
    with torch.inference_mode():
        for call in calls.values():
            call()  # compiles, allocates
        totals = interleaved(calls, device.type, seconds=seconds)
        meter = find_meter(device)
        for (name, form), (model, batch) in runs.items():
            call = calls[f"{name} {form}"]
            whole = totals[f"{name} {form}"]
            total = Spread(whole.median / inputs, whole.lower / inputs, whole.upper / inputs)
            parts = _seconds_of_parts(model, batch, depth)
            joules = None if meter is None else meter.joules(lambda call=call: _finished(call, device)) / inputs
            found.setdefault(name, {})[form] = Latency(
                total, {part: time / inputs for part, time in parts.items()}, joules
            )
    return found


def _finished(call: Callable[[], Any], device: torch.device) -> None:
    """Call, and wait: a graphics card works on after the call has returned."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _is_frozen(model: nn.Module) -> bool:
    packed = (PackedShiftLayer, FrozenModule, FrozenMlp, FrozenConvMlp, FrozenMoE)
    return any(isinstance(module, packed) for module in model.modules())


def _seconds_of_parts(model: nn.Module, batch: Any, depth: int) -> dict[str, float]:
    """Median seconds of what each part does itself, on the whole batch."""
    rounds: list[dict[str, float]] = []
    with _Clock(model, depth) as clocks:
        for _ in range(_ROUNDS_OF_PARTS):
            clocks.own = {}
            call_model(model, batch)
            rounds.append(clocks.own)
    return {part: statistics.median(each.get(part, 0.0) for each in rounds) for part in rounds[0]}


def _card_clock() -> float:
    """Seconds, once the graphics card is done with all that it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


class _Clock:
    """While this lasts, notes down in `own` how long the parts of a model take."""

    def __init__(self, model: nn.Module, depth: int) -> None:
        self.own: dict[str, float] = {}
        self._running: list[list[float]] = []  # when it began, and how long those inside took
        self._handles: list[Any] = []
        self._clock = _card_clock if device_of(model).type == "cuda" else clock()
        self._depth = depth
        self._model = model

    def __enter__(self) -> _Clock:
        for name, module in _outside_kernels(self._model, self._depth).items():
            self._handles.append(module.register_forward_pre_hook(self._begin))
            part = part_of(name, self._depth) or ROOT
            self._handles.append(module.register_forward_hook(lambda *_, part=part: self._end(part), always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, _module: nn.Module, _inputs: Any) -> None:
        self._running.append([self._clock(), 0.0])

    def _end(self, part: str) -> None:
        began, inside = self._running.pop()
        took = self._clock() - began
        self.own[part] = self.own.get(part, 0.0) + took - inside
        if self._running:
            self._running[-1][1] += took


def _outside_kernels(model: nn.Module, depth: int) -> dict[str, nn.Module]:
    """Modules whose times make those of parts, and none whose work a kernel does: a hook there would keep it away."""
    within: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, FrozenModule):
            within |= {inner for part in module.parts() for inner in part.modules()}
        elif isinstance(module, (FrozenMlp, FrozenConvMlp, FrozenMoE)):
            within |= set(module.modules()) - {module}
        elif isinstance(module, AddAttention):
            within |= {code for code in (module.q_code, module.k_code) if code is not None}
    found: dict[str, nn.Module] = {}

    def look_at(name: str, module: nn.Module, level: int) -> None:
        if module in within:
            return
        # A list of modules is never called: those in it are looked at in its stead.
        is_called = not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        if is_called:
            found[name] = module
        if level < depth or not is_called:
            for child_name, child in module.named_children():
                look_at(f"{name}.{child_name}" if name else child_name, child, level + 1)

    look_at("", model, 0)
    return found
