"""What a model costs: multiplications, shifts and additions, and their energy (or another unit).

`count_operations` runs a model on one batch and counts matrix products and convolutions, which are nearly all of the
work of a transformer. Products with shift weights count as shifts and additions, products with binary codes as
additions, all others as multiplications and additions. Tokens of a mixture count for the expert that they went to.
Elementwise arithmetic (normalisation, activations, softmax) is counted separately. As in the literature, totals do not
include it.

`OperationCosts` gives each operation a price. Its tables cover arithmetic only. `shiftadd3d.profile` also prices data
traffic.

Source: Horowitz, "Computing's energy problem" (ISSCC 2014), for 45 nm at 0.9 V; You et al., ShiftAddNet (NeurIPS 2020),
table 1, for the shifts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shiftadd3d._errors import UserError
from shiftadd3d._report import RichReport
from shiftadd3d.nn.activations import Forward, call_model, evaluating
from shiftadd3d.nn.counting import ModuleWork, Product, counting
from shiftadd3d.nn.shift import ShiftLayer

if TYPE_CHECKING:
    from rich.table import Table


@runtime_checkable
class Costs(Protocol):
    """Prices the work of a module.

    `OperationCosts` prices arithmetic only, and `shiftadd3d.profile.energy.AccountCosts` data traffic as well.
    """

    @property
    def unit(self) -> str:
        """The unit of the prices."""
        ...

    def price(self, layer: LayerOperations) -> float:
        """The price of the work of one module, on the whole batch."""
        ...


@dataclass(frozen=True)
class OperationCosts:
    """What one scalar operation costs, in any unit.

    Raises:
        UserError: for a cost that is negative or not a finite number.
    """

    name: str
    """Name of the table of costs."""
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

    def price(self, layer: LayerOperations) -> float:
        """The price of the products of one module, on the whole batch."""
        return layer.mult * self.mult + layer.add * self.add + layer.shift * self.shift


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
    """Operations that one module does itself, without its submodules, on the whole batch."""

    name: str
    kind: str
    products: int
    """Products of an activation with a weight, a code or another activation, of any kind."""
    mult: int
    add: int
    shift: int
    formats: dict[str, dict[str, int]] = field(default_factory=dict)
    """The same three by number format of the arithmetic, such as float32."""
    weight_bytes: int = 0
    """Bytes of weights that its products read, as they are stored (packed codes count their bits). Each run counts."""
    input_bytes: int = 0
    """Bytes of activations that its products read."""
    output_bytes: int = 0
    """Bytes of activations that its products write."""
    elementwise: dict[str, dict[str, int]] = field(default_factory=dict)
    """Arithmetic outside matrix products, by number format: `Elementwise`."""
    elementwise_bytes: int = 0
    """Bytes that it reads and writes, if the operands of each operator go through memory."""
    loops: tuple[tuple[Product, int], ...] = ()
    """The products as loops, and how often each ran."""

    @classmethod
    def of(cls, name: str, work: ModuleWork) -> LayerOperations:
        """The sums over a module's work."""
        totals = dict.fromkeys(("products", "mult", "add", "shift", "weight_bytes", "input_bytes", "output_bytes"), 0)
        formats: dict[str, dict[str, int]] = {}
        for product, times in work.products.items():
            for key in totals:
                totals[key] += times * getattr(product, key)
            by_kind = formats.setdefault(product.dtype, {"mult": 0, "add": 0, "shift": 0})
            for kind in by_kind:
                by_kind[kind] += times * getattr(product, kind)
        return cls(
            name,
            work.kind,
            **totals,
            formats=formats,
            elementwise={dtype: done._asdict() for dtype, done in work.elementwise.items()},
            elementwise_bytes=sum(work.elementwise_bytes),
            loops=tuple(work.products.items()),
        )

    def cost(self, costs: Costs) -> float:
        """The cost in the unit of `costs`."""
        return costs.price(self)


