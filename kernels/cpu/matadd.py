"""MatAdd and add attention on CPUs: products of queries and keys that are signs, so that all they take is additions.

With q and k codes of 1 and `low` (-1 or 0), s the scale, c the contrast, n the number of keys, and a sum over keys::

    S = K^T V                                                          matadd_kv
    out = Q S                                                          matadd_q
    out = Q (K^T V)                                                    matadd
    out = (s Q S' + 1/2 sum v) / max(s Q sum k + n / 2, LEAST_ROW_SUM)     matadd, as add attention
    S' = c K^T V + (1 - c) (sum k) (sum v) / n

`sign_tables` has the products. Each task takes a part of the tokens of one head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.sign_tables import TOKENS, Products, Tables, emit_sums
from shiftadd3d.kernels.reference.matadd import (
    LOW,
    AddAttention,
    Codes,
    MatAddKV,
    MatAddQ,
    add_attention_twin,
    features_of,
    matadd_kv_twin,
    matadd_q_twin,
)
from shiftadd3d.kernels.reference.trials import Draw, assert_close
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, Spec, SpecValue, by_name
from shiftadd3d.kernels.runtime.memory import DTYPES, empty_by_heads, stored
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr

CODES: dict[torch.dtype, str] = {**DTYPES, torch.uint8: "uint8"}
"""What kernels call the dtypes that signs are taken of; those of uint8 are packed."""


def _rows(name: str, batch_heads_tokens: Sequence[Expr], width: int, dtype: str) -> Buffer:
    """The next argument [B, H, tokens, width], only its rows contiguous."""
    return T.argument(name, (*batch_heads_tokens, width), dtype, strides=[*T.sizes(3), 1], align=1)


def _mask() -> Buffer:
    return T.argument("mask", T.sizes(3), "uint8", strides=T.sizes(3))


def _build_sums(target: CpuTarget, *, codes: str, dtype: str, features: int, columns: int, masked: bool) -> T.PrimFunc:
    """The function ``(k, v, mask, low, S by parts of the keys)``. It does not look at a mask unless `masked`."""
    tables = Tables(target, codes, features, columns)
    with T.function("matadd_kv") as function:
        B, H, M, parts = T.sizes(4)
        k, v = _rows("k", (B, H, M), tables.width, codes), _rows("v", (B, H, M), columns, dtype)
        mask, low = _mask(), T.scalar("low", "float32")
        state = T.argument("state", (B, H, parts, features, columns))
        with T.parallel(B * H * parts) as task:
            emit_sums(tables, k, v, mask if masked else None, low, state, task, complete=False)
    return function.get()


def _build_products(target: CpuTarget, *, codes: str, dtype: str, features: int, columns: int) -> T.PrimFunc:
    """The function ``(q, S, low, parts of the queries, out)``."""
    tables = Tables(target, codes, features, columns)
    with T.function("matadd_q") as function:
        B, H, N, parts_of_state = T.sizes(4)
        q = _rows("q", (B, H, N), tables.width, codes)
        shape = B, H, parts_of_state, features, columns
        state = T.argument("state", shape, strides=[*T.sizes(3), columns, 1])
        low, parts = T.scalar("low", "float32"), T.scalar("parts")
        out = _rows("out", (B, H, N), columns, dtype)
        with T.parallel(B * H * parts) as task:
            Products(tables, q, state, low, None, None, out, task, parts).emit()
    return function.get()


class _Spec(NamedTuple):
    """What is compiled in: dtypes (see `CODES`), widths of heads, and whether there are a mask, a scale, a contrast."""

    codes: str
    key_codes: str
    dtype: str
    features: int
    columns: int
    masked: bool
    attention: bool
    contrasted: bool


def _build_matadd(target: CpuTarget, spec: _Spec) -> T.PrimFunc:
    """The function ``(q, k, v, mask, contrast, low, scale, parts of q, parts of k, out)``: both products in a row."""
    of_queries, of_keys = (Tables(target, codes, spec.features, spec.columns) for codes in (spec.codes, spec.key_codes))
    with T.function("matadd") as function:
        B, H, N, M = T.sizes(4)
        q = _rows("q", (B, H, N), of_queries.width, spec.codes)
        k = _rows("k", (B, H, M), of_keys.width, spec.key_codes)
        v, mask = _rows("v", (B, H, M), spec.columns, spec.dtype), _mask()
        contrast = T.argument("contrast", T.sizes(1))
        low, scale = T.scalar("low", "float32"), T.scalar("scale", "float32")
        query_parts, key_parts = T.scalar("query_parts"), T.scalar("key_parts")
        out = _rows("out", (B, H, N), spec.columns, spec.dtype)
        state = T.alloc(B, H, key_parts, spec.features + spec.attention, spec.columns + spec.attention)
        with T.parallel(B * H * key_parts) as task:
            seen = mask if spec.masked else None
            emit_sums(of_keys, k, v, seen, low, state, task, complete=spec.attention)
        with T.parallel(B * H * query_parts) as task:
            scaled, contrasted = scale if spec.attention else None, contrast if spec.contrasted else None
            Products(of_queries, q, state, low, scaled, contrasted, out, task, query_parts).emit()
    return function.get()


def _try_sums(function: Compiled, *, codes: str, dtype: str, features: int, columns: int, masked: bool) -> None:
    draw = Draw()
    k, v = draw.signs(codes, 1, 2, 45, features), draw.normal(1, 2, 45, columns, dtype=dtype)
    mask = draw.normal(1, 2, 45) > 0 if masked else None
    for name in get_args(Codes):
        given = MatAddKV(k, v, mask, name, features)
        assert_close(sums(given, function), matadd_kv_twin(*given._replace(v=v.float())))


def _try_products(function: Compiled, *, codes: str, dtype: str, features: int, columns: int) -> None:
    draw = Draw()
    q, kv = draw.signs(codes, 1, 2, 45, features), draw.normal(1, 2, features, columns, dtype=dtype)
    for name in get_args(Codes):
        assert_close(products(MatAddQ(q, kv, name), function), matadd_q_twin(q, kv.float(), name))


def _try_matadd(function: Compiled, spec: _Spec) -> None:
    draw = Draw()
    q, k = draw.signs(spec.codes, 1, 2, 45, spec.features), draw.signs(spec.key_codes, 1, 2, 70, spec.features)
    v = draw.normal(1, 2, 70, spec.columns, dtype=spec.dtype)
    mask = draw.normal(1, 2, 70) > 0 if spec.masked else None
    contrast = torch.tensor([0.5, 16.0]) if spec.contrasted else None
    for name in get_args(Codes):
        given = AddAttention(q, k, v, mask, name, spec.features, contrast, spec.attention)
        assert_close(attend(given, function), add_attention_twin(*given._replace(v=v.float())))


def _variants(**spec: SpecValue) -> Callable[[CpuTarget], list[Spec]]:
    return lambda target: [{**spec, "features": width, "columns": width} for width in (16, 32, 64)]  # of a head


_FLOATS: Spec = {"codes": "float32", "dtype": "float32"}
_ATTENTION: Spec = {**_FLOATS, "key_codes": "float32", "masked": False, "attention": True, "contrasted": True}
SUMS = Kernel("matadd_kv", _build_sums, _try_sums, _variants(**_FLOATS, masked=False))
PRODUCTS = Kernel("matadd_q", _build_products, _try_products, _variants(**_FLOATS))
MATADD = Kernel("matadd", by_name(_Spec, _build_matadd), by_name(_Spec, _try_matadd), _variants(**_ATTENTION))

_NO_MASK = torch.zeros(1, 1, 1, dtype=torch.uint8)
_NO_CONTRAST = torch.ones(1)


def sums(given: MatAddKV, function: Compiled | None = None) -> Tensor | None:
    """``K^T V`` of heads, [B, H, D, E] float32, by that function; by default the one for the case, if there is one."""
    k, v, mask, codes, _ = given
    (batch, heads, tokens, columns), features = v.shape, features_of(k, given.features)
    function = function or _function(SUMS, current(), v.dtype, (k.dtype,), features, columns, mask is not None)
    if function is None:
        return None
    state = torch.empty(batch, heads, _parts(batch * heads, tokens), features, columns)
    function(stored(k), stored(v), stored(_NO_MASK if mask is None else mask), LOW[codes], state)
    return state.sum(2) if state.shape[2] > 1 else state.squeeze(2)


def products(given: MatAddQ, function: Compiled | None = None) -> Tensor | None:
    """``Q S`` of heads, [B, H, N, E]; likewise."""
    q, kv, codes = given
    function = function or _function(PRODUCTS, current(), kv.dtype, (q.dtype,), *kv.shape[-2:])
    if function is None:
        return None
    out, parts = empty_by_heads(q, kv), _parts(q.shape[0] * q.shape[1], q.shape[2])
    function(stored(q), kv.float().contiguous().unsqueeze(2), LOW[codes], parts, stored(out))
    return out


def attend(given: AddAttention, function: Compiled | None = None) -> Tensor | None:
    """Both in a row, [B, H, N, E]; likewise."""
    q, k, v, mask, codes, _, contrast, attention = given
    features = features_of(k, given.features)
    if function is None:
        flags = mask is not None, attention, contrast is not None
        function = _function(MATADD, current(), v.dtype, (q.dtype, k.dtype), features, v.shape[-1], *flags)
    if function is None:
        return None
    batch_heads = q.shape[0] * q.shape[1]
    parts = _parts(batch_heads, q.shape[2]), _parts(batch_heads, k.shape[2])
    out, scale = empty_by_heads(q, v), 1 / (math.pi * features)
    mask = _NO_MASK if mask is None else mask
    contrast = _NO_CONTRAST if contrast is None else contrast.float().contiguous()
    function(stored(q), stored(k), stored(v), stored(mask), contrast, LOW[codes], scale, *parts, stored(out))
    return out


@cache
def _function(
    kernel: Kernel,
    target: CpuTarget,  # this process's
    values: torch.dtype,
    signs: tuple[torch.dtype, ...],
    features: int,
    columns: int,
    *flags: bool,
) -> Compiled | None:
    """The compiled function for values and signs of such dtypes, found quickly."""
    if values not in DTYPES or any(dtype not in CODES for dtype in signs):
        return None
    codes = zip(("codes", "key_codes"), (CODES[dtype] for dtype in signs), strict=False)
    spec: Spec = {**dict(codes), **dict(zip(("masked", "attention", "contrasted"), flags, strict=False))}
    return kernel.function(**spec, dtype=CODES[values], features=features, columns=columns)


def _parts(batch_heads: int, tokens: int) -> int:
    """Tasks that each batch and head is split into, so that threads have equally many; one if there are many anyway."""
    threads = torch.get_num_threads()
    if threads == 1 or batch_heads >= 8 * threads or tokens < 2 * TOKENS:
        return 1
    return threads // math.gcd(batch_heads, threads)
