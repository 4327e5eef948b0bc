"""The views' embedding on CPUs: one pass over the values of the views. torch needs a dozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import copy_row
from shiftadd3d.kernels.cpu.forms.panels import AnyForm, PanelProduct, panel_product
from shiftadd3d.kernels.cpu.gnt.tiles import ROWS, WORDS, Tiles, copy_words, unit
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, product
from shiftadd3d.kernels.pack.gnt.view_embedding import panels, sizes
from shiftadd3d.kernels.reference.gnt.view_embedding import LEAST_VARIANCE, random_views, view_embedding_twin
from shiftadd3d.kernels.runtime import memory
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, Spec
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

# (point, view) rows of a block.
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
            block_of_views = Embedding(target, layers, _ROWS, _ROWS)
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
        rows, points: the largest numbers of (point, view) rows and of points.
        form: of both layers' products.
        shifts: panels of both layers, of `shift_sizes`; none for float32.

    Attributes:
        shown: [rows, inputs], padded to whole vectors with zeros. The caller writes the values of the views here.
        seen: [rows]. The caller writes 1 here if the view sees the point, else 0.
    """

    def __init__(
        self,
        target: CpuTarget,
        layers: Layers,
        rows: Index,
        points: Index,
        form: AnyForm = "float32",
        shifts: Sequence[Buffer] = (),
    ) -> None:
        isa = self._isa = Isa(target)
        self._layers, self._shifts = layers, shifts
        long, room = isa.padded(layers.inputs), rows + ROW_PADDING
        self._product = None if form == "float32" else panel_product(target, form)
        if self._product is not None:
            self._staged = [self._product.staged(rows, inputs) for inputs in (long, layers.hidden)]
        self.shown, self.seen = T.alloc(room, long), T.alloc(room)
        self._activation = T.alloc(room, isa.padded(layers.hidden))
        self._embedded = T.alloc(room, isa.padded(layers.width))
        self._queries = _Queries(isa, layers, points)
        with T.serial(room) as r, T.serial(long) as c:
            self.shown[r, c] = T.float32(0.0)

    def emit(self, points: Expr, V: Expr, embedding: Buffer, query: Buffer) -> None:
        """Embed the values of V views for some points.

        Args:
            embedding: [*, width]; its first rows are written.
            query: [*, width]; its first rows are written.
        """
        isa, layers, embedded = self._isa, self._layers, self._embedded
        rows = T.bind(points * V)
        if self._product is None:
            first = layers.inputs, self.shown, layers.first
            product(isa, rows, self._activation.extent(1), layers.first_bias, [first], self._activation, isa.relu)
            second = layers.hidden, self._activation, layers.second
            product(isa, rows, embedded.extent(1), layers.second_bias, [second], embedded)
        else:
            self._multiply(self._product, rows)
        with T.serial(rows) as r:
            copy_row(isa, embedded.part(r), embedding.part(r), layers.width)
        with T.serial(points) as p:
            self._queries.start(p, embedded, V)
        self._queries.emit(points, V, self.shown, self.seen, query)

    def finish(self, control: Buffer) -> None:
        """Emit the last code of a task: it sets `control[0]` if integers cannot express a value."""
        if self._product is not None:
            self._product.finish(control)

    def _multiply(self, product: PanelProduct, rows: Expr) -> None:
        """Both layers, with activations as integers."""
        isa, layers, (shown, hidden), (first, second) = self._isa, self._layers, self._staged, self._shifts

        def keep(r: Expr, c: int, x: Expr) -> None:
            self._activation[r, isa.at(c)] = isa.relu(x)

        product.stage(shown, rows, self.shown)
        product.multiply(rows, shown, first, layers.first_bias, keep)
        product.stage(hidden, rows, self._activation)
        product.multiply(rows, hidden, second, layers.second_bias, self._embedded)


