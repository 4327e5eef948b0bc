"""MatAdd: products with binary codes, as additions only.

In four columns, a token has one of 16 codes. ``K^T V`` adds each row of values to one of 16 sums, for every four
columns of codes, and takes the columns apart in the end; ``Q S`` looks up, for every four columns, one of the 16 sums
that four rows of S can make. That takes D / 4 additions where an ordinary product takes D multiplications and D
additions (the "method of the four Russians"). Codes are the signs of features, taken as these are read, or come
packed, a bit each.

Accuracy: results differ from the twins' by the order of summation only, whatever the numerics; bfloat16 is summed in
float32. Infinity and NaN propagate as in a matmul, except that a masked key takes no part at all.

Gradients: `matadd_kv` and `matadd_q` have those with respect to values and sums, each the other one's product. Codes
are constants here; training differentiates `shiftadd3d.nn.binarize`. `matadd` and `add_attention` are for inference.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2; Arlazarov et al., "On economical construction of the
transitive closure of a directed graph" (1970), for the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels import bfloat16, cuda_matadd, targets
from shiftadd3d.kernels.kernel import Kernel, define_op
from shiftadd3d.kernels.numerics import get_numerics
from shiftadd3d.kernels.targets import CpuTarget

# The number that a cleared bit stands for; a set one stands for 1.
LOW = {"pm1": -1.0, "01": 0.0}

# Similarities of linear-angular attention are at least 1/2 - 1/pi = 0.18, so a row sum below this has no key at all.
LEAST_ROW_SUM = 0.1

_GROUP = 4  # columns of codes that share a table
_ENTRIES = 1 << _GROUP
_TABLE_BYTES = 32 * 1024  # of all tables that one pass over a block of tokens uses: a first-level cache
_TOKENS = 32  # whose codes are kept between passes
_AHEAD = 64  # tokens to fetch in advance: the hardware does not foresee two alternating streams
_LINE = 64  # bytes of a cache line

_STORAGE = {torch.float32: "float32", torch.bfloat16: "int16", torch.uint8: "uint8"}
_DTYPES = {storage: dtype for dtype, storage in _STORAGE.items()}


# --------------------------------------------------------------------------------------------------------------------
# What layers call
# --------------------------------------------------------------------------------------------------------------------


def matadd_kv(
    k: Tensor,  # [*, M, D], or [*, M, ceil(D / 8)] uint8
    v: Tensor,  # [*, M, E]
    mask: Tensor | None = None,  # [*, M] bool
    codes: str = "pm1",
    features: int | None = None,
) -> Tensor:  # [*, D, E]
    """``K^T V`` with K the codes of features k.

    Args:
        k: features in any floating dtype, of which the signs count (either zero is positive, NaN negative), or the
            outcome of `pack_signs`.
        v: values. Compiled code serves float32 and bfloat16; the twin, everything else.
        mask: True where a key counts; dimensions may be 1 to repeat. The values of other keys are not even read.
        codes: what the signs stand for, "pm1" for +1 and -1, "01" for 1 and 0.
        features: D, where k is packed and D is not a multiple of 8.

    Raises:
        UserError: for arguments that do not go together.
    """
    if get_numerics() == "twin":
        return matadd_kv_twin(k, v, mask, codes, features)
    return _kv_op(k, v, mask, codes, features)


def matadd_q(
    q: Tensor,  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    kv: Tensor,  # [*, D, E]
    codes: str = "pm1",
) -> Tensor:  # [*, N, E]
    """``Q S`` with Q the codes of features q and S = kv; arguments as those of `matadd_kv`."""
    if get_numerics() == "twin":
        return matadd_q_twin(q, kv, codes)
    return _q_op(q, kv, codes)


def matadd(
    q: Tensor,  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    k: Tensor,  # [*, M, D], or [*, M, ceil(D / 8)] uint8
    v: Tensor,  # [*, M, E]
    mask: Tensor | None = None,  # [*, M] bool
    codes: str = "pm1",
    features: int | None = None,
) -> Tensor:  # [*, N, E]
    """``Q (K^T V)`` with Q and K the codes of features q and k; arguments as those of `matadd_kv`.

    q, k and v [B, H, tokens, width] are read where they are, whatever their strides. Where q has its heads side by
    side in memory, as a projection leaves them, so has the outcome.
    """
    if get_numerics() == "twin":
        return matadd_twin(q, k, v, mask, codes, features)
    return _matadd_op(q, k, v, mask, codes, features)


def add_attention(
    q: Tensor,  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    k: Tensor,  # [*, M, D], or [*, M, ceil(D / 8)] uint8
    v: Tensor,  # [*, M, E]
    mask: Tensor | None = None,  # [*, M] bool
    codes: str = "pm1",
    features: int | None = None,
    contrast: Tensor | None = None,  # [H]
) -> Tensor:  # [*, N, E]
    """Linear-angular attention of binary codes, in linear order; arguments and memory as those of `matadd`.

    ``out_i = sum_j s_ij v_j / sum_j s_ij`` with ``s_ij = 1/2 + q_i . k_j / (pi D)``, q and k being codes. A query
    that sees no key gives zeros.

    Args:
        contrast: for each head, the dimension before the last two, what the difference of an outcome to the mean of the
            values is multiplied by. It costs next to nothing: ``K^T V`` takes it on, by an outer product.
    """
    if get_numerics() == "twin":
        return add_attention_twin(q, k, v, mask, codes, features, contrast)
    return _attention_op(q, k, v, mask, codes, features, contrast)


# --------------------------------------------------------------------------------------------------------------------
# Twins
# --------------------------------------------------------------------------------------------------------------------


def pack_signs(x: Tensor) -> Tensor:
    """The signs of [*, D] features, a bit each: [*, ceil(D / 8)] uint8, bit i of byte j set where x[8 j + i] >= 0."""
    bits = torch.nn.functional.pad((x >= 0).to(torch.uint8), (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(-1, dtype=torch.uint8)


def decode_signs(x: Tensor, codes: str, features: int, dtype: torch.dtype) -> Tensor:
    """Codes [*, features] as numbers, of features or of what `pack_signs` makes of them."""
    if x.dtype == torch.uint8:
        number = torch.arange(8, dtype=torch.uint8, device=x.device)
        bits = ((x.unsqueeze(-1) >> number) & 1).flatten(-2)[..., :features].bool()
    else:
        bits = x >= 0
    return torch.where(bits, 1.0, LOW[codes]).to(dtype)


def matadd_kv_twin(
    k: Tensor,  # [*, M, D], or [*, M, ceil(D / 8)] uint8
    v: Tensor,  # [*, M, E]
    mask: Tensor | None = None,  # [*, M] bool
    codes: str = "pm1",
    features: int | None = None,
) -> Tensor:  # [*, D, E]
    """What `matadd_kv` computes, in plain torch."""
    features = _check(k, v, mask, codes, features)
    if mask is not None:
        v = torch.where(mask.unsqueeze(-1), v, 0)
    return decode_signs(k, codes, features, v.dtype).mT @ v


def matadd_q_twin(
    q: Tensor,  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    kv: Tensor,  # [*, D, E]
    codes: str = "pm1",
) -> Tensor:  # [*, N, E]
    """What `matadd_q` computes, in plain torch."""
    _check(q, kv, None, codes, kv.shape[-2], rows=False)
    return decode_signs(q, codes, kv.shape[-2], kv.dtype) @ kv


def matadd_twin(
    q: Tensor,  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    k: Tensor,  # [*, M, D], or [*, M, ceil(D / 8)] uint8
    v: Tensor,  # [*, M, E]
    mask: Tensor | None = None,  # [*, M] bool
    codes: str = "pm1",
    features: int | None = None,
) -> Tensor:  # [*, N, E]
    """What `matadd` computes, in plain torch."""
    return matadd_q_twin(q, matadd_kv_twin(k, v, mask, codes, features), codes)


def add_attention_twin(
    q: Tensor,  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    k: Tensor,  # [*, M, D], or [*, M, ceil(D / 8)] uint8
    v: Tensor,  # [*, M, E]
    mask: Tensor | None = None,  # [*, M] bool
    codes: str = "pm1",
    features: int | None = None,
    contrast: Tensor | None = None,  # [H]
) -> Tensor:  # [*, N, E]
    """What `add_attention` computes, in plain torch."""
    features = _check(k, v, mask, codes, features)
    _check_contrast(contrast, v)
    present = torch.ones_like(v[..., :1]) if mask is None else mask.unsqueeze(-1).to(v.dtype).expand_as(v[..., :1])
    if mask is not None:
        v = torch.where(mask.unsqueeze(-1), v, 0)
    scale = 1 / (math.pi * features)
    sums = matadd_twin(q, k, torch.cat((v, present), -1), mask, codes, features) * scale
    numerator = sums[..., :-1] + 0.5 * v.sum(-2, keepdim=True)
    count = present.sum(-2, keepdim=True)
    row_sum = sums[..., -1:] + 0.5 * count
    out = numerator / row_sum.clamp(min=LEAST_ROW_SUM)
    if contrast is None:
        return out
    return torch.lerp(v.sum(-2, keepdim=True) / count.clamp(min=1), out, contrast.to(out.dtype)[:, None, None])


# --------------------------------------------------------------------------------------------------------------------
# TIR
# --------------------------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------------------------
# Trials
# --------------------------------------------------------------------------------------------------------------------


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
        found = _run_sums(function, k, v, mask, name, features)
        _assert_close(found, matadd_kv_twin(k, v.float(), mask, name, features))


def _try_products(function: Any, *, codes: str, dtype: str, features: int, columns: int) -> None:
    q, kv = _draw(codes, 1, 2, 45, features), _draw(dtype, 1, 2, features, columns)
    for name in LOW:
        _assert_close(_run_products(function, q, kv, name), matadd_q_twin(q, kv.float(), name))


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
        found = _run_matadd(function, q, k, v, *arguments, contrast)
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


# --------------------------------------------------------------------------------------------------------------------
# Calls of compiled functions, on [B, H, tokens, *]
# --------------------------------------------------------------------------------------------------------------------

_NO_MASK = torch.zeros(1, 1, 1, dtype=torch.uint8)
_NO_CONTRAST = torch.ones(1)


def _run_sums(function: Any, k: Tensor, v: Tensor, mask: Tensor | None, codes: str, features: int) -> Tensor:
    """[B, H, D, E] float32."""
    batch, heads, tokens, columns = v.shape
    state = torch.empty(batch, heads, _parts(batch * heads, tokens), features, columns)
    function(_stored(k), _stored(v), _stored(mask), LOW[codes], state)
    return state.sum(2) if state.shape[2] > 1 else state.squeeze(2)


def _run_products(function: Any, q: Tensor, kv: Tensor, codes: str) -> Tensor:
    """[B, H, N, E] in the dtype of kv."""
    batch, heads, tokens, _ = q.shape
    out = _empty_like(q, kv)
    state = kv.float().contiguous().unsqueeze(2)
    function(_stored(q), state, LOW[codes], _parts(batch * heads, tokens), _stored(out))
    return out


def _run_matadd(
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
    out = _empty_like(q, v)
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


def _empty_like(q: Tensor, v: Tensor) -> Tensor:
    """[B, H, N, E] in the dtype of v, the heads side by side in memory where q has them so."""
    batch, heads, tokens, _ = q.shape
    if heads > 1 and tokens > 1 and q.stride(1) < q.stride(2):
        return q.new_empty(batch, tokens, heads, v.shape[-1], dtype=v.dtype).transpose(1, 2)
    return q.new_empty(batch, heads, tokens, v.shape[-1], dtype=v.dtype)


# --------------------------------------------------------------------------------------------------------------------
# Ops
# --------------------------------------------------------------------------------------------------------------------


def _kv_cpu(
    k: Tensor, v: Tensor, mask: Tensor | None = None, codes: str = "pm1", features: int | None = None
) -> Tensor:
    features = _check(k, v, mask, codes, features)
    function = _function(
        SUMS, targets.current(), v.dtype, features, v.shape[-1], ("codes", k.dtype), ("masked", mask is not None)
    )
    if function is None or not k.numel():
        return matadd_kv_twin(k, v, mask, codes, features)
    kv = _run_sums(function, _heads(k), _heads(v), _mask_of_heads(mask, k), codes, features)
    return kv.to(v.dtype).view(*v.shape[:-2], features, v.shape[-1])


def _q_cpu(q: Tensor, kv: Tensor, codes: str = "pm1") -> Tensor:
    _check(q, kv, None, codes, kv.shape[-2], rows=False)
    function = _function(PRODUCTS, targets.current(), kv.dtype, *kv.shape[-2:], ("codes", q.dtype))
    if function is None or not q.numel():
        return matadd_q_twin(q, kv, codes)
    return _unheaded(_run_products(function, _heads(q), _heads(kv), codes), q)


def _matadd_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    codes: str = "pm1",
    features: int | None = None,
    contrast: Tensor | None = None,
    *,
    attention: bool = False,
) -> Tensor:
    features = _check(k, v, mask, codes, features)
    _check(q, v, None, codes, features, rows=False)
    _check_contrast(contrast, v)
    function = _function(
        MATADD,
        targets.current(),
        v.dtype,
        features,
        v.shape[-1],
        ("codes", q.dtype),
        ("key_codes", k.dtype),
        ("masked", mask is not None),
        ("attention", attention),
        ("contrasted", contrast is not None),
    )
    if function is None or not q.numel() or not k.numel():
        if attention:
            return add_attention_twin(q, k, v, mask, codes, features, contrast)
        return matadd_twin(q, k, v, mask, codes, features)
    heads = _heads(q), _heads(k), _heads(v)
    return _unheaded(_run_matadd(function, *heads, _mask_of_heads(mask, k), codes, features, contrast), q)


def _kv_cuda(
    k: Tensor, v: Tensor, mask: Tensor | None = None, codes: str = "pm1", features: int | None = None
) -> Tensor:
    features = _check(k, v, mask, codes, features)
    state = None
    if k.numel() and v.numel():
        keys, values, mask_of_heads = _heads(k), _heads(v), _mask_of_heads(mask, k)
        state = cuda_matadd.sums(keys, values, mask_of_heads, LOW[codes], features, attention=False)
    if state is None:
        return matadd_kv_twin(k, v, mask, codes, features)
    return state.to(v.dtype).view(*v.shape[:-2], features, v.shape[-1])


def _q_cuda(q: Tensor, kv: Tensor, codes: str = "pm1") -> Tensor:
    features = kv.shape[-2]
    _check(q, kv, None, codes, features, rows=False)
    queries = _heads(q)
    out = _empty_like(queries, _heads(kv))
    if q.numel() and kv.numel():
        state = kv.float().reshape(-1, features, kv.shape[-1]).contiguous()
        if cuda_matadd.products(queries, state, LOW[codes], features, out, attention=False):
            return _unheaded(out, q)
    return matadd_q_twin(q, kv, codes)


def _matadd_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    codes: str = "pm1",
    features: int | None = None,
    contrast: Tensor | None = None,
    *,
    attention: bool = False,
) -> Tensor:
    features = _check(k, v, mask, codes, features)
    _check(q, v, None, codes, features, rows=False)
    _check_contrast(contrast, v)
    if q.numel() and k.numel() and v.numel():
        queries, values, low = _heads(q), _heads(v), LOW[codes]
        out = _empty_like(queries, values)
        state = cuda_matadd.sums(_heads(k), values, _mask_of_heads(mask, k), low, features, attention)
        if state is not None and contrast is not None:
            _add_contrast_(state, contrast)
        if state is not None and cuda_matadd.products(
            queries, state, low, features, out, attention=attention, least=LEAST_ROW_SUM
        ):
            return _unheaded(out, q)
    if attention:
        return add_attention_twin(q, k, v, mask, codes, features, contrast)
    return matadd_twin(q, k, v, mask, codes, features)


def _add_contrast_(state: Tensor, contrast: Tensor) -> None:
    """Give contrast [H] to sums [B * H, D + 1, E + 1] whose last row and column sum values and codes, in place.

    See `_emit_products`, which does the same on the way.
    """
    keys, values, count = state[:, :-1, -1:], state[:, -1:, :-1], state[:, -1:, -1:]
    factors = contrast.to(state.dtype).repeat(len(state) // len(contrast))[:, None, None]
    state[:, :-1, :-1] = torch.lerp(keys * (values / count.clamp(min=1)), state[:, :-1, :-1], factors)


@cache
def _function(
    kernel: Kernel, target: CpuTarget, dtype: torch.dtype, features: int, columns: int, *spec: tuple[str, Any]
) -> Any:
    """The compiled function for this process's target, or None where the twin has to do."""
    if dtype not in (torch.float32, torch.bfloat16) or not features or not columns:
        return None
    if any(isinstance(value, torch.dtype) and value not in _STORAGE for _, value in spec):
        return None
    stored = {name: _STORAGE.get(value, value) for name, value in spec}
    return kernel.function(dtype=_STORAGE[dtype], features=features, columns=columns, **stored)


