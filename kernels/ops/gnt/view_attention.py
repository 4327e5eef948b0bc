"""View attention as an op."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.cpu.gnt.view_attention import KERNEL, run
from shiftadd3d.kernels.cuda.driver import MAX_ELEMENTS
from shiftadd3d.kernels.cuda.gnt import view_attention as cuda_view_attention
from shiftadd3d.kernels.cuda.gnt.view_attention import CUDA_KERNEL
from shiftadd3d.kernels.ops.define import define_op, first_outcome, packed_function
from shiftadd3d.kernels.pack.gnt.view_attention import (
    Panels,
    ViewAttention,
    check_panels,
    hidden_of,
    shift_form,
    shift_sizes,
    view_attention_of_panels,
)
from shiftadd3d.kernels.pack.shift import forms_of
from shiftadd3d.kernels.reference.gnt.view_attention import MAX_VIEWS
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.numerics import get_numerics
from shiftadd3d.kernels.runtime.targets import current


def _check(given: ViewAttention) -> None:
    query, views, ray_diff, mask, _ = given
    points, count = query.shape[:-1], views.shape[-2]
    expected = {
        "views": (views, (*points, count, query.shape[-1])),
        "ray_diff": (ray_diff, (*points, count, 4)),
        "mask": (mask, (*points, count)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise UserError(
                f"{name} must be {list(shape)} beside queries {list(query.shape)}, not {list(tensor.shape)}"
            )
    if mask.dtype != torch.bool:
        raise UserError(f"mask must be bool, not {mask.dtype}")
    if count < 1:
        raise UserError("view attention takes 1 view or more, not 0")


def _cpu(given: ViewAttention) -> Tensor | None:
    query, views, ray_diff, mask, panels = given
    width = query.shape[-1]
    lanes, hidden = check_panels(panels, width), hidden_of(panels, width)
    if query.numel() == 0:
        return torch.empty_like(query)
    if query.dtype not in (torch.float32, torch.bfloat16) or views.shape[-2] > MAX_VIEWS:
        return None
    ordinary, others = panels[: len(Panels._fields)], panels[len(Panels._fields) :]
    target = current()
    shifts = forms_of(shift_form(target, get_numerics()), others, shift_sizes(target, width, hidden))

    def attended_in(function: Compiled, form: str) -> Tensor | None:
        return run(function, query, views, ray_diff, mask, [*ordinary, *shifts[form]])

    return first_outcome(partial(packed_function, KERNEL, lanes), shifts, attended_in, width=width, hidden=hidden)


def _cuda(given: ViewAttention) -> Tensor | None:
    query, views, ray_diff, mask, panels = given
    panels = panels[: len(Panels._fields)]
    width = query.shape[-1]
    lanes, hidden = check_panels(panels, width), hidden_of(panels, width)
    if query.numel() == 0:
        return torch.empty_like(query)
    if not cuda_view_attention.fits(width, hidden) or views.numel() > MAX_ELEMENTS:
        CUDA_KERNEL.decline(f"views {list(views.shape)} are too large for it")
        return None
    known = query.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if lanes > 1 or views.shape[-2] > MAX_VIEWS or not known:
        return None
    function = CUDA_KERNEL.function(device=query.device, width=width, hidden=hidden)
    return None if function is None else cuda_view_attention.run(function, query, views, ray_diff, mask, panels)


view_attention = define_op(
    "view_attention",
    ViewAttention,
    twin=view_attention_of_panels,
    check=_check,
    cpu=_cpu,
    cuda=_cuda,
    fake=lambda given: torch.empty_like(given.query),
    activations=3,
)
