"""Small random problems that compiled code is tried on before it counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.pack.shift import WholeWeights, whole_weights
from shiftadd3d.kernels.reference import power_of_two


class RandomLayer(NamedTuple):
    """A linear layer of shifts.

    Attributes:
        weight: [outputs, inputs], what was encoded.
        codes, offset: packed.
        decoded: [outputs, inputs], what they stand for.
        bias: [outputs].
        gain: the largest sum of magnitudes of an output's weights.
    """

    weight: Tensor
    codes: Tensor
    offset: Tensor
    decoded: Tensor
    bias: Tensor
    gain: float


class Draw:
    """Numbers from one seed."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: str = "float32") -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(getattr(torch, dtype))

    def layer(self, inputs: int, outputs: int, bits: int, terms: int, *, far_apart: bool = False) -> RandomLayer:
        """A layer of shifts, its channels' exponents `far_apart` or alike."""
        weight = self.normal(outputs, inputs)
        weight = weight * torch.exp2(torch.arange(outputs).float() - 8)[:, None] if far_apart else weight / inputs**0.5
        codes, offset, _ = power_of_two.encode(weight, bits, terms)
        decoded = power_of_two.decode(codes, offset, bits)
        gain = float(decoded.abs().sum(-1).max())
        return RandomLayer(weight, power_of_two.pack(codes, bits), offset, decoded, self.normal(outputs), gain)

    def whole(self, inputs: int, outputs: int) -> WholeWeights:
        """A layer of shifts, as panels hold it."""
        layer = self.layer(inputs, outputs, 4, 1)
        whole = whole_weights(layer.codes, layer.offset, 4, inputs)
        assert whole is not None
        return whole


def check_within(found: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Raise `AssertionError` where `found` is off by more than `bound`."""
    worst = ((found.float() - expected).abs() - bound).max().item()
    assert worst <= 0, f"it is off by {worst:.2g} more than it may be"
