"""Depthwise convolution of tokens on CPUs.

Images are tokens [B, H * W, C] between linear layers, and torch convolves images [B, C, H, W]: around each depthwise
convolution everything would be transposed twice. This one reads tokens where they are, a vector of channels at a time,
and does what follows it, the activation function and the sum with something else, before it stores.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu import bfloat16, blocks
from shiftadd3d.kernels.cpu.vectors import Vectors
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.depthwise import depthwise_conv_twin
from shiftadd3d.kernels.runtime import memory, targets
from shiftadd3d.kernels.runtime.kernel import Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget

_COLUMNS = 4  # outcomes side by side whose sums stay in registers, and that share what they read
STORAGE = {torch.float32: "float32", torch.bfloat16: "int16"}


def build(target: CpuTarget, *, dtype: str, kernel_size: int, activation: Activation, added: bool) -> Any:
    """The function ``(x, weight, bias, addend, height, width, y)``; it does not look at an addend unless `added`.

    x, addend and y [B, tokens, C] are float32, or the bits of bfloat16 as int16; weight [C, k * k] and bias [C] are
    float32. C is at least a vector.
    """
    from tvm.script import tirx as T

    vec = Vectors(target)
    lanes, reach = vec.lanes, kernel_size // 2

    def read(buffer: Any, batch: Any, token: Any, start: Any) -> Any:
        value = buffer[batch, token, vec.at(start)]
        return bfloat16.widen(value, lanes) if dtype == "int16" else value

    def each_vector(channels: Any, use: Any) -> None:
        """Emit ``use(first channel)``; the last vector overlaps the one before it rather than end in a shorter one."""
        with T.serial((channels + (lanes - 1)) // lanes) as number:
            use(T.bind(T.min(number * lanes, channels - lanes)))

    def tile(
        X: Any,
        W: Any,
        bias: Any,
        addend: Any,
        Y: Any,
        batch: Any,
        i: Any,
        j: Any,
        height: Any,
        width: Any,
        count: int,
        begins: bool,
        ends: bool,
    ) -> None:
        """`count` outcomes of row i from column j on, which the row begins with, or ends with, or neither."""
        channels = X.shape[2]
        prefix = X.shape[1] - height * width
        # Columns, counted from the leftmost one that kernels reach to, that the row has.
        inside = range(reach if begins else 0, count + (reach if ends else kernel_size - 1))

        def of_channels(start: Any) -> None:
            sums = [T.alloc_buffer((lanes,), "float32", align=64) for _ in range(count)]
            for total in sums:
                T.buffer_store(total, bias[vec.at(start)], [vec.at(0)])
            first, last = T.max(T.int64(0), reach - i), T.min(T.int64(kernel_size), height + reach - i)
            with T.serial(last - first) as step:
                row = T.bind(first + step)
                token = T.bind(prefix + (i + row - reach) * width + j - reach)
                values = {k: T.bind(read(X, batch, token + k, start)) for k in inside}
                for column in range(kernel_size):
                    weight = T.bind(W[row * kernel_size + column, vec.at(start)])
                    for k, total in enumerate(sums, column):
                        if k in values:
                            x = vec.multiply_add(values[k], weight, total[vec.at(0)])
                            T.buffer_store(total, x, [vec.at(0)])
            for number, total in enumerate(sums):
                token = T.bind(prefix + i * width + j + number)
                y = blocks.activate(vec, activation, T.bind(total[vec.at(0)]))
                store(addend, Y, batch, token, start, y)

        each_vector(channels, of_channels)

    def narrow_row(X: Any, W: Any, bias: Any, addend: Any, Y: Any, batch: Any, i: Any, height: Any, width: Any) -> None:
        """A row that is too short to have a first and a last tile, whatever its length."""
        for length in range(1, _COLUMNS + reach):
            with T.If(width == length), T.Then():
                tile(X, W, bias, addend, Y, batch, i, T.int64(0), height, width, length, begins=True, ends=True)

    def store(addend: Any, Y: Any, batch: Any, token: Any, start: Any, y: Any) -> None:
        y = y + read(addend, batch, token, start) if added else y
        y = bfloat16.narrow(y, lanes) if dtype == "int16" else y
        T.buffer_store(Y, y, [batch, token, vec.at(start)])

    def task(X: Any, W: Any, bias: Any, addend: Any, Y: Any, number: Any, height: Any, width: Any) -> None:
        """One row of one image, and with the first one the tokens before the grid."""
        batch, i = T.bind(T.truncdiv(number, height)), T.bind(T.truncmod(number, height))
        with T.If(i == 0), T.Then(), T.serial(X.shape[1] - height * width) as token:
            each_vector(X.shape[2], lambda start: store(addend, Y, batch, token, start, vec.splat(0.0)))
        buffers = X, W, bias, addend, Y, batch, i
        with T.If(width < _COLUMNS + reach):
            with T.Then():
                narrow_row(*buffers, height, width)
            with T.Else():
                # A first tile, and then as many as leave the last one no fewer columns than kernels reach.
                groups = T.bind(T.truncdiv(width - _COLUMNS - reach, T.int64(_COLUMNS)))
                behind = T.bind((groups + 1) * _COLUMNS)
                tile(*buffers, T.int64(0), height, width, _COLUMNS, begins=True, ends=False)
                with T.serial(groups) as group:
                    tile(*buffers, (group + 1) * _COLUMNS, height, width, _COLUMNS, begins=False, ends=False)
                for count in range(max(1, reach), _COLUMNS + reach):
                    with T.If(width - behind == count), T.Then():
                        tile(*buffers, behind, height, width, count, begins=False, ends=True)

    @T.prim_func(s_tir=True)
    def depthwise_conv(
        x: T.handle,
        weight: T.handle,
        b: T.handle,
        a: T.handle,
        height: T.int64,
        width: T.int64,
        y: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        B = T.int64()
        N = T.int64()
        C = T.int64()
        S = [T.int64(), T.int64()]
        A = [T.int64(), T.int64(), T.int64()]
        R = [T.int64(), T.int64()]
        X = T.match_buffer(x, (B, N, C), dtype, strides=[*S, T.int64(1)], align=1)
        given = T.match_buffer(weight, (C, kernel_size * kernel_size), "float32", align=4)
        bias = T.match_buffer(b, (C,), "float32", align=4)
        addend = T.match_buffer(a, A, dtype, strides=[*R, T.int64(1)], align=1)
        Y = T.match_buffer(y, (B, N, C), dtype, align=4)
        W = T.alloc_buffer((kernel_size * kernel_size, C), "float32", align=64)
        for channel in T.serial(C):
            for place in T.serial(kernel_size * kernel_size):
                W[place, channel] = given[channel, place]
        for number in T.parallel(B * height):
            task(X, W, bias, addend, Y, number, height, width)

    return depthwise_conv


def trial(function: Any, *, dtype: str, kernel_size: int, activation: Activation, added: bool) -> None:
    """Rows of all lengths, tokens before the grid, channels that are no whole vectors, strides."""
    generator = torch.Generator().manual_seed(0)
    channels = 2 * targets.current().lanes + 3
    number = next(one for one, stored in STORAGE.items() if stored == dtype)
    for height, width in ((kernel_size // 2 + 1, width) for width in range(1, 3 * _COLUMNS + kernel_size)):
        tokens = 2 + height * width
        wide, addend = (torch.randn(2, tokens, 2 * channels, generator=generator).to(number) for _ in range(2))
        x, addend = wide[..., channels:], addend[..., :channels] if added else None
        weight = torch.randn(channels, 1, kernel_size, kernel_size, generator=generator)
        bias = torch.randn(channels, generator=generator)
        found = run(function, x, weight, bias, height, width, addend)
        as_float = addend if addend is None else addend.float()
        expected = depthwise_conv_twin(x.float(), weight, bias, height, width, activation, as_float)
        rtol, atol = (1e-2, 1e-2) if dtype == "int16" else (1e-5, 2e-5)
        torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=atol)


def variants(target: CpuTarget) -> Iterator[dict[str, Any]]:
    """3 x 3 kernels in both dtypes: those between the layers of a perceptron, and those on values."""
    for dtype, (activation, added) in itertools.product(STORAGE.values(), (("gelu", False), ("none", True))):
        yield {"dtype": dtype, "kernel_size": 3, "activation": activation, "added": added}


DEPTHWISE_CONV = Kernel("depthwise_conv", build, trial, variants)


def run(
    function: Any, x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, addend: Tensor | None
) -> Tensor:
    y = memory.empty(*x.shape, dtype=x.dtype)
    weight = weight.to(torch.float32).flatten(1).contiguous()
    bias = memory.float32_bias(bias, x.shape[-1])
    function(_stored(x), weight, bias, _stored(x if addend is None else addend), height, width, _stored(y))
    return y


def _stored(x: Tensor) -> Tensor:
    """What a compiled function takes: the channels of a token side by side, bfloat16 as bits."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x
