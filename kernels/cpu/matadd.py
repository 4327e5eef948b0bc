"""MatAdd on CPUs, by tables of sums.

In four columns, a token has one of 16 codes. ``K^T V`` adds each row of values to one of 16 sums, for every four
columns of codes, and takes the columns apart in the end; ``Q S`` looks up, for every four columns, one of the 16 sums
that four rows of S can make. That takes D / 4 additions where an ordinary product takes D multiplications and D
additions (the "method of the four Russians").

Source: Arlazarov et al., "On economical construction of the transitive closure of a directed graph" (1970).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu import bfloat16
from shiftadd3d.kernels.reference.linear_angular import LEAST_ROW_SUM
from shiftadd3d.kernels.reference.matadd import (
    LOW,
    add_attention_twin,
    matadd_kv_twin,
    matadd_q_twin,
    matadd_twin,
    pack_signs,
)
from shiftadd3d.kernels.runtime.kernel import Kernel
from shiftadd3d.kernels.runtime.memory import empty_by_heads
from shiftadd3d.kernels.runtime.targets import CpuTarget

_GROUP = 4  # columns of codes that share a table
_ENTRIES = 1 << _GROUP
_TABLE_BYTES = 32 * 1024  # of all tables that one pass over a block of tokens uses: a first-level cache
_TOKENS = 32  # whose codes are kept between passes
_AHEAD = 64  # tokens to fetch in advance: the hardware does not foresee two alternating streams
_LINE = 64  # bytes of a cache line
STORAGE = {torch.float32: "float32", torch.bfloat16: "int16", torch.uint8: "uint8"}
_DTYPES = {storage: dtype for dtype, storage in STORAGE.items()}


class _Tables:
    """The code that both functions share: a table of 16 rows of `columns` sums for each four columns of codes.

    Columns are taken in chunks, so that the tables of one chunk stay in the first-level cache, and within a chunk by
    vectors, and by shorter ones where the columns end.

    Attributes:
        bytes: of one token's codes.
        width: elements of the tensor that one token's codes are read from.
        groups: tables of a chunk, two for a byte.
    """

    def __init__(self, target: CpuTarget, storage: str, features: int, columns: int) -> None:
        import tvm.script

        self.tirx: Any = tvm.script.tirx
        self.target, self.storage, self.features, self.columns = target, storage, features, columns
        self.lanes = target.lanes
        self.bytes = -(-features // 8)
        self.width = self.bytes if storage == "uint8" else features
        self.groups = 2 * self.bytes
        widest = max(self.lanes, _TABLE_BYTES // (4 * _ENTRIES * self.groups) // self.lanes * self.lanes)
        self.chunk = min(widest, -(-columns // self.lanes) * self.lanes)

    def share(self, number: Any, heads: Any, parts: Any, tokens: Any) -> tuple[Any, Any, Any, Any, Any]:
        """Of a task: batch, head, part, first token, and the one behind the last."""
        T = self.tirx
        # Truncating: TVM takes long to compile divisions that round negative numbers down.
        batch, rest = T.truncdiv(number, heads * parts), T.bind(T.truncmod(number, heads * parts))
        part = T.bind(T.truncmod(rest, parts))
        first, last = T.truncdiv(tokens * part, parts), T.truncdiv(tokens * (part + 1), parts)
        return T.bind(batch), T.bind(T.truncdiv(rest, parts)), part, T.bind(first), T.bind(last)

    def allocate(self) -> Any:
        """[chunks * groups, 16, columns of a chunk] float32."""
        chunks = -(-self.columns // self.chunk)
        return self.tirx.alloc_buffer((chunks * self.groups, _ENTRIES, self.chunk), "float32", align=64)

    def for_each_chunk(self, emit: Callable[[Any, Any, int], None]) -> None:
        """Emit ``emit(first table, first column, columns)``."""
        whole, rest = divmod(self.columns, self.chunk)
        if whole:
            with self.tirx.serial(whole) as number:
                emit(number * self.groups, number * self.chunk, self.chunk)
        if rest:
            emit(whole * self.groups, whole * self.chunk, rest)

    def for_each_group(self, emit: Callable[[Any, int], None]) -> None:
        """Emit ``emit(group, how many of its four columns there are)``."""
        whole = self.features // _GROUP
        if whole:
            with self.tirx.serial(whole) as group:
                emit(group, _GROUP)
        for group in range(whole, self.groups):
            emit(group, max(0, self.features - group * _GROUP))

    def pieces(self, count: int) -> list[tuple[int, int]]:
        """The pieces that `count` columns are worked on in, (first, how many): whole vectors, then shorter ones."""
        pieces, start, width = [], 0, self.lanes
        while start < count:
            while start + width > count:
                width //= 2
            pieces.append((start, width))
            start += width
        return pieces

    def for_each_piece(self, count: int, emit: Callable[[Any, int], None]) -> None:
        """Emit ``emit(first column, columns)`` for each of the pieces, in a loop over the whole vectors."""
        whole = count // self.lanes
        if whole:
            with self.tirx.serial(whole) as number:
                emit(number * self.lanes, self.lanes)
        for start, width in self.pieces(count)[whole:]:
            emit(start, width)

    def at(self, start: Any, width: int) -> Any:
        return start if width == 1 else self.tirx.ramp(start, 1, width)

    def splat(self, x: Any, width: int) -> Any:
        x = self.tirx.float32(x) if isinstance(x, (int, float)) else x
        return x if width == 1 else self.tirx.broadcast(x, width)

    def read_codes(
        self,
        row: Callable[[Any, Any], Any],
        codes: Any,
        count: Any,
        counts: Any = None,
        weight: Callable[[Any], Any] | None = None,
    ) -> None:
        """Store the codes of `count` tokens, packed, into `codes` [tokens, bytes].

        Args:
            row: ``row(token, index)``: elements of a token's features, or of its packed codes.
            counts: [bytes * 8] float32 to add to, for each column, how many tokens have its bit set; each token counts
                ``weight(token)`` times.
        """
        T = self.tirx

        def read(byte: Any, width: int) -> None:
            eight, where = self.at(0, 8), self.at(byte * 8, 8)
            total = T.alloc_buffer((8,), "float32", align=32)
            if weight is not None:
                T.buffer_store(total, counts[where], [eight])
            with T.serial(count) as token:
                code = T.bind(self._code(row, token, byte, width))
                T.buffer_store(codes, code, [token, byte])
                if weight is not None:
                    spread = T.broadcast(T.cast(code, "int32"), 8) >> T.ramp(T.int32(0), 1, 8)
                    bits = T.cast(spread & T.broadcast(T.int32(1), 8), "float32x8")
                    T.buffer_store(total, total[eight] + bits * self.splat(weight(token), 8), [eight])
            if weight is not None:
                T.buffer_store(counts, total[eight], [where])

        whole, rest = divmod(self.features, 8)
        if whole:
            with T.serial(whole) as byte:
                read(byte, 8)
        if rest:
            read(whole, rest)

    def _code(self, row: Callable[[Any, Any], Any], token: Any, byte: Any, width: int) -> Any:
        """One byte of codes (uint8)."""
        T = self.tirx
        if self.storage == "uint8":
            return row(token, byte)

        def features(start: Any, lanes: int) -> Any:
            x = row(token, self.at(start, lanes))
            return bfloat16.widen(x, lanes) if self.storage == "int16" else x

        if width == 8 and "avx2" in self.target.flags:
            signs = T.Select(
                features(8 * byte, 8) >= self.splat(0, 8), T.broadcast(T.int32(-1), 8), T.broadcast(T.int32(0), 8)
            )
            gathered = T.call_llvm_pure_intrin("int32", "llvm.x86.avx.movmsk.ps.256", T.reinterpret("float32x8", signs))
            return T.cast(gathered, "uint8")
        code = T.int32(0)
        for i in range(width):
            code = code | (T.cast(features(8 * byte + i, 1) >= T.float32(0), "int32") << i)
        return T.cast(code, "uint8")

    def entries(self, codes: Any, token: Any, byte: Any) -> list[Any]:
        """Which of the 16 sums of two tables a byte of a token's codes selects (int32)."""
        T = self.tirx
        code = T.bind(T.cast(codes[token, byte], "int32"))
        return [T.bind(code & T.int32(_ENTRIES - 1)), T.bind(code >> T.int32(_GROUP))]

    def fetch(self, buffer: Any, index: list[Any], elements: int) -> None:
        """Ask for a row of memory that will be read soon."""
        T = self.tirx
        size = {"float32": 4, "int16": 2, "uint8": 1}[str(buffer.dtype)]
        for start in range(0, elements, _LINE // size):
            address = T.address_of(buffer[(*index, start)])
            T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, T.int32(0), T.int32(3), T.int32(1)))


