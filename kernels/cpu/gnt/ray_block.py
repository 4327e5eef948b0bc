"""The transformer block along rays on CPUs: all of a ray stays in the caches.

With (Q, K, V) = W norm(x) + b, the norms' weights taken into the layers behind them::

    x' = x + W_o (attention of (Q, K, V) + convolution of V along the ray) + b_o
    out = x' + W_2 relu(W_1 norm(x') + b_1) + b_2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import copy_row, layer_norm, softmax_of_row
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, Term, product
from shiftadd3d.kernels.pack.gnt.ray_block import Layout, layout_of, panels
from shiftadd3d.kernels.reference.gnt.ray_block import (
    random_block,
    ray_block_twin,
    samples_of_certain_codes,
)
from shiftadd3d.kernels.reference.linear_angular import LEAST_ROW_SUM
from shiftadd3d.kernels.runtime import memory
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

# Rows of activations at once, at least one ray: enough to fill the tiles of the products.
_ROWS = 48


@dataclass(frozen=True)
class _Ray:
    """The attention of one ray, as statements of a kernel: S rows of `projected` from `first` on.

    Attributes:
        isa, of_head: vectors along channels, and along a head's values.
        layout: where queries, keys and values lie in a row of `projected`.
        size: channels of a head.
        scale: of the products of queries and keys.
        projected: [rows, layout.end]: queries, keys and values; of linear attention, queries and keys are codes.
        attended: [rows, heads * layout.head], the outcome.
    """

    isa: Isa
    of_head: Isa
    layout: Layout
    heads: int
    size: int
    scale: float
    projected: Buffer
    attended: Buffer
    first: Expr
    S: Expr

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
        """The sums over the samples."""
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
        """What the samples' queries make of the sums."""
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
                # Which samples have a neighbour at this distance.
                with T.serial(T.max(self.S - abs(distance), T.int64(0))) as j:
                    to = max(0, -distance) + j
                    for c in self.columns:
                        weight, place = isa.splat(weights[head * kernel + tap]), self.place(to, head, c)
                        x = isa.fma(weight, self.value(to + distance, head, c), self.attended[place])
                        self.attended[place] = x

    def first_weights(self, out: Buffer, *, softmax: bool) -> None:
        """How the first sample of a ray attends, the mean over the heads, into out [S]."""
        similarity, whole = T.alloc(self.S + self.isa.lanes), T.alloc(1, align=4)
        with T.serial(self.S) as j:
            out[j] = T.float32(0.0)
        with T.serial(self.heads) as head:
            with T.serial(self.S) as j:
                similarity[j] = T.float32(0.0)
                with T.serial(self.size) as i:
                    similarity[j] = similarity[j] + self.query(0, head, i) * self.key(j, head, i)
                similarity[j] = similarity[j] * T.float32(self.scale)
            if softmax:
                whole[0] = softmax_of_row(self.isa, similarity, self.S)
            else:
                whole[0] = T.float32(0.0)
                with T.serial(self.S) as j:
                    similarity[j] = similarity[j] + T.float32(0.5)
                    whole[0] = whole[0] + similarity[j]
            with T.serial(self.S) as j:
                out[j] = out[j] + similarity[j] / (whole[0] * T.float32(self.heads))


