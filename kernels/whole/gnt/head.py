"""A GNT's last steps: norm, the colour from the original head, and the blend of the views' colours."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import layer_norm
from shiftadd3d.kernels.cpu.forms.panels import error_bound
from shiftadd3d.kernels.cpu.gnt import color_blend, color_tiles
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, Scalars
from shiftadd3d.kernels.cpu.trials import Draw
from shiftadd3d.kernels.pack.gnt import color_blend as pack_color_blend
from shiftadd3d.kernels.pack.gnt.gather import beside_validity
from shiftadd3d.kernels.pack.panel import padded
from shiftadd3d.kernels.pack.shift import GRANULE, WholeWeights
from shiftadd3d.kernels.reference.gnt.color_blend import Scales, color_blend_twin, random_blend
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr
from shiftadd3d.kernels.whole.gnt.rays import Shown
from shiftadd3d.kernels.whole.parts import control_argument, rows_of
from shiftadd3d.kernels.whole.program import Program, Value, fixed


class ColorsSpec(NamedTuple):
    width: int
    inputs: int  # numbers of a view's value
    hidden: int
    eps: float  # of the norm
    tiles: bool  # whether the values of the views are packed


def _build(target: CpuTarget, spec: ColorsSpec) -> T.PrimFunc:
    """The function ``(x, Shown, panels, weight and bias of the original head, control, rgb, shares, seen)``."""
    isa, (width, inputs, hidden, eps, tiles) = Isa(target), spec
    with T.function("colors") as function:
        R, S, V = T.sizes(3)
        x, shape = T.argument("x", (R, S, width)), (R, S, V)
        values = (*shape, (inputs - 4) // 2 if tiles else inputs)
        arguments = [T.argument("values", values, "int32" if tiles else "float32")]
        arguments.append(T.argument("ray_diff", (*shape, 4)))
        mask = T.argument("mask", shape, "uint8")
        if tiles:
            arguments.append(T.argument("pixels", (*shape, 4)))
        weights = color_blend.Weights.argument(isa, width, inputs, hidden, tiles=tiles)
        regressing = T.panel("regressing", 3, isa.padded(width)), T.argument("regressing_bias", (3,))
        control = control_argument()
        rgb, shares = T.argument("rgb", (R, 3)), T.argument("shares", (R, S))
        seen = T.argument("seen", (R, S), "uint8")
        (values, ray_diff, *pixels), mask = map(rows_of, arguments), mask.flat()

        def judge() -> color_blend.Judge:
            if tiles:
                return color_tiles.PackedViews(target, (values, pixels[0], ray_diff, mask), weights, V, control)
            return color_blend.Views(isa, (values, ray_diff, mask), weights, V)

        regression = _Regression(isa, rows_of(x), S, regressing, rgb, eps)
        at_once = isa.lanes * V if tiles else color_blend.ROWS
        color_blend.emit(
            target,
            regression.features,
            judge,
            weights,
            V,
            rgb,
            shares,
            at_once=at_once,
            seen=seen,
            behind=regression.add,
        )
    return function.get()


class _Regression:
    """Emits the norm of a task's samples, and the original head: a colour from the mean feature of a ray.

    Args:
        x: [R * S, C].
        regressing: weight [3, C] and bias [3] of the original head.
        rgb: [R, 3], to which `add` adds.
    """

    def __init__(
        self, isa: Isa, x: Buffer, S: Expr, regressing: tuple[Buffer, Buffer], rgb: Buffer, eps: float
    ) -> None:
        self._isa, self._x, self._S, self._rgb, self._eps = isa, x, S, rgb, eps
        self._weight, self._bias = regressing
        self._normed, self._sum = x, x

    def features(self, ray: Expr, points: Expr) -> Scalars:
        """Normalise `points` samples, from the first one of `ray` on."""
        isa, width, wide = self._isa, self._x.extent(1), self._weight.extent(1)
        normed, top = T.alloc(points + ROW_PADDING, wide), T.bind(ray * self._S)
        self._normed, self._sum = normed, T.alloc(wide)
        layer_norm(isa, points, width, lambda p, c: self._x[top + p, c], normed, T.float32(self._eps))
        return lambda p, k: normed[p, k]

    def add(self, ray: Expr, number: Expr) -> None:
        """Add the colour of a ray. `number` counts the rays of the task."""
        isa, S, wide = self._isa, self._S, self._weight.extent(1)
        for c in range(0, wide, isa.lanes):
            self._sum[isa.at(c)] = isa.splat(0.0)
        with T.serial(S) as s:
            for c in range(0, wide, isa.lanes):
                self._sum[isa.at(c)] = self._sum[isa.at(c)] + self._normed[number * S + s, isa.at(c)]
        share = T.bind(T.float32(1.0) / T.cast(S + T.int64(0), "float32"))
        for channel in range(3):
            total = isa.splat(0.0)
            for c in range(0, wide, isa.lanes):
                total = isa.fma(self._sum[isa.at(c)], self._weight[channel, isa.at(c)], total)
            self._rgb[ray, channel] = self._rgb[ray, channel] + (isa.total(total) * share + self._bias[channel])


def _try(function: Compiled, spec: ColorsSpec) -> None:
    width, inputs, hidden, eps, tiles = spec
    sizes = {"rays": 5, "samples": 19, "views": 5, "width": width, "inputs": inputs - 1, "hidden": hidden}
    x, values, ray_diff, mask, weights, biases, scales = random_blend(0, **sizes)
    generator = torch.Generator().manual_seed(0)
    gain, shift, regress, bias = (
        torch.randn(*size, generator=generator) for size in ((width,), (width,), (3, width), (3,))
    )
    normal = F.layer_norm(x, (width,), gain, shift, eps)
    tile_panel, atol = None, 2e-5
    if tiles:
        whole = Draw().whole(2 * (inputs - 1) + 4, hidden)
        weights[1], tile_panel = whole.integers * whole.unit[:, None], color_tiles_of(whole)
        values = torch.cat([values[..., :3], values[..., 3:].bfloat16().float()], dim=-1)
        # The error of a logit comes from the rounding of its inputs. The relative error of shares is as large.
        most = values.abs().max() * 2 + ray_diff.abs().max()
        atol = float(error_bound("bfloat16") * most * (weights[2].abs() @ weights[1].abs().sum(1)).max()) + 2e-5
        assert tile_panel is not None
    rgb, shares = color_blend_twin(normal, values, ray_diff, mask, weights, biases, scales)
    expected = rgb + F.linear(normal.mean(1), regress, bias), shares, mask.any(-1)
    pixels = torch.cat([values[..., :3], mask[..., None].float()], dim=-1)
    if tiles:
        words = values[..., 3:].bfloat16().contiguous().view(torch.int32)
        shown = words, ray_diff, mask.view(torch.uint8), pixels
    else:
        shown = torch.cat([pixels, values[..., 3:]], dim=-1), ray_diff, mask.view(torch.uint8)
    panels = blend_panels(weights, biases, scales, current().lanes, tile_panel)
    tensors = behind_norm(panels, regress, bias, gain, shift)
    control, outcome = torch.tensor([0, 2], dtype=torch.int32), [torch.empty(5, 3), torch.empty(5, 19)]
    seen = torch.empty(5, 19, dtype=torch.bool)
    function(x, *shown, *tensors, control, *outcome, seen.view(torch.uint8))
    assert control[0] == 0, "it found an activation that it cannot express"
    for out, one in zip((*outcome, seen), expected, strict=True):
        torch.testing.assert_close(out, one, rtol=1e-4, atol=atol)


COLORS = fixed("colors", _build, _try)


def blend_panels(
    weights: list[Tensor], biases: list[Tensor], scales: Scales, lanes: int, tiles: Tensor | None = None
) -> pack_color_blend.Panels:
    """`pack.gnt.color_blend.panels` for values with the validity after the colour.

    Args:
        tiles: for packed values, the panel of `color_tiles_of`.
    """
    point, view, *logits = weights
    view = beside_validity(view, (0, (view.shape[1] - 4) // 2 + 4))
    panels = pack_color_blend.panels([point, view, *logits], biases, scales, lanes)
    return panels if tiles is None else panels._replace(view=tiles)


def color_tiles_of(view: WholeWeights) -> Tensor | None:
    """The panel of the views' layer for matrix tiles; None if its sizes do not fit."""
    inputs = (view.integers.shape[1] - 4) // 2
    return pack_color_blend.tile_panel(view) if (inputs - 3) % GRANULE == 0 else None


