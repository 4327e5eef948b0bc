"""MatShift: ``y = activation(x W^T + bias)`` with a weight of powers of two, straight from its packed codes.

The op takes the buffers of a `PackedShiftLinear` as they are. The same compiled code serves any number of rows, inputs
and outputs: only the weights' format, the dtype and the activation are compiled in.

Accuracy (see `shiftadd3d.kernels.numerics`): ``"exact"`` computes as float32 does throughout. ``"fast"`` does too, but
for two cases (see `shift_product`). With one term of at most 5 bits on CPUs with AVX2, every row of x is rounded to
16-bit integers, and before the activation ``|y - exact y| <= 2**-15 * max |row of x| * sum |row of W|``, with 5 bits
2**-11 in place of 2**-15. On CPUs with AMX, x is rounded to bfloat16, and the bound is that with 2**-8. ``"int8"`` is
the same, but for one term of at most 4 bits on CPUs with AVX2 and without AMX: every row of x is rounded to 8-bit
integers there, and the bound is that with 1/253.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels import activations, bfloat16, cuda_matshift, cuda_product, memory, power_of_two, targets
from shiftadd3d.kernels.activations import Activation
from shiftadd3d.kernels.kernel import Kernel, define_op
from shiftadd3d.kernels.numerics import Numerics, check_numerics, get_numerics
from shiftadd3d.kernels.shift_product import (
    Dtype,
    Form,
    Weights,
    all_forms,
    error_bound,
    forms,
    shift_product,
    tile_shape,
)
from shiftadd3d.kernels.targets import CpuTarget
from shiftadd3d.kernels.vector import Vectors

__all__ = ["MATSHIFT", "matshift", "matshift_twin"]

# What a block of staged activations takes up, and how long it gets at most: by then, decoding the weights for it costs
# next to nothing. Decoding them for fewer rows costs more than reaching beyond a second-level cache of 512 KiB.
_BLOCK_BYTES, _BLOCK_ROWS = 768 << 10, 384

DTYPES: dict[torch.dtype, Dtype] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


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
    return _matshift_op(x, codes, offset, bias, bits, activation, get_numerics())


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
    return activations.apply(cast(Activation, activation), F.linear(x, _weight(x, codes, offset, bits), bias))


def _weight(x: Tensor, codes: Tensor, offset: Tensor, bits: int) -> Tensor:
    return power_of_two.decode(power_of_two.unpack(codes, bits, x.shape[-1]), offset, bits, x.dtype)


def build(target: CpuTarget, form: Form, bits: int, terms: int, dtype: Dtype, activation: Activation) -> Any:
    """The function ``(x, codes, offset, bias, y, flag, rows of a block, shares of the outputs)``.

    x and y are float32, or the bits of bfloat16 as int16; bias is float32. Each task takes a block of rows and a share
    of the outputs. See `ShiftProduct.stage` for the flag.
    """
    from tvm.script import tirx as T

    vectors = Vectors(target)
    product = shift_product(target, form, bits, terms, dtype)
    storage = "int16" if dtype == "bfloat16" else "float32"

    def at(start: Any, count: int) -> Any:
        return start if count == 1 else T.ramp(start, 1, count)

    def task(X: Any, Y: Any, flag: Any, weights: Weights, number: Any, rows_of_block: Any, shares: Any) -> None:
        first_row = T.bind(number // shares * rows_of_block)
        rows = T.bind(T.min(rows_of_block, X.shape[0] - first_row))
        panels = T.bind((weights.outputs + (product.columns - 1)) // product.columns)
        share = T.bind((panels + shares - 1) // shares)
        first = T.bind(number % shares * share)
        last = T.bind(T.max(first, T.min(first + share, panels)))
        scratch = product.scratch(rows_of_block, weights.inputs)

        def load(row: Any, start: Any, count: int) -> Any:
            x = X[first_row + row, at(start, count)]
            return bfloat16.widen(x, count) if dtype == "bfloat16" else x

        def store(row: Any, column: Any, y: Any, count: int) -> None:
            y = bfloat16.narrow(y, count) if dtype == "bfloat16" else y
            T.buffer_store(Y, y, [first_row + row, at(column, count)])

        product.stage(scratch, rows, weights.inputs, load, flag)
        apply = partial(activations.emit, vectors, activation)
        product.panels(scratch, rows, weights, first, last, apply, store)
        product.release()

    @T.prim_func(s_tir=True)
    def matshift(
        x: T.handle,
        codes: T.handle,
        offset: T.handle,
        bias: T.handle,
        y: T.handle,
        flag: T.handle,
        rows_of_block: T.int64,
        shares: T.int64,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        inputs = T.int64()
        outputs = T.int64()
        bytes_of_row = T.int64()
        X = T.match_buffer(x, (rows, inputs), storage, align=4)
        C = T.match_buffer(codes, (terms, outputs, bytes_of_row), "uint8", align=1)
        E = T.match_buffer(offset, (terms, outputs), "int8", align=1)
        B = T.match_buffer(bias, (outputs,), "float32", align=4)
        Y = T.match_buffer(y, (rows, outputs), storage, align=4)
        G = T.match_buffer(flag, (1,), "int32", align=4)
        for number in T.parallel((rows + rows_of_block - 1) // rows_of_block * shares):
            task(X, Y, G, Weights(C, E, B, inputs, outputs), number, rows_of_block, shares)

    return matshift


def trial(function: Any, form: Form, bits: int, terms: int, dtype: Dtype, activation: Activation) -> None:
    """Odd sizes with tails on every side, more than one block of inputs, exponents far apart."""
    rows, columns = tile_shape(targets.current(), form)
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = 16 * 41 + 5, columns + 3
    weight = torch.randn(outputs, inputs, generator=generator) * torch.exp2(torch.arange(outputs).float() - 8)[:, None]
    codes, offset, _ = power_of_two.encode(weight, bits, terms)
    x = torch.randn(3 * rows + 1, inputs, generator=generator).to(getattr(torch, dtype))
    bias = torch.randn(outputs, generator=generator)
    packed = power_of_two.pack(codes, bits)
    y = _run(function, x, packed, offset, bias, block_rows=2 * rows, shares=2)
    assert y is not None, "it found an activation that it cannot express"
    weight = _weight(x, packed, offset, bits)
    twin = activations.apply(activation, F.linear(x.float(), weight.float(), bias))
    # The twin's own error, that of the form, and that of rounding the outcome.
    bound = x.float().abs() @ weight.float().abs().T * 1e-6 + bias.abs() * 1e-6
    bound += error_bound(form, bits) * x.float().abs().amax(-1, keepdim=True) * weight.float().abs().sum(-1)
    bound += twin.abs() * (2.0**-8 if dtype == "bfloat16" else 0.0)
    worst = ((y.float() - twin).abs() - bound).max().item()
    assert worst <= 0, f"it is off by {worst:.2g} more than it may be"


def variants(target: CpuTarget) -> Iterator[dict[str, Any]]:
    """4 and 5 bits, one and two terms, both dtypes, all numerics, with each activation."""
    for bits, terms, dtype in itertools.product((4, 5), (1, 2), DTYPES.values()):
        for form, activation in itertools.product(all_forms(target, bits, terms, dtype), activations.ACTIVATIONS):
            yield {"form": form, "bits": bits, "terms": terms, "dtype": dtype, "activation": activation}


MATSHIFT = Kernel("matshift", build, trial, variants)


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
        division = _division(form, rows.shape[0], rows.shape[1], outputs)
        y = _run(function, rows, codes.contiguous(), offset.contiguous(), bias_row, *division)
        if y is not None:
            return y.view(*x.shape[:-1], outputs)
    return matshift_twin(x, codes, offset, bias, bits, activation)


def matshift_cuda(
    x: Tensor, codes: Tensor, offset: Tensor, bias: Tensor | None, bits: int, activation: str, numerics: str
) -> Tensor:
    """`matshift` of CUDA tensors."""
    check_arguments(x, codes, offset, bias, bits, activation, numerics)
    dtype = cuda_product.DTYPES.get(x.dtype)
    if numerics == "twin" or dtype is None or not x.numel() or not codes.numel():
        return matshift_twin(x, codes, offset, bias, bits, activation)
    y = cuda_matshift.matshift(
        x.reshape(-1, x.shape[-1]), codes, offset, bias, bits, cast(Activation, activation), cast(Numerics, numerics)
    )
    if y is None:
        return matshift_twin(x, codes, offset, bias, bits, activation)
    return y.view(*x.shape[:-1], codes.shape[1])


def _run(
    function: Any, x: Tensor, codes: Tensor, offset: Tensor, bias: Tensor, block_rows: int, shares: int
) -> Tensor | None:
    """Call a compiled function; None if its form cannot express an activation."""
    y = memory.empty(x.shape[0], codes.shape[1], dtype=x.dtype)
    flag = torch.zeros(1, dtype=torch.int32)
    numbers = [tensor.view(torch.int16) if x.dtype == torch.bfloat16 else tensor for tensor in (x, y)]
    function(numbers[0], codes, offset, bias, numbers[1], flag, block_rows, shares)
    return None if flag.item() else y


def _division(form: Form, rows: int, inputs: int, outputs: int) -> tuple[int, int]:
    """Rows of a block, and shares of the outputs, for as many tasks as there are threads, or a multiple."""
    tile, columns = tile_shape(targets.current(), form)
    threads = torch.get_num_threads()
    longest = max(tile, min(_BLOCK_ROWS, _BLOCK_BYTES // (4 * inputs)) // tile * tile)
    blocks = -(-rows // longest)
    if blocks % threads:
        # A few rows more or less for each do no harm, but decoding all weights for a handful of rows would.
        blocks = min(-(-blocks // threads) * threads, max(blocks, rows // (4 * tile)))
    shares = min(-(-threads // blocks), -(-outputs // columns))
    return -(-rows // blocks // tile) * tile, shares


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
    weight = _weight(x, codes, offset, ctx.bits)
    if ctx.activation != "none":
        before = F.linear(x, weight, bias if bias is None else bias.to(x.dtype))
        if ctx.activation == "relu":
            gradient = gradient * (before > 0)
        else:
            gradient = torch.ops.aten.gelu_backward(gradient, before)
    of_x = gradient @ weight if ctx.needs_input_grad[0] else None
    of_bias = gradient.flatten(0, -2).sum(0).to(bias.dtype) if bias is not None and ctx.needs_input_grad[3] else None
    return of_x, None, None, of_bias, None, None, None


_matshift_op = define_op(
    "matshift(Tensor x, Tensor codes, Tensor offset, Tensor? bias, int bits, str activation, str numerics) -> Tensor",
    cpu=_matshift_cpu,
    cuda=matshift_cuda,
    twin=matshift_twin,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    activations=1,
)
