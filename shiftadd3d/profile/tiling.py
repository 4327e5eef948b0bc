"""The best way to run a product on an accelerator: an exhaustive search over tilings and loop orders.

A product is three loops: over outputs K, inputs C and positions P (rows of a matrix, or rows of an image). DRAM holds
everything. The buffer holds a tile ``k1 x c1 x p1``. The array of processing elements holds a tile ``k2 x c2 x p2`` of
that, spread over ``sk x sc x sp`` elements. Each element keeps ``rk x rc x rp`` in its registers. Both between DRAM and
buffer and between buffer and array, the loops over tiles may have any order. An operand is fetched again if a loop that
it does not depend on lies outside of one that it depends on. So the order decides which operand stays: weights, inputs
or sums.

The rules are the same for all products. Every operand moves at its own width, and unfinished sums at that of the
accumulator. Data from DRAM is written into the buffer. Data from the buffer goes over the network into the registers of
every element that needs it. Each product reads two operands and a sum, and writes a sum.

Source: Chen et al., Eyeriss (ISCA 2016), section 3, for the levels; Parashar et al., Timeloop (ISPASS 2019), for
counting accesses of a loop nest.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from shiftadd3d._errors import UserError
from shiftadd3d.nn.counting import Primitive, Product
from shiftadd3d.profile.accelerator import Accelerator

ORDERS = tuple(itertools.permutations("KCP"))
"""Orders of the loops over tiles, the outermost first."""

# What a registers' tile or a spread over elements may be along a loop.
_IN_REGISTERS = (1, 2, 4, 8, 16, 32, 64, 128)
_OVER_ELEMENTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Pairs of tiles that are looked at together, and tiles of each kind that are looked at first.
_AT_ONCE = 20_000
_PROMISING = 64
# Energies that differ by less are the same.
_SLACK = 1 + 1e-12


class Loops(NamedTuple):
    """A product as the search sees it."""

    primitive: Primitive
    dtype: str
    groups: int
    """Number of independent products."""
    outputs: int
    inputs: int
    rows: int
    """Positions along the loop P."""
    columns: int
    """Positions of one row, which the buffer always holds together."""
    kernel: tuple[int, int]
    stride: tuple[int, int]
    input_columns: int
    weight_bits: int
    input_bits: int
    output_bits: int
    terms: int

    @property
    def products(self) -> int:
        """Number of products in one group."""
        return self.outputs * self.inputs * self.rows * self.columns * math.prod(self.kernel)

    def input_rows(self, rows: np.ndarray | int) -> np.ndarray | int:
        """Rows of the input that are needed for this number of output rows."""
        return (rows - 1) * self.stride[0] + self.kernel[0]


def loops_of(product: Product, accelerator: Accelerator) -> Loops:
    """A product as loops.

    Kernels that do not overlap, or do not fit into registers, become inputs of a matrix product.
    """
    kernel, stride = product.kernel, product.stride
    rows, columns = product.batch * product.size[0], product.size[1]
    inputs, input_columns = product.inputs, (product.input_size or product.size)[1]
    window = math.prod(kernel) * (product.weight_bits + product.input_bits)
    window += accelerator.accumulator_bits
    if all(k <= s for k, s in zip(kernel, stride, strict=True)) or window > 8 * accelerator.register_file_bytes:
        inputs, kernel, stride = inputs * math.prod(kernel), (1, 1), (1, 1)
        rows, columns, input_columns = rows * columns, 1, 1
    return Loops(
        product.primitive,
        product.dtype,
        product.groups,
        product.outputs,
        inputs,
        rows,
        columns,
        kernel,
        stride,
        input_columns,
        product.weight_bits,
        product.input_bits,
        product.output_bits,
        product.terms,
    )


@dataclass(frozen=True)
class Mapping:
    """How a product runs, and its cost, for all groups together."""

    buffer_tile: tuple[int, int, int]
    """Outputs, inputs and rows."""
    buffer_order: str
    """Order of the loops over tiles of the buffer, the outermost first."""
    registers: tuple[int, int, int]
    """Outputs, inputs and positions in an element's registers."""
    spread: tuple[int, int, int]
    """Elements side by side along outputs, inputs and positions."""
    array_order: str
    bits: dict[str, dict[str, float]] = field(compare=False)
    """Bits moved at each level (dram, buffer, noc, register), of weights, inputs and sums."""
    energy: dict[str, float] = field(compare=False)
    """Picojoules at each level, and of the arithmetic."""
    cycles: int

    @property
    def total(self) -> float:
        """Picojoules at all levels together."""
        return sum(self.energy.values())


