"""MatShift as an op: the linear layer of shifts, straight from its packed codes.

Accuracy (see `shiftadd3d.kernels.runtime.numerics`): ``"exact"`` computes as float32 does throughout. ``"fast"`` does
too, but for two cases (see `shiftadd3d.kernels.cpu.forms`). With one term of at most 5 bits on CPUs with AVX2,
every row of x is rounded to 16-bit integers, and before the activation ``|y - exact y| <= 2**-15 * max |row of x| * sum
|row of W|``, with 5 bits 2**-11 in place of 2**-15. On CPUs with AMX, x is rounded to bfloat16, and the bound is that
with 2**-8. ``"int8"`` is the same, but for one term of at most 4 bits on CPUs with AVX2 and without AMX: every row of x
is rounded to 8-bit integers there, and the bound is that with 1/253.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.forms import forms
from shiftadd3d.kernels.cpu.matshift import MATSHIFT, division_of, run
from shiftadd3d.kernels.cuda import matshift as cuda_matshift
from shiftadd3d.kernels.cuda import product
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.matshift import check_arguments, decoded_weight, matshift_twin
from shiftadd3d.kernels.runtime import memory, targets
from shiftadd3d.kernels.runtime.memory import DTYPES
from shiftadd3d.kernels.runtime.numerics import Numerics, get_numerics


def matshift(
    x: Tensor,  # [*, inputs]
    codes: Tensor,  # [terms, outputs, ceil(inputs * bits / 8)] uint8
    offset: Tensor,  # [terms, outputs] int8
    bias: Tensor | None = None,  # [outputs]
    bits: int = 4,
    activation: Activation = "none",
) -> Tensor:  # [*, outputs], dtype of x
    """A linear layer with power-of-two weights, and an activation function if one is named.

    Runs compiled code on CPUs in float32 and bfloat16, on CUDA GPUs in these and float16 (see
    `shiftadd3d.kernels.cuda_product`), and `matshift_twin` everywhere else. Differentiable with respect to x and bias.

    Args:
        x: activations, any leading shape.
        codes, offset: the weight, as `power_of_two.pack` and `power_of_two.encode` make them.
        bias: any floating dtype.
        bits: bits of one code, 2 to 6.
        activation: one of ``"none"``, ``"relu"``, ``"gelu"`` (with erf).

    Raises:
        UserError: if shapes, dtypes or names do not fit together.
    """
    return matshift_op(x, codes, offset, bias, bits, activation, get_numerics())


def _matshift_cpu(
    x: Tensor, codes: Tensor, offset: Tensor, bias: Tensor | None, bits: int, activation: str, numerics: str
) -> Tensor:
    check_arguments(x, codes, offset, bias, bits, activation, numerics)
    if numerics == "twin" or x.dtype not in DTYPES or not x.numel() or not codes.numel():
        return matshift_twin(x, codes, offset, bias, bits, activation)
    terms, outputs, _ = codes.shape
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    bias_row = memory.float32_bias(bias, outputs)
    dtype = DTYPES[x.dtype]
    for form in forms(targets.current(), cast(Numerics, numerics), bits, terms, dtype):
        function = MATSHIFT.function(form=form, bits=bits, terms=terms, dtype=dtype, activation=activation)
        if function is None:
            continue
        division = division_of(form, rows.shape[0], rows.shape[1], outputs)
        y = run(function, rows, codes.contiguous(), offset.contiguous(), bias_row, *division)
        if y is not None:
            return y.view(*x.shape[:-1], outputs)
    return matshift_twin(x, codes, offset, bias, bits, activation)


def matshift_cuda(
    x: Tensor, codes: Tensor, offset: Tensor, bias: Tensor | None, bits: int, activation: str, numerics: str
) -> Tensor:
    """`matshift` of CUDA tensors."""
    check_arguments(x, codes, offset, bias, bits, activation, numerics)
    dtype = product.DTYPES.get(x.dtype)
    if numerics == "twin" or dtype is None or not x.numel() or not codes.numel():
        return matshift_twin(x, codes, offset, bias, bits, activation)
    y = cuda_matshift.matshift(
        x.reshape(-1, x.shape[-1]), codes, offset, bias, bits, cast(Activation, activation), cast(Numerics, numerics)
    )
    if y is None:
        return matshift_twin(x, codes, offset, bias, bits, activation)
    return y.view(*x.shape[:-1], codes.shape[1])


def _fake(
    x: Tensor, codes: Tensor, offset: Tensor, bias: Tensor | None, bits: int, activation: str, numerics: str
) -> Tensor:
    check_arguments(x, codes, offset, bias, bits, activation, numerics)
    return x.new_empty((*x.shape[:-1], codes.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, offset, bias, ctx.bits, ctx.activation, _ = inputs
    ctx.save_for_backward(x, codes, offset, bias)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, offset, bias = ctx.saved_tensors
    weight = decoded_weight(x, codes, offset, ctx.bits)
    if ctx.activation != "none":
        before = F.linear(x, weight, bias if bias is None else bias.to(x.dtype))
        if ctx.activation == "relu":
            gradient = gradient * (before > 0)
        else:
            gradient = torch.ops.aten.gelu_backward(gradient, before)
    of_x = gradient @ weight if ctx.needs_input_grad[0] else None
    of_bias = gradient.flatten(0, -2).sum(0).to(bias.dtype) if bias is not None and ctx.needs_input_grad[3] else None
    return of_x, None, None, of_bias, None, None, None


matshift_op = define_op(
    "matshift(Tensor x, Tensor codes, Tensor offset, Tensor? bias, int bits, str activation, str numerics) -> Tensor",
    cpu=_matshift_cpu,
    cuda=matshift_cuda,
    twin=matshift_twin,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    activations=1,
)
