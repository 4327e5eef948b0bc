"""MatShift by literal shifts as an op.

On a CPU it is slower than any form of `matshift`: multipliers are there anyway. On integer-valued activations all forms
that are exact give the same bits, as long as sums fit the 24 bits of float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.literal import LITERAL, run
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.reference.literal import check_literal, check_literal_types, matshift_literal_twin


def matshift_literal(
    x: Tensor,  # [*, inputs] integers
    codes: Tensor,  # [terms, outputs, ceil(inputs * bits / 8)] uint8
    offset: Tensor,  # [terms, outputs] int8
    bits: int = 4,
) -> Tensor:  # [*, outputs] float32
    """``x W^T`` for integers x and power-of-two weights, by shifts and additions of 32-bit integers.

    Runs compiled code on CPUs, and `matshift_literal_twin` everywhere else. Not differentiable.

    Args:
        x: activations of any signed integer dtype up to 32 bits. ``sum |row of x|`` times ``2**(levels - 1)`` has to
            stay below ``2**31``, with 7 levels for 4 bits and 15 for 5.
        codes, offset, bits: as `matshift` takes them.

    Raises:
        UserError: if shapes or dtypes do not fit together, or sums might leave 32 bits.
    """
    return _literal_op(x, codes, offset, bits)


def _cpu(x: Tensor, codes: Tensor, offset: Tensor, bits: int) -> Tensor:
    check_literal(x, codes, offset, bits)
    function = LITERAL.function(bits=bits, terms=codes.shape[0]) if x.numel() and codes.numel() else None
    if function is None:
        return matshift_literal_twin(x, codes, offset, bits)
    rows = x.reshape(-1, x.shape[-1]).to(torch.int32).contiguous()
    return run(function, rows, codes.contiguous(), offset.contiguous()).view(*x.shape[:-1], codes.shape[1])


def _fake(x: Tensor, codes: Tensor, offset: Tensor, bits: int) -> Tensor:
    check_literal_types(x, codes, offset, bits)
    return x.new_empty((*x.shape[:-1], codes.shape[1]), dtype=torch.float32)


_literal_op = define_op(
    "matshift_literal(Tensor x, Tensor codes, Tensor offset, int bits) -> Tensor",
    cpu=_cpu,
    twin=matshift_literal_twin,
    fake=_fake,
)
