"""Two linear layers with a depthwise convolution between them, a band of a grid's rows at a time.

The hidden activations are several times as wide as the inputs and outputs. Here they stay in the second-level cache:
for each panel of hidden channels, the convolution and the activation follow the first layer at once. A task computes
its rows from top to bottom. The next band reuses the last two rows that the convolution has read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import COARSE_GELU_ERROR
from shiftadd3d.kernels.cpu.decode import Scratch, Weights
from shiftadd3d.kernels.cpu.forms import Form, error_bound
from shiftadd3d.kernels.cpu.forms.base import ShiftProduct
from shiftadd3d.kernels.cpu.forms.float32 import Float32Product
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.trials import Draw, check_within
from shiftadd3d.kernels.pack.whole import Format, LinearWeights
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.depthwise import depthwise_conv_twin
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index, Store
from shiftadd3d.kernels.whole.parts import Ends, NormWeights, Source, held, threads_of
from shiftadd3d.kernels.whole.products import (
    Kind,
    depthwise_values,
    norm_values,
    tensors_of,
    weight_values,
    weights_argument,
)
from shiftadd3d.kernels.whole.program import Exactness, Function, Program, Value
from shiftadd3d.kernels.whole.trials import RandomNorm, outcome_of, random_layer

KERNEL = 3
"""The convolution's rows and columns."""
REACH = KERNEL // 2

# Bytes of a band's hidden activations, before and after the convolution. More bands decode weights more often.
_BAND_BYTES = 9 << 17
# With fewer tokens, the cache holds everything, and it is faster to share outputs between threads.
_LEAST_TOKENS = 128


class Sizes(NamedTuple):
    """Sizes that are compiled in: widths of tokens, and their grid."""

    inputs: int
    hidden: int
    outputs: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.height * self.width


