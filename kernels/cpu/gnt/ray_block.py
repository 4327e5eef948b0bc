"""The transformer block along rays on CPUs. All data of a ray stays in the caches.

With (Q, K, V) = W norm(x) + b::

    x' = x + W_o (attention of (Q, K, V) + convolution of V along the ray) + b_o
    out = x' + W_2 relu(W_1 norm(x') + b_1) + b_2

The weights and biases of norms are folded into the layers behind them. Shift weights in panels of integers must stay
powers of two, so there the norm's weight multiplies the activation instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import add_row, copy_row, layer_norm, softmax_of_row
from shiftadd3d.kernels.cpu.forms import panels as forms
from shiftadd3d.kernels.cpu.forms.panels import AnyForm, PanelProduct, Sink, panel_arguments, panel_product
from shiftadd3d.kernels.cpu.gnt.shift_problems import random_ray_block
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, Term, product
from shiftadd3d.kernels.pack.gnt.ray_block import Layout, layout_of, panels, shift_sizes
from shiftadd3d.kernels.pack.gnt.ray_block import sizes as panel_sizes
from shiftadd3d.kernels.pack.shift import panel_forms, shift_panel
from shiftadd3d.kernels.reference.gnt.ray_block import (
    random_block,
    ray_block_twin,
    samples_of_certain_codes,
)
from shiftadd3d.kernels.reference.linear_angular import LEAST_ROW_SUM
from shiftadd3d.kernels.runtime import memory
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, Spec
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

# Rows of activations in a block, which has one ray or more: enough to fill the tiles of the products.
_ROWS = 64


@dataclass(frozen=True)
class _Ray:
    """Emits the attention of one ray: S rows of `projected` from `first` on.

    Attributes:
        isa: vectors along channels.
        of_head: vectors along a head's values.
        layout: where queries, keys and values lie in a row of `projected`.
        size: channels of a head.
        softmax: whether attention is a softmax, or else linear.
        projected: [rows, layout.end]: queries, keys and values. In linear attention, queries and keys are codes.
        attended: [rows, heads * layout.head], for the outcome.
    """

    isa: Isa
    of_head: Isa
    layout: Layout
    heads: int
    size: int
    softmax: bool
    projected: Buffer
    attended: Buffer
    first: Expr
    S: Expr

    @property
    def scale(self) -> float:
        """The factor of the products of queries and keys."""
        return 1.0 / math.sqrt(self.size) if self.softmax else 1.0 / (math.pi * self.size)

    def query(self, j: Index, head: Index, i: Index) -> Expr:
        return self.projected[self.first + j, head * self.size + i]

    def key(self, j: Index, head: Index, i: Index) -> Expr:
        return self.projected[self.first + j, self.layout.keys + head * self.size + i]

    def value(self, j: Index, head: Index, c: Index) -> Expr:
        """A vector of a head's values."""
        return self.projected[self.first + j, self.of_head.at(self.layout.values + head * self.layout.head + c)]

    def place(self, j: Index, head: Index, c: Index) -> tuple[Expr, Expr]:
        """Where a vector of a head's outcome lies in `attended`."""
        return self.first + j, self.of_head.at(head * self.layout.head + c)

    @property
    def columns(self) -> range:
        """Where the vectors of a head's values begin."""
        return range(0, self.layout.head, self.of_head.lanes)

    def attend_linear(self) -> None:
        """``(s Q (K^T V) + 1/2 sum v) / max(s Q sum k + S / 2, LEAST_ROW_SUM)``, head by head."""
        summed = T.alloc(self.size + 1, self.layout.head)  # s k v^T, and v / 2
        counts = T.alloc(self.size)  # s k
        with T.serial(self.heads) as head:
            self._sum_keys(head, summed, counts)
            self._look_up(head, summed, counts)

    def _sum_keys(self, head: Expr, summed: Buffer, counts: Buffer) -> None:
        """Sum up keys, values and their products over the samples."""
        isa, size = self.of_head, self.size
        with T.serial(size + 1) as i:
            for c in self.columns:
                summed[i, isa.at(c)] = isa.splat(0.0)
        with T.serial(size) as i:
            counts[i] = T.float32(0.0)
        with T.serial(self.S) as j:
            with T.serial(size) as i:
                code = self.key(j, head, i)
                counts[i] = counts[i] + code
                for c in self.columns:
                    summed[i, isa.at(c)] = isa.fma(isa.splat(code), self.value(j, head, c), summed[i, isa.at(c)])
            for c in self.columns:
                summed[size, isa.at(c)] = summed[size, isa.at(c)] + self.value(j, head, c)
        with T.serial(size) as i:
            counts[i] = counts[i] * T.float32(self.scale)
            for c in self.columns:
                summed[i, isa.at(c)] = summed[i, isa.at(c)] * isa.splat(self.scale)
        for c in self.columns:
            summed[size, isa.at(c)] = summed[size, isa.at(c)] * isa.splat(0.5)

    def _look_up(self, head: Expr, summed: Buffer, counts: Buffer) -> None:
        """Multiply the sums by the samples' queries, and normalise."""
        isa, row_sum = self.of_head, T.alloc(1, align=4)
        with T.serial(self.S) as j:
            row_sum[0] = T.cast(self.S, "float32") * T.float32(0.5)
            sums = {c: isa.register(summed[self.size, isa.at(c)]) for c in self.columns}
            with T.serial(self.size) as i:
                code = self.query(j, head, i)
                row_sum[0] = row_sum[0] + code * counts[i]
                for c, part in sums.items():
                    part.value = isa.fma(isa.splat(code), summed[i, isa.at(c)], part.value)
            row_sum[0] = T.float32(1.0) / T.max(row_sum[0], T.float32(LEAST_ROW_SUM))
            for c, part in sums.items():
                self.attended[self.place(j, head, c)] = part.value * isa.splat(row_sum[0])

    def attend_softmax(self) -> None:
        """``softmax(s Q K^T) V``, head by head."""
        isa, of_head = self.isa, self.of_head
        span = 2 * isa.lanes
        blocks = T.bind((self.S + (span - 1)) // span)
        turned = T.alloc(self.size, blocks * span)  # keys, along the samples
        shares = T.alloc(self.S + ROW_PADDING, blocks * span)
        with T.serial(self.heads) as head:
            with T.serial(blocks * span) as j, T.serial(self.size) as i:
                turned[i, j] = self.key(T.min(j, self.S - 1), head, i) * T.float32(self.scale)
            with T.serial(blocks) as block:
                left = block * span

                def store(r: Index, c: Index, x: Expr) -> None:
                    shares[r, isa.at(left + c)] = x

                term = (self.size, lambda r, k: self.query(r, head, k), lambda k, c: turned[k, isa.at(left + c)])
                product(isa, self.S, span, lambda r, c: isa.splat(0.0), [term], store)
            with T.serial(self.S) as r:
                factor = T.bind(isa.splat(T.float32(1.0) / softmax_of_row(isa, shares.part(r), self.S)))
                with T.serial(blocks * 2) as j:
                    at = isa.at(j * isa.lanes)
                    shares[r, at] = shares[r, at] * factor

            def attend(r: Index, c: Index, x: Expr) -> None:
                self.attended[self.place(r, head, c)] = x

            term = (self.S, shares, lambda k, c: self.value(k, head, c))
            product(of_head, self.S, self.layout.head, lambda r, c: of_head.splat(0.0), [term], attend)

    def convolve(self, weights: Buffer, kernel: int) -> None:
        """Add the convolution of the values along the ray, zeros beyond its ends."""
        isa = self.of_head
        with T.serial(self.heads) as head:
            for tap in range(kernel):
                distance = tap - kernel // 2
                # Only samples that have a neighbour at this distance.
                with T.serial(T.max(self.S - abs(distance), T.int64(0))) as j:
                    to = max(0, -distance) + j
                    for c in self.columns:
                        weight, place = isa.splat(weights[head * kernel + tap]), self.place(to, head, c)
                        x = isa.fma(weight, self.value(to + distance, head, c), self.attended[place])
                        self.attended[place] = x

    def first_weights(self, out: Buffer) -> None:
        """Write the attention of the ray's first sample, averaged over the heads, to out [S]."""
        similarity, whole = T.alloc(self.S + self.isa.lanes), T.alloc(1, align=4)
        with T.serial(self.S) as j:
            out[j] = T.float32(0.0)
        with T.serial(self.heads) as head:
            with T.serial(self.S) as j:
                similarity[j] = T.float32(0.0)
                with T.serial(self.size) as i:
                    similarity[j] = similarity[j] + self.query(0, head, i) * self.key(j, head, i)
                similarity[j] = similarity[j] * T.float32(self.scale)
            if self.softmax:
                whole[0] = softmax_of_row(self.isa, similarity, self.S)
            else:
                whole[0] = T.float32(0.0)
                with T.serial(self.S) as j:
                    similarity[j] = similarity[j] + T.float32(0.5)
                    whole[0] = whole[0] + similarity[j]
            with T.serial(self.S) as j:
                out[j] = out[j] + similarity[j] / (whole[0] * T.float32(self.heads))


class _FloatLayers:
    """The linear layers of a block in float32, within a task."""

    def __init__(self, isa: Isa, sizes: Sizes, weights: Weights, rows: Expr) -> None:
        self._isa, self._sizes, self._weights = isa, sizes, weights
        self._activation = T.alloc(rows + ROW_PADDING, max(sizes.deep, 1))

    def project(self, rows: Expr, normed: Buffer, sink: Sink) -> None:
        """Emit the layer of queries, keys and values."""
        weights, sizes = self._weights, self._sizes
        term = (sizes.width, normed, weights.projections)
        product(self._isa, rows, sizes.layout.end, weights.projection_bias, [term], sink)

    def leave(self, rows: Expr, attended: Buffer, out: Buffer) -> None:
        """Emit the output layer of the attention."""
        weights, sizes = self._weights, self._sizes
        terms = [_head(attended, weights.out, sizes.layout, sizes.size, n) for n in range(sizes.heads)]
        product(self._isa, rows, sizes.layout.keys, weights.out_bias, terms, out)

    def add_perceptron(self, rows: Expr, normed: Buffer, out: Buffer) -> None:
        """Emit ``out += perceptron(normed)``."""
        isa, weights, sizes, wide = self._isa, self._weights, self._sizes, self._sizes.layout.keys
        term = (sizes.width, normed, lambda k, c: weights.first[isa.at(k * sizes.deep + c)])
        product(isa, rows, sizes.deep, weights.first_bias, [term], self._activation, isa.relu)
        term = (sizes.hidden, self._activation, lambda k, c: weights.second[isa.at(k * wide + c)])
        product(isa, rows, wide, lambda r, c: out[r, isa.at(c)] + weights.second_bias[isa.at(c)], [term], out)

    def finish(self, flag: Buffer) -> None:
        """Emit the last code of a task: float32 expresses every activation."""


class _ShiftLayers:
    """The methods of `_FloatLayers` for shift weights in panels of integers.

    Args:
        norms: [1 or 2, width], the weights of the norms.
        panels: those of projections and out; with a perceptron, also of first and second.
    """

    def __init__(
        self,
        product: PanelProduct,
        sizes: Sizes,
        weights: Weights,
        rows: Expr,
        norms: Buffer,
        *panels: Buffer,
    ) -> None:
        self._product, self._isa, self._weights = product, product.isa, weights
        self._norms, self._panels = norms, panels
        self._staged = product.staged(rows, sizes.width)
        if sizes.hidden:
            self._activation = T.alloc(rows + forms.ROW_PADDING, sizes.hidden)
            self._staged_activation = product.staged(rows, sizes.hidden)

    def project(self, rows: Expr, normed: Buffer, sink: Sink) -> None:
        self._stage_normed(rows, normed, 0)
        self._product.multiply(rows, self._staged, self._panels[0], self._weights.projection_bias, sink)

    def leave(self, rows: Expr, attended: Buffer, out: Buffer) -> None:
        self._product.stage(self._staged, rows, attended)
        self._product.multiply(rows, self._staged, self._panels[1], self._weights.out_bias, out)

    def add_perceptron(self, rows: Expr, normed: Buffer, out: Buffer) -> None:
        isa, weights, activation = self._isa, self._weights, self._activation

        def activate(r: Expr, c: int, x: Expr) -> None:
            activation[r, isa.at(c)] = isa.relu(x)

        def before(r: Index, c: int) -> Expr:
            return out[r, isa.at(c)] + weights.second_bias[isa.at(c)]

        self._stage_normed(rows, normed, 1)
        self._product.multiply(rows, self._staged, self._panels[2], weights.first_bias, activate)
        self._product.stage(self._staged_activation, rows, activation)
        self._product.multiply(rows, self._staged_activation, self._panels[3], before, out)

    def finish(self, flag: Buffer) -> None:
        self._product.finish(flag)

    def _stage_normed(self, rows: Expr, normed: Buffer, norm: int) -> None:
        isa, last = self._isa, rows - 1

        def scaled(r: Expr, c: int) -> Expr:
            return normed[T.min(r, last), isa.at(c)] * self._norms[norm, isa.at(c)]

        self._product.stage(self._staged, rows, scaled)


class Sizes(NamedTuple):
    """The sizes of a block. Without a perceptron, `hidden` is 0."""

    width: int
    heads: int
    size: int  # of a head
    hidden: int
    deep: int  # hidden units, padded to whole vectors
    layout: Layout

    @classmethod
    def of(cls, target: CpuTarget, width: int, heads: int, hidden: int) -> Sizes:
        isa = Isa(target)
        return cls(width, heads, width // heads, hidden, isa.padded(hidden), layout_of(isa.lanes, width, heads))


class Weights(NamedTuple):
    """The arguments that hold `shiftadd3d.kernels.pack.gnt.ray_block.Panels`, then norms and panels of integers."""

    projections: Buffer
    projection_bias: Buffer
    out: Buffer
    out_bias: Buffer
    first: Buffer
    first_bias: Buffer
    second: Buffer
    second_bias: Buffer
    conv: Buffer
    shifts: list[Buffer]

    @classmethod
    def argument(cls, isa: Isa, sizes: Sizes, kernel: int, form: AnyForm) -> Weights:
        """The next arguments of a function."""
        width, heads, _, hidden, _, layout = sizes
        layers = [f"{kind}_{name}" for name in ("projections", "out", "first", "second") for kind in "wb"]
        panels = T.panels(panel_sizes(isa.lanes, width, heads, hidden, kernel), [*layers, "conv"])
        shifts: list[Buffer] = []
        if form != "float32":
            shifts.append(T.panel("norms", 2 if hidden else 1, width))
            shifts += panel_arguments(form, shift_sizes(width, hidden, layout))
        return cls(*panels, shifts=shifts)


def _build(
    target: CpuTarget,
    *,
    width: int,
    heads: int,
    hidden: int,
    attention: str,
    kernel: int,
    return_weights: bool,
    form: AnyForm,
) -> T.PrimFunc:
    sizes = Sizes.of(target, width, heads, hidden)
    with T.function("ray_block") as function:
        N, F = T.sizes(2)
        x = T.argument("x", (N, width))  # rows are (ray, sample)
        weights = Weights.argument(Isa(target), sizes, kernel, form)
        S, eps = T.scalar("S"), T.scalar("eps", "float32")
        out, first_out = T.argument("out", (N, width)), T.argument("first_out", (F, S))
        flag = T.argument("flag", (1,), "int32")
        first = first_out if return_weights else None
        emit(target, form, sizes, weights, x, S, out, flag, attention=attention, kernel=kernel, eps=eps, first=first)
    return function.get()


def emit(
    target: CpuTarget,
    form: AnyForm,
    sizes: Sizes,
    weights: Weights,
    x: Buffer,
    S: Expr,
    out: Buffer,
    flag: Buffer,
    *,
    attention: str,
    kernel: int,
    eps: Expr,
    first: Buffer | None = None,
) -> None:
    """Emit the block for all rays, after all arguments.

    Args:
        x, out: [rays * S, C].
        S: samples of a ray.
        flag: its first number becomes 1 if the form cannot express an activation.
        kernel: taps of the convolution on the values.
        first: [rays, S], for the attention of each ray's first sample.
    """
    isa, layout, (N, _) = Isa(target), sizes.layout, x.shape
    width, heads = sizes.width, sizes.heads
    softmax, low = attention == "softmax", -1.0 if attention == "pm1" else 0.0
    rays_of_block = T.bind(T.max(T.int64(_ROWS) // S, T.int64(1)))
    rows_of_block = T.bind(rays_of_block * S)
    with T.parallel((N + rows_of_block - 1) // rows_of_block) as block:
        begin = T.bind(block * rows_of_block)
        rows = T.bind(T.min(rows_of_block, N - begin))
        room = rows_of_block + max(ROW_PADDING, forms.ROW_PADDING)
        normed, residual = (T.alloc(room, layout.keys) for _ in range(2))
        projected, attended = T.alloc(room, layout.end), T.alloc(room, heads * layout.head)
        layers = _layers(target, form, sizes, weights, rows_of_block)

        def project(r: Index, c: int, sums: Expr) -> None:
            if not softmax and c < layout.values:
                sums = T.select(sums >= isa.splat(0.0), isa.splat(1.0), isa.splat(low))
            projected[r, isa.at(c)] = sums

        layer_norm(isa, rows, width, lambda r, c: x[begin + r, c], normed, eps)
        layers.project(rows, normed, project)
        with T.serial(rows // S) as ray:
            of_head = Isa(target, layout.lanes)
            one = _Ray(isa, of_head, layout, heads, sizes.size, softmax, projected, attended, ray * S, S)
            one.attend_softmax() if softmax else one.attend_linear()
            one.convolve(weights.conv, kernel)
            if first is not None:
                one.first_weights(first.part(block * rays_of_block + ray))
        layers.leave(rows, attended, residual)
        with T.serial(rows) as r:
            add_row(isa, x.part(begin + r), residual.part(r), width)
        if sizes.hidden:
            layer_norm(isa, rows, width, lambda r, c: residual[r, c], normed, eps)
            layers.add_perceptron(rows, normed, residual)
        with T.serial(rows) as r:
            copy_row(isa, residual.part(r), out.part(begin + r), width)
        layers.finish(flag)


def _layers(
    target: CpuTarget, form: AnyForm, sizes: Sizes, weights: Weights, most: Expr
) -> _FloatLayers | _ShiftLayers:
    """What emits the layers' products, for blocks of at most `most` rows."""
    if form == "float32":
        return _FloatLayers(Isa(target), sizes, weights, most)
    return _ShiftLayers(panel_product(target, form), sizes, weights, most, *weights.shifts)


def _head(attended: Buffer, weight: Buffer, layout: Layout, size: int, head: int) -> Term:
    """A head's part of the output layer."""
    return size, lambda r, k: attended[r, head * layout.head + k], weight.below(head * size)


def run(
    function: Compiled, x: Tensor, panels: Sequence[Tensor], eps: float, return_weights: bool
) -> tuple[Tensor, Tensor] | None:
    """Call a compiled function with the panels of its form; None if the form cannot express an activation."""
    rays, samples, width = x.shape
    out = memory.empty(rays * samples, width, dtype=torch.float32)
    first, flag = torch.empty(rays if return_weights else 0, samples), torch.zeros(1, dtype=torch.int32)
    function(x.float().reshape(-1, width).contiguous(), *panels, samples, eps, out, first, flag)
    first = first if return_weights else x.new_empty(0)
    return None if flag.item() else (out.view(x.shape).to(x.dtype), first.to(x.dtype))


def _trial(
    function: Compiled, *, attention: str, return_weights: bool, form: AnyForm, heads: int, **sizes: int
) -> None:
    compare_with_reference(partial(run, function), form, attention, heads, 1e-6, return_weights, **sizes)


def compare_with_reference(
    run: Callable[[Tensor, Sequence[Tensor], float, bool], tuple[Tensor, Tensor] | None],
    form: AnyForm,
    attention: str,
    heads: int,
    eps: float,
    return_weights: bool,
    **sizes: int,
) -> None:
    """Raise `AssertionError` unless ``run(x, panels, eps, return_weights)`` computes what the reference does.

    Args:
        sizes: width, hidden and kernel.
    """
    sizes |= {"rays": 13, "samples": 9, "heads": heads}
    if form != "float32":
        problem = random_ray_block(0, attention, **sizes)._replace(eps=eps)
        shifts = [problem.norms, *(shift_panel(layer, form) for layer in problem.shifts.values())]
        outcome = run(problem.x, [*problem.panels, *shifts], eps, return_weights)
        assert outcome is not None, "it found an activation that it cannot express"
        problem.check(*outcome, form)
        return
    x, weights, biases, conv, _ = random_block(0, **sizes)
    outcome = run(x, panels(weights, biases, conv, heads, current().lanes), eps, return_weights)
    assert outcome is not None
    out, first = outcome
    twin, twins_first = ray_block_twin(x, weights, biases, conv, heads, attention, eps, return_weights)
    certain = torch.ones(x.shape[:2], dtype=torch.bool)
    if attention != "softmax":
        certain = samples_of_certain_codes(x, weights, biases, eps)
        assert certain.any(), "rounding decides a code in each of the trial's rays"
    torch.testing.assert_close(out[certain], twin[certain], rtol=1e-3, atol=1e-4)
    if return_weights:
        torch.testing.assert_close(first[certain[:, 0]], twins_first[certain[:, 0]], rtol=1e-3, atol=1e-4)


def _variants(target: CpuTarget) -> Iterator[Spec]:
    for width in (32, 64):
        for attention, hidden in (("softmax", 4 * width), ("pm1", 0), ("pm1", 4 * width)):
            for form in ("float32", *panel_forms(target)):
                yield {
                    "width": width,
                    "heads": 4,
                    "hidden": hidden,
                    "attention": attention,
                    "kernel": 0 if attention == "softmax" else 3,
                    "return_weights": False,
                    "form": form,
                }


KERNEL = Kernel("ray_block", _build, _trial, _variants)
