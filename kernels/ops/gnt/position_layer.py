"""The position layer as an op."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.cpu.gnt.position_layer import KERNEL, run
from shiftadd3d.kernels.ops.define import define_op, packed_function
from shiftadd3d.kernels.pack.gnt.position_layer import Panels, PositionLayer, position_layer_of_panels, sizes
from shiftadd3d.kernels.pack.panel import lanes_of
from shiftadd3d.kernels.runtime.targets import current


def _check(given: PositionLayer) -> None:
    x, points, directions, _, _ = given
    if x.dim() != 3 or points.shape != (*x.shape[:2], 3) or directions.shape != (x.shape[0], 3):
        raise UserError(
            "x, points and directions must be [R, S, C], [R, S, 3] and [R, 3], not "
            f"{list(x.shape)}, {list(points.shape)} and {list(directions.shape)}"
        )


def _cpu(given: PositionLayer) -> Tensor | None:
    x, points, directions, panels, outputs = given
    packed = Panels(*panels)
    spec = {"width": x.shape[-1], "hidden": packed.second.shape[0], "outputs": outputs}
    lanes = lanes_of("position_layer", panels, partial(sizes, **spec))
    # Without fused multiply-adds the sines of large numbers would be off.
    if not (x.numel() and x.dtype == points.dtype == torch.float32 and current().has_fma):
        return None
    function = packed_function(KERNEL, lanes, **spec)
    return None if function is None else run(function, x, points, directions, packed, outputs)


position_layer = define_op(
    "position_layer",
    PositionLayer,
    twin=position_layer_of_panels,
    check=_check,
    cpu=_cpu,
    fake=lambda given: given.x.new_empty(*given.x.shape[:2], given.outputs),
)
