"""The blend of the views' colours as an op."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.cpu.gnt.color_blend import KERNEL, run
from shiftadd3d.kernels.ops.define import define_op, packed_function
from shiftadd3d.kernels.pack.gnt.color_blend import ColorBlend, color_blend_of_panels, sizes
from shiftadd3d.kernels.pack.panel import lanes_of
from shiftadd3d.kernels.reference.gnt.color_blend import MAX_VIEWS


def _check(given: ColorBlend) -> None:
    x, values, ray_diff, mask, _, _ = given
    if values.dim() != 4 or values.shape[-1] < 4:
        raise UserError(f"values must be [R, S, V, 3 + C] with C at least 1, not {list(values.shape)}")
    shape = values.shape[:3]
    if x.shape[:-1] != shape[:2] or ray_diff.shape != (*shape, 4) or mask.shape != shape or mask.dtype != torch.bool:
        raise UserError(
            f"beside values {list(values.shape)}, x must be [R, S, C], ray_diff [R, S, V, 4] and mask bool [R, S, V], "
            f"not {list(x.shape)}, {list(ray_diff.shape)} and {mask.dtype} {list(mask.shape)}"
        )


def _cpu(given: ColorBlend) -> tuple[Tensor, Tensor] | None:
    x, values, ray_diff, mask, panels, hidden = given
    width, inputs = x.shape[-1], values.shape[-1]
    lanes = lanes_of("color_blend", panels, partial(sizes, width=width, inputs=inputs, hidden=hidden))
    if not values.numel() or not x.dtype == values.dtype == torch.float32 or values.shape[2] > MAX_VIEWS:
        return None
    function = packed_function(KERNEL, lanes, width=width, inputs=inputs, hidden=hidden)
    return None if function is None else run(function, x, values, ray_diff, mask, panels)


color_blend = define_op(
    "color_blend",
    ColorBlend,
    twin=color_blend_of_panels,
    check=_check,
    cpu=_cpu,
    fake=lambda given: (given.x.new_empty(given.x.shape[0], 3), given.x.new_empty(given.x.shape[:2])),
)
