"""Convolutions that reduce a grid of tokens, or make one of pictures, and the way back to a finer grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.forms import longest_block
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.matshift import BLOCK_BYTES
from shiftadd3d.kernels.cpu.trials import Draw, check_within
from shiftadd3d.kernels.pack.whole import Format, LinearWeights
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index, Load
from shiftadd3d.kernels.whole.parts import (
    Norm,
    NormWeights,
    block_of,
    control_argument,
    each_block,
    held,
    rows_of,
    threads_of,
    tiles_of,
)
from shiftadd3d.kernels.whole.products import Kind, norm_values, tensors_of, weight_values, weights_argument
from shiftadd3d.kernels.whole.program import Exactness, Function, Program, Value, fixed
from shiftadd3d.kernels.whole.trials import RandomNorm, error_of, outcome_of, random_layer

_VECTOR = 16  # numbers of the widest
# Tiles of a thread's block at least. Windows are costly to stage, so two threads are worth reading all weights twice.
_FEWEST_TILES = 2


class Window(NamedTuple):
    """How a convolution looks at pictures [B, C, H, W], or at tokens [B, H * W, C].

    Attributes:
        pictures: whether they are that.
        channels, height, width: of what it looks at.
        kernel, stride, padding: as of `torch.nn.Conv2d`, the same along both sides.
    """

    pictures: bool
    channels: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the outcome."""
        height, width = (
            (size + 2 * self.padding - self.kernel) // self.stride + 1 for size in (self.height, self.width)
        )
        return height, width

    @property
    def run(self) -> int:
        """Numbers of a kernel side by side in memory. Of pictures, a row of it, with one more so that it is even."""
        return self.kernel + self.kernel % 2 if self.pictures else self.kernel * self.channels

    @property
    def inputs(self) -> int:
        """Of the linear layer that a convolution is. Of pictures, whole vectors: there are zeros behind the last."""
        return -(-self.looked_at // _VECTOR) * _VECTOR if self.pictures else self.looked_at

    @property
    def looked_at(self) -> int:
        """How many of them there are without such zeros."""
        return (self.channels if self.pictures else 1) * self.kernel * self.run

    def arranged(self, weight: Tensor) -> Tensor:
        """A weight [outputs, channels, kernel, kernel] of any dtype as that layer's [outputs, inputs]."""
        if self.pictures:
            runs = F.pad(weight, (0, self.run - self.kernel)).flatten(1)
            return F.pad(runs, (0, self.inputs - self.looked_at))
        return weight.permute(0, 2, 3, 1).flatten(1)


class _Padded:
    """What a convolution looks at with zeros around it, in memory of a function."""

    def __init__(self, window: Window, batch: Expr, lanes: int) -> None:
        self._window, self._batch, self._lanes = window, batch, lanes
        self.height = window.height + 2 * window.padding
        # Of pictures, room for the last run.
        self.width = window.width + 2 * window.padding + (window.run - window.kernel if window.pictures else 0)
        self._pixel = 1 if window.pictures else window.channels  # numbers of one
        self._planes = window.channels if window.pictures else 1
        self._line = self.width * self._pixel
        self.memory = T.alloc(batch * (self._planes * self.height * self._line))

    def fill(self, isa: Isa, x: Buffer, norm: Norm | None) -> None:
        """Copy what there is, the channels of tokens normalised."""
        window = self._window
        before = window.padding * self._pixel
        with T.parallel(self._batch * (self._planes * self.height)) as line:
            start = held(line * self._line)
            row = held(T.truncmod(line, T.int64(self.height)) - window.padding)
            plane = held(T.truncdiv(line, T.int64(self.height)))  # of all pictures
            with T.If(T.both(row >= 0, row < window.height)):
                with T.Then():
                    first = held((plane * window.height + row) * window.width)  # pixel
                    self._clear(start, before)
                    if norm is None:
                        with T.serial(window.width * self._pixel) as i:
                            self.memory[start + before + i] = x[first * self._pixel + i]
                    else:
                        self._normalise(isa, x, norm, first, held(start + before))
                    end = before + window.width * self._pixel
                    self._clear(start + end, self._line - end)
                with T.Else():
                    self._clear(start, self._line)

    def _normalise(self, isa: Isa, x: Buffer, norm: Norm, first: Expr, start: Expr) -> None:
        channels, width = self._window.channels, self._window.width

        def load(token: Index, c: Index, count: int) -> Expr:
            return x[T.at((first + token) * channels + c, count)]

        def store(token: Index, c: Index, value: Expr, count: int) -> None:
            self.memory[T.at(start + token * channels + c, count)] = value

        with isa.groups(width) as (token, count):
            norm.emit(isa, load, token, count, T.int64(channels), store)

    def _clear(self, start: Expr, count: int) -> None:
        with T.serial(count) as i:
            self.memory[start + i] = T.float32(0)

    def copy(self, image: Expr, i: Expr, j: Expr, out: Buffer) -> None:
        """Write to out [inputs] what the kernel looks at whose outcome has a place."""
        window = self._window
        run, kernel, plane = window.run, window.kernel, self.height * self._line
        corner = image * (self._planes * plane) + (i * self._line + j * self._pixel) * window.stride
        corner, piece = T.bind(corner), math.gcd(run, self._lanes)
        with T.serial(self._planes) as channel, T.serial(kernel) as row, T.serial(run // piece) as part:
            start = corner + channel * plane + row * self._line + part * piece
            out[T.at((channel * kernel + row) * run + part * piece, piece)] = self.memory[T.at(start, piece)]


class Convolution(NamedTuple):
    """What is asked of a convolution."""

    weights: Format
    window: Window
    eps_before: float | None  # of the norms, if there are some
    eps_behind: float | None
    outputs: int


class ConvolutionSpec(NamedTuple):
    kind: Kind
    window: Window
    eps_before: float | None
    eps_behind: float | None
    outputs: int
    tile: int
    longest: int


def _build_convolution(target: CpuTarget, spec: ConvolutionSpec) -> T.PrimFunc:
    """The function ``(x, norm before, layer's weights, norm behind, control, y)``, y [B, tokens, outputs]."""
    window, isa, product = spec.window, Isa(target), spec.kind.product(target)
    product.rows = spec.tile
    height, width = window.grid
    with T.function("convolution") as function:
        (batch,) = T.sizes(1)
        channels, inputs, columns = (T.int64(size) for size in (window.channels, window.inputs, spec.outputs))
        if window.pictures:
            x = T.argument("x", (batch, channels, window.height, window.width))
        else:
            x = T.argument("x", (batch, window.height * window.width, channels))
        before = None if spec.eps_before is None else Norm.arguments(channels, spec.eps_before)
        weights = weights_argument(product, "", spec.kind.terms, inputs, columns)
        behind = None if spec.eps_behind is None else Norm.arguments(columns, spec.eps_behind, "behind")
        control = control_argument()
        y = T.argument("y", (batch, height * width, columns))
        x, y = x.flat(), rows_of(y)
        padded = _Padded(window, batch, isa.lanes)
        padded.fill(isa, x, before)
        rows = held(batch * (height * width))
        block = block_of(rows, spec.longest, product.rows, threads_of(control), _FEWEST_TILES)
        with each_block(rows, block) as (top, count):
            load, before_rows = _windows(isa, padded, window, inputs, top)
            scratch = product.scratch(spec.longest, inputs)
            product.stage(scratch, count, inputs, load, control, before_rows)
            panels = T.bind((columns + (product.columns - 1)) // product.columns)
            store = isa.writer(y, lambda row: top + row)
            product.panels(scratch, count, weights, T.int64(0), panels, lambda x: x, store)
            product.release()
            if behind is not None:
                lines = isa.reader(y, lambda row: top + row), isa.writer(y, lambda row: top + row)
                with isa.groups(count) as (first, some):
                    behind.emit(isa, lines[0], first, some, columns, lines[1])
    return function.get()


def _windows(
    isa: Isa, padded: _Padded, window: Window, inputs: Expr, top: Expr
) -> tuple[Load, Callable[[Expr, Expr], None]]:
    """`load` and `before_rows` of `ShiftProduct.stage`: what the kernel looks at for the outcomes from `top` on."""
    patches, (height, width) = T.alloc(isa.lanes, inputs), window.grid
    with T.serial(isa.lanes) as row, T.serial(window.inputs - window.looked_at) as i:
        patches[row, window.looked_at + i] = T.float32(0)

    def before_rows(first: Expr, some: Expr) -> None:
        size = T.int64(height * width)
        with T.serial(some) as row:
            number = T.bind(top + first + row)
            image, place = T.truncdiv(number, size), T.bind(T.truncmod(number, size))
            i, j = T.truncdiv(place, T.int64(width)), T.truncmod(place, T.int64(width))
            padded.copy(image, i, j, patches.part(row))

    return lambda row, start, lanes: patches[row % isa.lanes, T.at(start, lanes)], before_rows


def _resolve_convolution(target: CpuTarget, exactness: Exactness, asked: Convolution) -> ConvolutionSpec:
    kind, window = Kind.of(target, exactness, asked.weights), asked.window
    longest = longest_block(target, kind.form, window.inputs, BLOCK_BYTES)
    return ConvolutionSpec(kind, *asked[1:], *tiles_of(target, kind.form, longest, window.grid[0] * window.grid[1]))


def _try_convolution(function: Compiled, spec: ConvolutionSpec) -> None:
    draw, kind, window, outputs = Draw(), spec.kind, spec.window, spec.outputs
    layer, matrix = random_layer(draw, window.inputs, outputs, kind.weights)
    x = draw.normal(2, window.channels, window.height, window.width)
    given = x if window.pictures else x.flatten(2).mT.contiguous()
    before, behind = RandomNorm(draw, window.channels, spec.eps_before), RandomNorm(draw, outputs, spec.eps_behind)
    given = [given, *before.tensors, *tensors_of(layer), *behind.tensors]
    y = outcome_of(function, given, 2, window.grid[0] * window.grid[1], outputs)
    x = before(x.movedim(1, -1)).movedim(-1, 1)
    # What the layer makes of windows as they lie in memory: of those of pictures with a column more.
    more = window.run - window.kernel if window.pictures else 0
    high = F.pad(x, (window.padding, window.padding + more, window.padding, window.padding))
    cut = high.unfold(2, window.kernel, window.stride).unfold(3, window.kernel + more, window.stride)
    cut = cut.permute(0, 2, 3, 1, 4, 5) if window.pictures else cut.permute(0, 2, 3, 4, 5, 1)
    patches = F.pad(cut.flatten(3).flatten(1, 2), (0, window.inputs - window.looked_at))
    expected = F.linear(patches, matrix, layer.bias)
    bound = error_of(kind.form, kind.bits, patches, matrix) + 1e-5
    if spec.eps_behind is not None:
        spread = expected.std(-1, keepdim=True, correction=0)
        expected = behind(expected)
        bound = bound.amax(-1, keepdim=True) * 4 / spread * behind.tensors[0].abs() + 1e-5
    check_within(y, expected, bound)


CONVOLUTION = Function("convolution", _build_convolution, _try_convolution, _resolve_convolution)


def convolution(
    program: Program,
    x: Value,
    layer: LinearWeights,
    window: Window,
    *,
    before: NormWeights | None = None,
    behind: NormWeights | None = None,
) -> Value:
    """A convolution of pictures or tokens as tokens [B, h * w, outputs], row by row of ``window.grid``.

    Args:
        layer: of the weight as ``window.arranged`` has it.
        before: weight, bias and epsilon of a layer norm of the tokens that it looks at.
        behind: the same of its outcome.
    """
    values = weight_values(program, layer)
    arguments = [x, *norm_values(program, before), *values, *norm_values(program, behind)]
    shape = (x.shape[0], window.grid[0] * window.grid[1], layer.outputs)
    eps_before, eps_behind = (None if norm is None else norm[2] for norm in (before, behind))
    asked = Convolution(layer.format, window, eps_before, eps_behind, layer.outputs)
    return program.call(CONVOLUTION, arguments, shape, asked)


# To a finer grid


def _build_spread(target: CpuTarget, spec: tuple[()]) -> T.PrimFunc:
    """The function ``(x, coarse, places, control, y)``: y[b, n] = x[b, n] + coarse[b, places[n]]."""
    with T.function("spread") as function:
        batch, tokens, few, channels = T.sizes(4)
        x = T.argument("x", (batch, tokens, channels))
        coarse = T.argument("coarse", (batch, few, channels))
        places = T.argument("places", (tokens,), "int32")
        control_argument()
        y = T.argument("y", (batch, tokens, channels))
        with T.parallel(batch * tokens) as number:
            b, n = held(T.truncdiv(number, tokens)), held(T.truncmod(number, tokens))
            place = held(T.cast(places[n], "int64"))
            with T.serial(channels) as c:
                y[b, n, c] = x[b, n, c] + coarse[b, place, c]
    return function.get()


def _try_spread(function: Compiled, spec: tuple[()]) -> None:
    draw = Draw()
    x, coarse, places = draw.normal(2, 20, 37), draw.normal(2, 6, 37), torch.arange(20, dtype=torch.int32) % 6
    y = outcome_of(function, [x, coarse, places], *x.shape)
    torch.testing.assert_close(y, x + coarse[:, places.long()])


SPREAD = fixed("spread", _build_spread, _try_spread)


def spread(program: Program, x: Value, coarse: Value, grid: tuple[int, int], finer: tuple[int, int]) -> Value:
    """Tokens x [B, N, C] of a grid, plus those of a coarser one, [B, M, C], that each of them lies in."""
    numbers = torch.arange(grid[0] * grid[1], dtype=torch.float32).view(1, 1, *grid)
    places = F.interpolate(numbers, finer).flatten().to(torch.int32)
    return program.call(SPREAD, [x, coarse, program.weight(places)], x.shape, ())
