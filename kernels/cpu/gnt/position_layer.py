"""The position layer on CPUs.

The embedding, 63 floats a point, lives for as long as a block of points is worked on; a ray's direction makes one bias
for all of its samples.
"""

# TVMScript's annotations are calls:
# pyright: reportInvalidTypeForm=false

# ruff: noqa: B023 (a TIR function is gone through once, while it is parsed)

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.vectors import ACCUMULATORS, ROW_PADDING, Vectors
from shiftadd3d.kernels.pack.gnt.position_layer import Panels, panels
from shiftadd3d.kernels.reference.gnt.position_layer import (
    EMBEDDING_DIM,
    NUM_FREQUENCIES,
    position_layer_twin,
    random_samples,
    sinusoidal_embedding,
)
from shiftadd3d.kernels.runtime import memory
from shiftadd3d.kernels.runtime.kernel import Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget, current

# Samples at once: a multiple of every vector width and of every tile of the products.
_ROWS = 48
_BLOCKS_A_TASK = 16


def _build(target: CpuTarget, *, width: int, hidden: int, outputs: int) -> Any:
    from tvm.script import tirx as T

    vec = Vectors(target)
    lanes, at = vec.lanes, vec.at
    deep, wide = vec.padded(hidden), vec.padded(outputs)

    def embed(embedded: Any, start: Any) -> None:
        """The embedding of a vector of points, whose coordinates are there already: rows of it are its components."""
        for octave in range(NUM_FREQUENCIES):
            for axis in range(3):
                x = embedded[axis, at(start)] * vec.splat(2.0**octave)
                for number, value in enumerate(vec.sine_and_cosine(x)):
                    T.buffer_store(embedded, value, [3 + 6 * octave + 3 * number + axis, at(start)])

    @T.prim_func(s_tir=True)
    def position_layer(
        x_handle: T.handle,
        points_handle: T.handle,
        along_handle: T.handle,
        w_x: T.Buffer((width, deep), "float32"),
        w_point: T.Buffer((EMBEDDING_DIM, deep), "float32"),
        w_second: T.Buffer((hidden, wide), "float32"),
        b_second: T.Buffer((wide,), "float32"),
        S: T.int64,
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        N = T.int64()
        R = T.int64()
        x = T.match_buffer(x_handle, (N, width), "float32", align=4)  # rows are (ray, sample)
        points = T.match_buffer(points_handle, (N, 3), "float32", align=4)
        along = T.match_buffer(
            along_handle, (R, deep), "float32", align=4
        )  # what the direction adds, the bias included
        out = T.match_buffer(out_handle, (N, outputs), "float32", align=4)
        blocks: T.let[T.int64] = (N + _ROWS - 1) // _ROWS
        for task in T.parallel((blocks + _BLOCKS_A_TASK - 1) // _BLOCKS_A_TASK):
            embedded = T.alloc_buffer((EMBEDDING_DIM, _ROWS + ROW_PADDING), "float32", align=64)
            activation = T.alloc_buffer((_ROWS + ROW_PADDING, deep), "float32", align=64)
            outcome = T.alloc_buffer((_ROWS + ROW_PADDING, wide), "float32", align=64)
            accumulators = T.alloc_buffer((ACCUMULATORS * lanes,), "float32", align=64)
            for block in T.serial(T.min(T.int64(_BLOCKS_A_TASK), blocks - task * _BLOCKS_A_TASK)):
                first: T.let[T.int64] = (task * _BLOCKS_A_TASK + block) * _ROWS
                rows: T.let[T.int64] = T.min(T.int64(_ROWS), N - first)
                for r in T.serial(_ROWS):
                    for axis in T.unroll(3):
                        embedded[axis, r] = points[T.min(first + r, N - 1), axis]
                for start in T.serial((rows + lanes - 1) // lanes):
                    embed(embedded, start * lanes)
                vec.product(
                    rows,
                    deep,
                    lambda r, c: along[T.min(first + r, N - 1) // S, at(c)],
                    [
                        (width, lambda r, k: x[T.min(first + r, N - 1), k], lambda k, c: w_x[k, at(c)]),
                        (EMBEDDING_DIM, lambda r, k: embedded[k, r], lambda k, c: w_point[k, at(c)]),
                    ],
                    lambda r, c, sums: T.buffer_store(activation, vec.relu(sums), [r, at(c)]),
                    accumulators,
                )
                vec.product(
                    rows,
                    wide,
                    lambda r, c: b_second[at(c)],
                    [(hidden, lambda r, k: activation[r, k], lambda k, c: w_second[k, at(c)])],
                    lambda r, c, sums: T.buffer_store(outcome, sums, [r, at(c)]),
                    accumulators,
                )
                for r in T.serial(rows):
                    for c in T.serial(outputs):
                        out[first + r, c] = outcome[r, c]

    return position_layer


def run(function: Any, x: Tensor, points: Tensor, directions: Tensor, panels: Panels, outputs: int) -> Tensor:
    width = x.shape[-1]
    out = memory.empty(*x.shape[:2], outputs, dtype=torch.float32)
    function(
        x.reshape(-1, width).contiguous(),
        points.reshape(-1, 3).contiguous(),
        F.linear(sinusoidal_embedding(directions), panels.direction, panels.first_bias),
        panels.x,
        panels.point,
        panels.second,
        panels.second_bias,
        x.shape[1],
        out.view(-1, outputs),
    )
    return out


def _trial(function: Any, **spec: Any) -> None:
    x, points, directions, weights, biases = random_samples(0, rays=7, samples=9, **spec)
    out = run(function, x, points, directions, panels(weights, biases, current().lanes), spec["outputs"])
    twin = position_layer_twin(x, points, directions, weights, biases)
    torch.testing.assert_close(out, twin, rtol=1e-4, atol=1e-4)


def _variants(target: CpuTarget) -> list[dict[str, Any]]:
    if not target.has_fma:
        return []
    return [{"width": width, "hidden": width, "outputs": width} for width in (32, 64)]


KERNEL = Kernel("position_layer", _build, _trial, _variants)
