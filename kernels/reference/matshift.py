"""MatShift: ``y = activation(x W^T + bias)`` with a weight of powers of two, from its packed codes.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.reference import activations, power_of_two
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.arguments import takes


class MatShift(NamedTuple):
    """A linear layer with power-of-two weights, and an activation function if one is named.

    Runs compiled code on CPUs in float32 and bfloat16, on CUDA GPUs in these and float16 (see
    `shiftadd3d.kernels.cuda.product`), and `matshift_twin` everywhere else. Differentiable with respect to x and bias.
    Raises `UserError` if shapes, dtypes or names do not fit together.

    Attributes:
        x: activations, any leading shape.
        codes, offset: the weight, as `power_of_two.pack` and `power_of_two.encode` make them.
        bias: any floating dtype.
        bits: bits of one code, 2 to 6.
        activation: one of ``"none"``, ``"relu"``, ``"gelu"`` (with erf).
    """

    x: Tensor  # [*, inputs]
    codes: Tensor  # [terms, outputs, ceil(inputs * bits / 8)] uint8
    offset: Tensor  # [terms, outputs] int8
    bias: Tensor | None = None  # [outputs]
    bits: int = 4
    activation: Activation = "none"


@takes(MatShift)
def matshift_twin(given: MatShift) -> Tensor:
    """What `matshift` computes, in plain torch."""
    x, codes, offset, bias, bits, activation = given
    bias = bias if bias is None else bias.to(x.dtype)
    return activations.apply(activation, F.linear(x, decoded_weight(x, codes, offset, bits), bias))


def decoded_weight(x: Tensor, codes: Tensor, offset: Tensor, bits: int) -> Tensor:
    return power_of_two.decode(power_of_two.unpack(codes, bits, x.shape[-1]), offset, bits, x.dtype)
