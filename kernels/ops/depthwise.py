"""Depthwise convolution of tokens as an op.

Accuracy: results differ from the reference's by the order of summation only, whatever the numerics; bfloat16 is summed
in float32. Inference only.
"""

from __future__ import annotations

from torch import Tensor

from shiftadd3d.kernels.cpu.depthwise import DEPTHWISE_CONV, run
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.depthwise import check_depthwise, depthwise_conv_twin
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.memory import DTYPES
from shiftadd3d.kernels.runtime.numerics import get_numerics


def depthwise_conv(
    x: Tensor,  # [B, prefix + height * width, C]
    weight: Tensor,  # [C, 1, k, k]
    bias: Tensor | None,  # [C]
    grid: tuple[int, int],
    activation: Activation = "none",
    addend: Tensor | None = None,  # [B, prefix + height * width, C]
) -> Tensor:  # [B, prefix + height * width, C], dtype of x
    """``activation(convolution of x + bias) + addend``, one kernel a channel, over the grid that tokens lie on.

    Beyond the grid there are zeros. What comes before the grid (class and register tokens) lies on none: it gets the
    addend alone, and no neighbour sees it.

    Runs compiled code on CPUs in float32 and bfloat16 for at least as many channels as a vector register holds, and
    `depthwise_conv_twin` everywhere else.

    Args:
        x: tokens, the grid row by row; read where they are if the channels of each lie side by side.
        weight: as in `torch.nn.Conv2d`, the size k of its kernels odd.
        grid: (height, width).
        activation: one of ``"none"``, ``"relu"``, ``"gelu"`` (with erf).

    Raises:
        UserError: if shapes, dtypes or names do not fit together.
    """
    if get_numerics() == "twin":
        return depthwise_conv_twin(x, weight, bias, *grid, activation, addend)
    return depthwise_op(x, weight, bias, *grid, activation, addend)


def _depthwise_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    activation: str = "none",
    addend: Tensor | None = None,
) -> Tensor:
    check_depthwise(x, weight, bias, height, width, activation, addend)
    function = None
    if x.numel() and x.dtype in DTYPES and x.shape[-1] >= targets.current().lanes:
        function = DEPTHWISE_CONV.function(
            dtype=DTYPES[x.dtype],
            kernel_size=weight.shape[-1],
            activation=activation,
            added=addend is not None,
        )
    if function is None:
        return depthwise_conv_twin(x, weight, bias, height, width, activation, addend)
    return run(function, x, weight, bias, height, width, addend)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    activation: str = "none",
    addend: Tensor | None = None,
) -> Tensor:
    check_depthwise(x, weight, bias, height, width, activation, addend)
    return x.new_empty(x.shape)


depthwise_op = define_op(
    "depthwise_conv(Tensor x, Tensor weight, Tensor? bias, SymInt height, SymInt width, str activation='none', "
    "Tensor? addend=None) -> Tensor",
    cpu=_depthwise_cpu,
    twin=depthwise_conv_twin,
    fake=_fake,
    activations=1,
)