def sizes(length: int) -> list[int]:
    """All useful tile sizes for a loop of this length: the smallest size for each number of tiles."""
    return sorted({-(-length // count) for count in _counts(length)})


def _counts(length: int) -> set[int]:
    root = math.isqrt(length)
    return {*range(1, root + 1), *(-(-length // size) for size in range(1, root + 1))}


def _refetched(order: tuple[str, ...], operand: str, counts: dict[str, Any]) -> Any:
    """How often all of an operand is fetched: the one loop that it does not depend on may lie outside of those it does.

    Args:
        operand: the two loops that it depends on.
        counts: tiles along each loop.
    """
    (other,) = set("KCP") - set(operand)
    moving = np.zeros(np.broadcast(*counts.values()).shape, bool)
    for loop in _inside(order, operand):
        moving = moving | (counts[loop] > 1)
    return np.where(moving, counts[other], 1)


def _inside(order: tuple[str, ...], operand: str) -> frozenset[str]:
    """Loops that lie inside of the one that an operand does not depend on."""
    (other,) = set("KCP") - set(operand)
    return frozenset(order[order.index(other) + 1 :])


WEIGHTS, INPUTS, SUMS = "KC", "CP", "KP"
_OPERANDS = {"weights": WEIGHTS, "inputs": INPUTS, "sums": SUMS}


@lru_cache(maxsize=4096)
def best_mapping(product: Product, accelerator: Accelerator) -> Mapping:
    """The mapping with the least energy. If several have it, the fastest of them.

    Raises:
        UserError: the buffer or the registers are too small even for the smallest tile.
    """
    return search(loops_of(product, accelerator), accelerator)


def search(loops: Loops, accelerator: Accelerator) -> Mapping:
    """Search all mappings, except those that cannot beat the best one so far.

    Between buffer and registers, no mapping costs less or is faster than if the buffer held the whole product. This
    gives a bound for both kinds of tiles.
    """
    outer = _buffer_tiles(loops, accelerator)
    outer = _at(outer, np.argsort(outer["energy"], kind="stable"))
    inner = _array_tiles(loops, accelerator)
    whole = {name: np.array(length) for name, length in zip(("k1", "c1", "p1"), loops[3:6], strict=True)}
    whole |= dict.fromkeys(("nK", "nC", "nP"), np.array(1))
    inner["energy"] = _inner_energies(loops, accelerator, whole, inner).min(0)
    inner["cycles"] = _cycles(loops, whole, inner)
    inner = _at(inner, np.argsort(inner["energy"], kind="stable"))
    found = _Best(loops, accelerator, outer, inner)
    # What the most promising pairs reach leaves little of all others to look at.
    found.look_at(*(grid.ravel() for grid in np.indices((_PROMISING, _PROMISING))))
    left, start = np.arange(len(inner["energy"])), 0
    while start < len(outer["energy"]):
        left = left[found.is_worth(np.array(start), left)]
        if not len(left):
            break
        some = np.arange(start, min(len(outer["energy"]), start + max(1, _AT_ONCE // len(left))))
        start += len(some)
        first, second = np.nonzero(found.is_worth(some[:, None], left))
        found.look_at(some[first], left[second])
    assert found.chosen is not None
    return _mapping(loops, accelerator, *found.chosen)


def _at(arrays: dict[str, np.ndarray], places: Any) -> dict[str, Any]:
    return {name: values[places] for name, values in arrays.items()}


@dataclass
class _Best:
    """The best mapping so far, of pairs of a buffer's tile and an array's, by their numbers."""

    loops: Loops
    accelerator: Accelerator
    outer: dict[str, np.ndarray]
    """Tiles of the buffer, and the energy outside of it."""
    inner: dict[str, np.ndarray]
    """Tiles of the array, and what energy and cycles they take at least."""
    energy: float = math.inf
    cycles: float = math.inf
    chosen: tuple[dict[str, int], dict[str, int], int] | None = None
    """Both tiles, and the number of the order of the array's."""

    def is_worth(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Which pairs may take less than the best, or as much and be faster."""
        least = self.outer["energy"][first] + self.inner["energy"][second]
        may_tie = (least <= self.energy * _SLACK) & (self.inner["cycles"][second] < self.cycles)
        return (least * _SLACK < self.energy) | may_tie

    def look_at(self, first: np.ndarray, second: np.ndarray) -> None:
        """Keep the best of these pairs, if it beats what there is; pairs beyond the last tiles do not count."""
        inside = (first < len(self.outer["energy"])) & (second < len(self.inner["energy"]))
        first, second = first[inside], second[inside]
        if not len(first):
            return
        tiles, arrays = _at(self.outer, first), _at(self.inner, second)
        energies = tiles["energy"] + _inner_energies(self.loops, self.accelerator, tiles, arrays)
        least = float(energies.min())
        if least > self.energy * _SLACK:
            return
        orders, ties = np.nonzero(energies <= least * _SLACK)
        cycles = _cycles(self.loops, _at(tiles, ties), _at(arrays, ties))
        fastest = int(cycles.argmin())
        if least * _SLACK < self.energy or cycles[fastest] < self.cycles:
            self.energy, self.cycles = least, float(cycles[fastest])
            one, two = ({name: int(each[ties[fastest]]) for name, each in of.items()} for of in (tiles, arrays))
            self.chosen = one, two, int(orders[fastest])


def _mapping(
    loops: Loops, accelerator: Accelerator, one: dict[str, int], two: dict[str, int], array_order: int
) -> Mapping:
    buffer_order = ORDERS[one["order"]]
    dram = _dram_bits(loops, accelerator, one, buffer_order)
    levels = _array_bits(loops, accelerator, one, two, ORDERS[array_order])
    levels["buffer"] = {name: levels["buffer"][name] + dram[name] for name in dram}  # into the buffer, or out of it
    levels = {"dram": dram, **levels}
    groups = loops.groups
    bits = {level: {name: groups * float(value) for name, value in moved.items()} for level, moved in levels.items()}
    prices = accelerator.energy_per_bit
    energy = {level: sum(moved.values()) * getattr(prices, level) for level, moved in bits.items()}
    energy["arithmetic"] = groups * arithmetic(loops, accelerator)
    return Mapping(
        (one["k1"], one["c1"], one["p1"]),
        "".join(buffer_order),
        (two["rk"], two["rc"], two["rp"]),
        (two["sk"], two["sc"], two["sp"]),
        "".join(ORDERS[array_order]),
        bits,
        energy,
        groups * int(_cycles(loops, one, two)),
    )


def arithmetic(loops: Loops, accelerator: Accelerator) -> float:
    """Picojoules of one group: a multiplication, a shift or nothing for each product, and the addition after it."""
    one = accelerator.operation("add", loops.dtype)
    if loops.primitive != "add":
        one += accelerator.operation(loops.primitive, loops.dtype)
    return loops.products * loops.terms * one if loops.primitive == "shift" else loops.products * one


def _buffer_tiles(loops: Loops, accelerator: Accelerator) -> dict[str, np.ndarray]:
    """All tiles that fit into the buffer, each in its best order."""
    room = accelerator.buffer_kib * 8 * 1024
    rows = [size for size in sizes(loops.rows) if size * loops.columns * accelerator.accumulator_bits <= room] or [1]
    k1, c1, p1 = (grid.ravel() for grid in np.meshgrid(sizes(loops.outputs), sizes(loops.inputs), rows, indexing="ij"))
    taps = math.prod(loops.kernel)
    bits = (
        k1 * c1 * taps * loops.weight_bits
        + c1 * loops.input_rows(p1) * loops.input_columns * loops.input_bits
        + k1 * p1 * loops.columns * accelerator.accumulator_bits
    )
    fits = bits <= room
    if not fits.any():
        raise UserError(
            f"{accelerator.name}: a buffer of {accelerator.buffer_kib} KiB is too small for a row of {loops.columns} "
            f"positions of this model; the smallest tile takes {int(bits.min()) // 8192 + 1} KiB"
        )
    tile = {"k1": k1[fits], "c1": c1[fits], "p1": p1[fits]}
    tile |= {
        "nK": -(-loops.outputs // tile["k1"]),
        "nC": -(-loops.inputs // tile["c1"]),
        "nP": -(-loops.rows // tile["p1"]),
    }
    prices = accelerator.energy_per_bit
    price = prices.dram + prices.buffer
    energies = np.stack([sum(_dram_bits(loops, accelerator, tile, order).values()) * price for order in ORDERS])
    return {**tile, "energy": energies.min(0), "order": energies.argmin(0)}


def _dram_bits(loops: Loops, accelerator: Accelerator, tile: Any, order: tuple[str, ...]) -> dict[str, Any]:
    """Bits of one group between DRAM and buffer."""
    counts = {"K": tile["nK"], "C": tile["nC"], "P": tile["nP"]}
    whole = loops.outputs * loops.inputs * math.prod(loops.kernel)
    # Rows at the borders of tiles are fetched for both.
    rows = loops.rows * loops.stride[0] + counts["P"] * (loops.kernel[0] - loops.stride[0])
    outcome = loops.outputs * loops.rows * loops.columns
    again = _refetched(order, SUMS, counts) - 1
    return {
        "weights": whole * loops.weight_bits * _refetched(order, WEIGHTS, counts),
        "inputs": loops.inputs * rows * loops.input_columns * loops.input_bits * _refetched(order, INPUTS, counts),
        "sums": outcome * (loops.output_bits + 2 * again * accelerator.accumulator_bits),
    }


def _array_tiles(loops: Loops, accelerator: Accelerator) -> dict[str, np.ndarray]:
    """All tiles that fit into the registers, and all ways to spread them over processing elements.

    Tiles and arrays may be numbers or arrays of them that broadcast; here and below.
    """
    (kh, kw), accumulator = loops.kernel, accelerator.accumulator_bits
    positions = loops.columns if loops.kernel != (1, 1) else loops.rows * loops.columns
    lengths = loops.outputs, loops.inputs, positions
    registers = [
        (rk, rc, rp)
        for rk, rc, rp in itertools.product(*([r for r in _IN_REGISTERS if r < 2 * length] for length in lengths))
        if rk * rc * kh * kw * loops.weight_bits
        + rc * kh * ((rp - 1) * loops.stride[1] + kw) * loops.input_bits
        + rk * rp * accumulator
        <= 8 * accelerator.register_file_bytes
    ]
    # What fits while something larger along a loop fits as well fetches no less often.
    fitting = set(registers)
    registers = [
        (rk, rc, rp)
        for rk, rc, rp in registers
        if fitting.isdisjoint({(2 * rk, rc, rp), (rk, 2 * rc, rp), (rk, rc, 2 * rp)})
    ]
    elements = accelerator.arrays[loops.primitive]
    spreads = [
        spread
        for spread in itertools.product(*([s for s in _OVER_ELEMENTS if s < 2 * length] for length in lengths))
        if math.prod(spread) <= elements
    ]
    if not registers or not spreads:
        raise UserError(
            f"{accelerator.name}: registers of {accelerator.register_file_bytes} bytes cannot hold a product; "
            "expected more"
        )
    pairs = *np.repeat(registers, len(spreads), 0).T, *np.tile(spreads, (len(registers), 1)).T
    tile: dict[str, np.ndarray] = dict(zip(("rk", "rc", "rp", "sk", "sc", "sp"), pairs, strict=True))
    # More than the loop is long, by more than rounding up, is another tile once more.
    useful = np.ones(len(pairs[0]), bool)
    for loop, length in zip("kcp", lengths, strict=True):
        useful &= tile[f"r{loop}"] * tile[f"s{loop}"] < 2 * length
    tile = {name: values[useful] for name, values in tile.items()}
    for loop, length in zip("kcp", lengths, strict=True):
        tile[f"{loop}2"] = np.minimum(tile[f"r{loop}"] * tile[f"s{loop}"], length)
    return tile


def _array_counts(loops: Loops, tile: Any, array: Any) -> dict[str, Any]:
    """Tiles of the array in one of the buffer, along each loop."""
    if loops.kernel == (1, 1):
        positions = -(-tile["p1"] * loops.columns // array["p2"])
    else:
        positions = tile["p1"] * -(-loops.columns // array["p2"])
    return {"K": -(-tile["k1"] // array["k2"]), "C": -(-tile["c1"] // array["c2"]), "P": positions}


def _array_bits(
    loops: Loops,
    accelerator: Accelerator,
    tile: Any,
    array: Any,
    order: tuple[str, ...],
) -> dict[str, dict[str, Any]]:
    """Bits of one group between buffer and array, over the network, and in and out of registers."""
    counts = _array_counts(loops, tile, array)
    levels: dict[str, dict[str, Any]] = {"buffer": {}, "noc": {}, "register": {}}
    for operand, depends in _OPERANDS.items():
        times = _refetched(order, depends, counts)
        for level, bits in _operand_bits(loops, accelerator, tile, array, operand, times).items():
            levels[level][operand] = bits
    return levels


def _operand_bits(
    loops: Loops, accelerator: Accelerator, tile: Any, array: Any, operand: str, times: Any
) -> dict[str, Any]:
    """The same of one operand, all of which is fetched so many times for each tile of the buffer."""
    kh, kw = loops.kernel
    accumulator = accelerator.accumulator_bits
    if operand == "weights":
        fetched = loops.outputs * loops.inputs * kh * kw * tile["nP"] * times * loops.weight_bits
        delivered, used = fetched * array["sp"], loops.weight_bits
    elif operand == "inputs":
        if loops.kernel == (1, 1):
            window = loops.rows * loops.columns
        else:  # neighbouring tiles of positions look at the same inputs
            strips = -(-loops.columns // array["p2"])
            window = loops.rows * kh * (loops.columns * loops.stride[1] + strips * (kw - loops.stride[1]))
        fetched = loops.inputs * window * tile["nK"] * times * loops.input_bits
        delivered, used = fetched * array["sk"], loops.input_bits
    else:
        outcome, visits = loops.outputs * loops.rows * loops.columns, tile["nC"] * times
        fetched = outcome * (loops.output_bits + 2 * (visits - 1) * accumulator)
        delivered, used = fetched + outcome * visits * (array["sc"] - 1) * accumulator, 2 * accumulator
    return {"buffer": fetched, "noc": delivered, "register": delivered + loops.products * used}


def _inner_energies(loops: Loops, accelerator: Accelerator, tile: Any, array: Any) -> np.ndarray:
    """Picojoules of one group between buffer and registers, in each of `ORDERS`."""
    prices, counts = accelerator.energy_per_bit, _array_counts(loops, tile, array)
    known: dict[tuple[str, frozenset[str]], Any] = {}
    for order, (operand, depends) in itertools.product(ORDERS, _OPERANDS.items()):
        case = operand, _inside(order, depends)
        if case not in known:
            moved = _operand_bits(loops, accelerator, tile, array, operand, _refetched(order, depends, counts))
            known[case] = sum(bits * getattr(prices, level) for level, bits in moved.items())
    each = [[known[operand, _inside(order, depends)] for operand, depends in _OPERANDS.items()] for order in ORDERS]
    return np.stack([sum(parts) for parts in each])


def _cycles(loops: Loops, tile: Any, array: Any) -> Any:
    """Steps of the array of one group: an element does one product a step."""
    counts = _array_counts(loops, tile, array)
    tiles = tile["nK"] * tile["nC"] * tile["nP"] * counts["K"] * counts["C"] * counts["P"]
    return tiles * array["rk"] * array["rc"] * array["rp"] * math.prod(loops.kernel) * loops.terms
