"""The perceptron of shifts: ``y = act(x W1^T + b1) W2^T + b2`` with weights of powers of two.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.arguments import takes
from shiftadd3d.kernels.reference.matshift import matshift_twin


class ShiftMlp(NamedTuple):
    """Two linear layers with power-of-two weights and an activation function between them.

    Runs compiled code on CPUs in float32 and bfloat16, on CUDA GPUs as two calls of `matshift`, and `shift_mlp_twin`
    everywhere else. Raises `UserError` if shapes, dtypes or names do not fit together.

    Attributes:
        x: activations, any leading shape.
        hidden_codes, hidden_offset, hidden_bias: the first layer, as `matshift` takes it.
        codes, offset, bias: the second layer.
        bits: bits of one code, 2 to 6, in both layers.
        activation: one of ``"none"``, ``"relu"``, ``"gelu"`` (with erf).
    """

    x: Tensor  # [*, inputs]
    hidden_codes: Tensor  # [terms, hidden, ceil(inputs * bits / 8)] uint8
    hidden_offset: Tensor  # [terms, hidden] int8
    hidden_bias: Tensor | None  # [hidden]
    codes: Tensor  # [terms, outputs, ceil(hidden * bits / 8)] uint8
    offset: Tensor  # [terms, outputs] int8
    bias: Tensor | None  # [outputs]
    bits: int = 4
    activation: Activation = "gelu"


@takes(ShiftMlp)
def shift_mlp_twin(given: ShiftMlp) -> Tensor:
    """What `shift_mlp` computes, in plain torch."""
    hidden = matshift_twin(*given[:4], given.bits, given.activation)
    return matshift_twin(hidden, *given[4:7], given.bits)
