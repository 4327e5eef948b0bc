"""Depthwise convolution of tokens on CPUs.

Images are tokens [B, H * W, C] between linear layers, and torch convolves images [B, C, H, W]: around each depthwise
convolution everything would be transposed twice. This one reads tokens where they are, a vector of channels at a time,
and does what follows it, the activation function and the sum with something else, before it stores.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import activate
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.trials import Draw
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.depthwise import depthwise_conv_twin
from shiftadd3d.kernels.runtime import memory, targets
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, Spec
from shiftadd3d.kernels.runtime.memory import DTYPES, Dtype
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr

_COLUMNS = 4  # neighbouring outcomes whose sums stay in registers, and that share their inputs


class Tensors(NamedTuple):
    """The tensors that a convolution reads and writes."""

    x: Buffer  # [B, tokens, C]
    weight: Buffer  # [k * k, C]
    bias: Buffer  # [C]
    addend: Buffer | None  # [B, tokens, C]
    y: Buffer  # [B, tokens, C]


def build(target: CpuTarget, *, dtype: Dtype, kernel_size: int, activation: Activation, added: bool) -> T.PrimFunc:
    """The function ``(x, weight, bias, addend, height, width, y)``; it does not look at an addend unless `added`.

    x, addend and y [B, tokens, C] are of `dtype`; weight [C, k * k] and bias [C] are float32. C is at least a vector.
    """
    with T.function("depthwise_conv") as function:
        batches, tokens, channels, *strides = T.sizes(5)
        shape, taps = (batches, tokens, channels), kernel_size * kernel_size
        x = T.argument("x", shape, dtype, strides=[*strides, T.int64(1)], align=1)
        given = T.argument("weight", (channels, taps))
        bias = T.argument("bias", (channels,))
        addend = T.argument("addend", T.sizes(3), dtype, strides=[*T.sizes(2), T.int64(1)], align=1)
        height, width = T.scalar("height"), T.scalar("width")
        y = T.argument("y", shape, dtype)
        weight = T.alloc(taps, channels)
        with T.serial(channels) as channel, T.serial(taps) as tap:
            weight[tap, channel] = given[channel, tap]
        with T.parallel(batches * height) as number:
            batch, i = T.bind(T.truncdiv(number, height)), T.bind(T.truncmod(number, height))
            tensors = Tensors(x, weight, bias, addend if added else None, y)
            Row(Isa(target), tensors, kernel_size, activation, batch, i, height, width).emit()
    return function.get()


@dataclass(frozen=True)
class Row:
    """The code of one task: one row of one image, and with the first one the tokens before the grid."""

    isa: Isa
    tensors: Tensors
    kernel_size: int
    activation: Activation
    batch: Expr
    i: Expr
    height: Expr
    width: Expr
    coarse: bool = False  # whether what follows rounds by more than a coarse activation function does

    @property
    def _reach(self) -> int:
        return self.kernel_size // 2

    @property
    def _prefix(self) -> Expr:
        """How many tokens lie before the grid."""
        return self.tensors.x.shape[1] - self.height * self.width

    def emit(self) -> None:
        width, reach = self.width, self._reach
        with T.when(self.i == 0), T.serial(self._prefix) as token:
            self._each_vector(lambda start: self._store(token, start, self.isa.splat(0.0)))
        with T.If(width < _COLUMNS + reach):
            with T.Then():  # too short to have a first and a last tile, whatever its length
                for length in range(1, _COLUMNS + reach):
                    with T.when(width == length):
                        self._tile(T.int64(0), length, begins=True, ends=True)
            with T.Else():
                # A first tile, and then as many as leave the last one no fewer columns than kernels reach.
                groups = T.bind(T.truncdiv(width - _COLUMNS - reach, T.int64(_COLUMNS)))
                behind = T.bind((groups + 1) * _COLUMNS)
                self._tile(T.int64(0), _COLUMNS, begins=True)
                with T.serial(groups) as group:
                    self._tile((group + 1) * _COLUMNS, _COLUMNS)
                for count in range(max(1, reach), _COLUMNS + reach):
                    with T.when(width - behind == count):
                        self._tile(behind, count, ends=True)

    def _tile(self, j: Expr, count: int, *, begins: bool = False, ends: bool = False) -> None:
        """`count` outcomes from column j on, which the row begins with, or ends with, or neither."""
        # Columns, counted from the leftmost one that kernels reach to, that the row has.
        inside = range(self._reach if begins else 0, count + (self._reach if ends else self.kernel_size - 1))
        self._each_vector(lambda start: self._channels(start, j, count, inside))

    def _channels(self, start: Expr, j: Expr, count: int, inside: range) -> None:
        """A vector of channels of a tile."""
        isa, (x, weight, bias, _, _), reach = self.isa, self.tensors, self._reach
        sums = [isa.register(bias[isa.at(start)]) for _ in range(count)]
        first = T.max(T.int64(0), reach - self.i)
        last = T.min(T.int64(self.kernel_size), self.height + reach - self.i)
        with T.serial(last - first) as step:
            row = T.bind(first + step)
            token = T.bind(self._prefix + (self.i + row - reach) * self.width + j - reach)
            values = {k: T.bind(isa.read(x.part(self.batch, token + k), start, isa.lanes)) for k in inside}
            for column in range(self.kernel_size):
                of_column = T.bind(weight[row * self.kernel_size + column, isa.at(start)])
                for k, total in enumerate(sums, column):
                    if k in values:
                        total.value = isa.fma(values[k], of_column, total.value)
        for number, total in enumerate(sums):
            token = T.bind(self._prefix + self.i * self.width + j + number)
            self._store(token, start, activate(isa, self.activation, T.bind(total.value), coarse=self.coarse))

    def _store(self, token: Expr, start: Expr, y: Expr) -> None:
        isa, addend = self.isa, self.tensors.addend
        y = y if addend is None else y + isa.read(addend.part(self.batch, token), start, isa.lanes)
        isa.write(self.tensors.y.part(self.batch, token), start, y, isa.lanes)

    def _each_vector(self, use: Callable[[Expr], None]) -> None:
        """Emit ``use(first channel)``; the last vector overlaps the one before it rather than end in a shorter one."""
        channels, lanes = self.tensors.x.shape[2], self.isa.lanes
        with T.serial((channels + (lanes - 1)) // lanes) as number:
            use(T.bind(T.min(number * lanes, channels - lanes)))


def trial(function: Compiled, *, dtype: Dtype, kernel_size: int, activation: Activation, added: bool) -> None:
    """Rows of all lengths, tokens before the grid, channels that are no whole vectors, strides."""
    draw, channels = Draw(), 2 * targets.current().lanes + 3
    for height, width in ((kernel_size // 2 + 1, width) for width in range(1, 3 * _COLUMNS + kernel_size)):
        tokens = 2 + height * width
        wide, addend = (draw.normal(2, tokens, 2 * channels, dtype=dtype) for _ in range(2))
        x, addend = wide[..., channels:], addend[..., :channels] if added else None
        weight, bias = draw.normal(channels, 1, kernel_size, kernel_size), draw.normal(channels)
        found = run(function, x, weight, bias, height, width, addend)
        as_float = addend if addend is None else addend.float()
        expected = depthwise_conv_twin(x.float(), weight, bias, height, width, activation, as_float)
        rtol, atol = (1e-2, 1e-2) if dtype == "bfloat16" else (1e-5, 2e-5)
        torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=atol)


def variants(target: CpuTarget) -> Iterator[Spec]:
    """3 x 3 kernels in both dtypes: those between the layers of a perceptron, and those on values."""
    for dtype, (activation, added) in itertools.product(DTYPES.values(), (("gelu", False), ("none", True))):
        yield {"dtype": dtype, "kernel_size": 3, "activation": activation, "added": added}


DEPTHWISE_CONV = Kernel("depthwise_conv", build, trial, variants)


def run(
    function: Compiled, x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, addend: Tensor | None
) -> Tensor:
    y = memory.empty(*x.shape, dtype=x.dtype)
    weight = weight.to(torch.float32).flatten(1).contiguous()
    bias = memory.float32_bias(bias, x.shape[-1])
    function(_stored(x), weight, bias, _stored(x if addend is None else addend), height, width, _stored(y))
    return y


def _stored(x: Tensor) -> Tensor:
    """x as a compiled function takes it: the channels of a token are side by side."""
    return memory.stored(x if x.stride(-1) == 1 else x.contiguous())
