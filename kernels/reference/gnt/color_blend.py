"""A ray's colour as a blend of the source views' colours, with softmaxes over views and over samples.

For each sample, with x its features, y_v = [colour and features] of view v, and d_v the view's ray difference::

    p_v = angle (1 + spread / mean_v(1 - cosine_v)) (cosine_v - 1)
    consensus = sum_v softmax_v(p) y_v,    apart_v = |y_v - consensus|
    l_v = w . relu(W_x x + b_x + W_y [y_v, d_v, apart_v] + b_y) + b + p_v    masked: MASKED_LOGIT
    colour = sum_v softmax_v(l) colour_v,    deviation = the consensus' mean of apart_v, over the colour's channels
    m = u . x + c - agreement deviation             samples fewer than two views see: MASKED_LOGIT

and over the samples of a ray, rgb = sum softmax(m) colour. If a view shows something else than the others, the sample
may be hidden from it. The network sees this from `apart_v`. With a spread above 0, the nearest view counts more even
among views that are close together, because photos taken a few degrees apart differ, too.

Source: Wang et al., "IBRNet" (CVPR 2021), section 3.3, for blending by learned weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.reference.gnt.plane_sweep import MASKED_LOGIT, view_agreement
from shiftadd3d.kernels.reference.layers import Layer, linear
from shiftadd3d.kernels.reference.trials import Draw

MAX_VIEWS = 32

#: The layers of the weights and biases of `color_blend`, in this order.
LAYERS = ("point", "view", "view logit", "sample logit")


#: The least mean of 1 - cosine, 0.08 degrees, that a spread is divided by.
LEAST_ANGLE = 1e-6


class Scales(NamedTuple):
    """Weights of the priors: scalars.

    Attributes:
        angle: weight of a view's angle to the target, as a logit per 1 - cosine.
        agreement: weight of the deviation of the views, as a logit per unit of colour.
        spread: the mean of 1 - cosine over the views at which `angle` counts twice; 0 if it always counts once.
    """

    angle: Tensor
    agreement: Tensor
    spread: Tensor


def angle_prior(cosine: Tensor, mask: Tensor, scales: Scales) -> Tensor:
    """Logits of views [*, V] from cosines [*, V], for views in the mask [*, V]; 0 for the same direction."""
    off = 1.0 - cosine
    mean = (off * mask).sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    return -scales.angle * (1.0 + scales.spread / mean.clamp(min=LEAST_ANGLE)) * off


def color_blend(
    x: Tensor,  # [R, S, C]
    values: Tensor,  # [R, S, V, K], colour first
    ray_diff: Tensor,  # [R, S, V, 4]
    mask: Tensor,  # [R, S, V] bool
    scales: Scales,
    *,
    point: Layer,
    view: Layer,
    view_logit: Layer,
    sample_logit: Layer,
) -> tuple[Tensor, Tensor]:
    """Colours of rays [R, 3] and weights of their samples [R, S], with any layers."""
    prior = angle_prior(ray_diff[..., 3], mask, scales)
    mean, deviation = view_agreement(values, prior, mask)
    apart = (values - mean.unsqueeze(-2)).abs()
    hidden = point(x)[:, :, None] + view(torch.cat([values, ray_diff, apart], dim=-1))
    view_logits = view_logit(F.relu(hidden))[..., 0] + prior
    sample_logits = sample_logit(x)[..., 0]
    share = torch.softmax(view_logits.masked_fill(~mask, MASKED_LOGIT), dim=2).unsqueeze(-1)
    colors = (share * values[..., :3]).sum(dim=2)  # [R, S, 3]
    sample_logits = sample_logits - scales.agreement * deviation[..., :3].mean(dim=-1)
    # One view alone always agrees with itself: that says nothing about the depth.
    weights = torch.softmax(sample_logits.masked_fill(mask.sum(dim=2) < 2, MASKED_LOGIT), dim=-1)
    return (weights[..., None] * colors).sum(dim=1), weights


def color_blend_twin(
    x: Tensor,
    values: Tensor,
    ray_diff: Tensor,
    mask: Tensor,
    weights: list[Tensor],  # of LAYERS: [D, C], [D, 2 K + 4], [1, D], [1, C]
    biases: list[Tensor],  # [D], [D], [1], [1]
    scales: Scales,
) -> tuple[Tensor, Tensor]:
    """`color_blend` with linear layers of these weights."""
    point, view, view_logit, sample_logit = map(linear, weights, biases)
    layers = {"point": point, "view": view, "view_logit": view_logit, "sample_logit": sample_logit}
    return color_blend(x, values, ray_diff, mask, scales, **layers)


def random_blend(
    seed: int, *, rays: int, samples: int, views: int, width: int, inputs: int, hidden: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Scales]:
    """Arguments of `color_blend` for a trial."""
    draw, sizes = Draw(seed), ((hidden, width), (hidden, 2 * inputs + 4), (1, hidden), (1, width))
    x, values, ray_diff = (draw.normal(rays, samples, *rest) for rest in ((width,), (views, inputs), (views, 4)))
    ray_diff[..., 3] = ray_diff[..., 3].cos()
    mask = draw.uniform(rays, samples, views) > 0.4
    biases = [draw.normal(size[0]) for size in sizes]
    return x, values, ray_diff, mask, draw.weights(sizes), biases, Scales(*torch.tensor([1.5, 0.7, 0.3]))
