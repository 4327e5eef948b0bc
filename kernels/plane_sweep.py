"""A plane sweep: how well the source views agree at many depths of a ray, and a density of surfaces along it.

Points are looked up as in `shiftadd3d.kernels.gather`, but what the views show stays in the kernel: of each point only
the mean and the deviation over the views are kept, for as long as the ray is worked on, and a small network turns those
of a point and its two neighbours into its score.

Inference only: no gradients flow through the op; training uses `shiftadd3d.models.gnt`'s layers.

Source: Collins, "A space-sweep approach to true multi-image matching" (CVPR 1996).
"""

# TVMScript's annotations are calls:
# pyright: reportInvalidTypeForm=false

# ruff: noqa: B023, SIM102 (a TIR function is gone through once, while it is parsed; one `if` is decided then)
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels import gather
from shiftadd3d.kernels.kernel import Kernel, define_op
from shiftadd3d.kernels.targets import CpuTarget, current
from shiftadd3d.kernels.vector import ACCUMULATORS, ROW_PADDING, Vectors

#: Logit of what must not be chosen: finite, so that a softmax over nothing but such ones is even instead of NaN.
MASKED_LOGIT = -1e4

# --------------------------------------------------------------------------------------------------------------------
# Twin
# --------------------------------------------------------------------------------------------------------------------


def view_agreement(
    values: Tensor,  # [*, V, C]
    cosine: Tensor,  # [*, V]
    mask: Tensor,  # [*, V] bool
    angle_scale: Tensor,  # scalar
) -> tuple[Tensor, Tensor]:
    """Mean and mean absolute deviation over the views, [*, C] each; views that look the target's way count more."""
    logits = (angle_scale * (cosine - 1.0)).masked_fill(~mask, MASKED_LOGIT)
    share = torch.softmax(logits, dim=-1).unsqueeze(-1)
    mean = (share * values).sum(dim=-2)
    return mean, (share * (values - mean.unsqueeze(-2)).abs()).sum(dim=-2)


def sweep_evidence(deviation: Tensor, mask: Tensor) -> Tensor:
    """What the scoring network sees of a point: its own agreement and that of its neighbours along the ray.

    Args:
        deviation: [R, P, C] over the views.
        mask: [R, P, V] bool, which views see the point.

    Returns:
        [R, P, 3 * (C + 1)]; the outermost points are their own neighbours.
    """
    own = torch.cat([deviation, mask.sum(dim=-1, keepdim=True) / mask.shape[-1]], dim=-1)
    before = torch.cat([own[:, :1], own[:, :-1]], dim=1)
    after = torch.cat([own[:, 1:], own[:, -1:]], dim=1)
    return torch.cat([before, own, after], dim=-1)


def sweep_outcome(
    scores: Tensor,  # [R, P]
    mean: Tensor,  # [R, P, C], colour first
    deviation: Tensor,  # [R, P, C]
    mask: Tensor,  # [R, P, V] bool
    agreement_scale: Tensor,  # scalar
) -> tuple[Tensor, Tensor]:
    """Colours [R, 3] and weights [R, P] of rays: a softmax over the points of score and agreement in colour."""
    logits = scores - agreement_scale * deviation[..., :3].mean(dim=-1)
    # One view alone always agrees with itself: that says nothing about the depth.
    weights = torch.softmax(logits.masked_fill(mask.sum(dim=-1) < 2, MASKED_LOGIT), dim=-1)
    return (weights[..., None] * mean[..., :3]).sum(dim=1), weights


def plane_sweep_twin(
    points: Tensor,  # [R, P, 3] world
    origins: Tensor,  # [R, 3] where each ray starts
    projection: Tensor,  # [V, 3, 4] world to homogeneous pixels
    centers: Tensor,  # [V, 3] where the source cameras stand
    images: Tensor,  # [V, H, W, 3]
    maps: Tensor,  # [V, h, w, C]; the first F channels are compared
    valid: Tensor | None,  # [V, H, W] bool; None: all pixels
    hidden_weight: Tensor,  # [D, 3 * (3 + F + 1)] of the scoring network
    hidden_bias: Tensor,  # [D]
    score_weight: Tensor,  # [1, D]
    score_bias: Tensor,  # [1]
    angle_scale: Tensor,  # scalar
    agreement_scale: Tensor,  # scalar
) -> tuple[Tensor, Tensor, Tensor]:
    """What `plane_sweep` computes, in plain torch.

    Returns:
        Colours of the rays [R, 3]; weights of their points [R, P], which sum to one; and whether any view sees a point,
        [R, P] bool.
    """
    channels = _channels(hidden_weight)
    values, ray_diff, mask = gather.point_samples_twin(
        points, origins, projection, centers, images, maps[..., :channels], valid
    )
    mean, deviation = view_agreement(values, ray_diff[..., 3], mask, angle_scale)
    hidden = F.relu(F.linear(sweep_evidence(deviation, mask), hidden_weight, hidden_bias))
    scores = F.linear(hidden, score_weight, score_bias)[..., 0]
    return *sweep_outcome(scores, mean, deviation, mask, agreement_scale), mask.any(dim=-1)