def _heads(x: Tensor) -> Tensor:
    """[*, tokens, width] as [B, H, tokens, width], the elements of a row side by side; in place if it can be."""
    if x.dim() > 4:
        x = x.flatten(0, -4)
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _mask_of_heads(mask: Tensor | None, k: Tensor) -> Tensor | None:
    return None if mask is None else _heads(mask.expand(k.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def _unheaded(out: Tensor, q: Tensor) -> Tensor:
    """What was computed by heads, with the leading dimensions of q."""
    return out if q.dim() == 4 else out.reshape(*q.shape[:-1], out.shape[-1])


def _check(
    x: Tensor, values: Tensor, mask: Tensor | None, codes: str, features: int | None, *, rows: bool = True
) -> int:
    """The number of features whose signs x holds.

    Raises:
        UserError: for arguments that do not go together.
    """
    if codes not in LOW:
        raise UserError(f"codes must be one of {', '.join(LOW)}, not {codes!r}")
    if x.dim() < 2 or x.shape[:-2] != values.shape[:-2]:
        raise UserError(
            f"queries, keys and values must have the same dimensions before the last two, not {list(x.shape)} and "
            f"{list(values.shape)}"
        )
    if rows and x.shape[-2] != values.shape[-2]:
        raise UserError(f"every key needs a value: there are {x.shape[-2]} keys and {values.shape[-2]} values")
    packed = x.dtype == torch.uint8
    if not (packed or x.is_floating_point()):
        raise UserError(f"codes are the signs of floating-point features, or packed in uint8, not {x.dtype}")
    width = 8 * x.shape[-1] if packed else x.shape[-1]
    features = width if features is None else features
    if not (width - 8 < features <= width if packed else features == width):
        raise UserError(f"{'packed signs' if packed else 'features'} {list(x.shape)} are not {features} a token")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise UserError(f"the mask must be bool (True where a key counts), not {mask.dtype}")
        if mask.dim() != x.dim() - 1 or any(m not in (1, n) for m, n in zip(mask.shape, x.shape, strict=False)):
            raise UserError(f"the mask must be {list(x.shape[:-1])}, or 1 where it repeats, not {list(mask.shape)}")
    return features


def _check_contrast(contrast: Tensor | None, v: Tensor) -> None:
    if contrast is not None and (v.dim() < 3 or contrast.shape != v.shape[-3:-2]):
        raise UserError(
            f"contrast must be [H], one for each head of values [*, H, M, E], not {list(contrast.shape)} for "
            f"{list(v.shape)}"
        )


def _fake_kv(
    k: Tensor, v: Tensor, mask: Tensor | None = None, codes: str = "pm1", features: int | None = None
) -> Tensor:
    features = _check(k, v, mask, codes, features)
    return v.new_empty(*v.shape[:-2], features, v.shape[-1])


def _fake_q(q: Tensor, kv: Tensor, codes: str = "pm1") -> Tensor:
    _check(q, kv, None, codes, kv.shape[-2], rows=False)
    return _unheaded(_empty_like(_heads(q), kv), q)


def _fake_matadd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    codes: str = "pm1",
    features: int | None = None,
    contrast: Tensor | None = None,
) -> Tensor:
    features = _check(k, v, mask, codes, features)
    _check(q, v, None, codes, features, rows=False)
    _check_contrast(contrast, v)
    return _unheaded(_empty_like(_heads(q), v), q)


def _set_up_kv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    k, _, mask, ctx.codes, _ = inputs
    ctx.save_for_backward(k, mask)


def _backward_kv(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    k, mask = ctx.saved_tensors
    _refuse(ctx.needs_input_grad[0])
    of_v = matadd_q(k, gradient, ctx.codes)
    return None, of_v if mask is None else torch.where(mask.unsqueeze(-1), of_v, 0), None, None, None


def _set_up_q(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, kv, ctx.codes = inputs
    ctx.features = kv.shape[-2]
    ctx.save_for_backward(q)


def _backward_q(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (q,) = ctx.saved_tensors
    _refuse(ctx.needs_input_grad[0])
    return None, matadd_kv(q, gradient, None, ctx.codes, ctx.features), None


def _refuse(asked: bool) -> None:
    if asked:
        raise UserError("codes are constants here; shiftadd3d.nn.binarize trains what they are the signs of")


_kv_op = define_op(
    "matadd_kv(Tensor k, Tensor v, Tensor? mask=None, str codes='pm1', int? features=None) -> Tensor",
    cpu=_kv_cpu,
    cuda=_kv_cuda,
    twin=matadd_kv_twin,
    fake=_fake_kv,
    backward=_backward_kv,
    setup_context=_set_up_kv,
)
_q_op = define_op(
    "matadd_q(Tensor q, Tensor kv, str codes='pm1') -> Tensor",
    cpu=_q_cpu,
    cuda=_q_cuda,
    twin=matadd_q_twin,
    fake=_fake_q,
    backward=_backward_q,
    setup_context=_set_up_q,
)
_matadd_op = define_op(
    "matadd(Tensor q, Tensor k, Tensor v, Tensor? mask=None, str codes='pm1', int? features=None) -> Tensor",
    cpu=_matadd_cpu,
    cuda=_matadd_cuda,
    twin=matadd_twin,
    fake=_fake_matadd,
)
_attention_op = define_op(
    "add_attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, str codes='pm1', int? features=None, "
    "Tensor? contrast=None) -> Tensor",
    cpu=partial(_matadd_cpu, attention=True),
    cuda=partial(_matadd_cuda, attention=True),
    twin=add_attention_twin,
    fake=_fake_matadd,
)
