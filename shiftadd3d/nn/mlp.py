"""Perceptrons of two layers in their form for inference, which runs as few kernels."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.fx import Proxy

from shiftadd3d.kernels.ops.conv_mlp import shift_conv_mlp
from shiftadd3d.kernels.ops.depthwise import depthwise_conv
from shiftadd3d.kernels.ops.mlp import shift_mlp
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.runtime.numerics import uses_kernels
from shiftadd3d.nn.attachments import has_hooks, would_be_lost
from shiftadd3d.nn.frozen import frozen_class
from shiftadd3d.nn.shift import PackedShiftLinear


class FrozenMlp(nn.Module):
    """``fc2(act(fc1(x)))``: the layers of a perceptron, without what only training needs.

    Without gradients, packed shift layers of one format run as one op. On CPUs this is one kernel, which keeps the
    hidden values in the cache (see `shiftadd3d.kernels`).

    Args:
        mlp: a perceptron that `is_plain_mlp` accepts. Its layers are taken over, not copied, under the same names.

    Shapes: x [*, in_features] to [*, out_features].
    """

    fc1: nn.Linear | PackedShiftLinear
    act: nn.Module
    fc2: nn.Linear | PackedShiftLinear

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        for name in ("fc1", "act", "fc2"):
            self.add_module(name, mlp.get_submodule(name))
        self.training = mlp.training

    def forward(self, x: Tensor) -> Tensor:  # [*, in_features] -> [*, out_features]
        first, second, activation = self.fc1, self.fc2, activation_name(self.act)
        if (
            not isinstance(x, Proxy)  # torch.fx sees the layers, as those of other perceptrons
            and isinstance(first, PackedShiftLinear)
            and isinstance(second, PackedShiftLinear)
            and (first.bits, first.terms) == (second.bits, second.terms)
            and activation is not None
            and x.shape[-1:] == (first.in_features,)
            and uses_kernels("shift_mlp", x)
            and not has_hooks(first, self.act, second)
        ):
            layers = (first.codes, first.offset, first.bias, second.codes, second.offset, second.bias)
            return shift_mlp(x, *layers, first.bits, activation)
        return second(self.act(first(x)))


class FrozenConvMlp(nn.Module):
    """``fc2(act(dwconv(fc1(x))))``: a perceptron that looks at neighbours, without what only training needs.

    Without gradients, on CPUs, packed shift layers of one format and the convolution between them run as one op.
    Between other layers, such as mixtures, the convolution and the activation function run as one op. Both read tokens
    in their usual order (see `shiftadd3d.kernels`).

    Args:
        mlp: a perceptron that `is_conv_mlp` accepts. Its layers are taken over, not copied, under the same names.

    Shapes: x [B, height * width, in_features] to [B, height * width, out_features].

    Source: Wang et al., PVT v2 (2022), section 3.3.
    """

    fc1: nn.Module
    dwconv: nn.Conv2d
    act: nn.Module
    fc2: nn.Module

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        for name in ("fc1", "dwconv", "act", "fc2"):
            self.add_module(name, mlp.get_submodule(name))
        self.training = mlp.training

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        """Look at each token and its neighbours.

        Args:
            x: [B, N, in_features], the grid row by row.
            feat_size: height and width of the grid, N = height * width.

        Returns:
            [B, N, out_features].
        """
        first, second, conv, (height, width) = self.fc1, self.fc2, self.dwconv, feat_size
        activation = activation_name(self.act)
        if isinstance(x, Proxy):  # torch.fx sees the layers, as those of other perceptrons
            image = conv(first(x).transpose(1, 2).unflatten(-1, (height, width)))
            return second(self.act(image.flatten(2).transpose(1, 2)))
        if (
            isinstance(first, PackedShiftLinear)
            and isinstance(second, PackedShiftLinear)
            and (first.bits, first.terms) == (second.bits, second.terms)
            and activation is not None
            and x.shape[-1:] == (first.in_features,)
            and uses_kernels("shift_conv_mlp", x)
            and not has_hooks(first, conv, self.act, second)
        ):
            layers = (first.codes, first.offset, first.bias, conv.weight, conv.bias)
            layers += (second.codes, second.offset, second.bias)
            return shift_conv_mlp(x, *layers, height, width, first.bits, activation)
        hidden = first(x)
        if activation is not None and uses_kernels("depthwise_conv", hidden) and not has_hooks(conv, self.act):
            return second(depthwise_conv(hidden, conv.weight, conv.bias, height, width, activation))
        image = conv(hidden.transpose(1, 2).unflatten(-1, (height, width)))
        return second(self.act(image.flatten(2).transpose(1, 2)))


def activation_name(module: nn.Module) -> Activation | None:
    """The name of this activation function in kernels; None if they do not have it."""
    if type(module) is nn.ReLU:
        return "relu"
    return "gelu" if type(module) is nn.GELU and module.approximate == "none" else None


def is_watched(module: nn.Module) -> bool:
    """Whether hooks see or change the inputs or outputs of the parts of `module`."""
    return has_hooks(*(part for part in module.modules() if part is not module))


def is_plain_mlp(module: nn.Module) -> bool:
    """Whether a `FrozenMlp` can replace a module in evaluation.

    Its class must be registered for that (`register_frozen`). It must have two linear or packed shift layers `fc1` and
    `fc2`, an activation `act` that kernels know, and no hooks. All other parts must do nothing in evaluation.
    """
    return frozen_class(module) is FrozenMlp and _consists_of(module, "fc1", "act", "fc2")


def is_conv_mlp(module: nn.Module, mixtures: tuple[type[nn.Module], ...] = ()) -> bool:
    """Whether a `FrozenConvMlp` can replace a module in evaluation.

    Conditions are those of `is_plain_mlp`, with a depthwise convolution `dwconv` that keeps the size of its images.

    Args:
        module: any module.
        mixtures: more classes that its layers may have, with `in_features` and `out_features` if they stand for one
            linear layer.
    """
    conv = getattr(module, "dwconv", None)
    if not isinstance(conv, nn.Conv2d) or not is_depthwise(conv):
        return False
    return frozen_class(module) is FrozenConvMlp and _consists_of(
        module, "fc1", "dwconv", "act", "fc2", layers=(*_LAYERS, *mixtures)
    )


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution is depthwise and keeps the size of its images."""
    return (
        type(conv) is nn.Conv2d
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.kernel_size[0] % 2 == 1
        and conv.padding == (conv.kernel_size[0] // 2,) * 2
        and (conv.stride, conv.dilation, conv.padding_mode) == ((1, 1), (1, 1), "zeros")
    )


_LAYERS = nn.Linear, PackedShiftLinear


def _consists_of(module: nn.Module, *names: str, layers: tuple[type[nn.Module], ...] = _LAYERS) -> bool:
    """Whether a module has these parts, of the kinds that their names stand for, and nothing else that counts."""
    first, second, act = (cast(Any, getattr(module, name, None)) for name in ("fc1", "fc2", "act"))
    if not isinstance(act, nn.Module) or activation_name(act) is None:
        return False
    if not all(type(layer) in layers and getattr(layer, "out_features", None) for layer in (first, second)):
        return False
    rest = [child for name, child in module.named_children() if name not in names]
    if not all(type(child) in (nn.Identity, nn.Dropout) for child in rest):
        return False
    if list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)):
        return False
    return not any(would_be_lost(part) for part in module.modules()) and first.out_features == second.in_features
