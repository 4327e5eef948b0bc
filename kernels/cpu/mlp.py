"""The perceptron of shifts on CPUs, in one pass over the tokens.

Each task takes a block of tokens through both layers, so that what lies between the two is never written to memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu import bfloat16, blocks
from shiftadd3d.kernels.cpu.matshift import DTYPES
from shiftadd3d.kernels.cpu.shift_product import (
    Dtype,
    Float32Product,
    Form,
    Load,
    Scratch,
    ShiftProduct,
    Store,
    Weights,
    all_forms,
    error_bound,
    shift_product,
    tile_shape,
)
from shiftadd3d.kernels.cpu.vectors import Vectors
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.mlp import shift_mlp_twin
from shiftadd3d.kernels.runtime import memory, targets
from shiftadd3d.kernels.runtime.kernel import Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget

# What a block of tokens takes up with all its activations, and how many tokens it has at most. Decoding the weights
# for fewer tokens costs more than reaching beyond a second-level cache of 512 KiB to 2 MiB.
_BLOCK_BYTES, _BLOCK_ROWS = 2 << 20, 384


def emit_layers(
    vectors: Vectors,
    products: Sequence[ShiftProduct],
    layers: Sequence[Weights],
    activation: Activation,
    block_rows: Any,
    rows: Any,
    load: Load,
    store: Store,
    flag: Any,
) -> None:
    """Emit what takes a block of tokens through linear layers with an activation function between them.

    Args:
        products: of each layer.
        block_rows: rows to allocate memory for.
        rows: how many there are.
        load, store, flag: see `ShiftProduct.stage` and `ShiftProduct.panels`.
    """
    import tvm.script

    T: Any = tvm.script.tirx

    def allocate(product: ShiftProduct, inputs: Any) -> Scratch:
        tiles = T.bind((block_rows + (product.rows - 1)) // product.rows)
        return product.scratch(tiles * product.rows, inputs)

    staged = None  # where the layer before has stored its outputs in the form that the next one takes
    for number, (product, weights) in enumerate(zip(products, layers, strict=True)):
        if isinstance(product, Float32Product) and staged is not None:
            scratch = staged
            product.finish_stage(scratch, rows, weights.inputs)
        else:
            scratch = allocate(product, weights.inputs)
            product.stage(scratch, rows, weights.inputs, load, flag)
        apply, sink = partial(blocks.activate, vectors, activation), store
        following = products[number + 1] if number + 1 < len(products) else None
        if following is None:
            apply = partial(blocks.activate, vectors, "none")
        elif isinstance(following, Float32Product):
            staged = allocate(following, weights.outputs)
            sink = following.stage_store(staged)
        else:
            load, sink = _hidden(block_rows, weights.outputs)
        panels = T.bind((weights.outputs + (product.columns - 1)) // product.columns)
        product.panels(scratch, rows, weights, T.int64(0), panels, apply, sink)
        product.release()


def _hidden(rows: Any, width: Any) -> tuple[Load, Store]:
    """What reads from, and stores to, memory for hidden activations that have to be complete before they are staged."""
    import tvm.script

    T: Any = tvm.script.tirx
    hidden = T.alloc_buffer((rows, width), "float32", align=64)

    def at(start: Any, count: int) -> Any:
        return start if count == 1 else T.ramp(start, 1, count)

    def load(row: Any, start: Any, count: int) -> Any:
        return hidden[row, at(start, count)]

    def store(row: Any, column: Any, value: Any, count: int) -> None:
        T.buffer_store(hidden, value, [row, at(column, count)])

    return load, store


def floats_of_row(form: Form, widths: Sequence[int]) -> int:
    """What a row takes up in the memory of `emit_layers` with activations of these widths, in floats."""
    inputs, *hidden = widths
    return inputs + (1 if form == "float32" else 2) * max(hidden, default=0)


def build(target: CpuTarget, form: Form, bits: int, terms: int, dtype: Dtype, activation: Activation) -> Any:
    """The function ``(x, codes, offset and bias of both layers, y, flag, rows of a block)``.

    x and y are float32, or the bits of bfloat16 as int16; biases are float32. See `ShiftProduct.stage` for the flag.
    """
    from tvm.script import tirx as T

    vectors = Vectors(target)
    # The hidden layer stays in float32, but bfloat16 weights are rounded as the twin's.
    products = (shift_product(target, form, bits, terms, dtype), shift_product(target, form, bits, terms, dtype))
    storage = "int16" if dtype == "bfloat16" else "float32"

    def at(start: Any, count: int) -> Any:
        return start if count == 1 else T.ramp(start, 1, count)

    def task(X: Any, Y: Any, flag: Any, layers: tuple[Weights, Weights], first: Any, block_rows: Any) -> None:
        def load(row: Any, start: Any, count: int) -> Any:
            x = X[first + row, at(start, count)]
            return bfloat16.widen(x, count) if dtype == "bfloat16" else x

        def store(row: Any, column: Any, y: Any, count: int) -> None:
            y = bfloat16.narrow(y, count) if dtype == "bfloat16" else y
            T.buffer_store(Y, y, [first + row, at(column, count)])

        rows = T.bind(T.min(block_rows, X.shape[0] - first))
        emit_layers(vectors, products, layers, activation, block_rows, rows, load, store, flag)

    @T.prim_func(s_tir=True)
    def shift_mlp(
        x: T.handle,
        hidden_codes: T.handle,
        hidden_offset: T.handle,
        hidden_bias: T.handle,
        codes: T.handle,
        offset: T.handle,
        bias: T.handle,
        y: T.handle,
        flag: T.handle,
        block_rows: T.int64,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        inputs = T.int64()
        hidden = T.int64()
        outputs = T.int64()
        hidden_bytes = T.int64()
        bytes_of_row = T.int64()
        X = T.match_buffer(x, (rows, inputs), storage, align=4)
        C1 = T.match_buffer(hidden_codes, (terms, hidden, hidden_bytes), "uint8", align=1)
        E1 = T.match_buffer(hidden_offset, (terms, hidden), "int8", align=1)
        B1 = T.match_buffer(hidden_bias, (hidden,), "float32", align=4)
        C2 = T.match_buffer(codes, (terms, outputs, bytes_of_row), "uint8", align=1)
        E2 = T.match_buffer(offset, (terms, outputs), "int8", align=1)
        B2 = T.match_buffer(bias, (outputs,), "float32", align=4)
        Y = T.match_buffer(y, (rows, outputs), storage, align=4)
        F = T.match_buffer(flag, (1,), "int32", align=4)
        for number in T.parallel((rows + block_rows - 1) // block_rows):
            task(
                X,
                Y,
                F,
                (Weights(C1, E1, B1, inputs, hidden), Weights(C2, E2, B2, hidden, outputs)),
                number * block_rows,
                block_rows,
            )

    return shift_mlp


def trial(function: Any, form: Form, bits: int, terms: int, dtype: Dtype, activation: Activation) -> None:
    """Odd sizes with tails on every side, more than one block of inputs and of rows."""
    rows, columns = tile_shape(targets.current(), form)
    generator = torch.Generator().manual_seed(0)
    sizes = (columns + 3, 16 * 20 + 5, columns + 7)
    layers, weights = [], []
    for inputs, outputs in itertools.pairwise(sizes):
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        codes, offset, _ = power_of_two.encode(weight, bits, terms)
        layers += [power_of_two.pack(codes, bits), offset, torch.randn(outputs, generator=generator)]
        weights.append(power_of_two.decode(codes, offset, bits).abs().sum(-1).max())
    x = torch.randn(3 * rows + 1, sizes[0], generator=generator).to(getattr(torch, dtype))
    y = run(function, x, layers, block_rows=2 * rows)
    assert y is not None, "it found an activation that it cannot express"
    # The twin in float32, so that its hidden activations are not rounded.
    twin = shift_mlp_twin(x.float(), *layers, bits=bits, activation=activation)
    hidden = error_bound(form, bits) * x.float().abs().amax(-1, keepdim=True) * weights[0] * 1.2  # gelu's steepest
    largest = (x.float().abs().amax(-1, keepdim=True) * weights[0] + 4) * weights[1]
    bound = hidden * weights[1] + (error_bound(form, bits) + 1e-6) * largest
    bound = bound + twin.abs() * 2.0**-8 + largest * 2.0**-8 if dtype == "bfloat16" else bound
    worst = ((y.float() - twin).abs() - bound).max().item()
    assert worst <= 0, f"it is off by {worst:.2g} more than it may be"


def variants(target: CpuTarget) -> Iterator[dict[str, Any]]:
    """4 bits, one term, both dtypes, all numerics, with each activation that networks have."""
    for dtype, activation in itertools.product(DTYPES.values(), ("relu", "gelu")):
        for form in all_forms(target, 4, 1, dtype):
            yield {"form": form, "bits": 4, "terms": 1, "dtype": dtype, "activation": activation}


MLP = Kernel("shift_mlp", build, trial, variants)


def run(function: Any, x: Tensor, layers: Sequence[Any], block_rows: int) -> Tensor | None:
    """Call a compiled function; None if its form cannot express an activation."""
    y = memory.empty(x.shape[0], layers[3].shape[1], dtype=x.dtype)
    flag = torch.zeros(1, dtype=torch.int32)
    numbers = [tensor.view(torch.int16) if x.dtype == torch.bfloat16 else tensor for tensor in (x, y)]
    function(numbers[0], *_contiguous(layers), numbers[1], flag, block_rows)
    return None if flag.item() else y


def _contiguous(layers: Sequence[Any]) -> list[Tensor]:
    """Codes, offset and bias of each layer as functions take them: every layer has a bias, in float32."""
    ready = []
    for codes, offset, bias in zip(layers[0::3], layers[1::3], layers[2::3], strict=True):
        ready += [codes.contiguous(), offset.contiguous(), memory.float32_bias(bias, codes.shape[1])]
    return ready


def block_rows(target: CpuTarget, form: Form, rows: int, floats: int) -> int:
    """Rows of a block, for as many blocks as there are threads, or a multiple.

    Args:
        floats: what a row takes up.
    """
    tile, _ = tile_shape(target, form)
    threads = torch.get_num_threads()
    longest = max(tile, min(_BLOCK_ROWS, _BLOCK_BYTES // (4 * floats)) // tile * tile)
    blocks = -(-rows // longest)
    blocks = min(-(-blocks // threads) * threads, max(blocks, rows // (4 * tile)))
    return -(-rows // blocks // tile) * tile
