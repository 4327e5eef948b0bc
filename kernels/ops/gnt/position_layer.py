"""The position layer as an op. Inference only; training uses the layers."""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.gnt.position_layer import KERNEL, run
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.reference.gnt.position_layer import check, position_layer_twin
from shiftadd3d.kernels.runtime.targets import current


def _cpu(x: Tensor, points: Tensor, directions: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    check(x, points, directions, weights, biases)
    function = None
    # Without fused multiply-adds the sines of large numbers would be off.
    if x.numel() and x.dtype == points.dtype == torch.float32 and current().has_fma:
        function = KERNEL.function(width=x.shape[-1], hidden=weights[0].shape[0], outputs=weights[1].shape[0])
    if function is None:
        return position_layer_twin(x, points, directions, weights, biases)
    return run(function, x, points, directions, weights, biases)


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
