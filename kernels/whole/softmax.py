"""Softmax attention, of models whose attention stays as it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from shiftadd3d.kernels.cpu.blocks import softmax_of_row
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, product
from shiftadd3d.kernels.reference.trials import Draw
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.whole.parts import control_argument, held
from shiftadd3d.kernels.whole.program import Program, Value, fixed
from shiftadd3d.kernels.whole.trials import outcome_of

# Queries at once: their scores stay in the cache.
_QUERIES = 24


class SoftmaxSpec(NamedTuple):
    heads: int
    width: int  # of a head
    keys: int
    joint: bool  # whether queries, keys and values are one tensor


def _build(target: CpuTarget, spec: SoftmaxSpec) -> T.PrimFunc:
    """The function ``(q, k and v, control, y)``.

    q [B, N, heads * width], k and v [B, keys, heads * width]. k and v lie side by side in one tensor, and q before them
    if `joint`. y [B, N, heads * width].
    """
    isa, (heads, width, keys, joint) = Isa(target), spec
    padded = isa.padded(keys)
    with T.function("softmax_attention") as function:
        batch, queries = T.sizes(2)
        q = T.argument("q", (batch, queries, (3 if joint else 1) * heads * width))
        kv = q if joint else T.argument("kv", (batch, keys, 2 * heads * width))
        control_argument()
        y = T.argument("y", (batch, queries, heads * width))
        pairs, blocks = held(batch * heads), held((queries + (_QUERIES - 1)) // _QUERIES)
        # Keys, turned, so that a vector is of one channel of many keys.
        turned = T.alloc(batch, heads, width, padded)
        scale = T.float32(1.0 / math.sqrt(width))
        with T.parallel(pairs) as pair:
            b, h = T.bind(T.truncdiv(pair, T.int64(heads))), T.bind(T.truncmod(pair, T.int64(heads)))
            first = T.bind((heads + h if joint else h) * width)
            with T.serial(keys) as key, T.serial(width) as c:
                turned[b, h, c, key] = scale * kv[b, key, first + c]
            with T.serial(width) as c, T.serial(padded - keys) as i:
                turned[b, h, c, keys + i] = T.float32(0.0)
        with T.parallel(pairs * blocks) as task:
            pair = T.bind(T.truncdiv(task, blocks))
            b, h = T.bind(T.truncdiv(pair, T.int64(heads))), T.bind(T.truncmod(pair, T.int64(heads)))
            top = held(T.truncmod(task, blocks) * _QUERIES)
            count = held(T.min(T.int64(_QUERIES), queries - top))
            of_query = T.bind(h * width)
            of_value = T.bind((2 * heads + h if joint else heads + h) * width)
            keys_of_head = turned.part(b, h)
            scores, mixed = T.alloc(_QUERIES + ROW_PADDING, padded), T.alloc(_QUERIES + ROW_PADDING, width)
            values = (width, lambda i, c: q[b, top + i, of_query + c], keys_of_head)
            product(isa, count, padded, lambda i, c: isa.splat(0.0), [values], scores)
            with T.serial(count) as i:
                share = T.bind(T.float32(1.0) / softmax_of_row(isa, scores.part(i), T.int64(keys)))
                for c in range(0, padded, isa.lanes):
                    scores[i, isa.at(c)] = scores[i, isa.at(c)] * isa.splat(share)
            shown = (keys, scores, lambda key, c: kv[b, key, isa.at(of_value + c)])
            product(isa, count, width, lambda i, c: isa.splat(0.0), [shown], mixed)
            with T.serial(count) as i:
                for c in range(0, width, isa.lanes):
                    y[b, top + i, isa.at(of_query + c)] = mixed[i, isa.at(c)]
    return function.get()


def _try(function: Compiled, spec: SoftmaxSpec) -> None:
    heads, width, keys, joint = spec
    draw, queries = Draw(), keys if joint else 2 * _QUERIES + 5
    q = draw.normal(2, queries, heads * width)
    k, v = draw.normal(2, keys, heads * width), draw.normal(2, keys, heads * width)
    given = [torch.cat([q, k, v], -1)] if joint else [q, torch.cat([k, v], -1)]
    y = outcome_of(function, given, 2, queries, heads * width)
    q, k, v = (x.unflatten(-1, (heads, width)).transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


SOFTMAX_ATTENTION = fixed("softmax_attention", _build, _try)


def softmax_attention(program: Program, parts: Sequence[Value], heads: int) -> Value:
    """Softmax attention, scaled by the root of a head's width, [B, N, H * width].

    Args:
        parts: queries, keys and values side by side in one tensor [B, N, 3 * H * width]; or queries [B, N, H * width],
            and keys and values [B, keys, 2 * H * width]. The width is one of whole vectors.
        heads: H.
    """
    joint, (_, keys, columns) = len(parts) == 1, parts[-1].shape
    assert isinstance(columns, int) and isinstance(keys, int)
    width = columns // (3 if joint else 2) // heads
    shape = (*parts[0].shape[:2], heads * width)
    return program.call(SOFTMAX_ATTENTION, parts, shape, SoftmaxSpec(heads, width, keys, joint))
