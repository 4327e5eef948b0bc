"""MatShift by literal shifts on CPUs: each task takes a block of rows."""

# TVMScript's annotations are calls:
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.vectors import Vectors
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.reference.literal import matshift_literal_twin
from shiftadd3d.kernels.runtime.kernel import Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget

# Rows that share a decoded output, and those of them whose sums are in registers together.
_BLOCK_ROWS, _ROWS = 64, 4


def build(target: CpuTarget, bits: int, terms: int) -> Any:
    """The function ``(x, codes, offset, y)`` of int32 x and float32 y. Each task takes a block of rows."""
    from tvm.script import tirx as T

    vec = Vectors(target)
    lanes, levels = vec.lanes, power_of_two.num_exponents(bits)

    def task(X: Any, C: Any, E: Any, Y: Any, first: Any) -> None:
        inputs = X.shape[1]
        rows = T.bind(T.min(X.shape[0] - first, T.int64(_BLOCK_ROWS)))
        parts = T.bind((inputs + (lanes - 1)) // lanes)
        raised = T.alloc_buffer((T.int64(_BLOCK_ROWS), parts * lanes), "int32", align=64)
        shift, keep, flip = (T.alloc_buffer((parts * lanes,), "int32", align=64) for _ in range(3))
        negatives = T.alloc_buffer((1,), "int32", align=4)
        with T.serial(T.int64(_BLOCK_ROWS)) as row, T.serial(parts * lanes) as i:
            inside = T.And(row < rows, i < inputs)
            x = T.if_then_else(inside, X[first + row, i] << T.int32(levels - 1), T.int32(0))
            T.buffer_store(raised, x, [row, i])
        with T.serial(C.shape[1]) as output:
            for term in range(terms):
                decode(C, term, output, inputs, parts, shift, keep, flip, negatives)
                exponent = T.cast(E[term, output], "int32") - T.int32(levels - 1)
                unit = T.bind(T.reinterpret("float32", (exponent + T.int32(127)) << T.int32(23)))
                with T.serial((rows + (_ROWS - 1)) // _ROWS) as tile:
                    totals = sums(raised, T.bind(tile * _ROWS), parts, shift, keep, flip)
                    for r, total in enumerate(totals):
                        with T.If(tile * _ROWS + r < rows), T.Then():
                            at = [first + tile * _ROWS + r, output]
                            value = T.cast(total + negatives[0], "float32") * unit
                            T.buffer_store(Y, Y[at[0], at[1]] + value if term else value, at)

    def decode(
        C: Any, term: int, output: Any, inputs: Any, parts: Any, shift: Any, keep: Any, flip: Any, negatives: Any
    ) -> None:
        T.buffer_store(negatives, T.int32(0), [0])
        with T.serial(parts * lanes) as i:
            position = T.bind(T.min(i, inputs - 1) * bits)
            last = C.shape[2] - 1
            # A code lies within two bytes.
            two = [T.cast(C[term, output, byte], "int32") for byte in (position // 8, T.min(position // 8 + 1, last))]
            code = T.bind(((two[0] | (two[1] << 8)) >> T.cast(position % 8, "int32")) & T.int32(2**bits - 1))
            level = T.bind(code & T.int32(levels))
            negative = T.bind(T.if_then_else(i < inputs, code >> T.int32(bits - 1), T.int32(0)))
            T.buffer_store(shift, T.int32(levels) - level, [i])
            T.buffer_store(keep, T.if_then_else(level == 0, T.int32(0), T.int32(-1)), [i])
            T.buffer_store(flip, -negative, [i])
            T.buffer_store(negatives, negatives[0] + negative, [0])

    def sums(raised: Any, row: Any, parts: Any, shift: Any, keep: Any, flip: Any) -> list[Any]:
        """The sums of a tile of rows, but for 1 for every negative weight: -s is ~s + 1."""
        places = [T.alloc_buffer((lanes,), "int32", align=64) for _ in range(_ROWS)]
        for place in places:
            T.buffer_store(place, vec.splat_integer(0), [vec.at(0)])
        with T.serial(parts) as part:
            at = vec.at(part * lanes)
            for r, place in enumerate(places):
                signed = ((raised[row + r, at] >> shift[at]) & keep[at]) ^ flip[at]
                T.buffer_store(place, place[vec.at(0)] + signed, [vec.at(0)])
        return [sum((place[lane] for lane in range(1, lanes)), place[0]) for place in places]

    @T.prim_func(s_tir=True)
    def matshift_literal(x: T.handle, codes: T.handle, offset: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        inputs = T.int64()
        outputs = T.int64()
        bytes_of_row = T.int64()
        X = T.match_buffer(x, (rows, inputs), "int32", align=4)
        C = T.match_buffer(codes, (terms, outputs, bytes_of_row), "uint8", align=1)
        E = T.match_buffer(offset, (terms, outputs), "int8", align=1)
        Y = T.match_buffer(y, (rows, outputs), "float32", align=4)
        for block in T.parallel((rows + (_BLOCK_ROWS - 1)) // _BLOCK_ROWS):
            task(X, C, E, Y, block * _BLOCK_ROWS)

    return matshift_literal


def trial(function: Any, bits: int, terms: int) -> None:
    """Odd sizes, exponents far apart, every sum exact."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(19, 53, generator=generator) * torch.exp2(torch.arange(19).float() - 8)[:, None]
    codes, offset, _ = power_of_two.encode(weight, bits, terms)
    packed = power_of_two.pack(codes, bits)
    x = torch.randint(-9, 10, (_BLOCK_ROWS + 7, 53), generator=generator, dtype=torch.int32)
    found, expected = run(function, x, packed, offset), matshift_literal_twin(x, packed, offset, bits)
    assert torch.equal(found, expected), f"it is off by {(found - expected).abs().max():.2g}"


def variants(target: CpuTarget) -> Iterator[dict[str, Any]]:
    """4 and 5 bits, one and two terms."""
    for bits in (4, 5):
        for terms in (1, 2):
            yield {"bits": bits, "terms": terms}


LITERAL = Kernel("matshift_literal", build, trial, variants)


def run(function: Any, x: Tensor, codes: Tensor, offset: Tensor) -> Tensor:
    y = torch.empty(x.shape[0], codes.shape[1])
    function(x, codes, offset, y)
    return y
