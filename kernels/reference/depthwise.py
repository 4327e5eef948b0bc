"""Depthwise convolution of tokens that lie on a grid.

Source: Wang et al., PVT v2 (2022), section 3.3; You et al., ShiftAddViT (NeurIPS 2023), section 4.2, for the
convolution on the values of additive attention.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.reference import activations
from shiftadd3d.kernels.reference.activations import Activation


def depthwise_conv_twin(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    activation: Activation = "none",
    addend: Tensor | None = None,
) -> Tensor:
    """What `depthwise_conv` computes, in plain torch."""
    prefix = x.shape[1] - height * width
    image = x[:, prefix:].transpose(1, 2).unflatten(-1, (height, width))
    bias = None if bias is None else bias.to(x.dtype)
    image = F.conv2d(image, weight.to(x.dtype), bias, padding=weight.shape[-1] // 2, groups=x.shape[-1])
    y = activations.apply(activation, image.flatten(2).transpose(1, 2))
    y = F.pad(y, (0, 0, prefix, 0))
    return y if addend is None else y + addend
