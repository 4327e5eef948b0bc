"""The position layer on CPUs.

The embedding has 63 floats a point. It exists only for the block of points that a task works on. The embedding of a
ray's direction is multiplied once, and becomes a bias for all samples of the ray.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import copy_row, sine_and_cosine
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, product
from shiftadd3d.kernels.pack.gnt.position_layer import Panels, panels, sizes
from shiftadd3d.kernels.reference.gnt.position_layer import (
    EMBEDDING_DIM,
    NUM_FREQUENCIES,
    position_layer_twin,
    random_samples,
)
from shiftadd3d.kernels.runtime import memory
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, Spec
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

# Samples that are multiplied at once: a multiple of every vector width and of every tile of the products.
_ROWS = 48
_BLOCKS_A_TASK = 16


def _build(target: CpuTarget, *, width: int, hidden: int, outputs: int) -> T.PrimFunc:
    with T.function("position_layer") as function:
        N, R = T.sizes(2)
        x, points = T.argument("x", (N, width)), T.argument("points", (N, 3))  # rows are (ray, sample)
        directions = T.argument("directions", (R, 3))
        weights = Weights.argument(Isa(target), width, hidden, outputs)
        S, out = T.scalar("S"), T.argument("out", (N, outputs))
        emit(target, x, lambda r, axis: points[r, axis], lambda r, axis: directions[r, axis], weights, R, S, out)
    return function.get()


class Weights(NamedTuple):
    """The arguments that hold `shiftadd3d.kernels.pack.gnt.position_layer.Panels`."""

    x: Buffer
    point: Buffer
    direction: Buffer
    first_bias: Buffer
    second: Buffer
    second_bias: Buffer

    @classmethod
    def argument(cls, isa: Isa, width: int, hidden: int, outputs: int) -> Weights:
        """The next arguments of a function."""
        return cls(*T.panels(sizes(isa.lanes, width, hidden, outputs)))


Place = Callable[[Index, int], Expr]
"""``place(row, axis)``: a coordinate."""


def emit(
    target: CpuTarget, x: Buffer, point: Place, direction: Place, weights: Weights, R: Expr, S: Expr, out: Buffer
) -> None:
    """Emit the layer for all samples, after all arguments.

    Args:
        x, out: [R * S, channels].
        point: coordinates of samples.
        direction: unit vectors of rays.
    """
    isa, (N, outputs), width = Isa(target), out.shape, weights.x.extent(0)
    assert isinstance(outputs, int)
    hidden, deep, wide = weights.second.extent(0), weights.first_bias.extent(0), weights.second_bias.extent(0)

    # The sum of the first layer's bias and the product of the ray's direction, one row a ray.
    along = T.alloc(R + (_ROWS + ROW_PADDING), deep)
    with T.parallel((R + (_ROWS - 1)) // _ROWS) as block:
        first = T.bind(block * _ROWS)
        rays = T.bind(T.min(T.int64(_ROWS), R - first))
        of_ray = _embedding(isa, direction, R, first, rays)
        term = EMBEDDING_DIM, lambda r, k: of_ray[k, r], weights.direction
        product(isa, rays, deep, weights.first_bias, [term], along.below(first))

    blocks = T.bind((N + _ROWS - 1) // _ROWS)
    with T.parallel((blocks + _BLOCKS_A_TASK - 1) // _BLOCKS_A_TASK) as task:
        activation, outcome = T.alloc(_ROWS + ROW_PADDING, deep), T.alloc(_ROWS + ROW_PADDING, wide)
        with T.serial(T.min(T.int64(_BLOCKS_A_TASK), blocks - task * _BLOCKS_A_TASK)) as block:
            first = T.bind((task * _BLOCKS_A_TASK + block) * _ROWS)
            rows = T.bind(T.min(T.int64(_ROWS), N - first))
            embedded = _embedding(isa, point, N, first, rows)

            def sample(r: Index) -> Expr:
                return T.min(first + r, N - 1)

            terms = (
                (width, lambda r, k: x[sample(r), k], weights.x),
                (EMBEDDING_DIM, lambda r, k: embedded[k, r], weights.point),
            )
            product(isa, rows, deep, lambda r, c: along[sample(r) // S, isa.at(c)], terms, activation, isa.relu)
            product(isa, rows, wide, weights.second_bias, [(hidden, activation, weights.second)], outcome)
            with T.serial(rows) as r:
                copy_row(isa, outcome.part(r), out.part(first + r), outputs)


def _embedding(isa: Isa, place: Place, count: Index, first: Expr, rows: Expr) -> Buffer:
    """The embeddings of `rows` of `count` vectors, from the first on: [63, rows]."""
    embedded = T.alloc(EMBEDDING_DIM, _ROWS + ROW_PADDING)
    with T.serial(_ROWS) as r:
        for axis in range(3):
            embedded[axis, r] = place(T.min(first + r, count - 1), axis)
    with T.serial((rows + isa.lanes - 1) // isa.lanes) as n:
        _embed(isa, embedded, n * isa.lanes)
    return embedded


def _embed(isa: Isa, embedded: Buffer, start: Expr) -> None:
    """Write the sines and cosines for a vector of points. Components are rows; the first three are there already."""
    for octave in range(NUM_FREQUENCIES):
        for axis in range(3):
            x = embedded[axis, isa.at(start)] * isa.splat(2.0**octave)
            for number, value in enumerate(sine_and_cosine(isa, x)):
                embedded[3 + 6 * octave + 3 * number + axis, isa.at(start)] = value


def run(function: Compiled, x: Tensor, points: Tensor, directions: Tensor, panels: Panels, outputs: int) -> Tensor:
    """Call a compiled function: [R, S, outputs]; arguments as those of the op."""
    width = x.shape[-1]
    out = memory.empty(*x.shape[:2], outputs, dtype=torch.float32)
    function(
        x.reshape(-1, width).contiguous(),
        points.reshape(-1, 3).contiguous(),
        directions.float().contiguous(),
        *panels,
        x.shape[1],
        out.view(-1, outputs),
    )
    return out


def _trial(function: Compiled, *, width: int, hidden: int, outputs: int) -> None:
    x, points, directions, weights, biases = random_samples(
        0, rays=7, samples=9, width=width, hidden=hidden, outputs=outputs
    )
    out = run(function, x, points, directions, panels(weights, biases, current().lanes), outputs)
    twin = position_layer_twin(x, points, directions, weights, biases)
    torch.testing.assert_close(out, twin, rtol=1e-4, atol=1e-4)


def _variants(target: CpuTarget) -> list[Spec]:
    if not target.has_fma:
        return []
    return [{"width": width, "hidden": width, "outputs": width} for width in (32, 64)]


KERNEL = Kernel("position_layer", _build, _trial, _variants)
