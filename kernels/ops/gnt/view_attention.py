"""View attention as an op.

NaN makes its point NaN, as in the reference; infinities may come out as infinities where the reference, which subtracts
them, has NaN. Inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.gnt.view_attention import KERNEL, run
from shiftadd3d.kernels.cuda.driver import MAX_ELEMENTS
from shiftadd3d.kernels.cuda.gnt import view_attention as cuda_view_attention
from shiftadd3d.kernels.cuda.gnt.view_attention import CUDA_KERNEL, run_on_tensors
from shiftadd3d.kernels.ops.define import define_op, packed_function
from shiftadd3d.kernels.pack.gnt.view_attention import check_panels, hidden_of, view_attention_of_panels
from shiftadd3d.kernels.reference.gnt.view_attention import MAX_VIEWS, check


def _cpu(query: Tensor, views: Tensor, ray_diff: Tensor, mask: Tensor, panels: list[Tensor]) -> Tensor:
    check(query, views, ray_diff, mask)
    width = query.shape[-1]
    lanes = check_panels(panels, width)
    if query.numel() == 0:
        return torch.empty_like(query)
    function = None
    if query.dtype in (torch.float32, torch.bfloat16) and views.shape[-2] <= MAX_VIEWS:
        function = packed_function(KERNEL, lanes, width=width, hidden=hidden_of(panels, width))
    if function is None:
        return view_attention_of_panels(query, views, ray_diff, mask, panels)
    return run(function, query, views, ray_diff, mask, panels)


def _cuda(query: Tensor, views: Tensor, ray_diff: Tensor, mask: Tensor, panels: list[Tensor]) -> Tensor:
    check(query, views, ray_diff, mask)
    width = query.shape[-1]
    lanes = check_panels(panels, width)
    if query.numel() == 0:
        return torch.empty_like(query)
    function, hidden = None, hidden_of(panels, width)
    if not cuda_view_attention.fits(width, hidden) or views.numel() > MAX_ELEMENTS:
        CUDA_KERNEL.decline(f"views {list(views.shape)} are too large for it")
    elif lanes == 1 and views.shape[-2] <= MAX_VIEWS and query.dtype in (torch.float32, torch.bfloat16, torch.float16):
        function = CUDA_KERNEL.function(device=query.device, width=width, hidden=hidden)
    if function is None:
        return view_attention_of_panels(query, views, ray_diff, mask, panels)
    return run_on_tensors(function, query, views, ray_diff, mask, panels)


#: ``torch.ops.shiftadd3d.view_attention``; arguments as those of the reference, but for its layers, which are the
#: panels of `shiftadd3d.kernels.pack.gnt.view_attention`. Any width; float32 and bfloat16 (computed in float32); more
#: than 32 views go through plain torch.
view_attention = define_op(
    "view_attention(Tensor query, Tensor views, Tensor ray_diff, Tensor mask, Tensor[] panels) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    twin=view_attention_of_panels,
    fake=lambda query, *_: torch.empty_like(query),
    activations=3,
)