def _channels(hidden_weight: Tensor) -> int:
    return hidden_weight.shape[1] // 3 - 4


# --------------------------------------------------------------------------------------------------------------------
# TIR
# --------------------------------------------------------------------------------------------------------------------


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

    def show(lookup: gather.Lookup, images: Any, maps: Any, shown: Any, row: Any, lane: Any) -> None:
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
            lookup = T.meta_var(gather.Lookup(vec, points, origins, projection, centers, (H, W), (h, w), C))
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
                                <= gather.VALID
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


# --------------------------------------------------------------------------------------------------------------------
# Trial and op
# --------------------------------------------------------------------------------------------------------------------


def _run(
    function: Any,
    scene: tuple[Any, ...],
    valid: Tensor | None,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    angle_scale: Tensor,
    agreement_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    points = scene[0]
    rays, samples = points.shape[:2]
    lanes = current().lanes
    short = -hidden_weight.shape[0] % lanes
    rgb, weights = torch.empty(rays, 3), torch.empty(rays, samples)
    seen = torch.empty(rays, samples, dtype=torch.bool)
    function(
        points.reshape(-1, 3).contiguous(),
        *(tensor.contiguous() for tensor in scene[1:]),
        gather.as_bytes(valid),
        F.pad(hidden_weight.mT, (0, short)).contiguous(),
        F.pad(hidden_bias, (0, short)),
        F.pad(score_weight.mT, (0, lanes - 1, 0, short)).contiguous(),
        F.pad(score_bias, (0, lanes - 1)),
        torch.stack([angle_scale, agreement_scale]),
        rgb,
        weights,
        seen.view(torch.uint8),
    )
    return rgb, weights, seen


def random_sweep(seed: int, *, channels: int, hidden: int, **scene: Any) -> tuple[Any, ...]:
    """Arguments of `plane_sweep` for a trial."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    network = (draw(hidden, 3 * (4 + channels)), draw(hidden), draw(1, hidden), draw(1))
    arguments = gather.random_scene(seed, channels=channels + 3, **scene)
    return *arguments, *network, torch.tensor(20.0), torch.tensor(2.0)


def _trial(function: Any, *, channels: int, hidden: int, with_valid: bool) -> None:
    arguments = random_sweep(0, rays=5, samples=13, views=3, channels=channels, hidden=hidden, with_valid=with_valid)
    outcome = _run(function, arguments[:6], *arguments[6:])
    for out, expected in zip(outcome, plane_sweep_twin(*arguments), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def _variants(target: CpuTarget) -> list[dict[str, Any]]:
    return [{"channels": 8, "hidden": 16, "with_valid": with_valid} for with_valid in (False, True)]


KERNEL = Kernel("plane_sweep", _build, _trial, _variants)


def _cpu(
    points: Tensor,
    origins: Tensor,
    projection: Tensor,
    centers: Tensor,
    images: Tensor,
    maps: Tensor,
    valid: Tensor | None,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    angle_scale: Tensor,
    agreement_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    scene = (points, origins, projection, centers, images, maps)
    network = (hidden_weight, hidden_bias, score_weight, score_bias, angle_scale, agreement_scale)
    gather.check_scene(*scene, valid)
    hidden, inputs = hidden_weight.shape
    channels = _channels(hidden_weight)
    if inputs % 3 or not 0 <= channels <= maps.shape[-1]:
        raise UserError(
            f"hidden_weight must have 3 (3 + F + 1) inputs for F <= {maps.shape[-1]} channels, not {inputs}"
        )
    function = None
    if gather.is_served(*scene, *network):
        function = KERNEL.function(channels=channels, hidden=hidden, with_valid=valid is not None)
    if function is None:
        return plane_sweep_twin(*scene, valid, *network)
    return _run(function, scene, valid, *network)


def _fake(points: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rays, samples = points.shape[:2]
    return (
        points.new_empty(rays, 3),
        points.new_empty(rays, samples),
        points.new_empty(rays, samples, dtype=torch.bool),
    )


#: ``torch.ops.shiftadd3d.plane_sweep``; arguments and outcome as those of its twin. float32, any number of views.
plane_sweep = define_op(
    "plane_sweep(Tensor points, Tensor origins, Tensor projection, Tensor centers, Tensor images, Tensor maps, "
    "Tensor? valid, Tensor hidden_weight, Tensor hidden_bias, Tensor score_weight, Tensor score_bias, "
    "Tensor angle_scale, Tensor agreement_scale) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    twin=plane_sweep_twin,
    fake=_fake,
)
