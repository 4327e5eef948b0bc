"""View attention in matrix tiles (AMX), as a residual block.

`shiftadd3d.kernels.cpu.gnt.view_attention` has the formulas. Here ``R (x_v, p_v) + b`` is one product. A row holds the
embedding x_v, p_v twice, and two ones. p_v stands there twice because its weights have two bfloat16 pieces. The ones
multiply the two pieces of the bias.
"""

from __future__ import annotations

from typing import NamedTuple

from shiftadd3d.kernels.cpu.blocks import exp2, layer_norm
from shiftadd3d.kernels.cpu.forms.panels import panel_arguments
from shiftadd3d.kernels.cpu.gnt.tiles import ROWS, WORDS, Tiles, copy_words, unit
from shiftadd3d.kernels.cpu.gnt.view_attention import Shown, pool, position, prefetch
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, product
from shiftadd3d.kernels.pack.gnt.view_attention import tile_sizes
from shiftadd3d.kernels.reference.gnt.view_attention import MAX_VIEWS
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr

# (point, view) rows of a block, and blocks of a task.
_ROWS, _BLOCKS_A_TASK = 64, 16


class Weights(NamedTuple):
    """The arguments that hold `shiftadd3d.kernels.pack.gnt.view_attention.TilePanels`."""

    position: Buffer
    query: Buffer
    query_bias: Buffer
    score: Buffer
    out_bias: Buffer
    row: Buffer
    out: Buffer

    @classmethod
    def argument(cls, isa: Isa, width: int, hidden: int) -> Weights:
        """The next arguments of a function."""
        wide, narrow = isa.padded(width), isa.padded(hidden)
        return cls(
            T.panel("w_position", 5, isa.padded(2 * hidden + 2)),
            T.panel("w_query", width, narrow),
            T.panel("b_query", narrow),
            T.panel("w_score", hidden, wide),
            T.panel("b_out", wide),
            *panel_arguments("bfloat16", tile_sizes(isa.lanes, width, hidden)),
        )


def emit(
    target: CpuTarget, x: Buffer, given: Shown, weights: Weights, V: Expr, out: Buffer, control: Buffer, eps: float
) -> None:
    """Emit ``out = x + view attention of norm(x)`` for all points, after all arguments.

    Args:
        x, out: [P, C].
        given: its views are [P * V, C], or packed, [P * V, C / 2] words.
        V: the number of views.
        control: its first number becomes 1 if tiles cannot express a value.
        eps: epsilon of the norm.
    """
    isa, (P, width) = Isa(target), x.shape
    assert isinstance(width, int)
    narrow = weights.query_bias.extent(0)
    points_of_block = T.bind(T.int64(_ROWS) // V)
    points_of_task = T.bind(points_of_block * _BLOCKS_A_TASK)
    with T.parallel((P + points_of_task - 1) // points_of_task) as task:
        begin = T.bind(task * points_of_task)
        count = T.bind(T.min(points_of_task, P - begin))
        block = _Block(target, weights, given, width)
        normed, queries = T.alloc(points_of_task + ROW_PADDING, width), T.alloc(points_of_task + ROW_PADDING, narrow)
        pooled = T.alloc(points_of_task + ROWS, width // 2, dtype="int32")
        layer_norm(isa, count, width, lambda r, c: x[begin + r, c], normed, T.float32(eps))
        product(isa, count, narrow, weights.query_bias, [(width, normed, weights.query)], queries)
        with T.serial((count + points_of_block - 1) // points_of_block) as number:
            first = T.bind(number * points_of_block)
            points = T.bind(T.min(points_of_block, count - first))
            block.emit(points, V, T.bind((begin + first) * V), queries.below(first), pooled.below(first))

        def leave(r: Expr, i: Expr) -> None:
            for c in range(0, width, isa.lanes):
                value = isa.fma(block.sums[i, isa.at(c)], unit(isa, weights.out, c), weights.out_bias[isa.at(c)])
                out[begin + r, isa.at(c)] = x[begin + r, isa.at(c)] + value

        parts = [(word, word) for word in range(0, width // 2, WORDS)]
        block.tiles.multiply(count, pooled, weights.out, parts, block.sums, leave)
        block.tiles.finish(control)


class _Block:
    """Emits the pooling of views for a block of points, and holds the memory for it within a task.

    Attributes:
        tiles: the tile registers.
        sums: [ROWS, C], scratch memory that is free between blocks.
    """

    def __init__(self, target: CpuTarget, weights: Weights, given: Shown, width: int) -> None:
        self.tiles, self._weights, self._given, self._width = Tiles(target), weights, given, width
        isa = self._isa = self.tiles.isa
        self._of_row, places = width // 2, weights.position.extent(1)
        self._packed = T.alloc(_ROWS + ROWS, self._of_row + WORDS, dtype="int32")
        self._places = T.alloc(_ROWS, 2 * isa.lanes)
        self._rows, self._hidden = T.alloc(_ROWS + ROWS, weights.row.extent(1)), T.alloc(_ROWS, isa.lanes)
        self._shares, self.sums = T.alloc(MAX_VIEWS * isa.lanes), T.alloc(ROWS, width)
        # The embedding's words are multiplied twice: by both pieces of their weights.
        words = range(0, self._of_row, WORDS)
        self._parts = [*((word, piece + word) for word in words for piece in (0, self._of_row))]
        self._parts.append((self._of_row, 2 * self._of_row))
        with T.serial(_ROWS) as r:
            for c in range(places, 2 * isa.lanes, isa.lanes):
                self._places[r, isa.at(c)] = isa.splat(0.0)

    def emit(self, points: Expr, V: Expr, row: Expr, queries: Buffer, pooled: Buffer) -> None:
        """Pool the views of some points.

        Args:
            row: the row of the first point's first view.
            queries: [*, H].
            pooled: [*, C / 2] words; its first rows are written.
        """
        isa, tiles, weights, given, packed = self._isa, self.tiles, self._weights, self._given, self._packed
        rows, hidden = T.bind(points * V), weights.query_bias.extent(0)
        with T.serial(rows) as r:
            self._take(given.views.part(row + r), packed.part(r))
            place = self._places.part(r)
            position(isa, given.ray_diff.part(row + r), weights.position, place)
            packed[r, isa.at(self._of_row)] = isa.to_bfloat16(place[isa.at(0)], place[isa.at(isa.lanes)])
        tiles.multiply(rows, packed, weights.row, self._parts, self._rows)
        with T.serial(points) as p:
            shown, of_point = self._rows.below(p * V), self._hidden.below(p * V)
            seen = given.mask.below(row + p * V)
            with T.serial(V) as v:
                prefetch(given.views.part(row + rows + p * V + v), given.views.extent(1))
                for n in range(0, hidden, isa.lanes):
                    of_point[v, isa.at(n)] = isa.relu(shown[v, isa.at(self._width + n)] + queries[p, isa.at(n)])
            for c in range(0, self._width, 32):
                low, high = (
                    pool(isa, of_point, weights.score, seen, shown, V, isa.at(c + half), self._shares, exp2)
                    for half in (0, 16)
                )
                pooled[p, isa.at(c // 2)] = tiles.pack(low, high)

    def _take(self, view: Buffer, packed: Buffer) -> None:
        """Copy an embedding, and pack it if it is float32."""
        if view.dtype == "int32":
            copy_words(view, packed, self._of_row)
            return
        isa = self._isa
        for c in range(0, self._width, 32):
            packed[isa.at(c // 2)] = self.tiles.pack(view[isa.at(c)], view[isa.at(c + 16)])
