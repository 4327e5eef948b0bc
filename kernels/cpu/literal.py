"""MatShift by literal shifts on CPUs: each task takes a block of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.reference.literal import matshift_literal_twin
from shiftadd3d.kernels.reference.trials import Draw
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, Spec
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr

# Rows that share a decoded output, and those of them whose sums are in registers together.
_BLOCK_ROWS, _ROWS = 64, 4


class _Decoded(NamedTuple):
    """What a weight does to an activation, [inputs] int32 each, up to whole vectors."""

    shift: Buffer  # to the right
    keep: Buffer  # all bits, or none of a weight of zero
    flip: Buffer  # all bits of a negative one, or none
    negatives: Buffer  # [1]: how many are negative


def build(target: CpuTarget, bits: int, terms: int) -> T.PrimFunc:
    """The function ``(x, codes, offset, y)`` of int32 x and float32 y. Each task takes a block of rows."""
    isa, levels = Isa(target), power_of_two.num_exponents(bits)

    with T.function("matshift_literal") as function:
        rows, inputs, outputs, bytes_of_row = T.sizes(4)
        x = T.argument("x", (rows, inputs), "int32")
        codes = T.argument("codes", (terms, outputs, bytes_of_row), "uint8")
        offset = T.argument("offset", (terms, outputs), "int8")
        y = T.argument("y", (rows, outputs))
        with T.parallel((rows + (_BLOCK_ROWS - 1)) // _BLOCK_ROWS) as block:
            first = T.bind(block * _BLOCK_ROWS)
            height = T.bind(T.min(rows - first, T.int64(_BLOCK_ROWS)))
            padded = T.bind((inputs + (isa.lanes - 1)) // isa.lanes * isa.lanes)
            raised = T.alloc(T.int64(_BLOCK_ROWS), padded, dtype="int32")
            shift, keep, flip = (T.alloc(padded, dtype="int32") for _ in range(3))
            weights = _Decoded(shift, keep, flip, T.alloc(1, dtype="int32"))
            with T.serial(T.int64(_BLOCK_ROWS)) as row, T.serial(padded) as i:
                inside = T.both(row < height, i < inputs)
                raised[row, i] = T.if_then_else(inside, x[first + row, i] << T.int32(levels - 1), T.int32(0))
            with T.serial(outputs) as output:
                for term in range(terms):
                    _decode(codes.part(term, output), bits, inputs, padded, weights)
                    exponent = T.cast(offset[term, output], "int32") - T.int32(levels - 1)
                    unit = T.bind(T.reinterpret("float32", (exponent + T.int32(127)) << T.int32(23)))
                    with T.serial((height + (_ROWS - 1)) // _ROWS) as tile:
                        for r, total in enumerate(_sums(isa, raised, T.bind(tile * _ROWS), weights)):
                            with T.when(tile * _ROWS + r < height):
                                at = first + tile * _ROWS + r, output
                                value = T.cast(total + weights.negatives[0], "float32") * unit
                                y[at] = y[at] + value if term else value
    return function.get()


def _decode(codes: Buffer, bits: int, inputs: Expr, padded: Expr, weights: _Decoded) -> None:
    levels = power_of_two.num_exponents(bits)
    weights.negatives[0] = T.int32(0)
    with T.serial(padded) as i:
        position = T.bind(T.min(i, inputs - 1) * bits)
        last = codes.shape[0] - 1
        # A code lies within two bytes.
        low, high = (T.cast(codes[byte], "int32") for byte in (position // 8, T.min(position // 8 + 1, last)))
        code = T.bind(((low | (high << 8)) >> T.cast(position % 8, "int32")) & T.int32(2**bits - 1))
        level = T.bind(code & T.int32(levels))
        negative = T.bind(T.if_then_else(i < inputs, code >> T.int32(bits - 1), T.int32(0)))
        weights.shift[i] = T.int32(levels) - level
        weights.keep[i] = T.if_then_else(level == 0, T.int32(0), T.int32(-1))
        weights.flip[i] = -negative
        weights.negatives[0] = weights.negatives[0] + negative


def _sums(isa: Isa, raised: Buffer, row: Expr, weights: _Decoded) -> list[Expr]:
    """The sums of a tile of rows, but for 1 for every negative weight: -s is ~s + 1."""
    places = [isa.register(0, integer=True) for _ in range(_ROWS)]
    with T.serial(raised.shape[1] // isa.lanes) as part:
        at = isa.at(part * isa.lanes)
        for r, place in enumerate(places):
            signed = ((raised[row + r, at] >> weights.shift[at]) & weights.keep[at]) ^ weights.flip[at]
            place.value = place.value + signed
    return [sum((place[lane] for lane in range(1, isa.lanes)), place[0]) for place in places]


def trial(function: Compiled, bits: int, terms: int) -> None:
    """Odd sizes, exponents far apart, every sum exact."""
    draw = Draw()
    layer = draw.layer(53, 19, bits, terms, far_apart=True)
    x = (4 * draw.normal(_BLOCK_ROWS + 7, 53)).int()
    found = run(function, x, layer.codes, layer.offset)
    expected = matshift_literal_twin(x, layer.codes, layer.offset, bits)
    assert torch.equal(found, expected), f"it is off by {(found - expected).abs().max():.2g}"


def variants(target: CpuTarget) -> Iterator[Spec]:
    """4 and 5 bits, one and two terms."""
    for bits in (4, 5):
        for terms in (1, 2):
            yield {"bits": bits, "terms": terms}


LITERAL = Kernel("matshift_literal", build, trial, variants)


def run(function: Compiled, x: Tensor, codes: Tensor, offset: Tensor) -> Tensor:
    y = torch.empty(x.shape[0], codes.shape[1])
    function(x, codes, offset, y)
    return y
