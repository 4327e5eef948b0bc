"""What happens to tokens: pictures become some, and they attend to each other, look around, and are pooled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import COARSE_GELU_ERROR
from shiftadd3d.kernels.cpu.depthwise import Row, Tensors
from shiftadd3d.kernels.cpu.forms import longest_block
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.matshift import BLOCK_BYTES
from shiftadd3d.kernels.cpu.sign_tables import TOKENS, Products, Tables, emit_sums
from shiftadd3d.kernels.cpu.trials import Draw, check_within
from shiftadd3d.kernels.pack.whole import Format, LinearWeights
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.depthwise import depthwise_conv_twin
from shiftadd3d.kernels.reference.matadd import LOW, Codes, add_attention_twin, pack_signs
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index
from shiftadd3d.kernels.whole.parts import (
    Norm,
    NormWeights,
    block_of,
    control_argument,
    each_block,
    held,
    rows_of,
    threads_of,
)
from shiftadd3d.kernels.whole.products import (
    Kind,
    depthwise_values,
    norm_values,
    tensors_of,
    weight_values,
    weights_argument,
)
from shiftadd3d.kernels.whole.program import Exactness, Function, Program, Value, fixed
from shiftadd3d.kernels.whole.trials import RandomNorm, error_of, outcome_of, random_layer

# Patches


class Patches(NamedTuple):
    """What is asked of patches of pictures."""

    weights: Format
    channels: int
    patch: tuple[int, int]  # rows and columns

    @property
    def inputs(self) -> int:
        return self.channels * self.patch[0] * self.patch[1]


class PatchesSpec(NamedTuple):
    kind: Kind
    channels: int
    patch: tuple[int, int]
    longest: int


def _build_patches(target: CpuTarget, spec: PatchesSpec) -> T.PrimFunc:
    """The function ``(images, layer's weights, prefix tokens, what is added to patches, control, y)``.

    images [B, channels, H, W], prefix [P, outputs], added [patches, outputs], y [B, P + patches, outputs].
    """
    kind, channels, (high, wide), longest = spec
    isa, product = Isa(target), kind.product(target)
    with T.function("patches") as function:
        batch, height, width, outputs, prefixes, patches, tokens = T.sizes(7)
        images, inputs = T.argument("images", (batch, channels, height, width)), T.int64(channels * high * wide)
        weights = weights_argument(product, "", kind.terms, inputs, outputs)
        prefix = T.argument("prefix", (prefixes, outputs))
        added = T.argument("added", (patches, outputs))
        control = control_argument()
        y = T.argument("y", (batch, tokens, outputs))
        across = held(T.truncdiv(width, T.int64(wide)))
        with T.serial(batch) as b, T.serial(prefixes) as p, T.serial(outputs) as c:
            y[b, p, c] = prefix[p, c]
        rows = held(batch * patches)
        block = block_of(rows, longest, product.rows, threads_of(control))
        with each_block(rows, block) as (top, count):

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


def _resolve_patches(target: CpuTarget, exactness: Exactness, asked: Patches) -> PatchesSpec:
    kind = Kind.of(target, exactness, asked.weights)
    return PatchesSpec(kind, *asked[1:], longest=longest_block(target, kind.form, asked.inputs, BLOCK_BYTES))


def _try_patches(function: Compiled, spec: PatchesSpec) -> None:
    draw, kind, channels, (high, wide) = Draw(), spec.kind, spec.channels, spec.patch
    layer, matrix = random_layer(draw, channels * high * wide, 37, kind.weights)
    images = draw.normal(2, channels, 3 * high, 5 * wide)
    prefix, added = draw.normal(2, 37), draw.normal(15, 37)
    y = outcome_of(function, [images, *tensors_of(layer), prefix, added], 2, 17, 37)
    patches = F.unfold(images, spec.patch, stride=spec.patch).mT
    expected = torch.cat([prefix.expand(2, -1, -1), F.linear(patches, matrix, layer.bias) + added], 1)
    bound = error_of(kind.form, kind.bits, patches, matrix)
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
    arguments = [images, *weight_values(program, layer), program.weight(prefix), program.weight(added)]
    channels, shape = images.shape[1], (images.shape[0], len(prefix) + len(added), layer.outputs)
    assert isinstance(channels, int)
    return program.call(PATCHES, arguments, shape, Patches(layer.format, channels, patch))


# Attention

_MOST_PARTS = 16  # that the tokens of a head are split into


class AttentionSpec(NamedTuple):
    features: int  # of a head's queries and keys
    columns: int  # of its values
    codes: str  # what queries and keys are: float32, or uint8, their signs packed
    parts: str  # tensors that hold queries, keys and values: "qkv", "q kv", "q k v", or "qk v"
    low: float  # what zeros of the codes count as


def _build_attention(target: CpuTarget, spec: AttentionSpec) -> T.PrimFunc:
    """The function ``(q, k and v, contrast, control, y)``.

    q [B, N, H * features], k [B, M, H * features] and v [B, M, H * columns] lie side by side in one tensor, or some do,
    or none. Signs of q and k have H * features / 8 bytes. contrast [H], y [B, N, H * columns].
    """
    features, columns, codes, parts, low = spec
    of_queries, of_keys = (Tables(target, codes, features, columns) for _ in range(2))
    with T.function("attention") as function:
        batch, heads, queries, keys = T.sizes(4)
        widths = {"q": of_queries.width, "k": of_keys.width, "v": columns}
        places: dict[str, tuple[Buffer, Index]] = {}  # each in its tensor, and where it begins in a row
        for names in parts.split():
            shape = batch, queries if "q" in names else keys, *T.sizes(1)
            tensor, start = T.argument(names, shape, "float32" if "v" in names else codes), T.int64(0)
            for name in names:
                places[name] = tensor, start
                start = start + heads * widths[name]
        contrast = T.argument("contrast", (heads,))
        control = control_argument()
        y = T.argument("y", (batch, queries, heads * columns))
        threads = threads_of(control)

        def by_heads(x: Buffer, start: Index, width: int) -> Buffer:
            tokens, row = x.shape[1], x.shape[2]
            strides = (tokens * row, T.int64(width), row, T.int64(1))
            return x.view(batch, heads, tokens, width, strides=strides, start=start)

        q_heads, k_heads, v_heads = (by_heads(*places[name], widths[name]) for name in "qkv")
        out = by_heads(y, T.int64(0), columns)
        pairs = held(batch * heads)

        def parts_of(tokens: Index) -> Expr:
            """Tasks for each head, so that threads have equally many."""
            enough = T.either(pairs >= 8 * threads, T.truncmod(pairs, threads) == 0)
            few = T.int64(0) + tokens < 2 * TOKENS
            return held(T.select(T.either(enough, few), T.int64(1), T.min(threads, T.int64(_MOST_PARTS))))

        key_parts, query_parts = parts_of(k_heads.shape[2]), parts_of(queries)
        # Memory whose size the function computes is more than TVM can follow.
        whole = T.alloc(batch, heads, _MOST_PARTS, features + 1, columns + 1)
        state = Buffer(whole.data, (batch, heads, key_parts, *whole.shape[3:]), whole.dtype)
        bottom, scale = T.float32(low), T.float32(1 / (math.pi * features))
        with T.parallel(pairs * key_parts) as task:
            emit_sums(of_keys, k_heads, v_heads, None, bottom, state, task, complete=True)
        with T.parallel(pairs * query_parts) as task:
            Products(of_queries, q_heads, state, bottom, scale, contrast, out, task, query_parts).emit()
    return function.get()


def _try_attention(function: Compiled, spec: AttentionSpec) -> None:
    features, columns, kept, parts, low = spec
    draw, heads, keys = Draw(), 3, 45 if parts.startswith("q ") else 70
    q, k = draw.normal(2, heads, 70, features), draw.normal(2, heads, keys, features)
    v, contrast = draw.normal(2, heads, keys, columns), draw.normal(heads).abs()
    rows = dict(zip("qkv", (x.transpose(1, 2).flatten(2) for x in (q, k, v)), strict=True))
    if kept == "uint8":
        rows.update({name: pack_signs(rows[name]) for name in "qk"})
    given = [torch.cat([rows[name] for name in names], -1) for names in parts.split()]
    y = outcome_of(function, [*(x.contiguous() for x in given), contrast], 2, 70, heads * columns)
    codes: Codes = next(name for name, lowest in LOW.items() if lowest == low)
    expected = add_attention_twin(q, k, v, None, codes, features, contrast).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)


ATTENTION = fixed("attention", _build_attention, _try_attention)


def attention(
    program: Program, parts: Sequence[Value], contrast: Tensor, features: int, columns: int, low: float
) -> Value:
    """Add attention of the signs of queries and keys, [B, N, H * columns].

    Args:
        parts: queries [B, N, H * features], keys [B, M, H * features] and values [B, M, H * columns]; those of one
            tensor side by side are one. Of queries and keys signs do, uint8, in tensors without values.
        contrast: [H].
        low: what zeros of the codes count as.
    """
    shape, codes = (*parts[0].shape[:2], len(contrast) * columns), parts[0].dtype
    together = {1: "qkv", 2: "q kv" if codes == "float32" else "qk v", 3: "q k v"}
    asked = AttentionSpec(features, columns, codes, together[len(parts)], low)
    return program.call(ATTENTION, [*parts, program.weight(contrast)], shape, asked)


# Depthwise convolution


class Depthwise(NamedTuple):
    """What is asked of a depthwise convolution."""

    kernel_size: int
    grid: tuple[int, int]
    activation: Activation
    added: bool
    last: bool  # whether x has columns before those that count
    behind: Format  # weights of the layer behind it


class DepthwiseSpec(NamedTuple):
    kernel_size: int
    grid: tuple[int, int]
    activation: Activation
    added: bool
    last: bool
    coarse: bool  # see `cpu.blocks.activate`


def _build_depthwise(target: CpuTarget, spec: DepthwiseSpec) -> T.PrimFunc:
    """The function ``(x, weight, bias, what is added, control, y)``.

    x [B, tokens, C], or [B, tokens, C' + C] of which the last C count if `last`; weight [taps, C], bias [C], y [B,
    tokens, C]. C is at least a vector.
    """
    kernel_size, grid, activation, added, last, coarse = spec
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


def _resolve_depthwise(target: CpuTarget, exactness: Exactness, asked: Depthwise) -> DepthwiseSpec:
    coarse = Kind.of(target, exactness, asked.behind).product(target).coarse
    return DepthwiseSpec(*asked[:-1], coarse=coarse)


def _try_depthwise(function: Compiled, spec: DepthwiseSpec) -> None:
    kernel_size, grid, activation, added, last, coarse = spec
    draw, channels, (height, width) = Draw(), 35, grid
    tokens = 2 + height * width
    wide, addend = draw.normal(2, tokens, 3 * channels), draw.normal(2, tokens, channels)
    x = wide[..., -channels:]
    weight, bias = draw.normal(channels, 1, kernel_size, kernel_size), draw.normal(channels)
    taps = weight.flatten(1).T.contiguous()
    given = [wide if last else x.contiguous(), taps, bias, *([addend] if added else [])]
    y = outcome_of(function, given, 2, tokens, channels)
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
    channels, of_behind = len(weight), Format(0, 0) if behind is None else behind.format
    arguments = [x, *depthwise_values(program, weight, bias), *([added] if added else [])]
    last = x.shape[-1] != channels
    asked = Depthwise(weight.shape[-1], grid, activation, added is not None, last, of_behind)
    return program.call(DEPTHWISE, arguments, (*x.shape[:2], channels), asked)


# Pooling


class PoolSpec(NamedTuple):
    mean: bool
    eps: float | None  # of the norm, if there is one


def _build_pool(target: CpuTarget, spec: PoolSpec) -> T.PrimFunc:
    """The function ``(x, norm's weight and bias, first, control, y)``: the tokens' norms [B, 1, C].

    Of the tokens from the one that ``first`` has as its length on, the first one or their mean.
    """
    isa, (mean, eps) = Isa(target), spec
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


def _try_pool(function: Compiled, spec: PoolSpec) -> None:
    draw = Draw()
    x, norm = draw.normal(3, 7, 37), RandomNorm(draw, 37, spec.eps)
    y = outcome_of(function, [x, *norm.tensors, torch.zeros(2, dtype=torch.uint8)], 3, 1, 37)
    expected = norm(x)[:, 2:].mean(1, keepdim=True) if spec.mean else norm(x)[:, 2:3]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-5)


POOL = fixed("pool", _build_pool, _try_pool)


def pool(program: Program, x: Value, *, mean: bool, first: int = 0, norm: NormWeights | None = None) -> Value:
    """Of the tokens [B, N, C] from `first` on, normalised, that one or the mean of all: [B, 1, C]."""
    arguments = [x, *norm_values(program, norm), program.weight(torch.zeros(first, dtype=torch.uint8))]
    shape = (x.shape[0], 1, x.shape[2])
    return program.call(POOL, arguments, shape, PoolSpec(mean, None if norm is None else norm[2]))
