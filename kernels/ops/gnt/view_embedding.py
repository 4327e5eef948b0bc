"""The views' embedding as an op."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.cpu.gnt.view_embedding import KERNEL, run
from shiftadd3d.kernels.ops.define import define_op, packed_function
from shiftadd3d.kernels.pack.gnt.view_embedding import ViewEmbedding, sizes, view_embedding_of_panels
from shiftadd3d.kernels.pack.panel import lanes_of
from shiftadd3d.kernels.reference.gnt.view_embedding import MAX_VIEWS


def _check(given: ViewEmbedding) -> None:
    values, mask, _, _ = given
    if values.dim() < 2 or mask.shape != values.shape[:-1] or mask.dtype != torch.bool:
        raise UserError(f"mask must be bool {list(values.shape[:-1])}, not {mask.dtype} {list(mask.shape)}")


def _cpu(given: ViewEmbedding) -> tuple[Tensor, Tensor] | None:
    values, mask, panels, width = given
    spec = {"inputs": values.shape[-1], "hidden": panels[2].shape[0], "width": width}
    spec["with_moments"] = panels[4].numel() > 0
    lanes = lanes_of("view_embedding", panels, partial(sizes, **spec))
    if not values.numel() or values.dtype != torch.float32 or values.shape[-2] > MAX_VIEWS:
        return None
    function = packed_function(KERNEL, lanes, **spec)
    return None if function is None else run(function, values, mask, panels, width)


def _fake(given: ViewEmbedding) -> tuple[Tensor, Tensor]:
    values, width = given.values, given.width
    return values.new_empty(*values.shape[:-1], width), values.new_empty(*values.shape[:-2], width)


view_embedding = define_op(
    "view_embedding", ViewEmbedding, twin=view_embedding_of_panels, check=_check, cpu=_cpu, fake=_fake
)
