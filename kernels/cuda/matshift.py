"""MatShift on NVIDIA GPUs: the product of `product` with the weights of one layer, with its bounds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cuda import product
from shiftadd3d.kernels.cuda.driver import MAX_ELEMENTS, CudaFunction, CudaKernel
from shiftadd3d.kernels.cuda.product import (
    COLUMNS,
    DTYPES,
    INPUTS,
    ROWS,
    THREADS,
    Choice,
    Dtype,
    Form,
    Layer,
    Rows,
    Weights,
    check_product,
    form,
)
from shiftadd3d.kernels.cuda.tile import grid
from shiftadd3d.kernels.reference import activations, power_of_two
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Spec
from shiftadd3d.kernels.runtime.numerics import COMPILED, Numerics
from shiftadd3d.kernels.runtime.targets import CudaTarget
from shiftadd3d.kernels.runtime.tir import Expr


def build(target: CudaTarget, form: Form, bits: int, terms: int, dtype: Dtype, activation: Activation) -> T.PrimFunc:
    """The function of rows, a layer's weights, x and y in `dtype`. Blocks: rows along x, outputs along y."""
    with T.function("matshift") as function:
        (rows,) = T.scalars("rows")
        weights = Weights.argument("", dtype, bits, terms)
        x, y = T.tensor("x", (rows, weights.inputs), dtype), T.tensor("y", (rows, weights.outputs), dtype)
        blocks = (rows + (ROWS - 1)) // ROWS, (weights.outputs + (COLUMNS - 1)) // COLUMNS
        with grid(*blocks, threads=THREADS) as (block_row, block_column, thread):
            first = T.bind(block_row * ROWS)

            def store(row: Expr, column: Expr, value: Expr) -> None:
                y[first + row, column] = T.cast(value, dtype)

            placed = Rows(lambda row: first + row < rows, lambda row, k: x[T.min(first + row, rows - 1), k], store)
            product.emit(form, dtype, activation, thread, block_column, [Choice(weights, True)], placed)
    return function.get()


def trial(function: CudaFunction, form: Form, bits: int, terms: int, dtype: Dtype, activation: Activation) -> None:
    """Odd sizes with tails on every side, several blocks each way, exponents far apart."""
    generator = torch.Generator().manual_seed(0)
    rows, inputs, outputs = ROWS + 19, 3 * INPUTS["tensor"] + 5, COLUMNS + 7
    weight = torch.randn(outputs, inputs, generator=generator) * torch.exp2(torch.arange(outputs) % 24 - 12.0)[:, None]
    codes, offset, _ = power_of_two.encode(weight, bits, terms)
    x = torch.randn(rows, inputs, generator=generator).to(getattr(torch, dtype))
    bias = torch.randn(outputs, generator=generator)
    given = (tensor.to(function.device) for tensor in (x, power_of_two.pack(codes, bits), offset, bias))
    y = run(function, *given).cpu()
    weight = power_of_two.decode(codes, offset, bits).double()
    size = x.double().abs() @ weight.abs().T + bias.abs()
    check_product(y, F.linear(x.double(), weight, bias.double()), size, form, dtype, activation)


def variants(target: CudaTarget) -> Iterator[Spec]:
    """4 and 5 bits, one and two terms, all dtypes, exact and fast, with each activation."""
    for bits, terms, dtype in itertools.product((4, 5), (1, 2), DTYPES.values()):
        found = dict.fromkeys(form(target, numerics, bits, dtype) for numerics in COMPILED)
        for one, activation in itertools.product(found, activations.ACTIVATIONS):
            yield {"form": one, "bits": bits, "terms": terms, "dtype": dtype, "activation": activation}


MATSHIFT = CudaKernel("matshift", build, trial, variants)


def run(function: CudaFunction, x: Tensor, codes: Tensor, offset: Tensor, bias: Tensor | None) -> Tensor:
    """Call a compiled function: x [rows, inputs], codes [terms, outputs, bytes], offset [terms, outputs], bias
    [outputs]; y [rows, outputs] in the dtype of x."""
    rows, outputs = len(x), codes.shape[1]
    y, layer = x.new_empty(rows, outputs), Layer.ready(codes, offset, bias, x, x.shape[1])
    function(-(-rows // ROWS), -(-outputs // COLUMNS), x=x.contiguous(), y=y, rows=rows, **layer.arguments(""))
    return y


def matshift(
    x: Tensor,
    codes: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    bits: int,
    activation: Activation,
    numerics: Numerics,
) -> Tensor | None:
    """The product of x [rows, inputs], none of them 0, or None where the twin has to do."""
    terms, outputs, _ = codes.shape
    if len(x) * max(x.shape[1], outputs) > MAX_ELEMENTS or outputs > 65535 * COLUMNS:
        MATSHIFT.decline(f"a product of {list(x.shape)} with {outputs} outputs is too large for it")
        return None
    dtype = DTYPES[x.dtype]
    chosen = form(targets.of_gpu(x.device), numerics, bits, dtype)
    spec: Spec = {"form": chosen, "bits": bits, "terms": terms, "dtype": dtype, "activation": activation}
    function = MATSHIFT.function(device=x.device, **spec)
    return None if function is None else run(function, x, codes, offset, bias)
