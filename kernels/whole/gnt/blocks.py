"""A GNT's transformer blocks and position layer, each as one function, with its norms and residuals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.forms.panels import AnyForm
from shiftadd3d.kernels.cpu.gnt import position_layer, ray_block, view_attention, view_tiles
from shiftadd3d.kernels.cpu.gnt.shift_problems import random_shift_attention
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.trials import Draw, check_within
from shiftadd3d.kernels.pack.gnt import position_layer as pack_position_layer
from shiftadd3d.kernels.pack.gnt import ray_block as pack_ray_block
from shiftadd3d.kernels.pack.gnt import view_attention as pack_view_attention
from shiftadd3d.kernels.pack.shift import shift_panel
from shiftadd3d.kernels.reference.gnt.position_layer import position_layer_twin, random_samples
from shiftadd3d.kernels.reference.gnt.view_attention import random_attention, view_attention_twin
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Expr, Index
from shiftadd3d.kernels.whole.gnt.rays import Rays, Shown
from shiftadd3d.kernels.whole.parts import NormWeights, control_argument, rows_of
from shiftadd3d.kernels.whole.program import Program, Value, fixed
from shiftadd3d.kernels.whole.trials import outcome_of

# View attention


class ViewBlockSpec(NamedTuple):
    width: int
    hidden: int
    form: AnyForm
    eps: float  # of the norm
    packed: bool  # whether the embedding is; only with the form bfloat16


def _build_view_attention(target: CpuTarget, spec: ViewBlockSpec) -> T.PrimFunc:
    """The function ``(x, embedding, ray_diff, mask, panels, control, y)``."""
    width, hidden, form, eps, packed = spec
    with T.function("view_block") as function:
        R, S, V = T.sizes(3)
        x = T.argument("x", (R, S, width))
        of_view, dtype = (width // 2, "int32") if packed else (width, "float32")
        embedding = T.argument("embedding", (R, S, V, of_view), dtype)
        ray_diff, mask = T.argument("ray_diff", (R, S, V, 4)), T.argument("mask", (R, S, V), "uint8")
        isa = Isa(target)
        if form == "bfloat16":
            weights = view_tiles.Weights.argument(isa, width, hidden)
        else:
            weights = view_attention.Weights.argument(isa, width, hidden, form)
        control = control_argument()
        y = T.argument("y", (R, S, width))
        x, y, embedding, ray_diff = map(rows_of, (x, y, embedding, ray_diff))
        shown = view_attention.Shown(embedding, ray_diff, mask.flat())
        if isinstance(weights, view_tiles.Weights):
            view_tiles.emit(target, x, shown, weights, V, y, control, eps)
        else:
            view_attention.emit(target, form, x, shown, weights, V, y, control, eps)
    return function.get()


def _try_view_attention(function: Compiled, spec: ViewBlockSpec) -> None:
    width, hidden, form, eps, packed = spec
    draw, sizes = Draw(), {"points": 37, "views": 5, "width": width, "hidden": hidden}
    gain, shift = 1 + 0.1 * draw.normal(width), draw.normal(width)
    shifts: list[Tensor] = []
    if form == "float32":
        x, views, ray_diff, mask, weights, biases = random_attention(0, **sizes)
        normal = F.layer_norm(x, (width,), gain, shift, eps)
        panels = pack_view_attention.panels(weights, biases, current().lanes)
        expected = x + view_attention_twin(normal, views, ray_diff, mask, weights, biases)
        bound = 1e-5 + 1e-4 * expected.abs()
    else:
        problem = random_shift_attention(0, **sizes)
        x, views, ray_diff, mask = problem.inputs
        normal = F.layer_norm(x, (width,), gain, shift, eps)
        panels, shifts = problem.panels, [shift_panel(layer, form) for layer in problem.shifts.values()]
        attended = problem._replace(inputs=(normal, views, ray_diff, mask)).rounded(form)
        expected, bound = x + attended, view_attention.error_bound(form, width) * 4 * attended.abs().amax() + 1e-4
    tensors = _tensors(panels, shifts, form, (gain, shift))
    if packed:
        views = views.bfloat16().view(torch.int32)
    inputs = [tensor[None] for tensor in (x, views, ray_diff, mask.view(torch.uint8))]
    y = outcome_of(function, [*inputs, *tensors], 1, *x.shape)
    check_within(y[0], expected, bound)


VIEW_ATTENTION = fixed("view_block", _build_view_attention, _try_view_attention)


def _tensors(
    panels: pack_view_attention.Panels, shifts: Sequence[Tensor], form: AnyForm, norm: tuple[Tensor, Tensor]
) -> Sequence[Tensor]:
    """The weights as the function reads them. The norm's weight and bias are folded in."""
    if form == "bfloat16":
        return pack_view_attention.tile_panels(panels, shifts[-1], *norm, current().lanes)
    query, query_bias = pack_view_attention.behind_norm(panels.query, panels.query_bias, *norm)
    return [*panels._replace(query=query, query_bias=query_bias), *shifts]


def view_block(
    program: Program,
    x: Value,
    shown: Shown,
    embedding: Value,
    panels: pack_view_attention.Panels,
    shifts: Sequence[Tensor],
    form: AnyForm,
    norm: NormWeights,
) -> Value:
    """``x + view attention of norm(x)`` [R, S, C].

    Args:
        shown: of which the ray differences and the mask are read.
        embedding: [R, S, V, C]; or packed, with the form bfloat16.
        shifts: the panels of a form other than float32: key, row and out, or row and out.
        norm: the norm of x.
    """
    gain, shift, eps = norm
    tensors = _tensors(panels, shifts, form, (gain, shift))
    arguments = [x, embedding, shown.ray_diff, shown.mask, *map(program.weight, tensors)]
    width, hidden = panels.query.shape[0], panels.score.shape[0]
    asked = ViewBlockSpec(width, hidden, form, eps, packed=shown.pixels is not None)
    return program.call(VIEW_ATTENTION, arguments, x.shape, asked)


