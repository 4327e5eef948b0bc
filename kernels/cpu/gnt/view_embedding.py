"""The views' embedding on CPUs: one pass over what the views show, where torch makes a dozen."""

# TVMScript's annotations are calls:
# pyright: reportInvalidTypeForm=false

# ruff: noqa: B023 (a TIR function is gone through once, while it is parsed; one `if` is decided then)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.vectors import ACCUMULATORS, ROW_PADDING, Vectors
from shiftadd3d.kernels.pack.gnt.view_embedding import panels
from shiftadd3d.kernels.reference.gnt.view_embedding import LEAST_VARIANCE, random_views, view_embedding_twin
from shiftadd3d.kernels.runtime import memory
from shiftadd3d.kernels.runtime.kernel import Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget, current

# (point, view) rows at once.
_ROWS = 64
_BLOCKS_A_TASK = 16


def _build(target: CpuTarget, *, inputs: int, hidden: int, width: int, with_moments: bool) -> Any:
    from tvm.script import tirx as T

    vec = Vectors(target)
    lanes, at, splat = vec.lanes, vec.at, vec.splat
    long, deep, wide = vec.padded(inputs), vec.padded(hidden), vec.padded(width)
    statistics = 2 * inputs + 1 if with_moments else 0

    def copy_row(source: Any, target_row: Any, count: int) -> None:
        """`count` floats, by vectors as far as they go; `source` and `target_row` give an index's buffer and place."""
        for start in range(0, count // lanes * lanes, lanes):
            buffer, place = target_row(at(start))
            T.buffer_store(buffer, source(at(start)), place)
        with T.serial(count % lanes) as c:
            buffer, place = target_row(count // lanes * lanes + c)
            T.buffer_store(buffer, source(count // lanes * lanes + c), place)

    def moments(shown: Any, seen: Any, out: Any, point: Any, V: Any) -> None:
        """Mean, deviation and share of seeing views of one point: `view_moments`."""
        count = T.alloc_buffer((1,), "float32")
        T.buffer_store(count, T.float32(0.0), [0])
        with T.serial(V) as v:
            T.buffer_store(count, count[0] + seen[point * V + v], [0])
        T.buffer_store(out, count[0] / T.cast(V, "float32"), [point, 2 * inputs])
        T.buffer_store(count, T.float32(1.0) / T.max(count[0], T.float32(1.0)), [0])
        for start in range(0, long, lanes):
            mean = T.alloc_buffer((lanes,), "float32", align=64)
            square = T.alloc_buffer((lanes,), "float32", align=64)
            T.buffer_store(mean, splat(0.0), [at(0)])
            T.buffer_store(square, splat(0.0), [at(0)])
            with T.serial(V) as v:
                weight = splat(seen[point * V + v])
                x = shown[point * V + v, at(start)]
                T.buffer_store(mean, vec.multiply_add(weight, x, mean[at(0)]), [at(0)])
            T.buffer_store(mean, mean[at(0)] * splat(count[0]), [at(0)])
            with T.serial(V) as v:
                apart = vec.keep(shown[point * V + v, at(start)] - mean[at(0)])
                weight = splat(seen[point * V + v])
                T.buffer_store(square, vec.multiply_add(apart * apart, weight, square[at(0)]), [at(0)])
            deviation = vec.square_root(square[at(0)] * splat(count[0]) + splat(LEAST_VARIANCE))
            T.buffer_store(square, deviation, [at(0)])
            for i in range(min(lanes, inputs - start)):
                T.buffer_store(out, mean[i], [point, start + i])
                T.buffer_store(out, square[i], [point, inputs + start + i])

    @T.prim_func(s_tir=True)
    def view_embedding(
        values_handle: T.handle,
        mask_handle: T.handle,
        w_first: T.Buffer((inputs, deep), "float32"),
        b_first: T.Buffer((deep,), "float32"),
        w_second: T.Buffer((hidden, wide), "float32"),
        b_second: T.Buffer((wide,), "float32"),
        w_moments: T.Buffer((statistics * wide,), "float32"),
        b_moments: T.Buffer((wide,), "float32"),
        V: T.int64,
        embedding_handle: T.handle,
        query_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        P = T.int64()
        R = T.int64()
        values = T.match_buffer(values_handle, (R, inputs), "float32", align=4)  # rows are (point, view)
        mask = T.match_buffer(mask_handle, (R,), "uint8", align=1)
        embedding = T.match_buffer(embedding_handle, (R, width), "float32", align=4)
        query = T.match_buffer(query_handle, (P, width), "float32", align=4)
        points_a_block: T.let[T.int64] = _ROWS // V
        blocks: T.let[T.int64] = (P + points_a_block - 1) // points_a_block
        for task in T.parallel((blocks + _BLOCKS_A_TASK - 1) // _BLOCKS_A_TASK):
            shown = T.alloc_buffer((_ROWS + ROW_PADDING, long), "float32", align=64)
            seen = T.alloc_buffer((_ROWS,), "float32", align=64)
            activation = T.alloc_buffer((_ROWS + ROW_PADDING, deep), "float32", align=64)
            embedded = T.alloc_buffer((_ROWS + ROW_PADDING, wide), "float32", align=64)
            summary = T.alloc_buffer((_ROWS + ROW_PADDING, max(statistics, 1)), "float32", align=64)
            queries = T.alloc_buffer((_ROWS + ROW_PADDING, wide), "float32", align=64)
            accumulators = T.alloc_buffer((ACCUMULATORS * lanes,), "float32", align=64)
            for r in T.serial(_ROWS + ROW_PADDING):
                for c in T.serial(long):
                    shown[r, c] = T.float32(0.0)
            for block in T.serial(T.min(T.int64(_BLOCKS_A_TASK), blocks - task * _BLOCKS_A_TASK)):
                first: T.let[T.int64] = (task * _BLOCKS_A_TASK + block) * points_a_block
                points: T.let[T.int64] = T.min(points_a_block, P - first)
                rows: T.let[T.int64] = points * V
                for r in T.serial(rows):
                    copy_row(lambda c: values[first * V + r, c], lambda c: (shown, [r, c]), inputs)
                    seen[r] = T.cast(mask[first * V + r], "float32")
                vec.product(
                    rows,
                    deep,
                    lambda r, c: b_first[at(c)],
                    [(inputs, lambda r, k: shown[r, k], lambda k, c: w_first[k, at(c)])],
                    lambda r, c, x: T.buffer_store(activation, vec.relu(x), [r, at(c)]),
                    accumulators,
                )
                vec.product(
                    rows,
                    wide,
                    lambda r, c: b_second[at(c)],
                    [(hidden, lambda r, k: activation[r, k], lambda k, c: w_second[k, at(c)])],
                    lambda r, c, x: T.buffer_store(embedded, x, [r, at(c)]),
                    accumulators,
                )
                for r in T.serial(rows):
                    copy_row(lambda c: embedded[r, c], lambda c: (embedding, [first * V + r, c]), width)
                for p in T.serial(points):
                    for n in T.unroll(wide // lanes):
                        queries[p, at(n * lanes)] = embedded[p * V, at(n * lanes)]
                        for v in T.serial(V - 1):
                            queries[p, at(n * lanes)] = vec.larger_or_nan(
                                embedded[p * V + v + 1, at(n * lanes)], queries[p, at(n * lanes)]
                            )
                    if with_moments:
                        moments(shown, seen, summary, p, V)
                if with_moments:
                    vec.product(
                        points,
                        wide,
                        lambda r, c: queries[r, at(c)] + b_moments[at(c)],
                        [(statistics, lambda r, k: summary[r, k], lambda k, c: w_moments[at(k * wide + c)])],
                        lambda r, c, x: T.buffer_store(queries, x, [r, at(c)]),
                        accumulators,
                    )
                for p in T.serial(points):
                    copy_row(lambda c: queries[p, c], lambda c: (query, [first + p, c]), width)

    return view_embedding


def run(function: Any, values: Tensor, mask: Tensor, panels: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
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


def _trial(function: Any, **spec: Any) -> None:
    values, mask, weights, biases = random_views(0, points=29, views=5, **spec)
    outcome = run(function, values, mask, panels(weights, biases, current().lanes), spec["width"])
    for out, twin in zip(outcome, view_embedding_twin(values, mask, weights, biases), strict=True):
        torch.testing.assert_close(out, twin, rtol=1e-4, atol=1e-4)


def _variants(target: CpuTarget) -> list[dict[str, Any]]:
    return [{"inputs": 35, "hidden": width, "width": width, "with_moments": True} for width in (32, 64)]


KERNEL = Kernel("view_embedding", _build, _trial, _variants)
