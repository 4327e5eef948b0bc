"""Products with power-of-two weights, one block of rows at a time: the code that shift kernels are made of.

A product goes through stages, for each of which `ShiftProduct` has a method that emits its code:

1. `stage` brings a block of activations into the form that the machine's instructions take, in scratch memory that
   stays in the second-level cache.
2. `decode` turns the codes of a panel of outputs into numbers, a block of inputs at a time. The weights are read as
   they are stored, two to a byte, and expanded anew for each block of rows, which costs a few per cent of the product:
   nothing but the codes lives in memory.
3. `multiply` sums up a tile of the outcome over a block of inputs.

`panels` does 2 and 3 for a range of outputs, and hands the outcome over to be stored.

A power of two is exact in every format here, so only activations may round. The forms:

- ``"float32"``: fused multiply-adds on the activations as they are.
- ``"int16"``: every row is rounded to 16-bit integers with one power of two as its scale, and one instruction sums
  pairs of products in 32-bit integers. With e the exponent of a row's largest magnitude, each activation is off by at
  most ``2**(e - 15)``, and by ``2**(e - 11)`` with codes of 5 bits, whose 15 powers leave less room for sums. The
  largest magnitude has to be zero or within ``2**-64`` and ``2**64``; infinity and NaN have no place in such a row.
- ``"int8"``: the same with integers up to 127, which stand for a row's largest magnitude, so that each activation is
  off by at most 1/254 of that, and with weights of up to 4 bits, which are bytes then: twice as many products in an
  instruction. Bytes of weights are counted from -64, as one factor has to be unsigned. That makes up no more than
  ``2 * 127 * 128`` in a pair of products, which 16 bits hold.
- ``"bfloat16x1"``: matrix tiles (AMX) of bfloat16; activations in float32 are off by at most ``2**-8`` of themselves.
- ``"bfloat16x3"``: the same on three pieces of each activation, which together hold all its bits: exact. As tiles take
  denormals for zero, the largest magnitude of a row has to be as for ``"int16"``, and what is off then is less than
  ``2**-62`` of it.

Where a form cannot express an activation, `stage` raises a flag, and another form has to do the work.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from shiftadd3d.kernels.cpu import bfloat16
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.runtime.numerics import COMPILED, Numerics
from shiftadd3d.kernels.runtime.targets import CpuTarget

Form = Literal["float32", "int16", "int8", "bfloat16x1", "bfloat16x3"]
Dtype = Literal["float32", "bfloat16"]
_GROUP = 16  # codes are transposed 16 inputs by 16 outputs at a time, which fits 128-bit registers
_FRACTION_BITS, _EXPONENT_BIAS = 23, 127
_MAGNITUDE = 0x7FFFFFFF

# The bits of 2**-64 and 2**64.
_LOWEST, _HIGHEST = ((_EXPONENT_BIAS + exponent) << _FRACTION_BITS for exponent in (-64, 64))


def forms(target: CpuTarget, numerics: Numerics, bits: int, terms: int, dtype: Dtype) -> tuple[Form, ...]:
    """The forms that compute such a product with such numerics, the fastest first; the last one serves all numbers."""
    if target.has_amx:
        return ("bfloat16x3" if numerics == "exact" and dtype == "float32" else "bfloat16x1", "float32")
    if numerics == "exact" or "avx2" not in target.flags or bits > 5 or terms > 1:
        return ("float32",)
    return ("int8" if numerics == "int8" and bits <= 4 else "int16", "float32")


def all_forms(target: CpuTarget, bits: int, terms: int, dtype: Dtype) -> tuple[Form, ...]:
    """The forms that compute such a product with any numerics."""
    found: dict[Form, None] = {}
    for numerics in COMPILED:
        found |= dict.fromkeys(forms(target, numerics, bits, terms, dtype))
    return tuple(found)


def error_bound(form: Form, bits: int) -> float:
    """What an output may be off by before its activation, as a multiple of ``max |row of x| * sum |row of W|``.

    On top of that comes the rounding of float32 sums, which all forms share.
    """
    if form == "int16":
        return 2.0**-15 if bits <= 4 else 2.0**-11
    if form == "int8":
        return 1 / 253  # 1/254, and what rounding the scale makes of it
    return 2.0**-8 if form == "bfloat16x1" else 0.0


def tile_shape(target: CpuTarget, form: Form) -> tuple[int, int]:
    """Rows and columns of a tile.

    Two vectors across, and accumulators in 12 of 16 registers, or in 24 of 32; or two by two of AMX's tiles.
    """
    rows = 32 if form.startswith("bfloat16") else 12 if target.has_avx512 else 6
    return rows, 2 * target.lanes


@dataclass(frozen=True)
class Weights:
    """Buffers of codes as `power_of_two.pack` stores them: what a product is multiplied by.

    Attributes:
        codes: [terms, outputs, bytes of a row] uint8.
        offset: [terms, outputs] int8.
        bias: [outputs] float32.
        inputs, outputs: their numbers, int64 expressions.
    """

    codes: Any
    offset: Any
    bias: Any
    inputs: Any
    outputs: Any


@dataclass(frozen=True)
class Scratch:
    """Memory of one task; `ShiftProduct.scratch` makes it."""

    rows: Any  # that there is memory for, an int64 expression
    blocks: Any  # of inputs, an int64 expression
    activations: Any  # [pieces * blocks * rows, stride], the form's numbers
    bytes: Any  # [columns, bytes of a block of inputs] uint8: the codes of a panel
    codes: Any  # [columns or 16, 16] uint8: codes of as many outputs and 16 inputs
    panel: Any  # [numbers of a block of inputs, columns], the form's numbers
    units: Any  # [columns] int32: what the offset of a channel makes of its levels
    bias: Any  # [columns] float32
    factors: Any  # [columns] float32: what sums of a channel are multiplied by
    sums: Any  # [rows, columns] float32
    scales: Any  # [rows] float32: what sums of integers are multiplied by


Load = Callable[[Any, Any, int], Any]
Store = Callable[[Any, Any, Any, int], None]


class ShiftProduct(ABC):
    """The code of one product; `shift_product` makes one.

    Attributes:
        rows: rows of a tile; memory is for a multiple of them.
        columns: outputs of a panel.
        block: inputs whose weights are decoded at a time.
    """

    number = "int32"
    """What staged activations and decoded weights are stored as; int32 stands for `pair` shorter numbers."""
    pair = 2
    pieces = 1
    """How many numbers there are for each activation."""
    passes = 1
    """How often the sums go through all inputs."""
    has_factors = False
    """Whether weights lack their channel's offset, which sums are then multiplied by."""
    by_pairs = False
    """Whether `expand_pairs` makes weights of codes, as they are stored, and not `expand`."""

    def __init__(self, target: CpuTarget, form: Form, bits: int, terms: int, dtype: Dtype, block: int) -> None:
        import tvm.script

        self._T: Any = tvm.script.tirx
        self.target, self.bits, self.terms, self.lanes = target, bits, terms, target.lanes
        self.rows, self.columns = tile_shape(target, form)
        self.block = block
        self.levels = power_of_two.num_exponents(bits)
        self.round_weights = dtype == "bfloat16"  # as the twin does, where two terms make it necessary
        # A little more than a power of two: the rows of a tile must not all fall into the same few lines of the cache.
        self.stride = block // self.pair + 16
        # 24 independent sums need no unrolling, and LLVM takes a longer chain of dot products apart.
        self.unroll = 1 if target.has_avx512 else 2
        self.vectors = range(0, self.columns, self.lanes)

    def scratch(self, rows: Any, inputs: Any) -> Scratch:
        """Allocate the memory of a task for `rows` rows (a multiple of `self.rows`) of `inputs` inputs."""
        T = self._T
        blocks = T.bind((inputs + (self.block - 1)) // self.block)
        decoded = -(-self.block // (2 * _GROUP)) * (2 * _GROUP)

        def buffer(*shape: Any, dtype: str) -> Any:
            return T.alloc_buffer(shape, dtype, align=64)

        return Scratch(
            rows=rows,
            blocks=blocks,
            activations=buffer(self.pieces * blocks * rows, self.stride, dtype=self.number),
            bytes=buffer(self.columns, decoded * self.bits // 8 + _GROUP, dtype="uint8"),
            codes=buffer(max(self.columns, _GROUP), _GROUP, dtype="uint8"),
            panel=buffer(decoded // self.pair, self.columns, dtype=self.number),
            units=buffer(self.columns, dtype="int32"),
            bias=buffer(self.columns, dtype="float32"),
            factors=buffer(self.columns, dtype="float32"),
            sums=buffer(rows, self.columns, dtype="float32"),
            scales=buffer(rows, dtype="float32"),
        )

    def release(self) -> None:  # noqa: B027 (most have nothing to do)
        """Emit what a task has to do last."""

    def stage(self, scratch: Scratch, rows: Any, inputs: Any, load: Load, flag: Any) -> None:
        """Bring `rows` rows of `inputs` activations into `scratch.activations`.

        Args:
            load: ``load(row, start, count)``: `count` float32 activations of a row from input `start` on, a vector, or
                a scalar if `count` is 1.
            flag: [1] int32 buffer, set to 1 if the form cannot express an activation.
        """
        with self._T.serial(rows) as row:
            self.stage_row(scratch, row, inputs, load, flag)
        self.fill_up(scratch, rows)

    def fill_up(self, scratch: Scratch, rows: Any) -> None:
        """Stage rows of zeros up to the end of the last tile: their sums go nowhere, but must not be slow to form."""
        T = self._T
        parts, blocks = self.stride // self.lanes, self.pieces * scratch.blocks
        with T.serial(-rows % self.rows) as spare, T.serial(blocks) as block, T.serial(parts) as part:
            index = [block * scratch.rows + rows + spare, self.at(part * self.lanes)]
            T.buffer_store(scratch.activations, self.splat(0, self.number), index)

    def panels(
        self,
        scratch: Scratch,
        rows: Any,
        weights: Weights,
        first: Any,
        last: Any,
        apply: Callable[[Any], Any],
        store: Store,
    ) -> None:
        """Multiply `rows` staged rows by the weights of panels `first` to `last` - 1, and store the outputs.

        Args:
            apply: what becomes of a vector of outputs before it is stored, for instance its activation.
            store: ``store(row, output, value, count)`` stores `count` outputs, a vector, or a scalar if `count` is 1.
        """
        T, lanes = self._T, self.lanes
        turns = scratch.blocks * self.passes

        def outputs(sums: Any, j: int) -> Any:
            factors, bias = scratch.factors[self.at(j)], scratch.bias[self.at(j)]
            return apply(T.bind(self.multiply_add(sums, factors, bias) if self.has_factors else sums + bias))

        def store_from_memory(row: Any, place: Any, start: Any, has_all_columns: bool) -> None:
            with T.serial(T.min(rows - row, T.int64(self.rows))) as i:
                for j in self.vectors:
                    value = outputs(scratch.sums[place + i, self.at(j)], j)
                    if has_all_columns:
                        store(row + i, start + j, value, lanes)
                        continue
                    with T.If(start + (j + lanes) <= weights.outputs):
                        with T.Then():
                            store(row + i, start + j, value, lanes)
                        with T.Else():
                            T.buffer_store(scratch.sums, value, [place + i, self.at(j)])
                            with T.serial(T.max(weights.outputs - start - j, T.int64(0))) as rest:
                                store(row + i, start + j + rest, scratch.sums[place + i, j + rest], 1)

        with T.serial(last - first) as step:
            start = T.bind((first + step) * self.columns)
            with T.serial(self.columns) as column:
                inside, output = start + column < weights.outputs, start + column
                T.buffer_store(scratch.bias, T.if_then_else(inside, weights.bias[output], T.float32(0)), [column])
                if self.has_factors:
                    exponent = T.if_then_else(inside, self.factor(weights, output), T.int32(0))
                    factor = T.reinterpret("float32", (exponent + _EXPONENT_BIAS) << _FRACTION_BITS)
                    T.buffer_store(scratch.factors, factor, [column])
            with T.serial(turns) as turn:
                block = T.bind(turn // self.passes)
                count = T.bind(T.min(weights.inputs - block * self.block, T.int64(self.block)))
                self.decode(scratch, weights, start, turn, count)
                with T.serial((rows + (self.rows - 1)) // self.rows) as tile:
                    row = T.bind(tile * self.rows)
                    place = T.bind(self.place_of_sums(scratch, row))
                    sums = self.multiply(scratch, row, turn, count)
                    in_memory = turn + 1 == turns  # the sums are complete, and are not in registers
                    if sums:
                        whole = T.And(row + self.rows <= rows, start + self.columns <= weights.outputs)
                        with T.If(T.And(turn + 1 == turns, whole)):
                            with T.Then():
                                for i in range(self.rows):
                                    for j in self.vectors:
                                        store(row + i, start + j, outputs(sums[i][self.at(j)], j), lanes)
                            with T.Else():
                                for i in range(self.rows):
                                    for j in self.vectors:
                                        T.buffer_store(scratch.sums, sums[i][self.at(j)], [place + i, self.at(j)])
                        in_memory = T.And(in_memory, T.Not(whole))
                    with T.If(in_memory), T.Then():
                        if sums:
                            store_from_memory(row, place, start, has_all_columns=False)
                        else:
                            with T.If(start + self.columns <= weights.outputs):
                                with T.Then():
                                    store_from_memory(row, place, start, has_all_columns=True)
                                with T.Else():
                                    store_from_memory(row, place, start, has_all_columns=False)

    def decode(self, scratch: Scratch, weights: Weights, start: Any, turn: Any, count: Any) -> None:
        """Decode into `scratch.panel` the weights of the outputs from `start` on and of the block of inputs at hand.

        Args:
            count: how many inputs the block has. Weights beyond are finite, and meet activations of zero.
        """
        if not self.by_pairs:
            self._decode_copied(scratch, weights, start, turn, count)
            return
        T = self._T
        first = T.bind(turn * (self.block // 2))

        def load(column: int, step: Any) -> Any:
            return weights.codes[0, start + column, T.ramp(first + step * _GROUP, 1, _GROUP)]

        with T.If(T.And(start + self.columns <= weights.outputs, count % (2 * _GROUP) == 0)):
            with T.Then():
                with T.serial(self.columns) as column:
                    T.buffer_store(scratch.units, self.unit(weights, 0, start + column), [column])
                self.expand_pairs(scratch, count, load)
            with T.Else():
                self._decode_copied(scratch, weights, start, turn, count)

    def _decode_copied(self, scratch: Scratch, weights: Weights, start: Any, turn: Any, count: Any) -> None:
        """`decode`, by a copy of the codes: there may be fewer of them than a panel has."""
        T = self._T
        first = T.bind(turn // self.passes * (self.block * self.bits // 8))
        length = T.bind((count * self.bits + 7) // 8)
        for term in range(self.terms) if self.passes == 1 else (turn % self.passes,):
            with T.serial(self.columns) as column, T.If(start + column < weights.outputs):
                with T.Then():
                    T.buffer_store(scratch.units, self.unit(weights, term, start + column), [column])
                    with T.serial(length // _GROUP) as part:
                        codes = weights.codes[term, start + column, T.ramp(first + part * _GROUP, 1, _GROUP)]
                        T.buffer_store(scratch.bytes, codes, [column, T.ramp(part * _GROUP, 1, _GROUP)])
                    with T.serial(length % _GROUP) as rest:
                        position = length // _GROUP * _GROUP + rest
                        code = weights.codes[term, start + column, first + position]
                        T.buffer_store(scratch.bytes, code, [column, position])
                with T.Else():
                    T.buffer_store(scratch.units, T.int32(_EXPONENT_BIAS), [column])
            if self.by_pairs:
                self.expand_pairs(
                    scratch, count, lambda column, step: scratch.bytes[column, T.ramp(step * _GROUP, 1, _GROUP)]
                )
            else:
                self.expand(scratch, count, isinstance(term, int) and term > 0)

    def expand_pairs(self, scratch: Scratch, count: Any, load: Callable[[int, Any], Any]) -> None:
        """Make weights of the codes of `count` inputs, which have 4 bits and one term.

        Args:
            load: ``load(column, step)``: 16 bytes, the codes of 32 inputs.
        """
        raise NotImplementedError

    def expand(self, scratch: Scratch, count: Any, add: bool) -> None:
        """Make weights of the codes in `scratch.bytes`."""
        T = self._T
        # By twos, for the sake of products that take 32 inputs at a time.
        with T.serial((count + (2 * _GROUP - 1)) // (2 * _GROUP) * 2) as group:
            with T.serial(self.columns) as column:
                codes = self._unpacked(scratch.bytes[column, T.ramp(group * (2 * self.bits), 1, _GROUP)])
                T.buffer_store(scratch.codes, codes, [column, T.ramp(0, 1, _GROUP)])
            for half in range(0, self.columns, _GROUP):
                rows = [scratch.codes[half + i, T.ramp(0, 1, _GROUP)] for i in range(_GROUP)]
                codes = transpose([T.bind(row) for row in rows])
                for j in range(0, min(_GROUP, self.columns - half), self.lanes):
                    lanes = list(range(j, j + self.lanes))
                    wide = [T.bind(T.cast(T.Shuffle([c], lanes), f"int32x{self.lanes}")) for c in codes]
                    self.store_weights(scratch, wide, group, self.at(half + j), add)

    def unit(self, weights: Weights, term: Any, output: Any) -> Any:
        """What `scratch.units` keeps of a channel's offset, int32: the exponent that level 0 would have, biased."""
        return self.offset(weights, term, output) + (_EXPONENT_BIAS - self.levels)

    def factor(self, weights: Weights, output: Any) -> Any:
        """Where `has_factors`: the exponent, int32, of what a channel's sums are multiplied by."""
        raise NotImplementedError

    def offset(self, weights: Weights, term: Any, output: Any) -> Any:
        """A channel's offset, int32."""
        return self._T.cast(weights.offset[term, output], "int32")

    @abstractmethod
    def store_weights(self, scratch: Scratch, codes: list[Any], group: Any, column: Any, add: bool) -> None:
        """Store in `scratch.panel` the weights of 16 inputs, given as vectors of codes, or add them to those there."""

    @abstractmethod
    def stage_row(self, scratch: Scratch, row: Any, inputs: Any, load: Load, flag: Any) -> None:
        """See `stage`. Blocks are filled up with zeros as far as `multiply` reads them."""

    @abstractmethod
    def multiply(self, scratch: Scratch, row: Any, turn: Any, count: Any) -> list[Any] | None:
        """The product of the tile of rows that begins at `row` by the panel, over all turns up to this one.

        Sums of earlier turns are taken from `scratch.sums`.

        Returns:
            For each row of the tile a buffer of float32 sums, one a column, which the compiler keeps in registers; or
            None if the sums are in `scratch.sums`.
        """

    def place_of_sums(self, scratch: Scratch, row: Any) -> Any:
        """The row of `scratch.sums` that the sums of a tile begin at; one place serves all if it is for one turn only.

        They then stay in the first-level cache on their way to the outcome.
        """
        return self._T.Select(scratch.blocks * self.passes == 1, self._T.int64(0), row)

    # Vocabulary.

    def at(self, start: Any) -> Any:
        """The index of the vector that begins at `start`."""
        return self._T.ramp(start, 1, self.lanes)

    def splat(self, x: Any, dtype: str = "int32") -> Any:
        """A number, or a scalar expression, in every lane."""
        scalar = getattr(self._T, dtype)(x) if isinstance(x, (int, float)) else x
        return self._T.broadcast(scalar, self.lanes)

    def as_float(self, bits: Any) -> Any:
        """A vector of int32 taken for the bits of float32."""
        return self._T.reinterpret(f"float32x{self.lanes}", bits)

    def multiply_add(self, x: Any, y: Any, total: Any) -> Any:
        """``total + x * y``, rounded once where the target can."""
        if not self.target.has_fma:
            return total + x * y
        return self._T.call_llvm_pure_intrin(f"float32x{self.lanes}", f"llvm.fma.v{self.lanes}f32", x, y, total)

    def level(self, codes: Any) -> Any:
        """Levels of codes, int32."""
        return codes & self.splat(self.levels)

    def negative(self, codes: Any) -> Any:
        """Signs of codes as 0 and 1, int32."""
        return codes >> self.splat(self.bits - 1)

    def float_bits(self, codes: Any, unit: Any) -> Any:
        """The bits of float32 weights; `unit` is what level 0 would have in its exponent's place."""
        T = self._T
        level = T.bind(self.level(codes))
        magnitude = T.Select(level == self.splat(0), self.splat(0), (level + unit) << self.splat(_FRACTION_BITS))
        return magnitude | (self.negative(codes) << self.splat(31))

    def refuse_extremes(self, magnitudes: Any, flag: Any) -> Any:
        """Raise the flag unless the largest of the magnitudes in a buffer is zero or in the middle of float32's range.

        Returns:
            Its bits, int32.
        """
        T = self._T
        maximum = f"llvm.vector.reduce.smax.v{self.lanes}i32"
        peak = T.bind(T.call_llvm_pure_intrin("int32", maximum, magnitudes[self.at(0)]))
        with T.If(T.Or(peak >= _HIGHEST, T.And(peak > 0, peak < _LOWEST))), T.Then():
            T.buffer_store(flag, T.int32(1), [0])
        return peak

    def groups_of_vectors(
        self, row: Any, first: Any, count: Any, load: Load, use: Callable[[list[Any], Any], None]
    ) -> None:
        """Emit ``use(vectors, part)`` for `count` activations of a row, `pair` vectors at a time, then zeros."""
        T, lanes, size = self._T, self.lanes, self.pair * self.lanes
        starts = range(0, size, lanes)
        rest = T.alloc_buffer((size,), "float32", align=64)
        part = T.bind(count // size)
        with T.serial(part) as i:
            position = T.bind(first + i * size)
            use([T.bind(load(row, position + j, lanes)) for j in starts], i)
        with T.If(count % size > 0), T.Then():
            for j in starts:
                T.buffer_store(rest, self.splat(0, "float32"), [self.at(j)])
            with T.serial(count % size) as i:
                T.buffer_store(rest, load(row, first + part * size + i, 1), [i])
            use([T.bind(rest[self.at(j)]) for j in starts], part)

    def each_block(self, scratch: Scratch, inputs: Any, use: Callable[[Any, Any, Any], None]) -> None:
        """Emit ``use(block, first input, number of inputs)`` for all blocks of inputs."""
        T = self._T
        with T.serial(scratch.blocks) as block:
            first = T.bind(block * self.block)
            use(block, first, T.bind(T.min(inputs - first, T.int64(self.block))))

    def multiply_in_registers(
        self, scratch: Scratch, row: Any, turn: Any, count: Any, totals: list[Any], multiply_add: Callable[..., Any]
    ) -> None:
        """Sum up ``multiply_add(activation, weight, total)`` for a tile, over a block of inputs."""
        T = self._T
        staged = T.bind(turn * scratch.rows + row)
        inputs = self.pair * self.unroll
        with T.serial((count + (inputs - 1)) // inputs) as step:
            for k in range(self.unroll):
                position = T.bind(step * self.unroll + k)
                panel = [T.bind(scratch.panel[position, self.at(j)]) for j in self.vectors]
                for i in range(self.rows):
                    x = T.bind(self.splat(scratch.activations[staged + i, position]))
                    for j, weight in zip(self.vectors, panel, strict=True):
                        T.buffer_store(totals[i], multiply_add(x, weight, totals[i][self.at(j)]), [self.at(j)])

    def add_earlier(self, scratch: Scratch, row: Any, turn: Any, sums: list[Any]) -> None:
        """Add to a tile the sums of earlier turns."""
        with self._T.If(turn > 0), self._T.Then():
            self.fill(sums, lambda i, columns: scratch.sums[row + i, columns] + sums[i][columns])

    def tile(self, dtype: str) -> list[Any]:
        """Registers for a tile: a buffer for each row."""
        return [self._T.alloc_buffer((self.columns,), dtype, align=64) for _ in range(self.rows)]

    def fill(self, tile: list[Any], value: Callable[[int, Any], Any]) -> None:
        """Set all vectors of a tile to ``value(row, index of the columns)``."""
        for i, row in enumerate(tile):
            for j in self.vectors:
                self._T.buffer_store(row, value(i, self.at(j)), [self.at(j)])

    def look_up(self, pairs: Any, lowest: int = 0) -> list[Any]:
        """The weights of 16 bytes, pairs of codes, counted in that of level 1 from `lowest`: two vectors of int8."""
        T = self._T
        magnitudes = [0, *(1 << level for level in range(self.levels))]
        entries = [T.uint8((sign * magnitude - lowest) & 0xFF) for sign in (1, -1) for magnitude in magnitudes]
        table, pairs = T.bind(T.reinterpret("int8x16", T.Shuffle(entries, list(range(_GROUP))))), T.bind(pairs)
        codes = [T.bind(pairs & T.broadcast(T.uint8(15), _GROUP)), T.bind(pairs >> T.broadcast(T.uint8(4), _GROUP))]
        halves = [T.reinterpret("int8x16", T.Shuffle(codes, _interleaved(half, _GROUP))) for half in (0, 1)]
        name = "llvm.x86.ssse3.pshuf.b.128"
        return [T.bind(T.call_llvm_pure_intrin("int8x16", name, table, half)) for half in halves]

    def _unpacked(self, packed: Any) -> Any:
        """The first 16 codes of 16 bytes, one to a byte."""
        T = self._T
        packed = T.bind(packed)
        if self.bits == 4:
            halves = [packed & T.broadcast(T.uint8(15), _GROUP), packed >> T.broadcast(T.uint8(4), _GROUP)]
            return T.Shuffle([T.bind(half) for half in halves], _interleaved(0, _GROUP))
        # Every code lies within two bytes: gather those, and shift them by as much as each needs.
        first = [i * self.bits // 8 for i in range(_GROUP)]
        low, high = (T.cast(T.Shuffle([packed], [i + j for i in first]), "uint16x16") for j in range(2))
        shifts = T.Shuffle([T.uint16(i * self.bits % 8) for i in range(_GROUP)], list(range(_GROUP)))
        both = low | (high << T.broadcast(T.uint16(8), _GROUP))
        return T.cast((both >> shifts) & T.broadcast(T.uint16((1 << self.bits) - 1), _GROUP), "uint8x16")


class Float32Product(ShiftProduct):
    number, pair = "float32", 1

    def __init__(self, target: CpuTarget, form: Form, bits: int, terms: int, dtype: Dtype) -> None:
        # A panel takes up half of a first-level cache at most. Every block is summed up on its own: with longer ones
        # the errors of rounding would exceed those of torch's products.
        super().__init__(target, form, bits, terms, dtype, block=128)
        self.by_pairs = bits == 4 and terms == 1 and "avx2" in target.flags

    def expand_pairs(self, scratch: Scratch, count: Any, load: Callable[[int, Any], Any]) -> None:
        # A table makes integers of codes. These change places 16 channels by 16 inputs, and become floats last.
        T, lanes = self._T, self.lanes
        exponents = {j: scratch.units[self.at(j)] + self.splat(1) for j in self.vectors}
        units = {j: T.bind(self.as_float(exponents[j] << self.splat(_FRACTION_BITS))) for j in self.vectors}
        with T.serial((count + (2 * _GROUP - 1)) // (2 * _GROUP)) as step:
            for column in range(0, self.columns, _GROUP):
                channels = [self.look_up(load(column + i, step)) for i in range(_GROUP)]
                for half, integers in enumerate(zip(*channels, strict=True)):
                    for i, row in enumerate(transpose(list(integers))):
                        for j in range(0, _GROUP, lanes):
                            part = T.cast(T.Shuffle([row], list(range(j, j + lanes))), f"float32x{lanes}")
                            index = [(2 * step + half) * _GROUP + i, self.at(column + j)]
                            T.buffer_store(scratch.panel, part * units[column + j], index)

    def store_weights(self, scratch: Scratch, codes: list[Any], group: Any, column: Any, add: bool) -> None:
        T = self._T
        unit = T.bind(scratch.units[column])
        for k, code in enumerate(codes):
            index = [group * _GROUP + k, column]
            weight = self.as_float(self.float_bits(code, unit))
            if add:
                weight = scratch.panel[tuple(index)] + weight
                weight = bfloat16.round_to(weight, self.lanes) if self.round_weights else weight
            T.buffer_store(scratch.panel, weight, index)

    def stage_row(self, scratch: Scratch, row: Any, inputs: Any, load: Load, flag: Any) -> None:
        T, lanes = self._T, self.lanes

        def copy(block: Any, first: Any, count: Any) -> None:
            place = T.bind(block * scratch.rows + row)
            with T.serial(count // lanes) as part:
                value = load(row, first + part * lanes, lanes)
                T.buffer_store(scratch.activations, value, [place, self.at(part * lanes)])
            with T.serial(count % lanes) as rest:
                position = count // lanes * lanes + rest
                T.buffer_store(scratch.activations, load(row, first + position, 1), [place, position])
            with T.serial(-count % self.unroll) as rest:
                T.buffer_store(scratch.activations, T.float32(0), [place, count + rest])

        self.each_block(scratch, inputs, copy)

    def stage_store(self, scratch: Scratch) -> Store:
        """What stores outputs of a product before this one where `stage` would bring them; then call `finish_stage`."""
        T = self._T

        def store(row: Any, column: Any, value: Any, count: int) -> None:
            block, position = column // self.block, column % self.block
            place = position if count == 1 else self.at(position)
            T.buffer_store(scratch.activations, value, [block * scratch.rows + row, place])

        return store

    def finish_stage(self, scratch: Scratch, rows: Any, inputs: Any) -> None:
        """Do the rest of `stage` once all outputs are stored."""
        T = self._T
        block, count = T.bind((inputs - 1) // self.block), T.bind((inputs - 1) % self.block + 1)
        with T.serial(rows) as row, T.serial(-count % self.unroll) as rest:
            T.buffer_store(scratch.activations, T.float32(0), [block * scratch.rows + row, count + rest])
        self.fill_up(scratch, rows)

    def multiply(self, scratch: Scratch, row: Any, turn: Any, count: Any) -> list[Any]:
        sums = self.tile("float32")
        self.fill(sums, lambda i, columns: self.splat(0, "float32"))
        self.multiply_in_registers(scratch, row, turn, count, sums, self.multiply_add)
        self.add_earlier(scratch, row, turn, sums)
        return sums


class _Int16(ShiftProduct):
    has_factors = True

    def __init__(self, target: CpuTarget, form: Form, bits: int, terms: int, dtype: Dtype) -> None:
        # Sums stay below 2**31: they reach 2**15 * 2**6 * 512 with 4 bits, 2**11 * 2**14 * 48 with 5.
        self.activation_bits, block = (15, 512) if bits <= 4 else (11, 48)
        self.by_pairs = bits == 4
        super().__init__(target, form, bits, terms, dtype, block)

    def factor(self, weights: Weights, output: Any) -> Any:
        """The weight of level 1, which integers count in."""
        return self.offset(weights, 0, output) - (self.levels - 1)

    def store_weights(self, scratch: Scratch, codes: list[Any], group: Any, column: Any, add: bool) -> None:
        T = self._T

        for k in range(0, _GROUP, 2):
            low, high = (self._integer(code) for code in codes[k : k + 2])
            pair = (low & self.splat(0xFFFF)) | (high << self.splat(16))
            T.buffer_store(scratch.panel, pair, [group * (_GROUP // 2) + k // 2, column])

    def expand_pairs(self, scratch: Scratch, count: Any, load: Callable[[int, Any], Any]) -> None:
        # A table makes weights of codes, which then change places four bytes at a time, four channels by four words.
        T = self._T
        words_of_step = 2 * _GROUP // self.pair
        with T.serial((count + (2 * _GROUP - 1)) // (2 * _GROUP)) as step:
            for column in range(0, self.columns, 4):
                channels = [self._words(load(column + i, step)) for i in range(4)]
                for number, words in enumerate(zip(*channels, strict=True)):
                    for i, word in enumerate(transpose(list(words))):
                        index = [step * words_of_step + 4 * number + i, T.ramp(column, 1, 4)]
                        T.buffer_store(scratch.panel, word, index)

    def _words(self, pairs: Any) -> list[Any]:
        """The weights of 16 bytes, pairs of codes, in vectors of four words."""
        T = self._T
        return [
            T.bind(T.reinterpret("int32x4", T.cast(T.Shuffle([weights], list(range(half, half + 8))), "int16x8")))
            for weights in self.look_up(pairs)
            for half in (0, 8)
        ]

    def _integer(self, code: Any) -> Any:
        """Weights, counted in that of level 1, of codes."""
        one = self.splat(1)
        mask = self._T.bind(self.splat(0) - self.negative(code))
        return self._T.bind((((one << self.level(code)) >> one) ^ mask) - mask)

    def stage_row(self, scratch: Scratch, row: Any, inputs: Any, load: Load, flag: Any) -> None:
        T, lanes = self._T, self.lanes
        largest = T.alloc_buffer((lanes,), "int32", align=64)

        def compare(xs: list[Any], part: Any) -> None:
            for x in xs:
                magnitude = T.reinterpret(f"int32x{lanes}", x) & self.splat(_MAGNITUDE)
                T.buffer_store(largest, T.max(largest[self.at(0)], magnitude), [self.at(0)])

        T.buffer_store(largest, self.splat(0), [self.at(0)])
        self.groups_of_vectors(row, T.int64(0), inputs, load, compare)
        # Within these bounds neither the scale, nor its reciprocal, nor sums times either overflow.
        peak = self.refuse_extremes(largest, flag)
        scale, reciprocal = self.scale(T.bind(T.max(peak, T.int32(_LOWEST))))
        T.buffer_store(scratch.scales, scale, [row])
        factor = T.bind(self.splat(T.bind(reciprocal)))

        def convert(block: Any, first: Any, count: Any) -> None:
            self.convert(scratch, T.bind(block * scratch.rows + row), row, first, count, load, factor)

        self.each_block(scratch, inputs, convert)

    def scale(self, peak: Any) -> tuple[Any, Any]:
        """What the integers of a row count in, and its reciprocal; `peak` is its largest magnitude, as int32 bits."""
        T, fraction = self._T, self.activation_bits - 1
        exponent = T.bind(peak >> _FRACTION_BITS)
        bits = (exponent - fraction, 2 * _EXPONENT_BIAS + fraction - exponent)
        scale, reciprocal = (T.reinterpret("float32", part << _FRACTION_BITS) for part in bits)
        return scale, reciprocal

    def convert(self, scratch: Scratch, place: Any, row: Any, first: Any, count: Any, load: Load, factor: Any) -> None:
        """Store `count` activations of a row, times `factor`, at a place of `scratch.activations`."""

        def use(xs: list[Any], part: Any) -> None:
            integers = [self._to_int32(x * factor) for x in xs]
            self._T.buffer_store(scratch.activations, self._to_int16(*integers), [place, self.at(part * self.lanes)])

        self.groups_of_vectors(row, first, count, load, use)

    def multiply(self, scratch: Scratch, row: Any, turn: Any, count: Any) -> list[Any]:
        T, lanes = self._T, self.lanes
        totals, sums = self.tile("int32"), self.tile("float32")
        first = T.bind(turn * scratch.rows + row)
        self.fill(totals, lambda i, columns: self.splat(self.start(scratch, first + i)))
        self.multiply_in_registers(scratch, row, turn, count, totals, self._multiply_add)
        scales = [T.bind(self.splat(scratch.scales[row + i])) for i in range(self.rows)]
        self.fill(sums, lambda i, columns: T.cast(totals[i][columns], f"float32x{lanes}") * scales[i])
        self.add_earlier(scratch, row, turn, sums)
        return sums

    def _multiply_add(self, x: Any, weight: Any, total: Any) -> Any:
        T, lanes = self._T, self.lanes
        x, weight = (T.reinterpret(f"int16x{2 * lanes}", pairs) for pairs in (x, weight))
        if self.target.has_vnni:
            return T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpwssd.512", total, x, weight)
        name = "llvm.x86.avx512.pmaddw.d.512" if self.target.has_avx512 else "llvm.x86.avx2.pmadd.wd"
        return total + T.call_llvm_pure_intrin(f"int32x{lanes}", name, x, weight)

    def start(self, scratch: Scratch, place: Any) -> Any:
        """What the sums of a row begin with, which lies at a place of `scratch.activations`."""
        return 0

    def _to_int32(self, x: Any) -> Any:
        """A vector of float32 rounded to integers."""
        T, lanes = self._T, self.lanes
        integers = f"int32x{lanes}"
        if self.target.has_avx512:
            convert, all_lanes, default_rounding = "llvm.x86.avx512.mask.cvtps2dq.512", T.int16(-1), T.int32(4)
            return T.bind(T.call_llvm_pure_intrin(integers, convert, x, self.splat(0), all_lanes, default_rounding))
        return T.bind(T.call_llvm_pure_intrin(integers, "llvm.x86.avx.cvt.ps2dq.256", x))

    def _to_int16(self, low: Any, high: Any) -> Any:
        """Two vectors of int32 as int16, with saturation, in order, two to an int32."""
        packed = self._pack(low, high)
        # The instruction packs each 128-bit part on its own.
        T, lanes = self._T, self.lanes
        parts = T.bind(T.reinterpret(f"int64x{lanes // 2}", packed))
        order = [*range(0, lanes // 2, 2), *range(1, lanes // 2, 2)]
        return T.reinterpret(f"int32x{lanes}", T.Shuffle([parts], order))

    def _pack(self, low: Any, high: Any) -> Any:
        """Two vectors of int32 as int16, with saturation: of each 128-bit part those of `low`, then those of `high`."""
        name = "llvm.x86.avx512.packssdw.512" if self.target.has_avx512 else "llvm.x86.avx2.packssdw"
        return self._T.call_llvm_pure_intrin(f"int16x{2 * self.lanes}", name, low, high)


class _Int8(_Int16):
    """Activations are bytes, and so are weights, but these are counted from -64, which is as low as they get: what 64
    times the sum of the activations adds to each product is subtracted at the start.
    """

    pair = 4
    _LOWEST_WEIGHT = -64

    def scale(self, peak: Any) -> tuple[Any, Any]:
        T = self._T
        largest = T.bind(T.reinterpret("float32", peak))
        return largest / T.float32(127), T.float32(127) / largest

    def store_weights(self, scratch: Scratch, codes: list[Any], group: Any, column: Any, add: bool) -> None:
        T = self._T
        for k in range(0, _GROUP, 4):
            integers = [T.bind(self._integer(code) - self.splat(self._LOWEST_WEIGHT)) for code in codes[k : k + 4]]
            word = integers[0]
            for i, integer in enumerate(integers[1:], 1):
                word = word | (integer << self.splat(8 * i))
            T.buffer_store(scratch.panel, word, [group * (_GROUP // 4) + k // 4, column])

    def _words(self, pairs: Any) -> list[Any]:
        T = self._T
        return [T.bind(T.reinterpret("int32x4", part)) for part in self.look_up(pairs, self._LOWEST_WEIGHT)]

    def convert(self, scratch: Scratch, place: Any, row: Any, first: Any, count: Any, load: Load, factor: Any) -> None:
        T, lanes = self._T, self.lanes
        total = T.alloc_buffer((lanes,), "int32", align=64)
        T.buffer_store(total, self.splat(0), [self.at(0)])

        def use(xs: list[Any], part: Any) -> None:
            integers = [self._to_int32(x * factor) for x in xs]
            four = T.bind((integers[0] + integers[1]) + (integers[2] + integers[3]))
            T.buffer_store(total, total[self.at(0)] + four, [self.at(0)])
            T.buffer_store(scratch.activations, self._to_int8(integers), [place, self.at(part * lanes)])

        self.groups_of_vectors(row, first, count, load, use)
        add_up = f"llvm.vector.reduce.add.v{lanes}i32"
        of_row = T.call_llvm_pure_intrin("int32", add_up, total[self.at(0)])
        T.buffer_store(scratch.activations, of_row * T.int32(self._LOWEST_WEIGHT), [place, self._start])

    @property
    def _start(self) -> int:
        """Where a row of staged activations holds what its sums begin with: behind its block of inputs."""
        return self.block // self.pair

    def start(self, scratch: Scratch, place: Any) -> Any:
        return scratch.activations[place, self._start]

    def _to_int8(self, xs: list[Any]) -> Any:
        """Four vectors of int32 as int8, with saturation, in order, four to an int32."""
        T, lanes = self._T, self.lanes
        name = "llvm.x86.avx512.packsswb.512" if self.target.has_avx512 else "llvm.x86.avx2.packsswb"
        halves = (T.bind(self._pack(*pair)) for pair in (xs[:2], xs[2:]))
        packed = T.bind(T.reinterpret(f"int32x{lanes}", T.call_llvm_pure_intrin(f"int8x{4 * lanes}", name, *halves)))
        # Within each 128-bit part there is a word of each vector.
        return T.Shuffle([packed], [4 * part + x for x in range(4) for part in range(lanes // 4)])

    def _multiply_add(self, x: Any, weight: Any, total: Any) -> Any:
        T, lanes = self._T, self.lanes
        x, weight = (T.reinterpret(f"int8x{4 * lanes}", words) for words in (x, weight))
        if self.target.has_vnni:
            return T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", total, weight, x)
        names = ("pmaddubs.w.512", "pmaddw.d.512") if self.target.has_avx512 else ("pmadd.ub.sw", "pmadd.wd")
        family = "llvm.x86.avx512." if self.target.has_avx512 else "llvm.x86.avx2."
        pairs = T.call_llvm_pure_intrin(f"int16x{2 * lanes}", family + names[0], weight, x)
        ones = T.broadcast(T.int16(1), 2 * lanes)
        return total + T.call_llvm_pure_intrin(f"int32x{lanes}", family + names[1], pairs, ones)


class _Bfloat16Tiles(ShiftProduct):
    """AMX: tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights. Each tile has 16 rows of 64 bytes.

    No weight is larger than 1, and so neither sums nor their parts come near to where tiles lose bits: denormals.
    """

    has_factors = True

    def __init__(self, target: CpuTarget, form: Form, bits: int, terms: int, dtype: Dtype) -> None:
        self.pieces = 1 if form == "bfloat16x1" else 3
        self.passes = terms  # a sum of two powers is more than one bfloat16 can hold
        self.by_pairs = bits == 4 and terms == 1
        super().__init__(target, form, bits, terms, dtype, block=256)

    def scratch(self, rows: Any, inputs: Any) -> Scratch:
        # The registers' configuration is the thread's own.
        T = self._T
        configuration = T.alloc_buffer((64,), "uint8", align=64)
        with T.serial(64) as i:
            T.buffer_store(configuration, T.uint8(0), [i])
        T.buffer_store(configuration, T.uint8(1), [0])
        for tile in range(8):
            T.buffer_store(configuration, T.uint8(64), [16 + 2 * tile])
            T.buffer_store(configuration, T.uint8(16), [48 + tile])
        self._tile("ldtilecfg", T.address_of(configuration[0]))
        return super().scratch(rows, inputs)

    def release(self) -> None:
        self._tile("tilerelease")

    def factor(self, weights: Weights, output: Any) -> Any:
        offsets = [self.offset(weights, term, output) for term in range(self.terms)]
        return self._T.max(offsets[0], offsets[-1])

    def unit(self, weights: Weights, term: Any, output: Any) -> Any:
        return super().unit(weights, term, output) - self.factor(weights, output)

    def expand_pairs(self, scratch: Scratch, count: Any, load: Callable[[int, Any], Any]) -> None:
        # A byte holds a pair of codes, as an entry of a tile does. The pairs change places four at a time, and a table
        # makes weights of them.
        T = self._T
        levels = [0, *((_EXPONENT_BIAS - self.levels + level) << 7 for level in range(1, self.levels + 1))]
        # Twice, as it is looked up by five bits, and the fifth one is another code's.
        entries = 2 * [T.int16(level - sign) for sign in (0, 1 << 15) for level in levels]
        table = T.bind(T.Shuffle(entries, list(range(len(entries)))))
        low, high = (T.broadcast(T.uint32(half), _GROUP) for half in (0xFFFF, 0xFFFF0000))
        with T.serial((count + (2 * _GROUP - 1)) // (2 * _GROUP)) as step:
            for half in range(0, self.columns, _GROUP):
                rows = [T.bind(T.reinterpret("uint32x4", load(half + i, step))) for i in range(_GROUP)]
                for word, codes in enumerate(self._words(rows)):
                    for byte in range(4):
                        pair = T.bind(codes >> T.broadcast(T.uint32(8 * byte), _GROUP))
                        pair = (pair & low) | ((pair << T.broadcast(T.uint32(12), _GROUP)) & high)
                        look_up = "llvm.x86.avx512.permvar.hi.512"
                        pair = T.call_llvm_pure_intrin("int16x32", look_up, table, T.reinterpret("int16x32", pair))
                        pair = T.reinterpret("int32x16", pair)
                        T.buffer_store(scratch.panel, pair, [step * _GROUP + 4 * word + byte, self.at(half)])

    def _words(self, rows: list[Any]) -> list[Any]:
        """The first words of 16 vectors of four words in one vector, the second ones in another, and so on."""
        T = self._T

        def shuffle(vectors: list[Any], order: list[int]) -> Any:
            return T.bind(T.Shuffle(vectors, [part + i for part in range(0, _GROUP, 4) for i in order]))

        # Matrices of four by four words, one in every 128-bit part: no word has to leave its part.
        a, b, c, d = (shuffle(rows[i::4], [0, 1, 2, 3]) for i in range(4))
        pairs = [(shuffle([a, b], order), shuffle([c, d], order)) for order in ([0, 16, 1, 17], [2, 18, 3, 19])]
        return [shuffle(list(pair), order) for pair in pairs for order in ([0, 1, 16, 17], [2, 3, 18, 19])]

    def store_weights(self, scratch: Scratch, codes: list[Any], group: Any, column: Any, add: bool) -> None:
        T = self._T
        unit, zero = T.bind(scratch.units[column]), self.splat(0)

        def bits(code: Any) -> Any:
            level = T.bind(self.level(code))
            exponent = T.Select(level == zero, zero, T.max(level + unit, zero))
            return T.bind((exponent << self.splat(7)) | (self.negative(code) << self.splat(15)))

        for k in range(0, _GROUP, 2):
            pair = bits(codes[k]) | (bits(codes[k + 1]) << self.splat(16))
            T.buffer_store(scratch.panel, pair, [group * (_GROUP // 2) + k // 2, column])

    def stage_row(self, scratch: Scratch, row: Any, inputs: Any, load: Load, flag: Any) -> None:
        T, lanes = self._T, self.lanes
        largest = T.alloc_buffer((lanes,), "int32", align=64)
        T.buffer_store(largest, self.splat(0), [self.at(0)])

        def convert(block: Any, first: Any, count: Any) -> None:
            def use(xs: list[Any], part: Any) -> None:
                low, high = xs
                for x in xs:
                    magnitude = T.reinterpret(f"int32x{lanes}", x) & self.splat(_MAGNITUDE)
                    T.buffer_store(largest, T.max(largest[self.at(0)], magnitude), [self.at(0)])
                for piece in range(self.pieces):
                    place = (piece * scratch.blocks + block) * scratch.rows + row
                    index = [place, self.at(part * lanes)]
                    T.buffer_store(scratch.activations, self._to_bfloat16(low, high), index)
                    if piece + 1 < self.pieces:
                        pairs = T.bind(scratch.activations[tuple(index)])
                        low, high = self._minus(pairs, low, high)

            self.groups_of_vectors(row, first, count, load, use)

        self.each_block(scratch, inputs, convert)
        # Pieces of these are no denormals, or too small to count.
        self.refuse_extremes(largest, flag)

    def multiply(self, scratch: Scratch, row: Any, turn: Any, count: Any) -> None:
        T = self._T
        place = T.bind(self.place_of_sums(scratch, row))
        sums = [(i, j, T.address_of(scratch.sums[place + 16 * i, 16 * j])) for i in range(2) for j in range(2)]
        with T.If(turn == 0):
            with T.Then():
                for i, j, _ in sums:
                    self._tile("tilezero", T.int8(2 * i + j))
            with T.Else():
                for i, j, place in sums:
                    self._tile("tileloadd64", T.int8(2 * i + j), place, T.int64(4 * self.columns))
        block = turn // self.passes
        with T.serial((count + 31) // 32) as step:
            for j in range(2):
                weights = T.address_of(scratch.panel[step * 16, 16 * j])
                self._tile("tileloadd64", T.int8(6 + j), weights, T.int64(4 * self.columns))
            for piece in range(self.pieces):
                first = (piece * scratch.blocks + block) * scratch.rows + row
                for i in range(2):
                    activations = T.address_of(scratch.activations[first + 16 * i, step * 16])
                    self._tile("tileloadd64", T.int8(4 + i), activations, T.int64(4 * self.stride))
                for i, j, _ in sums:
                    self._tile("tdpbf16ps", T.int8(2 * i + j), T.int8(4 + i), T.int8(6 + j))
        for i, j, place in sums:
            self._tile("tilestored64", T.int8(2 * i + j), place, T.int64(4 * self.columns))

    def _tile(self, name: str, *arguments: Any) -> None:
        self._T.evaluate(self._T.call_llvm_intrin("void", f"llvm.x86.{name}", *arguments))

    def _to_bfloat16(self, low: Any, high: Any) -> Any:
        """Two vectors of float32 rounded to bfloat16, in order, two to an int32."""
        T = self._T
        convert = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
        return T.reinterpret("int32x16", T.call_llvm_pure_intrin("bfloat16x32", convert, high, low))

    def _minus(self, pairs: Any, low: Any, high: Any) -> tuple[Any, Any]:
        """What rounding has left over of two vectors, exactly."""
        T = self._T
        numbers = T.bind(T.reinterpret("uint16x32", pairs))
        halves = [T.bind(T.cast(T.Shuffle([numbers], list(range(i, i + 16))), "uint32x16")) for i in (0, 16)]
        rounded = [self.as_float(T.bind(half << T.broadcast(T.uint32(16), 16))) for half in halves]
        return T.bind(low - rounded[0]), T.bind(high - rounded[1])


def shift_product(target: CpuTarget, form: Form, bits: int, terms: int, dtype: Dtype) -> ShiftProduct:
    """The code of a product.

    Args:
        target: what it is for.
        form: how products are formed, one of `forms`.
        bits, terms: the weights' code.
        dtype: of the layer.
    """
    power_of_two.check_format(bits, terms)
    if form not in all_forms(target, bits, terms, dtype):
        raise ValueError(f"no {form} product on {target.name} with {bits} bits and {terms} terms in {dtype}")
    makers: dict[Form, type[Any]] = {"float32": Float32Product, "int16": _Int16, "int8": _Int8}
    return makers.get(form, _Bfloat16Tiles)(target, form, bits, terms, dtype)


def transpose(rows: list[Any]) -> list[Any]:
    """Vectors of as many lanes as there are vectors, a power of two, transposed: rounds of a perfect shuffle."""
    import tvm.script

    T: Any = tvm.script.tirx
    size = len(rows)
    for _ in range(size.bit_length() - 1):
        pairs = [[rows[i], rows[i + size // 2]] for i in range(size // 2)]
        rows = [T.bind(T.Shuffle(pair, _interleaved(half, size))) for pair in pairs for half in range(2)]
    return rows


def _interleaved(half: int, size: int) -> list[int]:
    """Lanes of the lower (0) or upper (1) halves of two vectors of `size`, taken in turn."""
    return [i + j for i in range(size // 2 * half, size // 2 * (half + 1)) for j in (0, size)]