@dataclass(frozen=True)
class OperationReport(RichReport):
    """The result of `count_operations`. Printing shows a table."""

    layers: tuple[LayerOperations, ...]
    """Modules with operations, in the order of their first ones."""
    inputs: int
    """Number of inputs in the batch."""
    bytes: int
    """Bytes of parameters and buffers once frozen (see `frozen_bytes`)."""

    @property
    def products(self) -> int:
        """Number of products on the whole batch. `mult`, `add` and `shift` count the same way."""
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

    @property
    def formats(self) -> dict[str, dict[str, int]]:
        """Multiplications, additions and shifts of the products by number format, on the whole batch."""
        return _by_format(layer.formats for layer in self.layers)

    @property
    def elementwise(self) -> dict[str, dict[str, int]]:
        """Arithmetic outside matrix products, by number format (`Elementwise`), on the whole batch."""
        return _by_format(layer.elementwise for layer in self.layers)

    @property
    def moved_bytes(self) -> dict[str, int]:
        """Bytes of weights read, and of activations read and written, by products and all else, on the whole batch."""
        names = "weight_bytes", "input_bytes", "output_bytes", "elementwise_bytes"
        return {name: sum(getattr(layer, name) for layer in self.layers) for name in names}

    def cost(self, costs: Costs = ENERGY_COSTS["float32"]) -> float:
        """The cost of one input, in the unit of `costs`."""
        return sum(layer.cost(costs) for layer in self.layers) / self.inputs

    def multiplications_removed(self, baseline: OperationReport) -> float:
        """Share of the multiplications of `baseline`, the model before its conversion, that are gone, per input."""
        if not baseline.mult:
            return 0.0
        return 1 - (self.mult / self.inputs) / (baseline.mult / baseline.inputs)

    def as_dict(self) -> dict[str, Any]:
        layers = [
            {**asdict(layer), "loops": [{**asdict(product), "times": times} for product, times in layer.loops]}
            for layer in self.layers
        ]
        return {
            "layers": layers,
            "inputs": self.inputs,
            "bytes": self.bytes,
            "products": self.products,
            "mult": self.mult,
            "add": self.add,
            "shift": self.shift,
            "formats": self.formats,
            "elementwise": self.elementwise,
            **self.moved_bytes,
        }

    def __rich__(self) -> Table:
        from rich.table import Table

        costs = ENERGY_COSTS["float32"]
        table = Table("module", "kind", "mult", "shift", "add", "elementwise", "KiB", "nJ", title_justify="left")
        table.title = (
            f"operations of one input (elementwise ones apart), weights and activations of products; "
            f"{self.bytes:,} bytes once frozen"
        )
        for column in table.columns[2:]:
            column.justify = "right"

        def row(part: LayerOperations | OperationReport, moved: int) -> list[str]:
            elementwise = sum(sum(counts.values()) for counts in part.elementwise.values())
            counts = (part.mult, part.shift, part.add, elementwise)
            return [*(f"{count / self.inputs:,.0f}" for count in counts), f"{moved / self.inputs / 1024:,.1f}"]

        for layer in self.layers:
            moved = layer.weight_bytes + layer.input_bytes + layer.output_bytes
            energy = f"{layer.cost(costs) / self.inputs / 1e3:,.2f}"
            table.add_row(layer.name, layer.kind, *row(layer, moved), energy)
        moved = sum(number for name, number in self.moved_bytes.items() if name != "elementwise_bytes")
        table.add_section()
        table.add_row("total", "", *row(self, moved), f"{self.cost(costs) / 1e3:,.2f}")
        return table


def _by_format(parts: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for part in parts:
        for dtype, counts in part.items():
            sums = total.setdefault(dtype, dict.fromkeys(counts, 0))
            for kind, count in counts.items():
                sums[kind] += count
    return total


def count_operations(
    model: nn.Module, batch: Any, *, forward: Forward | None = None, inputs: int | None = None
) -> OperationReport:
    """Count what `model` does on one batch, in evaluation mode and without gradients.

    Args:
        model: any module.
        batch: a tensor (the model's only argument), a tuple or list (its arguments) or a mapping (its keyword
            arguments).
        forward: called with (model, batch) to run the model instead.
        inputs: number of inputs in the batch; None for the first dimension of its first tensor.

    Returns:
        The report.

    Raises:
        UserError: if the model cannot be called with the batch, or the number of inputs is unknown.
    """
    inputs = count_inputs(batch) if inputs is None else inputs
    if inputs < 1:
        raise UserError(f"inputs must be at least 1, not {inputs}")
    with evaluating(model), counting(model) as work:
        call_model(model, batch, forward)
    return OperationReport(operations_of(work), inputs, frozen_bytes(model))


def operations_of(work: Mapping[str, ModuleWork]) -> tuple[LayerOperations, ...]:
    """The results of `counting`, without modules that do nothing."""
    layers = (LayerOperations.of(name, done) for name, done in work.items())
    return tuple(layer for layer in layers if layer.products or layer.elementwise)


def count_inputs(batch: Any) -> int:
    """The first dimension of the first tensor in `batch`.

    Raises:
        UserError: if there is none.
    """
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    raise UserError("the batch holds no tensor that would tell how many inputs it has; expected inputs=")


def frozen_bytes(model: nn.Module) -> int:
    """Bytes of the state dict of `model` after its shift layers are frozen: codes, offsets, and everything else as it
    is.

    A tensor that is used in several places counts once.
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
