"""The views' embedding on CPUs: one pass over what the views show, where torch makes a dozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import copy_row
from shiftadd3d.kernels.cpu.forms import panels as forms
from shiftadd3d.kernels.cpu.forms.panels import panel_product
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, product
from shiftadd3d.kernels.pack.gnt.view_embedding import panels, sizes
from shiftadd3d.kernels.pack.shift import GRANULE
from shiftadd3d.kernels.reference.gnt.view_embedding import LEAST_VARIANCE, random_views, view_embedding_twin
from shiftadd3d.kernels.runtime import memory
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, Spec
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

# (point, view) rows at once.
_ROWS = 64
_BLOCKS_A_TASK = 16


def _build(target: CpuTarget, *, inputs: int, hidden: int, width: int, with_moments: bool) -> T.PrimFunc:
    isa = Isa(target)
    with T.function("view_embedding") as function:
        P, R = T.sizes(2)
        values, mask = T.argument("values", (R, inputs)), T.argument("mask", (R,), "uint8")  # rows are (point, view)
        layers = Layers.argument(isa, inputs, hidden, width, with_moments=with_moments)
        V = T.scalar("V")
        embedding, query = T.argument("embedding", (R, width)), T.argument("query", (P, width))

        points_of_block = T.bind(T.int64(_ROWS) // V)
        blocks = T.bind((P + points_of_block - 1) // points_of_block)
        with T.parallel((blocks + _BLOCKS_A_TASK - 1) // _BLOCKS_A_TASK) as task:
            block_of_views = Embedding(isa, layers, _ROWS, _ROWS)
            with T.serial(T.min(T.int64(_BLOCKS_A_TASK), blocks - task * _BLOCKS_A_TASK)) as block:
                first = T.bind((task * _BLOCKS_A_TASK + block) * points_of_block)
                points = T.bind(T.min(points_of_block, P - first))
                with T.serial(points * V) as r:
                    copy_row(isa, values.part(first * V + r), block_of_views.shown.part(r), inputs)
                    block_of_views.seen[r] = T.cast(mask[first * V + r], "float32")
                block_of_views.emit(points, V, embedding.below(first * V), query.below(first))
    return function.get()


class Layers(NamedTuple):
    """The arguments that hold `shiftadd3d.kernels.pack.gnt.view_embedding.Panels`, and their sizes."""

    inputs: int
    hidden: int
    width: int
    statistics: int
    first: Buffer
    first_bias: Buffer
    second: Buffer
    second_bias: Buffer
    moments: Buffer
    moments_bias: Buffer

    @classmethod
    def argument(cls, isa: Isa, inputs: int, hidden: int, width: int, *, with_moments: bool) -> Layers:
        """The next arguments of a function."""
        statistics = 2 * inputs + 1 if with_moments else 0
        return cls(inputs, hidden, width, statistics, *T.panels(sizes(isa.lanes, inputs, hidden, width, with_moments)))


class Embedding:
    """The embedding of a block of points, within a task.

    Args:
        rows, points: as many as there may be.
        shifts: panels of both layers, `tile_sizes`, whose products are those of matrix tiles in bfloat16, rather than
            in float32.

    Attributes:
        shown: [rows, inputs and zeros up to whole vectors], to be filled in.
        seen: [rows], 1 where the view sees the point, else 0, to be filled in.
    """

    def __init__(self, isa: Isa, layers: Layers, rows: Index, points: Index, shifts: Sequence[Buffer] = ()) -> None:
        self._isa, self._layers, self._shifts = isa, layers, shifts
        long, deep, wide = isa.padded(layers.inputs), isa.padded(layers.hidden), isa.padded(layers.width)
        room = rows + ROW_PADDING
        if shifts:
            long, room = tile_sizes(layers.inputs, layers.hidden, layers.width)[0][0], rows + forms.ROW_PADDING
            self._product = panel_product(isa.target, "bfloat16")
            self._staged = self._product.staged(rows, long), self._product.staged(rows, layers.hidden)
        self.shown, self.seen = T.alloc(room, long), T.alloc(room)
        self._activation, self._embedded = T.alloc(room, deep), T.alloc(room, wide)
        # Vectors reach beyond the statistics.
        pitch = layers.inputs + long + 1 if layers.statistics else 1
        self._summary, self._queries = T.alloc(points + ROW_PADDING, pitch), T.alloc(points + ROW_PADDING, wide)
        with T.serial(room) as r, T.serial(long) as c:
            self.shown[r, c] = T.float32(0.0)

    def emit(self, points: Expr, V: Expr, embedding: Buffer, query: Buffer) -> None:
        """Embed what V views show of so many points: the first rows of both [*, width]."""
        isa, layers, shown, embedded, queries = self._isa, self._layers, self.shown, self._embedded, self._queries
        rows, wide = T.bind(points * V), embedded.extent(1)
        if self._shifts:
            self._multiply_tiles(rows, embedding)
        else:
            first = layers.inputs, shown, layers.first
            product(isa, rows, self._activation.extent(1), layers.first_bias, [first], self._activation, isa.relu)
            product(isa, rows, wide, layers.second_bias, [(layers.hidden, self._activation, layers.second)], embedded)
            with T.serial(rows) as r:
                copy_row(isa, embedded.part(r), embedding.part(r), layers.width)
        with T.serial(points) as p:
            _largest(isa, embedding if self._shifts else embedded, p * V, V, queries.part(p))
            if layers.statistics:
                _moments(isa, layers.inputs, shown, self.seen, p * V, V, self._summary.part(p))
        if layers.statistics:
            statistics = layers.statistics, self._summary, lambda k, c: layers.moments[isa.at(k * wide + c)]
            product(
                isa,
                points,
                wide,
                lambda r, c: queries[r, isa.at(c)] + layers.moments_bias[isa.at(c)],
                [statistics],
                queries,
            )
        with T.serial(points) as p:
            copy_row(isa, queries.part(p), query.part(p), layers.width)

    def _multiply_tiles(self, rows: Expr, embedding: Buffer) -> None:
        isa, layers, hidden, (of_shown, of_hidden) = self._isa, self._layers, self._activation, self._staged
        multiply, stage, last = self._product.multiply, self._product.stage, rows - 1

        def keep(r: Expr, c: int, x: Expr) -> None:
            hidden[r, isa.at(c)] = isa.relu(x)

        def leave(r: Expr, c: int, x: Expr) -> None:
            embedding[r, isa.at(c)] = x

        stage(of_shown, rows, lambda r, c: self.shown[T.min(r, last), isa.at(c)])
        multiply(rows, of_shown, self._shifts[0], layers.first_bias, keep)
        stage(of_hidden, rows, lambda r, c: hidden[T.min(r, last), isa.at(c)])
        multiply(rows, of_hidden, self._shifts[1], layers.second_bias, leave)

    def finish(self, control: Buffer) -> None:
        """Emit what a task has to do last: tell of what tiles cannot express."""
        if self._shifts:
            self._product.finish(control)


def tile_sizes(inputs: int, hidden: int, width: int) -> list[tuple[int, int]]:
    """Inputs and outputs of the panels for matrix tiles, of which each takes as many inputs."""
    return [(-(-inputs // GRANULE) * GRANULE, hidden), (hidden, width)]


def _largest(isa: Isa, embedded: Buffer, row: Expr, V: Expr, out: Buffer) -> None:
    """The largest of each channel over the V views from a row on."""
    for n in range(0, out.extent(0), isa.lanes):
        at = isa.at(n)
        out[at] = embedded[row, at]
        with T.serial(V - 1) as v:
            out[at] = isa.larger_or_nan(embedded[row + v + 1, at], out[at])


def _moments(isa: Isa, inputs: int, shown: Buffer, seen: Buffer, row: Expr, V: Expr, out: Buffer) -> None:
    """Mean, deviation and share of seeing views of the V views from a row on: `view_moments`."""
    count = T.alloc(1, align=4)
    count[0] = T.float32(0.0)
    with T.serial(V) as v:
        count[0] = count[0] + seen[row + v]
    share = T.bind(count[0] / T.cast(V, "float32"))
    count[0] = T.float32(1.0) / T.max(count[0], T.float32(1.0))
    deviations: list[Expr] = []
    for start in range(0, inputs, isa.lanes):
        there = isa.at(start)
        mean, square = isa.register(0.0), isa.register(0.0)
        with T.serial(V) as v:
            mean.value = isa.fma(isa.splat(seen[row + v]), shown[row + v, there], mean.value)
        mean.value = mean.value * isa.splat(count[0])
        with T.serial(V) as v:
            apart = isa.keep(shown[row + v, there] - mean.value)
            square.value = isa.fma(apart * apart, isa.splat(seen[row + v]), square.value)
        deviations.append(isa.keep(isa.square_root(square.value * isa.splat(count[0]) + isa.splat(LEAST_VARIANCE))))
        out[there] = mean.value
    # From here on over what the last vector of means has written beyond them.
    for number, deviation in enumerate(deviations):
        out[isa.at(inputs + number * isa.lanes)] = deviation
    out[2 * inputs] = share


def run(
    function: Compiled, values: Tensor, mask: Tensor, panels: Sequence[Tensor], width: int
) -> tuple[Tensor, Tensor]:
    *leading, views, inputs = values.shape
    embedding = memory.empty(*leading, views, width, dtype=torch.float32)
    query = memory.empty(*leading, width, dtype=torch.float32)
    function(
        values.reshape(-1, inputs).contiguous(),
        mask.reshape(-1).contiguous().view(torch.uint8),
        *panels,
        views,
        embedding.view(-1, width),
        query.view(-1, width),
    )
    return embedding, query


def _trial(function: Compiled, *, inputs: int, hidden: int, width: int, with_moments: bool) -> None:
    sizes = {"inputs": inputs, "hidden": hidden, "width": width}
    values, mask, weights, biases = random_views(0, points=29, views=5, **sizes, with_moments=with_moments)
    outcome = run(function, values, mask, panels(weights, biases, current().lanes), width)
    for out, twin in zip(outcome, view_embedding_twin(values, mask, weights, biases), strict=True):
        torch.testing.assert_close(out, twin, rtol=1e-4, atol=1e-4)


def _variants(target: CpuTarget) -> list[Spec]:
    return [{"inputs": 35, "hidden": width, "width": width, "with_moments": True} for width in (32, 64)]


KERNEL = Kernel("view_embedding", _build, _trial, _variants)
