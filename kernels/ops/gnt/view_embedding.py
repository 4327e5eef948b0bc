"""The views' embedding as an op. Inference only."""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.gnt.view_embedding import KERNEL, run
from shiftadd3d.kernels.ops.define import define_op, packed_function
from shiftadd3d.kernels.pack.gnt.view_embedding import check_panels, view_embedding_of_panels
from shiftadd3d.kernels.reference.gnt.view_embedding import MAX_VIEWS, check


def _cpu(values: Tensor, mask: Tensor, panels: list[Tensor], width: int) -> tuple[Tensor, Tensor]:
    check(values, mask)
    inputs = values.shape[-1]
    lanes = check_panels(panels, inputs, width)
    function = None
    if values.numel() and values.dtype == torch.float32 and values.shape[-2] <= MAX_VIEWS:
        spec = {"inputs": inputs, "hidden": panels[2].shape[0], "width": width, "with_moments": panels[4].numel() > 0}
        function = packed_function(KERNEL, lanes, **spec)
    if function is None:
        return view_embedding_of_panels(values, mask, panels, width)
    return run(function, values, mask, panels, width)


def _fake(values: Tensor, mask: Tensor, panels: list[Tensor], width: int) -> tuple[Tensor, Tensor]:
    return values.new_empty(*values.shape[:-1], width), values.new_empty(*values.shape[:-2], width)


#: ``torch.ops.shiftadd3d.view_embedding``; arguments and outcome as those of its twin, but for the weights, which are
#: the panels of `shiftadd3d.kernels.pack.gnt.view_embedding`. float32, any number of views.
view_embedding = define_op(
    "view_embedding(Tensor values, Tensor mask, Tensor[] panels, int width) -> (Tensor, Tensor)",
    cpu=_cpu,
    twin=view_embedding_of_panels,
    fake=_fake,
)
