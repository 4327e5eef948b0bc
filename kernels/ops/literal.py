"""MatShift by literal shifts as an op.

On a CPU it is slower than any form of `matshift`: multipliers are there anyway. On integer-valued activations all forms
that are exact give the same bits, as long as sums fit the 24 bits of float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.cpu.literal import LITERAL, run
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.ops.matshift import check_layer
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.reference.literal import matshift_literal_twin


class Literal(NamedTuple):
    """``x W^T`` for integers x and power-of-two weights, by shifts and additions of 32-bit integers.

    Runs compiled code on CPUs, and `matshift_literal_twin` everywhere else. Not differentiable. Raises `UserError` if
    shapes or dtypes do not fit together, or sums might leave 32 bits.

    Attributes:
        x: activations of any signed integer dtype up to 32 bits. ``sum |row of x|`` times ``2**(levels - 1)`` has to
            stay below ``2**31``, with 7 levels for 4 bits and 15 for 5.
        codes, offset, bits: as `matshift` takes them.
    """

    x: Tensor  # [*, inputs] integers
    codes: Tensor  # [terms, outputs, ceil(inputs * bits / 8)] uint8
    offset: Tensor  # [terms, outputs] int8
    bits: int = 4


def _check(given: Literal) -> None:
    x, codes, offset, bits = given
    if x.dtype not in (torch.int8, torch.int16, torch.int32):
        raise UserError(f"x must be int8, int16 or int32, not {str(x.dtype).removeprefix('torch.')}")
    check_layer(x.new_empty(x.shape, dtype=torch.float32, device="meta"), codes, offset, None, bits)


def _check_sums(given: Literal) -> None:
    levels = power_of_two.num_exponents(given.bits)
    largest = int(given.x.long().abs().sum(-1).max()) << (levels - 1) if given.x.numel() else 0
    if largest >= 2**31:
        raise UserError(
            f"sums of shifted activations may reach {largest}, and 32-bit integers end at {2**31 - 1}: expected "
            "smaller activations, or fewer bits"
        )


def _cpu(given: Literal) -> Tensor | None:
    x, codes, offset, bits = given
    function = LITERAL.function(bits=bits, terms=codes.shape[0]) if x.numel() and codes.numel() else None
    if function is None:
        return None
    rows = x.reshape(-1, x.shape[-1]).to(torch.int32).contiguous()
    return run(function, rows, codes.contiguous(), offset.contiguous()).view(*x.shape[:-1], codes.shape[1])


#: [*, outputs] float32.
matshift_literal = define_op(
    "matshift_literal",
    Literal,
    twin=matshift_literal_twin,
    check=_check,
    check_values=_check_sums,
    cpu=_cpu,
    fake=lambda given: given.x.new_empty((*given.x.shape[:-1], given.codes.shape[1]), dtype=torch.float32),
)