class Band:
    """Hidden activations of a band of rows, in the memory of a task, panel by panel.

    Rows that the convolution reads have a column of zeros at each end. They are kept in a ring of rows.
    """

    def __init__(self, isa: Isa, sizes: Sizes, columns: int, rows: int) -> None:
        self._isa, self._sizes, self._columns = isa, sizes, columns
        self.rows = rows
        self._places, self._pitch = rows + 2 * REACH, sizes.width + 2 * REACH
        panels = sizes.hidden // columns
        self._before = T.alloc(panels, self._places * self._pitch, columns)
        self.after = T.alloc(panels, rows * sizes.width, columns)
        self._of_token = T.alloc(self._places * sizes.width, dtype="int32")

    @contextmanager
    def each(self, task: Rows) -> Iterator[tuple[Expr, Expr, Expr, Expr]]:
        """Emit a loop over a task's bands.

        Yields:
            The first row whose tokens to `store`, and their number; the first row to `convolve`, and the one behind
            the last.
        """
        height, rows = self._sizes.height, self.rows
        self.clear_sides()
        with T.when(task.begin == 0):
            self.clear_row(T.int64(-1))
        with T.serial(T.truncdiv(task.end - task.begin + (rows - 1), T.int64(rows))) as step:
            first = held(task.begin + step * rows)
            last = held(T.min(first + rows, task.end))
            with T.when(last == height):
                self.clear_row(T.int64(height))
            # The band before has left its last rows.
            fresh = held(T.select(step == 0, T.max(first - REACH, T.int64(0)), first + REACH))
            beyond = held(T.min(last + REACH, T.int64(height)))
            self.find(fresh, beyond)
            yield fresh, held((beyond - fresh) * self._sizes.width), first, last

    def clear_sides(self) -> None:
        """Set the columns at both ends to zero."""
        self._each_panel(self._clear_sides)

    def _clear_sides(self, panel: Expr) -> None:
        with T.serial(self._places) as place:
            for column in (*range(REACH), *range(self._pitch - REACH, self._pitch)):
                self._clear(panel, place * self._pitch + column)

    def clear_row(self, row: Index) -> None:
        """Set a row beyond the grid to zero."""
        start = held(self._start(row))

        def of_panel(panel: Expr) -> None:
            with T.serial(self._sizes.width) as column:
                self._clear(panel, start + column + REACH)

        self._each_panel(of_panel)

    def _each_panel(self, use: Callable[[Expr], None]) -> None:
        with T.serial(self._before.extent(0)) as panel:
            use(panel)

    def _clear(self, panel: Expr, token: Expr) -> None:
        for j in range(0, self._columns, self._isa.lanes):
            self._before[panel, token, self._isa.at(j)] = self._isa.splat(0.0)

    def _start(self, row: Index) -> Expr:
        """The first token of a row of the grid. The row above the grid is -1."""
        return T.truncmod(row + REACH, T.int64(self._places)) * self._pitch

    def find(self, first: Expr, last: Expr) -> None:
        """Prepare to store rows `first` to `last` - 1."""
        width = self._sizes.width
        with T.serial(last - first) as i:
            start = T.bind(T.cast(self._start(first + i), "int32"))
            with T.serial(width) as j:
                self._of_token[i * width + j] = start + T.cast(j, "int32") + T.int32(REACH)

    def store(self, row: Index, column: Index, value: Expr, count: int) -> None:
        """Store inputs of the convolution. Tokens count from the first row on."""
        token = T.cast(self._of_token[row], "int64")
        panel, at = self._column(column)
        self._before[panel, token, T.at(at, count)] = value

    def load(self, row: Index, column: Index, count: int) -> Expr:
        """Read outputs of the convolution."""
        panel, at = self._column(column)
        return self.after[panel, row, T.at(at, count)]

    def keep(self, row: Index, column: Index, value: Expr, count: int) -> None:
        """Store outputs of the convolution."""
        panel, at = self._column(column)
        self.after[panel, row, T.at(at, count)] = value

    def _column(self, column: Index) -> tuple[Expr, Expr]:
        return T.truncdiv(column, T.int64(self._columns)), T.truncmod(column, T.int64(self._columns))

    def convolve(
        self,
        panel: Expr,
        first: Expr,
        last: Expr,
        taps: Buffer,
        bias: Buffer,
        apply: Callable[[Expr], Expr],
        store: Store,
    ) -> None:
        """Emit ``store(token, channel, apply(convolution), lanes)`` for rows `first` to `last` - 1 of a panel."""
        isa, width = self._isa, self._sizes.width
        # Of the possible numbers of outputs side by side, the one that computes the fewest twice.
        most = min(width, 8 if isa.target.has_avx512 else 4)
        tile = min(range(most, most // 2, -1), key=lambda size: -(-width // size) * size)
        for j in range(0, self._columns, isa.lanes):
            channel = T.bind(panel * self._columns + j)
            weights = [isa.keep(taps[tap, isa.at(channel)]) for tap in range(KERNEL * KERNEL)]
            start = isa.keep(bias[isa.at(channel)])
            with T.serial(last - first) as i:
                lines = [T.bind(self._start(first + i + k - REACH)) for k in range(KERNEL)]
                with T.serial(-(-width // tile)) as group:
                    left = T.bind(T.min(group * tile, T.int64(width - tile)))
                    sums = [isa.register(start) for _ in range(tile)]
                    for k, line in enumerate(lines):
                        for c in range(tile + KERNEL - 1):
                            x = T.bind(self._before[panel, line + left + c, isa.at(j)])
                            for tap in range(KERNEL):
                                if 0 <= c - tap < tile:
                                    total = sums[c - tap]
                                    total.value = isa.fma(x, weights[k * KERNEL + tap], total.value)
                    for c, total in enumerate(sums):
                        store(i * width + left + c, channel, apply(T.bind(total.value)), isa.lanes)


class ConvPerceptron(NamedTuple):
    """What is asked of a perceptron with a convolution."""

    weights: Format
    eps: float | None  # of the norm, if there is one
    activation: Activation
    sizes: Sizes


class ConvPerceptronSpec(NamedTuple):
    kind: Kind
    eps: float | None
    activation: Activation
    sizes: Sizes
    rows: int  # of a band


class _Arguments(NamedTuple):
    one: Weights
    taps: Buffer
    bias: Buffer
    two: Weights
    ends: Ends


def _build(target: CpuTarget, spec: ConvPerceptronSpec) -> T.PrimFunc:
    """The function ``(x, norm's two, first layer's weights, taps, bias, second layer's weights, added, control, y)``.

    x [B, tokens, inputs], taps [9, hidden], added and y [B, tokens, outputs].
    """
    kind, size = spec.kind, spec.sizes
    products = [kind.product(target) for _ in range(2)]
    with T.function("conv_perceptron") as function:
        (batch,) = T.sizes(1)
        inputs, hidden, outputs = (T.int64(width) for width in size[:3])
        source = Source.argument(batch, size.tokens, inputs, spec.eps)
        one = weights_argument(products[0], "1", kind.terms, inputs, hidden)
        taps, bias = convolution_arguments(hidden)
        two = weights_argument(products[1], "2", kind.terms, hidden, outputs)
        ends = Ends.arguments(source, outputs, residual=True)
        threads = threads_of(ends.control)
        parts = parts_of_image(batch, size.height, threads)
        with T.parallel(batch * parts) as task:
            rows_of_task = Rows.of_task(task, parts, size.height)
            _emit_rows(Isa(target), spec, products, _Arguments(one, taps, bias, two, ends), rows_of_task)
    return function.get()


def convolution_arguments(hidden: Expr) -> tuple[Buffer, Buffer]:
    """The next arguments of a function: taps and bias."""
    return T.argument("taps", (KERNEL * KERNEL, hidden)), T.argument("bias", (hidden,))


def parts_of_image(batch: Expr, height: int, threads: Expr) -> Expr:
    """How many tasks share an image: more than one if there are few images."""
    alike = T.either(T.truncmod(batch, threads) == 0, batch >= 4 * threads)
    return held(T.select(alike, T.int64(1), T.min(threads, T.int64(height))))


class Rows(NamedTuple):
    """The rows of an image that a task computes: from `begin` to before `end`."""

    image: Expr
    begin: Expr
    end: Expr

    @classmethod
    def of_task(cls, task: Expr, parts: Expr, height: int) -> Rows:
        """Those of a task, if each image is divided into so many parts."""
        image, part = held(T.truncdiv(task, parts)), held(T.truncmod(task, parts))
        return cls(image, held(T.truncdiv(part * height, parts)), held(T.truncdiv((part + 1) * height, parts)))


def _emit_rows(isa: Isa, spec: ConvPerceptronSpec, products: list[ShiftProduct], given: _Arguments, task: Rows) -> None:
    """The code of a task, a band at a time."""
    size, rows, ends = spec.sizes, spec.rows, given.ends
    one, two = products
    band = Band(isa, size, one.columns, rows)
    scratch = (
        scratch_of(one, (rows + 2 * REACH) * size.width, given.one.inputs),
        scratch_of(two, rows * size.width, given.two.inputs),
    )
    apply = two.activation(spec.activation)
    with band.each(task) as (fresh, count, first, last):
        load, before_rows = ends.load(isa, held((task.image * size.height + fresh) * size.width))
        one.stage(scratch[0], count, given.one.inputs, load, ends.control, before_rows)
        keep = two.stage_store(scratch[1]) if isinstance(two, Float32Product) else band.keep
        with T.serial(size.hidden // one.columns) as panel:
            one.panels(scratch[0], count, given.one, panel, panel + 1, lambda x: x, band.store)
            band.convolve(panel, first, last, given.taps, given.bias, apply, keep)
        top = held((task.image * size.height + first) * size.width)
        count = held((last - first) * size.width)
        if isinstance(two, Float32Product):
            two.finish_stage(scratch[1], count, given.two.inputs)
        else:
            two.stage(scratch[1], count, given.two.inputs, band.load, ends.control)
        panels = T.int64(-(-size.outputs // two.columns))
        two.panels(scratch[1], count, given.two, T.int64(0), panels, lambda x: x, ends.store(top))
    two.release()


def scratch_of(product: ShiftProduct, rows: int, inputs: Expr) -> Scratch:
    """Memory of a product for so many rows, and the rest of their last tile."""
    return product.scratch(-(-rows // product.rows) * product.rows, inputs)


def _resolve(target: CpuTarget, exactness: Exactness, asked: ConvPerceptron) -> ConvPerceptronSpec:
    kind = Kind.of(target, exactness, asked.weights)
    return ConvPerceptronSpec(kind, *asked[1:], rows=rows_of_band(asked.sizes))


def rows_of_band(sizes: Sizes) -> int:
    """Rows of a band whose hidden activations the second-level cache holds."""
    pitch = sizes.width + 2 * REACH
    tokens = _BAND_BYTES // (4 * sizes.hidden) - 2 * REACH * pitch
    most = max(1, tokens // (pitch + sizes.width))
    bands = -(-sizes.height // most)
    return -(-sizes.height // bands)


class RandomConvolution:
    """A convolution and the activation behind it, between products with some form's error.

    Attributes:
        tensors: taps and bias.
        error: what an output of a product may be off by, as a multiple of ``max |row of x| * sum |row of W|``.
    """

    def __init__(self, draw: Draw, sizes: Sizes, activation: Activation, form: Form, bits: int) -> None:
        self._sizes: Sizes = sizes
        self._activation: Activation = activation
        self._weight = draw.normal(sizes.hidden, 1, KERNEL, KERNEL) / KERNEL
        self._bias = draw.normal(sizes.hidden)
        self._rounding = error_bound(form, bits)
        self.tensors, self.error = [self._weight.flatten(1).T.contiguous(), self._bias], self._rounding + 1e-6

    def __call__(self, before: Tensor) -> Tensor:
        grid = self._sizes.height, self._sizes.width
        return depthwise_conv_twin(before, self._weight, self._bias, *grid, self._activation)

    def off_behind(self, off: Tensor) -> Tensor:
        """What outcomes may be off by if inputs are off by `off`, with the steepest slope of gelu."""
        grid, no_bias = (self._sizes.height, self._sizes.width), torch.zeros_like(self._bias)
        off = depthwise_conv_twin(off, self._weight.abs(), no_bias, *grid, "none") * 1.2
        return off + (COARSE_GELU_ERROR if self._rounding else 0.0)


def _try(function: Compiled, spec: ConvPerceptronSpec) -> None:
    """Try both: one thread for each image, and two threads that share an image."""
    draw, (inputs, hidden, outputs, *_) = Draw(), spec.sizes
    (one, first), (two, second) = (
        random_layer(draw, *between, spec.kind.weights) for between in ((inputs, hidden), (hidden, outputs))
    )
    convolution = RandomConvolution(draw, spec.sizes, spec.activation, spec.kind.form, spec.kind.bits)
    norm = RandomNorm(draw, inputs, spec.eps)
    for threads in (1, 2):
        x, added = draw.normal(1, spec.sizes.tokens, inputs), draw.normal(1, spec.sizes.tokens, outputs)
        given = [x, *norm.tensors, *tensors_of(one), *convolution.tensors, *tensors_of(two), added]
        y, normal = outcome_of(function, given, *added.shape, threads=threads), norm(x)
        mixed = convolution(F.linear(normal, first, one.bias))
        expected = F.linear(mixed, second, two.bias) + added
        off = convolution.error * normal.abs().amax(-1, keepdim=True) * first.abs().sum(-1)
        off = convolution.off_behind(off)
        peaks = (mixed.abs() + off).amax(-1, keepdim=True)
        bound = off @ second.abs().T + convolution.error * peaks * second.abs().sum(-1)
        check_within(y, expected, bound + (1 + two.bias.abs() + added.abs()) * 1e-5)


CONV_PERCEPTRON = Function("conv_perceptron", _build, _try, _resolve)


def conv_perceptron(
    program: Program,
    x: Value,
    layers: tuple[LinearWeights, LinearWeights],
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    activation: Activation,
    *,
    norm: NormWeights | None,
    residual: Value,
) -> Value:
    """``second(activation(convolution of first(norm(x))))) + residual``, of two layers of one format.

    Args:
        x: [B, tokens, inputs], row by row of the grid.
        weight, bias: of the convolution [hidden, 1, 3, 3].
    """
    first, second = layers
    arguments = [x, *norm_values(program, norm), *weight_values(program, first)]
    arguments += [*depthwise_values(program, weight, bias), *weight_values(program, second), residual]
    sizes = Sizes(first.inputs, first.outputs, second.outputs, *grid)
    asked = ConvPerceptron(first.format, None if norm is None else norm[2], activation, sizes)
    return program.call(CONV_PERCEPTRON, arguments, residual.shape, asked)


def serves(layers: tuple[LinearWeights, LinearWeights], weight: Tensor, grid: tuple[int, int], columns: int) -> bool:
    """Whether to use `conv_perceptron` for such layers, with panels of this many columns."""
    first, second = layers
    return (first.bits, first.terms) == (second.bits, second.terms) and by_bands(weight, grid, columns)


def by_bands(weight: Tensor, grid: tuple[int, int], columns: int) -> bool:
    """Whether a convolution's hidden activations are worth dividing into bands, and can be."""
    fits = tuple(weight.shape[2:]) == (KERNEL, KERNEL) and weight.shape[0] % columns == 0
    return fits and grid[0] * grid[1] >= _LEAST_TOKENS
