"""MatAdd on NVIDIA GPUs: products with the signs of features, taken as these are read, or with packed bits.

Two functions, ``K^T V`` over shares of the tokens, and ``Q S``. A block of 128 threads has 64 x 64 sums, each of which
adds or subtracts one number per code, in float32: a fused multiply-add with +1, -1 or 0, which takes a GPU as long as
an addition and rounds the same. Tensors are read where they are, whatever their strides; any number of tokens, features
and columns is served, by guarded loads and stores.

For attention, a feature that is always 1 follows the features, and a value that is always 1 the values: their sums are
what the denominator and the constant part of the similarities take.
"""

# TVMScript's annotations are calls:
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cuda.driver import MAX_ELEMENTS, CudaFunction, CudaKernel
from shiftadd3d.kernels.runtime.targets import CudaTarget

STORAGE = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.uint8: "uint8",
}

_THREADS = 128
_TILE = 64  # rows and columns of the sums of a block
_DEPTH = 16  # numbers of each sum that are staged at once
_DOWN, _ACROSS = 8, 4  # sums of a thread
_PADDING = 4  # elements between rows in shared memory, against conflicts of banks
_BLOCKS_A_PROCESSOR = 4  # that K^T V is cut into shares for
_LEAST_SHARE = 64  # tokens


def _code(T: Any, storage: str, X: Any, at: tuple[Any, ...], feature: Any, low: Any) -> Any:
    if storage == "uint8":
        bit = (T.cast(X[(*at, feature >> 3)], "int32") >> (feature & 7)) & 1
        return T.Select(bit != 0, T.float32(1), low)
    return T.Select(T.cast(X[(*at, feature)], "float32") >= T.float32(0), T.float32(1), low)


def _accumulate(T: Any, sums: Any, place: list[Any], code: Any, x: Any) -> None:
    T.buffer_store(sums, sums[(*place,)] + code * x, place)


