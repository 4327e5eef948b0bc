"""The perceptron of shifts: ``y = act(x W1^T + b1) W2^T + b2`` with weights of powers of two.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2.
"""

from __future__ import annotations

from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.reference.matshift import check_arguments, matshift_twin


def shift_mlp_twin(
    x: Tensor,
    hidden_codes: Tensor,
    hidden_offset: Tensor,
    hidden_bias: Tensor | None,
    codes: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    bits: int = 4,
    activation: str = "gelu",
    numerics: str = "exact",
) -> Tensor:
    """What `shift_mlp` computes, in plain torch; always exact, `numerics` being there for the op's signature only."""
    hidden = matshift_twin(x, hidden_codes, hidden_offset, hidden_bias, bits, activation, numerics)
    return matshift_twin(hidden, codes, offset, bias, bits)


def check_mlp(
    x: Tensor,
    hidden_codes: Tensor,
    hidden_offset: Tensor,
    hidden_bias: Tensor | None,
    codes: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    bits: int,
    activation: str,
    numerics: str,
) -> None:
    check_arguments(x, hidden_codes, hidden_offset, hidden_bias, bits, activation, numerics)
    hidden = hidden_codes.shape[1]
    if codes.ndim == 3 and codes.shape[2] != (hidden * bits + 7) // 8:
        raise UserError(
            f"the first layer has {hidden} outputs, but rows of {codes.shape[2]} bytes in the second one hold "
            f"{codes.shape[2] * 8 // bits} codes of {bits} bits"
        )
    check_arguments(x.new_empty(0, hidden), codes, offset, bias, bits, activation, numerics)
