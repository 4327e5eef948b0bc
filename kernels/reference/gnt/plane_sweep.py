"""A plane sweep: how well the source views agree at many depths of a ray, and a density of surfaces along it.

Source: Collins, "A space-sweep approach to true multi-image matching" (CVPR 1996).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.reference.gnt import gather as reference_gather
from shiftadd3d.kernels.reference.gnt.gather import Scene
from shiftadd3d.kernels.reference.layers import Layer, linear, perceptron
from shiftadd3d.kernels.reference.trials import Draw

#: Logit of a view or point that must not be chosen. It is finite: a softmax over such logits only is even, not NaN.
MASKED_LOGIT = -1e4


def view_agreement(
    values: Tensor,  # [*, V, C]
    prior: Tensor,  # [*, V], a logit
    mask: Tensor,  # [*, V] bool
) -> tuple[Tensor, Tensor]:
    """Mean and mean absolute deviation over the views, [*, C] each; views with a higher prior count more."""
    share = torch.softmax(prior.masked_fill(~mask, MASKED_LOGIT), dim=-1).unsqueeze(-1)
    mean = (share * values).sum(dim=-2)
    return mean, (share * (values - mean.unsqueeze(-2)).abs()).sum(dim=-2)


def plane_sweep(
    values: Tensor,  # [R, P, V, C] what views show, colour first
    cosine: Tensor,  # [R, P, V] between the directions to the target and to the source camera
    mask: Tensor,  # [R, P, V] bool, which views see the point
    angle_scale: Tensor,  # scalar
    agreement_scale: Tensor,  # scalar
    score: Layer,  # of 3 (C + 1) inputs
) -> tuple[Tensor, Tensor]:
    """Colours [R, 3] and weights [R, P] of rays: a softmax over the points of score and agreement in colour."""
    mean, deviation = view_agreement(values, angle_scale * (cosine - 1.0), mask)
    scores = score(_evidence(deviation, mask))[..., 0]
    logits = scores - agreement_scale * deviation[..., :3].mean(dim=-1)
    # One view alone always agrees with itself: that says nothing about the depth.
    weights = torch.softmax(logits.masked_fill(mask.sum(dim=-1) < 2, MASKED_LOGIT), dim=-1)
    return (weights[..., None] * mean[..., :3]).sum(dim=1), weights


def _evidence(deviation: Tensor, mask: Tensor) -> Tensor:
    """The scoring network's inputs for each point: its own agreement and that of its neighbours along the ray.

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


class Network(NamedTuple):
    """What scores points: two linear layers, and how much angles and agreement count.

    Attributes:
        hidden_weight: [D, 3 * (3 + F + 1)], for maps of whose channels the first F are compared.
        hidden_bias: [D].
        score_weight: [1, D].
        score_bias: [1].
        angle_scale, agreement_scale: scalars.
    """

    hidden_weight: Tensor
    hidden_bias: Tensor
    score_weight: Tensor
    score_bias: Tensor
    angle_scale: Tensor
    agreement_scale: Tensor


def plane_sweep_twin(scene: Scene, network: Network) -> tuple[Tensor, Tensor, Tensor]:
    """`plane_sweep` of points looked up in views, with linear layers of these weights.

    Returns:
        Colours of the rays [R, 3]; weights of their points [R, P], which sum to one; and whether any view sees a point,
        [R, P] bool.
    """
    hidden, hidden_bias, last, last_bias, angle_scale, agreement_scale = network
    compared = scene._replace(maps=scene.maps[..., : channels_compared(hidden)])
    values, ray_diff, mask = reference_gather.point_samples_twin(*compared)
    score = perceptron(linear(hidden, hidden_bias), linear(last, last_bias))
    return *plane_sweep(values, ray_diff[..., 3], mask, angle_scale, agreement_scale, score), mask.any(dim=-1)


def channels_compared(hidden_weight: Tensor) -> int:
    return hidden_weight.shape[1] // 3 - 4


def random_sweep(
    seed: int, *, rays: int, samples: int, views: int, channels: int, hidden: int, with_valid: bool
) -> tuple[Scene, Network]:
    """Arguments of `plane_sweep_twin` for a trial."""
    draw = Draw(seed)
    weights = 0.3 * draw.normal(hidden, 3 * (4 + channels)), 0.3 * draw.normal(hidden)
    weights += 0.3 * draw.normal(1, hidden), 0.3 * draw.normal(1)
    scene = reference_gather.random_scene(
        seed, rays=rays, samples=samples, views=views, channels=channels + 3, with_valid=with_valid
    )
    return scene, Network(*weights, torch.tensor(20.0), torch.tensor(2.0))
