"""View attention on CPUs, in one pass over the views: nothing of the size [points, views, C] is written."""

# TVMScript's annotations are calls:
# pyright: reportInvalidTypeForm=false

# ruff: noqa: B023 (the loops of a TIR function are gone through once, while it is parsed)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.vectors import ACCUMULATORS, ROW_PADDING, Vectors
from shiftadd3d.kernels.pack.gnt.view_attention import panels
from shiftadd3d.kernels.reference.gnt.view_attention import MAX_VIEWS, compare_with_twin
from shiftadd3d.kernels.runtime import memory
from shiftadd3d.kernels.runtime.kernel import Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget, current

# (point, view) rows at once: what they need of caches stays within the first level for 64 channels.
_ROWS = 64

# Blocks of so many rows that a parallel task takes: enough to allocate buffers for, few enough to share out evenly.
_BLOCKS_A_TASK = 16


def _build(target: CpuTarget, *, width: int, hidden: int) -> Any:
    from tvm.script import tirx as T

    vec = Vectors(target)
    lanes, at, splat = vec.lanes, vec.at, vec.splat
    wide, narrow = vec.padded(width), vec.padded(hidden)
    both = wide + narrow

    def position_hidden(ray_diff, weights, row, start):
        total = weights[4, at(start)]
        for i in range(4):
            total = vec.multiply_add(splat(ray_diff[row, i]), weights[i, at(start)], total)
        return vec.relu(total)

    def score(hidden_rows, weights, row, start, seen):
        total = splat(0.0)
        for h in range(hidden):
            total = vec.multiply_add(splat(hidden_rows[row, h]), weights[h, at(start)], total)
        return T.if_then_else(seen != T.uint8(0), total, splat(-1e9))

    @T.prim_func(s_tir=True)
    def view_attention(
        query_handle: T.handle,
        views_handle: T.handle,
        ray_diff_handle: T.handle,
        mask_handle: T.handle,
        w_row: T.Buffer((width + hidden, both), "float32"),
        b_row: T.Buffer((both,), "float32"),
        w_position: T.Buffer((5, narrow), "float32"),
        w_query: T.Buffer((width, narrow), "float32"),
        b_query: T.Buffer((narrow,), "float32"),
        w_score: T.Buffer((hidden, wide), "float32"),
        w_out: T.Buffer((width, wide), "float32"),
        b_out: T.Buffer((wide,), "float32"),
        V: T.int64,
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        P = T.int64()
        R = T.int64()
        query = T.match_buffer(query_handle, (P, width), "float32", align=4)
        views = T.match_buffer(views_handle, (R, width), "float32", align=4)  # rows are (point, view)
        ray_diff = T.match_buffer(ray_diff_handle, (R, 4), "float32", align=4)
        mask = T.match_buffer(mask_handle, (R,), "uint8", align=1)
        out = T.match_buffer(out_handle, (P, width), "float32", align=4)
        points_a_block: T.let[T.int64] = _ROWS // V
        blocks: T.let[T.int64] = (P + points_a_block - 1) // points_a_block
        for task in T.parallel((blocks + _BLOCKS_A_TASK - 1) // _BLOCKS_A_TASK):
            hidden_rows = T.alloc_buffer((_ROWS + ROW_PADDING, narrow), "float32", align=64)
            row_out = T.alloc_buffer((_ROWS + ROW_PADDING, both), "float32", align=64)
            query_out = T.alloc_buffer((_ROWS + ROW_PADDING, narrow), "float32", align=64)
            pooled = T.alloc_buffer((_ROWS + ROW_PADDING, wide), "float32", align=64)
            scores = T.alloc_buffer((MAX_VIEWS * lanes,), "float32", align=64)
            accumulators = T.alloc_buffer((ACCUMULATORS * lanes,), "float32", align=64)
            largest = T.alloc_buffer((lanes,), "float32", align=64)
            total = T.alloc_buffer((lanes,), "float32", align=64)
            summed = T.alloc_buffer((lanes,), "float32", align=64)
            for block in T.serial(T.min(T.int64(_BLOCKS_A_TASK), blocks - task * _BLOCKS_A_TASK)):
                first: T.let[T.int64] = (task * _BLOCKS_A_TASK + block) * points_a_block
                points: T.let[T.int64] = T.min(points_a_block, P - first)
                rows: T.let[T.int64] = points * V
                for r in T.serial(rows):
                    for n in T.unroll(narrow // lanes):
                        hidden_rows[r, at(n * lanes)] = position_hidden(ray_diff, w_position, first * V + r, n * lanes)
                vec.product(
                    rows,
                    both,
                    lambda r, c: b_row[at(c)],
                    [
                        (width, lambda r, k: views[first * V + T.min(r, rows - 1), k], lambda k, c: w_row[k, at(c)]),
                        (hidden, lambda r, k: hidden_rows[r, k], lambda k, c: w_row[width + k, at(c)]),
                    ],
                    lambda r, c, x: T.buffer_store(row_out, x, [r, at(c)]),
                    accumulators,
                )
                vec.product(
                    points,
                    narrow,
                    lambda r, c: b_query[at(c)],
                    [(width, lambda r, k: query[first + T.min(r, points - 1), k], lambda k, c: w_query[k, at(c)])],
                    lambda r, c, x: T.buffer_store(query_out, x, [r, at(c)]),
                    accumulators,
                )
                for p in T.serial(points):
                    for v in T.serial(V):
                        for n in T.unroll(narrow // lanes):
                            hidden_rows[p * V + v, at(n * lanes)] = vec.relu(
                                row_out[p * V + v, at(wide + n * lanes)] + query_out[p, at(n * lanes)]
                            )
                    for n in T.serial(wide // lanes):
                        largest[at(0)] = splat(-3.0e38)
                        for v in T.serial(V):
                            scores[at(v * lanes)] = score(
                                hidden_rows, w_score, p * V + v, n * lanes, mask[(first + p) * V + v]
                            )
                            largest[at(0)] = vec.at_least(scores[at(v * lanes)], largest[at(0)])
                        total[at(0)] = splat(0.0)
                        summed[at(0)] = splat(0.0)
                        for v in T.serial(V):
                            scores[at(v * lanes)] = vec.exp(scores[at(v * lanes)] - largest[at(0)])
                            total[at(0)] = total[at(0)] + scores[at(v * lanes)]
                            summed[at(0)] = vec.multiply_add(
                                scores[at(v * lanes)], row_out[p * V + v, at(n * lanes)], summed[at(0)]
                            )
                        pooled[p, at(n * lanes)] = summed[at(0)] / total[at(0)]
                vec.product(
                    points,
                    wide,
                    lambda r, c: b_out[at(c)],
                    [(width, lambda r, k: pooled[r, k], lambda k, c: w_out[k, at(c)])],
                    lambda r, c, x: T.buffer_store(row_out, x, [r, at(c)]),
                    accumulators,
                )
                for p in T.serial(points):
                    for n in T.serial(width // lanes):
                        out[first + p, at(n * lanes)] = row_out[p, at(n * lanes)]
                    for c in T.serial(width % lanes):
                        out[first + p, width // lanes * lanes + c] = row_out[p, width // lanes * lanes + c]

    return view_attention


def _trial(function: Any, *, width: int, hidden: int) -> None:
    def packed(*arguments: Any) -> Tensor:
        return run(function, *arguments[:4], panels=panels(*arguments[4:], lanes=current().lanes))

    compare_with_twin(packed, torch.device("cpu"), width, hidden)


def run(
    function: Any, query: Tensor, views: Tensor, ray_diff: Tensor, mask: Tensor, panels: Sequence[Tensor]
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
