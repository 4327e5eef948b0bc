"""The product of a block of rows with a layer's weights, for all kernels of linear layers on NVIDIA GPUs.

There are two forms.

``"tensor"``: tensor cores multiply 16 x 16 x 16 numbers at a time and sum up in float32. Weights become narrow numbers
on the way into shared memory. Codes are decoded relative to the largest offset of their channel. So weights are in the
range of the narrow type for all exponents, and that offset scales the sum at the end. float16 activations are
multiplied as float16, and all others as bfloat16. A float32 activation becomes two pieces: its upper 16 bits, and the
rest, rounded. So no finite float32 becomes infinite. Besides the rounding of the sum, ``|y - exact y| <= 2**-16 * sum
|x| |w|``. Ordinary float32 weights become two pieces as well, which doubles the bound. If two terms are more than 2**17
(float16) or 2**120 (bfloat16) apart, the smaller one may vanish.

``"float32"``: decoded weights and fused multiply-adds in float32, without tensor cores.

A block of 128 threads computes 64 x 64 numbers. Loads and stores are guarded, so there may be any number of rows,
inputs and outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.cuda.tile import ACROSS, Tile, relu, shared, shared_out
from shiftadd3d.kernels.reference import activations, power_of_two
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.runtime import memory
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.numerics import Numerics
from shiftadd3d.kernels.runtime.targets import CudaTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr

Form = Literal["tensor", "float32"]
Dtype = Literal["float32", "bfloat16", "float16"]

DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

THREADS = 128
ROWS, COLUMNS = 64, 64  # of a block
INPUTS = {"tensor": 32, "float32": 16}  # staged at once
_FRAGMENT = 16  # side of what one instruction of the tensor cores multiplies
_PADDING = {"tensor": 8, "float32": 4}  # elements between rows in shared memory, against conflicts of banks
_LOADS = 4  # of activations that a thread has under way at once; with more, or as many of weights, registers run short

_SMALLEST_EXPONENT = {"float16": -24, "bfloat16": -126}
_FLOAT16_BITS = 5  # codes of up to so many bits have windows that float16 holds


def form(target: CudaTarget, numerics: Numerics, bits: int, dtype: Dtype) -> Form:
    """The fastest form that is as exact as `numerics` asks for."""
    if dtype == "float16":
        return "tensor" if bits <= _FLOAT16_BITS else "float32"
    if dtype == "float32" and numerics not in ("fast", "int8"):
        return "float32"
    return "tensor" if target.has_bfloat16 else "float32"


def check_product(
    y: Tensor,
    exact: Tensor,
    size: Tensor,
    form: Form,
    dtype: Dtype,
    activation: Activation,
    gates: Tensor | float = 1.0,
) -> None:
    """Raise `AssertionError` if y is too far from the activation of an exact product, multiplied by gates.

    Args:
        size: ``sum |x| |w|``; twice that for ordinary weights.
    """
    error = (2.0**-16 if form == "tensor" and dtype == "float32" else 2.0**-20) * size
    rounding = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-10}[dtype] * (exact.abs() + error)
    # The slope of the activation functions is at most 1.13; 2**-24 is the smallest float16.
    bound = 1.2 * (error + rounding) + (2.0**-24 if dtype == "float16" else 0.0)
    worst = ((y.double() - activations.apply(activation, exact) * gates).abs() - bound).max().item()
    assert worst <= 0, f"it is off by {worst:.2g} more than it may be"


class Weights(ABC):
    """The weights of a linear layer, as arguments of a kernel.

    Attributes:
        inputs, outputs: numbers of inputs and outputs.
        bias: [outputs] float32.
        parts: how many narrow numbers stand for one weight.
    """

    def __init__(self, inputs: Expr, outputs: Expr, bias: Buffer, parts: int) -> None:
        self.inputs, self.outputs, self.bias, self.parts = inputs, outputs, bias, parts

    @abstractmethod
    def value(self, channel: Expr, index: Expr) -> Expr:
        """One weight as a float32."""

    @abstractmethod
    def narrow(self, channel: Expr, index: Expr, dtype: str) -> list[Expr]:
        """The parts of one weight: float32 numbers that `dtype` can express, at least nearly."""

    @abstractmethod
    def scale(self, channel: Expr) -> Expr:
        """The factor for a sum of products with narrow weights."""

    @staticmethod
    def argument(name: str, dtype: Dtype, bits: int, terms: int) -> Weights:
        """The next arguments of a function: sizes, then weight or codes and offset, then bias.

        With 0 terms, weights are ordinary.
        """
        inputs, outputs = T.scalars(f"inputs{name}", f"outputs{name}")
        bias = T.tensor(f"bias{name}", (outputs,), "float32")
        if not terms:
            return _Ordinary(inputs, outputs, bias, T.tensor(f"weight{name}", (outputs, inputs), dtype))
        codes = T.tensor(f"codes{name}", (terms, outputs, *T.scalars(f"length{name}")), "uint8")
        return _Packed(inputs, outputs, bias, codes, T.tensor(f"offset{name}", (terms, outputs), "int8"), bits)


class _Ordinary(Weights):
    """A buffer [outputs, inputs]."""

    def __init__(self, inputs: Expr, outputs: Expr, bias: Buffer, weight: Buffer) -> None:
        super().__init__(inputs, outputs, bias, 2 if weight.dtype == "float32" else 1)
        self._weight = weight

    def value(self, channel: Expr, index: Expr) -> Expr:
        return T.cast(self._weight[channel, index], "float32")

    def narrow(self, channel: Expr, index: Expr, dtype: str) -> list[Expr]:
        value = T.bind(self.value(channel, index))
        return [value] if self.parts == 1 else [_upper(value), _lower(value)]

    def scale(self, channel: Expr) -> Expr:
        return T.float32(1)


class _Packed(Weights):
    """Powers of two: codes [terms, outputs, bytes] uint8 and offsets [terms, outputs] int8."""

    def __init__(self, inputs: Expr, outputs: Expr, bias: Buffer, codes: Buffer, offset: Buffer, bits: int) -> None:
        super().__init__(inputs, outputs, bias, codes.extent(0))
        self._codes, self._offset, self._bits = codes, offset, bits
        self._levels = power_of_two.num_exponents(bits)

    def value(self, channel: Expr, index: Expr) -> Expr:
        least = power_of_two.MIN_EXPONENT
        return T.total([self._term(term, channel, index, T.int32(0), least) for term in range(self.parts)])

    def narrow(self, channel: Expr, index: Expr, dtype: str) -> list[Expr]:
        top = T.bind(self._top(channel))
        return [self._term(term, channel, index, top, _SMALLEST_EXPONENT[dtype]) for term in range(self.parts)]

    def scale(self, channel: Expr) -> Expr:
        return T.reinterpret("float32", (self._top(channel) + 127) << 23)

    def _top(self, channel: Expr) -> Expr:
        """The exponent that the weights of a channel are scaled by: its largest offset."""
        offsets = [T.cast(self._offset[term, channel], "int32") for term in range(self.parts)]
        return offsets[0] if len(offsets) == 1 else T.max(*offsets)

    def _term(self, term: int, channel: Expr, index: Expr, scale: Expr, smallest: int) -> Expr:
        """``weight / 2**scale`` as a float32, 0 where its exponent is below `smallest`."""
        code = T.bind(self._code(term, channel, index))
        level = code & self._levels
        exponent = T.bind(T.cast(self._offset[term, channel], "int32") - scale + level - self._levels)
        sign = (code >> (self._bits - 1)) << 31
        is_zero = T.either(level == 0, exponent < smallest)
        return T.reinterpret("float32", T.select(is_zero, T.int32(0), ((exponent + 127) << 23) | sign))

    def _code(self, term: int, channel: Expr, index: Expr) -> Expr:
        bit = index * self._bits
        word = T.cast(self._codes[term, channel, bit >> 3], "int32")
        if 8 % self._bits:
            # A code may reach into the next byte; the last one of a row does not.
            following = T.min((bit >> 3) + 1, self._codes.shape[2] - 1)
            word = word | (T.cast(self._codes[term, channel, following], "int32") << 8)
        return (word >> (bit & 7)) & ((1 << self._bits) - 1)


class Layer(NamedTuple):
    """A linear layer as functions take it: contiguous tensors."""

    weight: Tensor  # [outputs, inputs] in the dtype of x, or codes [terms, outputs, bytes]
    offset: Tensor | None  # beside codes, [terms, outputs]
    bias: Tensor  # [outputs] float32
    inputs: int

    @classmethod
    def ready(cls, weight: Tensor, offset: Tensor | None, bias: Tensor | None, x: Tensor, inputs: int) -> Layer:
        """Of an ordinary weight, or of codes and offset, and for an x; a bias may be None."""
        if offset is None:
            outputs, weight = len(weight), weight.to(x.dtype)
        else:
            outputs, offset = offset.shape[1], offset.contiguous()
        return cls(weight.contiguous(), offset, memory.float32_bias(bias, outputs, x.device), inputs)

    def arguments(self, name: str) -> dict[str, Tensor | int]:
        """By their names in a function, where `Weights.argument` was told `name`."""
        given = {f"inputs{name}": self.inputs, f"outputs{name}": len(self.bias), f"bias{name}": self.bias}
        if self.offset is None:
            return given | {f"weight{name}": self.weight}
        length = self.weight.shape[2]
        return given | {f"codes{name}": self.weight, f"length{name}": length, f"offset{name}": self.offset}


class Choice(NamedTuple):
    """Weights that a block may be multiplied by, and whether it is. That is the same for all threads of the block.

    If no choice applies, the block has no rows.
    """

    weights: Weights
    applies: Expr | Literal[True]


@dataclass(frozen=True)
class Rows:
    """The rows of a block, numbered from 0.

    Attributes:
        exists: ``exists(row)``, whether there is such a row.
        load: ``load(row, input)``, a number of x. For a row that does not exist, any number of the tensor.
        store: ``store(row, output, y)`` stores y, float32, with bias and activation. Only for rows that exist.
    """

    exists: Callable[[Expr], Expr]
    load: Callable[[Expr, Expr], Expr]
    store: Callable[[Expr, Expr, Expr], None]


class Task(NamedTuple):
    """The product of a block's rows with the weights of the choice that applies, if there is one.

    Attributes:
        dtype: of what `rows` loads.
        thread: its number in the block.
        block_column: the number of the block among the blocks of the same rows.
    """

    dtype: Dtype
    activation: Activation
    thread: Expr
    block_column: Expr
    choices: Sequence[Choice]
    rows: Rows


def emit(form: Form, task: Task) -> None:
    """Emit a product."""
    (_TensorProduct if form == "tensor" else _Float32Product)(task).emit()


class _Product(ABC):
    """The code of a product."""

    form: Form

    def __init__(self, task: Task) -> None:
        self.dtype, self.thread, self.choices, self._rows = task.dtype, task.thread, task.choices, task.rows
        self.left, self.depth = task.block_column * COLUMNS, INPUTS[self.form]
        self._activation: Activation = task.activation

    @abstractmethod
    def emit(self) -> None: ...

    @abstractmethod
    def stage_row(self, row: Expr, at: Expr, x: Expr) -> None:
        """Bring a number into shared memory."""

    @abstractmethod
    def stage_weight(self, column: Expr, at: Expr, weights: Weights, channel: Expr, k: Expr, is_there: Expr) -> None:
        """Bring a weight into shared memory, 0 where there is none."""

    def each_step(self, multiply: Callable[[Choice], None]) -> None:
        """Emit the loop over the inputs. Each turn stages a part of them.

        For weights that do not apply, the loop has no turns. It is not a condition, because all threads of a block must
        meet in it.
        """
        for choice in self.choices:
            steps = (choice.weights.inputs + (self.depth - 1)) // self.depth
            with T.serial(steps if choice.applies is True else T.select(choice.applies, steps, T.int32(0))) as step:
                self._stage(choice.weights, step)
                multiply(choice)

    def _stage(self, weights: Weights, step: Expr) -> None:
        at, zero = T.bind(self.thread % self.depth), T.cast(T.float32(0), self.dtype)
        k = T.bind(step * self.depth + at)
        index = T.bind(T.min(k, weights.inputs - 1))
        with shared_out(self.thread, THREADS, ROWS * self.depth, _LOADS) as number:
            row = T.bind(number // self.depth)
            x, there = (
                T.cast(self._rows.load(row, index), self.dtype),
                T.both(self._rows.exists(row), k < weights.inputs),
            )
            self.stage_row(row, at, T.select(there, x, zero))
        with shared_out(self.thread, THREADS, COLUMNS * self.depth, _LOADS // 2) as number:
            column = T.bind(number // self.depth)
            channel = T.bind(self.left + column)
            is_there = T.bind(T.both(channel < weights.outputs, k < weights.inputs))
            self.stage_weight(column, at, weights, T.bind(T.min(channel, weights.outputs - 1)), index, is_there)

    def finish(self, row: Expr, column: Expr, total: Callable[[Weights], Expr]) -> None:
        """Store one sum, ``total(weights)``, with bias and activation, if it belongs to a row and a column."""
        (weights, _), *others = self.choices

        def biased(weights: Weights) -> Expr:
            return total(weights) + weights.bias[T.min(column, weights.outputs - 1)]

        outputs, y = weights.outputs, biased(weights)
        for weights, applies in others:
            assert applies is not True
            outputs, y = T.select(applies, weights.outputs, outputs), T.select(applies, biased(weights), y)
        exists = T.bind(self._rows.exists(row))  # TVM cannot have shared memory read in a condition
        with T.when(T.both(exists, column < outputs)):
            self._rows.store(row, column, _activate(self._activation, T.bind(y)))


class _Float32Product(_Product):
    form = "float32"

    def emit(self) -> None:
        padding = _PADDING[self.form]
        # Inputs down: so a thread's rows lie side by side, and so do the columns of neighbouring threads.
        self._xs, self._ws = shared(self.depth, ROWS + padding), shared(self.depth, COLUMNS + padding)
        sums = Tile(self.thread, COLUMNS // ACROSS)

        def multiply(_: Choice) -> None:
            with T.unroll(self.depth) as k:
                sums.add_products(lambda row: self._xs[k, row], lambda column: self._ws[k, column])

        sums.fill(lambda _: T.float32(0))
        self.each_step(multiply)
        sums.each(lambda row, column, x, _: self.finish(T.bind(row), T.bind(self.left + column), lambda _: x))

    def stage_row(self, row: Expr, at: Expr, x: Expr) -> None:
        self._xs[at, row] = T.cast(x, "float32")

    def stage_weight(self, column: Expr, at: Expr, weights: Weights, channel: Expr, k: Expr, is_there: Expr) -> None:
        self._ws[at, column] = T.select(is_there, weights.value(channel, k), T.float32(0))


class _TensorProduct(_Product):
    """Four warps, two by two. Each has half of the rows and half of the columns: two fragments by two."""

    form = "tensor"

    def emit(self) -> None:
        side, size = _FRAGMENT, _FRAGMENT**2
        self._stride = self.depth + _PADDING[self.form]
        self._narrow = "float16" if self.dtype == "float16" else "bfloat16"
        self._pieces, most = 2 if self.dtype == "float32" else 1, max(choice.weights.parts for choice in self.choices)
        self._warp, self._half = T.bind(self.thread // 32), ROWS // 2
        self._xs = shared(self._pieces, ROWS, self._stride, dtype=self._narrow)
        self._ws = shared(most, COLUMNS, self._stride, dtype=self._narrow)
        out = shared(THREADS // 32, side, side + 4)
        self._a = T.alloc(2 * self._pieces, size, dtype=self._narrow, align=-1, scope="wmma.matrix_a")
        self._b = T.alloc(2 * most, size, dtype=self._narrow, align=-1, scope="wmma.matrix_b")
        self._sums = T.alloc(4, size, align=-1, scope="wmma.accumulator")
        with T.unroll(4) as i:
            T.emit("tvm_fill_fragment", self._sums, side, side, side, i, T.float32(0))
        self.each_step(self._multiply)
        with T.unroll(2) as i, T.unroll(2) as j:
            pointer = out.pointer("w", self._warp * side * (side + 4))
            fragment = side, side, side, i * 2 + j
            T.emit("tvm_store_matrix_sync", self._sums, *fragment, pointer, side + 4, "row_major")
            column = T.bind(self.left + self._warp % 2 * self._half + j * side + self.thread % side)
            with T.serial(size // 32, unroll=2) as e:
                of_fragment = T.bind(e * 2 + self.thread % 32 // side)
                row = T.bind(self._warp // 2 * self._half + i * side + of_fragment)
                total = out[self._warp, of_fragment, self.thread % side]
                self.finish(row, column, lambda weights, total=total: total * weights.scale(column))

    def stage_row(self, row: Expr, at: Expr, x: Expr) -> None:
        if self._pieces == 2:
            x = T.bind(x)
            self._xs[0, row, at] = T.cast(_upper(x), self._narrow)
            self._xs[1, row, at] = T.cast(_lower(x), self._narrow)
        else:
            self._xs[0, row, at] = x

    def stage_weight(self, column: Expr, at: Expr, weights: Weights, channel: Expr, k: Expr, is_there: Expr) -> None:
        for part, value in enumerate(weights.narrow(channel, k, self._narrow)):
            self._ws[part, column, at] = T.cast(T.select(is_there, value, T.float32(0)), self._narrow)

    def _load(self, fragments: Buffer, number: Expr, staged: Buffer, row: Expr, inner: Expr, order: str) -> None:
        side = _FRAGMENT
        pointer = staged.pointer("r", row * self._stride + inner * side)
        T.emit("tvm_load_matrix_sync", fragments, side, side, side, number, pointer, self._stride, order)

    def _multiply(self, choice: Choice) -> None:
        side, pieces, parts = _FRAGMENT, self._pieces, choice.weights.parts
        with T.serial(self.depth // side) as inner:
            with T.unroll(2) as i:
                with T.unroll(pieces) as piece:
                    row = piece * ROWS + self._warp // 2 * self._half + i * side
                    self._load(self._a, i * pieces + piece, self._xs, row, inner, "row_major")
                with T.unroll(parts) as part:
                    row = part * COLUMNS + self._warp % 2 * self._half + i * side
                    self._load(self._b, i * parts + part, self._ws, row, inner, "col_major")
            with T.unroll(2) as i, T.unroll(2) as j, T.unroll(pieces) as piece, T.unroll(parts) as part:
                total, x, w = i * 2 + j, i * pieces + piece, j * parts + part
                T.emit("tvm_mma_sync", self._sums, total, self._a, x, self._b, w, self._sums, total)


def _upper(x: Expr) -> Expr:
    """The upper half of a float32. If x is finite, it is finite, too; rounding could make it infinite."""
    return T.reinterpret("float32", T.reinterpret("int32", x) & -65536)


def _lower(x: Expr) -> Expr:
    """What `_upper` leaves of x: 0 of infinity, NaN of NaN."""
    return T.select(x == _upper(x), T.float32(0), x - _upper(x))


def _activate(activation: Activation, y: Expr) -> Expr:
    if activation == "relu":
        return relu(y)
    if activation == "gelu":
        return T.float32(0.5) * y * (T.float32(1) + T.erf(y * T.float32(0.5**0.5)))
    return y