class EmbeddingInTiles:
    """`Embedding` in matrix tiles, in bfloat16. Values come in another order, and results are packed.

    Args:
        shifts: panels of both layers, of `shift_sizes`.

    Attributes:
        shown: [rows, *]: features, colour, validity, zeros. The caller writes the values of the views here.
        seen: [rows]. The caller writes 1 here if the view sees the point, else 0.
    """

    def __init__(self, target: CpuTarget, layers: Layers, rows: Index, points: Index, shifts: Sequence[Buffer]) -> None:
        self._tiles, self._layers, self._shifts = Tiles(target), layers, shifts
        isa = self._isa = self._tiles.isa
        self._channels, room = layers.inputs - 4, rows + ROWS
        self.shown, self.seen = T.alloc(room, self._channels + isa.lanes), T.alloc(room)
        self._packed = T.alloc(room, self._channels // 2 + WORDS, dtype="int32")
        self._hidden = T.alloc(room, layers.hidden // 2, dtype="int32")
        self._embedded, self._sums = T.alloc(room, layers.width), T.alloc(ROWS, max(layers.hidden, layers.width))
        self._queries = _Queries(isa, layers, points)
        with T.serial(room) as r:
            self.shown[r, isa.at(self._channels)] = isa.splat(0.0)

    def emit(self, points: Expr, V: Expr, features: Buffer, embedding: Buffer, query: Buffer) -> None:
        """Embed the values of V views for some points. The first rows of the results are written.

        Args:
            features: [*, channels / 2] words, for the packed features.
            embedding: [*, width / 2] words.
            query: [*, width].
        """
        isa, tiles, layers, embedded = self._isa, self._tiles, self._layers, self._embedded
        rows, pairs = T.bind(points * V), range(0, layers.width, 32)
        of_row, (first, second) = self._channels // 2, self._shifts
        with T.serial(rows) as r:
            shown, packed = self.shown.part(r), self._packed.part(r)
            for c in range(0, self._channels, 32):
                packed[isa.at(c // 2)] = tiles.pack(shown[isa.at(c)], shown[isa.at(c + 16)])
            packed[isa.at(of_row)] = tiles.pack(shown[isa.at(self._channels)], isa.splat(0.0))
            copy_words(packed, features.part(r), of_row)

        def output(i: Expr, c: int, panel: Buffer, bias: Buffer) -> Expr:
            return isa.fma(self._sums[i, isa.at(c)], unit(isa, panel, c), bias[isa.at(c)])

        def keep(r: Expr, i: Expr) -> None:
            for c in range(0, layers.hidden, 32):
                low, high = (isa.relu(output(i, c + half, first, layers.first_bias)) for half in (0, 16))
                self._hidden[r, isa.at(c // 2)] = tiles.pack(low, high)

        def leave(r: Expr, i: Expr) -> None:
            for c in range(0, layers.width, 16):
                embedded[r, isa.at(c)] = output(i, c, second, layers.second_bias)

        tiles.multiply(rows, self._packed, first, _parts(self._packed), self._sums, keep)
        tiles.multiply(rows, self._hidden, second, _parts(self._hidden), self._sums, leave)
        with T.serial(rows) as r:
            for c in pairs:
                embedding[r, isa.at(c // 2)] = tiles.pack(embedded[r, isa.at(c)], embedded[r, isa.at(c + 16)])
        with T.serial(points) as p:
            self._queries.start(p, embedded, V)
        self._queries.emit(points, V, self.shown, self.seen, query)

    def finish(self, control: Buffer) -> None:
        """Emit the last code of a task: it sets `control[0]` if tiles cannot express a value."""
        self._tiles.finish(control)


def _parts(packed: Buffer) -> list[tuple[int, int]]:
    return [(word, word) for word in range(0, packed.extent(1), WORDS)]


class _Queries:
    """The first queries of a block of points."""

    def __init__(self, isa: Isa, layers: Layers, points: Index) -> None:
        self._isa, self._layers = isa, layers
        # The last vector that is written reaches beyond the statistics.
        pitch = layers.inputs + isa.padded(layers.inputs) + 1 if layers.statistics else 1
        self._summary = T.alloc(points + ROW_PADDING, pitch)
        self._queries = T.alloc(points + ROW_PADDING, isa.padded(layers.width))

    def start(self, point: Expr, embedded: Buffer, V: Expr) -> None:
        """Set a point's query to the maximum of its embeddings over the views, channel by channel."""
        _largest(self._isa, embedded, point * V, V, self._queries.part(point))

    def emit(self, points: Expr, V: Expr, shown: Buffer, seen: Buffer, query: Buffer) -> None:
        """Add the products of the moments, and write all queries to the first rows of `query` [*, width]."""
        isa, layers, queries = self._isa, self._layers, self._queries
        wide = queries.extent(1)
        if layers.statistics:
            with T.serial(points) as p:
                _moments(isa, layers.inputs, shown, seen, p * V, V, self._summary.part(p))
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


def shift_sizes(isa: Isa, inputs: int, hidden: int, width: int, form: AnyForm) -> list[tuple[int, int]]:
    """Inputs and outputs of the panels of both layers. The first layer's inputs end with zeros."""
    if form == "float32":
        return []
    first = inputs - 4 + 2 * WORDS if form == "bfloat16" else isa.padded(inputs)
    return [(first, hidden), (hidden, width)]


def _largest(isa: Isa, embedded: Buffer, row: Expr, V: Expr, out: Buffer) -> None:
    """Write the maximum of each channel over the V rows from `row` on."""
    for n in range(0, out.extent(0), isa.lanes):
        at = isa.at(n)
        out[at] = embedded[row, at]
        with T.serial(V - 1) as v:
            out[at] = isa.larger_or_nan(embedded[row + v + 1, at], out[at])


def _moments(isa: Isa, inputs: int, shown: Buffer, seen: Buffer, row: Expr, V: Expr, out: Buffer) -> None:
    """Write the `view_moments` of the V rows from `row` on: mean, deviation, and the share of views that see."""
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
    # The last vector of means has written beyond the means. The deviations overwrite that.
    for number, deviation in enumerate(deviations):
        out[isa.at(inputs + number * isa.lanes)] = deviation
    out[2 * inputs] = share


def run(
    function: Compiled, values: Tensor, mask: Tensor, panels: Sequence[Tensor], width: int
) -> tuple[Tensor, Tensor]:
    """Call a compiled function: embeddings [*, V, width] and queries [*, width]; arguments as those of the op."""
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
