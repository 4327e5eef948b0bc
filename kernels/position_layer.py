"""Telling samples where they are: a perceptron over features and the sine-cosine embedding of position and direction.

``out = W_2 relu(W_1 [x, embedding(point), embedding(direction)] + b_1) + b_2``. The embedding, 63 floats a point, lives
for as long as a block of points is worked on; a ray's direction makes one bias for all of its samples.

Inference only: no gradients flow through the op; training uses the layers.

Source: Mildenhall et al., "NeRF" (ECCV 2020), eq. 4; Varma T. et al., "Is Attention All That NeRF Needs?" (ICLR 2023),
section 3.3.
"""

# TVMScript's annotations are calls:
# pyright: reportInvalidTypeForm=false

# ruff: noqa: B023 (a TIR function is gone through once, while it is parsed)
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels import memory
from shiftadd3d.kernels.kernel import Kernel, define_op
from shiftadd3d.kernels.targets import CpuTarget, current
from shiftadd3d.kernels.vector import ACCUMULATORS, ROW_PADDING, Vectors

#: Octaves of the sine-cosine embedding of positions and directions, and its width: the value itself, sines, cosines.
NUM_FREQUENCIES = 10
EMBEDDING_DIM = 3 + 3 * 2 * NUM_FREQUENCIES

# Samples at once: a multiple of every vector width and of every tile of the products.
_ROWS = 48
_BLOCKS_A_TASK = 16

# --------------------------------------------------------------------------------------------------------------------
# Twin
# --------------------------------------------------------------------------------------------------------------------


def sinusoidal_embedding(x: Tensor) -> Tensor:
    """[..., 3] to [..., 63]: x, sin x, cos x, sin 2x, cos 2x, ... up to 2^9 x (NeRF, eq. 4, without pi)."""
    octaves = [x * 2.0**i for i in range(NUM_FREQUENCIES)]
    return torch.cat([x, *(f(octave) for octave in octaves for f in (torch.sin, torch.cos))], dim=-1)


def position_layer_twin(
    x: Tensor,  # [R, S, C]
    points: Tensor,  # [R, S, 3] world
    directions: Tensor,  # [R, 3], unit vectors
    weights: list[Tensor],  # [D, C + 126], [E, D]
    biases: list[Tensor],  # [D], [E]
) -> Tensor:  # [R, S, E]
    """What `position_layer` computes, in plain torch."""
    along = sinusoidal_embedding(directions)[:, None].expand(-1, x.shape[1], -1)
    embedded = torch.cat([x, sinusoidal_embedding(points), along], dim=-1)
    return F.linear(F.relu(F.linear(embedded, weights[0], biases[0])), weights[1], biases[1])


# --------------------------------------------------------------------------------------------------------------------
# TIR
# --------------------------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------------------------
# Trial and op
# --------------------------------------------------------------------------------------------------------------------


def _run(
    function: Any, x: Tensor, points: Tensor, directions: Tensor, weights: list[Tensor], biases: list[Tensor]
) -> Tensor:
    width, lanes = x.shape[-1], current().lanes

    def across(panel: Tensor) -> Tensor:
        return F.pad(panel, (0, -panel.shape[-1] % lanes)).contiguous()

    of_x, of_point, of_direction = weights[0].detach().split([width, EMBEDDING_DIM, EMBEDDING_DIM], dim=1)
    out = memory.empty(*x.shape[:2], weights[1].shape[0], dtype=torch.float32)
    function(
        x.reshape(-1, width).contiguous(),
        points.reshape(-1, 3).contiguous(),
        across(F.linear(sinusoidal_embedding(directions), of_direction, biases[0].detach())),
        across(of_x.mT),
        across(of_point.mT),
        across(weights[1].detach().mT),
        across(biases[1].detach()),
        x.shape[1],
        out.view(-1, out.shape[-1]),
    )
    return out


def random_samples(
    seed: int, *, rays: int, samples: int, width: int, hidden: int, outputs: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Arguments of `position_layer` for a trial."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = width + 2 * EMBEDDING_DIM
    weights = [draw(hidden, inputs) / inputs**0.5, draw(outputs, hidden) / hidden**0.5]
    directions = F.normalize(draw(rays, 3), dim=-1)
    return draw(rays, samples, width), 3.0 * draw(rays, samples, 3), directions, weights, [draw(hidden), draw(outputs)]


def _trial(function: Any, **spec: Any) -> None:
    arguments = random_samples(0, rays=7, samples=9, **spec)
    torch.testing.assert_close(_run(function, *arguments), position_layer_twin(*arguments), rtol=1e-4, atol=1e-4)


def _variants(target: CpuTarget) -> list[dict[str, Any]]:
    if not target.has_fma:
        return []
    return [{"width": width, "hidden": width, "outputs": width} for width in (32, 64)]


KERNEL = Kernel("position_layer", _build, _trial, _variants)


def _check(x: Tensor, points: Tensor, directions: Tensor, weights: list[Tensor], biases: list[Tensor]) -> None:
    if x.dim() != 3 or points.shape != (*x.shape[:2], 3) or directions.shape != (x.shape[0], 3):
        raise UserError(
            "x, points and directions must be [R, S, C], [R, S, 3] and [R, 3], not "
            f"{list(x.shape)}, {list(points.shape)} and {list(directions.shape)}"
        )
    if len(weights) != 2 or len(biases) != 2:
        raise UserError("position_layer takes weights and biases of two layers")
    hidden = weights[0].shape[0]
    sizes = ((hidden, x.shape[-1] + 2 * EMBEDDING_DIM), (weights[1].shape[0], hidden))
    for number, (weight, bias, size) in enumerate(zip(weights, biases, sizes, strict=True), 1):
        if weight.shape != size or bias.shape != size[:1]:
            raise UserError(
                f"weight and bias of layer {number} must be {list(size)} and [{size[0]}], not {list(weight.shape)} and "
                f"{list(bias.shape)}"
            )


def _cpu(x: Tensor, points: Tensor, directions: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    _check(x, points, directions, weights, biases)
    function = None
    # Without fused multiply-adds the sines of large numbers would be off.
    if x.numel() and x.dtype == points.dtype == torch.float32 and current().has_fma:
        function = KERNEL.function(width=x.shape[-1], hidden=weights[0].shape[0], outputs=weights[1].shape[0])
    if function is None:
        return position_layer_twin(x, points, directions, weights, biases)
    return _run(function, x, points, directions, weights, biases)


def _fake(x: Tensor, points: Tensor, directions: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return x.new_empty(*x.shape[:2], weights[1].shape[0])


#: ``torch.ops.shiftadd3d.position_layer``; arguments and outcome as those of its twin. float32; coordinates up to 2000,
#: beyond which sines of their 512-fold lose more digits than torch's.
position_layer = define_op(
    "position_layer(Tensor x, Tensor points, Tensor directions, Tensor[] weights, Tensor[] biases) -> Tensor",
    cpu=_cpu,
    twin=position_layer_twin,
    fake=_fake,
)
