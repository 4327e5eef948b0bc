"""How a kernel becomes a torch op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.runtime.kernel import Kernel
from shiftadd3d.kernels.runtime.numerics import KERNEL_DEVICES
from shiftadd3d.kernels.runtime.targets import current

OP_NAMESPACE = "shiftadd3d"
TWINS: dict[str, Callable[..., Any]] = {}
"""What each op computes, in plain torch, by the op's name."""
_LIBRARY = torch.library.Library(OP_NAMESPACE, "FRAGMENT")


def define_op(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    twin: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    activations: int = 0,
) -> Any:
    """Make a torch op of a kernel.

    All tensors have to be on one device, or else a `UserError` says which is not.

    Args:
        schema: name and types as torch writes them, ``"matshift(Tensor x, ...) -> Tensor"``.
        cpu: what runs on CPU tensors; it returns fresh tensors that share no memory with its arguments.
        cuda: the same for CUDA tensors.
        twin: what runs on every other device.
        fake: the shapes and dtypes of the outcome, for `torch.compile` and `torch.export`.
        backward, setup_context: gradients, as `torch.library.register_autograd` takes them.
        activations: how many of the first arguments `torch.autocast` casts, as it does the input of a linear layer.

    Returns:
        The op, ``torch.ops.shiftadd3d.<name>.default``.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(getattr(torch.ops, OP_NAMESPACE), name).default
    _LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None:
        _LIBRARY.impl(name, _on_one_device(op, cuda), "CUDA")
    _LIBRARY.impl(name, twin, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{OP_NAMESPACE}::{name}", _on_one_device(op, fake), lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"{OP_NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    if activations:
        for device in ("cpu", "cuda"):
            _LIBRARY.impl(name, _autocast(op, device, activations), f"Autocast{device.upper()}")
    TWINS[name] = twin
    KERNEL_DEVICES[name] = ("cpu",) if cuda is None else ("cpu", "cuda")
    return op


def packed_function(kernel: Kernel, lanes: int, /, **spec: Any) -> Callable[..., Any] | None:
    """`kernel.function` for weights that are packed for vectors of so many floats; None where its vectors differ."""
    if lanes != current().lanes:
        kernel.decline(f"weights are packed for vectors of {lanes} floats, those of another CPU: freeze the model here")
        return None
    return kernel.function(**spec)


def _on_one_device(op: Any, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The same, for tensors of one device only: a kernel is given addresses, and would read another's memory."""
    names = [argument.name for argument in op._schema.arguments]

    def run(*args: Any, **kwargs: Any) -> Any:
        first = None
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if not isinstance(tensor, torch.Tensor):
                    continue
                if first is None:
                    first = name, tensor.device
                elif tensor.device != first[1]:
                    raise UserError(
                        f"{op._schema.name.rpartition(':')[2]}: {first[0]} is on {first[1]}, but {name} on "
                        f"{tensor.device}; move the input to the device of the model, or the model with .to(...)"
                    )
        return implementation(*args, **kwargs)

    return run


def _autocast(op: Any, device: str, activations: int) -> Callable[..., Any]:
    """What an op does under `torch.autocast`: it casts its activations, and computes as elsewhere."""

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        narrowed = (x if x.dtype == torch.float64 else x.to(dtype) for x in args[:activations])
        with torch.autocast(device, enabled=False):
            return op(*narrowed, *args[activations:], **kwargs)

    return run
