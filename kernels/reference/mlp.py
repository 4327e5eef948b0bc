"""The perceptron of shifts: ``y = act(x W1^T + b1) W2^T + b2`` with weights of powers of two.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2.
"""

from __future__ import annotations

from torch import Tensor

from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.matshift import matshift_twin


def shift_mlp_twin(
    x: Tensor,
    hidden_codes: Tensor,
    hidden_offset: Tensor,
    hidden_bias: Tensor | None,
    codes: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    bits: int = 4,
    activation: Activation = "gelu",
) -> Tensor:
    """What `shift_mlp` computes, in plain torch."""
    hidden = matshift_twin(x, hidden_codes, hidden_offset, hidden_bias, bits, activation)
    return matshift_twin(hidden, codes, offset, bias, bits)
