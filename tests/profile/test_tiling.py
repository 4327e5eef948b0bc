"""The tiling search: against walking through the loops, and against trying everything."""

# pyright: reportArgumentType=false

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from shiftadd3d import UserError
from shiftadd3d.nn.counting import Product
from shiftadd3d.profile import tiling
from shiftadd3d.profile.accelerator import Accelerator, load_accelerator
from shiftadd3d.profile.tiling import ORDERS, Loops, best_mapping, loops_of, search, sizes


@pytest.fixture(scope="module")
def chip() -> Accelerator:
    return load_accelerator()


@pytest.fixture(scope="module")
def tiny(chip: Accelerator) -> Accelerator:
    """Four elements that multiply, of 16 words, and a buffer of 256 words."""
    return replace(chip, pes=4, buffer_kib=1, register_file_bytes=64)


def matrix(outputs: int, inputs: int, rows: int, primitive: str = "mult", **changes) -> Product:
    return Product(primitive, 1, 1, outputs, inputs, (rows, 1), **changes)


MATRIX = matrix(10, 9, 12)


def walk(loops: Loops, lengths: dict[str, int], tiles: dict[str, int], order: tuple[str, ...]) -> dict[str, list[int]]:
    """How many elements of each operand a level fetches when it keeps one tile of each, tile by tile.

    Returns:
        By operand, [fetched, written]: for sums, those fetched again and all that are written.
    """
    moved = {operand: [0, 0] for operand in ("KC", "CP", "KP")}
    held: dict[str, tuple | None] = dict.fromkeys(moved)
    seen: set[tuple] = set()
    ranges = [[(loop, start) for start in range(0, lengths[loop], tiles[loop])] for loop in order]

    def size(operand: str, at: dict[str, int]) -> int:
        return math.prod(min(tiles[loop], lengths[loop] - at[loop]) for loop in operand)

    for step in itertools.product(*ranges):
        at = dict(step)
        for operand in moved:
            tile = tuple(at[loop] for loop in operand)
            if held[operand] == tile:
                continue
            if operand == "KP":
                if held[operand] is not None:
                    moved["KP"][1] += size("KP", dict(zip("KP", held["KP"], strict=True)))
                if tile in seen:
                    moved["KP"][0] += size("KP", at)
                seen.add(tile)
            else:
                moved[operand][0] += size(operand, at)
            held[operand] = tile
    moved["KP"][1] += size("KP", dict(zip("KP", held["KP"], strict=True)))
    return moved


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tiles", [(3, 9, 5), (10, 4, 12), (4, 2, 5), (10, 9, 12), (1, 9, 1), (5, 1, 12)])
def test_what_dram_moves_is_what_walking_through_the_tiles_moves(
    tiny: Accelerator, order: tuple[str, ...], tiles: tuple[int, int, int]
) -> None:
    loops = loops_of(replace(MATRIX, weight_bits=4, input_bits=8, output_bits=16), tiny)
    lengths = {"K": 10, "C": 9, "P": 12}
    moved = walk(loops, lengths, dict(zip("KCP", tiles, strict=True)), order)
    tile = {
        f"n{loop}": np.array(-(-length // size)) for (loop, length), size in zip(lengths.items(), tiles, strict=True)
    }
    found = tiling._dram_bits(loops, tiny, tile, order)
    assert found["weights"] == 4 * moved["KC"][0] and found["inputs"] == 8 * moved["CP"][0]
    fetched, written = moved["KP"]
    finished = 10 * 12
    assert found["sums"] == 32 * (fetched + written - finished) + 16 * finished


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("array", [(2, 3, 4), (5, 1, 2), (1, 9, 1)])
def test_what_the_array_fetches_is_what_walking_through_its_tiles_fetches(
    tiny: Accelerator, order: tuple[str, ...], array: tuple[int, int, int]
) -> None:
    loops = loops_of(MATRIX, tiny)
    buffer_tile = {"K": 5, "C": 9, "P": 6}  # twice along K, once along C, twice along P
    once = walk(loops, buffer_tile, dict(zip("KCP", array, strict=True)), order)
    tile = {"k1": 5, "c1": 9, "p1": 6, "nK": 2, "nC": 1, "nP": 2}
    spread = dict(zip(("k2", "c2", "p2"), array, strict=True)) | {"sk": 1, "sc": 1, "sp": 1}
    found = tiling._array_bits(loops, tiny, tile, spread, order)["buffer"]
    assert found["weights"] == 32 * 4 * once["KC"][0] and found["inputs"] == 32 * 4 * once["CP"][0]
    assert found["sums"] == 32 * 4 * sum(once["KP"])


def everything(loops: Loops, chip: Accelerator) -> float:
    """The least energy of all tiles of any size, any spread and any order: nothing left out."""
    elements = chip.arrays[loops.primitive]
    registers = [
        one
        for one in itertools.product(tiling._IN_REGISTERS[:5], repeat=3)
        if one[0] * one[1] * loops.weight_bits + one[1] * one[2] * loops.input_bits + one[0] * one[2] * 32
        <= 8 * chip.register_file_bytes
    ]
    spreads = [one for one in itertools.product(tiling._OVER_ELEMENTS[:6], repeat=3) if math.prod(one) <= elements]
    inner = np.array([(*r, *s) for r in registers for s in spreads]).T
    array = dict(zip(("rk", "rc", "rp", "sk", "sc", "sp"), inner, strict=True))
    lengths = loops.outputs, loops.inputs, loops.rows
    for loop, length in zip("kcp", lengths, strict=True):
        array[f"{loop}2"] = np.minimum(array[f"r{loop}"] * array[f"s{loop}"], length)
    least = math.inf
    prices = chip.energy_per_bit
    for k1, c1, p1 in itertools.product(*(range(1, length + 1) for length in lengths)):
        bits = k1 * c1 * loops.weight_bits + c1 * p1 * loops.input_bits + k1 * p1 * 32
        if bits > 8192 * chip.buffer_kib:
            continue
        tile = {"k1": k1, "c1": c1, "p1": p1}
        tile |= {f"n{loop}": -(-n // size) for loop, n, size in zip("KCP", lengths, (k1, c1, p1), strict=True)}
        outside = min(sum(tiling._dram_bits(loops, chip, tile, order).values()) for order in ORDERS)
        inside = tiling._inner_energies(loops, chip, tile, array).min()
        least = min(least, float(outside * (prices.dram + prices.buffer) + inside))
    return least + tiling.arithmetic(loops, chip)


@pytest.mark.parametrize(
    "product",
    [
        MATRIX,
        matrix(7, 5, 13),
        matrix(1, 24, 9),
        matrix(10, 9, 11, "shift", weight_bits=4),
        matrix(8, 8, 7, "add", input_bits=1),
        matrix(3, 2, 40, output_bits=8, input_bits=8),
    ],
)
@pytest.mark.parametrize("dram", [12.5, 0.4])
def test_the_search_finds_the_best_of_everything(tiny: Accelerator, product: Product, dram: float) -> None:
    chip = replace(tiny, energy_per_bit=replace(tiny.energy_per_bit, dram=dram))
    loops = loops_of(product, chip)
    assert search(loops, chip).total == pytest.approx(everything(loops, chip), rel=1e-9)


def test_sizes_are_the_smallest_for_each_number_of_tiles() -> None:
    for length in (1, 2, 12, 37, 100):
        every = {-(-length // count) for count in range(1, length + 1)}
        assert sizes(length) == sorted(every)


CONV = Product("mult", 1, 1, 8, 6, (14, 14), (3, 3), (1, 1), (14, 14))
PATCHES = Product("mult", 1, 1, 8, 3, (4, 4), (4, 4), (4, 4), (16, 16))


def test_patches_that_do_not_overlap_are_a_matrix(chip: Accelerator) -> None:
    loops = loops_of(PATCHES, chip)
    assert (loops.inputs, loops.rows, loops.columns, loops.kernel) == (48, 16, 1, (1, 1))
    assert loops.products == PATCHES.products == 8 * 48 * 16
    assert loops_of(CONV, chip).kernel == (3, 3) and loops_of(CONV, chip).products == CONV.products
    large = replace(CONV, kernel=(16, 16))
    assert loops_of(large, chip).kernel == (1, 1) and loops_of(large, chip).products == large.products


@pytest.mark.parametrize("product", [MATRIX, CONV, PATCHES, matrix(64, 64, 300, "shift", weight_bits=4)])
def test_what_leaves_a_level_arrives_at_the_next(chip: Accelerator, product: Product) -> None:
    moved = best_mapping(product, chip).bits
    once = {
        "weights": product.weight_elements * product.weight_bits,
        "inputs": product.input_elements * product.input_bits,
        "sums": product.output_elements * product.output_bits,
    }
    for operand, least in once.items():
        assert moved["dram"][operand] >= least * (1 - 1e-9)
        # All that comes from DRAM is written into the buffer; what goes on from there is read once more.
        assert moved["buffer"][operand] >= moved["dram"][operand] + least * (1 - 1e-9)
        onwards = moved["buffer"][operand] - moved["dram"][operand]
        assert moved["noc"][operand] >= onwards * (1 - 1e-9)
    products = product.products
    assert moved["register"]["weights"] == moved["noc"]["weights"] + products * product.weight_bits
    assert moved["register"]["inputs"] == moved["noc"]["inputs"] + products * product.input_bits
    assert moved["register"]["sums"] == moved["noc"]["sums"] + 2 * products * chip.accumulator_bits


@pytest.mark.parametrize("product", [matrix(48, 40, 50), CONV])
def test_more_bits_take_more_energy_and_more_memory_no_more(chip: Accelerator, product: Product) -> None:
    chip = replace(chip, buffer_kib=8)
    base = best_mapping(product, chip).total
    for name in ("weight_bits", "input_bits", "output_bits"):
        assert best_mapping(replace(product, **{name: 16}), chip).total < base
    assert best_mapping(product, replace(chip, buffer_kib=16)).total <= base
    prices = chip.energy_per_bit
    for level in ("register", "noc", "buffer", "dram"):
        dearer = replace(chip, energy_per_bit=replace(prices, **{level: 2 * getattr(prices, level)}))
        assert best_mapping(product, dearer).total > base


def test_the_arithmetic_of_a_shift_has_its_accumulation(chip: Accelerator) -> None:
    for primitive, one in (("mult", 3.7 + 0.9), ("shift", 0.13 + 0.9), ("add", 0.9)):
        product = matrix(10, 9, 12, primitive)
        assert best_mapping(product, chip).energy["arithmetic"] == pytest.approx(1080 * one)
    two = matrix(10, 9, 12, "shift", terms=2)
    assert best_mapping(two, chip).energy["arithmetic"] == pytest.approx(2 * 1080 * 1.03)
    half = matrix(10, 9, 12, dtype="bfloat16")
    assert best_mapping(half, chip).energy["arithmetic"] == pytest.approx(1080 * 1.5)


def test_groups_are_products_of_their_own(chip: Accelerator) -> None:
    one, three = best_mapping(MATRIX, chip), best_mapping(replace(MATRIX, groups=3), chip)
    assert three.total == pytest.approx(3 * one.total) and three.cycles == 3 * one.cycles


def test_memories_that_are_too_small(chip: Accelerator) -> None:
    wide = Product("mult", 1, 1, 8, 6, (9, 900), (3, 3), (1, 1), (9, 900))
    with pytest.raises(UserError, match="a buffer of 1 KiB is too small for a row of 900 positions"):
        best_mapping(wide, replace(chip, buffer_kib=1))
    with pytest.raises(UserError, match="registers of 8 bytes cannot hold a product"):
        best_mapping(MATRIX, replace(chip, register_file_bytes=8))
