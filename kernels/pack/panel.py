"""Panels: weights with inputs as rows and outputs as columns, padded to whole vectors, as kernels read them.

A kernel's panels are a named tuple of float32 tensors, made by one function from weights and biases. They depend on the
vector length: that of this CPU's kernels, and one float on other devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.runtime.targets import current

# Floats in a vector, of any target.
_LANES = (1, 4, 8, 16)


def lanes_on(device: torch.device) -> int:
    """Floats in a vector of the kernels for a device."""
    return current().lanes if device.type == "cpu" else 1


def padded(count: int, lanes: int) -> int:
    """`count` floats rounded up to whole vectors."""
    return -(-count // lanes) * lanes


def filled(x: Tensor, columns: int) -> Tensor:
    """x with zeros after its last column, up to this many columns: [*, C] to [*, count]."""
    return F.pad(x, (0, columns - x.shape[-1]))


def across(*weights: Tensor, lanes: int) -> Tensor:
    """Weights [outputs, inputs] of several layers as one [inputs, all outputs], each layer padded to whole vectors."""
    return torch.cat([filled(weight.mT, padded(weight.shape[0], lanes)) for weight in weights], dim=1)


def row(bias: Tensor, lanes: int) -> Tensor:
    """A bias [outputs], padded to whole vectors."""
    return filled(bias, padded(bias.shape[0], lanes))


def stored(panel: Tensor) -> Tensor:
    """A tensor as kernels read it: float32, contiguous, and without a gradient."""
    return panel.detach().float().contiguous()


Sizes = Callable[[int], Sequence[tuple[int, ...]]]
"""The shapes of a kernel's panels, for a vector length in floats."""


def lanes_of(op: str, panels: Sequence[Tensor], sizes: Sizes) -> int:
    """Floats in the vectors that panels are packed for. If several lengths fit, that of the panels' device.

    Raises:
        UserError: if the panels do not fit the other arguments of the op for any vector length.
    """
    shapes = [tuple(panel.shape) for panel in panels]
    own = lanes_on(panels[0].device) if panels else 1
    for lanes in (own, *_LANES):
        if shapes == list(sizes(lanes)) and all(panel.dtype == torch.float32 for panel in panels):
            return lanes
    expected, found = ([list(shape) for shape in some] for some in (sizes(own), shapes))
    raise UserError(f"{op} takes float32 panels {expected} beside its other arguments, not {found}")
