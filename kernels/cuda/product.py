"""What kernels for linear layers on NVIDIA GPUs have in common: the product of a block of rows with a layer's weights.

There are two ways to compute it.

``"tensor"``: tensor cores multiply, 16 x 16 x 16 at a time, and add up in float32. Weights are narrowed on the way into
shared memory. Codes are decoded relative to the largest offset of their channel, so that weights lie in the range of
the narrow type whatever their exponents; that offset scales the sum in the end. float16 activations are multiplied as
float16. All others are bfloat16: bfloat16 as it is, float32 in two pieces, the upper 16 bits and what is left of it,
rounded. So any finite float32 goes in, none becomes infinite, and beside the rounding of the sum
``|y - exact y| <= 2**-16 * sum |x| |w|``; ordinary float32 weights are taken in two pieces as well, which doubles the
bound. Of two terms that are more than 2**17 (float16; 2**120 for bfloat16) apart, the smaller one may vanish.

``"float32"``: the ordinary units, decoded weights and fused multiply-adds in float32 throughout.

A block of 128 threads computes 64 x 64 numbers. Any number of rows, inputs and outputs is served, by guarded loads and
stores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.runtime.numerics import Numerics
from shiftadd3d.kernels.runtime.targets import CudaTarget

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

# Of the numbers that a thread computes without tensor cores, so many are below one another, and side by side.
_DOWN, _ACROSS = 8, 4
_SMALLEST_EXPONENT = {"float16": -24, "bfloat16": -126}
_FLOAT16_BITS = 5  # codes of up to so many bits have windows that float16 holds


def form(target: CudaTarget, numerics: Numerics, bits: int, dtype: Dtype) -> Form:
    """The way that is as exact as `numerics` asks for."""
    if dtype == "float16":
        return "tensor" if bits <= _FLOAT16_BITS else "float32"
    if dtype == "float32" and numerics == "exact":
        return "float32"
    return "tensor" if target.has_bfloat16 else "float32"


def error_bound(form: Form, dtype: Dtype) -> float:
    """How far a product may be from the exact one, for each unit of ``sum |x| |w|`` with weights of powers of two."""
    return 2.0**-16 if form == "tensor" and dtype == "float32" else 2.0**-20


class Weights:
    """The weights of a linear layer as a kernel sees them.

    Attributes:
        inputs, outputs: their numbers, expressions.
        bias: buffer [outputs] float32.
    """

    parts = 1
    """How many narrow numbers stand for one weight."""

    def __init__(self, inputs: Any, outputs: Any, bias: Any) -> None:
        import tvm.script

        self._T: Any = tvm.script.tirx
        self.inputs, self.outputs, self.bias = inputs, outputs, bias

    def value(self, channel: Any, index: Any) -> Any:
        """One weight as a float32."""
        raise NotImplementedError

    def narrow(self, channel: Any, index: Any, dtype: str) -> list[Any]:
        """The parts that stand for one weight, float32 numbers that `dtype` holds, or comes close to."""
        raise NotImplementedError

    def scale(self, channel: Any) -> Any:
        """What a sum of products with narrow weights has to be multiplied by."""
        raise NotImplementedError


class FloatWeights(Weights):
    """Ordinary weights: a buffer [outputs, inputs] in `dtype`."""

    def __init__(self, weight: Any, dtype: Dtype, inputs: Any, outputs: Any, bias: Any) -> None:
        super().__init__(inputs, outputs, bias)
        self._weight, self.parts = weight, 2 if dtype == "float32" else 1

    def value(self, channel: Any, index: Any) -> Any:
        return self._T.cast(self._weight[channel, index], "float32")

    def narrow(self, channel: Any, index: Any, dtype: str) -> list[Any]:
        value = self._T.bind(self.value(channel, index))
        return [value] if self.parts == 1 else [_upper(value), _lower(value)]

    def scale(self, channel: Any) -> Any:
        return self._T.float32(1)


class PackedWeights(Weights):
    """Powers of two: codes [terms, outputs, bytes] uint8 and offsets [terms, outputs] int8."""

    def __init__(self, codes: Any, offset: Any, bits: int, terms: int, inputs: Any, outputs: Any, bias: Any) -> None:
        super().__init__(inputs, outputs, bias)
        self._codes, self._offset, self._bits, self.parts = codes, offset, bits, terms
        self._levels = power_of_two.num_exponents(bits)

    def value(self, channel: Any, index: Any) -> Any:
        values = [self._term(term, channel, index, 0, power_of_two.MIN_EXPONENT) for term in range(self.parts)]
        return sum(values[1:], values[0])

    def narrow(self, channel: Any, index: Any, dtype: str) -> list[Any]:
        top = self._T.bind(self._top(channel))
        return [self._term(term, channel, index, top, _SMALLEST_EXPONENT[dtype]) for term in range(self.parts)]

    def scale(self, channel: Any) -> Any:
        return self._T.reinterpret("float32", (self._top(channel) + 127) << 23)

    def _top(self, channel: Any) -> Any:
        """The exponent that the weights of a channel are scaled by: its largest offset."""
        T = self._T
        offsets = [T.cast(self._offset[term, channel], "int32") for term in range(self.parts)]
        return offsets[0] if len(offsets) == 1 else T.max(*offsets)

    def _term(self, term: int, channel: Any, index: Any, scale: Any, smallest: int) -> Any:
        """``weight / 2**scale`` as a float32, 0 where its exponent is below `smallest`."""
        T = self._T
        code = T.bind(self._code(term, channel, index))
        level = code & self._levels
        exponent = T.bind(T.cast(self._offset[term, channel], "int32") - scale + level - self._levels)
        sign = (code >> (self._bits - 1)) << 31
        is_zero = T.Or(level == 0, exponent < smallest)
        return T.reinterpret("float32", T.Select(is_zero, T.int32(0), ((exponent + 127) << 23) | sign))

    def _code(self, term: int, channel: Any, index: Any) -> Any:
        T = self._T
        bit = index * self._bits
        word = T.cast(self._codes[term, channel, bit >> 3], "int32")
        if 8 % self._bits:
            # A code may reach into the next byte; the last one of a row does not.
            following = T.min((bit >> 3) + 1, self._codes.shape[2] - 1)
            word = word | (T.cast(self._codes[term, channel, following], "int32") << 8)
        return (word >> (bit & 7)) & ((1 << self._bits) - 1)


class Choice(NamedTuple):
    """Weights that a block may be multiplied by, and whether it is: the same for all of its threads.

    A block that none applies to has no rows.
    """

    weights: Weights
    applies: Any


@dataclass(frozen=True)
class Rows:
    """The rows of a block, numbered from 0.

    Attributes:
        exists: ``exists(row)``, whether there is such a row.
        load: ``load(row, input)``, a number of x, for rows that are not there any one of the tensor.
        store: ``store(row, output, y)`` takes y in float32, with bias and activation, for rows that are there.
    """

    exists: Callable[[Any], Any]
    load: Callable[[Any, Any], Any]
    store: Callable[[Any, Any, Any], None]


def emit(
    form: Form,
    dtype: Dtype,
    activation: Activation,
    thread: Any,
    block_column: Any,
    choices: Sequence[Choice],
    rows: Rows,
) -> None:
    """Emit the product of a block's rows with the one of `choices` that applies, if one does.

    Args:
        dtype: of what `rows` loads.
        thread: its number in the block.
        block_column: the number of the block among those that share its rows.
    """
    (_emit_tensor if form == "tensor" else _emit_float32)(dtype, activation, thread, block_column, choices, rows)


def _emit_float32(
    dtype: Dtype, activation: Activation, thread: Any, block_column: Any, choices: Sequence[Choice], rows: Rows
) -> None:
    import tvm.script

    T: Any = tvm.script.tirx
    depth, padding = INPUTS["float32"], _PADDING["float32"]
    across = COLUMNS // _ACROSS  # threads that share rows
    # Inputs down, so that a thread's rows, and the columns of neighbouring threads, lie side by side.
    xs = T.alloc_buffer((depth, ROWS + padding), "float32", scope="shared")
    ws = T.alloc_buffer((depth, COLUMNS + padding), "float32", scope="shared")
    sums = T.alloc_buffer((_DOWN, _ACROSS), "float32", scope="local")

    def stage_row(row: Any, at: Any, x: Any) -> None:
        T.buffer_store(xs, x, [at, row])

    def stage_weight(column: Any, at: Any, weights: Weights, channel: Any, k: Any, is_there: Any) -> None:
        value = weights.value(channel, k)
        T.buffer_store(ws, T.Select(is_there, value, T.float32(0)), [at, column])

    with T.unroll(_DOWN) as i, T.unroll(_ACROSS) as j:
        T.buffer_store(sums, T.float32(0), [i, j])
    for choice in choices:
        with T.serial(_steps(choice, depth)) as step:
            _stage(thread, step, depth, block_column, choice.weights, rows, "float32", stage_row, stage_weight)
            with T.unroll(depth) as inner, T.unroll(_DOWN) as i, T.unroll(_ACROSS) as j:
                product = xs[inner, thread // across * _DOWN + i] * ws[inner, thread % across + j * across]
                T.buffer_store(sums, sums[i, j] + product, [i, j])  # nvcc makes it a fused multiply-add
    with T.unroll(_DOWN) as i, T.unroll(_ACROSS) as j:
        row = T.bind(thread // across * _DOWN + i)
        column = T.bind(block_column * COLUMNS + thread % across + j * across)
        _finish(choices, rows, row, column, activation, lambda _, i=i, j=j: sums[i, j])


def _emit_tensor(
    dtype: Dtype, activation: Activation, thread: Any, block_column: Any, choices: Sequence[Choice], rows: Rows
) -> None:
    import tvm.script

    T: Any = tvm.script.tirx
    depth, stride = INPUTS["tensor"], INPUTS["tensor"] + _PADDING["tensor"]
    side, size = _FRAGMENT, _FRAGMENT**2
    narrow = "float16" if dtype == "float16" else "bfloat16"
    pieces = 2 if dtype == "float32" else 1
    most = max(choice.weights.parts for choice in choices)
    # Four warps, two by two, have half of the rows and half of the columns each: two fragments by two.
    half, out_stride = ROWS // 2, _FRAGMENT + 4
    warp = T.bind(thread // 32)
    xs = T.alloc_buffer((pieces, ROWS, stride), narrow, scope="shared")
    ws = T.alloc_buffer((most, COLUMNS, stride), narrow, scope="shared")
    out = T.alloc_buffer((THREADS // 32, side, out_stride), "float32", scope="shared")
    a = T.alloc_buffer((2 * pieces, size), narrow, scope="wmma.matrix_a")
    b = T.alloc_buffer((2 * most, size), narrow, scope="wmma.matrix_b")
    sums = T.alloc_buffer((4, size), "float32", scope="wmma.accumulator")

    def stage_row(row: Any, at: Any, x: Any) -> None:
        if pieces == 2:
            x = T.bind(x)
            T.buffer_store(xs, T.cast(_upper(x), narrow), [0, row, at])
            T.buffer_store(xs, T.cast(_lower(x), narrow), [1, row, at])
        else:
            T.buffer_store(xs, x, [0, row, at])

    def stage_weight(column: Any, at: Any, weights: Weights, channel: Any, k: Any, is_there: Any) -> None:
        for part, value in enumerate(weights.narrow(channel, k, narrow)):
            T.buffer_store(ws, T.cast(T.Select(is_there, value, T.float32(0)), narrow), [part, column, at])

    def load(fragments: Any, number: Any, staged: Any, row: Any, inner: Any, order: str) -> None:
        pointer = staged.access_ptr("r", ptr_type=narrow, offset=row * stride + inner * side)
        T.evaluate(T.tvm_load_matrix_sync(fragments.data, side, side, side, number, pointer, stride, order))

    with T.unroll(4) as i:
        T.evaluate(T.tvm_fill_fragment(sums.data, side, side, side, i, T.float32(0)))
    for choice in choices:
        parts = choice.weights.parts
        with T.serial(_steps(choice, depth)) as step:
            _stage(thread, step, depth, block_column, choice.weights, rows, dtype, stage_row, stage_weight)
            with T.serial(depth // side) as inner:
                with T.unroll(2) as i:
                    with T.unroll(pieces) as piece:
                        row = piece * ROWS + warp // 2 * half + i * side
                        load(a, i * pieces + piece, xs, row, inner, "row_major")
                    with T.unroll(parts) as part:
                        row = part * COLUMNS + warp % 2 * half + i * side
                        load(b, i * parts + part, ws, row, inner, "col_major")
                with T.unroll(2) as i, T.unroll(2) as j, T.unroll(pieces) as piece, T.unroll(parts) as part:
                    total, x, w = i * 2 + j, i * pieces + piece, j * parts + part
                    T.evaluate(T.tvm_mma_sync(sums.data, total, a.data, x, b.data, w, sums.data, total))
    with T.unroll(2) as i, T.unroll(2) as j:
        pointer = out.access_ptr("w", ptr_type="float32", offset=warp * side * out_stride)
        T.evaluate(T.tvm_store_matrix_sync(sums.data, side, side, side, i * 2 + j, pointer, out_stride, "row_major"))
        column = T.bind(block_column * COLUMNS + warp % 2 * half + j * side + thread % side)
        with T.serial(size // 32, unroll=2) as e:
            of_fragment = T.bind(e * 2 + thread % 32 // side)
            row = T.bind(warp // 2 * half + i * side + of_fragment)
            total = out[warp, of_fragment, thread % side]
            _finish(choices, rows, row, column, activation, lambda w, c=column, total=total: total * w.scale(c))


def _steps(choice: Choice, depth: int) -> Any:
    """Turns that a block takes through the inputs: none with weights that are not its own.

    A loop without turns, not a condition, because all threads of a block have to meet in it.
    """
    import tvm.script

    T: Any = tvm.script.tirx
    steps = (choice.weights.inputs + (depth - 1)) // depth
    return steps if choice.applies is True else T.Select(choice.applies, steps, T.int32(0))


def _stage(
    thread: Any,
    step: Any,
    depth: int,
    block_column: Any,
    weights: Weights,
    rows: Rows,
    dtype: str,
    stage_row: Callable[[Any, Any, Any], None],
    stage_weight: Callable[[Any, Any, Weights, Any, Any, Any], None],
) -> None:
    """Bring one turn's inputs of all rows and columns into shared memory, 0 for what is not there.

    Args:
        dtype: what numbers of x are staged as.
    """
    import tvm.script

    T: Any = tvm.script.tirx
    per_pass, at = THREADS // depth, T.bind(thread % depth)
    k = T.bind(step * depth + at)
    index = T.bind(T.min(k, weights.inputs - 1))
    with T.serial(ROWS // per_pass, unroll=_LOADS) as i:
        row = T.bind(i * per_pass + thread // depth)
        x = T.cast(rows.load(row, index), dtype)
        stage_row(row, at, T.Select(T.And(rows.exists(row), k < weights.inputs), x, T.cast(T.float32(0), dtype)))
    with T.serial(COLUMNS // per_pass, unroll=_LOADS // 2) as i:
        column = T.bind(i * per_pass + thread // depth)
        channel = T.bind(block_column * COLUMNS + column)
        is_there = T.bind(T.And(channel < weights.outputs, k < weights.inputs))
        stage_weight(column, at, weights, T.bind(T.min(channel, weights.outputs - 1)), index, is_there)


def _finish(
    choices: Sequence[Choice],
    rows: Rows,
    row: Any,
    column: Any,
    activation: Activation,
    total: Callable[[Weights], Any],
) -> None:
    """Store one sum, ``total(weights)``, with bias and activation, if it belongs to a row and a column."""
    import tvm.script

    T: Any = tvm.script.tirx
    (weights, applies), *others = choices
    outputs, biased = weights.outputs, lambda weights: total(weights) + weights.bias[T.min(column, weights.outputs - 1)]
    y = biased(weights)
    for weights, applies in others:
        outputs, y = T.Select(applies, weights.outputs, outputs), T.Select(applies, biased(weights), y)
    exists = T.bind(rows.exists(row))  # TVM cannot have shared memory read in a condition
    with T.If(T.And(exists, column < outputs)), T.Then():
        rows.store(row, column, _activate(activation, T.bind(y)))


def _upper(x: Any) -> Any:
    """The upper half of a float32: never infinite where x is finite, as rounding could make it."""
    import tvm.script

    T: Any = tvm.script.tirx
    return T.reinterpret("float32", T.reinterpret("int32", x) & -65536)


def _lower(x: Any) -> Any:
    """What `_upper` leaves over; infinity leaves nothing, NaN stays NaN."""
    import tvm.script

    T: Any = tvm.script.tirx
    return T.Select(x == _upper(x), T.float32(0), x - _upper(x))


def _activate(activation: Activation, y: Any) -> Any:
    import tvm.script

    T: Any = tvm.script.tirx
    if activation == "relu":
        return T.Select(y < T.float32(0), T.float32(0), y)  # NaN stays
    if activation == "gelu":
        return T.float32(0.5) * y * (T.float32(1) + T.erf(y * T.float32(0.5**0.5)))
    return y
