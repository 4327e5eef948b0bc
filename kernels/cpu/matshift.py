"""MatShift on CPUs, ``y = activation(x W^T + bias)``: each task takes a block of rows and a share of the outputs.

The same compiled code serves any number of rows, inputs and outputs: only the weights' format, the dtype and the
activation are compiled in.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.decode import Weights
from shiftadd3d.kernels.cpu.forms import (
    Form,
    ShiftSpec,
    all_forms,
    error_bound,
    rows_of_block,
    shift_product,
    tile_shape,
)
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.trials import Draw, check_within
from shiftadd3d.kernels.reference import activations
from shiftadd3d.kernels.reference.matshift import decoded_weight
from shiftadd3d.kernels.runtime import memory, targets
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, Spec, by_name
from shiftadd3d.kernels.runtime.memory import DTYPES, FLAG
from shiftadd3d.kernels.runtime.targets import CpuTarget

# Of staged activations. Decoding weights for fewer rows costs more than reaching beyond a cache of 512 KiB.
BLOCK_BYTES = 768 << 10


def build(target: CpuTarget, spec: ShiftSpec) -> T.PrimFunc:
    """The function ``(x, codes, offset, bias, y, flag, rows of a block, shares of the outputs)``.

    x and y are of the spec's dtype; bias is float32. See `ShiftProduct.stage` for the flag.
    """
    form, bits, terms, dtype, activation = spec
    isa, product = Isa(target), shift_product(target, form, bits, terms, dtype)

    with T.function("matshift") as function:
        rows, inputs, outputs = T.sizes(3)
        x = T.argument("x", (rows, inputs), dtype)
        weights = Weights.argument("", terms, inputs, outputs)
        y = T.argument("y", (rows, outputs), dtype)
        flag = T.argument("flag", (1,), "int32")
        block, shares = T.scalar("block"), T.scalar("shares")
        with T.parallel((rows + block - 1) // block * shares) as task:
            top = T.bind(task // shares * block)
            height = T.bind(T.min(block, rows - top))
            panels = T.bind((outputs + (product.columns - 1)) // product.columns)
            share = T.bind((panels + shares - 1) // shares)
            first = T.bind(task % shares * share)
            last = T.bind(T.max(first, T.min(first + share, panels)))
            scratch = product.scratch(block, inputs)
            product.stage(scratch, height, inputs, isa.reader(x, lambda row: top + row), flag)
            apply, store = product.activation(activation), isa.writer(y, lambda row: top + row)
            product.panels(scratch, height, weights, first, last, apply, store)
            product.release()
    return function.get()


def trial(function: Compiled, spec: ShiftSpec) -> None:
    """Odd sizes with tails on every side, more than one block of inputs, exponents far apart."""
    form, bits, terms, dtype, activation = spec
    rows, columns = tile_shape(targets.current(), form)
    draw = Draw()
    layer = draw.layer(16 * 41 + 5, columns + 3, bits, terms, far_apart=True)
    x = draw.normal(3 * rows + 1, 16 * 41 + 5, dtype=dtype)
    y = run(function, x, layer.codes, layer.offset, layer.bias, block_rows=2 * rows, shares=2)
    weight = decoded_weight(x, layer.codes, layer.offset, bits).float()
    twin = activations.apply(activation, F.linear(x.float(), weight, layer.bias))
    # The twin's own error, that of the form, and that of rounding the outcome.
    bound = x.float().abs() @ weight.abs().T * 1e-6 + layer.bias.abs() * 1e-6
    bound += error_bound(form, bits) * x.float().abs().amax(-1, keepdim=True) * weight.abs().sum(-1)
    bound += twin.abs() * (2.0**-8 if dtype == "bfloat16" else 0.0)
    check_within(y, twin, bound)


def variants(target: CpuTarget) -> Iterator[Spec]:
    """4 and 5 bits, one and two terms, both dtypes, all numerics, with each activation."""
    for bits, terms, dtype in itertools.product((4, 5), (1, 2), DTYPES.values()):
        for form, activation in itertools.product(all_forms(target, bits, terms, dtype), activations.ACTIVATIONS):
            yield {"form": form, "bits": bits, "terms": terms, "dtype": dtype, "activation": activation}


MATSHIFT = Kernel("matshift", by_name(ShiftSpec, build), by_name(ShiftSpec, trial), variants)


def run(
    function: Compiled, x: Tensor, codes: Tensor, offset: Tensor, bias: Tensor, block_rows: int, shares: int
) -> Tensor | None:
    """Call a compiled function; None if its form cannot express an activation."""
    y = memory.empty(x.shape[0], codes.shape[1], dtype=x.dtype)
    function(memory.stored(x), codes, offset, bias, memory.stored(y), FLAG.tensor, block_rows, shares)
    return None if FLAG.was_raised() else y


def division_of(form: Form, rows: int, inputs: int, outputs: int) -> tuple[int, int]:
    """Rows of a block, and shares of the outputs, for as many tasks as there are threads, or a multiple.

    Two threads do the same work as one: 2,810 and 2,830 microseconds of processor time for bytes, 32768 x 64 x 64 (what
    both at once do to shared caches is not in that). What they gain less than torch's product is in part what one of
    them does alone: a call costs 16 microseconds in Python, and 45 with cold caches, beside 160 of 196 x 192 x 768.
    Fresh pages of outputs cost little: below 32 MiB the C library mostly hands out memory that was written before (no
    faults beside torch's calls, 300 to 470 a call in a row), from 32 MiB on huge pages take 530 faults, torch's 8,193.
    """
    target = targets.current()
    block = rows_of_block(target, form, rows, inputs, BLOCK_BYTES)
    columns, blocks = tile_shape(target, form)[1], -(-rows // block)
    return block, min(-(-torch.get_num_threads() // blocks), -(-outputs // columns))
