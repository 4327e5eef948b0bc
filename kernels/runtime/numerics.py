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
    """What layers ask of kernels now."""
    return _current


def set_numerics(name: Numerics) -> None:
    """Have layers ask this of kernels from now on, in all threads; within a `numerics` block, until it ends.

    Raises:
        UserError: if it is none of `NUMERICS`.
    """
    global _current
    with _lock:
        _asked[-1][0] = _current = check_numerics(name)


@contextlib.contextmanager
def numerics(name: Numerics) -> Iterator[None]:
    """`set_numerics` for the length of a ``with`` block.

    All threads compute alike: of blocks in several threads the one begun last counts for each, until it ends.

    Raises:
        UserError: if `name` is none of `NUMERICS`.
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
    """Whether layers should call an op on these tensors for inference, in place of the plain torch that they are.

    So it is where the op has a kernel for their device, no gradients are wanted, numerics are not ``"twin"``, and
    nothing is recorded for TorchScript or ONNX, which should run where there are no such ops.

    Args:
        op: its name, such as ``"matshift"``.
    """
    if get_numerics() == "twin" or torch.is_grad_enabled() or is_recorded():
        return False
    devices = KERNEL_DEVICES[op]
    return all(tensor.device.type in devices for tensor in tensors)


KERNEL_DEVICES: dict[str, tuple[str, ...]] = {}
"""The types of device that each op has a kernel for, by the op's name; its twin runs on all others."""
