"""How exact the kernels compute: one setting for the whole process.

- ``"exact"`` (the default): float32 results differ from the twin's by the order of summation only, and their error
  against float64 is no larger than that of torch's own float32 operations.
- ``"fast"``: activations may be rounded to fewer bits on the way in. Each kernel states its bound.
- ``"int8"``: as ``"fast"``, and inputs of shift layers may be rounded to 8-bit integers with a scale for each token,
  where that is faster.
- ``"twin"``: no compiled code, plain torch throughout.

`SHIFTADD3D_NUMERICS` sets what a process starts with.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.kernel import KERNEL_DEVICES

Numerics = Literal["exact", "fast", "int8", "twin"]
NUMERICS: tuple[Numerics, ...] = get_args(Numerics)
COMPILED: tuple[Numerics, ...] = NUMERICS[:-1]
ENVIRONMENT_VARIABLE = "SHIFTADD3D_NUMERICS"


def check_numerics(name: str) -> Numerics:
    """Return `name`.

    Raises:
        UserError: if it is none of `NUMERICS`.
    """
    if name not in NUMERICS:
        raise UserError(f"numerics must be one of {', '.join(NUMERICS)}, not {name!r}")
    return cast(Numerics, name)


# A plain global, so that torch.compile can watch it and compile again when it changes.
_current: Numerics = check_numerics(os.environ.get(ENVIRONMENT_VARIABLE) or "exact")


def get_numerics() -> Numerics:
    """What layers ask of kernels now."""
    return _current


def set_numerics(name: Numerics) -> None:
    """Have layers ask this of kernels from now on, in all threads.

    Raises:
        UserError: if it is none of `NUMERICS`.
    """
    global _current
    _current = check_numerics(name)


@contextlib.contextmanager
def numerics(name: Numerics) -> Iterator[None]:
    """`set_numerics` for the length of a ``with`` block.

    Raises:
        UserError: if `name` is none of `NUMERICS`.
    """
    before = get_numerics()
    set_numerics(name)
    try:
        yield
    finally:
        set_numerics(before)


def uses_kernels(op: str, *tensors: Tensor) -> bool:
    """Whether layers should call an op on these tensors for inference, in place of the plain torch that they are.

    So it is where the op has a kernel for their device, no gradients are wanted, and numerics are not ``"twin"``.

    Args:
        op: its name, such as ``"matshift"``.
    """
    if get_numerics() == "twin" or torch.is_grad_enabled():
        return False
    devices = KERNEL_DEVICES[op]
    return all(tensor.device.type in devices for tensor in tensors)
