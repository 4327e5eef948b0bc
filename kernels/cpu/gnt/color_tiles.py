"""The blend of the views' colours for packed values: in matrix tiles (AMX), a vector of points at a time."""

from __future__ import annotations

from collections.abc import Callable

from shiftadd3d.kernels.cpu.blocks import exp2, folded_each, softmax_of_vectors
from shiftadd3d.kernels.cpu.gnt.color_blend import Outcome, Weights, score
from shiftadd3d.kernels.cpu.gnt.tiles import ROWS, WORDS, Tiles, copy_words, unit, unpacked
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.reference.gnt.color_blend import LEAST_ANGLE
from shiftadd3d.kernels.reference.gnt.plane_sweep import MASKED_LOGIT
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr

_LOG2_E = 1.4426950408889634


class PackedViews:
    """A `color_blend.Judge` of packed values. It takes at most as many points at once as a vector has lanes.

    Args:
        shown: features [rows, C / 2] words, pixels [rows, 4], ray differences [rows, 4], mask [rows] uint8; rows are
            (ray, sample, view).
        V: the number of views.
        control: `finish` sets its first number to 1 if tiles cannot express a value.
    """

    def __init__(
        self,
        target: CpuTarget,
        shown: tuple[Buffer, Buffer, Buffer, Buffer],
        weights: Weights,
        V: Expr,
        control: Buffer,
    ) -> None:
        self._tiles, self._control, panel = Tiles(target), control, weights.view
        self._isa, self._four = self._tiles.isa, Isa(target, 4)
        self._features, self._pixels, self._ray_diff, self._mask = shown
        self._weights, self._panel, self._V, lanes = weights, panel, V, self._isa.lanes
        self._of_row = self._features.extent(1)
        room = V * lanes + ROWS
        self._packed = T.alloc(room, 2 * self._of_row + WORDS, dtype="int32")
        self._activation = T.alloc(room, panel.extent(1))
        self._angles, self._sees, self._shares = T.alloc(V * lanes), T.alloc(V * lanes), T.alloc(V * lanes)
        self._sums, self._factor = T.alloc(lanes, lanes), T.alloc(lanes)

    def judge(self, first: Expr, count: Expr, row: Expr, outcome: Outcome) -> None:
        isa, V, four = self._isa, self._V, self._four
        last = T.bind(count - 1)
        counts = self._weigh(row, last)
        with T.serial(count) as i:
            outcome.counts[first + i] = counts[i]
            deviation = self._compare(i, row + i * V)
            outcome.scores[first + i] = score(self._weights, outcome, first + i, deviation)
        parts = [(word, word) for word in range(0, self._packed.extent(1), WORDS)]
        self._tiles.multiply(count * V, self._packed, self._panel, parts, self._activation)
        self._share(lambda v: self._logit(v, last, outcome.own.below(first)))
        with T.serial(count) as i:
            mixed = four.register(0.0)
            with T.serial(V) as v:
                share = four.splat(self._shares[v * isa.lanes + i])
                mixed.value = four.fma(share, self._pixels[row + i * V + v, four.at(0)], mixed.value)
            outcome.colors[first + i, four.at(0)] = mixed.value

    def finish(self) -> None:
        self._tiles.finish(self._control)

    def _at(self, v: Expr) -> Expr:
        return self._isa.at(v * self._isa.lanes)

    def _weigh(self, row: Expr, last: Expr) -> Buffer:
        """Compute the angle priors, as base-2 logits, and the shares from these alone.

        Args:
            row: the row of the first point's first view.
            last: the number of the last point.

        Returns:
            [lanes], the number of views that see each point.
        """
        isa, V, scales = self._isa, self._V, self._weights.scales
        zero, one = isa.splat(0.0), isa.splat(1.0)
        with T.serial(isa.lanes) as i, T.serial(V) as v:
            of_view = T.bind(row + T.min(T.cast(i, "int64"), last) * V + v)
            self._angles[v * isa.lanes + i] = self._ray_diff[of_view, 3] - T.float32(1.0)
            self._sees[v * isa.lanes + i] = T.cast(self._mask[of_view], "float32")
        seen, off = isa.register(0.0), isa.register(0.0)
        with T.serial(V) as v:
            seen.value = seen.value + self._sees[self._at(v)]
            off.value = isa.fma(self._sees[self._at(v)], zero - self._angles[self._at(v)], off.value)
        mean = isa.larger(off.value / isa.larger(seen.value, one), isa.splat(LEAST_ANGLE))
        scale = isa.keep(isa.splat(scales[0] * T.float32(_LOG2_E)) * (one + isa.splat(scales[2]) / mean))
        with T.serial(V) as v:
            angle = scale * self._angles[self._at(v)]
            self._angles[self._at(v)] = T.select(self._sees[self._at(v)] > zero, angle, isa.splat(MASKED_LOGIT))
        self._share(lambda v: self._angles[self._at(v)])
        self._factor[isa.at(0)] = seen.value
        return self._factor

    def _share(self, logit: Callable[[Expr], Expr]) -> None:
        """Write the softmax of base-2 logits over the views into the shares."""
        isa = self._isa
        total = softmax_of_vectors(isa, self._shares, self._V, logit, lambda v, share: None, exp2)
        factor = isa.keep(isa.splat(1.0) / total)
        with T.serial(self._V) as v:
            self._shares[self._at(v)] = self._shares[self._at(v)] * factor

    def _compare(self, i: Expr, row: Expr) -> Expr:
        """Pack the inputs of the views' layer for one point: values, ray differences, distances from the consensus.

        Args:
            i: the point's number.
            row: the row of its first view.

        Returns:
            The deviation of the views' colours, summed over the channels.
        """
        isa, four, V = self._isa, self._four, self._V
        groups = range(0, self._of_row, WORDS)
        means = {g: (isa.register(0.0), isa.register(0.0)) for g in groups}
        color, deviation = four.register(0.0), four.register(0.0)
        with T.serial(V) as v:
            share = T.bind(self._shares[v * isa.lanes + i])
            for g, pair in means.items():
                for mean, x in zip(pair, unpacked(isa, self._features[row + v, isa.at(g)]), strict=True):
                    mean.value = isa.fma(isa.splat(share), x, mean.value)
            color.value = four.fma(four.splat(share), self._pixels[row + v, four.at(0)], color.value)
        with T.serial(V) as v:
            packed = self._packed.part(i * V + v)
            copy_words(self._features.part(row + v), packed, self._of_row)
            for g, pair in means.items():
                shown = unpacked(isa, self._features[row + v, isa.at(g)])
                apart = (isa.absolute(x - mean.value) for mean, x in zip(pair, shown, strict=True))
                packed[isa.at(self._of_row + g)] = isa.to_bfloat16(*apart)
            pixel, diff = self._pixels[row + v, four.at(0)], self._ray_diff[row + v, four.at(0)]
            apart = four.keep(four.absolute(pixel - color.value))
            deviation.value = four.fma(four.splat(self._shares[v * isa.lanes + i]), apart, deviation.value)
            beside = T.shuffle([pixel, diff, apart, four.splat(0.0)], range(16))
            packed[isa.at(2 * self._of_row)] = self._tiles.pack(beside, isa.splat(0.0))
        return deviation[0] + deviation[1] + deviation[2]

    def _logit(self, v: Expr, last: Expr, own: Buffer) -> Expr:
        """The base-2 logits of one view, for all points."""
        isa, V, weight = self._isa, self._V, self._weights.view_logit
        with T.serial(isa.lanes) as i:
            point = T.bind(T.min(T.cast(i, "int64"), last))
            view, total = self._activation.part(point * V + v), isa.splat(0.0)
            for n in range(0, weight.extent(0), isa.lanes):
                at = isa.at(n)
                hidden = isa.relu(isa.fma(view[at], unit(isa, self._panel, n), own[point, at]))
                total = isa.fma(hidden, weight[at], total)
            self._sums[i, isa.at(0)] = total
        folded = isa.keep(folded_each(isa, self._sums, lambda a, b: a + b))
        logit = isa.fma(folded, isa.splat(_LOG2_E), self._angles[self._at(v)])
        return T.select(self._sees[self._at(v)] > isa.splat(0.0), logit, isa.splat(MASKED_LOGIT))
