"""A GNT's last steps: norm, the colour that the network regresses, and the blend of the views' colours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import layer_norm
from shiftadd3d.kernels.cpu.gnt import color_blend
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, Scalars
from shiftadd3d.kernels.pack.gnt import color_blend as pack_color_blend
from shiftadd3d.kernels.pack.gnt.gather import beside_validity
from shiftadd3d.kernels.pack.panel import padded
from shiftadd3d.kernels.reference.gnt.color_blend import Scales, color_blend_twin, random_blend
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr
from shiftadd3d.kernels.whole.gnt.rays import Shown
from shiftadd3d.kernels.whole.parts import control_argument, rows_of
from shiftadd3d.kernels.whole.program import Function, Program, Value


def _build(target: CpuTarget, width: int, inputs: int, hidden: int, eps: float) -> T.PrimFunc:
    """The function ``(x, values, ray_diff, mask, panels, regressing weight and bias, control, rgb, shares, seen)``."""
    isa = Isa(target)
    with T.function("colors") as function:
        R, S, V = T.sizes(3)
        x, values = T.argument("x", (R, S, width)), T.argument("values", (R, S, V, inputs))
        ray_diff, mask = T.argument("ray_diff", (R, S, V, 4)), T.argument("mask", (R, S, V), "uint8")
        weights = color_blend.Weights.argument(isa, width, inputs, hidden)
        regressing = T.panel("regressing", 3, isa.padded(width)), T.argument("regressing_bias", (3,))
        control_argument()
        rgb, shares = T.argument("rgb", (R, 3)), T.argument("shares", (R, S))
        seen = T.argument("seen", (R, S), "uint8")
        shown = rows_of(values), rows_of(ray_diff), mask.flat()
        regression = _Regression(isa, x, regressing, rgb, eps)
        emit = color_blend.emit
        emit(target, regression.features, shown, weights, V, rgb, shares, seen=seen, behind=regression.add)
    return function.get()


class _Regression:
    """Normalised features of a ray, and the colour that is regressed from their mean."""

    def __init__(self, isa: Isa, x: Buffer, regressing: tuple[Buffer, Buffer], rgb: Buffer, eps: float) -> None:
        self._isa, self._x, self._rgb, self._eps = isa, x, rgb, eps
        self._weight, self._bias = regressing
        self._sum: Buffer | None = None

    def features(self, ray: Expr) -> Scalars:
        isa, (_, S, width), wide = self._isa, self._x.shape, self._weight.extent(1)
        assert isinstance(width, int)
        normed, self._sum = T.alloc(S + ROW_PADDING, wide), T.alloc(wide)
        layer_norm(isa, S, width, lambda s, c: self._x[ray, s, c], normed, T.float32(self._eps))
        for c in range(0, wide, isa.lanes):
            self._sum[isa.at(c)] = isa.splat(0.0)
        with T.serial(S) as s:
            for c in range(0, wide, isa.lanes):
                self._sum[isa.at(c)] = self._sum[isa.at(c)] + normed[s, isa.at(c)]
        return lambda s, k: normed[s, k]

    def add(self, ray: Expr) -> None:
        """Add the colour."""
        isa, S = self._isa, T.cast(self._x.shape[1] + T.int64(0), "float32")
        assert self._sum is not None
        for channel in range(3):
            total = isa.splat(0.0)
            for c in range(0, self._weight.extent(1), isa.lanes):
                total = isa.fma(self._sum[isa.at(c)], self._weight[channel, isa.at(c)], total)
            self._rgb[ray, channel] = self._rgb[ray, channel] + (isa.total(total) / S + self._bias[channel])


def _try(function: Compiled, width: int, inputs: int, hidden: int, eps: float) -> None:
    sizes = {"rays": 5, "samples": 19, "views": 5, "width": width, "inputs": inputs - 1, "hidden": hidden}
    x, values, ray_diff, mask, weights, biases, scales = random_blend(0, **sizes)
    generator = torch.Generator().manual_seed(0)
    gain, shift, regress, bias = (
        torch.randn(*size, generator=generator) for size in ((width,), (width,), (3, width), (3,))
    )
    normal = F.layer_norm(x, (width,), gain, shift, eps)
    rgb, shares = color_blend_twin(normal, values, ray_diff, mask, weights, biases, scales)
    expected = rgb + F.linear(normal.mean(1), regress, bias), shares, mask.any(-1)
    beside = torch.cat([values[..., :3], mask[..., None].float(), values[..., 3:]], dim=-1)
    panels = blend_panels(weights, biases, scales, current().lanes)
    tensors = behind_norm(panels, regress, bias, gain, shift)
    control, outcome = torch.tensor([0, 2], dtype=torch.int32), [torch.empty(5, 3), torch.empty(5, 19)]
    seen = torch.empty(5, 19, dtype=torch.bool)
    function(x, beside, ray_diff, mask.view(torch.uint8), *tensors, control, *outcome, seen.view(torch.uint8))
    for out, one in zip((*outcome, seen), expected, strict=True):
        torch.testing.assert_close(out, one, rtol=1e-4, atol=2e-5)


COLORS = Function("colors", _build, _try)


def blend_panels(weights: list[Tensor], biases: list[Tensor], scales: Scales, lanes: int) -> pack_color_blend.Panels:
    """`pack.gnt.color_blend.panels`, for values that have validity behind the colour."""
    point, view, *logits = weights
    view = beside_validity(view, (0, (view.shape[1] - 4) // 2 + 4))
    return pack_color_blend.panels([point, view, *logits], biases, scales, lanes)


def behind_norm(
    panels: pack_color_blend.Panels, regress: Tensor, bias: Tensor, gain: Tensor, shift: Tensor
) -> list[Tensor]:
    """What the function reads: panels, and the weight [3, C] and bias [3] that regress, with the norm's taken in."""
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
        tensors: of `behind_norm`.
    """
    rays, samples, width = x.shape
    outcomes = [((rays, 3), "float32"), ((rays, samples), "float32"), ((rays, samples), "uint8")]
    spec = {"width": width, "inputs": shown.values.shape[-1], "hidden": hidden, "eps": eps}
    return program.call_for(COLORS, [x, *shown, *map(program.weight, tensors)], outcomes, **spec)
