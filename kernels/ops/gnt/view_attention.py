"""View attention as ops, of ordinary weights and of packed powers of two.

NaN makes its point NaN, as in the reference; infinities may come out as infinities where the reference, which subtracts
them, has NaN. Inference only: training uses `shiftadd3d.models.gnt`'s layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.gnt.view_attention import KERNEL, run
from shiftadd3d.kernels.cuda.driver import MAX_ELEMENTS
from shiftadd3d.kernels.cuda.gnt import view_attention as cuda_view_attention
from shiftadd3d.kernels.cuda.gnt.view_attention import CUDA_KERNEL, run_on_tensors
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.reference.gnt.view_attention import (
    check,
    decoded,
    view_attention_shift_twin,
    view_attention_twin,
)


def _cpu(
    query: Tensor,
    views: Tensor,
    ray_diff: Tensor,
    mask: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
) -> Tensor:
    check(query, views, ray_diff, mask, weights, biases)
    if query.numel() == 0:
        return torch.empty_like(query)
    function = None
    if query.dtype in (torch.float32, torch.bfloat16):
        function = KERNEL.function(width=query.shape[-1], hidden=weights[3].shape[0])
    if function is None:
        return view_attention_twin(query, views, ray_diff, mask, weights, biases)
    return run(function, query, views, ray_diff, mask, weights, biases)


def _cuda(
    query: Tensor,
    views: Tensor,
    ray_diff: Tensor,
    mask: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
) -> Tensor:
    check(query, views, ray_diff, mask, weights, biases)
    if query.numel() == 0:
        return torch.empty_like(query)
    function, width, hidden = None, query.shape[-1], weights[3].shape[0]
    if not cuda_view_attention.fits(width, hidden) or views.numel() > MAX_ELEMENTS:
        CUDA_KERNEL.decline(f"views {list(views.shape)} are too large for it")
    elif query.dtype in (torch.float32, torch.bfloat16, torch.float16):
        function = CUDA_KERNEL.function(device=query.device, width=width, hidden=hidden)
    if function is None:
        return view_attention_twin(query, views, ray_diff, mask, weights, biases)
    return run_on_tensors(function, query, views, ray_diff, mask, weights, biases)


def _with_codes(view_attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same with packed weights."""

    def shift(
        query: Tensor,
        views: Tensor,
        ray_diff: Tensor,
        mask: Tensor,
        codes: list[Tensor],
        offsets: list[Tensor],
        biases: list[Tensor],
        bits: int,
    ) -> Tensor:
        weights = decoded(codes, offsets, bits, query.shape[-1])
        return view_attention(query, views, ray_diff, mask, weights, biases)

    return shift


_SCHEMA = "Tensor query, Tensor views, Tensor ray_diff, Tensor mask"

#: ``torch.ops.shiftadd3d.view_attention``; arguments as those of its twin. 1 to 32 views, any width; float32 and
#: bfloat16 (computed in float32). The weights are, in this order, those of `WEIGHTS`, the biases those of `BIASES`.
view_attention = define_op(
    f"view_attention({_SCHEMA}, Tensor[] weights, Tensor[] biases) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    twin=view_attention_twin,
    fake=lambda query, *_: torch.empty_like(query),
    activations=3,
)

#: ``torch.ops.shiftadd3d.view_attention_shift``: the same with packed power-of-two weights, as `PackedShiftLinear` has
#: them: codes [terms, out, ceil(in * bits / 8)] uint8 and offsets [terms, out] int8.
view_attention_shift = define_op(
    f"view_attention_shift({_SCHEMA}, Tensor[] codes, Tensor[] offsets, Tensor[] biases, int bits) -> Tensor",
    cpu=_with_codes(_cpu),
    cuda=_with_codes(_cuda),
    twin=view_attention_shift_twin,
    fake=lambda query, *_: torch.empty_like(query),
    activations=3,
)
