"""Run a model on example inputs and look at the inputs of its layers."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shiftadd3d._errors import UserError
from shiftadd3d.nn.moe import MoE

_ROWS_AT_ONCE = 4096

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on one batch, for models and batches that `call_model` cannot combine."""


def as_batches(batches: Iterable[Any]) -> list[Any]:
    """All batches in a list, because calibration passes over them several times.

    Raises:
        UserError: if there is no batch, or `batches` is itself one batch.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise UserError(f"batches must be a list or another iterable of batches, not one {type(batches).__name__}")
    listed = list(batches)
    if not listed:
        raise UserError("there are no batches: give at least one, such as a few dozen examples of what the model sees")
    return listed


def call_model(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Run `model` on one batch. The tensors of the batch are moved to the device of the model first.

    Args:
        model: any module.
        batch: a tensor (the only argument), a tuple or list (all arguments) or a mapping (keyword arguments).
        forward: called with (model, batch) instead, if given.

    Raises:
        UserError: if the model takes no such arguments.
    """
    example = next(model.parameters(), None)
    if example is not None:
        batch = pytree.tree_map(lambda leaf: leaf.to(example.device) if isinstance(leaf, Tensor) else leaf, batch)
    if forward is not None:
        return forward(model, batch)
    args = tuple(batch) if isinstance(batch, (tuple, list)) else () if isinstance(batch, Mapping) else (batch,)
    kwargs = batch if isinstance(batch, Mapping) else {}
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise UserError(
            f"{type(model).__name__} cannot be called with this batch ({error}); say how by "
            "forward=lambda model, batch: ..., which leaves labels out, for instance"
        ) from None
    return model(*args, **kwargs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients. Afterwards every module is in its earlier mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        if any(training for _, training in modes):  # else layers may keep what they have made of their weights
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class InputStatistics:
    """Sums over the inputs of a layer. The second-order error of its weights depends on nothing else."""

    def __init__(self) -> None:
        self.rows = 0
        self._sum: Tensor = torch.zeros(())
        self._products: Tensor = torch.zeros(())

    def add(self, inputs: Tensor) -> None:
        """Add inputs [n, in] to the sums."""
        if self.rows == 0:
            self._sum = inputs.new_zeros(inputs.shape[1], dtype=torch.float64)
            self._products = self._sum.new_zeros(inputs.shape[1], inputs.shape[1])
        self.rows += len(inputs)
        # In float32 a mean far above the deviation would drown their covariance. Few at once: no second copy of all.
        for rows in inputs.detach().split(_ROWS_AT_ONCE):
            rows = rows.double()
            self._sum += rows.sum(0)
            self._products.addmm_(rows.T, rows)

    @property
    def mean(self) -> Tensor:
        """The mean input [in], float64."""
        return self._sum / self.rows

    def second_moments(self, centered: bool) -> Tensor:
        """Second moments of the inputs [in, in], float64; about their mean if `centered`."""
        second = self._products / self.rows
        return second - torch.outer(self.mean, self.mean) if centered else second


class InputTrace(NamedTuple):
    """What the watched layers saw in a pass over the batches."""

    groups: list[list[str]]
    """Names in the order of the first calls; layers that always get the very same input are one group."""
    calls: list[Counter[str]]
    """How often each layer was called, for each batch."""


def trace_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], forward: Forward | None = None
) -> InputTrace:
    """Find out in which order `model` calls `layers` (by qualified name), over all batches.

    Raises:
        UserError: for NaN or infinity in the input of a layer.
    """
    calls: list[Counter[str]] = []
    counts: Counter[str] = Counter()
    sharing: dict[str, set[str | None]] = {}  # by name, in the order of first calls: whose input it got
    last: tuple[str | None, Any] = (None, None)

    def see(name: str, inputs: Tensor) -> None:
        nonlocal last
        if not bool(torch.isfinite(inputs).all()):
            raise UserError(f"the inputs of {name} are not all finite: {_count_broken(inputs)} in batch {len(calls)}")
        counts[name] += 1
        sharing.setdefault(name, set()).add(last[0] if inputs is last[1] else None)
        last = (name, inputs)

    for batch in batches:
        counts.clear()
        with watching(model, layers, see):
            call_model(model, batch, forward)
        calls.append(Counter(counts))
        last = (None, None)

    groups: list[list[str]] = []
    group_of: dict[str, list[str]] = {}
    for name, whose in sharing.items():
        neighbour = next(iter(whose)) if len(whose) == 1 else None
        if neighbour is not None and neighbour != name and all(c[name] == c[neighbour] for c in calls):
            group_of[name] = group_of[neighbour]
        else:
            group_of[name] = []
            groups.append(group_of[name])
        group_of[name].append(name)
    return InputTrace(groups, calls)


def gather_statistics(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Any],
    trace: InputTrace,
    forward: Forward | None = None,
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of `layers`, in one pass. Each batch stops as soon as all layers have been seen."""
    statistics = {name: InputStatistics() for name in layers}
    for batch, calls in zip(batches, trace.calls, strict=True):
        left = Counter({name: calls[name] for name in layers if calls[name]})
        if not left:
            continue

        def see(name: str, inputs: Tensor, left: Counter[str] = left) -> None:
            statistics[name].add(input_rows(layers[name], inputs))
            left[name] -= 1
            if not any(left.values()):
                raise _SeenEnough

        with watching(model, layers, see), suppress(_SeenEnough):
            call_model(model, batch, forward)
    return statistics


@contextmanager
def watching(model: nn.Module, layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside this context, `see` is called with the name and the input of each of `layers` that `model` calls.

    A layer inside an expert of a mixture sees all tokens of the mixture, not only those that the router would send
    there. Routers change in training, and the choices of an untrained one mean nothing.
    """
    probing = False

    def on_layer(name: str, is_expert: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs = _first(args, kwargs)
            if (probing or not is_expert) and inputs.numel():
                see(name, inputs)

        return hook

    def on_mixture(mixture: MoE, args: tuple, kwargs: dict) -> None:
        nonlocal probing
        tokens = _first(args, kwargs)
        tokens = tokens.reshape(-1, tokens.shape[-1])
        probing = True
        try:
            for expert in mixture.experts:
                if any(module in watched for module in expert.modules()):
                    expert(tokens)
        finally:
            probing = False

    watched = set(layers.values())
    mixtures = [module for module in model.modules() if isinstance(module, MoE)]
    inside = {module for mixture in mixtures for module in mixture.experts.modules()}
    handles = [
        layer.register_forward_pre_hook(on_layer(name, layer in inside), with_kwargs=True)
        for name, layer in layers.items()
    ]
    handles += [mixture.register_forward_pre_hook(on_mixture, with_kwargs=True) for mixture in mixtures]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The vectors [n, in] that the weight multiplies, for a linear layer or a convolution that counts as one."""
    kernel: Any = getattr(layer, "kernel_size", None)
    if kernel is None:
        return inputs.reshape(-1, inputs.shape[-1])
    images = inputs.reshape(-1, *inputs.shape[-3:])
    return F.unfold(images, kernel, stride=cast(Any, layer.stride)).transpose(1, 2).flatten(0, 1)


class _SeenEnough(BaseException):
    """Leaves a forward pass once everything in it has been seen. No `Exception`: models catch these."""


def _first(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _count_broken(inputs: Tensor) -> str:
    return f"{int((~torch.isfinite(inputs)).sum())} of {inputs.numel()} values"
