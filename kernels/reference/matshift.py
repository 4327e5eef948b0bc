"""MatShift: ``y = activation(x W^T + bias)`` with a weight of powers of two, from its packed codes.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.reference import activations, power_of_two
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.runtime.numerics import check_numerics


def matshift_twin(
    x: Tensor,
    codes: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    bits: int = 4,
    activation: str = "none",
    numerics: str = "exact",
) -> Tensor:
    """What `matshift` computes, in plain torch; always exact, `numerics` being there for the op's signature only."""
    check_arguments(x, codes, offset, bias, bits, activation, numerics)
    bias = bias if bias is None else bias.to(x.dtype)
    return activations.apply(cast(Activation, activation), F.linear(x, decoded_weight(x, codes, offset, bits), bias))


def decoded_weight(x: Tensor, codes: Tensor, offset: Tensor, bits: int) -> Tensor:
    return power_of_two.decode(power_of_two.unpack(codes, bits, x.shape[-1]), offset, bits, x.dtype)


def check_arguments(
    x: Tensor, codes: Tensor, offset: Tensor, bias: Tensor | None, bits: int, activation: str, numerics: str
) -> None:
    activations.check_activation(activation)
    check_numerics(numerics)
    if codes.ndim != 3 or codes.dtype != torch.uint8:
        raise UserError(f"codes must be uint8 [terms, outputs, bytes], not {_describe(codes)}")
    terms, outputs, length = codes.shape
    power_of_two.check_format(bits, terms)
    if offset.shape != (terms, outputs) or offset.dtype != torch.int8:
        raise UserError(
            f"offset must be int8 [{terms}, {outputs}] beside codes {list(codes.shape)}, not {_describe(offset)}"
        )
    if not x.is_floating_point() or x.ndim == 0:
        raise UserError(f"x must be floating point [*, inputs], not {_describe(x)}")
    if length != (x.shape[-1] * bits + 7) // 8:
        raise UserError(
            f"x {list(x.shape)} has {x.shape[-1]} inputs, but rows of {length} bytes hold {length * 8 // bits} codes "
            f"of {bits} bits"
        )
    if bias is not None and (bias.shape != (outputs,) or not bias.is_floating_point()):
        raise UserError(f"bias must be floating point [{outputs}], not {_describe(bias)}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
