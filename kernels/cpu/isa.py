"""What a CPU can do: the widths of its vectors, and its instructions by what they compute.

Methods are called while a function is emitted. They return expressions, and emit statements before the one they are
called in where a value is needed more than once. All names of instructions are here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index, Load, Number, Store

_EXPONENT_AND_FRACTION, _INFINITY, _QUIET_NAN = 0x7FFFFFFF, 0x7F800000, 0x400000


class Register:
    """A vector that can be assigned to, as `value`; an index gives a lane."""

    def __init__(self, lanes: int, dtype: str) -> None:
        self._buffer, self._all = T.alloc(lanes, dtype=dtype), T.ramp(0, lanes)

    @property
    def value(self) -> Expr:
        return self._buffer[self._all]

    @value.setter
    def value(self, x: Expr) -> None:
        self._buffer[self._all] = x

    def __getitem__(self, lane: int) -> Expr:
        return self._buffer[lane]


class Isa:
    """Vectors of float32 and int32, and what a target does with them.

    Args:
        target: whose registers and instructions to use.
        lanes: numbers in a vector; as many as a register holds, or fewer.
    """

    def __init__(self, target: CpuTarget, lanes: int | None = None) -> None:
        self.target = target
        self.lanes = lanes or target.lanes
        self.floats, self.integers = f"float32x{self.lanes}", f"int32x{self.lanes}"
        self._family = "x86.avx512." if target.has_avx512 else "x86.avx2."

    # Vectors.

    def padded(self, count: int) -> int:
        """`count` floats rounded up to whole vectors."""
        return -(-count // self.lanes) * self.lanes

    def at(self, start: Index) -> Expr:
        """The index of the vector that begins at `start`."""
        return T.ramp(start, self.lanes)

    def splat(self, x: Number) -> Expr:
        """`x`, a number or a scalar expression of any type, in every lane."""
        return T.broadcast(T.float32(x) if isinstance(x, (int, float)) else x, self.lanes)

    def splat_int(self, x: Index) -> Expr:
        """`x`, an integer or an int32 expression, in every lane."""
        return T.broadcast(T.int32(x) if isinstance(x, int) else x, self.lanes)

    def register(self, start: float | Expr | None = None, *, integer: bool = False) -> Register:
        """A vector of float32, or int32, that can be assigned to; it may start as a number or a vector."""
        register = Register(self.lanes, "int32" if integer else "float32")
        if start is not None:
            if isinstance(start, (int, float)):
                start = self.splat_int(int(start)) if integer else self.splat(start)
            register.value = start
        return register

    def keep(self, x: Expr, *, integer: bool = False) -> Expr:
        """`x` computed here and now, for use in more than one place.

        Not by a let binding: TVM's simplifier looks through those, in time exponential in their number.
        """
        return self.register(x, integer=integer).value

    @contextmanager
    def groups(self, count: Index) -> Iterator[tuple[Expr, Expr]]:
        """Emit a loop over rows, as many at once as there are lanes; yields the first of a group, and their number."""
        with T.serial((count + (self.lanes - 1)) // self.lanes) as number:
            first = T.bind(number * self.lanes)
            yield first, T.bind(T.min(T.int64(self.lanes), count - first))

    # float32.

    def fma(self, a: Expr, b: Expr, c: Expr) -> Expr:
        """``a * b + c``, rounded once where the target can."""
        return self._float("fma", a, b, c) if self.target.has_fma else a * b + c

    def at_least(self, x: Expr, least: Expr) -> Expr:
        """The larger of the two; NaN in `x` stays, as it does in torch."""
        x = self.keep(x)
        return T.select(x < least, least, x)

    def at_most(self, x: Expr, most: Expr) -> Expr:
        """The smaller of the two; NaN in `x` stays, as it does in torch."""
        x = self.keep(x)
        return T.select(x > most, most, x)

    def larger(self, x: Expr, y: Expr) -> Expr:
        """The larger of two; of NaN and a number, the number."""
        return self._float("maxnum", x, y)

    def smaller(self, x: Expr, y: Expr) -> Expr:
        """The smaller of two; of NaN and a number, the number."""
        return self._float("minnum", x, y)

    def larger_or_nan(self, x: Expr, y: Expr) -> Expr:
        """The larger of two, NaN if either is."""
        return self._float("maximum", x, y)

    def relu(self, x: Expr) -> Expr:
        return self.at_least(x, self.splat(0.0))

    def absolute(self, x: Expr) -> Expr:
        return self._float("fabs", x)

    def square_root(self, x: Expr) -> Expr:
        return self._float("sqrt", x)

    def floor(self, x: Expr) -> Expr:
        return self._float("floor", x)

    def times_power_of_two(self, x: Expr, exponent: Expr) -> Expr:
        """``x * 2**exponent`` for x near 1 and whole exponents below 127; below -126, no more than ``x * 2**-126``."""
        if self.target.has_avx512 and self.lanes == 16:
            all_lanes, current_rounding = T.number("int16", -1), T.int32(4)
            name = "x86.avx512.mask.scalef.ps.512"
            return T.bind(T.intrinsic(self.floats, name, x, exponent, self.splat(0.0), all_lanes, current_rounding))
        exponent = self.to_integer(self.at_least(exponent, self.splat(-126.0)))
        return self.as_float(self.as_integer(x) + (exponent << self.splat_int(23)))

    def total(self, x: Expr) -> Expr:
        """The sum of the lanes, a float."""
        return self.register(self._folded(x, lambda a, b: a + b))[0]

    def largest(self, x: Expr) -> Expr:
        """The largest of the lanes that are numbers, in every lane."""
        return self._folded(x, self.at_least)

    def _folded(self, x: Expr, fold: Callable[[Expr, Expr], Expr]) -> Expr:
        """All lanes folded into each of them: halves first, then quarters, and so on."""
        distance = self.lanes // 2
        while distance:
            x = self.keep(x)
            x = fold(x, T.shuffle([x], [(i + distance) % self.lanes for i in range(self.lanes)]))
            distance //= 2
        return x

    def _float(self, name: str, *x: Expr) -> Expr:
        return T.intrinsic(self.floats, f"{name}.v{self.lanes}f32", *x)

    # int32.

    def as_float(self, bits: Expr) -> Expr:
        """A vector of int32 taken for the bits of float32."""
        return T.reinterpret(self.floats, bits)

    def as_integer(self, x: Expr) -> Expr:
        """The bits of a vector of float32."""
        return T.reinterpret(self.integers, x)

    def magnitude_bits(self, x: Expr) -> Expr:
        """The bits of a vector's absolute values: as integers they compare as the values do, NaN the largest."""
        return self.as_integer(x) & self.splat_int(_EXPONENT_AND_FRACTION)

    def to_integer(self, x: Expr) -> Expr:
        """Whole-numbered floats as int32."""
        return T.cast(x, self.integers)

    def to_nearest(self, x: Expr) -> Expr:
        """A vector of float32 rounded to int32."""
        if self.target.has_avx512:
            all_lanes, default_rounding = T.number("int16", -1), T.int32(4)
            name = "x86.avx512.mask.cvtps2dq.512"
            return T.bind(T.intrinsic(self.integers, name, x, self.splat_int(0), all_lanes, default_rounding))
        return T.bind(T.intrinsic(self.integers, "x86.avx.cvt.ps2dq.256", x))

    def largest_int(self, x: Expr) -> Expr:
        """The largest lane of a vector of int32."""
        return T.intrinsic("int32", f"vector.reduce.smax.v{self.lanes}i32", x)

    @staticmethod
    def codes(x: Expr, lanes: int) -> list[Expr]:
        """The signs of a vector, a byte (uint8) of 8 lanes each: bits are set for either zero, not for NaN (AVX)."""
        yes, no = (T.broadcast(T.int32(value), lanes) for value in (-1, 0))
        signs = T.bind(T.select(x >= T.broadcast(T.float32(0), lanes), yes, no))
        eights = [T.shuffle([signs], range(i, i + 8)) for i in range(0, lanes, 8)] if lanes > 8 else [signs]
        masks = (T.intrinsic("int32", "x86.avx.movmsk.ps.256", T.reinterpret("float32x8", some)) for some in eights)
        return [T.cast(mask, "uint8") for mask in masks]

    @staticmethod
    def prefetch(address: Expr) -> None:
        """Ask for a line of memory that will be read soon."""
        T.instruct("prefetch", address, T.int32(0), T.int32(3), T.int32(1))

    # Short integers, two or four to an int32 (AVX2 and later).

    def to_int16(self, low: Expr, high: Expr) -> Expr:
        """Two vectors of int32 as int16, with saturation, in order."""
        packed = self._pack_int16(low, high)
        # The instruction packs each 128-bit part on its own.
        parts = T.bind(T.reinterpret(f"int64x{self.lanes // 2}", packed))
        order = [*range(0, self.lanes // 2, 2), *range(1, self.lanes // 2, 2)]
        return T.reinterpret(self.integers, T.shuffle([parts], order))

    def pairs(self, low: Expr, high: Expr) -> Expr:
        """Two vectors of int32 as int16, without saturation, a number of each in an int32."""
        return (low & self.splat_int(0xFFFF)) | (high << self.splat_int(16))

    def _pack_int16(self, low: Expr, high: Expr) -> Expr:
        """Of each 128-bit part the numbers of `low`, then those of `high`."""
        return T.intrinsic(f"int16x{2 * self.lanes}", self._family + self._wide("packssdw"), low, high)

    def to_int8(self, xs: list[Expr]) -> Expr:
        """Four vectors of int32 as int8, with saturation, in order."""
        halves = (T.bind(self._pack_int16(*pair)) for pair in (xs[:2], xs[2:]))
        packed = T.intrinsic(f"int8x{4 * self.lanes}", self._family + self._wide("packsswb"), *halves)
        # Within each 128-bit part there is a word of each vector.
        order = [4 * part + x for x in range(4) for part in range(self.lanes // 4)]
        return T.shuffle([T.bind(T.reinterpret(self.integers, packed))], order)

    def dot_int16(self, x: Expr, weights: Expr, sums: Expr) -> Expr:
        """`sums` plus, in each int32, the two products of its int16."""
        x, weights = (T.reinterpret(f"int16x{2 * self.lanes}", pairs) for pairs in (x, weights))
        if self.target.has_vnni:
            return T.intrinsic(self.integers, "x86.avx512.vpdpwssd.512", sums, x, weights)
        return sums + T.intrinsic(self.integers, self._pmadd, x, weights)

    def dot_int8(self, x: Expr, weights: Expr, sums: Expr) -> Expr:
        """`sums` plus, in each int32, the four products of its int8 and, in `weights`, uint8.

        Without VNNI pairs of products must fit 16 bits.
        """
        x, weights = (T.reinterpret(f"int8x{4 * self.lanes}", words) for words in (x, weights))
        if self.target.has_vnni:
            return T.intrinsic(self.integers, "x86.avx512.vpdpbusd.512", sums, weights, x)
        name = "pmaddubs.w.512" if self.target.has_avx512 else "pmadd.ub.sw"
        pairs = T.intrinsic(f"int16x{2 * self.lanes}", self._family + name, weights, x)
        ones = T.broadcast(T.number("int16", 1), 2 * self.lanes)
        return sums + T.intrinsic(self.integers, self._pmadd, pairs, ones)

    @property
    def _pmadd(self) -> str:
        return self._family + ("pmaddw.d.512" if self.target.has_avx512 else "pmadd.wd")

    def _wide(self, name: str) -> str:
        return f"{name}.512" if self.target.has_avx512 else name

    def look_up_bytes(self, table: Expr, indices: Expr) -> Expr:
        """Of a table of 16 bytes, those of 16 indices below 16 (SSSE3)."""
        return T.intrinsic("int8x16", "x86.ssse3.pshuf.b.128", table, indices)

    def look_up_in_parts(self, table: Expr, indices: Expr) -> Expr:
        """Of each 128-bit part of a vector of bytes, those that the indices below 16 in the same part name (AVX2)."""
        return T.intrinsic(f"int8x{4 * self.lanes}", self._family + self._wide("pshuf.b"), table, indices)

    def look_up_words(self, table: Expr, indices: Expr) -> Expr:
        """Of a table of 32 int16, those that the lowest 5 bits of 32 indices name (AVX-512)."""
        return T.intrinsic("int16x32", "x86.avx512.permvar.hi.512", table, T.reinterpret("int16x32", indices))

    # bfloat16: memory of it is seen as int16, and computed with in float32. TVM's own casts do not compile for every
    # target; these are integer arithmetic and do.

    def read(self, row: Buffer, start: Index, count: int) -> Expr:
        """`count` numbers of a row of float32 or bfloat16 memory as float32."""
        x = row[T.at(start, count)]
        return self.widen(x, count) if row.dtype == "bfloat16" else x

    def write(self, row: Buffer, start: Index, x: Expr, count: int) -> None:
        """Store `count` numbers in a row of float32 or bfloat16 memory."""
        row[T.at(start, count)] = self.narrow(x, count) if row.dtype == "bfloat16" else x

    def reader(self, matrix: Buffer, row_of: Callable[[Index], Expr]) -> Load:
        """What reads from rows of a matrix of float32 or bfloat16, of which ``row_of(row)`` says which."""
        return lambda row, start, count: self.read(matrix.part(row_of(row)), start, count)

    def writer(self, matrix: Buffer, row_of: Callable[[Index], Expr]) -> Store:
        """What writes to such rows."""
        return lambda row, start, x, count: self.write(matrix.part(row_of(row)), start, x, count)

    def widen(self, bits: Expr, lanes: int) -> Expr:
        """float32 numbers of the bits (int16) of bfloat16 ones."""
        return T.reinterpret(_type("float32", lanes), T.cast(bits, _type("int32", lanes)) << _splat(16, lanes))

    def narrow(self, x: Expr, lanes: int) -> Expr:
        """The bits (int16) of the bfloat16 numbers nearest to float32 ones, ties to even."""
        return T.cast(_rounded(x, lanes) >> _splat(16, lanes), _type("int16", lanes))

    def round_to_bfloat16(self, x: Expr) -> Expr:
        """A vector of float32 rounded to what bfloat16 can hold."""
        return self.as_float(_rounded(x, self.lanes) & self.splat_int(-65536))

    def to_bfloat16(self, low: Expr, high: Expr) -> Expr:
        """Two vectors of float32 rounded to bfloat16, in order, two to an int32 (AVX-512 BF16)."""
        return T.reinterpret("int32x16", T.intrinsic("bfloat16x32", "x86.avx512bf16.cvtne2ps2bf16.512", high, low))

    # Tiles of AMX: 8 registers of 16 rows of 64 bytes.

    def configure_tiles(self) -> None:
        """Have the tile registers hold whole tiles. The configuration is the thread's own."""
        configuration = T.alloc(64, dtype="uint8")
        with T.serial(64) as i:
            configuration[i] = T.number("uint8", 0)
        configuration[0] = T.number("uint8", 1)
        for tile in range(8):
            configuration[16 + 2 * tile] = T.number("uint8", 64)
            configuration[48 + tile] = T.number("uint8", 16)
        T.instruct("x86.ldtilecfg", configuration.address(0))

    def release_tiles(self) -> None:
        T.instruct("x86.tilerelease")

    def zero_tile(self, tile: int) -> None:
        T.instruct("x86.tilezero", T.number("int8", tile))

    def load_tile(self, tile: int, address: Expr, stride: int) -> None:
        """`stride`: bytes from a row to the next."""
        T.instruct("x86.tileloadd64", T.number("int8", tile), address, T.int64(stride))

    def store_tile(self, tile: int, address: Expr, stride: int) -> None:
        T.instruct("x86.tilestored64", T.number("int8", tile), address, T.int64(stride))

    def multiply_tiles(self, sums: int, a: int, b: int) -> None:
        """Add to a tile of float32 the product of two of bfloat16, the second one's rows in pairs."""
        T.instruct("x86.tdpbf16ps", *(T.number("int8", tile) for tile in (sums, a, b)))


def _rounded(x: Expr, lanes: int) -> Expr:
    """Bits of float32 whose upper half is the nearest bfloat16. NaN stays NaN, whatever its payload."""
    bits = T.bind(T.reinterpret(_type("int32", lanes), x))
    rounded = bits + _splat(0x7FFF, lanes) + ((bits >> _splat(16, lanes)) & _splat(1, lanes))
    is_nan = (bits & _splat(_EXPONENT_AND_FRACTION, lanes)) > _splat(_INFINITY, lanes)
    return T.bind(T.select(is_nan, bits | _splat(_QUIET_NAN, lanes), rounded))


def _type(name: str, lanes: int) -> str:
    return name if lanes == 1 else f"{name}x{lanes}"


def _splat(x: int, lanes: int) -> Expr:
    return T.int32(x) if lanes == 1 else T.broadcast(T.int32(x), lanes)
