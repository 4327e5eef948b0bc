"""Products with power-of-two weights, one block of rows at a time, one file for each form of the numbers.

A power of two is exact in every format here, so only activations may round. The forms:

- ``"float32"``: fused multiply-adds on the activations as they are.
- ``"int16"``: every row is rounded to 16-bit integers with one power of two as its scale, and one instruction sums
  pairs of products in 32-bit integers. With e the exponent of a row's largest magnitude, each activation is off by at
  most ``2**(e - 15)``, and by ``2**(e - 11)`` with codes of 5 bits, whose 15 powers leave less room for sums. The
  largest magnitude has to be zero or within ``2**-64`` and ``2**64``; infinity and NaN have no place in such a row.
  Ordinary weights, of 0 bits, are rounded, too: each is off by at most 1/4094 of the largest of its output, each
  activation by 1/8190 of the largest of its row.
- ``"int8"``: the same with integers up to 127, which stand for a row's largest magnitude, so that each activation is
  off by at most 1/254 of that, and with weights of up to 4 bits, which are bytes then: twice as many products in an
  instruction.
- ``"bfloat16x1"``: matrix tiles (AMX) of bfloat16; activations in float32 are off by at most ``2**-8`` of themselves.
- ``"bfloat16x3"``: the same on three pieces of each activation, which together hold all its bits: exact. As tiles take
  denormals for zero, the largest magnitude of a row has to be as for ``"int16"``, and what is off then is less than
  ``2**-62`` of it.

Where a form cannot express an activation, `ShiftProduct.stage` raises a flag, and another form has to do the work.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from shiftadd3d.kernels.cpu.forms.base import Form, ShiftProduct, tile_shape
from shiftadd3d.kernels.cpu.forms.bfloat16 import Bfloat16Product
from shiftadd3d.kernels.cpu.forms.float32 import Float32Product
from shiftadd3d.kernels.cpu.forms.int8 import Int8Product
from shiftadd3d.kernels.cpu.forms.int16 import Int16Product
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.runtime.memory import Dtype
from shiftadd3d.kernels.runtime.numerics import COMPILED, Numerics
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Expr

_MOST_ROWS = 384


class ShiftSpec(NamedTuple):
    """What is compiled in of layers of shifts: how products are formed, the weights' code, dtype and activation."""

    form: Form
    bits: int
    terms: int
    dtype: Dtype
    activation: Activation


Size = TypeVar("Size", Expr, int)


@functools.cache
def forms(target: CpuTarget, numerics: Numerics, bits: int, terms: int, dtype: Dtype) -> tuple[Form, ...]:
    """The forms that compute such a product with such numerics, the fastest first; the last one serves all numbers."""
    rounds = numerics in ("fast", "int8")
    if target.has_amx:
        return ("bfloat16x1" if rounds or dtype == "bfloat16" else "bfloat16x3", "float32")
    if not rounds or "avx2" not in target.flags or bits > 5 or terms > 1:
        return ("float32",)
    return ("int8" if numerics == "int8" and bits <= 4 else "int16", "float32")


def all_forms(target: CpuTarget, bits: int, terms: int, dtype: Dtype) -> tuple[Form, ...]:
    """The forms that compute such a product with any numerics."""
    found: dict[Form, None] = {}
    for numerics in COMPILED:
        found |= dict.fromkeys(forms(target, numerics, bits, terms, dtype))
    return tuple(found)


def error_bound(form: Form, bits: int) -> float:
    """What an output may be off by before its activation, as a multiple of ``max |row of x| * sum |row of W|``.

    On top of that comes the rounding of float32 sums, which all forms share. Of ordinary weights as integers, the bound
    holds where an output's largest weight is no more than 7 times the mean magnitude of all.
    """
    if form == "int16":
        return 2.0**-15 if 0 < bits <= 4 else 2.0**-11 if bits else 2.0**-9
    if form == "int8":
        return 1 / 253  # 1/254, and what rounding the scale makes of it
    return 2.0**-8 if form == "bfloat16x1" else 0.0


def shift_product(target: CpuTarget, form: Form, bits: int, terms: int, dtype: Dtype) -> ShiftProduct:
    """The code of a product.

    Args:
        target: what it is for.
        form: how products are formed, one of `forms`.
        bits, terms: the weights' code.
        dtype: of the layer.
    """
    power_of_two.check_format(bits, terms)
    if form not in all_forms(target, bits, terms, dtype):
        raise ValueError(f"no {form} product on {target.name} with {bits} bits and {terms} terms in {dtype}")
    makers: dict[Form, Callable[..., ShiftProduct]] = {
        "float32": Float32Product,
        "int16": Int16Product,
        "int8": Int8Product,
    }
    return makers.get(form, Bfloat16Product)(target, form, bits, terms, dtype)


def rows_of_block(target: CpuTarget, form: Form, rows: int, floats: int, most_bytes: int) -> int:
    """Rows of a block, for as many blocks as there are threads, or a multiple.

    A few rows more or less for each do no harm, but decoding all weights for a handful of rows would.

    Args:
        floats: what a row takes up.
        most_bytes: what a block may take up.
    """
    return _rows_of_block(target, form, rows, floats, most_bytes, torch.get_num_threads())


@functools.lru_cache(maxsize=1024)
def _rows_of_block(target: CpuTarget, form: Form, rows: int, floats: int, most_bytes: int, threads: int) -> int:
    longest, (tile, _) = longest_block(target, form, floats, most_bytes), tile_shape(target, form)
    return even_blocks(rows, longest, tile, threads, min, max)


def longest_block(target: CpuTarget, form: Form, floats: int, most_bytes: int) -> int:
    """Rows of a block at most. By 384 of them, decoding weights costs next to nothing."""
    tile, _ = tile_shape(target, form)
    return max(tile, min(_MOST_ROWS, most_bytes // (4 * floats)) // tile * tile)


def even_blocks(
    rows: Size,
    longest: int,
    tile: int,
    threads: Size,
    least: Callable[..., Size],
    most: Callable[..., Size],
    fewest: int = 4,
) -> Size:
    """Rows of a block of at most `longest` rows, in numbers or in expressions, with what takes the smaller of two such
    and the larger. Blocks of fewer tiles than `fewest` are not made for the sake of threads."""
    blocks = _quotient(rows, longest)
    blocks = least(_quotient(blocks, threads) * threads, most(blocks, (rows + (tile - 1)) // (fewest * tile)))
    return _quotient(_quotient(rows, blocks), tile) * tile


def _quotient(x: Size, y: int | Size) -> Size:
    """Rounded up."""
    return (x + y - 1) // y
