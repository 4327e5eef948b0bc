"""Small random problems for CPUs."""

from __future__ import annotations

from torch import Tensor

from shiftadd3d.kernels.pack.shift import WholeWeights, whole_weights
from shiftadd3d.kernels.reference import trials


class Draw(trials.Draw):
    """Numbers from one seed, and weights as panels of integers hold them."""

    def whole(self, inputs: int, outputs: int) -> WholeWeights:
        """A layer of shifts, as panels hold it."""
        layer = self.layer(inputs, outputs, 4, 1)
        whole = whole_weights(layer.codes, layer.offset, 4, inputs)
        assert whole is not None
        return whole


def check_within(found: Tensor | None, expected: Tensor, bound: Tensor) -> None:
    """Raise `AssertionError` where `found` is off by more than `bound`, or is not there."""
    assert found is not None, "it found an activation that it cannot express"
    worst = ((found.float() - expected).abs() - bound).max().item()
    assert worst <= 0, f"it is off by {worst:.2g} more than it may be"
