"""How a kernel becomes a torch op.

An op consists of its arguments, which are a named tuple, and functions of that tuple: one that checks it, one for the
shape of the outcome, and one for each backend. If a backend cannot do a case, or numerics are ``"twin"``, the twin
runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, Protocol, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.reference.arguments import Given, Size, Taken
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, SpecValue
from shiftadd3d.kernels.runtime.numerics import KERNEL_DEVICES, get_numerics
from shiftadd3d.kernels.runtime.targets import current

OP_NAMESPACE = "shiftadd3d"
TWINS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {}
"""The twin of each op in plain torch, by the op's name, with the same arguments."""

_TYPES: dict[object, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[Tensor | None]: "Tensor?[]",
    int: "int",
    int | None: "int?",
    Size: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
}
_LIBRARY = torch.library.Library(OP_NAMESPACE, "FRAGMENT")

Outcome = TypeVar("Outcome", bound=Tensor | tuple[Tensor, ...])
Form = TypeVar("Form", bound=str)
Value: TypeAlias = "Tensor | Sequence[Tensor | None] | int | float | str | None"
"""Of an argument."""


def define_op(
    name: str,
    arguments: Callable[Taken, Given],
    *,
    twin: Callable[..., Outcome],
    check: Callable[[Given], object] | None = None,
    cpu: Callable[[Given], Outcome | None],
    cuda: Callable[[Given], Outcome | None] | None = None,
    fake: Callable[[Given], Outcome],
    backward: Callable[[Given, Tensor, Sequence[bool]], tuple[Tensor | None, ...]] | None = None,
    activations: int = 0,
) -> Callable[Taken, Outcome]:
    """Make a torch op of a kernel.

    All tensors have to be on one device, or else a `UserError` says which is not.

    Args:
        arguments: a class of named tuples, whose fields are the op's arguments: tensors, numbers, `Size`, and literals,
            which are checked.
        twin: the specification, a function of all arguments one by one.
        check: raises `UserError` for arguments that do not fit together.
        cpu: the backend for CPU tensors. It returns fresh tensors that share no memory with its arguments, or None if
            the twin must run. It asks `get_numerics` how exact it must be, because that is no argument of any op.
        cuda: the same for CUDA tensors.
        fake: the shapes and dtypes of the outcome, for `torch.compile` and `torch.export`.
        backward: ``backward(arguments, gradient, wanted)``, of an op with one outcome: a gradient for each argument,
            None where it is not wanted or there is none.
        activations: how many of the first arguments `torch.autocast` casts, as it does the input of a linear layer.

    Returns:
        The op, ``torch.ops.shiftadd3d.<name>.default``, with the docstring of its arguments.
    """
    types = get_type_hints(arguments, include_extras=True)
    checked = _checked(arguments, types, check)
    served = partial(_served, checked, twin)
    plain = served(lambda given: None)
    _LIBRARY.define(_schema(name, arguments, types, twin), tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(getattr(torch.ops, OP_NAMESPACE), name).default
    op.__doc__ = arguments.__doc__
    _LIBRARY.impl(name, served(cpu), "CPU")
    if cuda is not None:
        _LIBRARY.impl(name, _on_one_device(name, types, served(cuda)), "CUDA")
    _LIBRARY.impl(name, plain, "CompositeExplicitAutograd")

    def outcome_like(*args: Taken.args, **kwargs: Taken.kwargs) -> Outcome:
        return fake(checked(*args, **kwargs))

    torch.library.register_fake(f"{OP_NAMESPACE}::{name}", _on_one_device(name, types, outcome_like), lib=_LIBRARY)
    if backward is not None:
        _differentiate(name, arguments, backward)
    if activations:
        for device in ("cpu", "cuda"):
            _LIBRARY.impl(name, _autocast(op, device, activations), f"Autocast{device.upper()}")
    TWINS[name] = plain
    KERNEL_DEVICES[name] = ("cpu",) if cuda is None else ("cpu", "cuda")
    return op


def _checked(
    arguments: Callable[Taken, Given], types: dict[str, type], check: Callable[[Given], object] | None
) -> Callable[Taken, Given]:
    """`arguments`, which raise `UserError` if they do not fit together."""
    names = [(i, field, get_args(kind)) for i, (field, kind) in enumerate(types.items()) if get_origin(kind) is Literal]

    def checked(*args: Taken.args, **kwargs: Taken.kwargs) -> Given:
        given = arguments(*args, **kwargs)
        for i, field, known in names:
            if given[i] not in known:
                raise UserError(f"{field} must be one of {', '.join(known)}, not {given[i]!r}")
        if check is not None:
            check(given)
        return given

    return checked


def _served(
    checked: Callable[Taken, Given], twin: Callable[..., Outcome], backend: Callable[[Given], Outcome | None]
) -> Callable[Taken, Outcome]:
    """An op whose cases a backend computes if it can, and else the twin."""

    def run(*args: Taken.args, **kwargs: Taken.kwargs) -> Outcome:
        given = checked(*args, **kwargs)
        outcome = None if get_numerics() == "twin" else backend(given)
        return twin(*given) if outcome is None else outcome

    return run


def _schema(name: str, arguments: Callable[..., tuple], types: dict[str, type], twin: Callable[..., object]) -> str:
    """The op as torch writes it, ``"matshift(Tensor x, ...) -> Tensor"``."""
    defaults = getattr(arguments, "_field_defaults", {})
    fields = [
        f"{'str' if get_origin(kind) is Literal else _TYPES[kind]} {field}"
        + (f"={defaults[field]!r}" if field in defaults else "")
        for field, kind in types.items()
    ]
    outcome = get_type_hints(twin)["return"]
    returned = "Tensor" if outcome is Tensor else f"({', '.join('Tensor' for _ in get_args(outcome))})"
    return f"{name}({', '.join(fields)}) -> {returned}"


def first_outcome(
    choose: Callable[..., Compiled | None],
    forms: Iterable[Form],
    run: Callable[[Compiled, Form], Outcome | None],
    **spec: SpecValue,
) -> Outcome | None:
    """The outcome of the first form that can express all activations; None if there is none."""
    for form in forms:
        function = choose(**spec, form=form)
        outcome = None if function is None else run(function, form)
        if outcome is not None:
            return outcome
    return None


def packed_function(kernel: Kernel, lanes: int, /, **spec: SpecValue) -> Compiled | None:
    """`kernel.function` for weights packed for vectors of this many floats; None if the kernel's vectors differ."""
    if lanes != current().lanes:
        kernel.decline(f"weights are packed for vectors of {lanes} floats, those of another CPU: freeze the model here")
        return None
    return kernel.function(**spec)


class _Context(Protocol):
    """What torch keeps of a call until its gradients are wanted."""

    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]
    others: list[object]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def _differentiate(
    name: str,
    arguments: Callable[..., Given],
    backward: Callable[[Given, Tensor, Sequence[bool]], tuple[Tensor | None, ...]],
) -> None:
    def keep(ctx: _Context, inputs: tuple[object, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def gradients(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept = zip(ctx.saved_tensors, ctx.others, strict=True)
        given = arguments(*(other if tensor is None else tensor for tensor, other in kept))
        return backward(given, gradient, ctx.needs_input_grad)

    torch.library.register_autograd(f"{OP_NAMESPACE}::{name}", gradients, setup_context=keep, lib=_LIBRARY)


def _on_one_device(
    name: str, fields: Iterable[str], implementation: Callable[Taken, Outcome]
) -> Callable[Taken, Outcome]:
    """The same, for tensors of one device only: a kernel is given addresses, and would read another's memory."""

    def run(*args: Taken.args, **kwargs: Taken.kwargs) -> Outcome:
        first = None
        for field, value in (*zip(fields, args, strict=False), *kwargs.items()):
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if not isinstance(tensor, Tensor):
                    continue
                if first is None:
                    first = field, tensor.device
                elif tensor.device != first[1]:
                    raise UserError(
                        f"{name}: {first[0]} is on {first[1]}, but {field} on {tensor.device}; move the input to the "
                        "device of the model, or the model with .to(...)"
                    )
        return implementation(*args, **kwargs)

    return run


def _autocast(op: Callable[..., Outcome], device: str, activations: int) -> Callable[..., Outcome]:
    """What an op does under `torch.autocast`: it casts its activations, and computes as elsewhere."""

    def cast(x: Value, dtype: torch.dtype) -> Value:
        return x.to(dtype) if isinstance(x, Tensor) and x.dtype != torch.float64 else x

    def run(*args: Value) -> Outcome:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return op(*(cast(x, dtype) for x in args[:activations]), *args[activations:])

    return run
