"""MatShift: ``y = activation(x W^T + bias)`` with a weight of powers of two, from its packed codes.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.reference import activations, power_of_two
from shiftadd3d.kernels.reference.activations import Activation


def matshift_twin(
    x: Tensor,
    codes: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    bits: int = 4,
    activation: Activation = "none",
) -> Tensor:
    """What `matshift` computes, in plain torch."""
    bias = bias if bias is None else bias.to(x.dtype)
    return activations.apply(activation, F.linear(x, decoded_weight(x, codes, offset, bits), bias))


def decoded_weight(x: Tensor, codes: Tensor, offset: Tensor, bits: int) -> Tensor:
    return power_of_two.decode(power_of_two.unpack(codes, bits, x.shape[-1]), offset, bits, x.dtype)
