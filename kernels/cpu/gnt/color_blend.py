"""The blend of the views' colours on CPUs, ray by ray, in one pass over what the views show."""

# TVMScript's annotations are calls:
# pyright: reportInvalidTypeForm=false

# ruff: noqa: B023 (a TIR function is gone through once, while it is parsed)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.vectors import ACCUMULATORS, ROW_PADDING, Vectors
from shiftadd3d.kernels.pack.gnt.color_blend import panels
from shiftadd3d.kernels.reference.gnt.color_blend import MAX_VIEWS, color_blend_twin, random_blend
from shiftadd3d.kernels.reference.gnt.plane_sweep import MASKED_LOGIT
from shiftadd3d.kernels.runtime.kernel import Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget, current

# (sample, view) rows at once.
_ROWS = 64


def _build(target: CpuTarget, *, width: int, inputs: int, hidden: int) -> Any:
    from tvm.script import tirx as T

    vec = Vectors(target)
    four = Vectors(target, 4)  # a colour, and the first feature, which nobody reads
    lanes, at, splat = vec.lanes, vec.at, vec.splat
    deep, long = vec.padded(hidden), vec.padded(inputs)
    # Of a sample: its part of the views' hidden layer, then its own logit.
    own = vec.padded(hidden + 1)
    most = -(-MAX_VIEWS // lanes) * lanes

    def view_logit(activation: Any, i: Any, points: Any, s: Any, w_logit: Any) -> Any:
        """The second layer for view row `i` of sample `s`, without its bias, which all views have alike."""
        total = splat(0.0)
        for n in range(0, deep, lanes):
            unit = vec.relu(activation[i, at(n)] + points[s, at(n)])
            total = vec.multiply_add(unit, w_logit[at(n)], total)
        return vec.total(total)

    def shares(logits: Any, ray_diff: Any, mask: Any, row: Any, V: Any, scales: Any, seen: Any, total: Any) -> None:
        """The softmax of the views' logits and angles, in place but for the division by `total`; counts who sees."""
        largest = T.alloc_buffer((1,), "float32")
        T.buffer_store(seen, T.float32(0.0), [0])
        T.buffer_store(largest, T.float32(-3.0e38), [0])
        with T.serial(V) as v:
            T.buffer_store(seen, seen[0] + T.cast(mask[row + v], "float32"), [0])
            angle = scales[0] * (ray_diff[row + v, 3] - T.float32(1.0))
            with T.If(mask[row + v] != T.uint8(0)):
                with T.Then():
                    T.buffer_store(logits, logits[v] + angle, [v])
                with T.Else():
                    T.buffer_store(logits, T.float32(MASKED_LOGIT), [v])
            T.buffer_store(largest, T.max(largest[0], logits[v]), [0])
        with T.serial((V + (lanes - 1)) // lanes) as n:
            T.buffer_store(logits, vec.exp(logits[at(n * lanes)] - splat(largest[0])), [at(n * lanes)])
        T.buffer_store(total, T.float32(0.0), [0])
        with T.serial(V) as v:
            T.buffer_store(total, total[0] + logits[v], [0])
        T.buffer_store(total, T.float32(1.0) / total[0], [0])

    def each_channel(of_vectors: Any, of_rest: Any) -> None:
        """`of_vectors(start)` for the channels of a view that fill vectors, `of_rest(channel)` for the others."""
        whole_vectors = inputs // lanes * lanes
        for start in range(0, whole_vectors, lanes):
            of_vectors(start)
        with T.serial(inputs - whole_vectors) as k:
            of_rest(whole_vectors + k)

    def consensus(
        logits: Any,
        values: Any,
        ray_diff: Any,
        mask: Any,
        row: Any,
        V: Any,
        apart: Any,
        first: Any,
        scores: Any,
        s: Any,
        scales: Any,
    ) -> None:
        """How far the views of sample `s` are from what they show together: rows of `apart` from `first`; its score."""
        seen = T.alloc_buffer((1,), "float32")
        total = T.alloc_buffer((1,), "float32")
        mean = T.alloc_buffer((long,), "float32", align=64)
        deviation = T.alloc_buffer((1,), "float32")
        with T.serial(V) as v:
            T.buffer_store(logits, T.float32(0.0), [v])
        shares(logits, ray_diff, mask, row, V, scales, seen, total)
        for k in range(0, long, lanes):
            T.buffer_store(mean, splat(0.0), [at(k)])
        with T.serial(V) as v:
            share = logits[v] * total[0]
            each_channel(
                lambda k: T.buffer_store(
                    mean, vec.multiply_add(splat(share), values[row + v, at(k)], mean[at(k)]), [at(k)]
                ),
                lambda k: T.buffer_store(mean, mean[k] + share * values[row + v, k], [k]),
            )
        T.buffer_store(deviation, T.float32(0.0), [0])
        with T.serial(V) as v:
            each_channel(
                lambda k: T.buffer_store(apart, vec.absolute(values[row + v, at(k)] - mean[at(k)]), [first + v, at(k)]),
                lambda k: T.buffer_store(
                    apart,
                    T.Select(values[row + v, k] < mean[k], mean[k] - values[row + v, k], values[row + v, k] - mean[k]),
                    [first + v, k],
                ),
            )
            of_color = apart[first + v, 0] + apart[first + v, 1] + apart[first + v, 2]
            T.buffer_store(deviation, deviation[0] + logits[v] * of_color, [0])
        with T.If(seen[0] < T.float32(1.5)):
            with T.Then():
                T.buffer_store(scores, T.float32(MASKED_LOGIT), [s])
            with T.Else():
                apart_by = deviation[0] * total[0] * T.float32(1.0 / 3.0)
                T.buffer_store(scores, scores[s] - scales[1] * apart_by, [s])

    def blend_views(
        logits: Any, values: Any, ray_diff: Any, mask: Any, row: Any, V: Any, colors: Any, s: Any, scales: Any
    ) -> None:
        """From the views' logits of sample `s`, whose views are the rows from `row` on: its colour."""
        seen = T.alloc_buffer((1,), "float32")
        total = T.alloc_buffer((1,), "float32")
        color = T.alloc_buffer((4,), "float32", align=16)
        shares(logits, ray_diff, mask, row, V, scales, seen, total)
        T.buffer_store(color, four.splat(0.0), [four.at(0)])
        with T.serial(V) as v:
            mixed = four.multiply_add(four.splat(logits[v]), values[row + v, four.at(0)], color[four.at(0)])
            T.buffer_store(color, mixed, [four.at(0)])
        T.buffer_store(colors, color[four.at(0)] * four.splat(total[0]), [s, four.at(0)])

    @T.prim_func(s_tir=True)
    def color_blend(
        x_handle: T.handle,
        values_handle: T.handle,
        ray_diff_handle: T.handle,
        mask_handle: T.handle,
        w_own: T.Buffer((width, own), "float32"),
        b_own: T.Buffer((own,), "float32"),
        w_view: T.Buffer((2 * inputs + 4, deep), "float32"),
        w_logit: T.Buffer((deep,), "float32"),
        scales: T.Buffer((2,), "float32"),  # of angles and of agreement
        V: T.int64,
        rgb_handle: T.handle,
        weights_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        R = T.int64()
        S = T.int64()
        N = T.int64()
        x = T.match_buffer(x_handle, (R * S, width), "float32", align=4)
        values = T.match_buffer(values_handle, (N, inputs), "float32", align=4)  # rows are (ray, sample, view)
        ray_diff = T.match_buffer(ray_diff_handle, (N, 4), "float32", align=4)
        mask = T.match_buffer(mask_handle, (N,), "uint8", align=1)
        rgb = T.match_buffer(rgb_handle, (R, 3), "float32", align=4)
        weights = T.match_buffer(weights_handle, (R, S), "float32", align=4)
        samples_a_block: T.let[T.int64] = _ROWS // V
        for r in T.parallel(R):
            points = T.alloc_buffer((S + ROW_PADDING, own), "float32", align=64)
            activation = T.alloc_buffer((_ROWS + ROW_PADDING, deep), "float32", align=64)
            apart = T.alloc_buffer((_ROWS + ROW_PADDING, inputs), "float32", align=64)
            logits = T.alloc_buffer((most,), "float32", align=64)
            colors = T.alloc_buffer((S, 4), "float32", align=64)
            scores = T.alloc_buffer((S + lanes,), "float32", align=64)
            accumulators = T.alloc_buffer((ACCUMULATORS * lanes,), "float32", align=64)
            color = T.alloc_buffer((4,), "float32", align=16)
            peak = T.alloc_buffer((1,), "float32")
            whole = T.alloc_buffer((1,), "float32")
            for n in T.serial(most):
                logits[n] = T.float32(0.0)
            vec.product(
                S,
                own,
                lambda s, c: b_own[at(c)],
                [(width, lambda s, k: x[r * S + T.min(s, S - 1), k], lambda k, c: w_own[k, at(c)])],
                lambda s, c, sums: T.buffer_store(points, sums, [s, at(c)]),
                accumulators,
            )
            for s in T.serial(S):
                scores[s] = points[s, hidden]
            for block in T.serial((S + samples_a_block - 1) // samples_a_block):
                first: T.let[T.int64] = block * samples_a_block
                here: T.let[T.int64] = T.min(samples_a_block, S - first)
                row: T.let[T.int64] = (r * S + first) * V
                for s in T.serial(here):
                    consensus(logits, values, ray_diff, mask, row + s * V, V, apart, s * V, scores, first + s, scales)
                vec.product(
                    here * V,
                    deep,
                    lambda i, c: splat(0.0),
                    [
                        (inputs, lambda i, k: values[T.min(row + i, N - 1), k], lambda k, c: w_view[k, at(c)]),
                        (4, lambda i, k: ray_diff[T.min(row + i, N - 1), k], lambda k, c: w_view[inputs + k, at(c)]),
                        (inputs, lambda i, k: apart[i, k], lambda k, c: w_view[inputs + 4 + k, at(c)]),
                    ],
                    lambda i, c, sums: T.buffer_store(activation, sums, [i, at(c)]),
                    accumulators,
                )
                for s in T.serial(here):
                    for v in T.serial(V):
                        logits[v] = view_logit(activation, s * V + v, points, first + s, w_logit)
                    blend_views(logits, values, ray_diff, mask, row + s * V, V, colors, first + s, scales)
            peak[0] = T.float32(-3.0e38)
            for s in T.serial(S):
                if not (scores[s] <= peak[0]):  # NaN included
                    peak[0] = scores[s]
            for n in T.serial((S + lanes - 1) // lanes):
                scores[at(n * lanes)] = vec.exp(scores[at(n * lanes)] - splat(peak[0]))
            whole[0] = T.float32(0.0)
            color[four.at(0)] = four.splat(0.0)
            for s in T.serial(S):
                whole[0] = whole[0] + scores[s]
                color[four.at(0)] = four.multiply_add(four.splat(scores[s]), colors[s, four.at(0)], color[four.at(0)])
            for s in T.serial(S):
                weights[r, s] = scores[s] / whole[0]
            for c in T.serial(3):
                rgb[r, c] = color[c] / whole[0]

    return color_blend


def run(
    function: Any, x: Tensor, values: Tensor, ray_diff: Tensor, mask: Tensor, panels: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    rays, samples, views, inputs = values.shape
    rgb, weights = torch.empty(rays, 3), torch.empty(rays, samples)
    function(
        x.reshape(rays * samples, -1).contiguous(),
        values.reshape(-1, inputs).contiguous(),
        ray_diff.reshape(-1, 4).contiguous(),
        mask.reshape(-1).contiguous().view(torch.uint8),
        *panels,
        views,
        rgb,
        weights,
    )
    return rgb, weights


def _trial(function: Any, **spec: Any) -> None:
    arguments = random_blend(0, rays=5, samples=19, views=5, **spec)
    outcome = run(function, *arguments[:4], panels=panels(*arguments[4:], lanes=current().lanes))
    for out, twin in zip(outcome, color_blend_twin(*arguments), strict=True):
        torch.testing.assert_close(out, twin, rtol=1e-4, atol=1e-5)


def _variants(target: CpuTarget) -> list[dict[str, Any]]:
    return [{"width": width, "inputs": 35, "hidden": width // 2} for width in (32, 64)]


KERNEL = Kernel("color_blend", _build, _trial, _variants)
