"""How far rounding may take a result from its float64 reference, on any CPU and in any order of summation.

Tests hold what was computed in float32 to float64 and to one of these bounds. They follow from the arithmetic alone, so
that they hold however a library splits its sums among vectors, blocks and threads; a term left out of a sum, or a
weight that is wrong, is off by a thousand times as much. Equality bit for bit is for values that nothing has summed up,
and for the same operations on the same shapes.

Source: Higham, Accuracy and Stability of Numerical Algorithms (2nd ed., 2002), sections 2.2 and 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def unit_roundoff(dtype: torch.dtype = torch.float32) -> float:
    """What one rounding may change a number by, as a share of it: u, half a unit in the last place of 1."""
    return torch.finfo(dtype).eps / 2


def sum_bound(terms: int, size: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor | float:
    """What a sum of products may be off by: ``n u / (1 - n u)`` of the sum of their magnitudes.

    Args:
        terms: how many products are summed up, n; each further rounding of the outcome counts as one more.
        size: sum of the magnitudes of the products.
        dtype: that products and sums are rounded to.
    """
    share = terms * unit_roundoff(dtype)
    assert share < 0.1, f"{terms} terms are too many for {dtype}"
    return share / (1 - share) * size


def linear_bound(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """What ``F.linear(x, weight, bias)`` may be off by, an outcome at a time: [*, outputs] float64."""
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        size = size + bias.double().abs()
    return torch.as_tensor(sum_bound(weight.shape[-1] + 1, size, dtype))


def network_bound(model: nn.Module, size: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """What a network of layers one after the other may be off by, to first order, where its numbers are about `size`.

    Blocks normalise what they take in, so that shares of error add up and do not multiply: it is the bound of a single
    sum over the inputs of all layers.
    """
    terms = sum(
        weight[0].numel()
        for module in model.modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.dim() > 1
    )
    return float(sum_bound(terms, size, dtype))


def assert_within(found: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """Fail where `found` is off from the float64 reference by more than `bound`.

    Raises:
        AssertionError: it says how many bounds the worst outcome is off by.
    """
    assert exact.dtype == torch.float64, f"the reference is {exact.dtype}, no better than what it judges"
    assert found.shape == exact.shape, f"{list(found.shape)} is not {list(exact.shape)}"
    error = (found.double() - exact).abs()
    bound = torch.as_tensor(bound, dtype=torch.float64).broadcast_to(error.shape)
    wrong = ~(error <= bound)  # NaN is wrong, too
    if wrong.any():
        worst = (error / bound)[wrong].max().item()
        raise AssertionError(f"{int(wrong.sum())} of {wrong.numel()} are off, by up to {worst:.3g} times the bound")
