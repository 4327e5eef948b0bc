"""The plane sweep as an op. Inference only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.gnt.plane_sweep import KERNEL, run
from shiftadd3d.kernels.ops.define import define_op, packed_function
from shiftadd3d.kernels.ops.gnt.gather import check_scene, is_served
from shiftadd3d.kernels.pack.gnt.plane_sweep import channels_compared, check_panels, plane_sweep_of_panels
from shiftadd3d.kernels.reference.gnt.gather import Scene


class PlaneSweep(NamedTuple):
    """The op's arguments: those of a `Scene`, panels, and the network's hidden units."""

    points: Tensor
    origins: Tensor
    projection: Tensor
    centers: Tensor
    images: Tensor
    maps: Tensor
    valid: Tensor | None
    panels: list[Tensor]
    hidden: int


def _cpu(given: PlaneSweep) -> tuple[Tensor, Tensor, Tensor] | None:
    scene, panels, hidden = Scene(*given[:7]), given.panels, given.hidden
    lanes = check_panels(panels, scene.maps.shape[-1], hidden)
    if not is_served(scene):
        return None
    spec = {"channels": channels_compared(panels), "hidden": hidden, "with_valid": scene.valid is not None}
    function = packed_function(KERNEL, lanes, **spec)
    return None if function is None else run(function, scene, panels)


def _fake(given: PlaneSweep) -> tuple[Tensor, Tensor, Tensor]:
    points, shape = given.points, given.points.shape[:2]
    return points.new_empty(shape[0], 3), points.new_empty(shape), points.new_empty(shape, dtype=torch.bool)


#: ``torch.ops.shiftadd3d.plane_sweep``; arguments and outcome as those of its twin, but for the network, which is the
#: panels of `shiftadd3d.kernels.pack.gnt.plane_sweep`. float32, any number of views.
plane_sweep = define_op(
    "plane_sweep",
    PlaneSweep,
    twin=plane_sweep_of_panels,
    check=lambda given: check_scene(Scene(*given[:7])),
    cpu=_cpu,
    fake=_fake,
)
