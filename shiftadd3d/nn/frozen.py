"""What `freeze_` puts in the place of modules: the register of classes, and the modules whose kernels read panels."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.pack.shift import WholeWeights, whole_weights
from shiftadd3d.kernels.runtime.numerics import uses_kernels
from shiftadd3d.nn.attachments import has_hooks, overridden_methods
from shiftadd3d.nn.shift import PackedShiftLinear

_frozen_classes: dict[type[nn.Module], type[nn.Module]] = {}


def register_frozen(module_class: type[nn.Module], frozen: type[nn.Module]) -> None:
    """Make a class of modules known to `freeze_`, which then puts a frozen one in the place of each.

    Args:
        module_class: the class. Subclasses count that have no method of their own in place of one of its.
        frozen: what computes in evaluation just what its forward pass does. `FrozenMlp` is ``fc2(act(fc1(x)))`` and
            `FrozenConvMlp` the same with a depthwise convolution `dwconv` before the activation, of linear layers `fc1`
            and `fc2`, an activation `act`, and what does nothing in evaluation. Else a `FrozenModule`, made of the
            module alone.
    """
    _frozen_classes[module_class] = frozen


def frozen_class(module: nn.Module) -> type[nn.Module] | None:
    """What `register_frozen` was told of the class of a module, or of the nearest one that it derives from."""
    known = next((kind for kind in type(module).__mro__ if kind in _frozen_classes), None)
    return None if known is None or overridden_methods(module, known) else _frozen_classes[known]


class FrozenModule(nn.Module):
    """A module in its form for inference: it has the parts of another one, and panels, which are what its kernel reads.

    Panels are derived from the parts: when the module is made, and again when they have been loaded, moved, cast or
    trained (with `train()` before and `eval()` after). They are buffers, but not in the state dict. Weights that are
    changed in any other way need a call of `repack`.

    A class is derived from this one and from that of the module, and its forward pass calls an op where `runs` says so;
    elsewhere, in training, and where someone watches the parts, it is that of the module.

    Args:
        module: whose parts it takes over, the very modules and parameters under the same names.

    Raises:
        UserError: saying which of the parts is none that a kernel knows.
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
        """The panels by name; notes on the module, as plain attributes, what else its forward pass has to know.

        Raises:
            UserError: as the constructor.
        """
        raise NotImplementedError

    def repack(self) -> None:
        """Derive the panels from the parts as they are now."""
        with torch.no_grad():
            panels = self.derive()
        for name, panel in panels.items():
            self.register_buffer(f"panel_{name}", panel, persistent=False)
        self._panel_names = tuple(f"panel_{name}" for name in panels)

    def panels(self) -> list[Tensor]:
        """What the kernel reads."""
        return [getattr(self, name) for name in self._panel_names]

    def parts(self) -> Iterable[nn.Module]:
        """The modules whose work the kernel does: all, if a class does not say otherwise."""
        return (part for part in self.modules() if part is not self)

    def runs(self, op: str, *inputs: Tensor) -> bool:
        """Whether a kernel may do the work of the parts on these inputs now (see `uses_kernels`)."""
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
        UserError: naming a layer that is more than a linear one or a norm: a mixture, or a class of someone else's.
    """
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    for name, layer in layers.items():
        if type(layer) is PackedShiftLinear:
            weights.append(layer.quantized_weight())
        elif type(layer) is nn.Linear or type(layer) is nn.LayerNorm:
            weights.append(layer.weight)
        else:
            raise UserError(f"its {name} is a {type(layer).__name__}, which runs as it is written")
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
    """The linear layers of a perceptron, by their names in the module that has it under a name.

    Raises:
        UserError: if it is no sequence of two layers with a ReLU between.
    """
    children = dict(layers.named_children())
    if not isinstance(layers, nn.Sequential) or [*children] != ["0", "1", "2"] or type(children["1"]) is not nn.ReLU:
        raise UserError(f"its {name} is not two layers with a ReLU between, and runs as it is written")
    return {f"{name}.{number}": children[number] for number in ("0", "2")}
