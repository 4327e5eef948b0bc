"""The plane sweep on CPUs, ray by ray.

Points are looked up as in `shiftadd3d.kernels.cpu.gnt.gather`, but what the views show stays in the kernel: of each
point only the mean and the deviation over the views are kept, for as long as the ray is worked on, and a small network
turns those of a point and its two neighbours into its score.
"""

# TVMScript's annotations are calls:
# pyright: reportInvalidTypeForm=false

# ruff: noqa: B023, SIM102 (a TIR function is gone through once, while it is parsed; one `if` is decided then)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.gnt import gather as cpu_gather
from shiftadd3d.kernels.cpu.vectors import ACCUMULATORS, ROW_PADDING, Vectors
from shiftadd3d.kernels.pack.gnt import gather as pack_gather
from shiftadd3d.kernels.pack.gnt.plane_sweep import panels
from shiftadd3d.kernels.reference.gnt import gather as reference_gather
from shiftadd3d.kernels.reference.gnt.plane_sweep import MASKED_LOGIT, plane_sweep_twin, random_sweep
from shiftadd3d.kernels.runtime.kernel import Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget, current


def _build(target: CpuTarget, *, channels: int, hidden: int, with_valid: bool) -> Any:
    from tvm.script import tirx as T

    vec = Vectors(target)
    lanes, at, splat = vec.lanes, vec.at, vec.splat
    own = 3 + channels + 1  # floats of evidence on a point
    wide = vec.padded(hidden)
    # What a view shows of a point: channels, zeros up to a multiple of four, then colour and one more zero.
    color_at = -(-channels // 4) * 4
    pitch = color_at + 4
    four = Vectors(target, 4)
    groups, start = [(four, color_at)], 0
    while start < color_at:
        size = next(size for size in (16, 8, 4) if size <= min(lanes, color_at - start))
        groups.append((Vectors(target, size), start))
        start += size

    def show(lookup: cpu_gather.Lookup, images: Any, maps: Any, shown: Any, row: Any, lane: Any) -> None:
        """Fill in what the view looked at shows of one point; `images` and `maps` read from that view's."""
        for c in range(3):
            value = lookup.image_value(lane, lambda offset, c=c: images(offset + c))
            T.buffer_store(shown, value, [row + color_at + c])
        for group, column in groups[1:]:
            if column + group.lanes <= channels:
                value = lookup.map_values(lane, lambda offset, g=group, c=column: maps(g.at(offset + c)), group)
                T.buffer_store(shown, value, [group.at(row + column)])
            else:
                for c in range(column, channels):
                    value = lookup.map_value(lane, lambda offset, c=c: maps(offset + c))
                    T.buffer_store(shown, value, [row + c])

    def agree(shown: Any, share: Any, V: Any, lane: Any, means: Any, mean_at: Any, evidence: Any, row: Any) -> None:
        """Mean and deviation over the views of all that is shown of one point: `view_agreement`."""
        for group, column in groups:
            here = group.at(0)
            total = T.alloc_buffer((group.lanes,), "float32", align=64)
            apart = T.alloc_buffer((group.lanes,), "float32", align=64)
            T.buffer_store(total, group.splat(0.0), [here])
            T.buffer_store(apart, group.splat(0.0), [here])
            for sums, distance in ((total, False), (apart, True)):
                with T.serial(V) as v:
                    value = shown[group.at((v * lanes + lane) * pitch + column)]
                    value = group.absolute(value - total[here]) if distance else value
                    weight = group.splat(share[v * lanes + lane])
                    T.buffer_store(sums, group.multiply_add(weight, value, sums[here]), [here])
            if column == color_at:
                T.buffer_store(means, total[here], [group.at(mean_at)])
                T.buffer_store(evidence, apart[here], [group.at(row)])
            else:
                T.buffer_store(evidence, apart[here], [group.at(row + 3 + column)])

    @T.prim_func(s_tir=True)
    def plane_sweep(
        points_handle: T.handle,
        origins_handle: T.handle,
        projection_handle: T.handle,
        centers_handle: T.handle,
        images_handle: T.handle,
        maps_handle: T.handle,
        valid_handle: T.handle,
        w_hidden: T.Buffer((3 * own, wide), "float32"),
        b_hidden: T.Buffer((wide,), "float32"),
        w_score: T.Buffer((wide, lanes), "float32"),
        b_score: T.Buffer((lanes,), "float32"),
        scales: T.Buffer((2,), "float32"),
        rgb_handle: T.handle,
        weights_handle: T.handle,
        seen_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        R = T.int64()
        P = T.int64()
        V = T.int64()
        H = T.int64()
        W = T.int64()
        h = T.int64()
        w = T.int64()
        C = T.int64()
        valid_size = T.int64()
        points = T.match_buffer(points_handle, (R * P, 3), "float32", align=4)
        origins = T.match_buffer(origins_handle, (R, 3), "float32", align=4)
        projection = T.match_buffer(projection_handle, (V, 3, 4), "float32", align=4)
        centers = T.match_buffer(centers_handle, (V, 3), "float32", align=4)
        images = T.match_buffer(images_handle, (V, H, W, 3), "float32", align=4)
        maps = T.match_buffer(maps_handle, (V, h, w, C), "float32", align=4)
        valid = T.match_buffer(valid_handle, (valid_size,), "uint8", align=1)
        rgb = T.match_buffer(rgb_handle, (R, 3), "float32", align=4)
        weights = T.match_buffer(weights_handle, (R, P), "float32", align=4)
        seen = T.match_buffer(seen_handle, (R, P), "uint8", align=1)
        images_flat = T.decl_buffer((V * H * W * 3,), "float32", data=images.data)
        maps_flat = T.decl_buffer((V * h * w * C,), "float32", data=maps.data)
        for r in T.parallel(R):
            lookup = T.meta_var(cpu_gather.Lookup(vec, points, origins, projection, centers, (H, W), (h, w), C))
            shown = T.alloc_buffer((V * lanes * pitch,), "float32", align=64)
            share = T.alloc_buffer((V * lanes,), "float32", align=64)
            largest = T.alloc_buffer((lanes,), "float32", align=64)
            total = T.alloc_buffer((lanes,), "float32", align=64)
            count = T.alloc_buffer((lanes,), "float32", align=64)
            # A row for each point and for a neighbour beyond either end: three in a row are what the network takes.
            evidence = T.alloc_buffer(((P + 2 + ROW_PADDING) * own + 4,), "float32", align=64)
            means = T.alloc_buffer((P * 4,), "float32", align=64)
            activation = T.alloc_buffer((P + ROW_PADDING, wide), "float32", align=64)
            scores = T.alloc_buffer((P + ROW_PADDING, lanes), "float32", align=64)
            logits = T.alloc_buffer((P + lanes,), "float32", align=64)
            accumulators = T.alloc_buffer((ACCUMULATORS * lanes,), "float32", align=64)
            color = T.alloc_buffer((4,), "float32", align=16)
            peak = T.alloc_buffer((1,), "float32")
            whole = T.alloc_buffer((1,), "float32")
            for i in T.serial(V * lanes * pitch):
                shown[i] = T.float32(0.0)
            for block in T.serial((P + lanes - 1) // lanes):
                first: T.let[T.int64] = block * lanes
                here: T.let[T.int64] = T.min(T.int64(lanes), P - first)
                lookup.load(r * P + first, here, P)
                count[at(0)] = splat(0.0)
                largest[at(0)] = splat(-3.0e38)
                for v in T.serial(V):
                    lookup.look(v)
                    for i in T.serial(here):
                        show(
                            lookup,
                            lambda offset: images_flat[v * (H * W * 3) + offset],
                            lambda offset: maps_flat[v * (h * w * C) + offset],
                            shown,
                            (v * lanes + i) * pitch,
                            i,
                        )
                        if with_valid:
                            if (
                                lookup.image_value(i, lambda at: T.cast(valid[v * (H * W) + at // 3], "float32"))
                                <= reference_gather.VALID
                            ):
                                lookup.seen[i] = T.float32(0.0)
                    count[at(0)] = count[at(0)] + lookup.seen[at(0)]
                    share[at(v * lanes)] = vec.select(
                        lookup.seen[at(0)] > splat(0.0),
                        splat(scales[0]) * (lookup.difference[at(3 * lanes)] - splat(1.0)),
                        splat(MASKED_LOGIT),
                    )
                    largest[at(0)] = vec.at_least(share[at(v * lanes)], largest[at(0)])
                total[at(0)] = splat(0.0)
                for v in T.serial(V):
                    share[at(v * lanes)] = vec.exp(share[at(v * lanes)] - largest[at(0)])
                    total[at(0)] = total[at(0)] + share[at(v * lanes)]
                for v in T.serial(V):
                    share[at(v * lanes)] = share[at(v * lanes)] / total[at(0)]
                for i in T.serial(here):
                    row: T.let[T.int64] = (first + i + 1) * own
                    agree(shown, share, V, i, means, (first + i) * 4, evidence, row)
                    evidence[row + own - 1] = count[i] / T.cast(V, "float32")
                    seen[r, first + i] = T.cast(count[i] > T.float32(0.0), "uint8")
            for c in T.serial(own):
                evidence[c] = evidence[own + c]
                evidence[(P + 1) * own + c] = evidence[P * own + c]
            vec.product(
                P,
                wide,
                lambda p, c: b_hidden[at(c)],
                [(3 * own, lambda p, k: evidence[p * own + k], lambda k, c: w_hidden[k, at(c)])],
                lambda p, c, x: T.buffer_store(activation, vec.relu(x), [p, at(c)]),
                accumulators,
            )
            vec.product(
                P,
                lanes,
                lambda p, c: b_score[at(c)],
                [(hidden, lambda p, k: activation[p, k], lambda k, c: w_score[k, at(c)])],
                lambda p, c, x: T.buffer_store(scores, x, [p, at(c)]),
                accumulators,
            )
            peak[0] = T.float32(-3.0e38)
            for p in T.serial(P):
                if evidence[(p + 1) * own + own - 1] * T.cast(V, "float32") < T.float32(1.5):
                    logits[p] = T.float32(MASKED_LOGIT)
                else:
                    logits[p] = scores[p, 0] - scales[1] * (
                        (evidence[(p + 1) * own] + evidence[(p + 1) * own + 1] + evidence[(p + 1) * own + 2])
                        / T.float32(3.0)
                    )
                if not (logits[p] <= peak[0]):  # NaN included
                    peak[0] = logits[p]
            for block in T.serial((P + lanes - 1) // lanes):
                logits[at(block * lanes)] = vec.exp(logits[at(block * lanes)] - splat(peak[0]))
            whole[0] = T.float32(0.0)
            color[four.at(0)] = four.splat(0.0)
            for p in T.serial(P):
                whole[0] = whole[0] + logits[p]
                color[four.at(0)] = four.multiply_add(four.splat(logits[p]), means[four.at(p * 4)], color[four.at(0)])
            for p in T.serial(P):
                weights[r, p] = logits[p] / whole[0]
            for c in T.serial(3):
                rgb[r, c] = color[c] / whole[0]

    return plane_sweep


def run(
    function: Any, scene: tuple[Any, ...], valid: Tensor | None, panels: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    points = scene[0]
    rays, samples = points.shape[:2]
    rgb, weights = torch.empty(rays, 3), torch.empty(rays, samples)
    seen = torch.empty(rays, samples, dtype=torch.bool)
    function(
        points.reshape(-1, 3).contiguous(),
        *(tensor.contiguous() for tensor in scene[1:]),
        pack_gather.as_bytes(valid),
        *panels,
        rgb,
        weights,
        seen.view(torch.uint8),
    )
    return rgb, weights, seen


def _trial(function: Any, *, channels: int, hidden: int, with_valid: bool) -> None:
    arguments = random_sweep(0, rays=5, samples=13, views=3, channels=channels, hidden=hidden, with_valid=with_valid)
    outcome = run(function, arguments[:6], arguments[6], panels(*arguments[7:], lanes=current().lanes))
    for out, expected in zip(outcome, plane_sweep_twin(*arguments), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def _variants(target: CpuTarget) -> list[dict[str, Any]]:
    return [{"channels": 8, "hidden": 16, "with_valid": with_valid} for with_valid in (False, True)]


KERNEL = Kernel("plane_sweep", _build, _trial, _variants)