def _emit_sums(
    tables: _Tables, dtype: str, K: Any, V: Any, mask: Any, low: Any, state: Any, number: Any, complete: bool
) -> None:
    """One task of ``K^T V``: the sums over one part of the tokens, in state[batch, head, part].

    Shapes: K [B, H, M, D or bytes], V [B, H, M, E], mask [B, H, M] uint8 or None, state [B, H, parts, D, E].
    `complete` adds a row to the state, the sum of all values, and a column, the sum of all codes; the corner counts
    the keys.
    """
    T, at, splat, lanes = tables.tirx, tables.at, tables.splat, tables.lanes
    features, columns = tables.features, tables.columns
    batch, head, part, first, last = tables.share(number, K.shape[1], state.shape[2], K.shape[2])
    sums = tables.allocate()
    packed = T.alloc_buffer((_TOKENS, tables.bytes), "uint8", align=64)
    counts = T.alloc_buffer((tables.bytes * 8,), "float32", align=64)
    present = T.alloc_buffer((1,), "float32", align=4)

    with T.serial(sums.shape[0]) as table, T.serial(_ENTRIES) as entry, T.serial(tables.chunk // lanes) as vector:
        T.buffer_store(sums, splat(0, lanes), [table, entry, at(vector * lanes, lanes)])
    if complete:
        T.buffer_store(present, T.float32(0), [0])
        with T.serial(tables.bytes) as byte:
            T.buffer_store(counts, splat(0, 8), [at(byte * 8, 8)])

    with T.serial(T.truncdiv(last - first + (_TOKENS - 1), T.int64(_TOKENS))) as block:
        begin = T.bind(first + block * _TOKENS)
        count = T.bind(T.min(T.int64(_TOKENS), last - begin))

        def weight(token: Any) -> Any:
            return T.float32(1) if mask is None else T.cast(mask[batch, head, begin + token], "float32")

        def features_of(token: Any, index: Any) -> Any:
            return K[batch, head, begin + token, index]

        tables.read_codes(features_of, packed, count, counts, weight if complete else None)
        if complete:
            with T.serial(count) as token:
                T.buffer_store(present, present[0] + weight(token), [0])

        def add(table: Any, column: Any, chunk: int) -> None:
            with T.serial(count) as token:
                ahead = T.bind(T.min(begin + token + _AHEAD, last - 1))
                tables.fetch(K, [batch, head, ahead], tables.width)
                tables.fetch(V, [batch, head, ahead], columns)
                seen = T.int32(tables.bytes)
                if mask is not None:
                    seen = T.Select(mask[batch, head, begin + token] == T.uint8(0), T.int32(0), seen)
                with T.serial(seen) as byte:
                    for half, entry in enumerate(tables.entries(packed, token, byte)):
                        for start, width in tables.pieces(chunk):
                            value = V[batch, head, begin + token, at(column + start, width)]
                            value = bfloat16.widen(value, width) if dtype == "int16" else value
                            where = [table + byte * 2 + half, entry, at(start, width)]
                            T.buffer_store(sums, sums[tuple(where)] + value, where)

        tables.for_each_chunk(add)

    def take_apart(table: Any, column: Any, chunk: int) -> None:
        def piece(group: Any, present: int, start: Any, width: int) -> None:
            def store(row: Any, x: Any) -> None:
                T.buffer_store(state, x, [batch, head, part, row, at(column + start, width)])

            by_entry = [T.bind(sums[table + group, entry, at(start, width)]) for entry in range(_ENTRIES)]
            # By the lower two bits of an entry, and by the upper two.
            by_pair = [
                [T.bind(_total(by_entry[two::4])) for two in range(4)],
                [T.bind(_total(by_entry[4 * two : 4 * two + 4])) for two in range(4)],
            ]
            for bit in range(present):
                zeros, ones = ([x for i, x in enumerate(by_pair[bit // 2]) if i >> bit % 2 & 1 == v] for v in (0, 1))
                store(group * _GROUP + bit, _total(ones) + splat(low, width) * _total(zeros))
            if complete:
                with T.If(group == 0), T.Then():
                    store(features, _total(by_pair[0]))

        tables.for_each_group(
            lambda group, present: tables.for_each_piece(chunk, partial(piece, group, present)) if present else None
        )

    tables.for_each_chunk(take_apart)
    if complete:
        with T.serial(features) as feature:
            code = counts[feature] + low * (present[0] - counts[feature])
            T.buffer_store(state, code, [batch, head, part, feature, columns])
        T.buffer_store(state, present[0], [batch, head, part, features, columns])


def _emit_products(
    tables: _Tables,
    dtype: str,
    Q: Any,
    state: Any,
    low: Any,
    scale: Any,
    contrast: Any,
    parts: Any,
    out: Any,
    number: Any,
) -> None:
    """One task of ``Q S``, for one of `parts` parts of the tokens, with S the sum of `state` over its parts.

    Shapes: Q [B, H, N, D or bytes], state as `_emit_sums` leaves it, out [B, H, N, E], contrast [H] or None. With a
    `scale`, the state is complete, products are scaled, half of the state's last row is added, and the outcome is
    divided by the row sum, which is what the same does to the state's last column. With a contrast c, sums of codes
    times values count c times, and what they would be if all values were the mean, 1 - c times.
    """
    T, at, splat, lanes = tables.tirx, tables.at, tables.splat, tables.lanes
    features, columns = tables.features, tables.columns
    batch, head, _, first, last = tables.share(number, Q.shape[1], parts, Q.shape[2])
    sums = tables.allocate()
    packed = T.alloc_buffer((_TOKENS, tables.bytes), "uint8", align=64)
    total = T.alloc_buffer((lanes,), "float32", align=64)
    base = T.alloc_buffer((lanes,), "float32", align=64)
    accumulators = T.alloc_buffer((tables.chunk,), "float32", align=64)
    row_sums = T.alloc_buffer((tables.groups, _ENTRIES), "float32", align=64)
    row_sum = T.alloc_buffer((1,), "float32", align=4)
    factors = T.alloc_buffer((_TOKENS,), "float32", align=64)

    def load(row: Any, column: Any, width: int) -> Any:
        """A row of the state, all parts together."""
        where, columns_of_piece = at(0, width), at(column, width)
        T.buffer_store(total, state[batch, head, 0, row, columns_of_piece], [where])
        with T.serial(state.shape[2] - 1) as p:
            T.buffer_store(total, total[where] + state[batch, head, p + 1, row, columns_of_piece], [where])
        return total[where]

    weight = None if contrast is None else T.bind(contrast[head])
    key_sums = T.alloc_buffer((tables.features,), "float32", align=64)  # times what mean values are to be multiplied by
    value_sums = T.alloc_buffer((columns,), "float32", align=64)
    if weight is not None:
        share = T.bind((T.float32(1) - weight) / T.max(load(features, columns, 1), T.float32(1)))
        with T.serial(features) as row:
            T.buffer_store(key_sums, load(row, columns, 1) * share, [row])

        def keep(column: Any, width: int) -> None:
            T.buffer_store(value_sums, load(features, column, width), [at(column, width)])

        tables.for_each_piece(columns, keep)

    def tabulate(
        group: Any, present: int, column: Any, width: int, store: Callable[[int, Any], None], weight: Any
    ) -> None:
        """Store the 16 sums that four rows of the state can make, with the contrast `weight` if it is not None."""
        nothing = splat(0, width)
        factor = 1.0 if scale is None else scale

        def summand(row: Any) -> Any:
            x = load(row, column, width)
            if weight is not None:
                x = x * splat(weight, width) + splat(key_sums[row], width) * value_sums[at(column, width)]
            return T.bind(x * splat(factor, width))

        ones = [summand(group * _GROUP + bit) for bit in range(present)]
        ones += [nothing] * (_GROUP - present)
        zeros = [T.bind(row * splat(low, width)) for row in ones]
        lower, upper = (
            [T.bind((ones if i & 1 else zeros)[b] + (ones if i & 2 else zeros)[b + 1]) for i in range(4)]
            for b in (0, 2)
        )
        if scale is not None:  # half of the last row, in the sums of the first group
            T.buffer_store(base, nothing, [at(0, width)])
            with T.If(group == 0), T.Then():
                T.buffer_store(base, load(features, column, width) * splat(0.5, width), [at(0, width)])
            lower = [T.bind(two + base[at(0, width)]) for two in lower]
        for entry in range(_ENTRIES):
            store(entry, lower[entry % 4] + upper[entry // 4])

    def tabulate_chunk(table: Any, column: Any, chunk: int) -> None:
        def piece(group: Any, present: int, start: Any, width: int) -> None:
            def store(entry: int, x: Any) -> None:
                T.buffer_store(sums, x, [table + group, entry, at(start, width)])

            tabulate(group, present, column + start, width, store, weight)

        tables.for_each_group(lambda group, present: tables.for_each_piece(chunk, partial(piece, group, present)))

    def tabulate_row_sums(group: Any, present: int) -> None:
        tabulate(group, present, columns, 1, lambda entry, x: T.buffer_store(row_sums, x, [group, entry]), None)

    tables.for_each_chunk(tabulate_chunk)
    if scale is not None:
        tables.for_each_group(tabulate_row_sums)

    with T.serial(T.truncdiv(last - first + (_TOKENS - 1), T.int64(_TOKENS))) as block:
        begin = T.bind(first + block * _TOKENS)
        count = T.bind(T.min(T.int64(_TOKENS), last - begin))
        tables.read_codes(lambda token, index: Q[batch, head, begin + token, index], packed, count)
        if scale is not None:
            with T.serial(count) as token:
                T.buffer_store(row_sum, T.float32(0), [0])
                with T.serial(tables.bytes) as byte:
                    both = [row_sums[byte * 2 + i, e] for i, e in enumerate(tables.entries(packed, token, byte))]
                    T.buffer_store(row_sum, row_sum[0] + _total(both), [0])
                T.buffer_store(factors, T.float32(1) / T.max(row_sum[0], T.float32(LEAST_ROW_SUM)), [token])

        def look_up(table: Any, column: Any, chunk: int) -> None:
            pieces = tables.pieces(chunk)
            with T.serial(count) as token:
                ahead = T.bind(T.min(begin + token + _AHEAD, last - 1))
                tables.fetch(Q, [batch, head, ahead], tables.width)
                for start, width in pieces:
                    T.buffer_store(accumulators, splat(0, width), [at(start, width)])
                with T.serial(tables.bytes) as byte:
                    entries = tables.entries(packed, token, byte)
                    for start, width in pieces:
                        where = at(start, width)
                        both = [sums[table + byte * 2 + i, entry, where] for i, entry in enumerate(entries)]
                        T.buffer_store(accumulators, accumulators[where] + _total(both), [where])
                for start, width in pieces:
                    y = accumulators[at(start, width)]
                    y = y * splat(factors[token], width) if scale is not None else y
                    y = bfloat16.narrow(y, width) if dtype == "int16" else y
                    T.buffer_store(out, y, [batch, head, begin + token, at(column + start, width)])

        tables.for_each_chunk(look_up)


def _build_sums(target: CpuTarget, *, codes: str, dtype: str, features: int, columns: int, masked: bool) -> Any:
    """The function ``(k, v, mask, low, state)``; see `_emit_sums`. It does not look at a mask unless `masked`."""
    from tvm.script import tirx as T

    tables = _Tables(target, codes, features, columns)

    @T.prim_func(s_tir=True)
    def matadd_kv(k: T.handle, v: T.handle, m: T.handle, low: T.float32, s: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        B = T.int64()
        H = T.int64()
        M = T.int64()
        P = T.int64()
        K = T.match_buffer(k, (B, H, M, tables.width), codes, strides=[*_strides(T), 1], align=1)
        V = T.match_buffer(v, (B, H, M, columns), dtype, strides=[*_strides(T), 1], align=1)
        mask = T.match_buffer(m, _strides(T), "uint8", strides=_strides(T), align=1)
        state = T.match_buffer(s, (B, H, P, features, columns), "float32", align=4)
        for number in T.parallel(B * H * P):
            _emit_sums(tables, dtype, K, V, mask if masked else None, low, state, number, complete=False)

    return matadd_kv


def _build_products(target: CpuTarget, *, codes: str, dtype: str, features: int, columns: int) -> Any:
    """The function ``(q, state, low, parts, out)``; see `_emit_products`."""
    from tvm.script import tirx as T

    tables = _Tables(target, codes, features, columns)

    @T.prim_func(s_tir=True)
    def matadd_q(q: T.handle, s: T.handle, low: T.float32, parts: T.int64, o: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        B = T.int64()
        H = T.int64()
        N = T.int64()
        P = T.int64()
        Q = T.match_buffer(q, (B, H, N, tables.width), codes, strides=[*_strides(T), 1], align=1)
        state = T.match_buffer(s, (B, H, P, features, columns), "float32", strides=[*_strides(T), columns, 1], align=4)
        out = T.match_buffer(o, (B, H, N, columns), dtype, strides=[*_strides(T), 1], align=1)
        for number in T.parallel(B * H * parts):
            _emit_products(tables, dtype, Q, state, low, None, None, parts, out, number)

    return matadd_q


def _build_matadd(
    target: CpuTarget,
    *,
    codes: str,
    key_codes: str,
    dtype: str,
    features: int,
    columns: int,
    masked: bool,
    attention: bool,
    contrasted: bool,
) -> Any:
    """The function ``(q, k, v, mask, contrast, low, scale, parts of q, parts of k, out)``: both products in a row."""
    from tvm.script import tirx as T

    query_tables = _Tables(target, codes, features, columns)
    key_tables = _Tables(target, key_codes, features, columns)

    @T.prim_func(s_tir=True)
    def matadd(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        m: T.handle,
        c: T.handle,
        low: T.float32,
        scale: T.float32,
        query_parts: T.int64,
        key_parts: T.int64,
        o: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        B = T.int64()
        H = T.int64()
        N = T.int64()
        M = T.int64()
        Q = T.match_buffer(q, (B, H, N, query_tables.width), codes, strides=[*_strides(T), 1], align=1)
        K = T.match_buffer(k, (B, H, M, key_tables.width), key_codes, strides=[*_strides(T), 1], align=1)
        V = T.match_buffer(v, (B, H, M, columns), dtype, strides=[*_strides(T), 1], align=1)
        mask = T.match_buffer(m, _strides(T), "uint8", strides=_strides(T), align=1)
        contrast = T.match_buffer(c, (T.int64(),), "float32", align=4)
        out = T.match_buffer(o, (B, H, N, columns), dtype, strides=[*_strides(T), 1], align=1)
        state = T.alloc_buffer((B, H, key_parts, features + attention, columns + attention), "float32", align=64)
        for number in T.parallel(B * H * key_parts):
            _emit_sums(key_tables, dtype, K, V, mask if masked else None, low, state, number, attention)
        for number in T.parallel(B * H * query_parts):
            _emit_products(
                query_tables,
                dtype,
                Q,
                state,
                low,
                scale if attention else None,
                contrast if contrasted else None,
                query_parts,
                out,
                number,
            )

    return matadd


def _strides(T: Any) -> list[Any]:
    return [T.int64(), T.int64(), T.int64()]


def _total(terms: list[Any]) -> Any:
    """The sum of a few expressions, pairs first."""
    while len(terms) > 1:
        terms = [sum(terms[i + 1 : i + 2], terms[i]) for i in range(0, len(terms), 2)]
    return terms[0]


def _draw(storage: str, *shape: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-2]))
    return pack_signs(x) if storage == "uint8" else x.to(_DTYPES[storage])


def _assert_close(found: Tensor, expected: Tensor) -> None:
    rtol, atol = (1e-2, 1e-2) if found.dtype == torch.bfloat16 else (1e-5, 1e-4)
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=rtol, atol=atol)


def _try_sums(function: Any, *, codes: str, dtype: str, features: int, columns: int, masked: bool) -> None:
    k, v = _draw(codes, 1, 2, 45, features), _draw(dtype, 1, 2, 45, columns)
    mask = _draw("float32", 1, 2, 45) > 0 if masked else None
    for name in LOW:
        found = run_sums(function, k, v, mask, name, features)
        _assert_close(found, matadd_kv_twin(k, v.float(), mask, name, features))


def _try_products(function: Any, *, codes: str, dtype: str, features: int, columns: int) -> None:
    q, kv = _draw(codes, 1, 2, 45, features), _draw(dtype, 1, 2, features, columns)
    for name in LOW:
        _assert_close(run_products(function, q, kv, name), matadd_q_twin(q, kv.float(), name))


def _try_matadd(
    function: Any,
    *,
    codes: str,
    key_codes: str,
    dtype: str,
    features: int,
    columns: int,
    masked: bool,
    attention: bool,
    contrasted: bool,
) -> None:
    q, k, v = _draw(codes, 1, 2, 45, features), _draw(key_codes, 1, 2, 70, features), _draw(dtype, 1, 2, 70, columns)
    mask = _draw("float32", 1, 2, 70) > 0 if masked else None
    contrast = torch.tensor([0.5, 16.0]) if contrasted else None
    for name in LOW:
        arguments = mask, name, features
        found = run_matadd(function, q, k, v, *arguments, contrast)
        expected = (
            add_attention_twin(q, k, v.float(), *arguments, contrast)
            if attention
            else matadd_twin(q, k, v.float(), *arguments)
        )
        _assert_close(found, expected)


_HEAD_DIMS = (16, 32, 64)


def _variants(**spec: Any) -> Callable[[CpuTarget], list[dict[str, Any]]]:
    return lambda target: [{**spec, "features": width, "columns": width} for width in _HEAD_DIMS]


_FLOATS = {"codes": "float32", "dtype": "float32"}
SUMS = Kernel("matadd_kv", _build_sums, _try_sums, _variants(**_FLOATS, masked=False))
PRODUCTS = Kernel("matadd_q", _build_products, _try_products, _variants(**_FLOATS))

MATADD = Kernel(
    "matadd",
    _build_matadd,
    _try_matadd,
    _variants(**_FLOATS, key_codes="float32", masked=False, attention=True, contrasted=True),
)

_NO_MASK = torch.zeros(1, 1, 1, dtype=torch.uint8)
_NO_CONTRAST = torch.ones(1)


def run_sums(function: Any, k: Tensor, v: Tensor, mask: Tensor | None, codes: str, features: int) -> Tensor:
    """[B, H, D, E] float32."""
    batch, heads, tokens, columns = v.shape
    state = torch.empty(batch, heads, _parts(batch * heads, tokens), features, columns)
    function(_stored(k), _stored(v), _stored(mask), LOW[codes], state)
    return state.sum(2) if state.shape[2] > 1 else state.squeeze(2)


def run_products(function: Any, q: Tensor, kv: Tensor, codes: str) -> Tensor:
    """[B, H, N, E] in the dtype of kv."""
    batch, heads, tokens, _ = q.shape
    out = empty_by_heads(q, kv)
    state = kv.float().contiguous().unsqueeze(2)
    function(_stored(q), state, LOW[codes], _parts(batch * heads, tokens), _stored(out))
    return out


def run_matadd(
    function: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    codes: str,
    features: int,
    contrast: Tensor | None,
) -> Tensor:
    """[B, H, N, E] in the dtype of v."""
    batch, heads, tokens, _ = q.shape
    parts = _parts(batch * heads, tokens), _parts(batch * heads, k.shape[2])
    out = empty_by_heads(q, v)
    scale = 1 / (math.pi * features)
    contrast = _NO_CONTRAST if contrast is None else contrast.float().contiguous()
    function(_stored(q), _stored(k), _stored(v), _stored(mask), contrast, LOW[codes], scale, *parts, _stored(out))
    return out


def _parts(batch_heads: int, tokens: int) -> int:
    """Tasks that each batch and head is split into, so that threads have equally many; one if there are many anyway."""
    threads = torch.get_num_threads()
    if threads == 1 or batch_heads >= 8 * threads or tokens < 2 * _TOKENS:
        return 1
    return threads // math.gcd(batch_heads, threads)


def _stored(x: Tensor | None) -> Tensor:
    """What a compiled function takes: bfloat16 as bits, a mask as bytes."""
    if x is None:
        return _NO_MASK
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16)
    return x.view(torch.uint8) if x.dtype == torch.bool else x
