"""Small random problems on which compiled code is tried before it is used, and the tolerance of its outcome."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.reference.matadd import pack_signs


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
    """Random numbers from one seed."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: str = "float32") -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(getattr(torch, dtype))

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def signs(self, storage: str, *shape: int) -> Tensor:
        """Features of a dtype, or of ``"uint8"`` their signs, packed."""
        return pack_signs(self.normal(*shape)) if storage == "uint8" else self.normal(*shape, dtype=storage)

    def weights(self, sizes: Iterable[tuple[int, ...]]) -> list[Tensor]:
        """Ordinary weights [outputs, inputs] of layers that keep numbers at about the size they have."""
        return [self.normal(*size) / size[1] ** 0.5 for size in sizes]

    def layer(self, inputs: int, outputs: int, bits: int, terms: int, *, far_apart: bool = False) -> RandomLayer:
        """A layer of shifts, its channels' exponents `far_apart` or alike."""
        weight = self.normal(outputs, inputs)
        apart = torch.exp2(torch.arange(outputs) % 16 - 10.0)[:, None]
        weight = weight * apart if far_apart else weight / inputs**0.5
        codes, offset, _ = power_of_two.encode(weight, bits, terms)
        decoded = power_of_two.decode(codes, offset, bits)
        gain = float(decoded.abs().sum(-1).max())
        return RandomLayer(weight, power_of_two.pack(codes, bits), offset, decoded, self.normal(outputs), gain)


def assert_close(found: Tensor | None, expected: Tensor) -> None:
    """Raise `AssertionError` unless sums of some dozens of numbers are there, and right but for rounding."""
    assert found is not None
    rtol, atol = (1e-5, 1e-4) if found.dtype == torch.float32 else (1e-2, 1e-2)
    torch.testing.assert_close(found.cpu(), expected.to(found.dtype), rtol=rtol, atol=atol)
