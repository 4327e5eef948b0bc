"""Depthwise convolution of tokens that lie on a grid.

Source: Wang et al., PVT v2 (2022), section 3.3; You et al., ShiftAddViT (NeurIPS 2023), section 4.2, for the
convolution on the values of additive attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.reference import activations
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.arguments import Size, takes


class DepthwiseConv(NamedTuple):
    """``activation(convolution of x + bias) + addend``, one kernel a channel, over the grid that tokens lie on.

    Beyond the grid there are zeros. What comes before the grid (class and register tokens) lies on none: it gets the
    addend alone, and no neighbour sees it.

    Runs compiled code on CPUs in float32 and bfloat16 for at least as many channels as a vector register holds, and
    `depthwise_conv_twin` everywhere else. Raises `UserError` if shapes, dtypes or names do not fit together.

    Attributes:
        x: tokens, the grid row by row; read where they are if the channels of each lie side by side.
        weight: as in `torch.nn.Conv2d`, the size k of its kernels odd.
        height, width: of the grid.
        activation: one of ``"none"``, ``"relu"``, ``"gelu"`` (with erf).
    """

    x: Tensor  # [B, prefix + height * width, C]
    weight: Tensor  # [C, 1, k, k]
    bias: Tensor | None  # [C]
    height: Size
    width: Size
    activation: Activation = "none"
    addend: Tensor | None = None  # [B, prefix + height * width, C]


@takes(DepthwiseConv)
def depthwise_conv_twin(given: DepthwiseConv) -> Tensor:
    """What `depthwise_conv` computes, in plain torch."""
    x, weight, bias, height, width, activation, addend = given
    prefix = x.shape[1] - height * width
    image = x[:, prefix:].transpose(1, 2).unflatten(-1, (height, width))
    bias = None if bias is None else bias.to(x.dtype)
    image = F.conv2d(image, weight.to(x.dtype), bias, padding=weight.shape[-1] // 2, groups=x.shape[-1])
    y = activations.apply(activation, image.flatten(2).transpose(1, 2))
    y = F.pad(y, (0, 0, prefix, 0))
    return y if addend is None else y + addend