def build_sums(target: CudaTarget, codes: str, dtype: str, masked: bool, attention: bool) -> Any:
    """The function of (k, v, mask, low, tokens of a share, shares, state), the state [batch * heads * shares, D + a,
    E + a] float32, a = 1 for attention, else 0. Blocks: shares along x, features along y, columns along z."""
    from tvm.script import tirx as T

    extra = int(attention)
    across = _TILE // _ACROSS
    per_pass = _THREADS // _TILE

    def stage_code(ks: Any, row: Any, column: Any, K: Any, at: Any, feature: Any, features: Any, low: Any) -> None:
        code = _code(T, codes, K, at, T.min(feature, features - 1), low)
        beyond = T.Select(feature < features + extra, T.float32(1), T.float32(0))
        T.buffer_store(ks, T.Select(feature < features, code, beyond), [row, column])

    def stage_value(vs: Any, row: Any, lane: Any, V: Any, at: Any, column: Any, columns: Any, counts: Any) -> None:
        value = T.cast(V[(*at, T.min(column, columns - 1))], "float32")
        beyond = T.Select(column < columns + extra, T.float32(1), T.float32(0))
        value = T.Select(column < columns, value, beyond)
        T.buffer_store(vs, T.Select(counts, value, T.float32(0)), [row, lane])

    def counts(mask: Any, at: Any, is_there: Any) -> Any:
        return T.And(is_there, mask[at] != T.uint8(0)) if masked else is_there

    @T.prim_func(s_tir=True)
    def matadd_kv(
        k: T.handle, v: T.handle, m: T.handle, low: T.float32, share: T.int32, shares: T.int32, s: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        batch = T.int32()
        heads = T.int32()
        tokens = T.int32()
        width = T.int32()
        columns = T.int32()
        blocks = T.int32()
        state_rows = T.int32()
        state_columns = T.int32()
        k_batch, k_head, k_token = T.int32(), T.int32(), T.int32()
        v_batch, v_head, v_token = T.int32(), T.int32(), T.int32()
        m_batch, m_head, m_token = T.int32(), T.int32(), T.int32()
        K = T.match_buffer(k, (batch, heads, tokens, width), codes, strides=[k_batch, k_head, k_token, 1])
        V = T.match_buffer(v, (batch, heads, tokens, columns), dtype, strides=[v_batch, v_head, v_token, 1])
        mask = T.match_buffer(m, (batch, heads, tokens), "uint8", strides=[m_batch, m_head, m_token])
        S = T.match_buffer(s, (blocks, state_rows, state_columns), "float32")
        features: T.let[T.int32] = state_rows - extra
        for block in T.thread_binding(blocks, "blockIdx.x"):
            for feature_block in T.thread_binding((state_rows + (_TILE - 1)) // _TILE, "blockIdx.y"):
                for column_block in T.thread_binding((state_columns + (_TILE - 1)) // _TILE, "blockIdx.z"):
                    for thread in T.thread_binding(_THREADS, "threadIdx.x"):
                        ks = T.alloc_buffer((_DEPTH, _TILE), "float32", scope="shared")
                        vs = T.alloc_buffer((_DEPTH, _TILE), "float32", scope="shared")
                        sums = T.alloc_buffer((_DOWN, _ACROSS), "float32", scope="local")
                        head: T.let[T.int32] = T.truncdiv(block, shares)
                        first: T.let[T.int32] = T.truncmod(block, shares) * share
                        for i in T.unroll(_DOWN):
                            for j in T.unroll(_ACROSS):
                                sums[i, j] = T.float32(0)
                        for step in T.serial((share + (_DEPTH - 1)) // _DEPTH):
                            for i in T.serial(_DEPTH // per_pass):
                                row: T.let[T.int32] = i * per_pass + thread // _TILE
                                number: T.let[T.int32] = step * _DEPTH + row
                                token: T.let[T.int32] = T.min(first + number, tokens - 1)
                                is_there: T.let[T.bool] = T.And(number < share, first + number < tokens)
                                stage_code(
                                    ks,
                                    row,
                                    thread % _TILE,
                                    K,
                                    (T.truncdiv(head, heads), T.truncmod(head, heads), token),
                                    feature_block * _TILE + thread % _TILE,
                                    features,
                                    low,
                                )
                                stage_value(
                                    vs,
                                    row,
                                    thread % _TILE,
                                    V,
                                    (T.truncdiv(head, heads), T.truncmod(head, heads), token),
                                    column_block * _TILE + thread % _TILE,
                                    columns,
                                    counts(mask, (T.truncdiv(head, heads), T.truncmod(head, heads), token), is_there),
                                )
                            for inner in T.serial(_DEPTH):
                                for i in T.unroll(_DOWN):
                                    for j in T.unroll(_ACROSS):
                                        _accumulate(
                                            T,
                                            sums,
                                            [i, j],
                                            ks[inner, thread // across * _DOWN + i],
                                            vs[inner, thread % across + j * across],
                                        )
                        for i in T.unroll(_DOWN):
                            for j in T.unroll(_ACROSS):
                                feature: T.let[T.int32] = feature_block * _TILE + thread // across * _DOWN + i
                                column: T.let[T.int32] = column_block * _TILE + thread % across + j * across
                                if T.And(feature < state_rows, column < state_columns):
                                    S[block, feature, column] = sums[i, j]

    return matadd_kv


def build_products(target: CudaTarget, codes: str, dtype: str, attention: bool) -> Any:
    """The function of (q, state [batch * heads, D + a, E + a] float32, low, scale, least row sum, out) with a = 1 for
    attention, else 0. Blocks: tokens of all heads along x, columns along y."""
    from tvm.script import tirx as T

    extra = int(attention)
    across = _TILE // _ACROSS

    def finish(sums: Any, i: Any, j: Any, S: Any, head: Any, column: Any, scale: Any, least: Any) -> Any:
        if not attention:
            return sums[i, j]
        features, columns = S.shape[1] - 1, S.shape[2] - 1
        numerator = sums[i, j] * scale + T.float32(0.5) * S[head, features, column]
        row_sum = sums[i, _ACROSS] * scale + T.float32(0.5) * S[head, features, columns]
        return numerator / T.max(row_sum, least)

    @T.prim_func(s_tir=True)
    def matadd_q(q: T.handle, s: T.handle, low: T.float32, scale: T.float32, least: T.float32, o: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        batch = T.int32()
        heads = T.int32()
        tokens = T.int32()
        width = T.int32()
        columns = T.int32()
        blocks = T.int32()
        state_rows = T.int32()
        state_columns = T.int32()
        q_batch, q_head, q_token = T.int32(), T.int32(), T.int32()
        o_batch, o_head, o_token = T.int32(), T.int32(), T.int32()
        Q = T.match_buffer(q, (batch, heads, tokens, width), codes, strides=[q_batch, q_head, q_token, 1])
        S = T.match_buffer(s, (blocks, state_rows, state_columns), "float32")
        out = T.match_buffer(o, (batch, heads, tokens, columns), dtype, strides=[o_batch, o_head, o_token, 1])
        features: T.let[T.int32] = state_rows - extra
        for block in T.thread_binding(batch * heads * ((tokens + (_TILE - 1)) // _TILE), "blockIdx.x"):
            for column_block in T.thread_binding((columns + (_TILE - 1)) // _TILE, "blockIdx.y"):
                for thread in T.thread_binding(_THREADS, "threadIdx.x"):
                    qs = T.alloc_buffer((_DEPTH, _TILE + _PADDING), "float32", scope="shared")
                    # The last column of the state, which every row sum takes, follows those of the block.
                    ss = T.alloc_buffer((_DEPTH, _TILE + extra), "float32", scope="shared")
                    sums = T.alloc_buffer((_DOWN, _ACROSS + extra), "float32", scope="local")
                    tiles: T.let[T.int32] = T.truncdiv(tokens + (_TILE - 1), _TILE)
                    head: T.let[T.int32] = T.truncdiv(block, tiles)
                    first: T.let[T.int32] = T.truncmod(block, tiles) * _TILE
                    for i in T.unroll(_DOWN):
                        for j in T.unroll(_ACROSS + extra):
                            sums[i, j] = T.float32(0)
                    for step in T.serial((features + (_DEPTH - 1)) // _DEPTH):
                        for i in T.serial(_TILE * _DEPTH // _THREADS):
                            row: T.let[T.int32] = i * (_THREADS // _DEPTH) + thread // _DEPTH
                            feature: T.let[T.int32] = T.min(step * _DEPTH + thread % _DEPTH, features - 1)
                            token: T.let[T.int32] = T.min(first + row, tokens - 1)
                            qs[thread % _DEPTH, row] = _code(
                                T, codes, Q, (T.truncdiv(head, heads), T.truncmod(head, heads), token), feature, low
                            )
                        for i in T.serial(_TILE * _DEPTH // _THREADS):
                            inner: T.let[T.int32] = i * (_THREADS // _TILE) + thread // _TILE
                            of_feature: T.let[T.int32] = step * _DEPTH + inner
                            of_column: T.let[T.int32] = T.min(column_block * _TILE + thread % _TILE, columns - 1)
                            ss[inner, thread % _TILE] = T.Select(
                                of_feature < features,
                                S[head, T.min(of_feature, features - 1), of_column],
                                T.float32(0),
                            )
                        if thread < _DEPTH * extra:
                            ss[thread, _TILE] = T.Select(
                                step * _DEPTH + thread < features,
                                S[head, T.min(step * _DEPTH + thread, features - 1), columns],
                                T.float32(0),
                            )
                        for inner in T.serial(_DEPTH):
                            for i in T.unroll(_DOWN):
                                for j in T.unroll(_ACROSS + extra):
                                    _accumulate(
                                        T,
                                        sums,
                                        [i, j],
                                        qs[inner, thread // across * _DOWN + i],
                                        ss[inner, T.Select(j < _ACROSS, thread % across + j * across, _TILE)],
                                    )
                    for i in T.unroll(_DOWN):
                        for j in T.unroll(_ACROSS):
                            to_token: T.let[T.int32] = first + thread // across * _DOWN + i
                            to_column: T.let[T.int32] = column_block * _TILE + thread % across + j * across
                            if T.And(to_token < tokens, to_column < columns):
                                out[T.truncdiv(head, heads), T.truncmod(head, heads), to_token, to_column] = T.cast(
                                    finish(sums, i, j, S, head, to_column, scale, least), dtype
                                )

    return matadd_q


def _draw(storage: str, *shape: int) -> Tensor:
    from shiftadd3d.kernels.reference.matadd import pack_signs

    x = torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-2]))
    return pack_signs(x) if storage == "uint8" else x.to(getattr(torch, storage))


def _assert_close(found: Tensor, expected: Tensor) -> None:
    rtol, atol = (1e-5, 1e-4) if found.dtype == torch.float32 else (1e-2, 1e-2)
    torch.testing.assert_close(found.cpu(), expected.to(found.dtype), rtol=rtol, atol=atol)


def try_sums(function: CudaFunction, codes: str, dtype: str, masked: bool, attention: bool) -> None:
    """Several shares and heads, more features and columns than a block has, tails of all; and a strided key."""
    from shiftadd3d.kernels.reference.matadd import LOW, decode_signs

    tokens, features, columns = 45, _TILE + 3, _TILE + 5
    k, v = _draw(codes, 1, tokens, 2, features).transpose(1, 2), _draw(dtype, 1, 2, tokens, columns)
    mask = _draw("float32", 1, 2, tokens) > 0 if masked else None
    on_device = k.to(function.device), v.to(function.device), mask if mask is None else mask.to(function.device)
    for name, low in LOW.items():
        found = run_sums(function, *on_device, low, features, attention, shares=2)
        keys, values = decode_signs(k, name, features, torch.float32), v.float()
        if attention:
            keys, values = (F.pad(x, (0, 1), value=1.0) for x in (keys, values))
        if mask is not None:
            values = torch.where(mask.unsqueeze(-1), values, 0)
        _assert_close(found, (keys.mT @ values).flatten(0, 1))


def try_products(function: CudaFunction, codes: str, dtype: str, attention: bool) -> None:
    """Several heads, more tokens and columns than a block has, tails of all; and a strided query."""
    from shiftadd3d.kernels.reference.matadd import LOW, decode_signs

    tokens, features, columns = _TILE + 7, 21, _TILE + 5
    q = _draw(codes, 1, tokens, 2, features).transpose(1, 2)
    state = _draw("float32", 2, features + attention, columns + attention)
    state[..., -1:] = state[..., -1:].abs() + features  # row sums are positive
    for name, low in LOW.items():
        out = torch.zeros(1, 2, tokens, columns, dtype=getattr(torch, dtype), device=function.device)
        run_products(function, q.to(function.device), state.to(function.device), low, features, 0.1, out)
        expected = decode_signs(q, name, features, torch.float32) @ state[:, :features]
        if attention:
            expected = expected / (math.pi * features) + 0.5 * state[:, features:]
            expected = expected[..., :-1] / expected[..., -1:].clamp(min=0.1)
        _assert_close(out, expected)


def sums_variants(target: CudaTarget) -> Iterator[dict[str, Any]]:
    """Values of all dtypes, with signs of features of the same or packed, no mask, for products and attention."""
    for dtype, packed, attention in itertools.product(("float32", "bfloat16", "float16"), (False, True), (False, True)):
        yield {"codes": "uint8" if packed else dtype, "dtype": dtype, "masked": False, "attention": attention}


def products_variants(target: CudaTarget) -> Iterator[dict[str, Any]]:
    """Outcomes of all dtypes, with signs of features of the same or packed, for products and attention."""
    for spec in sums_variants(target):
        yield {name: spec[name] for name in ("codes", "dtype", "attention")}


SUMS = CudaKernel("matadd_kv", build_sums, try_sums, sums_variants)
PRODUCTS = CudaKernel("matadd_q", build_products, try_products, products_variants)


def run_sums(
    function: Callable[..., None],
    k: Tensor,  # [B, H, M, D], or [B, H, M, ceil(D / 8)] uint8
    v: Tensor,  # [B, H, M, E]
    mask: Tensor | None,  # [B, H, M] bool
    low: float,
    features: int,
    attention: bool,
    shares: int,
) -> Tensor:  # [B * H, D + attention, E + attention] float32
    """Call a compiled function, for so many shares of the tokens."""
    batch, heads, tokens, columns = v.shape
    share = -(-tokens // shares)
    state = v.new_empty(batch * heads * shares, features + attention, columns + attention, dtype=torch.float32)
    strides = _strides("k", k) | _strides("v", v)
    if mask is not None:
        strides |= {"mask": mask.view(torch.uint8)} | _strides("m", mask)
    function(
        len(state),
        -(-state.shape[1] // _TILE),
        -(-state.shape[2] // _TILE),
        K=k,
        V=v,
        S=state,
        low=low,
        share=share,
        shares=shares,
        batch=batch,
        heads=heads,
        tokens=tokens,
        width=k.shape[-1],
        columns=columns,
        blocks=len(state),
        state_rows=state.shape[1],
        state_columns=state.shape[2],
        **strides,
    )
    return state if shares == 1 else state.view(batch * heads, shares, *state.shape[1:]).sum(1)


def run_products(
    function: Callable[..., None],
    q: Tensor,  # [B, H, N, D], or [B, H, N, ceil(D / 8)] uint8
    state: Tensor,  # as `run_sums` makes it
    low: float,
    features: int,
    least: float,
    out: Tensor,  # [B, H, N, E]
) -> None:
    """Call a compiled function, which writes into `out`; `least` is that of row sums, in attention."""
    batch, heads, tokens, columns = out.shape
    function(
        batch * heads * -(-tokens // _TILE),
        -(-columns // _TILE),
        Q=q,
        S=state,
        out=out,
        low=low,
        scale=1 / (math.pi * features),
        least=least,
        batch=batch,
        heads=heads,
        tokens=tokens,
        width=q.shape[-1],
        columns=columns,
        blocks=len(state),
        state_rows=state.shape[1],
        state_columns=state.shape[2],
        **_strides("q", q),
        **_strides("o", out),
    )


def _strides(name: str, x: Tensor) -> dict[str, Any]:
    return dict(zip((f"{name}_batch", f"{name}_head", f"{name}_token"), x.stride(), strict=False))


def sums(k: Tensor, v: Tensor, mask: Tensor | None, low: float, features: int, attention: bool) -> Tensor | None:
    """`run_sums` on tensors none of which is empty, or None where the twin has to do."""
    if k.dtype not in STORAGE or v.dtype not in STORAGE or not _fits(SUMS, k, v):
        return None
    spec = {"codes": STORAGE[k.dtype], "dtype": STORAGE[v.dtype], "masked": mask is not None, "attention": attention}
    function = SUMS.function(device=v.device, **spec)
    if function is None:
        return None
    batch, heads, tokens, columns = v.shape
    blocks = batch * heads * -(-features // _TILE) * -(-columns // _TILE)
    wanted = _BLOCKS_A_PROCESSOR * torch.cuda.get_device_properties(v.device).multi_processor_count
    shares = max(1, min(-(-wanted // blocks), tokens // _LEAST_SHARE))
    return run_sums(function, k, v, mask, low, features, attention, shares)


def products(
    q: Tensor, state: Tensor, low: float, features: int, out: Tensor, *, attention: bool, least: float = 0.0
) -> bool:
    """`run_products` on tensors none of which is empty; False where the twin has to do."""
    if q.dtype not in STORAGE or out.dtype not in STORAGE or not _fits(PRODUCTS, q, state, out):
        return False
    spec = {"codes": STORAGE[q.dtype], "dtype": STORAGE[out.dtype], "attention": attention}
    function = PRODUCTS.function(device=out.device, **spec)
    if function is None:
        return False
    run_products(function, q, state, low, features, least, out)
    return True


def _fits(kernel: CudaKernel, *tensors: Tensor) -> bool:
    """Whether offsets within the tensors are such numbers as the kernels have; says so, once, if not."""
    for x in tensors:
        if sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) > MAX_ELEMENTS:
            kernel.decline(f"a tensor of {list(x.shape)} is too large for it")
            return False
    return True
