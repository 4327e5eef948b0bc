"""What a model costs: multiplications, shifts and additions, and what these take in energy (or in whatever unit).

`count_operations` runs a model on one batch and counts the scalar operations of its matrix products and convolutions,
where nearly all of the work of a transformer is: products with shift weights count as shifts and additions, products
with binary codes as additions, all others as multiplications and additions. Tokens of a mixture count for the expert
they went to. Elementwise arithmetic (normalisation, activations, softmax) is left out, as the literature leaves it out.

`OperationCosts` gives each operation a price. Its tables are about arithmetic alone; moving data costs extra.

Source: Horowitz, "Computing's energy problem" (ISSCC 2014), for 45 nm at 0.9 V; You et al., ShiftAddNet (NeurIPS 2020),
table 1, for the shifts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shiftadd3d._errors import UserError
from shiftadd3d._report import RichReport
from shiftadd3d.kernels import numerics
from shiftadd3d.nn.activations import Forward, call_model, evaluating
from shiftadd3d.nn.shift import PackedShiftLayer, ShiftLayer

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class OperationCosts:
    """What one scalar operation costs, in any unit. Raises `UserError` for what is no cost."""

    name: str
    """What the numbers are about."""
    mult: float
    """A multiplication."""
    add: float
    """An addition."""
    shift: float
    """A shift: the multiplication by a power of two."""
    unit: str = "pJ"

    def __post_init__(self) -> None:
        for operation in ("mult", "add", "shift"):
            value = getattr(self, operation)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise UserError(f"the cost of one {operation} must be a number that is not negative, not {value!r}")


# The shift of a float is an addition to its exponent, 8 bits in float32; Horowitz has 0.03 pJ for that. The literature
# prices it like a 32-bit shifter all the same, and so does this: it is on the safe side.
ENERGY_COSTS: dict[str, OperationCosts] = {
    costs.name: costs
    for costs in (
        OperationCosts("float32", mult=3.7, add=0.9, shift=0.13),
        OperationCosts("float16", mult=1.1, add=0.4, shift=0.13),
        OperationCosts("int32", mult=3.1, add=0.1, shift=0.13),
        OperationCosts("int8", mult=0.2, add=0.03, shift=0.024),
    )
}
"""Picojoules of one operation in 45 nm, by number format."""


@dataclass(frozen=True)
class LayerOperations:
    """Operations that one module does itself, not in its submodules, on the whole batch."""

    name: str
    kind: str
    products: int
    """Products of a weight, a code or an activation with an activation, whatever they are made of."""
    mult: int
    add: int
    shift: int

    def cost(self, costs: OperationCosts) -> float:
        """What that takes, in the unit of `costs`."""
        return self.mult * costs.mult + self.add * costs.add + self.shift * costs.shift


@dataclass(frozen=True)
class OperationReport(RichReport):
    """What `count_operations` found. Printing shows a table."""

    layers: tuple[LayerOperations, ...]
    """Modules that do any, in the order of their first ones."""
    inputs: int
    """Inputs in the batch."""
    bytes: int
    """Of parameters and buffers once frozen (see `frozen_bytes`)."""

    @property
    def products(self) -> int:
        """Products on the whole batch; so are `mult`, `add` and `shift`."""
        return sum(layer.products for layer in self.layers)

    @property
    def mult(self) -> int:
        return sum(layer.mult for layer in self.layers)

    @property
    def add(self) -> int:
        return sum(layer.add for layer in self.layers)

    @property
    def shift(self) -> int:
        return sum(layer.shift for layer in self.layers)

    def cost(self, costs: OperationCosts = ENERGY_COSTS["float32"]) -> float:
        """What one input takes, in the unit of `costs`."""
        return sum(layer.cost(costs) for layer in self.layers) / self.inputs

    def multiplications_removed(self, baseline: OperationReport) -> float:
        """Share of the multiplications of `baseline`, the model it was, that are gone. Per input."""
        if not baseline.mult:
            return 0.0
        return 1 - (self.mult / self.inputs) / (baseline.mult / baseline.inputs)

    def as_dict(self) -> dict[str, Any]:
        totals = {"products": self.products, "mult": self.mult, "add": self.add, "shift": self.shift}
        return {**super().as_dict(), **totals}

    def __rich__(self) -> Table:
        from rich.table import Table

        costs = ENERGY_COSTS["float32"]
        table = Table("module", "kind", "mult", "shift", "add", "nJ", title_justify="left")
        table.title = f"operations of one input; {self.bytes:,} bytes once frozen"
        for column in table.columns[2:]:
            column.justify = "right"
        for layer in self.layers:
            counts = (layer.mult, layer.shift, layer.add)
            cells = [f"{count / self.inputs:,.0f}" for count in counts]
            table.add_row(layer.name, layer.kind, *cells, f"{layer.cost(costs) / self.inputs / 1e3:,.2f}")
        totals = [f"{count / self.inputs:,.0f}" for count in (self.mult, self.shift, self.add)]
        table.add_section()
        table.add_row("total", "", *totals, f"{self.cost(costs) / 1e3:,.2f}")
        return table


def count_operations(
    model: nn.Module, batch: Any, *, forward: Forward | None = None, inputs: int | None = None
) -> OperationReport:
    """Count what `model` does on one batch, in evaluation and without gradients.

    Args:
        batch: a tensor (the model's only argument), a tuple or list (its arguments) or a mapping (its keyword
            arguments).
        forward: called with (model, batch) to run the model instead.
        inputs: how many inputs the batch holds; None for the first dimension of its first tensor.

    Returns:
        The report.

    Raises:
        UserError: if the model cannot be called with the batch, or the number of inputs is not to be seen.
    """
    inputs = count_inputs(batch) if inputs is None else inputs
    if inputs < 1:
        raise UserError(f"inputs must be at least 1, not {inputs}")
    with evaluating(model), counting(model) as counts:
        call_model(model, batch, forward)
    return OperationReport(tuple(counts.values()), inputs, frozen_bytes(model))


def count_inputs(batch: Any) -> int:
    """The first dimension of the first tensor in `batch`.

    Raises:
        UserError: if there is none.
    """
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    raise UserError("the batch holds no tensor to read off how many inputs it has: say so by inputs=")


def frozen_bytes(model: nn.Module) -> int:
    """Bytes of the state dict that `model` has once its shift layers are frozen: codes, offsets, and all else as it is.

    What stands in several places counts once.
    """
    total, seen = 0, set()
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or name in module._non_persistent_buffers_set or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if not isinstance(module, ShiftLayer) or name == "bias":
                total += tensor.numel() * tensor.element_size()
            elif name in ("weight", "shift"):
                row = (module.in_features * module.bits + 7) // 8 + 1  # codes and the offset
                total += module.terms * module.out_features * row
    return total


@contextmanager
def counting(model: nn.Module) -> Iterator[Mapping[str, LayerOperations]]:
    """While this lasts, operations of `model` are added up: by qualified name, complete once it is over."""
    names = {module: name or "(root)" for name, module in model.named_modules()}
    running: list[nn.Module] = [model]
    counts: dict[str, LayerOperations] = {}

    def count(module: nn.Module, products: int, mult: int = 0, add: int = 0, shift: int = 0) -> None:
        name = names[module]
        old = counts.get(name, LayerOperations(name, type(module).__name__, 0, 0, 0, 0))
        counts[name] = LayerOperations(
            name, old.kind, old.products + products, old.mult + mult, old.add + add, old.shift + shift
        )

    def enter(module: nn.Module, _: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        running.pop()
        if isinstance(module, (ShiftLayer, PackedShiftLayer)):
            products = output.numel() * module.in_features
            shifts = products * module.terms
            count(module, products, shift=shifts, add=shifts)

    def see(products: int, is_accumulation: bool) -> None:
        module = running[-1]
        if not isinstance(module, (ShiftLayer, PackedShiftLayer)):  # however they compute: see leave()
            count(module, products, mult=0 if is_accumulation else products, add=products)

    handles = [module.register_forward_pre_hook(enter) for module in names]
    handles += [module.register_forward_hook(leave) for module in names]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole attention layer: it hides products
        with numerics("twin"), _ProductMode(see):
            yield counts
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()


def _first_numel(first: Tensor, *_: Any, **__: Any) -> int:
    return first.numel()


def _second_numel(_: Any, second: Tensor, *__: Any, **___: Any) -> int:
    return second.numel()


aten = torch.ops.aten
# Products that torch's own table of formulas leaves out.
_MORE_PRODUCTS: dict[Any, Callable[..., int]] = {
    aten.mv: _first_numel,
    aten.dot: _first_numel,
    aten.addmv: _second_numel,
}
# Where the two operands stand in those operators that may meet binary codes.
_OPERANDS = {aten.mm: 0, aten.bmm: 0, aten.mv: 0, aten.addmm: 1, aten.baddbmm: 1, aten.addmv: 1}


class _ProductMode(TorchDispatchMode):
    """Calls `see` with the number of products of each operator that runs, and whether one operand holds only codes."""

    def __init__(self, see: Callable[[int, bool], None]) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # takes a second: it imports torch.export and Triton

        self._see, self._formulas = see, flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        formula = self._formulas.get(packet)
        if formula is None and packet not in _MORE_PRODUCTS:
            with self:  # inference mode shows operators before their parts
                decomposed = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if decomposed is NotImplemented else decomposed
        out = func(*args, **kwargs)
        if formula is None:
            products = _MORE_PRODUCTS[packet](*args, **kwargs)
        else:
            products = formula(*args, **kwargs, out_val=out) // 2  # it counts a product and its addition as two
        first = _OPERANDS.get(packet)
        self._see(products, first is not None and any(_holds_codes(operand) for operand in args[first : first + 2]))
        return out


def _holds_codes(operand: Tensor) -> bool:
    """Whether all values are -1, 0 or 1, and not all 0: a product with such a value adds, subtracts or does nothing."""

    def only_codes(values: Tensor) -> bool:
        magnitude = values.abs()
        return bool(((magnitude == 0) | (magnitude == 1)).all())

    flat = operand.reshape(-1)
    return only_codes(flat[:64]) and only_codes(flat) and bool(flat.any())
