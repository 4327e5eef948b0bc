"""The weights of the colour blend, in the panels that kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.pack.panel import across, filled, padded, row, stored
from shiftadd3d.kernels.pack.shift import GRANULE, WholeWeights, shift_panel
from shiftadd3d.kernels.pack.shift import across as across_whole
from shiftadd3d.kernels.reference.arguments import takes
from shiftadd3d.kernels.reference.gnt.color_blend import Scales, color_blend_twin


class Panels(NamedTuple):
    """Weights [inputs, outputs], the outputs padded to whole vectors; D are the hidden ones of a view.

    Attributes:
        own: [C, D + 1], from a sample's features to its part of the hidden layer, and to its logit.
        own_bias: [D + 1], that of the views' part taken in.
        view: [2 K + 4, D], from what a view shows.
        view_logit: [D]; its bias, which all views have alike, drops out of the softmax.
        scales: [3], `Scales`.
    """

    own: Tensor
    own_bias: Tensor
    view: Tensor
    view_logit: Tensor
    scales: Tensor


def panels(weights: Sequence[Tensor], biases: Sequence[Tensor], scales: Scales, lanes: int) -> Panels:
    """The panels of weights, biases and scales as `color_blend_twin` takes them."""
    point, view, view_logit, sample_logit = weights
    point_bias, view_bias, _, sample_logit_bias = biases
    packed = Panels(
        own=across(torch.cat([point, sample_logit]), lanes=lanes),
        own_bias=row(torch.cat([point_bias + view_bias, sample_logit_bias]), lanes),
        view=across(view, lanes=lanes),
        view_logit=row(view_logit[0], lanes),
        scales=torch.stack(scales),
    )
    return Panels(*map(stored, packed))


def sizes(lanes: int, width: int, inputs: int, hidden: int) -> list[tuple[int, ...]]:
    """The shapes of the panels for C features, K values of a view, and D hidden units."""
    own, deep = padded(hidden + 1, lanes), padded(hidden, lanes)
    return [(width, own), (own,), (2 * inputs + 4, deep), (deep,), (3,)]


def tile_inputs(channels: int) -> int:
    """Inputs of the views' layer in matrix tiles, for this many features of a view."""
    return 2 * channels + GRANULE


def tile_panel(view: WholeWeights) -> Tensor:
    """The views' layer for matrix tiles, with hidden units padded to a multiple of `GRANULE` / 2.

    Inputs are the features; then their distances from the consensus; then, padded to `GRANULE`, the colour, a zero, the
    ray difference and the colour's distances. In each `GRANULE` of distances, those with even numbers come first.
    """
    channels = (view.integers.shape[1] - 4) // 2 - 3
    whole = across_whole(view, lanes=GRANULE // 2)
    color, features, ray_diff, color_apart, apart = whole.integers.split([3, channels, 4, 3, channels], dim=1)
    apart = apart.unflatten(1, (-1, GRANULE // 2, 2)).mT.flatten(1)
    beside = torch.cat([color, torch.zeros_like(color[:, :1]), ray_diff, color_apart], dim=1)
    integers = torch.cat([features, apart, filled(beside, GRANULE)], dim=1)
    return shift_panel(whole._replace(integers=integers), "bfloat16")


class ColorBlend(NamedTuple):
    """A ray's colour as a mixture of what the source views show: see `shiftadd3d.kernels.reference.gnt.color_blend`.

    A kernel runs on CPUs in float32 for 1 to 32 views, and plain torch in all other cases. The outcome is the colours
    of rays [R, 3] and the weights of their samples [R, S]. Inference only. Raises `UserError` if shapes or dtypes do
    not fit each other.

    Attributes:
        x: features of samples.
        values: colour and features that each view shows.
        ray_diff: differences of rays, of `point_samples`.
        mask: which views see a sample.
        panels: `Panels`.
        hidden: D.
    """

    x: Tensor  # [R, S, C]
    values: Tensor  # [R, S, V, K]
    ray_diff: Tensor  # [R, S, V, 4]
    mask: Tensor  # [R, S, V] bool
    panels: list[Tensor]
    hidden: int


@takes(ColorBlend)
def color_blend_of_panels(given: ColorBlend) -> tuple[Tensor, Tensor]:
    """The twin with the weights of panels. It runs where no kernel serves."""
    x, values, ray_diff, mask, panels, hidden = given
    own, own_bias, view, view_logit, scales = panels
    weights = [own[:, :hidden].mT, view[:, :hidden].mT, view_logit[None, :hidden], own[:, hidden : hidden + 1].mT]
    none = own_bias.new_zeros(hidden)
    biases = [own_bias[:hidden], none, none[:1], own_bias[hidden : hidden + 1]]
    return color_blend_twin(x, values, ray_diff, mask, weights, biases, Scales(*scales.to(x.dtype).unbind()))
