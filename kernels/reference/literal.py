"""MatShift by literal shifts, ``>>``: the form that hardware without multipliers runs, and a reference for all others.

Activations are integers. They are moved up so that no shift loses a bit, and every weight is a shift to the right and a
sign, which a bitwise operation applies; sums are 32-bit integers. Not one multiplication takes place until the sums,
integers in units of the channel's smallest power of two, become floats.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2; Elhoushi et al., DeepShift (CVPR workshops 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd3d.kernels.reference import power_of_two


def matshift_literal_twin(x: Tensor, codes: Tensor, offset: Tensor, bits: int = 4) -> Tensor:
    """What `matshift_literal` computes, in plain torch: one shift and one addition for each weight."""
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
