"""The transformer block along rays as an op. Inference only; training uses the layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.gnt.ray_block import KERNEL, run
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.reference.gnt.ray_block import check, ray_block_twin


def _cpu(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    conv: Tensor | None,
    num_heads: int,
    attention: str,
    eps: float,
    return_weights: bool,
) -> tuple[Tensor, Tensor]:
    check(x, weights, biases, conv, num_heads, attention)
    function = None
    if x.numel() and x.dtype in (torch.float32, torch.bfloat16):
        function = KERNEL.function(
            width=x.shape[-1],
            heads=num_heads,
            hidden=weights[6].shape[0] if len(weights) > 5 else 0,
            attention=attention,
            kernel=0 if conv is None else conv.shape[1],
            return_weights=return_weights,
        )
    if function is None:
        return ray_block_twin(x, weights, biases, conv, num_heads, attention, eps, return_weights)
    return run(function, x, weights, biases, conv, num_heads, eps, return_weights)


def _fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:2] if others[-1] else (0,))


#: ``torch.ops.shiftadd3d.ray_block``; arguments and outcome as those of its twin. float32 and bfloat16 (computed in
#: float32); any number of rays and samples.
ray_block = define_op(
    "ray_block(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? conv, int num_heads, str attention, float eps, "
    "bool return_weights) -> (Tensor, Tensor)",
    cpu=_cpu,
    twin=ray_block_twin,
    fake=_fake,
)
