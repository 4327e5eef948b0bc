"""The plane sweep as an op. Inference only; training uses `shiftadd3d.models.gnt`'s layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.cpu.gnt.plane_sweep import KERNEL, run
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.ops.gnt import gather as ops_gather
from shiftadd3d.kernels.reference.gnt import gather as reference_gather
from shiftadd3d.kernels.reference.gnt.plane_sweep import channels_compared, plane_sweep_twin


def _cpu(
    points: Tensor,
    origins: Tensor,
    projection: Tensor,
    centers: Tensor,
    images: Tensor,
    maps: Tensor,
    valid: Tensor | None,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    angle_scale: Tensor,
    agreement_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    scene = (points, origins, projection, centers, images, maps)
    network = (hidden_weight, hidden_bias, score_weight, score_bias, angle_scale, agreement_scale)
    reference_gather.check_scene(*scene, valid)
    hidden, inputs = hidden_weight.shape
    channels = channels_compared(hidden_weight)
    if inputs % 3 or not 0 <= channels <= maps.shape[-1]:
        raise UserError(
            f"hidden_weight must have 3 (3 + F + 1) inputs for F <= {maps.shape[-1]} channels, not {inputs}"
        )
    function = None
    if ops_gather.is_served(*scene, *network):
        function = KERNEL.function(channels=channels, hidden=hidden, with_valid=valid is not None)
    if function is None:
        return plane_sweep_twin(*scene, valid, *network)
    return run(function, scene, valid, *network)


def _fake(points: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rays, samples = points.shape[:2]
    return (
        points.new_empty(rays, 3),
        points.new_empty(rays, samples),
        points.new_empty(rays, samples, dtype=torch.bool),
    )


#: ``torch.ops.shiftadd3d.plane_sweep``; arguments and outcome as those of its twin. float32, any number of views.
plane_sweep = define_op(
    "plane_sweep(Tensor points, Tensor origins, Tensor projection, Tensor centers, Tensor images, Tensor maps, "
    "Tensor? valid, Tensor hidden_weight, Tensor hidden_bias, Tensor score_weight, Tensor score_bias, "
    "Tensor angle_scale, Tensor agreement_scale) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    twin=plane_sweep_twin,
    fake=_fake,
)