def behind_norm(
    panels: pack_color_blend.Panels, regress: Tensor, bias: Tensor, gain: Tensor, shift: Tensor
) -> list[Tensor]:
    """The panels, and the weight and bias of the original head, as the function reads them.

    The norm's weight and bias are folded in.

    Args:
        regress, bias: weight [3, C] and bias [3] of the original head.
        gain, shift: weight and bias [C] of the norm.
    """
    own, own_bias, regress, bias = (x.double() for x in (panels.own, panels.own_bias, regress, bias))
    gain, shift = gain.double(), shift.double()
    bias, regress = bias + regress @ shift, regress * gain
    own_bias, own = own_bias + shift @ own, gain[:, None] * own
    wide = padded(regress.shape[1], current().lanes)
    folded = own, own_bias, F.pad(regress, (0, wide - regress.shape[1])), bias
    own, own_bias, regress, bias = (x.float().contiguous() for x in folded)
    return [*panels._replace(own=own, own_bias=own_bias), regress, bias]


def colors(
    program: Program, x: Value, shown: Shown, tensors: list[Tensor], hidden: int, eps: float
) -> tuple[Value, ...]:
    """Colours [R, 3], shares of samples [R, S], and whether any view sees a sample [R, S], uint8.

    Args:
        tensors: the outcome of `behind_norm`.
        hidden: hidden units of the views' layer.
        eps: epsilon of the norm.
    """
    rays, samples, width = x.shape
    outcomes = [((rays, 3), "float32"), ((rays, samples), "float32"), ((rays, samples), "uint8")]
    tiles, (*_, of_view) = shown.pixels is not None, shown.values.shape
    assert isinstance(of_view, int) and isinstance(width, int)
    asked = ColorsSpec(width, 2 * of_view + 4 if tiles else of_view, hidden, eps, tiles)
    arguments = [x, *shown.tensors, *map(program.weight, tensors)]
    return program.call_for(COLORS, arguments, outcomes, asked)
