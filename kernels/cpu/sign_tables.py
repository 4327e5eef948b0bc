"""Products with signs, ``K^T V`` and ``Q S``, by tables of sums: the "method of the four Russians".

Codes are taken in groups of four columns. A token has one of 16 codes in a group, so a table of 16 rows serves all
tokens:

- ``K^T V``: each token adds its values to the row that its code names. At the end, row d of the outcome is the sum of
  the rows whose codes have bit d, plus `low` times the sum of the others.
- ``Q S``: a table holds the 16 sums that four rows of S can make. The outcome of a token is the sum of the rows that
  its codes name, one of each table.

This takes D / 4 additions for each number of the outcome. An ordinary product takes D multiplications and D additions.

Source: Arlazarov et al., "On economical construction of the transitive closure of a directed graph" (1970).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.reference.linear_angular import LEAST_ROW_SUM
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

_GROUP = 4  # columns of codes that share a table
_ENTRIES = 1 << _GROUP
_TABLE_BYTES = 32 * 1024  # of all tables that one pass over a block of tokens uses: a first-level cache
TOKENS = 32  # whose codes are kept between passes
_AHEAD = 64  # tokens to fetch in advance: the hardware does not foresee two alternating streams
_LINE = 64  # bytes of a cache line
_WIDEST = 8  # bytes of codes whose bits are counted at a time


class Share(NamedTuple):
    """What a task works on: a part of the tokens of one head, from the first to the one behind the last."""

    batch: Expr
    head: Expr
    part: Expr
    first: Expr
    last: Expr

    @classmethod
    def of_task(cls, number: Expr, heads: Index, parts: Index, tokens: Index) -> Share:
        # Truncating: TVM takes long to compile divisions that round negative numbers down.
        batch, rest = T.truncdiv(number, heads * parts), T.bind(T.truncmod(number, heads * parts))
        part = T.bind(T.truncmod(rest, parts))
        first, last = T.truncdiv(tokens * part, parts), T.truncdiv(tokens * (part + 1), parts)
        return cls(T.bind(batch), T.bind(T.truncdiv(rest, parts)), part, T.bind(first), T.bind(last))

    def of(self, buffer: Buffer) -> Buffer:
        """The head's part of a buffer."""
        return buffer.part(self.batch, self.head)

    def each_block(self, emit: Callable[[Expr, Expr], None]) -> None:
        """Emit ``emit(first token, how many)`` for each `TOKENS` of them."""
        with T.serial(T.truncdiv(self.last - self.first + (TOKENS - 1), T.int64(TOKENS))) as block:
            begin = T.bind(self.first + block * TOKENS)
            emit(begin, T.bind(T.min(T.int64(TOKENS), self.last - begin)))

    def ahead(self, token: Expr) -> Expr:
        """A token to fetch while another is worked on."""
        return T.bind(T.min(token + _AHEAD, self.last - 1))