def _build(
    target: CpuTarget, *, width: int, heads: int, hidden: int, attention: str, kernel: int, return_weights: bool
) -> T.PrimFunc:
    isa = Isa(target)
    layout = layout_of(isa.lanes, width, heads)
    size, wide, deep = width // heads, layout.keys, isa.padded(hidden)
    softmax, low = attention == "softmax", -1.0 if attention == "pm1" else 0.0
    scale = 1.0 / math.sqrt(size) if softmax else 1.0 / (math.pi * size)

    with T.function("ray_block") as function:
        N, F = T.sizes(2)
        x = T.argument("x", (N, width))  # rows are (ray, sample)
        w_projections, b_projections = T.panel("w_projections", width, layout.end), T.panel("b_projections", layout.end)
        w_out, b_out = T.panel("w_out", width, wide), T.panel("b_out", wide)
        w_first, b_first = T.panel("w_first", width * deep), T.panel("b_first", deep)
        w_second, b_second = T.panel("w_second", hidden * wide), T.panel("b_second", wide)
        conv = T.panel("conv", heads * kernel)
        S, eps = T.scalar("S"), T.scalar("eps", "float32")
        out, first_out = T.argument("out", (N, width)), T.argument("first_out", (F, S))

        rays_of_block = T.bind(T.max(T.int64(_ROWS) // S, T.int64(1)))
        rows_of_block = T.bind(rays_of_block * S)
        with T.parallel((N + rows_of_block - 1) // rows_of_block) as block:
            begin = T.bind(block * rows_of_block)
            rows = T.bind(T.min(rows_of_block, N - begin))
            normed, residual = (T.alloc(rows_of_block + ROW_PADDING, wide) for _ in range(2))
            projected = T.alloc(rows_of_block + ROW_PADDING, layout.end)
            attended = T.alloc(rows_of_block + ROW_PADDING, heads * layout.head)

            def project(r: Index, c: int, sums: Expr) -> None:
                if not softmax and c < layout.values:
                    sums = T.select(sums >= isa.splat(0.0), isa.splat(1.0), isa.splat(low))
                projected[r, isa.at(c)] = sums

            layer_norm(isa, rows, width, lambda r, c: x[begin + r, c], normed, eps)
            product(isa, rows, layout.end, b_projections, [(width, normed, w_projections)], project)
            with T.serial(rows // S) as ray:
                of_head = Isa(target, layout.lanes)
                one = _Ray(isa, of_head, layout, heads, size, scale, projected, attended, ray * S, S)
                one.attend_softmax() if softmax else one.attend_linear()
                one.convolve(conv, kernel)
                if return_weights:
                    one.first_weights(first_out.part(block * rays_of_block + ray), softmax=softmax)
            product(isa, rows, wide, b_out, [_head(attended, w_out, layout, size, n) for n in range(heads)], residual)
            with T.serial(rows) as r, T.serial(width) as c:
                residual[r, c] = residual[r, c] + x[begin + r, c]
            if hidden:
                activation = T.alloc(rows_of_block + ROW_PADDING, deep)
                layer_norm(isa, rows, width, lambda r, c: residual[r, c], normed, eps)
                term = (width, normed, lambda k, c: w_first[isa.at(k * deep + c)])
                product(isa, rows, deep, b_first, [term], activation, isa.relu)
                term = (hidden, activation, lambda k, c: w_second[isa.at(k * wide + c)])
                product(isa, rows, wide, lambda r, c: residual[r, isa.at(c)] + b_second[isa.at(c)], [term], residual)
            with T.serial(rows) as r:
                copy_row(isa, residual.part(r), out.part(begin + r), width)
    return function.get()


def _head(attended: Buffer, weight: Buffer, layout: Layout, size: int, head: int) -> Term:
    """A head's part of the output layer."""
    return size, lambda r, k: attended[r, head * layout.head + k], weight.below(head * size)


def run(
    function: Compiled, x: Tensor, panels: Sequence[Tensor], eps: float, return_weights: bool
) -> tuple[Tensor, Tensor]:
    rays, samples, width = x.shape
    out = memory.empty(rays * samples, width, dtype=torch.float32)
    first = torch.empty(rays if return_weights else 0, samples)
    function(x.float().reshape(-1, width).contiguous(), *panels, samples, eps, out, first)
    first = first if return_weights else x.new_empty(0)
    return out.view(x.shape).to(x.dtype), first.to(x.dtype)


def _trial(
    function: Compiled, *, width: int, heads: int, hidden: int, attention: str, kernel: int, return_weights: bool
) -> None:
    x, weights, biases, conv, _ = random_block(
        0, rays=13, samples=9, width=width, heads=heads, hidden=hidden, kernel=kernel
    )
    packed = panels(weights, biases, conv, heads, current().lanes)
    out, first = run(function, x, packed, 1e-6, return_weights)
    twin, twins_first = ray_block_twin(x, weights, biases, conv, heads, attention, 1e-6, return_weights)
    certain = torch.ones(x.shape[:2], dtype=torch.bool)
    if attention != "softmax":
        certain = samples_of_certain_codes(x, weights, biases, 1e-6)
        assert certain.any(), "rounding decides a code in each of the trial's rays"
    torch.testing.assert_close(out[certain], twin[certain], rtol=1e-3, atol=1e-4)
    if return_weights:
        torch.testing.assert_close(first[certain[:, 0]], twins_first[certain[:, 0]], rtol=1e-3, atol=1e-4)


def _variants(target: CpuTarget) -> list[dict[str, Any]]:
    return [
        {
            "width": width,
            "heads": 4,
            "hidden": hidden,
            "attention": attention,
            "kernel": 0 if attention == "softmax" else 3,
            "return_weights": False,
        }
        for width in (32, 64)
        for attention, hidden in (("softmax", 4 * width), ("pm1", 0))
    ]


KERNEL = Kernel("ray_block", _build, _trial, _variants)
