"""The plane sweep as an op. Inference only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.gnt.plane_sweep import KERNEL, run
from shiftadd3d.kernels.ops.define import define_op, packed_function
from shiftadd3d.kernels.ops.gnt import gather as ops_gather
from shiftadd3d.kernels.pack.gnt.plane_sweep import channels_compared, check_panels, plane_sweep_of_panels
from shiftadd3d.kernels.reference.gnt import gather as reference_gather


def _cpu(
    points: Tensor,
    origins: Tensor,
    projection: Tensor,
    centers: Tensor,
    images: Tensor,
    maps: Tensor,
    valid: Tensor | None,
    panels: list[Tensor],
    hidden: int,
) -> tuple[Tensor, Tensor, Tensor]:
    scene = (points, origins, projection, centers, images, maps)
    reference_gather.check_scene(*scene, valid)
    lanes = check_panels(panels, maps.shape[-1], hidden)
    function = None
    if ops_gather.is_served(*scene):
        spec = {"channels": channels_compared(panels), "hidden": hidden, "with_valid": valid is not None}
        function = packed_function(KERNEL, lanes, **spec)
    if function is None:
        return plane_sweep_of_panels(*scene, valid, panels, hidden)
    return run(function, scene, valid, panels)


def _fake(points: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rays, samples = points.shape[:2]
    return (
        points.new_empty(rays, 3),
        points.new_empty(rays, samples),
        points.new_empty(rays, samples, dtype=torch.bool),
    )


#: ``torch.ops.shiftadd3d.plane_sweep``; arguments and outcome as those of its twin, but for the network, which is the
#: panels of `shiftadd3d.kernels.pack.gnt.plane_sweep`. float32, any number of views.
plane_sweep = define_op(
    "plane_sweep(Tensor points, Tensor origins, Tensor projection, Tensor centers, Tensor images, Tensor maps, "
    "Tensor? valid, Tensor[] panels, int hidden) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    twin=plane_sweep_of_panels,
    fake=_fake,
)
