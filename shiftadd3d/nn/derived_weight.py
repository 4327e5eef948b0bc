"""The `weight` of a layer that does not store one.

Code that expects the ordinary layer can read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shiftadd3d._errors import UserError

# Answered from what is known without the values. A getter of a property has no name of its own: its object counts.
_ABOUT_STORAGE = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu")
} | {
    getattr(Tensor, name).__get__ for name in ("is_meta", "is_sparse", "is_quantized", "is_leaf", "itemsize", "nbytes")
}
_ABOUT_STORAGE |= {getattr(Tensor, name) for name in ("size", "dim", "ndimension", "numel", "nelement", "element_size")}
_ABOUT_STORAGE |= {Tensor.is_floating_point, Tensor.is_complex, Tensor.stride, Tensor.__len__}
_GET_REQUIRES_GRAD, _SET_REQUIRES_GRAD = Tensor.requires_grad.__get__, Tensor.requires_grad.__set__  # type: ignore[attr-defined]


class DerivedWeight(Tensor):
    """A tensor without storage. Shape, dtype and device are known, and values are computed at every read.

    Results of computing with it are ordinary tensors, with a gradient if the values have one. Like itself, its views
    are read-only: writing raises `UserError`.

    Args:
        values: makes the ordinary tensor.
        refusal: text of the error for writing.
        requires_grad: whether the values have a gradient.
    """

    _values: Callable[[], Tensor]
    _refusal: str
    _has_grad: bool

    @staticmethod
    def __new__(
        cls,
        values: Callable[[], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        refusal: str,
        requires_grad: bool = False,
    ) -> DerivedWeight:
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight._values, weight._refusal, weight._has_grad = values, refusal, requires_grad
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT_STORAGE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _GET_REQUIRES_GRAD:
            return args[0]._has_grad
        if func in (_SET_REQUIRES_GRAD, Tensor.requires_grad_) and _asked(args, kwargs) == args[0]._has_grad:
            return args[0]
        for written in _written(getattr(func, "__name__", ""), args, kwargs):
            raise UserError(written._refusal)
        return _computed(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Code below torch's Python functions, in C++.
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for written in _among(value):
                    raise UserError(written._refusal)
        return _computed(func, args, kwargs)


class WithoutWeight(nn.Module):
    """A layer whose `weight` can only be read (see `_derived_weight`), and is not in the state dict."""

    _read_only: tuple[str, ...] = ("weight",)

    def _derived_weight(self) -> Tensor:
        """The weight; raises `AttributeError` in a layer that stands for nothing with a weight."""
        raise NotImplementedError

    def _refusal(self) -> str:
        """Why it cannot be written, and what can."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        return self._derived_weight()

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise UserError(self._refusal())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in self._read_only:
            raise UserError(self._refusal())
        super().register_parameter(name, param)


def derived_weight(
    values: Callable[[], Tensor], like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, refusal: str
) -> Tensor:
    """A `DerivedWeight` on the device of `like`, with a gradient if `like` has one.

    Tracers, which follow operations, get the values themselves.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return values()
    return DerivedWeight(values, shape, dtype, like.device, refusal, like.requires_grad)


def _among(value: Any) -> Iterator[DerivedWeight]:
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, DerivedWeight))


_IN_PLACE = {"__setitem__", "__set__"} | {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}


def _written(name: str, args: Any, kwargs: Any) -> Iterator[DerivedWeight]:
    """What a function of this name would write into: its first argument, or `out`."""
    if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace"):
        yield from _among(next(iter((*args, *kwargs.values()))))
    yield from _among(kwargs.get("out"))


def _asked(args: Any, kwargs: Any) -> bool:
    return bool(args[1] if len(args) > 1 else kwargs.get("requires_grad", True))


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """The outcome for the values; views of them are as read-only as they are."""
    known: dict[int, Tensor] = {}
    refusal = ""

    def values(leaf: Any) -> Any:
        nonlocal refusal
        if not isinstance(leaf, DerivedWeight):
            return leaf
        if id(leaf) not in known:
            known[id(leaf)], refusal = leaf._values(), leaf._refusal
        return known[id(leaf)]

    args, kwargs = pytree.tree_map(values, (args, kwargs))
    outcome = func(*args, **kwargs)
    if not known:
        return outcome
    stored = {_address(value) for value in known.values()} - {None}

    def guarded(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, DerivedWeight) or _address(leaf) not in stored:
            return leaf
        return DerivedWeight(lambda: leaf, tuple(leaf.shape), leaf.dtype, leaf.device, refusal, leaf.requires_grad)

    return pytree.tree_map(guarded, outcome)


def _address(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # within transformations of functions tensors have none
        return None
