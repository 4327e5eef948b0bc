"""Depthwise convolution of tokens as an op.

Accuracy: results differ from the reference's by the order of summation only, whatever the numerics; bfloat16 is summed
in float32. Inference only.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.cpu.depthwise import DEPTHWISE_CONV, run
from shiftadd3d.kernels.ops.define import Size, define_op
from shiftadd3d.kernels.ops.matshift import described
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.depthwise import depthwise_conv_twin
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.memory import DTYPES


class DepthwiseConv(NamedTuple):
    """``activation(convolution of x + bias) + addend``, one kernel a channel, over the grid that tokens lie on.

    Beyond the grid there are zeros. What comes before the grid (class and register tokens) lies on none: it gets the
    addend alone, and no neighbour sees it.

    Runs compiled code on CPUs in float32 and bfloat16 for at least as many channels as a vector register holds, and
    `depthwise_conv_twin` everywhere else. Raises `UserError` if shapes, dtypes or names do not fit together.

    Attributes:
        x: tokens, the grid row by row; read where they are if the channels of each lie side by side.
        weight: as in `torch.nn.Conv2d`, the size k of its kernels odd.
        height, width: of the grid.
        activation: one of ``"none"``, ``"relu"``, ``"gelu"`` (with erf).
    """

    x: Tensor  # [B, prefix + height * width, C]
    weight: Tensor  # [C, 1, k, k]
    bias: Tensor | None  # [C]
    height: Size
    width: Size
    activation: Activation = "none"
    addend: Tensor | None = None  # [B, prefix + height * width, C]


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
        raise UserError(f"{x.shape[1]} tokens hold no grid of {height} x {width}")
    if addend is not None and (addend.shape != x.shape or addend.dtype != x.dtype):
        raise UserError(f"the addend must be as x, {described(x)}, not {described(addend)}")


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
