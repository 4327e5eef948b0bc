"""The perceptron of shifts on CPUs, ``y = activation(x W_1^T + b_1) W_2^T + b_2``, in one pass over the tokens.

Each task takes a block of tokens through both layers, so that what lies between the two is never written to memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from shiftadd3d.kernels.cpu.decode import Scratch, Weights
from shiftadd3d.kernels.cpu.forms import (
    Form,
    ShiftSpec,
    all_forms,
    error_bound,
    rows_of_block,
    shift_product,
    tile_shape,
)
from shiftadd3d.kernels.cpu.forms.base import ShiftProduct
from shiftadd3d.kernels.cpu.forms.float32 import Float32Product
from shiftadd3d.kernels.cpu.trials import Draw, check_within
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.mlp import shift_mlp_twin
from shiftadd3d.kernels.runtime import memory, targets
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, Spec, by_name
from shiftadd3d.kernels.runtime.memory import DTYPES, FLAG
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index, Load, Store

# Of a block of tokens with all its activations. Decoding the weights for fewer tokens costs more than reaching beyond
# a second-level cache of 512 KiB to 2 MiB.
BLOCK_BYTES = 2 << 20


def emit_layers(
    products: Sequence[ShiftProduct],
    layers: Sequence[Weights],
    activation: Activation,
    block: Index,
    rows: Expr,
    load: Load,
    store: Store,
    flag: Buffer,
    before_rows: Callable[[Expr, Expr], None] | None = None,
) -> None:
    """Emit what takes a block of tokens through linear layers with an activation function between them.

    Args:
        products: of each layer.
        block: rows to allocate memory for.
        rows: how many there are.
        load, store, flag, before_rows: see `ShiftProduct.stage` and `ShiftProduct.panels`.
    """
    staged = None  # where the layer before has stored its outputs in the form that the next one takes
    for product, following, weights in zip(products, [*products[1:], None], layers, strict=True):
        if isinstance(product, Float32Product) and staged is not None:
            scratch = staged
            product.finish_stage(scratch, rows, weights.inputs)
        else:
            scratch = _scratch(product, block, weights.inputs)
            product.stage(scratch, rows, weights.inputs, load, flag, before_rows)
        apply, sink = product.activation(activation if following else "none"), store
        if isinstance(following, Float32Product):
            staged = _scratch(following, block, weights.outputs)
            sink = following.stage_store(staged)
        elif following:
            # Activations have to be complete before these forms stage them.
            hidden = T.alloc(block, weights.outputs)
            before_rows = None
            load, sink = product.isa.reader(hidden, lambda row: row), product.isa.writer(hidden, lambda row: row)
        panels = T.bind((weights.outputs + (product.columns - 1)) // product.columns)
        # LLVM would compute the places of single outputs in vectors, and keep constants for that in registers that the
        # product needs for its sums.
        whole = isinstance(following, Float32Product)
        product.panels(scratch, rows, weights, T.int64(0), panels, apply, sink, whole_tiles=whole)
        product.release()


def _scratch(product: ShiftProduct, block: Index, inputs: Expr) -> Scratch:
    tiles = (block + (product.rows - 1)) // product.rows
    tiles = tiles if isinstance(tiles, int) else T.bind(tiles)
    return product.scratch(tiles * product.rows, inputs)


def build(target: CpuTarget, spec: ShiftSpec) -> T.PrimFunc:
    """The function ``(x, codes, offset and bias of both layers, y, flag, rows of a block)``.

    x and y are of the spec's dtype; biases are float32. See `ShiftProduct.stage` for the flag.
    """
    form, bits, terms, dtype, activation = spec
    # The hidden layer stays in float32, but bfloat16 weights are rounded as the twin's.
    products = [shift_product(target, form, bits, terms, dtype) for _ in range(2)]
    isa = products[0].isa

    with T.function("shift_mlp") as function:
        rows, inputs, hidden, outputs = T.sizes(4)
        x = T.argument("x", (rows, inputs), dtype)
        layers = [Weights.argument("1", terms, inputs, hidden), Weights.argument("2", terms, hidden, outputs)]
        y = T.argument("y", (rows, outputs), dtype)
        flag = T.argument("flag", (1,), "int32")
        block = T.scalar("block")
        with T.parallel((rows + block - 1) // block) as task:
            top = task * block
            load, store = isa.reader(x, lambda row: top + row), isa.writer(y, lambda row: top + row)
            height = T.bind(T.min(block, rows - top))
            emit_layers(products, layers, activation, block, height, load, store, flag)
    return function.get()


def trial(function: Compiled, spec: ShiftSpec) -> None:
    """Odd sizes with tails on every side, more than one block of inputs and of rows."""
    form, bits, terms, dtype, activation = spec
    rows, columns = tile_shape(targets.current(), form)
    draw = Draw()
    widths = (columns + 3, 16 * 20 + 5, columns + 7)
    first, second = (draw.layer(*between, bits, terms) for between in itertools.pairwise(widths))
    layers = [(layer.codes, layer.offset, layer.bias) for layer in (first, second)]
    x = draw.normal(3 * rows + 1, widths[0], dtype=dtype)
    y = run(function, x, layers, block_rows=2 * rows)
    # The twin in float32, so that its hidden activations are not rounded.
    twin = shift_mlp_twin(x.float(), *layers[0], *layers[1], bits, activation)
    peak = x.float().abs().amax(-1, keepdim=True) * first.gain
    largest = (peak + 4) * second.gain
    hidden = error_bound(form, bits) * peak * 1.2  # gelu's steepest
    bound = hidden * second.gain + (error_bound(form, bits) + 1e-6) * largest
    bound = bound + twin.abs() * 2.0**-8 + largest * 2.0**-8 if dtype == "bfloat16" else bound
    check_within(y, twin, bound)


def variants(target: CpuTarget) -> Iterator[Spec]:
    """4 bits, one term, both dtypes, all numerics, with each activation that networks have."""
    for dtype, activation in itertools.product(DTYPES.values(), ("relu", "gelu")):
        for form in all_forms(target, 4, 1, dtype):
            yield {"form": form, "bits": 4, "terms": 1, "dtype": dtype, "activation": activation}


MLP = Kernel("shift_mlp", by_name(ShiftSpec, build), by_name(ShiftSpec, trial), variants)


def run(
    function: Compiled, x: Tensor, layers: Sequence[tuple[Tensor, Tensor, Tensor | None]], block_rows: int
) -> Tensor | None:
    """Call a compiled function with the tensors of both layers; None if its form cannot express an activation."""
    ready = []
    for codes, offset, bias in layers:
        ready += [codes.contiguous(), offset.contiguous(), memory.float32_bias(bias, codes.shape[1])]
    y = memory.empty(x.shape[0], layers[1][0].shape[1], dtype=x.dtype)
    function(memory.stored(x), *ready, memory.stored(y), FLAG.tensor, block_rows)
    return None if FLAG.was_raised() else y


def block_rows(form: Form, rows: int, widths: Sequence[int]) -> int:
    """Rows of a block, with activations of these widths between layers, the inputs first."""
    inputs, *hidden = widths
    floats = inputs + (1 if form == "float32" else 2) * max(hidden, default=0)
    return rows_of_block(targets.current(), form, rows, floats, BLOCK_BYTES)
