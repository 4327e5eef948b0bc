"""The weights of view attention, in the panels that kernels read.

What the sum needs of a view is linear in (x_v, relu(...)), so that products of weights are taken once: ``W_v W_k``,
``A_1 W_k``, ``A_1 P_2`` and ``A_1 W_q`` (in float64, rounded to float32), which saves nearly half of the
multiplications; ``a_2``, the same for all views, drops out of the softmax.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Panels(NamedTuple):
    """The weights as the function reads them: inputs down, outputs across, each group padded to whole vectors.

    Attributes:
        row: [C + H, C + H], from a view's (x, relu of its ray difference) to (what is summed, score's hidden layer).
        row_bias: [C + H].
        position: [5, H], weights of the four ray differences, then the bias.
        query: [C, H], the query's part of the scores' hidden layer, negative.
        query_bias: [H].
        score: [H, C].
        out: [C, C].
        out_bias: [C].
    """

    row: Tensor
    row_bias: Tensor
    position: Tensor
    query: Tensor
    query_bias: Tensor
    score: Tensor
    out: Tensor
    out_bias: Tensor


def panels(weights: list[Tensor], biases: list[Tensor], lanes: int) -> Panels:
    w_q, w_k, w_v, w_p1, w_p2, w_a1, w_a2, w_o = (weight.detach().double() for weight in weights)
    b_p1, b_p2, b_a1, _, b_o = (bias.detach().double() for bias in biases)

    def across(*groups: Tensor) -> Tensor:
        """[outputs, inputs] each, to [inputs, outputs of all]."""
        return torch.cat([F.pad(group.mT, (0, -group.shape[0] % lanes)) for group in groups], dim=1)

    def row(bias: Tensor) -> Tensor:
        return F.pad(bias, (0, -bias.shape[0] % lanes))

    panels = Panels(
        row=torch.cat([across(w_v @ w_k, w_a1 @ w_k), across(w_p2, w_a1 @ w_p2)]),
        row_bias=torch.cat([row(b_p2), row(torch.zeros_like(b_a1))]),
        position=torch.cat([across(w_p1), row(b_p1)[None]]),
        query=-across(w_a1 @ w_q),
        query_bias=row(w_a1 @ b_p2 + b_a1),
        score=across(w_a2),
        out=across(w_o),
        out_bias=row(b_o),
    )
    return Panels(*(panel.float().contiguous() for panel in panels))
