"""The blend of the views' colours as an op. Inference only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.gnt.color_blend import KERNEL, run
from shiftadd3d.kernels.ops.define import define_op, packed_function
from shiftadd3d.kernels.pack.gnt.color_blend import check_panels, color_blend_of_panels
from shiftadd3d.kernels.reference.gnt.color_blend import MAX_VIEWS, check


def _cpu(
    x: Tensor, values: Tensor, ray_diff: Tensor, mask: Tensor, panels: list[Tensor], hidden: int
) -> tuple[Tensor, Tensor]:
    check(x, values, ray_diff, mask)
    width, inputs = x.shape[-1], values.shape[-1]
    lanes = check_panels(panels, width, inputs, hidden)
    function = None
    if values.numel() and x.dtype == values.dtype == torch.float32 and values.shape[2] <= MAX_VIEWS:
        function = packed_function(KERNEL, lanes, width=width, inputs=inputs, hidden=hidden)
    if function is None:
        return color_blend_of_panels(x, values, ray_diff, mask, panels, hidden)
    return run(function, x, values, ray_diff, mask, panels)


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], 3), x.new_empty(x.shape[:2])


#: ``torch.ops.shiftadd3d.color_blend``; arguments and outcome as those of its twin, but for the weights, which are the
#: panels of `shiftadd3d.kernels.pack.gnt.color_blend`. float32; 1 to 32 views, more go through plain torch.
color_blend = define_op(
    "color_blend(Tensor x, Tensor values, Tensor ray_diff, Tensor mask, Tensor[] panels, int hidden) "
    "-> (Tensor, Tensor)",
    cpu=_cpu,
    twin=color_blend_of_panels,
    fake=_fake,
)
