"""View attention on CPUs, in one pass over the views: nothing of the size [points, views, C] is written.

With x_v what view v shows of a point, d_v how its ray differs, q the point's query, and products of weights taken
beforehand (`shiftadd3d.kernels.pack.gnt.view_attention`)::

    p_v = relu(P d_v + b)                               position
    (u_v, h_v) = R (x_v, p_v) + b                       row
    s_v = A relu(h_v - W q + b)                         score, -1e9 where the view is masked
    out = W_o sum_v softmax_v(s)_v u_v + b_o            out
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import copy_row, softmax_of_vectors
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, product
from shiftadd3d.kernels.pack.gnt.view_attention import panels
from shiftadd3d.kernels.reference.gnt.view_attention import MAX_VIEWS, compare_with_twin
from shiftadd3d.kernels.runtime import memory
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

# (point, view) rows at once: what they need of caches stays within the first level for 64 channels.
_ROWS = 64

# Blocks of so many rows that a parallel task takes: enough to allocate buffers for, few enough to share out evenly.
_BLOCKS_A_TASK = 16


def _build(target: CpuTarget, *, width: int, hidden: int) -> T.PrimFunc:
    isa = Isa(target)
    wide, narrow = isa.padded(width), isa.padded(hidden)
    rows_of_tile = _ROWS + ROW_PADDING

    with T.function("view_attention") as function:
        P, R = T.sizes(2)
        query, views = T.argument("query", (P, width)), T.argument("views", (R, width))  # rows of views: (point, view)
        ray_diff, mask = T.argument("ray_diff", (R, 4)), T.argument("mask", (R,), "uint8")
        w_row, b_row = T.panel("w_row", width + hidden, wide + narrow), T.panel("b_row", wide + narrow)
        w_position = T.panel("w_position", 5, narrow)  # the bias last
        w_query, b_query = T.panel("w_query", width, narrow), T.panel("b_query", narrow)
        w_score = T.panel("w_score", hidden, wide)
        w_out, b_out = T.panel("w_out", width, wide), T.panel("b_out", wide)
        V, out = T.scalar("V"), T.argument("out", (P, width))

        points_of_block = T.bind(T.int64(_ROWS) // V)
        blocks = T.bind((P + points_of_block - 1) // points_of_block)
        with T.parallel((blocks + _BLOCKS_A_TASK - 1) // _BLOCKS_A_TASK) as task:
            hidden_rows = T.alloc(rows_of_tile, narrow)
            row_out, query_out = T.alloc(rows_of_tile, wide + narrow), T.alloc(rows_of_tile, narrow)
            pooled, shares = T.alloc(rows_of_tile, wide), T.alloc(MAX_VIEWS * isa.lanes)
            with T.serial(T.min(T.int64(_BLOCKS_A_TASK), blocks - task * _BLOCKS_A_TASK)) as block:
                first = T.bind((task * _BLOCKS_A_TASK + block) * points_of_block)
                points = T.bind(T.min(points_of_block, P - first))
                rows = T.bind(points * V)

                def view(r: Index, k: Index) -> Expr:
                    return views[first * V + T.min(r, rows - 1), k]

                def point(r: Index, k: Index) -> Expr:
                    return query[first + T.min(r, points - 1), k]

                with T.serial(rows) as r:
                    _position(isa, ray_diff.part(first * V + r), w_position, hidden_rows.part(r))
                of_view = (width, view, w_row), (hidden, hidden_rows, w_row.below(width))
                product(isa, rows, wide + narrow, b_row, of_view, row_out)
                product(isa, points, narrow, b_query, [(width, point, w_query)], query_out)
                with T.serial(points) as p:
                    shown, hidden_of_point = row_out.below(p * V), hidden_rows.below(p * V)
                    seen = mask.below((first + p) * V)
                    with T.serial(V) as v:
                        for n in range(0, narrow, isa.lanes):
                            hidden_of_point[v, isa.at(n)] = isa.relu(
                                shown[v, isa.at(wide + n)] + query_out[p, isa.at(n)]
                            )
                    with T.serial(wide // isa.lanes) as n:
                        channels = isa.at(n * isa.lanes)
                        pooled[p, channels] = _pool(isa, hidden_of_point, w_score, seen, shown, V, channels, shares)
                product(isa, points, wide, b_out, [(width, pooled, w_out)], row_out)
                with T.serial(points) as p:
                    copy_row(isa, row_out.part(p), out.part(first + p), width)
    return function.get()


def _position(isa: Isa, ray_diff: Buffer, weight: Buffer, out: Buffer) -> None:
    """``relu(P d + b)`` of one view."""
    for n in range(0, weight.extent(1), isa.lanes):
        total = weight[4, isa.at(n)]
        for i in range(4):
            total = isa.fma(isa.splat(ray_diff[i]), weight[i, isa.at(n)], total)
        out[isa.at(n)] = isa.relu(total)


def _pool(
    isa: Isa, hidden: Buffer, w_score: Buffer, mask: Buffer, shown: Buffer, V: Expr, channels: Expr, shares: Buffer
) -> Expr:
    """``sum_v softmax_v(A h)_v u_v`` of the V views of one point, for a vector of channels."""
    summed = isa.register(0.0)

    def score(v: Expr) -> Expr:
        total = isa.splat(0.0)
        for h in range(w_score.extent(0)):
            total = isa.fma(isa.splat(hidden[v, h]), w_score[h, channels], total)
        return T.if_then_else(mask[v] != T.number("uint8", 0), total, isa.splat(-1e9))

    def add(v: Expr, share: Expr) -> None:
        summed.value = isa.fma(share, shown[v, channels], summed.value)

    total = softmax_of_vectors(isa, shares, V, score, add)
    return summed.value / total


def _trial(function: Compiled, *, width: int, hidden: int) -> None:
    def packed(*arguments: Any) -> Tensor:
        return run(function, *arguments[:4], panels=panels(*arguments[4:], lanes=current().lanes))

    compare_with_twin(packed, torch.device("cpu"), width, hidden)


def run(
    function: Compiled, query: Tensor, views: Tensor, ray_diff: Tensor, mask: Tensor, panels: Sequence[Tensor]
) -> Tensor:
    count, width = views.shape[-2:]
    out = memory.empty(*query.shape, dtype=torch.float32)
    function(
        query.float().reshape(-1, width).contiguous(),
        views.float().reshape(-1, width).contiguous(),
        ray_diff.float().reshape(-1, 4).contiguous(),
        mask.reshape(-1).contiguous().view(torch.uint8),
        *panels,
        count,
        out.view(-1, width),
    )
    return out.to(query.dtype)


def _variants(target: CpuTarget) -> list[dict[str, int]]:
    return [{"width": width, "hidden": width // 8} for width in (32, 64)]


KERNEL = Kernel("view_attention", _build, _trial, _variants)
