"""MatShift on NVIDIA GPUs: the product of `cuda_product` with the weights of one layer.

Before the activation function, ``|y - exact y|`` is as stated there.
"""

# TVMScript's annotations are calls:
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

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
    PackedWeights,
    Rows,
    error_bound,
    form,
)
from shiftadd3d.kernels.reference import activations, power_of_two
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.runtime import memory, targets
from shiftadd3d.kernels.runtime.numerics import COMPILED, Numerics
from shiftadd3d.kernels.runtime.targets import CudaTarget


def build(target: CudaTarget, form: Form, bits: int, terms: int, dtype: Dtype, activation: Activation) -> Any:
    """The function of (x, codes, offset, bias, y); x and y in `dtype`, bias float32. Blocks: rows along x, outputs
    along y."""
    from tvm.script import tirx as T

    def block(X: Any, C: Any, E: Any, B: Any, Y: Any, block_row: Any, block_column: Any, thread: Any) -> None:
        (rows, inputs), outputs = X.shape, Y.shape[1]
        first = T.bind(block_row * ROWS)

        def load(row: Any, k: Any) -> Any:
            return X[T.min(first + row, rows - 1), k]

        def store(row: Any, column: Any, y: Any) -> None:
            T.buffer_store(Y, T.cast(y, dtype), [first + row, column])

        weights = PackedWeights(C, E, bits, terms, inputs, outputs, B)
        placed = Rows(lambda row: first + row < rows, load, store)
        product.emit(form, dtype, activation, thread, block_column, [Choice(weights, True)], placed)

    @T.prim_func(s_tir=True)
    def matshift(x: T.handle, codes: T.handle, offset: T.handle, bias: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        rows = T.int32()
        inputs = T.int32()
        outputs = T.int32()
        length = T.int32()
        X = T.match_buffer(x, (rows, inputs), dtype)
        C = T.match_buffer(codes, (terms, outputs, length), "uint8")
        E = T.match_buffer(offset, (terms, outputs), "int8")
        B = T.match_buffer(bias, (outputs,), "float32")
        Y = T.match_buffer(y, (rows, outputs), dtype)
        for block_row in T.thread_binding((rows + (ROWS - 1)) // ROWS, "blockIdx.x"):
            for block_column in T.thread_binding((outputs + (COLUMNS - 1)) // COLUMNS, "blockIdx.y"):
                for thread in T.thread_binding(THREADS, "threadIdx.x"):
                    block(X, C, E, B, Y, block_row, block_column, thread)

    return matshift


def trial(function: CudaFunction, form: Form, bits: int, terms: int, dtype: Dtype, activation: Activation) -> None:
    """Odd sizes with tails on every side, several blocks each way, exponents far apart."""
    generator = torch.Generator().manual_seed(0)
    rows, inputs, outputs = ROWS + 19, 3 * INPUTS["tensor"] + 5, COLUMNS + 7
    weight = torch.randn(outputs, inputs, generator=generator) * torch.exp2(torch.arange(outputs) % 24 - 12.0)[:, None]
    codes, offset, _ = power_of_two.encode(weight, bits, terms)
    x = torch.randn(rows, inputs, generator=generator).to(getattr(torch, dtype))
    bias = torch.randn(outputs, generator=generator)
    arguments = (x, power_of_two.pack(codes, bits), offset, bias)
    y = run(function, *(argument.to(function.device) for argument in arguments)).cpu()
    weight = power_of_two.decode(codes, offset, bits).double()
    exact = F.linear(x.double(), weight, bias.double())
    size = x.double().abs() @ weight.abs().T + bias.abs()
    error = error_bound(form, dtype) * size
    rounding = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-10}[dtype] * (exact.abs() + error)
    # The slope of the activation functions is at most 1.13; 2**-24 is the smallest float16.
    bound = 1.2 * (error + rounding) + (2.0**-24 if dtype == "float16" else 0.0)
    worst = ((y.double() - activations.apply(activation, exact)).abs() - bound).max().item()
    assert worst <= 0, f"it is off by {worst:.2g} more than it may be"


def variants(target: CudaTarget) -> Iterator[dict[str, Any]]:
    """4 and 5 bits, one and two terms, all dtypes, exact and fast, with each activation."""
    for bits, terms, dtype in itertools.product((4, 5), (1, 2), DTYPES.values()):
        found = dict.fromkeys(form(target, numerics, bits, dtype) for numerics in COMPILED)
        for one, activation in itertools.product(found, activations.ACTIVATIONS):
            yield {"form": one, "bits": bits, "terms": terms, "dtype": dtype, "activation": activation}


MATSHIFT = CudaKernel("matshift", build, trial, variants)


def run(function: Callable[..., None], x: Tensor, codes: Tensor, offset: Tensor, bias: Tensor) -> Tensor:
    """Call a compiled function: x [rows, inputs], codes [terms, outputs, bytes], offset [terms, outputs], bias float32
    [outputs], all contiguous; y [rows, outputs] in the dtype of x."""
    rows, inputs = x.shape
    _, outputs, length = codes.shape
    y = x.new_empty(rows, outputs)
    function(
        -(-rows // ROWS),
        -(-outputs // COLUMNS),
        X=x,
        C=codes,
        E=offset,
        B=bias,
        Y=y,
        rows=rows,
        inputs=inputs,
        outputs=outputs,
        length=length,
    )
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
    function = MATSHIFT.function(
        device=x.device,
        form=form(targets.of_gpu(x.device), numerics, bits, dtype),
        bits=bits,
        terms=terms,
        dtype=dtype,
        activation=activation,
    )
    if function is None:
        return None
    row = memory.float32_bias(bias, outputs, x.device)
    return run(function, *(tensor.contiguous() for tensor in (x, codes, offset, row)))
