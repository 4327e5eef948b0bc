"""What happens to tokens: pictures become some, and they attend to each other, look around, and are pooled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import COARSE_GELU_ERROR
from shiftadd3d.kernels.cpu.depthwise import Row, Tensors
from shiftadd3d.kernels.cpu.forms import Form, error_bound, longest_block
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.matshift import BLOCK_BYTES
from shiftadd3d.kernels.cpu.sign_tables import TOKENS, Products, Tables, emit_sums
from shiftadd3d.kernels.cpu.trials import Draw, check_within
from shiftadd3d.kernels.pack.whole import LinearWeights
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.depthwise import depthwise_conv_twin
from shiftadd3d.kernels.reference.matadd import LOW, Codes, add_attention_twin
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index
from shiftadd3d.kernels.whole.parts import Norm, block_of, control_argument, held, rows_of, threads_of
from shiftadd3d.kernels.whole.products import (
    form_of,
    norm_values,
    product_of,
    random_layer,
    tensors_of,
    weight_values,
    weights_argument,
)
from shiftadd3d.kernels.whole.program import Exactness, Function, Program, Value

# Patches


def _build_patches(
    target: CpuTarget, form: Form, bits: int, terms: int, channels: int, patch: tuple[int, int], longest: int
) -> T.PrimFunc:
    """The function ``(images, layer's weights, prefix tokens, what is added to patches, control, y)``.

    images [B, channels, H, W], prefix [P, outputs], added [patches, outputs], y [B, P + patches, outputs].
    """
    isa, product = Isa(target), product_of(target, form, bits, terms)
    high, wide = patch
    with T.function("patches") as function:
        batch, height, width, outputs, prefixes, patches, tokens = T.sizes(7)
        images, inputs = T.argument("images", (batch, channels, height, width)), T.int64(channels * high * wide)
        weights = weights_argument(product, "", terms, inputs, outputs)
        prefix = T.argument("prefix", (prefixes, outputs))
        added = T.argument("added", (patches, outputs))
        control = control_argument()
        y = T.argument("y", (batch, tokens, outputs))
        across = held(T.truncdiv(width, T.int64(wide)))
        with T.serial(batch) as b, T.serial(prefixes) as p, T.serial(outputs) as c:
            y[b, p, c] = prefix[p, c]
        rows = held(batch * patches)
        block = block_of(rows, longest, product.rows, threads_of(control))
        with T.parallel((rows + block - 1) // block) as task:
            top = held(task * block)
            count = held(T.min(block, rows - top))

            def place(row: Index) -> tuple[Expr, Expr]:
                """The picture that a row belongs to, and its number in there."""
                return T.truncdiv(top + row, patches), T.truncmod(top + row, patches)

            rows_at_hand = T.alloc(isa.lanes, inputs)
            piece = math.gcd(wide, isa.lanes)

            def before_rows(first: Expr, some: Expr) -> None:
                # Channels first within a patch, then its rows.
                with T.serial(some) as i:
                    b, number = (T.bind(part) for part in place(first + i))
                    up, left = T.truncdiv(number, across) * high, T.truncmod(number, across) * wide
                    with T.serial(channels) as c, T.serial(high) as y_of, T.serial(wide // piece) as part:
                        pixels = images[b, c, up + y_of, T.at(left + part * piece, piece)]
                        rows_at_hand[i, T.at((c * high + y_of) * wide + part * piece, piece)] = pixels

            def load(row: Index, start: Index, lanes: int) -> Expr:
                return rows_at_hand[row % isa.lanes, T.at(start, lanes)]

            def store(row: Index, column: Index, value: Expr, lanes: int) -> None:
                b, number = place(row)
                at = T.at(column, lanes)
                y[b, prefixes + number, at] = value + added[number, at]

            scratch = product.scratch(longest, inputs)
            product.stage(scratch, count, inputs, load, control, before_rows)
            panels = T.bind((outputs + (product.columns - 1)) // product.columns)
            product.panels(scratch, count, weights, T.int64(0), panels, lambda x: x, store)
            product.release()
    return function.get()


def _resolve_patches(target: CpuTarget, exactness: Exactness, spec: dict[str, Any]) -> dict[str, Any]:
    form = form_of(target, exactness, spec["bits"], spec["terms"])
    return spec | {"form": form, "longest": longest_block(target, form, spec.pop("inputs"), BLOCK_BYTES)}


def _try_patches(
    function: Compiled, form: Form, bits: int, terms: int, channels: int, patch: tuple[int, int], longest: int
) -> None:
    draw, (high, wide) = Draw(), patch
    layer, matrix = random_layer(draw, channels * high * wide, 37, bits, terms)
    images = draw.normal(2, channels, 3 * high, 5 * wide)
    prefix, added = draw.normal(2, 37), draw.normal(15, 37)
    control, y = torch.tensor([0, 2], dtype=torch.int32), torch.empty(2, 17, 37)
    function(images, *tensors_of(layer), prefix, added, control, y)
    assert control[0] == 0, "it found an activation that it cannot express"
    patches = F.unfold(images, patch, stride=patch).mT
    expected = torch.cat([prefix.expand(2, -1, -1), F.linear(patches, matrix, layer.bias) + added], 1)
    size = patches.abs() @ matrix.abs().T
    bound = error_bound(form, bits) * patches.abs().amax(-1, keepdim=True) * matrix.abs().sum(-1) + size * 1e-6
    check_within(y, expected, F.pad(bound, (0, 0, 2, 0)) + 1e-5)


PATCHES = Function("patches", _build_patches, _try_patches, _resolve_patches)


def patches(
    program: Program, images: Value, layer: LinearWeights, patch: tuple[int, int], prefix: Tensor, added: Tensor
) -> Value:
    """Patches [rows, columns] of images [B, channels, H, W] as tokens [B, P + patches, outputs].

    Args:
        layer: of patches with the channels first.
        prefix: the tokens before them [P, outputs], the same for all images.
        added: what is added to the patches' [patches, outputs].
    """
    values = weight_values(program, layer)
    return program.call(
        PATCHES,
        [images, *values, program.weight(prefix), program.weight(added)],
        (images.shape[0], len(prefix) + len(added), layer.outputs),
        bits=layer.bits,
        terms=layer.terms,
        channels=images.shape[1],
        patch=patch,
        inputs=layer.inputs,
    )


# Attention

_MOST_PARTS = 16  # that the tokens of a head are split into


def _build_attention(target: CpuTarget, features: int, columns: int, parts: int, low: float) -> T.PrimFunc:
    """The function ``(q, k and v, contrast, control, y)``.

    q [B, N, H * features], k [B, M, H * features] and v [B, M, H * columns] lie side by side in one tensor, or the last
    two do, or none, which are 1, 2 or 3 `parts`. contrast [H], y [B, N, H * columns].
    """
    of_queries, of_keys = (Tables(target, "float32", features, columns) for _ in range(2))
    with T.function("attention") as function:
        batch, heads, queries, keys, of_q, of_k, of_v = T.sizes(7)
        q = T.argument("q", (batch, queries, of_q))
        k = q if parts == 1 else T.argument("k", (batch, keys, of_k))
        v = k if parts < 3 else T.argument("v", (batch, keys, of_v))
        contrast = T.argument("contrast", (heads,))
        control = control_argument()
        y = T.argument("y", (batch, queries, heads * columns))
        threads = threads_of(control)

        def by_heads(x: Buffer, start: Index, width: int) -> Buffer:
            tokens, row = x.shape[1], x.shape[2]
            strides = (tokens * row, T.int64(width), row, T.int64(1))
            return x.view(batch, heads, tokens, width, strides=strides, start=start)

        width = heads * features
        q_heads = by_heads(q, T.int64(0), features)
        k_heads = by_heads(k, width if parts == 1 else T.int64(0), features)
        v_heads = by_heads(v, (width + width, width, T.int64(0))[parts - 1], columns)
        out = by_heads(y, T.int64(0), columns)
        pairs = held(batch * heads)

        def parts_of(tokens: Index) -> Expr:
            """Tasks for each head, so that threads have equally many."""
            enough = T.either(pairs >= 8 * threads, T.truncmod(pairs, threads) == 0)
            few = T.int64(0) + tokens < 2 * TOKENS
            return held(T.select(T.either(enough, few), T.int64(1), T.min(threads, T.int64(_MOST_PARTS))))

        key_parts, query_parts = parts_of(k.shape[1]), parts_of(queries)
        # Memory whose size the function computes is more than TVM can follow.
        whole = T.alloc(batch, heads, _MOST_PARTS, features + 1, columns + 1)
        state = Buffer(whole.data, (batch, heads, key_parts, *whole.shape[3:]), whole.dtype)
        bottom, scale = T.float32(low), T.float32(1 / (math.pi * features))
        with T.parallel(pairs * key_parts) as task:
            emit_sums(of_keys, k_heads, v_heads, None, bottom, state, task, complete=True)
        with T.parallel(pairs * query_parts) as task:
            Products(of_queries, q_heads, state, bottom, scale, contrast, out, task, query_parts).emit()
    return function.get()


def _try_attention(function: Compiled, features: int, columns: int, parts: int, low: float) -> None:
    draw, heads, keys = Draw(), 3, 70 if parts == 1 else 45
    q, k = draw.normal(2, heads, 70, features), draw.normal(2, heads, keys, features)
    v, contrast = draw.normal(2, heads, keys, columns), draw.normal(heads).abs()
    rows = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
    given = [*rows[: parts - 1], torch.cat(rows[parts - 1 :], -1)]
    control, y = torch.tensor([0, 2], dtype=torch.int32), torch.empty(2, 70, heads * columns)
    function(*(x.contiguous() for x in given), contrast, control, y)
    codes: Codes = next(name for name, lowest in LOW.items() if lowest == low)
    expected = add_attention_twin(q, k, v, None, codes, features, contrast).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)


ATTENTION = Function("attention", _build_attention, _try_attention)


def attention(
    program: Program, parts: Sequence[Value], contrast: Tensor, features: int, columns: int, low: float
) -> Value:
    """Add attention of the signs of queries and keys, [B, N, H * columns].

    Args:
        parts: queries [B, N, H * features], keys [B, M, H * features] and values [B, M, H * columns]; those of one
            tensor side by side are one.
        contrast: [H].
        low: what zeros of the codes count as.
    """
    return program.call(
        ATTENTION,
        [*parts, program.weight(contrast)],
        (*parts[0].shape[:2], len(contrast) * columns),
        features=features,
        columns=columns,
        parts=len(parts),
        low=low,
    )


# Depthwise convolution


def _build_depthwise(
    target: CpuTarget,
    kernel_size: int,
    grid: tuple[int, int],
    activation: Activation,
    added: bool,
    last: bool,
    coarse: bool,
) -> T.PrimFunc:
    """The function ``(x, weight, bias, what is added, control, y)``.

    x [B, tokens, C], or [B, tokens, C' + C] of which the last C count if `last`; weight [taps, C], bias [C], y [B,
    tokens, C]. C is at least a vector.
    """
    with T.function("depthwise") as function:
        batch, tokens, channels, row = T.sizes(4)
        x = T.argument("x", (batch, tokens, row if last else channels))
        weight = T.argument("weight", (kernel_size * kernel_size, channels))
        bias = T.argument("bias", (channels,))
        addend = T.argument("added", (batch, tokens, channels)) if added else None
        control_argument()
        y = T.argument("y", (batch, tokens, channels))
        if last:
            strides = (tokens * row, row, T.int64(1))
            x = x.view(batch, tokens, channels, strides=strides, start=row - channels)
        height, width = (T.int64(size) for size in grid)
        with T.parallel(batch * height) as number:
            image, i = T.bind(T.truncdiv(number, height)), T.bind(T.truncmod(number, height))
            tensors = Tensors(x, weight, bias, addend, y)
            Row(Isa(target), tensors, kernel_size, activation, image, i, height, width, coarse).emit()
    return function.get()


def _resolve_depthwise(target: CpuTarget, exactness: Exactness, spec: dict[str, Any]) -> dict[str, Any]:
    bits, terms = spec.pop("behind")
    product = product_of(target, form_of(target, exactness, bits, terms), bits, terms)
    return spec | {"coarse": product.coarse}


def _try_depthwise(
    function: Compiled,
    kernel_size: int,
    grid: tuple[int, int],
    activation: Activation,
    added: bool,
    last: bool,
    coarse: bool,
) -> None:
    draw, channels, (height, width) = Draw(), 35, grid
    tokens = 2 + height * width
    wide, addend = draw.normal(2, tokens, 3 * channels), draw.normal(2, tokens, channels)
    x = wide[..., -channels:]
    weight, bias = draw.normal(channels, 1, kernel_size, kernel_size), draw.normal(channels)
    control, y = torch.tensor([0, 2], dtype=torch.int32), torch.empty(2, tokens, channels)
    taps = weight.flatten(1).T.contiguous()
    function(wide if last else x.contiguous(), taps, bias, *([addend] if added else []), control, y)
    expected = depthwise_conv_twin(x, weight, bias, height, width, activation, addend if added else None)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=COARSE_GELU_ERROR + 2e-5 if coarse else 2e-5)


DEPTHWISE = Function("depthwise", _build_depthwise, _try_depthwise, _resolve_depthwise)


def depthwise(
    program: Program,
    x: Value,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    *,
    activation: Activation = "none",
    added: Value | None = None,
    behind: LinearWeights | None = None,
) -> Value:
    """``activation(convolution of x + bias) + added``, over a grid that the last tokens lie on.

    Args:
        x: [B, tokens, C], or wider: then its last C columns count.
        weight: [C, 1, k, k].
        behind: the layer that alone takes the outcome, whose product may round by more than a coarse activation
            function does.
    """
    channels, kernel_size = weight.shape[0], weight.shape[-1]
    taps = weight.detach().float().flatten(1).T.contiguous()
    shift = torch.zeros(channels) if bias is None else bias.detach().float().contiguous()
    return program.call(
        DEPTHWISE,
        [x, program.weight(taps), program.weight(shift), *([added] if added else [])],
        (*x.shape[:2], channels),
        kernel_size=kernel_size,
        grid=grid,
        activation=activation,
        added=added is not None,
        last=x.shape[-1] != channels,
        behind=(0, 0) if behind is None else (behind.bits, behind.terms),
    )


# Pooling


def _build_pool(target: CpuTarget, mean: bool, eps: float | None) -> T.PrimFunc:
    """The function ``(x, norm's weight and bias, first, control, y)``: the tokens' norms [B, 1, C].

    Of the tokens from the one that ``first`` has as its length on, the first one or their mean.
    """
    isa = Isa(target)
    with T.function("pool") as function:
        batch, tokens, width, skipped = T.sizes(4)
        x = T.argument("x", (batch, tokens, width))
        norm = None if eps is None else Norm.arguments(width, eps)
        T.argument("first", (skipped,), "uint8")
        control_argument()
        y = T.argument("y", (batch, 1, width))
        tokens_of = rows_of(x)
        with T.parallel(batch) as b:
            out, lanes = y.part(b, 0), isa.lanes
            rows = T.alloc(lanes, width)
            load = isa.reader(tokens_of, lambda token: b * tokens + token)

            def take(first: Expr, count: Index, use: Callable[[Expr, Expr], None]) -> None:
                """Emit ``use(column, x)`` for all columns of some tokens, no more than a vector has lanes."""
                if norm is not None:
                    norm.emit(isa, load, first, count, width, isa.writer(rows, lambda token: token - first))
                with T.serial(count) as i, T.serial(width) as c:
                    use(c, tokens_of[b * tokens + first + i, c] if norm is None else rows[i, c])

            def copy(c: Expr, x: Expr) -> None:
                out[c] = x

            def add(c: Expr, x: Expr) -> None:
                out[c] = out[c] + x

            if not mean:
                take(skipped, 1, copy)
            else:
                with T.serial(width) as c:
                    out[c] = T.float32(0)
                with T.serial(T.truncdiv(tokens - skipped + (lanes - 1), T.int64(lanes))) as batch:
                    first = T.bind(skipped + batch * lanes)
                    take(first, T.bind(T.min(T.int64(lanes), tokens - first)), add)
                with T.serial(width) as c:
                    out[c] = out[c] / T.cast(tokens - skipped, "float32")
    return function.get()


def _try_pool(function: Compiled, mean: bool, eps: float | None) -> None:
    draw = Draw()
    x, gain, shift = draw.normal(3, 7, 37), draw.normal(37), draw.normal(37)
    control, y = torch.tensor([0, 2], dtype=torch.int32), torch.empty(3, 1, 37)
    function(x, *([] if eps is None else [gain, shift]), torch.zeros(2, dtype=torch.uint8), control, y)
    normal = x if eps is None else F.layer_norm(x, (37,), gain, shift, eps)
    expected = normal[:, 2:].mean(1, keepdim=True) if mean else normal[:, 2:3]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-5)


POOL = Function("pool", _build_pool, _try_pool)


def pool(
    program: Program, x: Value, *, mean: bool, first: int = 0, norm: tuple[Tensor, Tensor, float] | None = None
) -> Value:
    """Of the tokens [B, N, C] from `first` on, normalised, that one or the mean of all: [B, 1, C]."""
    arguments = [x, *norm_values(program, norm), program.weight(torch.zeros(first, dtype=torch.uint8))]
    shape = (x.shape[0], 1, x.shape[2])
    return program.call(POOL, arguments, shape, mean=mean, eps=None if norm is None else norm[2])
