"""Things that people attach to one module of a model. They are lost when another module takes its place.

These are hooks, an own forward pass, parametrizations, weight norms, adapters and offloading. All of them belong to the
instance.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from shiftadd3d._errors import kind_of

# Registries of hooks, all that torch has, and what their hooks are about.
_HOOKS = {
    "_forward_pre_hooks": "hooks",
    "_forward_hooks": "hooks",
    "_backward_pre_hooks": "hooks",
    "_backward_hooks": "hooks",
    "_state_dict_pre_hooks": "hooks on its state dict",
    "_state_dict_hooks": "hooks on its state dict",
    "_load_state_dict_pre_hooks": "hooks on its state dict",
    "_load_state_dict_post_hooks": "hooks on its state dict",
}
_REMEDIES = {
    "WeightNorm": "the old weight norm; torch.nn.utils.remove_weight_norm takes it off",
    "SpectralNorm": "the old spectral norm; torch.nn.utils.remove_spectral_norm takes it off",
}


def would_be_lost(module: nn.Module) -> str | None:
    """What is attached to `module` and would be lost with it, and what to do about it; None for nothing."""
    if hasattr(module, "_hf_hook"):
        return "a hook of accelerate, which would be lost; accelerate.hooks.remove_hook_from_module takes it off"
    for registry, what in _HOOKS.items():
        hooks = getattr(module, registry, None) or {}
        for hook in hooks.values():
            kind = type(hook).__name__
            if kind in _REMEDIES:
                return _REMEDIES[kind]
            if type(hook).__module__ == "torch.nn.utils.prune":
                return "pruning that is not final; torch.nn.utils.prune.remove makes it so"
        if hooks:
            return f"{what}, which would be lost; remove them first"
    if parametrize.is_parametrized(module):
        return "parametrizations; torch.nn.utils.parametrize.remove_parametrizations makes its tensors ordinary ones"
    replaced = sorted(name for name in vars(module) if _is_replaced_method(module, name))
    if replaced:
        return f"a {replaced[0]} of its own, set on the instance, which would be lost; delete that first"
    return None


def has_own_forward(module: nn.Module) -> bool:
    """Whether a forward pass was set on the instance, which hides that of its class."""
    return "forward" in module.__dict__ and _is_replaced_method(module, "forward")


def has_hooks(*modules: nn.Module) -> bool:
    """Whether hooks see or change the inputs or outputs of these modules."""
    return any(module._forward_hooks or module._forward_pre_hooks or has_own_forward(module) for module in modules)


def _is_replaced_method(module: nn.Module, name: str) -> bool:
    method = getattr(type(module), name, None)
    if not isinstance(method, types.FunctionType):
        return False
    own = vars(module)[name]
    # Tools that took off what they had put on leave the class's own, bound.
    return getattr(own, "__func__", None) is not method or getattr(own, "__self__", None) is not module


def foreign_to_linear(layer: nn.Linear | nn.Conv2d) -> str | None:
    """What was added to a linear layer or a convolution, and would not be carried over to another layer; None for
    nothing.
    """
    tensors = {name for name, value in (*layer._parameters.items(), *layer._buffers.items()) if value is not None}
    tensors |= {name for name, value in vars(layer).items() if isinstance(value, Tensor)}
    more = sorted((tensors - {"weight", "bias"}) | set(layer._modules))
    if more:
        return f"{', '.join(more)}, which would be lost; fold what it does into the weight first"
    weight: Any = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter and not nn.parameter.is_lazy(weight):
        return f"a weight that is {kind_of(weight)}; turn it into an ordinary tensor first"
    return None


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is one layer with adapters (LoRA and the like) around it, judged by the names that libraries
    use.
    """
    if any(kind.__name__ in ("BaseTunerLayer", "LoraLayer", "LoRALayer") for kind in type(module).__mro__):
        return True
    parts = {*module._modules, *module._parameters}
    if isinstance(module._modules.get("base_layer"), (nn.Linear, nn.Conv2d)) and len(parts) > 1:
        return True
    return any(part.lower().startswith("lora_") for part in parts) and bool({"weight", "linear"} & parts)


ADAPTED = "adapters (LoRA or the like) around its weight; merge them first (peft: model.merge_and_unload())"


def overridden_methods(module: nn.Module, base: type[nn.Module]) -> list[str]:
    """Methods of `base` that the class of `module` overrides. A replacement for `base` would not have them."""
    kinds = type(module).__mro__
    return sorted(
        name
        for kind in kinds[: kinds.index(base)]
        for name, value in vars(kind).items()
        if isinstance(value, types.FunctionType) and name not in _NOT_COMPUTING and hasattr(base, name)
    )


_NOT_COMPUTING = ("__init__", "__repr__", "extra_repr", "reset_parameters", "init_weights")


def offloaded(model: nn.Module) -> str | None:
    """The name of a module whose parts get their weights from accelerate by name; None if there is none.

    Replacing parts would change the names.
    """
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False) or getattr(one, "place_submodules", False):
                return name or "(root)"
    return None


def keep_attributes(old: nn.Module, new: nn.Module, kind: type[nn.Module] | None = None) -> None:
    """Copy attributes that were set on the instance `old`, such as tags, to `new`.

    Args:
        new: the replacement.
        old: the module that is replaced.
        kind: the class of `old`, if `new` is made for it. Attributes of that class are not copied. If None, only
            numbers, texts and flags are copied.
    """
    given = frozenset() if kind is None else _given_by(kind)
    for name, value in vars(old).items():
        if name in given or name in vars(new) or hasattr(type(new), name) or isinstance(value, types.MethodType):
            continue
        if kind is not None or isinstance(value, (bool, int, float, str, type(None))):
            vars(new)[name] = value


@functools.cache
def _given_by(kind: Callable[..., nn.Module]) -> frozenset[str]:
    with torch.device("meta"):  # initialising real weights would draw from the generator that users seed
        return frozenset(vars(kind(1, 1, 1)))  # sizes, the third being that of a kernel, or a bias
