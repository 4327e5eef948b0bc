"""The views' embedding as an op. Inference only; training uses `shiftadd3d.models.gnt`'s layers."""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.gnt.view_embedding import KERNEL, run
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.reference.gnt.view_embedding import MAX_VIEWS, check, view_embedding_twin


def _cpu(values: Tensor, mask: Tensor, weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, Tensor]:
    check(values, mask, weights, biases)
    function = None
    if values.numel() and values.dtype == torch.float32 and values.shape[-2] <= MAX_VIEWS:
        function = KERNEL.function(
            inputs=values.shape[-1],
            hidden=weights[0].shape[0],
            width=weights[1].shape[0],
            with_moments=len(weights) > 2,
        )
    if function is None:
        return view_embedding_twin(values, mask, weights, biases)
    return run(function, values, mask, weights, biases)


def _fake(values: Tensor, mask: Tensor, weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = weights[1].shape[0]
    return values.new_empty(*values.shape[:-1], width), values.new_empty(*values.shape[:-2], width)


#: ``torch.ops.shiftadd3d.view_embedding``; arguments and outcome as those of its twin. float32, any number of views.
view_embedding = define_op(
    "view_embedding(Tensor values, Tensor mask, Tensor[] weights, Tensor[] biases) -> (Tensor, Tensor)",
    cpu=_cpu,
    twin=view_embedding_twin,
    fake=_fake,
)
