"""Trials of the functions of programs: random layers and norms, a call, and what an outcome may be off by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.forms import Form, error_bound, tile_shape
from shiftadd3d.kernels.cpu.trials import Draw
from shiftadd3d.kernels.pack.whole import Format, LinearWeights, ordinary, shifts
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.kernel import Compiled


def outcome_of(
    function: Compiled, given: Sequence[Tensor], *shape: int, threads: int = 2, others: Sequence[Tensor] = ()
) -> Tensor:
    """What a compiled function makes of tensors: float32 of a shape. Outcomes before that one go into `others`."""
    control, y = torch.tensor([0, threads], dtype=torch.int32), torch.empty(shape)
    function(*given, control, *others, y)
    assert control[0] == 0, "it found an activation that it cannot express"
    return y


class RandomNorm:
    """A layer norm; without an epsilon, none.

    Attributes:
        tensors: its weight and bias, or nothing.
    """

    def __init__(self, draw: Draw, width: int, eps: float | None) -> None:
        self._width, self._eps = width, eps
        self.tensors = [draw.normal(width) + 1, draw.normal(width)] if eps is not None else []

    def __call__(self, x: Tensor) -> Tensor:
        if self._eps is None:
            return x
        gain, shift = self.tensors
        return F.layer_norm(x, (self._width,), gain, shift, self._eps)


def random_layer(draw: Draw, inputs: int, outputs: int, weights: Format) -> tuple[LinearWeights, Tensor]:
    """A layer with weights in a format, and its weight [outputs, inputs]."""
    if not weights.terms:
        weight, columns = draw.normal(outputs, inputs) / inputs**0.5, tile_shape(targets.current(), "float32")[1]
        return ordinary(weight, draw.normal(outputs), columns, integers=True), weight
    layer = draw.layer(inputs, outputs, *weights)
    return shifts(layer.codes, layer.offset, layer.bias, inputs, weights.bits), layer.decoded


def error_of(form: Form, bits: int, x: Tensor, weight: Tensor) -> Tensor:
    """What outputs of a product may be off by: the form's error, and that of sums in float32."""
    size = x.abs() @ weight.abs().T
    return error_bound(form, bits) * x.abs().amax(-1, keepdim=True) * weight.abs().sum(-1) + size * 1e-6
