"""The blend of the views' colours as an op. Inference only; training uses `shiftadd3d.models.gnt`'s layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.gnt.color_blend import KERNEL, run
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.reference.gnt.color_blend import MAX_VIEWS, check, color_blend_twin


def _cpu(
    x: Tensor,
    values: Tensor,
    ray_diff: Tensor,
    mask: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    angle_scale: Tensor,
    agreement_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    check(x, values, ray_diff, mask, weights, biases)
    arguments = (x, values, ray_diff, mask, weights, biases, angle_scale, agreement_scale)
    function = None
    if values.numel() and x.dtype == values.dtype == torch.float32 and values.shape[2] <= MAX_VIEWS:
        function = KERNEL.function(width=x.shape[-1], inputs=values.shape[-1], hidden=weights[0].shape[0])
    return color_blend_twin(*arguments) if function is None else run(function, *arguments)


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], 3), x.new_empty(x.shape[:2])


#: ``torch.ops.shiftadd3d.color_blend``; arguments and outcome as those of its twin. float32; 1 to 32 views, more go
#: through the twin.
color_blend = define_op(
    "color_blend(Tensor x, Tensor values, Tensor ray_diff, Tensor mask, Tensor[] weights, Tensor[] biases, "
    "Tensor angle_scale, Tensor agreement_scale) -> (Tensor, Tensor)",
    cpu=_cpu,
    twin=color_blend_twin,
    fake=_fake,
)
