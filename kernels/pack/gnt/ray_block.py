"""The weights of a ray block, in the panels that kernels read: norms are folded into the layers behind them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Layout(NamedTuple):
    """Where queries, keys and values of a sample lie in a row, in floats.

    Attributes:
        lanes: of the vectors that run over a head's values.
        head: floats from a head's values to the next head's.
        keys, values, end: where keys begin, where values begin, and the whole row.
    """

    lanes: int
    head: int
    keys: int
    values: int
    end: int


def padded(count: int, lanes: int) -> int:
    """`count` floats rounded up to whole vectors."""
    return -(-count // lanes) * lanes


def layout_of(vector: int, width: int, heads: int) -> Layout:
    """Where queries, keys and values lie for vectors of `vector` floats."""
    lanes = min(vector, max(4, 1 << (width // heads - 1).bit_length()))
    head = -(-(width // heads) // lanes) * lanes
    wide = padded(width, vector)
    return Layout(lanes, head, wide, 2 * wide, 2 * wide + padded(heads * head, vector))


class Panels(NamedTuple):
    """The weights as the function reads them: inputs down, outputs across, padded to whole vectors.

    Attributes:
        projections: [C, end] to queries, keys and values (see `_Layout`); projection_bias: [end].
        out: [C, C]; out_bias: [C].
        first: [C * D]; first_bias: [D]. second: [D * C]; second_bias: [C]. Without a perceptron D is 0.
    """

    projections: Tensor
    projection_bias: Tensor
    out: Tensor
    out_bias: Tensor
    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor


def panels(weights: list[Tensor], biases: list[Tensor | None], heads: int, lanes: int) -> Panels:
    """What the kernel reads, for vectors of `lanes` floats."""
    width = weights[0].shape[0]
    layout = layout_of(lanes, width, heads)

    def affine(number: int, norm: int | None = None) -> tuple[Tensor, Tensor]:
        """Weight [inputs, outputs] and bias of a layer, with the norm in front of it taken in."""
        weight, bias = weights[number].detach().double(), biases[number]
        bias = torch.zeros(weight.shape[0]).double() if bias is None else bias.detach().double()
        if norm is not None:
            shift = biases[norm]
            bias = bias if shift is None else bias + weight @ shift.detach().double()
            weight = weight * weights[norm].detach().double()
        return weight.mT, bias

    def filled(x: Tensor, columns: int) -> Tensor:
        return F.pad(x, (0, columns - x.shape[-1]))

    q, k, v = (affine(number, norm=0) for number in (1, 2, 3))
    joined = []
    for part in (0, 1):
        by_head = filled(v[part].unflatten(-1, (heads, -1)), layout.head).flatten(-2)
        whole = (filled(q[part], layout.keys), filled(k[part], layout.keys))
        joined.append(torch.cat([*whole, filled(by_head, layout.end - layout.values)], dim=-1))
    panels = [*joined, *(filled(part, layout.keys) for part in affine(4))]
    if len(weights) > 5:
        hidden = weights[6].shape[0]
        weight, bias = (filled(part, padded(hidden, lanes)) for part in affine(6, norm=5))
        panels += [weight.flatten(), bias]
        weight, bias = (filled(part, layout.keys) for part in affine(7))
        panels += [weight.flatten(), bias]
    else:
        none = panels[-1].new_empty(0)
        panels += [none, none, none, panels[-1]]
    return Panels(*(panel.float().contiguous() for panel in panels))
