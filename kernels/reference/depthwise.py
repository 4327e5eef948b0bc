"""Depthwise convolution of tokens that lie on a grid.

Source: Wang et al., PVT v2 (2022), section 3.3; You et al., ShiftAddViT (NeurIPS 2023), section 4.2, for the
convolution on the values of additive attention.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.reference import activations
from shiftadd3d.kernels.reference.activations import Activation


def depthwise_conv_twin(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    activation: str = "none",
    addend: Tensor | None = None,
) -> Tensor:
    """What `depthwise_conv` computes, in plain torch."""
    prefix = check_depthwise(x, weight, bias, height, width, activation, addend)
    image = x[:, prefix:].transpose(1, 2).unflatten(-1, (height, width))
    bias = None if bias is None else bias.to(x.dtype)
    image = F.conv2d(image, weight.to(x.dtype), bias, padding=weight.shape[-1] // 2, groups=x.shape[-1])
    y = activations.apply(cast(Activation, activation), image.flatten(2).transpose(1, 2))
    y = F.pad(y, (0, 0, prefix, 0))
    return y if addend is None else y + addend


def check_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    activation: str,
    addend: Tensor | None,
) -> int:
    """How many tokens come before the grid.

    Raises:
        UserError: for arguments that do not go together.
    """
    activations.check_activation(activation)
    if x.dim() != 3 or not x.is_floating_point():
        raise UserError(f"x must be floating point [B, tokens, C], not {_describe(x)}")
    channels = x.shape[-1]
    if weight.dim() != 4 or weight.shape[:2] != (channels, 1) or weight.shape[2] != weight.shape[3]:
        raise UserError(f"weight must be [{channels}, 1, k, k] beside x {list(x.shape)}, not {list(weight.shape)}")
    if weight.shape[-1] % 2 == 0:
        raise UserError(f"the size of the kernels must be odd, not {weight.shape[-1]}")
    if bias is not None and bias.shape != (channels,):
        raise UserError(f"bias must be [{channels}], not {list(bias.shape)}")
    if height < 1 or width < 1 or height * width > x.shape[1]:
        raise UserError(f"{x.shape[1]} tokens hold no grid of {height} x {width}")
    if addend is not None and (addend.shape != x.shape or addend.dtype != x.dtype):
        raise UserError(f"the addend must be as x, {_describe(x)}, not {_describe(addend)}")
    return x.shape[1] - height * width


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