class Tables:
    """The tables: 16 rows of `columns` sums for each four columns of codes.

    Columns of sums are worked on in chunks. All tables of one chunk fit into the first-level cache. Within a chunk,
    columns are worked on by whole vectors, and the last ones by shorter vectors.

    Args:
        codes: what the signs are taken of: ``"float32"`` or ``"bfloat16"`` features, or ``"uint8"``, packed.
        features: D, columns of codes.
        columns: E, columns of sums.

    Attributes:
        bytes: of one token's codes.
        width: elements of the tensor that one token's codes are read from.
        groups: tables of a chunk. There are two for each byte of codes.
        chunk: columns of a chunk.
    """

    def __init__(self, target: CpuTarget, codes: str, features: int, columns: int) -> None:
        self.isa, self.codes, self.features, self.columns = Isa(target), codes, features, columns
        self.bytes = -(-features // 8)
        self.width = self.bytes if codes == "uint8" else features
        self.groups = 2 * self.bytes
        lanes = self.isa.lanes
        widest = max(lanes, _TABLE_BYTES // (4 * _ENTRIES * self.groups) // lanes * lanes)
        self.chunk = min(widest, self.isa.padded(columns))

    def allocate(self) -> Buffer:
        """[chunks * groups, 16, columns of a chunk] float32."""
        return T.alloc(-(-self.columns // self.chunk) * self.groups, _ENTRIES, self.chunk)

    def each_chunk(self, emit: Callable[[Index, Index, int], None]) -> None:
        """Emit ``emit(first table, first column, columns)``."""
        whole, rest = divmod(self.columns, self.chunk)
        if whole:
            with T.serial(whole) as number:
                emit(number * self.groups, number * self.chunk, self.chunk)
        if rest:
            emit(whole * self.groups, whole * self.chunk, rest)

    def each_group(self, emit: Callable[[Index, int], None]) -> None:
        """Emit ``emit(group, how many of its four columns there are)``."""
        whole = self.features // _GROUP
        if whole:
            with T.serial(whole) as group:
                emit(group, _GROUP)
        for group in range(whole, self.groups):
            emit(group, max(0, self.features - group * _GROUP))

    def pieces(self, count: int) -> list[tuple[int, int]]:
        """The pieces that `count` columns are worked on in, (first, how many): whole vectors, then shorter ones."""
        pieces, start, width = [], 0, self.isa.lanes
        while start < count:
            while start + width > count:
                width //= 2
            pieces.append((start, width))
            start += width
        return pieces

    def each_piece(self, count: int, emit: Callable[[Index, int], None]) -> None:
        """Emit ``emit(first column, columns)`` for each of the pieces, in a loop over the whole vectors."""
        whole = count // self.isa.lanes
        if whole:
            with T.serial(whole) as number:
                emit(number * self.isa.lanes, self.isa.lanes)
        for start, width in self.pieces(count)[whole:]:
            emit(start, width)

    def read_codes(self, x: Buffer, begin: Expr, count: Expr, packed: Buffer) -> Buffer:
        """The codes [tokens, bytes] of `count` tokens of x [tokens, width] from `begin` on, which `packed` has room
        for."""
        if self.codes == "uint8":
            return x.below(begin)

        def read(byte: Index, width: int) -> None:
            with T.serial(count) as token:
                packed[token, byte] = T.bind(self._code(x.part(begin + token), byte, width))

        whole, rest = divmod(self.features, 8)
        if whole:
            with T.serial(whole) as byte:
                read(byte, 8)
        if rest:
            read(whole, rest)
        return packed

    def _code(self, token: Buffer, byte: Index, width: int) -> Expr:
        """One byte of a token's codes (uint8)."""
        isa = self.isa
        if width == 8 and "avx2" in isa.target.flags:
            return isa.codes(isa.read(token, 8 * byte, 8), 8)[0]
        code = T.int32(0)
        for i in range(width):
            code = code | (T.cast(isa.read(token, 8 * byte + i, 1) >= T.float32(0), "int32") << i)
        return T.cast(code, "uint8")

    def entries(self, codes: Buffer, token: Expr, byte: Expr) -> list[Expr]:
        """Which of the 16 sums of two tables a byte of a token's codes selects (int32)."""
        code = T.bind(T.cast(codes[token, byte], "int32"))
        return [T.bind(code & T.int32(_ENTRIES - 1)), T.bind(code >> T.int32(_GROUP))]

    def fetch(self, row: Buffer, elements: int) -> None:
        """Ask for a row of memory that will be read soon."""
        size = {"float32": 4, "bfloat16": 2, "uint8": 1}[row.dtype]
        for start in range(0, elements, _LINE // size):
            self.isa.prefetch(row.address(start))


class _Counts:
    """How many keys there are, and how many have each column's bit set, as code that counts them."""

    def __init__(self, tables: Tables) -> None:
        self._bytes = tables.bytes
        self.of_column, self.keys = T.alloc(8 * self._bytes), T.alloc(1, align=4)
        self._bit = T.alloc(8 * _WIDEST, dtype="uint8")  # that each column of some bytes has
        with T.serial(8 * _WIDEST) as column:
            self._bit[column] = T.cast(T.int32(1) << T.cast(column % 8, "int32"), "uint8")
        with T.serial(self._bytes) as byte:
            self.of_column[T.ramp(byte * 8, 8)] = splat(0, 8)
        self.keys[0] = T.float32(0)

    def add(self, codes: Buffer, seen: Buffer | None, count: Expr) -> None:
        """Count a block of keys, of codes [count, bytes], that are `seen`."""
        if seen is None:
            self.keys[0] = self.keys[0] + T.cast(count, "float32")
        else:
            with T.serial(count) as token:
                self.keys[0] = self.keys[0] + T.cast(seen[token], "float32")
        start = 0
        for width in (_WIDEST, *(_WIDEST >> i for i in range(1, 4))):
            while start + width <= self._bytes:
                self._add_bytes(codes, seen, count, start, width)
                start += width

    def _add_bytes(self, codes: Buffer, seen: Buffer | None, count: Expr, start: int, width: int) -> None:
        """Count in some bytes of the codes. A count of a block fits into a byte."""
        lanes = 8 * width
        one, all_lanes = T.number("uint8", 1), T.ramp(0, lanes)
        nothing, ones = T.alloc(lanes, dtype="uint8"), T.alloc(lanes, dtype="uint8")
        nothing[all_lanes] = ones[all_lanes] = T.broadcast(T.number("uint8", 0), lanes)
        with T.serial(count) as token:
            some = T.bind(codes[token, T.at(start, width)])
            spread = T.broadcast(some, 8) if width == 1 else T.shuffle([some] * 8, [i // 8 for i in range(lanes)])
            weight = T.broadcast(one if seen is None else seen[token], lanes)
            is_set = (spread & self._bit[all_lanes]) != nothing[all_lanes]
            ones[all_lanes] = ones[all_lanes] + T.select(is_set, weight, nothing[all_lanes])
        here = T.ramp(8 * start, lanes)
        self.of_column[here] = self.of_column[here] + T.cast(ones[all_lanes], f"float32x{lanes}")


def emit_sums(
    tables: Tables, k: Buffer, v: Buffer, mask: Buffer | None, low: Expr, state: Buffer, number: Expr, *, complete: bool
) -> None:
    """One task of ``K^T V``: the sums over one part of the tokens, in state[batch, head, part].

    Args:
        k: [B, H, M, D or bytes].
        v: [B, H, M, E].
        mask: [B, H, M] uint8, 0 for a key that does not count; or None.
        low: what the codes' zeros count as.
        state: [B, H, parts, D, E]; [B, H, parts, D + 1, E + 1] if `complete`.
        number: of the task.
        complete: whether to add a row with the sums of all values, and a column with the sums of all codes. The corner
            is the number of keys.
    """
    features, columns, lanes = tables.features, tables.columns, tables.isa.lanes
    share = Share.of_task(number, k.shape[1], state.shape[2], k.shape[2])
    keys, values, outcome = share.of(k), share.of(v), share.of(state).part(share.part)
    seen = None if mask is None else share.of(mask)
    sums, packed = tables.allocate(), T.alloc(TOKENS, tables.bytes, dtype="uint8")
    counts = _Counts(tables) if complete else None

    with T.serial(sums.shape[0]) as table, T.serial(_ENTRIES) as entry, T.serial(tables.chunk // lanes) as vector:
        sums[table, entry, T.ramp(vector * lanes, lanes)] = splat(0, lanes)

    def block(begin: Expr, count: Expr) -> None:
        codes = tables.read_codes(keys, begin, count, packed)
        if counts is not None:
            counts.add(codes, None if seen is None else seen.below(begin), count)

        def add(table: Index, column: Index, chunk: int) -> None:
            with T.serial(count) as token:
                ahead = share.ahead(begin + token)
                tables.fetch(keys.part(ahead), tables.width)
                tables.fetch(values.part(ahead), columns)
                bytes_ = T.int32(tables.bytes)
                if seen is not None:
                    bytes_ = T.select(seen[begin + token] == T.number("uint8", 0), T.int32(0), bytes_)
                with T.serial(bytes_) as byte:
                    for half, entry in enumerate(tables.entries(codes, token, byte)):
                        row = sums.part(table + byte * 2 + half, entry)
                        for start, width in tables.pieces(chunk):
                            value = tables.isa.read(values.part(begin + token), column + start, width)
                            row[T.at(start, width)] = row[T.at(start, width)] + value

        tables.each_chunk(add)

    share.each_block(block)
    tables.each_chunk(partial(_take_apart, tables, sums, low, outcome, complete))
    if counts is not None:
        with T.serial(features) as feature:
            ones = counts.of_column[feature]
            outcome[feature, columns] = ones + low * (counts.keys[0] - ones)
        outcome[features, columns] = counts.keys[0]


def _take_apart(
    tables: Tables, sums: Buffer, low: Expr, outcome: Buffer, complete: bool, table: Index, column: Index, chunk: int
) -> None:
    """The rows of the state [D or D + 1, E] from the sums by code, for one chunk."""

    def piece(group: Index, present: int, start: Index, width: int) -> None:
        here = T.at(start, width)
        by_entry = [T.bind(sums[table + group, entry, here]) for entry in range(_ENTRIES)]
        # By the lower two bits of an entry, and by the upper two.
        by_pair = [
            [T.bind(T.total(by_entry[two::4])) for two in range(4)],
            [T.bind(T.total(by_entry[4 * two : 4 * two + 4])) for two in range(4)],
        ]
        there = T.at(column + start, width)
        for bit in range(present):
            zeros, ones = ([x for i, x in enumerate(by_pair[bit // 2]) if i >> bit % 2 & 1 == v] for v in (0, 1))
            outcome[group * _GROUP + bit, there] = T.total(ones) + splat(low, width) * T.total(zeros)
        if complete:
            with T.when(group == 0):
                outcome[tables.features, there] = T.total(by_pair[0])

    tables.each_group(lambda group, n: tables.each_piece(chunk, partial(piece, group, n)) if n else None)


class Products:
    """One task of ``Q S``, where S is the sum of `state` over its parts.

    Args:
        q: [B, H, N, D or bytes].
        state: what `emit_sums` has written.
        low: what the codes' zeros count as.
        scale: s of add attention (see `shiftadd3d.kernels.cpu.matadd`), for which the state must be complete. The
            numerator is ``s Q S`` plus half of the state's last row. The denominator is the same with the state's last
            column in the place of S. None for the product alone.
        contrast: [H], c of add attention: ``c S + (1 - c) (sum k) (sum v) / n`` takes the place of S. Or None.
        out: [B, H, N, E].
        number: of the task.
        parts: tasks that share the tokens of a head.
    """

    def __init__(
        self,
        tables: Tables,
        q: Buffer,
        state: Buffer,
        low: Expr,
        scale: Expr | None,
        contrast: Buffer | None,
        out: Buffer,
        number: Expr,
        parts: Expr,
    ) -> None:
        self._tables, self._low, self._scale = tables, low, scale
        self._share = Share.of_task(number, q.shape[1], parts, q.shape[2])
        self._queries, self._state, self._out = (self._share.of(buffer) for buffer in (q, state, out))
        self._contrast = None if contrast is None else T.bind(contrast[self._share.head])
        self._sums = tables.allocate()
        self._row_sums = T.alloc(tables.groups, _ENTRIES)
        self._total, self._base = T.alloc(tables.isa.lanes), T.alloc(tables.isa.lanes)
        self._key_sums = T.alloc(tables.features)  # (1 - c) (sum k) / n
        self._value_sums = T.alloc(tables.columns)  # sum v
        self._packed = T.alloc(TOKENS, tables.bytes, dtype="uint8")
        self._factors = T.alloc(TOKENS)  # 1 / row sum
        self._accumulators, self._row_sum = T.alloc(tables.chunk), T.alloc(1, align=4)

    def emit(self) -> None:
        tables = self._tables
        if self._contrast is not None:
            self._take_means(self._contrast)

        def row_sums(group: Index, present: int) -> None:
            self._tabulate(group, present, tables.columns, 1, self._row_sums.part(group), None)

        tables.each_chunk(self._tabulate_chunk)
        if self._scale is not None:
            tables.each_group(row_sums)

        def block(begin: Expr, count: Expr) -> None:
            codes = tables.read_codes(self._queries, begin, count, self._packed)
            if self._scale is not None:
                self._sum_rows(codes, count)
            tables.each_chunk(partial(self._look_up, codes, begin, count))

        self._share.each_block(block)

    def _row(self, row: Index, column: Index, width: int) -> Expr:
        """A row of the state, all parts together."""
        total, there = T.at(0, width), T.at(column, width)
        self._total[total] = self._state[0, row, there]
        with T.serial(self._state.shape[0] - 1) as p:
            self._total[total] = self._total[total] + self._state[p + 1, row, there]
        return self._total[total]

    def _take_means(self, contrast: Expr) -> None:
        """Write both factors of what the contrast adds to the state."""
        features, columns = self._tables.features, self._tables.columns
        share = T.bind((T.float32(1) - contrast) / T.max(self._row(features, columns, 1), T.float32(1)))
        with T.serial(features) as row:
            self._key_sums[row] = self._row(row, columns, 1) * share

        def keep(column: Index, width: int) -> None:
            self._value_sums[T.at(column, width)] = self._row(features, column, width)

        self._tables.each_piece(columns, keep)

    def _tabulate_chunk(self, table: Index, column: Index, chunk: int) -> None:
        def piece(group: Index, present: int, start: Index, width: int) -> None:
            entries = self._sums.part(table + group)
            self._tabulate(group, present, column + start, width, entries, self._contrast, start)

        self._tables.each_group(lambda group, n: self._tables.each_piece(chunk, partial(piece, group, n)))

    def _tabulate(
        self,
        group: Index,
        present: int,
        column: Index,
        width: int,
        entries: Buffer,
        contrast: Expr | None,
        start: Index | None = None,
    ) -> None:
        """Store in `entries` the 16 sums that four rows of the state can make, from a column on."""
        ones = [self._summand(group * _GROUP + bit, column, width, contrast) for bit in range(present)]
        ones += [splat(0, width)] * (_GROUP - present)
        zeros = [T.bind(row * splat(self._low, width)) for row in ones]
        lower, upper = (
            [T.bind((ones if i & 1 else zeros)[b] + (ones if i & 2 else zeros)[b + 1]) for i in range(4)]
            for b in (0, 2)
        )
        if self._scale is not None:  # half of the last row, in the sums of the first group
            here = T.at(0, width)
            self._base[here] = splat(0, width)
            with T.when(group == 0):
                self._base[here] = self._row(self._tables.features, column, width) * splat(0.5, width)
            lower = [T.bind(two + self._base[here]) for two in lower]
        for entry in range(_ENTRIES):
            place = entry if start is None else (entry, T.at(start, width))
            entries[place] = lower[entry % 4] + upper[entry // 4]

    def _summand(self, row: Index, column: Index, width: int, contrast: Expr | None) -> Expr:
        """A vector of a row of the state, after contrast and scale."""
        x = self._row(row, column, width)
        if contrast is not None:
            means = splat(self._key_sums[row], width) * self._value_sums[T.at(column, width)]
            x = x * splat(contrast, width) + means
        return T.bind(x * splat(1.0 if self._scale is None else self._scale, width))

    def _sum_rows(self, codes: Buffer, count: Expr) -> None:
        """The row sums of a block of tokens."""
        with T.serial(count) as token:
            self._row_sum[0] = T.float32(0)
            with T.serial(self._tables.bytes) as byte:
                entries = enumerate(self._tables.entries(codes, token, byte))
                both = [self._row_sums[byte * 2 + i, entry] for i, entry in entries]
                self._row_sum[0] = self._row_sum[0] + T.total(both)
            self._factors[token] = T.float32(1) / T.max(self._row_sum[0], T.float32(LEAST_ROW_SUM))

    def _look_up(self, codes: Buffer, begin: Expr, count: Expr, table: Index, column: Index, chunk: int) -> None:
        """A chunk of the outcome of a block of tokens."""
        tables, sums = self._tables, self._accumulators
        pieces = [(start, width, T.at(start, width)) for start, width in tables.pieces(chunk)]
        with T.serial(count) as token:
            tables.fetch(self._queries.part(self._share.ahead(begin + token)), tables.width)
            for _, width, here in pieces:
                sums[here] = splat(0, width)
            with T.serial(tables.bytes) as byte:
                entries = tables.entries(codes, token, byte)
                for _, _, here in pieces:
                    both = [self._sums[table + byte * 2 + i, entry, here] for i, entry in enumerate(entries)]
                    sums[here] = sums[here] + T.total(both)
            for start, width, here in pieces:
                y = sums[here] if self._scale is None else sums[here] * splat(self._factors[token], width)
                tables.isa.write(self._out.part(begin + token), column + start, y, width)


def splat(x: Expr | float, width: int) -> Expr:
    """`x` in so many lanes; itself if there is one."""
    x = T.float32(x) if isinstance(x, (int, float)) else x
    return x if width == 1 else T.broadcast(x, width)
