"""The perceptron with a depthwise convolution: ``y = act(conv(x W1^T + b1)) W2^T + b2``, W1 and W2 powers of two.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2; Wang et al., PVT v2 (2022), section 3.3.
"""

from __future__ import annotations

from torch import Tensor

from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.depthwise import depthwise_conv_twin
from shiftadd3d.kernels.reference.matshift import matshift_twin


def shift_conv_mlp_twin(
    x: Tensor,
    hidden_codes: Tensor,
    hidden_offset: Tensor,
    hidden_bias: Tensor | None,
    weight: Tensor,
    conv_bias: Tensor | None,
    codes: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    bits: int = 4,
    activation: Activation = "gelu",
) -> Tensor:
    """What `shift_conv_mlp` computes, in plain torch."""
    hidden = matshift_twin(x, hidden_codes, hidden_offset, hidden_bias, bits)
    hidden = depthwise_conv_twin(hidden, weight, conv_bias, height, width, activation)
    return matshift_twin(hidden, codes, offset, bias, bits)
