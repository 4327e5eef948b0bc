"""The transformer block along rays as an op. Inference only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.gnt.ray_block import KERNEL, run
from shiftadd3d.kernels.ops.define import define_op, packed_function
from shiftadd3d.kernels.pack.gnt.ray_block import check_panels, hidden_and_kernel, ray_block_of_panels
from shiftadd3d.kernels.reference.gnt.ray_block import check


def _cpu(
    x: Tensor, panels: list[Tensor], num_heads: int, attention: str, eps: float, return_weights: bool
) -> tuple[Tensor, Tensor]:
    check(x, num_heads, attention)
    width = x.shape[-1]
    lanes = check_panels(panels, width, num_heads)
    function = None
    if x.numel() and x.dtype in (torch.float32, torch.bfloat16):
        hidden, kernel = hidden_and_kernel(panels, num_heads)
        spec: dict[str, Any] = {"width": width, "heads": num_heads, "hidden": hidden, "attention": attention}
        function = packed_function(KERNEL, lanes, **spec, kernel=kernel, return_weights=return_weights)
    if function is None:
        return ray_block_of_panels(x, panels, num_heads, attention, eps, return_weights)
    return run(function, x, panels, eps, return_weights)


def _fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:2] if others[-1] else (0,))


#: ``torch.ops.shiftadd3d.ray_block``; arguments and outcome as those of its twin, but for the weights, which are the
#: panels of `shiftadd3d.kernels.pack.gnt.ray_block`. float32 and bfloat16 (computed in float32); any number of rays and
#: samples.
ray_block = define_op(
    "ray_block(Tensor x, Tensor[] panels, int num_heads, str attention, float eps, bool return_weights) "
    "-> (Tensor, Tensor)",
    cpu=_cpu,
    twin=ray_block_of_panels,
    fake=_fake,
)
