"""The transformer block along rays on CPUs: all of a ray stays in the caches."""

# TVMScript's annotations are calls:
# pyright: reportInvalidTypeForm=false

# ruff: noqa: B023 (a TIR function is gone through once, while it is parsed; one `if` is decided then)

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.vectors import ACCUMULATORS, ROW_PADDING, Vectors
from shiftadd3d.kernels.pack.gnt.ray_block import layout_of, panels
from shiftadd3d.kernels.reference.gnt.ray_block import (
    random_block,
    ray_block_twin,
    samples_of_certain_codes,
)
from shiftadd3d.kernels.reference.linear_angular import LEAST_ROW_SUM
from shiftadd3d.kernels.runtime import memory
from shiftadd3d.kernels.runtime.kernel import Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget, current

# Rows of activations at once, at least one ray: enough to fill the tiles of the products.
_ROWS = 48


def _build(
    target: CpuTarget, *, width: int, heads: int, hidden: int, attention: str, kernel: int, return_weights: bool
) -> Any:
    from tvm.script import tirx as T

    vec = Vectors(target)
    lanes, at, splat = vec.lanes, vec.at, vec.splat
    layout = layout_of(vec.lanes, width, heads)
    sub = Vectors(target, layout.lanes)
    size = width // heads
    wide, deep = layout.keys, vec.padded(hidden)
    low = -1.0 if attention == "pm1" else 0.0
    scale = 1.0 / math.sqrt(size) if attention == "softmax" else 1.0 / (math.pi * size)

    def normalize(rows: Any, source: Any, out: Any, eps: Any) -> None:
        """Rows of mean 0 and variance 1; `source` is what they come from, [row, column]."""
        with T.serial(rows) as r:
            whole = range(0, width // lanes * lanes, lanes)
            rest = range(width // lanes * lanes, width)
            mean = T.alloc_buffer((1,), "float32")
            factor = T.alloc_buffer((1,), "float32")
            sums = splat(0.0)
            for c in whole:
                sums = sums + source(r, at(c))
            total = vec.total(sums)
            for c in rest:
                total = total + source(r, c)
            T.buffer_store(mean, total / T.float32(width), [0])
            sums = splat(0.0)
            for c in whole:
                apart = vec.keep(source(r, at(c)) - splat(mean[0]))
                sums = vec.multiply_add(apart, apart, sums)
            total = vec.total(sums)
            for c in rest:
                total = total + (source(r, c) - mean[0]) * (source(r, c) - mean[0])
            T.buffer_store(factor, T.float32(1.0) / T.sqrt(total / T.float32(width) + eps), [0])
            for c in whole:
                T.buffer_store(out, (source(r, at(c)) - splat(mean[0])) * splat(factor[0]), [r, at(c)])
            for c in rest:
                T.buffer_store(out, (source(r, c) - mean[0]) * factor[0], [r, c])

    def store_projection(projected: Any, r: Any, c: int, x: Any) -> None:
        if attention != "softmax" and c < layout.values:
            x = vec.select(x >= splat(0.0), splat(1.0), splat(low))
        T.buffer_store(projected, x, [r, at(c)])

    def value(projected: Any, r: Any, head: Any, c: int) -> Any:
        """A vector of a head's values."""
        return projected[r, sub.at(layout.values + head * layout.head + c)]

    def attend_linear(projected: Any, attended: Any, first: Any, S: Any, accumulators: Any) -> None:
        """`ATTENTIONS` other than softmax, for the S rows from `first`."""
        summed = T.alloc_buffer((size + 1, layout.head), "float32", align=64)  # of k v^T, and of v / 2
        counts = T.alloc_buffer((size,), "float32", align=64)  # of k
        row_sum = T.alloc_buffer((1,), "float32")
        columns = range(0, layout.head, sub.lanes)
        with T.serial(heads) as head:
            with T.serial(size + 1) as i:
                for c in columns:
                    T.buffer_store(summed, sub.splat(0.0), [i, sub.at(c)])
            with T.serial(size) as i:
                T.buffer_store(counts, T.float32(0.0), [i])
            with T.serial(S) as j:
                with T.serial(size) as i:
                    code = projected[first + j, layout.keys + head * size + i]
                    T.buffer_store(counts, counts[i] + code, [i])
                    for c in columns:
                        x = value(projected, first + j, head, c)
                        T.buffer_store(
                            summed, sub.multiply_add(sub.splat(code), x, summed[i, sub.at(c)]), [i, sub.at(c)]
                        )
                for c in columns:
                    x = value(projected, first + j, head, c)
                    T.buffer_store(summed, summed[size, sub.at(c)] + x, [size, sub.at(c)])
            with T.serial(size) as i:
                T.buffer_store(counts, counts[i] * T.float32(scale), [i])
                for c in columns:
                    T.buffer_store(summed, summed[i, sub.at(c)] * sub.splat(scale), [i, sub.at(c)])
            for c in columns:
                T.buffer_store(summed, summed[size, sub.at(c)] * sub.splat(0.5), [size, sub.at(c)])
            with T.serial(S) as j:
                T.buffer_store(row_sum, T.cast(S, "float32") * T.float32(0.5), [0])
                sums = [T.alloc_buffer((sub.lanes,), "float32", align=64) for _ in columns]
                for c, part in zip(columns, sums, strict=True):
                    T.buffer_store(part, summed[size, sub.at(c)], [sub.at(0)])
                with T.serial(size) as i:
                    code = projected[first + j, head * size + i]
                    T.buffer_store(row_sum, row_sum[0] + code * counts[i], [0])
                    for c, part in zip(columns, sums, strict=True):
                        x = sub.multiply_add(sub.splat(code), summed[i, sub.at(c)], part[sub.at(0)])
                        T.buffer_store(part, x, [sub.at(0)])
                T.buffer_store(row_sum, T.float32(1.0) / T.max(row_sum[0], T.float32(LEAST_ROW_SUM)), [0])
                for c, part in zip(columns, sums, strict=True):
                    x = part[sub.at(0)] * sub.splat(row_sum[0])
                    T.buffer_store(attended, x, [first + j, sub.at(head * layout.head + c)])

    def attend_softmax(projected: Any, attended: Any, first: Any, S: Any, accumulators: Any) -> None:
        """Softmax attention for the S rows from `first`."""
        span = 2 * lanes
        blocks = T.bind((S + (span - 1)) // span)
        turned = T.alloc_buffer((size, blocks * span), "float32", align=64)  # keys, along the samples
        map_ = T.alloc_buffer((S + ROW_PADDING, blocks * span), "float32", align=64)
        peak = T.alloc_buffer((lanes,), "float32", align=64)
        sums = T.alloc_buffer((lanes,), "float32", align=64)
        with T.serial(heads) as head:
            with T.serial(blocks * span) as j, T.serial(size) as i:
                key = projected[first + T.min(j, S - 1), layout.keys + head * size + i]
                T.buffer_store(turned, key * T.float32(scale), [i, j])
            with T.serial(blocks) as block:
                vec.product(
                    S,
                    span,
                    lambda r, c: splat(0.0),
                    [
                        (
                            size,
                            lambda r, k: projected[first + r, head * size + k],
                            lambda k, c: turned[k, at(block * span + c)],
                        )
                    ],
                    lambda r, c, x: T.buffer_store(map_, x, [r, at(block * span + c)]),
                    accumulators,
                )
            with T.serial(S) as r:
                # The keys beyond the last are copies of it: they leave the maximum alone, and go into no sum.
                T.buffer_store(peak, splat(-3.0e38), [at(0)])
                with T.serial(blocks * 2) as j:
                    T.buffer_store(peak, vec.at_least(map_[r, at(j * lanes)], peak[at(0)]), [at(0)])
                largest = T.alloc_buffer((1,), "float32")
                T.buffer_store(largest, peak[0], [0])
                for i in range(1, lanes):
                    T.buffer_store(largest, T.max(largest[0], peak[i]), [0])
                with T.serial(blocks * 2) as j:
                    x = vec.exp(map_[r, at(j * lanes)] - splat(largest[0]))
                    T.buffer_store(map_, x, [r, at(j * lanes)])
                T.buffer_store(sums, splat(0.0), [at(0)])
                with T.serial(S // lanes) as j:
                    T.buffer_store(sums, sums[at(0)] + map_[r, at(j * lanes)], [at(0)])
                T.buffer_store(largest, vec.total(sums[at(0)]), [0])
                with T.serial(S % lanes) as j:
                    T.buffer_store(largest, largest[0] + map_[r, S // lanes * lanes + j], [0])
                T.buffer_store(largest, T.float32(1.0) / largest[0], [0])
                with T.serial(blocks * 2) as j:
                    T.buffer_store(map_, map_[r, at(j * lanes)] * splat(largest[0]), [r, at(j * lanes)])
            sub.product(
                S,
                layout.head,
                lambda r, c: sub.splat(0.0),
                [(S, lambda r, k: map_[r, k], lambda k, c: value(projected, first + k, head, c))],
                lambda r, c, x: T.buffer_store(attended, x, [first + r, sub.at(head * layout.head + c)]),
                accumulators,
            )

    attend = attend_softmax if attention == "softmax" else attend_linear

    def convolve(projected: Any, attended: Any, weights: Any, first: Any, S: Any) -> None:
        """Add the convolution of the values along the ray, zeros beyond its ends."""
        with T.serial(heads) as head:
            for tap in range(kernel):
                # Which samples have a neighbour at this distance.
                begin = max(0, kernel // 2 - tap)
                with T.serial(T.max(S - abs(tap - kernel // 2), T.int64(0))) as j:
                    to = first + begin + j
                    for c in range(0, layout.head, sub.lanes):
                        x = value(projected, to + (tap - kernel // 2), head, c)
                        place = sub.at(head * layout.head + c)
                        x = sub.multiply_add(sub.splat(weights[head * kernel + tap]), x, attended[to, place])
                        T.buffer_store(attended, x, [to, place])

    def first_weights(projected: Any, out: Any, ray: Any, first: Any, S: Any) -> None:
        """How the first sample of a ray attends, the mean over the heads."""
        similarity = T.alloc_buffer((S,), "float32")
        whole = T.alloc_buffer((1,), "float32")
        peak = T.alloc_buffer((1,), "float32")
        with T.serial(S) as j:
            T.buffer_store(out, T.float32(0.0), [ray, j])
        with T.serial(heads) as head:
            T.buffer_store(peak, T.float32(-3.0e38), [0])
            with T.serial(S) as j:
                T.buffer_store(similarity, T.float32(0.0), [j])
                with T.serial(size) as i:
                    q, k = projected[first, head * size + i], projected[first + j, layout.keys + head * size + i]
                    T.buffer_store(similarity, similarity[j] + q * k, [j])
                T.buffer_store(similarity, similarity[j] * T.float32(scale), [j])
                T.buffer_store(peak, T.max(peak[0], similarity[j]), [0])
            T.buffer_store(whole, T.float32(0.0), [0])
            with T.serial(S) as j:
                if attention == "softmax":
                    T.buffer_store(similarity, T.exp(similarity[j] - peak[0]), [j])
                else:
                    T.buffer_store(similarity, similarity[j] + T.float32(0.5), [j])
                T.buffer_store(whole, whole[0] + similarity[j], [0])
            with T.serial(S) as j:
                T.buffer_store(out, out[ray, j] + similarity[j] / (whole[0] * T.float32(heads)), [ray, j])

    @T.prim_func(s_tir=True)
    def ray_block(
        x_handle: T.handle,
        w_projections: T.Buffer((width, layout.end), "float32"),
        b_projections: T.Buffer((layout.end,), "float32"),
        w_out: T.Buffer((width, wide), "float32"),
        b_out: T.Buffer((wide,), "float32"),
        w_first: T.Buffer((width * deep,), "float32"),
        b_first: T.Buffer((deep,), "float32"),
        w_second: T.Buffer((hidden * wide,), "float32"),
        b_second: T.Buffer((wide,), "float32"),
        conv: T.Buffer((heads * kernel,), "float32"),
        S: T.int64,
        eps: T.float32,
        out_handle: T.handle,
        first_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        N = T.int64()
        F = T.int64()
        x = T.match_buffer(x_handle, (N, width), "float32", align=4)  # rows are (ray, sample)
        out = T.match_buffer(out_handle, (N, width), "float32", align=4)
        first_out = T.match_buffer(first_handle, (F, S), "float32", align=4)
        rays_a_block: T.let[T.int64] = T.max(_ROWS // S, T.int64(1))
        rows_a_block: T.let[T.int64] = rays_a_block * S
        for block in T.parallel((N + rows_a_block - 1) // rows_a_block):
            begin: T.let[T.int64] = block * rows_a_block
            rows: T.let[T.int64] = T.min(rows_a_block, N - begin)
            normed = T.alloc_buffer((rows_a_block + ROW_PADDING, wide), "float32", align=64)
            projected = T.alloc_buffer((rows_a_block + ROW_PADDING, layout.end), "float32", align=64)
            attended = T.alloc_buffer((rows_a_block + ROW_PADDING, heads * layout.head), "float32", align=64)
            residual = T.alloc_buffer((rows_a_block + ROW_PADDING, wide), "float32", align=64)
            accumulators = T.alloc_buffer((ACCUMULATORS * lanes,), "float32", align=64)
            normalize(rows, lambda r, c: x[begin + r, c], normed, eps)
            vec.product(
                rows,
                layout.end,
                lambda r, c: b_projections[at(c)],
                [(width, lambda r, k: normed[r, k], lambda k, c: w_projections[k, at(c)])],
                lambda r, c, sums: store_projection(projected, r, c, sums),
                accumulators,
            )
            for ray in T.serial(rows // S):
                attend(projected, attended, ray * S, S, accumulators)
                convolve(projected, attended, conv, ray * S, S)
                if return_weights:
                    first_weights(projected, first_out, block * rays_a_block + ray, ray * S, S)
            vec.product(
                rows,
                wide,
                lambda r, c: b_out[at(c)],
                [
                    (
                        size,
                        lambda r, k, head=head: attended[r, head * layout.head + k],
                        lambda k, c, head=head: w_out[head * size + k, at(c)],
                    )
                    for head in range(heads)
                ],
                lambda r, c, sums: T.buffer_store(residual, sums, [r, at(c)]),
                accumulators,
            )
            for r in T.serial(rows):
                for c in T.serial(width):
                    residual[r, c] = residual[r, c] + x[begin + r, c]
            if hidden > 0:
                activation = T.alloc_buffer((rows_a_block + ROW_PADDING, deep), "float32", align=64)
                normalize(rows, lambda r, c: residual[r, c], normed, eps)
                vec.product(
                    rows,
                    deep,
                    lambda r, c: b_first[at(c)],
                    [(width, lambda r, k: normed[r, k], lambda k, c: w_first[at(k * deep + c)])],
                    lambda r, c, sums: T.buffer_store(activation, vec.relu(sums), [r, at(c)]),
                    accumulators,
                )
                vec.product(
                    rows,
                    wide,
                    lambda r, c: residual[r, at(c)] + b_second[at(c)],
                    [(hidden, lambda r, k: activation[r, k], lambda k, c: w_second[at(k * wide + c)])],
                    lambda r, c, sums: T.buffer_store(residual, sums, [r, at(c)]),
                    accumulators,
                )
            for r in T.serial(rows):
                for c in T.serial(width):
                    out[begin + r, c] = residual[r, c]

    return ray_block


def run(function: Any, x: Tensor, panels: Sequence[Tensor], eps: float, return_weights: bool) -> tuple[Tensor, Tensor]:
    rays, samples, width = x.shape
    out = memory.empty(rays * samples, width, dtype=torch.float32)
    first = torch.empty(rays if return_weights else 0, samples)
    function(x.float().reshape(-1, width).contiguous(), *panels, samples, eps, out, first)
    first = first if return_weights else x.new_empty(0)
    return out.view(x.shape).to(x.dtype), first.to(x.dtype)


def _trial(
    function: Any, *, width: int, heads: int, hidden: int, attention: str, kernel: int, return_weights: bool
) -> None:
    x, weights, biases, conv, _ = random_block(
        0, rays=13, samples=9, width=width, heads=heads, hidden=hidden, kernel=kernel
    )
    packed = panels(weights, biases, conv, heads, current().lanes)
    out, first = run(function, x, packed, 1e-6, return_weights)
    twin, twins_first = ray_block_twin(x, weights, biases, conv, heads, attention, 1e-6, return_weights)
    certain = torch.ones(x.shape[:2], dtype=torch.bool)
    if attention != "softmax":
        certain = samples_of_certain_codes(x, weights, biases, 1e-6)
        assert certain.any(), "rounding decides a code in each of the trial's rays"
    torch.testing.assert_close(out[certain], twin[certain], rtol=1e-3, atol=1e-4)
    if return_weights:
        torch.testing.assert_close(first[certain[:, 0]], twins_first[certain[:, 0]], rtol=1e-3, atol=1e-4)


def _variants(target: CpuTarget) -> list[dict[str, Any]]:
    return [
        {
            "width": width,
            "heads": 4,
            "hidden": hidden,
            "attention": attention,
            "kernel": 0 if attention == "softmax" else 3,
            "return_weights": False,
        }
        for width in (32, 64)
        for attention, hidden in (("softmax", 4 * width), ("pm1", 0))
    ]


KERNEL = Kernel("ray_block", _build, _trial, _variants)
