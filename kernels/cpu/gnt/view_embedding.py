"""The views' embedding on CPUs: one pass over what the views show, where torch makes a dozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import copy_row
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, product
from shiftadd3d.kernels.pack.gnt.view_embedding import panels
from shiftadd3d.kernels.reference.gnt.view_embedding import LEAST_VARIANCE, random_views, view_embedding_twin
from shiftadd3d.kernels.runtime import memory
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, Spec
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr

# (point, view) rows at once.
_ROWS = 64
_BLOCKS_A_TASK = 16


def _build(target: CpuTarget, *, inputs: int, hidden: int, width: int, with_moments: bool) -> T.PrimFunc:
    isa = Isa(target)
    long, deep, wide = isa.padded(inputs), isa.padded(hidden), isa.padded(width)
    statistics = 2 * inputs + 1 if with_moments else 0

    with T.function("view_embedding") as function:
        P, R = T.sizes(2)
        values, mask = T.argument("values", (R, inputs)), T.argument("mask", (R,), "uint8")  # rows are (point, view)
        w_first, b_first = T.panel("w_first", inputs, deep), T.panel("b_first", deep)
        w_second, b_second = T.panel("w_second", hidden, wide), T.panel("b_second", wide)
        w_moments, b_moments = T.panel("w_moments", statistics * wide), T.panel("b_moments", wide)
        V = T.scalar("V")
        embedding, query = T.argument("embedding", (R, width)), T.argument("query", (P, width))

        points_of_block = T.bind(T.int64(_ROWS) // V)
        blocks = T.bind((P + points_of_block - 1) // points_of_block)
        with T.parallel((blocks + _BLOCKS_A_TASK - 1) // _BLOCKS_A_TASK) as task:
            rows_of_tile = _ROWS + ROW_PADDING
            shown, seen = T.alloc(rows_of_tile, long), T.alloc(_ROWS)
            activation, embedded = T.alloc(rows_of_tile, deep), T.alloc(rows_of_tile, wide)
            summary, queries = T.alloc(rows_of_tile, max(statistics, 1)), T.alloc(rows_of_tile, wide)
            with T.serial(rows_of_tile) as r, T.serial(long) as c:
                shown[r, c] = T.float32(0.0)
            with T.serial(T.min(T.int64(_BLOCKS_A_TASK), blocks - task * _BLOCKS_A_TASK)) as block:
                first = T.bind((task * _BLOCKS_A_TASK + block) * points_of_block)
                points = T.bind(T.min(points_of_block, P - first))
                rows = T.bind(points * V)
                with T.serial(rows) as r:
                    copy_row(isa, values.part(first * V + r), shown.part(r), inputs)
                    seen[r] = T.cast(mask[first * V + r], "float32")
                product(isa, rows, deep, b_first, [(inputs, shown, w_first)], activation, isa.relu)
                product(isa, rows, wide, b_second, [(hidden, activation, w_second)], embedded)
                with T.serial(rows) as r:
                    copy_row(isa, embedded.part(r), embedding.part(first * V + r), width)
                with T.serial(points) as p:
                    _largest(isa, embedded, p * V, V, queries.part(p))
                    if with_moments:
                        _moments(isa, inputs, shown, seen, p * V, V, summary.part(p))
                if with_moments:
                    product(
                        isa,
                        points,
                        wide,
                        lambda r, c: queries[r, isa.at(c)] + b_moments[isa.at(c)],
                        [(statistics, summary, lambda k, c: w_moments[isa.at(k * wide + c)])],
                        queries,
                    )
                with T.serial(points) as p:
                    copy_row(isa, queries.part(p), query.part(first + p), width)
    return function.get()


def _largest(isa: Isa, embedded: Buffer, row: Expr, V: Expr, out: Buffer) -> None:
    """The largest of each channel over the V views from a row on."""
    for n in range(0, out.extent(0), isa.lanes):
        at = isa.at(n)
        out[at] = embedded[row, at]
        with T.serial(V - 1) as v:
            out[at] = isa.larger_or_nan(embedded[row + v + 1, at], out[at])


def _moments(isa: Isa, inputs: int, shown: Buffer, seen: Buffer, row: Expr, V: Expr, out: Buffer) -> None:
    """Mean, deviation and share of seeing views of the V views from a row on: `view_moments`."""
    count = T.alloc(1, align=4)
    count[0] = T.float32(0.0)
    with T.serial(V) as v:
        count[0] = count[0] + seen[row + v]
    out[2 * inputs] = count[0] / T.cast(V, "float32")
    count[0] = T.float32(1.0) / T.max(count[0], T.float32(1.0))
    for start in range(0, inputs, isa.lanes):
        there = isa.at(start)
        mean, square = isa.register(0.0), isa.register(0.0)
        with T.serial(V) as v:
            mean.value = isa.fma(isa.splat(seen[row + v]), shown[row + v, there], mean.value)
        mean.value = mean.value * isa.splat(count[0])
        with T.serial(V) as v:
            apart = isa.keep(shown[row + v, there] - mean.value)
            square.value = isa.fma(apart * apart, isa.splat(seen[row + v]), square.value)
        square.value = isa.square_root(square.value * isa.splat(count[0]) + isa.splat(LEAST_VARIANCE))
        for i in range(min(isa.lanes, inputs - start)):
            out[start + i] = mean[i]
            out[inputs + start + i] = square[i]


def run(
    function: Compiled, values: Tensor, mask: Tensor, panels: Sequence[Tensor], width: int
) -> tuple[Tensor, Tensor]:
    *leading, views, inputs = values.shape
    embedding = memory.empty(*leading, views, width, dtype=torch.float32)
    query = memory.empty(*leading, width, dtype=torch.float32)
    function(
        values.reshape(-1, inputs).contiguous(),
        mask.reshape(-1).contiguous().view(torch.uint8),
        *panels,
        views,
        embedding.view(-1, width),
        query.view(-1, width),
    )
    return embedding, query


def _trial(function: Compiled, *, inputs: int, hidden: int, width: int, with_moments: bool) -> None:
    sizes = {"inputs": inputs, "hidden": hidden, "width": width}
    values, mask, weights, biases = random_views(0, points=29, views=5, **sizes, with_moments=with_moments)
    outcome = run(function, values, mask, panels(weights, biases, current().lanes), width)
    for out, twin in zip(outcome, view_embedding_twin(values, mask, weights, biases), strict=True):
        torch.testing.assert_close(out, twin, rtol=1e-4, atol=1e-4)


def _variants(target: CpuTarget) -> list[Spec]:
    return [{"inputs": 35, "hidden": width, "width": width, "with_moments": True} for width in (32, 64)]


KERNEL = Kernel("view_embedding", _build, _trial, _variants)
