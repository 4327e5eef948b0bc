"""The transformer block along rays as an op."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.cpu.gnt.ray_block import KERNEL, run
from shiftadd3d.kernels.ops.define import define_op, first_outcome, packed_function
from shiftadd3d.kernels.pack.gnt.ray_block import (
    Panels,
    RayBlock,
    check_panels,
    hidden_and_kernel,
    layout_of,
    ray_block_of_panels,
    shift_sizes,
)
from shiftadd3d.kernels.pack.shift import forms_of, panel_form
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.numerics import get_numerics
from shiftadd3d.kernels.runtime.targets import current


def _check(given: RayBlock) -> None:
    x, _, num_heads, *_ = given
    if x.dim() != 3:
        raise UserError(f"x must be [rays, samples, channels], not {list(x.shape)}")
    if num_heads < 1 or x.shape[-1] % num_heads:
        raise UserError(f"num_heads must divide the {x.shape[-1]} channels, and {num_heads} does not")


def _cpu(given: RayBlock) -> tuple[Tensor, Tensor] | None:
    x, panels, num_heads, attention, eps, return_weights = given
    width = x.shape[-1]
    lanes = check_panels(panels, width, num_heads)
    if not x.numel() or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    hidden, kernel = hidden_and_kernel(panels, num_heads)
    spec = {"width": width, "heads": num_heads, "hidden": hidden, "attention": attention, "kernel": kernel}
    ordinary, others = panels[: len(Panels._fields)], panels[len(Panels._fields) :]
    sizes = shift_sizes(width, hidden, layout_of(lanes, width, num_heads))
    shifts = forms_of(panel_form(current(), get_numerics()), others[1:], sizes)

    def block_in(function: Compiled, form: str) -> tuple[Tensor, Tensor] | None:
        norms = others[:1] if shifts[form] else []
        return run(function, x, [*ordinary, *norms, *shifts[form]], eps, return_weights)

    choose = partial(packed_function, KERNEL, lanes)
    return first_outcome(choose, shifts, block_in, **spec, return_weights=return_weights)


def _fake(given: RayBlock) -> tuple[Tensor, Tensor]:
    x = given.x
    return torch.empty_like(x), x.new_empty(x.shape[:2] if given.return_weights else (0,))


ray_block = define_op("ray_block", RayBlock, twin=ray_block_of_panels, check=_check, cpu=_cpu, fake=_fake)
