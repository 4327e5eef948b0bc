"""MatAdd on NVIDIA GPUs: products with the signs of features, or with packed bits.

There are two functions: ``K^T V`` over shares of the tokens, and ``Q S``. A block of 128 threads has 64 x 64 sums in
float32. Each sum adds or subtracts one number for each code. This is a fused multiply-add with +1, -1 or 0. On a GPU,
it takes as long as an addition and rounds the same. Tensors may have any strides and are not copied. Loads and stores
are guarded, so there may be any number of tokens, features and columns.

For attention, a feature that is always 1 follows the features, and a value that is always 1 follows the values. Their
sums give the denominator and the constant part of the similarities.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cuda.driver import MAX_ELEMENTS, CudaFunction, CudaKernel
from shiftadd3d.kernels.cuda.product import DTYPES
from shiftadd3d.kernels.cuda.tile import ACROSS, Tile, grid, shared, shared_out
from shiftadd3d.kernels.reference.linear_angular import LEAST_ROW_SUM
from shiftadd3d.kernels.reference.matadd import LOW, AddAttention, MatAddKV, MatAddQ, decode_signs, features_of
from shiftadd3d.kernels.reference.trials import Draw, assert_close
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Spec
from shiftadd3d.kernels.runtime.memory import empty_by_heads
from shiftadd3d.kernels.runtime.targets import CudaTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

STORAGE: dict[torch.dtype, str] = {**DTYPES, torch.uint8: "uint8"}
"""Names of the dtypes of q and k in specs. uint8 stands for packed signs."""

_THREADS = 128
_TILE = 64  # rows and columns of the sums of a block
_DEPTH = 16  # numbers of each sum that are staged at once
_PADDING = 4  # elements between rows in shared memory, against conflicts of banks
_BLOCKS_A_PROCESSOR = 4  # how many blocks of K^T V each multiprocessor should get
_LEAST_SHARE = 64  # tokens


def _tiles(count: Expr) -> Expr:
    return T.truncdiv(count + (_TILE - 1), T.int32(_TILE))


def _rows(name: str, shape: tuple[Index, ...], dtype: str) -> Buffer:
    """The next arguments: strides of batch, head and token, then the tensor. Its columns, if any, lie side by side."""
    strides = T.scalars(f"{name}_batch", f"{name}_head", f"{name}_token")
    return T.tensor(name, shape, dtype, strides=[*strides, 1][: len(shape)])


def _code(x: Buffer, feature: Expr, low: Expr) -> Expr:
    """The code of a token's feature."""
    if x.dtype == "uint8":
        is_set = (T.cast(x[feature >> 3], "int32") >> (feature & 7)) & 1 != 0
    else:
        is_set = T.cast(x[feature], "float32") >= T.float32(0)
    return T.select(is_set, T.float32(1), low)


