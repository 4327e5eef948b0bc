"""MatShift on CPUs: each task takes a block of rows and a share of the outputs.

The same compiled code serves any number of rows, inputs and outputs: only the weights' format, the dtype and the
activation are compiled in.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu import bfloat16, blocks
from shiftadd3d.kernels.cpu.shift_product import Dtype, Form, Weights, all_forms, error_bound, shift_product, tile_shape
from shiftadd3d.kernels.cpu.vectors import Vectors
from shiftadd3d.kernels.reference import activations, power_of_two
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.matshift import decoded_weight
from shiftadd3d.kernels.runtime import memory, targets
from shiftadd3d.kernels.runtime.kernel import Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget

# What a block of staged activations takes up, and how long it gets at most: by then, decoding the weights for it costs
# next to nothing. Decoding them for fewer rows costs more than reaching beyond a second-level cache of 512 KiB.
_BLOCK_BYTES, _BLOCK_ROWS = 768 << 10, 384
DTYPES: dict[torch.dtype, Dtype] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


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
        apply = partial(blocks.activate, vectors, activation)
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
    y = run(function, x, packed, offset, bias, block_rows=2 * rows, shares=2)
    assert y is not None, "it found an activation that it cannot express"
    weight = decoded_weight(x, packed, offset, bits)
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


def run(
    function: Any, x: Tensor, codes: Tensor, offset: Tensor, bias: Tensor, block_rows: int, shares: int
) -> Tensor | None:
    """Call a compiled function; None if its form cannot express an activation."""
    y = memory.empty(x.shape[0], codes.shape[1], dtype=x.dtype)
    flag = torch.zeros(1, dtype=torch.int32)
    numbers = [tensor.view(torch.int16) if x.dtype == torch.bfloat16 else tensor for tensor in (x, y)]
    function(numbers[0], codes, offset, bias, numbers[1], flag, block_rows, shares)
    return None if flag.item() else y


def division_of(form: Form, rows: int, inputs: int, outputs: int) -> tuple[int, int]:
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
