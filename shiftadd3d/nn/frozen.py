"""The modules that `freeze_` puts in place of others: their register, and modules whose kernels read panels."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd3d._errors import UserError, kind_of
from shiftadd3d.kernels.pack.shift import WholeWeights, whole_weights
from shiftadd3d.kernels.runtime.numerics import uses_kernels
from shiftadd3d.nn.attachments import has_hooks, overridden_methods
from shiftadd3d.nn.shift import PackedShiftLinear

_frozen_classes: dict[type[nn.Module], type[nn.Module]] = {}


def register_frozen(module_class: type[nn.Module], frozen: type[nn.Module]) -> None:
    """Tell `freeze_` which module replaces those of a class.

    Args:
        module_class: the class. Subclasses count as well if they override none of its methods.
        frozen: a class that computes in evaluation exactly what the module's forward pass does. `FrozenMlp` is
            ``fc2(act(fc1(x)))``, and `FrozenConvMlp` the same with a depthwise convolution `dwconv` before the
            activation. Both need linear layers `fc1` and `fc2`, an activation `act`, and other parts that do nothing in
            evaluation. Any other class is a `FrozenModule`, which is made from the module.
    """
    _frozen_classes[module_class] = frozen


def frozen_class(module: nn.Module) -> type[nn.Module] | None:
    """The replacement registered for the class of a module, or for the nearest class that it derives from."""
    known = next((kind for kind in type(module).__mro__ if kind in _frozen_classes), None)
    return None if known is None or overridden_methods(module, known) else _frozen_classes[known]


class FrozenModule(nn.Module):
    """A module in its form for inference. It has the parts of another module, and panels, which its kernel reads.

    Panels are made from the parts: first when this module is made, and again when parts have been loaded, moved, cast
    or trained (with `train()` before and `eval()` after). They are buffers, but are not in the state dict. After
    changing weights in any other way, call `repack`.

    Subclasses derive from this class and from the class of the module. Their forward pass calls an op if `runs` allows
    it. In training, with hooks on the parts, or if `runs` does not allow it, it is the forward pass of the module.

    Args:
        module: the module whose parts and parameters are taken over, not copied, under the same names.

    Raises:
        UserError: naming the part that no kernel knows.
    """

    _panel_names: tuple[str, ...] = ()

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)  # not that of the module's class, which makes parts
        self._parameters.update(module._parameters)
        self._buffers.update(module._buffers)
        self._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
        self._modules.update(module._modules)
        for name, value in vars(module).items():
            if not (name.startswith("_") or isinstance(value, types.MethodType)):
                vars(self)[name] = value
        self.repack()
        self.register_load_state_dict_post_hook(_repack_what_was_loaded)

    def derive(self) -> Mapping[str, Tensor]:
        """The panels by name. Other facts that the forward pass needs are stored on the module as plain attributes.

        Raises:
            UserError: as the constructor.
        """
        raise NotImplementedError

    def repack(self) -> None:
        """Make the panels from the present parts."""
        with torch.no_grad():
            panels = self.derive()
        for name, panel in panels.items():
            self.register_buffer(f"panel_{name}", panel, persistent=False)
        self._panel_names = tuple(f"panel_{name}" for name in panels)

    def panels(self) -> list[Tensor]:
        """The panels, which the kernel reads."""
        return [getattr(self, name) for name in self._panel_names]

    def parts(self) -> Iterable[nn.Module]:
        """The modules whose work the kernel does. By default these are all of them."""
        return (part for part in self.modules() if part is not self)

    def runs(self, op: str, *inputs: Tensor) -> bool:
        """Whether a kernel may do the work of the parts for these inputs (see `uses_kernels`)."""
        if not uses_kernels(op, *inputs) or any(x.dtype == torch.float64 for x in inputs):
            return False
        if self.training or torch.nn.modules.module._has_any_global_hook():
            return False
        return not any(part.training or has_hooks(part) for part in self.parts())

    def train(self, mode: bool = True) -> FrozenModule:
        was_training = self.training
        super().train(mode)
        if was_training and not mode:
            self.repack()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenModule:
        super()._apply(fn, recurse)
        self.repack()
        return self


def _repack_what_was_loaded(module: nn.Module, _: Any) -> None:
    assert isinstance(module, FrozenModule)
    module.repack()


def weights_and_biases(layers: Mapping[str, nn.Module]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The float weight and the bias of each layer.

    Raises:
        UserError: naming a layer that is not simply linear or a norm, such as a mixture or a derived class.
    """
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    for name, layer in layers.items():
        if type(layer) is PackedShiftLinear:
            weights.append(layer.quantized_weight())
        elif type(layer) is nn.Linear or type(layer) is nn.LayerNorm:
            weights.append(layer.weight)
        else:
            raise UserError(f"its {name} is {kind_of(layer)}, which runs as it is written")
        biases.append(layer.bias)
    return weights, biases


def whole_layers(layers: Iterable[nn.Module]) -> list[WholeWeights] | None:
    """The weights of shift layers as integers; None if one of them has other weights (see `whole_weights`)."""
    found = [
        whole_weights(layer.codes, layer.offset, layer.bits, layer.in_features)
        if type(layer) is PackedShiftLinear
        else None
        for layer in layers
    ]
    known = [layer for layer in found if layer is not None]
    return known if len(known) == len(found) else None


def two_layers(name: str, layers: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a perceptron, by their names in the module that contains it.

    Raises:
        UserError: if it is not a sequence of two layers with a ReLU between them.
    """
    children = dict(layers.named_children())
    if not isinstance(layers, nn.Sequential) or [*children] != ["0", "1", "2"] or type(children["1"]) is not nn.ReLU:
        raise UserError(f"its {name} is not two layers with a ReLU between, and runs as it is written")
    return {f"{name}.{number}": children[number] for number in ("0", "2")}