def build_sums(target: CudaTarget, codes: str, dtype: str, masked: bool, attention: bool) -> T.PrimFunc:
    """The function ``(k, v, mask, low, tokens of a share, shares, state)``.

    The state is [batch * heads * shares, D + a, E + a] float32, where a is 1 for attention, else 0. Blocks: shares
    along x, features along y, columns along z.
    """
    extra = int(attention)

    def or_one(x: Expr, index: Expr, count: Expr) -> Expr:
        """x; for attention, 1 behind the last one; then 0."""
        return T.select(index < count, x, T.select(index < count + extra, T.float32(1), T.float32(0)))

    with T.function("matadd_kv") as function:
        batch, heads, tokens, width, columns = T.scalars("batch", "heads", "tokens", "width", "columns")
        share, shares, blocks, state_rows, state_columns = T.scalars(
            "share", "shares", "blocks", "state_rows", "state_columns"
        )
        low = T.scalar("low", "float32")
        k = _rows("k", (batch, heads, tokens, width), codes)
        v = _rows("v", (batch, heads, tokens, columns), dtype)
        mask = _rows("m", (batch, heads, tokens), "uint8") if masked else None
        state = T.tensor("state", (blocks, state_rows, state_columns), "float32")
        places = blocks, _tiles(state_rows), _tiles(state_columns)
        with grid(*places, threads=_THREADS) as (block, row_block, column_block, thread):
            ks, vs = shared(_DEPTH, _TILE), shared(_DEPTH, _TILE)
            sums, features = Tile(thread, _TILE // ACROSS), T.bind(state_rows - extra)
            head, first = T.bind(T.truncdiv(block, shares)), T.bind(T.truncmod(block, shares) * share)
            at_head = T.truncdiv(head, heads), T.truncmod(head, heads)
            sums.fill(lambda _: T.float32(0))
            with T.serial((share + (_DEPTH - 1)) // _DEPTH) as step:
                with shared_out(thread, _THREADS, _DEPTH * _TILE) as number:
                    row, lane = T.bind(number // _TILE), T.bind(number % _TILE)
                    turn = T.bind(step * _DEPTH + row)
                    place = (*at_head, T.bind(T.min(first + turn, tokens - 1)))
                    counts = T.both(turn < share, first + turn < tokens)
                    if mask is not None:
                        counts = T.both(counts, mask[place] != T.number("uint8", 0))
                    feature, column = T.bind(row_block * _TILE + lane), T.bind(column_block * _TILE + lane)
                    code = _code(k.part(*place), T.min(feature, features - 1), low)
                    value = T.cast(v[(*place, T.min(column, columns - 1))], "float32")
                    ks[row, lane] = or_one(code, feature, features)
                    vs[row, lane] = T.select(counts, or_one(value, column, columns), T.float32(0))
                with T.serial(_DEPTH) as inner:
                    sums.add_products(lambda row: ks[inner, row], lambda column: vs[inner, column])

            def store(row: Expr, column: Expr, x: Expr, _: Expr) -> None:
                feature, column = row_block * _TILE + row, column_block * _TILE + column
                with T.when(T.both(feature < state_rows, column < state_columns)):
                    state[block, feature, column] = x

            sums.each(store)
    return function.get()


def build_products(target: CudaTarget, codes: str, dtype: str, attention: bool) -> T.PrimFunc:
    """The function ``(q, state, low, scale, least row sum, out)``.

    The state is [batch * heads, D + a, E + a] float32, where a is 1 for attention, else 0. Blocks: tokens of all heads
    along x, columns along y.
    """
    extra = int(attention)
    with T.function("matadd_q") as function:
        batch, heads, tokens, width, columns = T.scalars("batch", "heads", "tokens", "width", "columns")
        blocks, state_rows, state_columns = T.scalars("blocks", "state_rows", "state_columns")
        low, scale, least = (T.scalar(name, "float32") for name in ("low", "scale", "least"))
        q = _rows("q", (batch, heads, tokens, width), codes)
        state = T.tensor("state", (blocks, state_rows, state_columns), "float32")
        out = _rows("out", (batch, heads, tokens, columns), dtype)
        with grid(batch * heads * _tiles(tokens), _tiles(columns), threads=_THREADS) as (block, column_block, thread):
            qs = shared(_DEPTH, _TILE + _PADDING)
            # Every row sum needs the last column of the state. It follows the columns of the block.
            ss = shared(_DEPTH, _TILE + extra)
            sums = Tile(thread, _TILE // ACROSS, last=_TILE if attention else None)
            features = T.bind(state_rows - extra)
            head, first = T.bind(T.truncdiv(block, _tiles(tokens))), T.bind(T.truncmod(block, _tiles(tokens)) * _TILE)
            of_head, at_head = state.part(head), (T.truncdiv(head, heads), T.truncmod(head, heads))

            def summed(feature: Expr, column: Expr) -> Expr:
                """A number of the state, 0 behind the last feature."""
                value = of_head[T.min(feature, features - 1), column]
                return T.select(feature < features, value, T.float32(0))

            sums.fill(lambda _: T.float32(0))
            with T.serial((features + (_DEPTH - 1)) // _DEPTH) as step:
                with shared_out(thread, _THREADS, _TILE * _DEPTH) as number:
                    row, at = T.bind(number // _DEPTH), T.bind(number % _DEPTH)
                    feature = T.bind(T.min(step * _DEPTH + at, features - 1))
                    qs[at, row] = _code(q.part(*at_head, T.bind(T.min(first + row, tokens - 1))), feature, low)
                with shared_out(thread, _THREADS, _TILE * _DEPTH) as number:
                    inner, lane = T.bind(number // _TILE), T.bind(number % _TILE)
                    column = T.bind(T.min(column_block * _TILE + lane, columns - 1))
                    ss[inner, lane] = summed(T.bind(step * _DEPTH + inner), column)
                if attention:
                    with T.when(thread < _DEPTH):
                        ss[thread, _TILE] = summed(step * _DEPTH + thread, columns)
                with T.serial(_DEPTH) as inner:
                    sums.add_products(lambda row: qs[inner, row], lambda column: ss[inner, column])

            def store(row: Expr, column: Expr, x: Expr, row_sum: Expr) -> None:
                token, column = T.bind(first + row), T.bind(column_block * _TILE + column)
                with T.when(T.both(token < tokens, column < columns)):
                    if attention:
                        half = T.float32(0.5)
                        numerator = x * scale + half * of_head[features, column]
                        x = numerator / T.max(row_sum * scale + half * of_head[features, columns], least)
                    out[(*at_head, token, column)] = T.cast(x, dtype)

            sums.each(store)
    return function.get()


def try_sums(function: CudaFunction, codes: str, dtype: str, masked: bool, attention: bool) -> None:
    """Several shares and heads, more features and columns than a block has, partial blocks, and a strided key."""
    (tokens, features, columns), draw = (45, _TILE + 3, _TILE + 5), Draw()
    k, v = draw.signs(codes, 1, tokens, 2, features).transpose(1, 2), draw.normal(1, 2, tokens, columns, dtype=dtype)
    mask = draw.normal(1, 2, tokens) > 0 if masked else None
    on_device = k.to(function.device), v.to(function.device), mask if mask is None else mask.to(function.device)
    for name, low in LOW.items():
        found = sum_keys(*on_device, low, features, attention, function, shares=2)
        keys, values = decode_signs(k, name, features, torch.float32), v.float()
        if attention:
            keys, values = (F.pad(x, (0, 1), value=1.0) for x in (keys, values))
        if mask is not None:
            values = torch.where(mask.unsqueeze(-1), values, 0)
        assert_close(found, (keys.mT @ values).flatten(0, 1))


def try_products(function: CudaFunction, codes: str, dtype: str, attention: bool) -> None:
    """Several heads, more tokens and columns than a block has, partial blocks, and a strided query."""
    (tokens, features, columns), draw = (_TILE + 7, 21, _TILE + 5), Draw()
    q = draw.signs(codes, 1, tokens, 2, features).transpose(1, 2)
    state = draw.normal(2, features + attention, columns + attention)
    state[..., -1:] = state[..., -1:].abs() + features  # row sums are positive
    for name, low in LOW.items():
        out = torch.zeros(1, 2, tokens, columns, dtype=getattr(torch, dtype), device=function.device)
        look_up(q.to(function.device), state.to(function.device), low, features, out, attention, function)
        expected = decode_signs(q, name, features, torch.float32) @ state[:, :features]
        if attention:
            expected = expected / (math.pi * features) + 0.5 * state[:, features:]
            expected = expected[..., :-1] / expected[..., -1:].clamp(min=LEAST_ROW_SUM)
        assert_close(out, expected)


def sums_variants(target: CudaTarget) -> Iterator[Spec]:
    """Products and attention without a mask, for values of all dtypes and keys of the same dtype or packed."""
    for dtype, packed, attention in itertools.product(("float32", "bfloat16", "float16"), (False, True), (False, True)):
        yield {"codes": "uint8" if packed else dtype, "dtype": dtype, "masked": False, "attention": attention}


def products_variants(target: CudaTarget) -> Iterator[Spec]:
    """Products and attention, for outcomes of all dtypes and queries of the same dtype or packed."""
    for spec in sums_variants(target):
        yield {name: spec[name] for name in ("codes", "dtype", "attention")}


SUMS = CudaKernel("matadd_kv", build_sums, try_sums, sums_variants)
PRODUCTS = CudaKernel("matadd_q", build_products, try_products, products_variants)


def _placed(name: str, x: Tensor) -> dict[str, Tensor | int]:
    """A tensor and its strides."""
    return {name: x, **dict(zip((f"{name}_batch", f"{name}_head", f"{name}_token"), x.stride(), strict=False))}


def _sizes(state: Tensor, rows: Tensor, width: int) -> dict[str, Tensor | int]:
    """The state, its sizes, and those of rows [B, H, tokens, columns] and of a token's codes."""
    of_rows = zip(("batch", "heads", "tokens", "columns"), rows.shape, strict=True)
    of_state = zip(("blocks", "state_rows", "state_columns"), state.shape, strict=True)
    return {"state": state, "width": width, **dict(of_rows), **dict(of_state)}


def sums(given: MatAddKV) -> Tensor | None:
    """``K^T V`` of heads, [B, H, D, E] float32; None if the twin must run instead."""
    k, v, mask, codes, _ = given
    features = features_of(k, given.features)
    state = sum_keys(k, v, mask, LOW[codes], features, attention=False)
    return None if state is None else state.view(*v.shape[:2], features, v.shape[-1])


def products(given: MatAddQ) -> Tensor | None:
    """``Q S`` of heads, [B, H, N, E]; None if the twin must run instead."""
    q, kv, codes = given
    state = kv.float().reshape(-1, *kv.shape[-2:]).contiguous()
    return look_up(q, state, LOW[codes], kv.shape[-2], empty_by_heads(q, kv), attention=False)


def attend(given: AddAttention) -> Tensor | None:
    """``K^T V``, then ``Q S``: [B, H, N, E]; None if the twin must run instead."""
    q, k, v, mask, codes, _, contrast, attention = given
    features = features_of(k, given.features)
    state = sum_keys(k, v, mask, LOW[codes], features, attention)
    if state is None:
        return None
    if contrast is not None:
        _add_contrast_(state, contrast)
    return look_up(q, state, LOW[codes], features, empty_by_heads(q, v), attention)


def _add_contrast_(state: Tensor, contrast: Tensor) -> None:
    """Apply the contrast [H] to sums [B * H, D + 1, E + 1] in place. The last row and column sum values and codes."""
    keys, values, count = state[:, :-1, -1:], state[:, -1:, :-1], state[:, -1:, -1:]
    factors = contrast.to(state.dtype).repeat(len(state) // len(contrast))[:, None, None]
    state[:, :-1, :-1] = torch.lerp(keys * (values / count.clamp(min=1)), state[:, :-1, :-1], factors)


def sum_keys(
    k: Tensor,  # [B, H, M, D], or [B, H, M, ceil(D / 8)] uint8
    v: Tensor,  # [B, H, M, E]
    mask: Tensor | None,  # [B, H, M] bool
    low: float,
    features: int,
    attention: bool,
    function: CudaFunction | None = None,
    shares: int | None = None,
) -> Tensor | None:  # [B * H, D + attention, E + attention] float32
    """The sums over keys. By default, the function and the number of shares are those for the case."""
    batch, heads, tokens, columns = v.shape
    if function is None:
        if k.dtype not in STORAGE or v.dtype not in STORAGE or not _fits(SUMS, k, v):
            return None
        spec: Spec = {"codes": STORAGE[k.dtype], "dtype": STORAGE[v.dtype]}
        function = SUMS.function(device=v.device, **spec, masked=mask is not None, attention=attention)
    if function is None:
        return None
    if shares is None:
        blocks = batch * heads * -(-features // _TILE) * -(-columns // _TILE)
        wanted = _BLOCKS_A_PROCESSOR * torch.cuda.get_device_properties(v.device).multi_processor_count
        shares = max(1, min(-(-wanted // blocks), tokens // _LEAST_SHARE))
    state = v.new_empty(batch * heads * shares, features + attention, columns + attention, dtype=torch.float32)
    blocks, rows, across = state.shape
    arguments = _placed("k", k) | _placed("v", v) | _sizes(state, v, k.shape[-1])
    if mask is not None:
        arguments |= _placed("m", mask.view(torch.uint8))
    share = -(-tokens // shares)
    function(blocks, -(-rows // _TILE), -(-across // _TILE), low=low, share=share, shares=shares, **arguments)
    return state if shares == 1 else state.view(batch * heads, shares, rows, across).sum(1)


def look_up(
    q: Tensor,  # [B, H, N, D], or [B, H, N, ceil(D / 8)] uint8
    state: Tensor,  # as `sum_keys` makes it
    low: float,
    features: int,
    out: Tensor,  # [B, H, N, E]
    attention: bool,
    function: CudaFunction | None = None,
) -> Tensor | None:
    """Write the products of queries with the sums to `out`. By default, the function is the one for the case."""
    batch, heads, tokens, columns = out.shape
    if function is None:
        if q.dtype not in STORAGE or out.dtype not in STORAGE or not _fits(PRODUCTS, q, state, out):
            return None
        spec: Spec = {"codes": STORAGE[q.dtype], "dtype": STORAGE[out.dtype]}
        function = PRODUCTS.function(device=out.device, **spec, attention=attention)
    if function is None:
        return None
    arguments = _placed("q", q) | _placed("out", out) | _sizes(state, out, q.shape[-1])
    scalars = {"low": low, "scale": 1 / (math.pi * features), "least": LEAST_ROW_SUM if attention else 0.0}
    function(batch * heads * -(-tokens // _TILE), -(-columns // _TILE), **scalars, **arguments)
    return out


def _fits(kernel: CudaKernel, *tensors: Tensor) -> bool:
    """Whether offsets within the tensors fit the kernel's numbers. If not, a message says so once."""
    for x in tensors:
        if sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) > MAX_ELEMENTS:
            kernel.decline(f"a tensor of {list(x.shape)} is too large for it")
            return False
    return True
