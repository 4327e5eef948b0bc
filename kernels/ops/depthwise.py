"""Depthwise convolution of tokens, as an op.

Accuracy: for all numerics, results differ from the reference's only by the order of summation. bfloat16 is summed in
float32. Inference only.
"""

from __future__ import annotations

from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.cpu.depthwise import DEPTHWISE_CONV, run
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.ops.matshift import described
from shiftadd3d.kernels.reference.depthwise import DepthwiseConv, depthwise_conv_twin
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.memory import DTYPES


def _check(given: DepthwiseConv) -> None:
    x, weight, bias, height, width, _, addend = given
    if x.dim() != 3 or not x.is_floating_point():
        raise UserError(f"x must be floating point [B, tokens, C], not {described(x)}")
    channels = x.shape[-1]
    if weight.dim() != 4 or weight.shape[:2] != (channels, 1) or weight.shape[2] != weight.shape[3]:
        raise UserError(f"weight must be [{channels}, 1, k, k] beside x {list(x.shape)}, not {list(weight.shape)}")
    if weight.shape[-1] % 2 == 0:
        raise UserError(f"the size of the kernels must be odd, not {weight.shape[-1]}")
    if bias is not None and bias.shape != (channels,):
        raise UserError(f"bias must be [{channels}], not {list(bias.shape)}")
    if height < 1 or width < 1 or height * width > x.shape[1]:
        raise UserError(f"{x.shape[1]} tokens are too few for a grid of {height} x {width}")
    if addend is not None and (addend.shape != x.shape or addend.dtype != x.dtype):
        raise UserError(f"the addend must be {described(x)}, like x, not {described(addend)}")


def _cpu(given: DepthwiseConv) -> Tensor | None:
    x, weight, bias, height, width, activation, addend = given
    if not x.numel() or x.dtype not in DTYPES or x.shape[-1] < targets.current().lanes:
        return None
    function = DEPTHWISE_CONV.function(
        dtype=DTYPES[x.dtype], kernel_size=weight.shape[-1], activation=activation, added=addend is not None
    )
    return None if function is None else run(function, x, weight, bias, height, width, addend)


#: [B, prefix + height * width, C] in the dtype of x.
depthwise_conv = define_op(
    "depthwise_conv",
    DepthwiseConv,
    twin=depthwise_conv_twin,
    check=_check,
    cpu=_cpu,
    fake=lambda given: given.x.new_empty(given.x.shape),
    activations=1,
)
