"""The energy of a model's work by three accounts with different assumptions.

- `arithmetic`: the price of every operation in 45 nm. Data traffic is free.
- `authors`: the accounting of ShiftAddViT's authors (`shiftadd3d.profile.authors`).
- `accelerator`: one set of rules for all layers, on an accelerator like Eyeriss (`shiftadd3d.profile.tiling`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from shiftadd3d._errors import UserError
from shiftadd3d.nn import ENERGY_COSTS, LayerOperations, OperationReport
from shiftadd3d.nn.counting import Product
from shiftadd3d.profile import authors
from shiftadd3d.profile.accelerator import Accelerator
from shiftadd3d.profile.authors import authors_energy
from shiftadd3d.profile.tiling import best_mapping

Account = Literal["arithmetic", "authors", "accelerator"]
ACCOUNTS: tuple[Account, ...] = ("arithmetic", "authors", "accelerator")
LEVELS = ("arithmetic", "register", "noc", "buffer", "dram", "elementwise")


@dataclass(frozen=True)
class LayerEnergy:
    """The energy of one module's own work, on the whole batch."""

    name: str
    kind: str
    pj: dict[str, float]
    """Picojoules by level: arithmetic, register, noc, buffer, dram, and elementwise (work outside of products)."""
    cycles: int = 0
    """Cycles of the accelerator's arrays; 0 in the other accounts."""


@dataclass(frozen=True)
class EnergyReport:
    """The energy of a model by one account."""

    account: Account
    assumptions: str
    layers: tuple[LayerEnergy, ...]
    inputs: int

    @property
    def pj(self) -> dict[str, float]:
        """Picojoules for one input, by level."""
        return {level: sum(layer.pj.get(level, 0.0) for layer in self.layers) / self.inputs for level in LEVELS}

    @property
    def total(self) -> float:
        """Picojoules for one input."""
        return sum(self.pj.values())

    @property
    def cycles(self) -> float:
        """Cycles for one input, if its products run one after the other."""
        return sum(layer.cycles for layer in self.layers) / self.inputs

    def saved(self, baseline: EnergyReport) -> float:
        """Share of the baseline's energy that is gone."""
        return 1 - self.total / baseline.total if baseline.total else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The report in plain types, for JSON."""
        layers = [{"name": each.name, "kind": each.kind, "pj": each.pj, "cycles": each.cycles} for each in self.layers]
        return {
            "account": self.account,
            "assumptions": self.assumptions,
            "pj": self.pj,
            "total_pj": self.total,
            "cycles": self.cycles,
            "layers": layers,
        }


Change = Callable[[Product], Product]
"""Changes a product for another assumption."""


def energy(
    operations: OperationReport, account: Account, accelerator: Accelerator, change: Change | None = None
) -> EnergyReport:
    """The energy of counted operations, in picojoules.

    Args:
        operations: the work that `count_operations` counted.
        account: one of `ACCOUNTS`.
        accelerator: gives the prices of elementwise work. In its own account, it gives all prices.
        change: is applied to each product first.

    Raises:
        UserError: an unknown account, or a number format without known energy.
    """
    _check(account)
    layers = tuple(_layer(layer, account, accelerator, change) for layer in operations.layers)
    return EnergyReport(account, _assumptions(account, accelerator), layers, operations.inputs)


@dataclass(frozen=True)
class AccountCosts:
    """An account as the argument `costs` of `shiftadd3d.nn.search_recipe` and `sensitivity`."""

    account: Account
    accelerator: Accelerator
    unit: str = "pJ"

    def __post_init__(self) -> None:
        _check(self.account)

    def price(self, layer: LayerOperations) -> float:
        """Picojoules for the work of one module itself, on the whole batch."""
        return sum(_layer(layer, self.account, self.accelerator, None).pj.values())


def _check(account: str) -> None:
    if account not in ACCOUNTS:
        raise UserError(f"the account must be one of {', '.join(ACCOUNTS)}, not {account!r}")


def _assumptions(account: Account, accelerator: Accelerator) -> str:
    if account == "arithmetic":
        return "every operation in 45 nm, an addition after each multiplication and shift; data moves for free"
    if account == "authors":
        return authors.ASSUMPTIONS
    verbs = {"mult": "multiply", "shift": "shift", "add": "add"}
    arrays = ", ".join(f"{count} that {verbs[kind]}" for kind, count in accelerator.arrays.items())
    return (
        f"{accelerator.name}: elements: {arrays}; a buffer of {accelerator.buffer_kib} KiB; every operand at its own "
        f"width, an addition after each multiplication and shift, the best tiling of each layer"
    )


def _layer(layer: LayerOperations, account: Account, accelerator: Accelerator, change: Change | None) -> LayerEnergy:
    pj: dict[str, float] = {}
    cycles = 0
    for product, times in layer.loops:
        product = product if change is None else change(product)
        if not product.products:
            continue
        if account == "accelerator":
            mapping = best_mapping(product, accelerator)
            parts, cycles = mapping.energy, cycles + times * mapping.cycles
        elif account == "authors":
            parts = authors_energy(product)
        else:
            parts = {"arithmetic": _arithmetic(product)}
        for level, value in parts.items():
            pj[level] = pj.get(level, 0.0) + times * value
    if account != "authors":
        pj["elementwise"] = _elementwise(layer, accelerator)
    return LayerEnergy(layer.name, layer.kind, pj, cycles)


def _arithmetic(product: Product) -> float:
    costs = ENERGY_COSTS.get(product.dtype) or ENERGY_COSTS["float16" if "16" in product.dtype else "float32"]
    return product.mult * costs.mult + product.shift * costs.shift + product.add * costs.add


def _elementwise(layer: LayerOperations, accelerator: Accelerator) -> float:
    total = 0.0
    for dtype, counts in layer.elementwise.items():
        mult, add = accelerator.operation("mult", dtype), accelerator.operation("add", dtype)
        special = counts["special"] * accelerator.elementwise.special
        total += (counts["mult"] + special) * mult + (counts["add"] + counts["compare"] + special) * add
    return total


def with_activation_bits(bits: int) -> Change:
    """A change: activations are stored in at most so many bits. Sums keep the width of the accumulator."""

    def change(product: Product) -> Product:
        kept = product.weight_bits if product.is_weight else min(bits, product.weight_bits)
        return replace(
            product,
            weight_bits=kept,
            input_bits=min(bits, product.input_bits),
            output_bits=min(bits, product.output_bits),
        )

    return change


def with_shift_data_bits(bits: int) -> Change:
    """A change: all data of shift layers is stored in so many bits: weights, inputs and outputs."""

    def change(product: Product) -> Product:
        if product.primitive != "shift":
            return product
        return replace(product, weight_bits=bits, input_bits=bits, output_bits=bits)

    return change
