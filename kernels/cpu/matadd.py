"""MatAdd and add attention on CPUs: products of queries and keys that are signs, so that all they take is additions.

With q and k codes of 1 and `low` (-1 or 0), s the scale, c the contrast, n the number of keys, and a sum over keys::

    S = K^T V                                                          matadd_kv
    out = Q S                                                          matadd_q
    out = Q (K^T V)                                                    matadd
    out = (s Q S' + 1/2 sum v) / max(s Q sum k + n / 2, LEAST_ROW_SUM)     matadd, as add attention
    S' = c K^T V + (1 - c) (sum k) (sum v) / n

`sign_tables` has the products, `matadd_calls` what runs and tries these functions. Each task takes a part of the tokens
of one head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shiftadd3d.kernels.cpu.matadd_calls import SignSpec, try_matadd, try_products, try_sums
from shiftadd3d.kernels.cpu.sign_tables import Products, Tables, emit_sums
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Kernel, Spec, SpecValue, by_name
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr


def _rows(name: str, batch_heads_tokens: Sequence[Expr], width: int, dtype: str) -> Buffer:
    """The next argument [B, H, tokens, width], only its rows contiguous."""
    return T.argument(name, (*batch_heads_tokens, width), dtype, strides=[*T.sizes(3), 1], align=1)


def _mask() -> Buffer:
    return T.argument("mask", T.sizes(3), "uint8", strides=T.sizes(3))


def _build_sums(target: CpuTarget, spec: SignSpec) -> T.PrimFunc:
    """The function ``(k, v, mask, low, S by parts of the keys)``. It does not look at a mask unless `masked`."""
    tables = Tables(target, spec.codes, spec.features, spec.columns)
    with T.function("matadd_kv") as function:
        B, H, M, parts = T.sizes(4)
        k, v = _rows("k", (B, H, M), tables.width, spec.codes), _rows("v", (B, H, M), spec.columns, spec.dtype)
        mask, low = _mask(), T.scalar("low", "float32")
        state = T.argument("state", (B, H, parts, spec.features, spec.columns))
        with T.parallel(B * H * parts) as task:
            emit_sums(tables, k, v, mask if spec.masked else None, low, state, task, complete=False)
    return function.get()


def _build_products(target: CpuTarget, spec: SignSpec) -> T.PrimFunc:
    """The function ``(q, S, low, parts of the queries, out)``."""
    tables = Tables(target, spec.codes, spec.features, spec.columns)
    with T.function("matadd_q") as function:
        B, H, N, parts_of_state = T.sizes(4)
        q = _rows("q", (B, H, N), tables.width, spec.codes)
        shape = B, H, parts_of_state, spec.features, spec.columns
        state = T.argument("state", shape, strides=[*T.sizes(3), spec.columns, 1])
        low, parts = T.scalar("low", "float32"), T.scalar("parts")
        out = _rows("out", (B, H, N), spec.columns, spec.dtype)
        with T.parallel(B * H * parts) as task:
            Products(tables, q, state, low, None, None, out, task, parts).emit()
    return function.get()


def _build_matadd(target: CpuTarget, spec: SignSpec) -> T.PrimFunc:
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


def _variants(**spec: SpecValue) -> Callable[[CpuTarget], list[Spec]]:
    return lambda target: [{**spec, "features": width, "columns": width} for width in (16, 32, 64)]  # of a head


_FLOATS: Spec = {"codes": "float32", "dtype": "float32"}
_ATTENTION: Spec = {**_FLOATS, "key_codes": "float32", "masked": False, "attention": True, "contrasted": True}
SUMS = Kernel(
    "matadd_kv", by_name(SignSpec, _build_sums), by_name(SignSpec, try_sums), _variants(**_FLOATS, masked=False)
)
PRODUCTS = Kernel("matadd_q", by_name(SignSpec, _build_products), by_name(SignSpec, try_products), _variants(**_FLOATS))
MATADD = Kernel("matadd", by_name(SignSpec, _build_matadd), by_name(SignSpec, try_matadd), _variants(**_ATTENTION))
