"""MatShift by literal shifts, ``>>``: the form that hardware without multipliers runs, and a reference for all others.

Activations are integers. They are moved up so that no shift loses a bit, and every weight is a shift to the right and a
sign, which a bitwise operation applies; sums are 32-bit integers. Not one multiplication takes place until the sums,
integers in units of the channel's smallest power of two, become floats.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2; Elhoushi et al., DeepShift (CVPR workshops 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.reference.matshift import check_arguments


def matshift_literal_twin(x: Tensor, codes: Tensor, offset: Tensor, bits: int = 4) -> Tensor:
    """What `matshift_literal` computes, in plain torch: one shift and one addition for each weight."""
    check_literal(x, codes, offset, bits)
    levels = power_of_two.num_exponents(bits)
    raised = x.to(torch.int32) << (levels - 1)
    unpacked = power_of_two.unpack(codes, bits, x.shape[-1]).to(torch.int32)
    y = torch.zeros(*x.shape[:-1], codes.shape[1], device=x.device)
    for term, term_offset in zip(unpacked, offset, strict=True):
        level = term & levels
        sums = torch.zeros(y.shape, dtype=torch.int32, device=x.device)
        for i in range(x.shape[-1]):
            shifted = raised[..., i : i + 1] >> (levels - level[:, i])
            shifted = torch.where(level[:, i] == 0, 0, shifted)
            sums += torch.where(term[:, i] > levels, -shifted, shifted)
        y += sums * power_of_two.exact_exp2(term_offset.to(torch.int32) - (levels - 1))
    return y


def check_literal(x: Tensor, codes: Tensor, offset: Tensor, bits: int) -> None:
    check_literal_types(x, codes, offset, bits)
    if not x.numel():
        return
    largest = int(x.long().abs().sum(-1).max()) << (power_of_two.num_exponents(bits) - 1)
    if largest >= 2**31:
        raise UserError(
            f"sums of shifted activations may reach {largest}, and 32-bit integers end at {2**31 - 1}: expected "
            "smaller activations, or fewer bits"
        )


def check_literal_types(x: Tensor, codes: Tensor, offset: Tensor, bits: int) -> None:
    if x.dtype not in (torch.int8, torch.int16, torch.int32):
        raise UserError(f"x must be int8, int16 or int32, not {str(x.dtype).removeprefix('torch.')}")
    check_arguments(
        x.new_empty(x.shape, dtype=torch.float32, device="meta"), codes, offset, None, bits, "none", "exact"
    )
