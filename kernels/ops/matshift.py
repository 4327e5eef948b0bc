"""MatShift as an op: the linear layer of shifts, directly from its packed codes.

Accuracy (see `shiftadd3d.kernels.runtime.numerics`): ``"exact"`` computes in float32 throughout. ``"fast"`` does as
well, with two exceptions (see `shiftadd3d.kernels.cpu.forms`). With one term of at most 5 bits on CPUs with AVX2, every
row of x is rounded to 16-bit integers. Before the activation, ``|y - exact y| <= 2**-15 * max |row of x| * sum |row of
W|``, and with 5 bits 2**-11 instead of 2**-15. On CPUs with AMX, x is rounded to bfloat16, and the bound has 2**-8.
``"int8"`` is the same, except for one term of at most 4 bits on CPUs with AVX2 and without AMX. There every row of x is
rounded to 8-bit integers, and the bound has 1/253.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.cpu.forms import Form, forms
from shiftadd3d.kernels.cpu.matshift import MATSHIFT, division_of, run
from shiftadd3d.kernels.cuda import matshift as cuda_matshift
from shiftadd3d.kernels.cuda import product
from shiftadd3d.kernels.ops.define import define_op, first_outcome
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.reference.matshift import MatShift, decoded_weight, matshift_twin
from shiftadd3d.kernels.runtime import memory, targets
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.memory import DTYPES
from shiftadd3d.kernels.runtime.numerics import get_numerics


def check_layer(x: Tensor, codes: Tensor, offset: Tensor, bias: Tensor | None, bits: int) -> None:
    """Raise `UserError` unless these are an input of a layer of shifts and its weight."""
    if codes.ndim != 3 or codes.dtype != torch.uint8:
        raise UserError(f"codes must be uint8 [terms, outputs, bytes], not {described(codes)}")
    terms, outputs, length = codes.shape
    power_of_two.check_format(bits, terms)
    if offset.shape != (terms, outputs) or offset.dtype != torch.int8:
        raise UserError(
            f"offset must be int8 [{terms}, {outputs}] beside codes {list(codes.shape)}, not {described(offset)}"
        )
    if not x.is_floating_point() or x.ndim == 0:
        raise UserError(f"x must be floating point [*, inputs], not {described(x)}")
    if length != (x.shape[-1] * bits + 7) // 8:
        raise UserError(
            f"x {list(x.shape)} has {x.shape[-1]} inputs, but rows of {length} bytes hold {length * 8 // bits} codes "
            f"of {bits} bits"
        )
    if bias is not None and (bias.shape != (outputs,) or not bias.is_floating_point()):
        raise UserError(f"bias must be floating point [{outputs}], not {described(bias)}")


def described(tensor: Tensor) -> str:
    """Dtype and shape, for an error."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _cpu(given: MatShift) -> Tensor | None:
    x, codes, offset, bias, bits, activation = given
    if x.dtype not in DTYPES or not x.numel() or not codes.numel():
        return None
    (terms, outputs, _), dtype = codes.shape, DTYPES[x.dtype]
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    arguments = rows, codes.contiguous(), offset.contiguous(), memory.float32_bias(bias, outputs)

    def product_in(function: Compiled, form: Form) -> Tensor | None:
        return run(function, *arguments, *division_of(form, rows.shape[0], rows.shape[1], outputs))

    found = forms(targets.current(), get_numerics(), bits, terms, dtype)
    spec = {"bits": bits, "terms": terms, "dtype": dtype, "activation": activation}
    y = first_outcome(MATSHIFT.function, found, product_in, **spec)
    return None if y is None else y.view(*x.shape[:-1], outputs)


def _cuda(given: MatShift) -> Tensor | None:
    x, codes = given.x, given.codes
    if x.dtype not in product.DTYPES or not x.numel() or not codes.numel():
        return None
    y = cuda_matshift.matshift(given._replace(x=x.reshape(-1, x.shape[-1])))
    return None if y is None else y.view(*x.shape[:-1], codes.shape[1])


def _backward(given: MatShift, gradient: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    x, codes, offset, bias, bits, activation = given
    weight = decoded_weight(x, codes, offset, bits)
    if activation != "none":
        before = F.linear(x, weight, bias if bias is None else bias.to(x.dtype))
        if activation == "relu":
            gradient = gradient * (before > 0)
        else:
            gradient = torch.ops.aten.gelu_backward(gradient, before)
    of_x = gradient @ weight if wanted[0] else None
    of_bias = gradient.flatten(0, -2).sum(0).to(bias.dtype) if bias is not None and wanted[3] else None
    return of_x, None, None, of_bias, None, None


#: [*, outputs] in the dtype of x.
matshift = define_op(
    "matshift",
    MatShift,
    twin=matshift_twin,
    check=lambda given: check_layer(*given[:5]),
    cpu=_cpu,
    cuda=_cuda,
    fake=lambda given: given.x.new_empty((*given.x.shape[:-1], given.codes.shape[1])),
    backward=_backward,
    activations=1,
)
