"""The weights of the views' embedding, in the panels that kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from shiftadd3d.kernels.pack.panel import across, padded, row, stored
from shiftadd3d.kernels.reference.arguments import takes
from shiftadd3d.kernels.reference.gnt.view_embedding import view_embedding_twin


class Panels(NamedTuple):
    """Weights [inputs, outputs] and biases, the outputs padded to whole vectors. Without moments the fifth is empty."""

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    moments: Tensor
    moments_bias: Tensor


def panels(weights: Sequence[Tensor], biases: Sequence[Tensor], lanes: int) -> Panels:
    """The panels of weights and biases as `view_embedding_twin` takes them."""
    pairs = [(across(weight, lanes=lanes), row(bias, lanes)) for weight, bias in zip(weights, biases, strict=True)]
    if len(pairs) < 3:
        pairs.append((pairs[1][0].new_empty(0), pairs[1][1]))
    (first, first_bias), (second, second_bias), (moments, moments_bias) = pairs
    return Panels(*map(stored, (first, first_bias, second, second_bias, moments.flatten(), moments_bias)))


def sizes(lanes: int, inputs: int, hidden: int, width: int, with_moments: bool) -> list[tuple[int, ...]]:
    """The shapes of the panels for K inputs, D hidden units and C channels."""
    deep, wide, moments = padded(hidden, lanes), padded(width, lanes), 2 * inputs + 1 if with_moments else 0
    return [(inputs, deep), (deep,), (hidden, wide), (wide,), (moments * wide,), (wide,)]


class ViewEmbedding(NamedTuple):
    """Embeddings of what views show, and first queries: see `shiftadd3d.kernels.reference.gnt.view_embedding`.

    A kernel runs on CPUs in float32 for 1 to 32 views, and plain torch in all other cases. The outcome is embeddings
    [*, V, C] and queries [*, C]. Inference only. Raises `UserError` if shapes or dtypes do not fit each other.

    Attributes:
        values: colour and features that each view shows.
        mask: which views see a point.
        panels: `Panels`.
        width: C.
    """

    values: Tensor  # [*, V, K]
    mask: Tensor  # [*, V] bool
    panels: list[Tensor]
    width: int


@takes(ViewEmbedding)
def view_embedding_of_panels(given: ViewEmbedding) -> tuple[Tensor, Tensor]:
    """The twin with the weights of panels. It runs where no kernel serves."""
    values, mask, panels, width = given
    first, first_bias, second, second_bias, moments, moments_bias = panels
    hidden = second.shape[0]
    weights, biases = [first[:, :hidden].mT, second[:, :width].mT], [first_bias[:hidden], second_bias[:width]]
    if moments.numel():
        weights.append(moments.view(-1, moments_bias.shape[0])[:, :width].mT)
        biases.append(moments_bias[:width])
    return view_embedding_twin(values, mask, weights, biases)
