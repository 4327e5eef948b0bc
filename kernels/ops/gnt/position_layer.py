"""The position layer as an op. Inference only."""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.gnt.position_layer import KERNEL, run
from shiftadd3d.kernels.ops.define import define_op, packed_function
from shiftadd3d.kernels.pack.gnt.position_layer import Panels, check_panels, position_layer_of_panels
from shiftadd3d.kernels.reference.gnt.position_layer import check
from shiftadd3d.kernels.runtime.targets import current


def _cpu(x: Tensor, points: Tensor, directions: Tensor, panels: list[Tensor], outputs: int) -> Tensor:
    check(x, points, directions)
    width = x.shape[-1]
    lanes = check_panels(panels, width, outputs)
    packed, function = Panels(*panels), None
    # Without fused multiply-adds the sines of large numbers would be off.
    if x.numel() and x.dtype == points.dtype == torch.float32 and current().has_fma:
        function = packed_function(KERNEL, lanes, width=width, hidden=packed.second.shape[0], outputs=outputs)
    if function is None:
        return position_layer_of_panels(x, points, directions, panels, outputs)
    return run(function, x, points, directions, packed, outputs)


def _fake(x: Tensor, points: Tensor, directions: Tensor, panels: list[Tensor], outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:2], outputs)


#: ``torch.ops.shiftadd3d.position_layer``; arguments and outcome as those of its twin, but for the weights, which are
#: the panels of `shiftadd3d.kernels.pack.gnt.position_layer`. float32; coordinates up to 2000, beyond which sines of
#: their 512-fold lose more digits than torch's.
position_layer = define_op(
    "position_layer(Tensor x, Tensor points, Tensor directions, Tensor[] panels, int outputs) -> Tensor",
    cpu=_cpu,
    twin=position_layer_of_panels,
    fake=_fake,
)
