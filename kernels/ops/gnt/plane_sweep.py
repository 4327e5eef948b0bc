"""The plane sweep as an op."""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.gnt.plane_sweep import KERNEL, run
from shiftadd3d.kernels.ops.define import define_op, packed_function
from shiftadd3d.kernels.ops.gnt.gather import check_scene, is_served
from shiftadd3d.kernels.pack.gnt.plane_sweep import PlaneSweep, channels_compared, check_panels, plane_sweep_of_panels


def _cpu(given: PlaneSweep) -> tuple[Tensor, Tensor, Tensor] | None:
    scene, panels, hidden = given.scene, given.panels, given.hidden
    lanes = check_panels(panels, scene.maps.shape[-1], hidden)
    if not is_served(scene):
        return None
    spec = {"channels": channels_compared(panels), "hidden": hidden, "with_valid": scene.valid is not None}
    function = packed_function(KERNEL, lanes, **spec)
    return None if function is None else run(function, scene, panels)


def _fake(given: PlaneSweep) -> tuple[Tensor, Tensor, Tensor]:
    points, shape = given.points, given.points.shape[:2]
    return points.new_empty(shape[0], 3), points.new_empty(shape), points.new_empty(shape, dtype=torch.bool)


plane_sweep = define_op(
    "plane_sweep",
    PlaneSweep,
    twin=plane_sweep_of_panels,
    check=lambda given: check_scene(given.scene),
    cpu=_cpu,
    fake=_fake,
)
