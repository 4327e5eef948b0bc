"""The precision of kernels: one setting for the whole process.

- ``"exact"`` (the default): float32 results differ from the twin's only by the order of summation, and their error
against float64 is no larger than that of torch's own float32 operations.
- ``"fast"``: activations may be rounded to fewer bits first. Each kernel states its bound.
- ``"int8"``: as ``"fast"``. If it is faster, inputs of shift layers may also be rounded to 8-bit integers with a scale
for each token.
- ``"twin"``: no compiled code, only plain torch.

`SHIFTADD3D_NUMERICS` sets the initial value of a process.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.runtime.recording import is_recorded

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


# What holds outside all `with` blocks, then what each block that has not ended asks for, the last one counting.
_asked: list[list[Numerics]] = [[check_numerics(os.environ.get(ENVIRONMENT_VARIABLE) or "exact")]]

# A plain global, so that torch.compile can watch it and compile again when it changes.
_current: Numerics = _asked[0][0]
_lock = threading.Lock()


def get_numerics() -> Numerics:
    """The present numerics."""
    return _current


def set_numerics(name: Numerics) -> None:
    """Set the numerics for all threads. Inside a `numerics` block, this lasts until the end of the block.

    Raises:
        UserError: the name is not in `NUMERICS`.
    """
    global _current
    with _lock:
        _asked[-1][0] = _current = check_numerics(name)


@contextlib.contextmanager
def numerics(name: Numerics) -> Iterator[None]:
    """`set_numerics` for the duration of a ``with`` block.

    All threads have the same numerics. If several threads are in such blocks, the block that began last decides, until
    it ends.

    Raises:
        UserError: `name` is not in `NUMERICS`.
    """
    global _current
    block: list[Numerics] = [check_numerics(name)]
    with _lock:
        _asked.append(block)
        _current = name
    try:
        yield
    finally:
        with _lock:
            # Blocks of other threads may have begun since.
            del _asked[next(i for i, other in enumerate(_asked) if other is block)]
            _current = _asked[-1][0]


def uses_kernels(op: str, *tensors: Tensor) -> bool:
    """Whether layers should call an op on these tensors for inference, instead of running in plain torch.

    This is true if the op has a kernel for their device, no gradients are needed, numerics are not ``"twin"``, and
    nothing is recorded for TorchScript or ONNX, whose programs must run without these ops.

    Args:
        op: name of the op, such as ``"matshift"``.
    """
    if get_numerics() == "twin" or torch.is_grad_enabled() or is_recorded():
        return False
    devices = KERNEL_DEVICES[op]
    return all(tensor.device.type in devices for tensor in tensors)


KERNEL_DEVICES: dict[str, tuple[str, ...]] = {}
"""Device types for which an op has a kernel, by the op's name. Its twin runs on all others."""
