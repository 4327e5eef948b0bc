"""MatShift on NVIDIA GPUs: the product of `product` with the weights of one layer, with its bounds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cuda import product
from shiftadd3d.kernels.cuda.driver import MAX_ELEMENTS, CudaFunction, CudaKernel
from shiftadd3d.kernels.cuda.product import COLUMNS, DTYPES, ROWS
from shiftadd3d.kernels.cuda.tile import grid
from shiftadd3d.kernels.reference import activations
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.matshift import MatShift
from shiftadd3d.kernels.reference.trials import Draw
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Spec, by_name
from shiftadd3d.kernels.runtime.numerics import COMPILED, get_numerics
from shiftadd3d.kernels.runtime.targets import CudaTarget
from shiftadd3d.kernels.runtime.tir import Expr


class ShiftSpec(NamedTuple):
    """The compiled-in constants: the form of products, the weights' code, dtype and activation."""

    form: product.Form
    bits: int
    terms: int
    dtype: product.Dtype
    activation: Activation


def build(target: CudaTarget, spec: ShiftSpec) -> T.PrimFunc:
    """The function ``(rows, weights of a layer, x, y)``, with x and y in the dtype of the spec.

    Blocks: rows along x, outputs along y.
    """
    form, bits, terms, dtype, activation = spec
    with T.function("matshift") as function:
        (rows,) = T.scalars("rows")
        weights = product.Weights.argument("", dtype, bits, terms)
        x, y = T.tensor("x", (rows, weights.inputs), dtype), T.tensor("y", (rows, weights.outputs), dtype)
        blocks = (rows + (ROWS - 1)) // ROWS, (weights.outputs + (COLUMNS - 1)) // COLUMNS
        with grid(*blocks, threads=product.THREADS) as (block_row, block_column, thread):
            first = T.bind(block_row * ROWS)

            def store(row: Expr, column: Expr, value: Expr) -> None:
                y[first + row, column] = T.cast(value, dtype)

            placed = product.Rows(
                lambda row: first + row < rows, lambda row, k: x[T.min(first + row, rows - 1), k], store
            )
            choices = [product.Choice(weights, True)]
            product.emit(form, product.Task(dtype, activation, thread, block_column, choices, placed))
    return function.get()


def trial(function: CudaFunction, spec: ShiftSpec) -> None:
    """Odd sizes with partial blocks on every side, several blocks in each direction, exponents far apart."""
    (form, bits, terms, dtype, activation), draw = spec, Draw()
    inputs = 3 * product.INPUTS["tensor"] + 5
    layer = draw.layer(inputs, COLUMNS + 7, bits, terms, far_apart=True)
    x = draw.normal(ROWS + 19, inputs, dtype=dtype)
    y = run(function, *(tensor.to(function.device) for tensor in (x, layer.codes, layer.offset, layer.bias))).cpu()
    x, weight, bias = x.double(), layer.decoded.double(), layer.bias.double()
    size = x.abs() @ weight.abs().T + bias.abs()
    product.check_product(y, F.linear(x, weight, bias), size, form, dtype, activation)


def variants(target: CudaTarget) -> Iterator[Spec]:
    """4 and 5 bits, one and two terms, all dtypes, exact and fast, with each activation."""
    for bits, terms, dtype in itertools.product((4, 5), (1, 2), DTYPES.values()):
        found = dict.fromkeys(product.form(target, numerics, bits, dtype) for numerics in COMPILED)
        for one, activation in itertools.product(found, activations.ACTIVATIONS):
            yield {"form": one, "bits": bits, "terms": terms, "dtype": dtype, "activation": activation}


MATSHIFT = CudaKernel("matshift", by_name(ShiftSpec, build), by_name(ShiftSpec, trial), variants)


def run(function: CudaFunction, x: Tensor, codes: Tensor, offset: Tensor, bias: Tensor | None) -> Tensor:
    """Call a compiled function: x [rows, inputs], codes [terms, outputs, bytes], offset [terms, outputs], bias
    [outputs]; y [rows, outputs] in the dtype of x."""
    rows, outputs = len(x), codes.shape[1]
    y, layer = x.new_empty(rows, outputs), product.Layer.ready(codes, offset, bias, x, x.shape[1])
    function(-(-rows // ROWS), -(-outputs // COLUMNS), x=x.contiguous(), y=y, rows=rows, **layer.arguments(""))
    return y


def matshift(given: MatShift) -> Tensor | None:
    """The product of x [rows, inputs], neither of them 0; None if the twin must run instead."""
    x, codes, offset, bias, bits, activation = given
    terms, outputs, _ = codes.shape
    if len(x) * max(x.shape[1], outputs) > MAX_ELEMENTS or outputs > 65535 * COLUMNS:
        MATSHIFT.decline(f"a product of {list(x.shape)} with {outputs} outputs is too large for it")
        return None
    dtype = DTYPES[x.dtype]
    chosen = product.form(targets.of_gpu(x.device), get_numerics(), bits, dtype)
    spec: Spec = {"form": chosen, "bits": bits, "terms": terms, "dtype": dtype, "activation": activation}
    function = MATSHIFT.function(device=x.device, **spec)
    return None if function is None else run(function, x, codes, offset, bias)
