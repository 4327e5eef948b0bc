"""The perceptron with a depthwise convolution, as an op.

A few images at a time go through all three steps. The hidden values, eight times as wide as x in the first stages of
PVT v2, then stay in the third-level cache, and in memory that has been used before.

Accuracy: that of `matshift`, `depthwise_conv` and `matshift`, one after the other. Inference only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.ops.define import Size, define_op
from shiftadd3d.kernels.ops.depthwise import depthwise_conv
from shiftadd3d.kernels.ops.matshift import matshift
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.conv_mlp import shift_conv_mlp_twin

# Bytes of hidden activations of the images that are computed together. There are two copies of them, before and after
# the convolution.
_HIDDEN_BYTES = 4 << 20


class ShiftConvMlp(NamedTuple):
    """Two linear layers with power-of-two weights, with a depthwise convolution and an activation function between
    them.

    A kernel runs on CPUs in float32 and bfloat16, and `shift_conv_mlp_twin` in all other cases. Raises `UserError` if
    shapes, dtypes or names do not fit each other.

    Attributes:
        x: tokens, the grid row by row.
        hidden_codes, hidden_offset, hidden_bias: the first layer, as in `matshift`.
        weight, conv_bias: the convolution, as in `depthwise_conv`.
        codes, offset, bias: the second layer.
        height, width: size of the grid.
        bits: bits of one code, 2 to 6, in both layers.
        activation: one of ``"none"``, ``"relu"``, ``"gelu"`` (with erf).
    """

    x: Tensor  # [B, height * width, inputs]
    hidden_codes: Tensor  # [terms, hidden, ceil(inputs * bits / 8)] uint8
    hidden_offset: Tensor  # [terms, hidden] int8
    hidden_bias: Tensor | None  # [hidden]
    weight: Tensor  # [hidden, 1, k, k]
    conv_bias: Tensor | None  # [hidden]
    codes: Tensor  # [terms, outputs, ceil(hidden * bits / 8)] uint8
    offset: Tensor  # [terms, outputs] int8
    bias: Tensor | None  # [outputs]
    height: Size
    width: Size
    bits: int = 4
    activation: Activation = "gelu"


def _steps(given: ShiftConvMlp) -> Tensor:
    """The three steps as the ops that there are for them, which check their arguments."""
    hidden = matshift(*given[:4], given.bits)
    hidden = depthwise_conv(hidden, given.weight, given.conv_bias, given.height, given.width, given.activation)
    return matshift(hidden, *given[6:9], given.bits)


def _cpu(given: ShiftConvMlp) -> Tensor:
    x = given.x
    hidden_bytes = x.element_size() * math.prod(x.shape[1:-1]) * given.hidden_codes.shape[1]
    images = max(1, _HIDDEN_BYTES // max(1, hidden_bytes))
    if len(x) <= images:
        return _steps(given)
    return torch.cat([_steps(given._replace(x=some)) for some in x.split(images)])


#: [B, height * width, outputs] in the dtype of x.
shift_conv_mlp = define_op(
    "shift_conv_mlp", ShiftConvMlp, twin=shift_conv_mlp_twin, cpu=_cpu, fake=_steps, activations=1
)