# Ray block


class RayBlockSpec(NamedTuple):
    width: int
    heads: int
    hidden: int  # units of the perceptron, or 0
    attention: str
    kernel: int  # taps of the convolution, or 0
    form: AnyForm
    eps: float  # of the norms


def _build_ray_block(target: CpuTarget, spec: RayBlockSpec) -> T.PrimFunc:
    """The function ``(x, panels, control, y)``."""
    sizes = ray_block.Sizes.of(target, spec.width, spec.heads, spec.hidden)
    with T.function("ray_block") as function:
        R, S = T.sizes(2)
        x = T.argument("x", (R, S, spec.width))
        weights = ray_block.Weights.argument(Isa(target), sizes, spec.kernel, spec.form)
        control = control_argument()
        y = rows_of(T.argument("y", (R, S, spec.width)))
        x, eps = rows_of(x), T.float32(spec.eps)
        ray_block.emit(
            target, spec.form, sizes, weights, x, S, y, control, attention=spec.attention, kernel=spec.kernel, eps=eps
        )
    return function.get()


def _try_ray_block(function: Compiled, spec: RayBlockSpec) -> None:
    def run(x: Tensor, panels: Sequence[Tensor], eps: float, return_weights: bool) -> tuple[Tensor, Tensor] | None:
        control, y = torch.tensor([0, 2], dtype=torch.int32), torch.empty_like(x)
        function(x, *panels, control, y)
        return None if control[0] else (y, y.new_empty(0))

    sizes = {"width": spec.width, "hidden": spec.hidden, "kernel": spec.kernel}
    ray_block.compare_with_reference(run, spec.form, spec.attention, spec.heads, spec.eps, False, **sizes)


RAY_BLOCK = fixed("ray_block", _build_ray_block, _try_ray_block)


def rays_block(
    program: Program,
    x: Value,
    panels: pack_ray_block.Panels,
    shifts: Sequence[Tensor],
    form: AnyForm,
    *,
    heads: int,
    attention: str,
    eps: float,
) -> Value:
    """A transformer block along rays [R, S, C]. It has a perceptron if the panels have one.

    Args:
        shifts: for a form other than float32, the weights of norms and the panels of integers.
    """
    hidden, kernel = pack_ray_block.hidden_and_kernel(panels, heads)
    width = x.shape[-1]
    assert isinstance(width, int)
    asked = RayBlockSpec(width, heads, hidden, attention, kernel, form, eps)
    return program.call(RAY_BLOCK, [x, *map(program.weight, (*panels, *shifts))], x.shape, asked)


# Position layer


class PositionSpec(NamedTuple):
    width: int
    hidden: int
    outputs: int
    canonical: bool  # whether positions are relative to the ray's origin


def _build_position(target: CpuTarget, spec: PositionSpec) -> T.PrimFunc:
    """The function ``(x, origins, directions, depths, panels, control, y)``."""
    width, hidden, outputs, canonical = spec
    with T.function("position") as function:
        R, S = T.sizes(2)
        x = T.argument("x", (R, S, width))
        origins, directions = T.argument("origins", (R, 3)), T.argument("directions", (R, 3))
        depths = T.argument("depths", (R, S))
        weights = position_layer.Weights.argument(Isa(target), width, hidden, outputs)
        control_argument()
        y = rows_of(T.argument("y", (R, S, outputs)))
        x = rows_of(x)

        def point(row: Index, axis: int) -> Expr:
            ray, sample = T.truncdiv(row, S), T.truncmod(row, S)
            along = depths[ray, sample] * directions[ray, axis]
            return along if canonical else origins[ray, axis] + along

        def direction(ray: Index, axis: int) -> Expr:
            length = T.sqrt(T.total([directions[ray, i] * directions[ray, i] for i in range(3)]))
            return directions[ray, axis] / T.max(length, T.float32(1e-12))

        position_layer.emit(target, x, point, direction, weights, R, S, y)
    return function.get()


def _try_position(function: Compiled, spec: PositionSpec) -> None:
    width, hidden, outputs, canonical = spec
    sizes = {"rays": 7, "samples": 9, "width": width, "hidden": hidden, "outputs": outputs}
    x, points, directions, weights, biases = random_samples(0, **sizes)
    origins, directions, depths = points[:, 0], 1.5 * directions, points[..., 0].abs() + 0.1
    points = depths[..., None] * directions[:, None]
    points = points if canonical else origins[:, None] + points
    packed = pack_position_layer.panels(weights, biases, current().lanes)
    y = outcome_of(function, [x, origins.contiguous(), directions, depths, *packed], 7, 9, outputs)
    expected = position_layer_twin(x, points, F.normalize(directions, dim=-1), weights, biases)
    # The fastest wave of the embedding multiplies the rounding of a coordinate by 512.
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=2e-3)


POSITION = fixed("position", _build_position, _try_position)


def position(program: Program, x: Value, rays: Rays, panels: pack_position_layer.Panels, *, canonical: bool) -> Value:
    """The position layer of samples [R, S, C]. If `canonical`, positions are relative to the ray's origin."""
    arguments = [x, rays.origins, rays.directions, rays.depths, *map(program.weight, panels)]
    outputs = x.shape[-1]
    assert isinstance(outputs, int)
    asked = PositionSpec(panels.x.shape[0], panels.second.shape[0], outputs, canonical)
    return program.call(POSITION, arguments, x.shape, asked)
