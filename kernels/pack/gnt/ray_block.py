"""The weights of a ray block, in the panels that kernels read: norms are folded into the layers behind them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.pack.panel import filled, lanes_of, padded, stored
from shiftadd3d.kernels.pack.shift import WholeWeights, across
from shiftadd3d.kernels.reference.arguments import takes
from shiftadd3d.kernels.reference.gnt.ray_block import Attention, ray_block_twin


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


def layout_of(vector: int, width: int, heads: int) -> Layout:
    """Where queries, keys and values lie for vectors of `vector` floats."""
    lanes = min(vector, max(4, 1 << (width // heads - 1).bit_length()))
    head = -(-(width // heads) // lanes) * lanes
    wide = padded(width, vector)
    return Layout(lanes, head, wide, 2 * wide, 2 * wide + padded(heads * head, vector))


class Panels(NamedTuple):
    """The weights as the function reads them: inputs down, outputs across, padded to whole vectors.

    Attributes:
        projections: [C, end] to queries, keys and values (see `Layout`); projection_bias: [end].
        out: [C, C]; out_bias: [C].
        first: [C * D]; first_bias: [D]. second: [D * C]; second_bias: [C]. Without a perceptron D is 0.
        conv: [heads * kernel], of the convolution on the values; empty without one.
    """

    projections: Tensor
    projection_bias: Tensor
    out: Tensor
    out_bias: Tensor
    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    conv: Tensor


def panels(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], conv: Tensor | None, heads: int, lanes: int
) -> Panels:
    """The panels of weights, biases and convolution as `ray_block_twin` takes them.

    Raises:
        UserError: if the convolution is not of an odd length, for each head.
    """
    if conv is not None and (conv.dim() != 2 or conv.shape[0] != heads or conv.shape[1] % 2 == 0):
        raise UserError(f"conv must be [{heads}, an odd number], not {list(conv.shape)}")
    width = weights[0].shape[0]
    layout = layout_of(lanes, width, heads)

    def affine(number: int, norm: int | None = None) -> tuple[Tensor, Tensor]:
        """Weight [inputs, outputs] and bias of a layer, with the norm in front of it taken in."""
        weight, bias = weights[number].detach().double(), biases[number]
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().double()
        if norm is not None:
            shift = biases[norm]
            bias = bias if shift is None else bias + weight @ shift.detach().double()
            weight = weight * weights[norm].detach().double()
        return weight.mT, bias

    q, k, v = (affine(number, norm=0) for number in (1, 2, 3))
    joined: list[Tensor] = []
    for part in (0, 1):
        by_head = filled(v[part].unflatten(-1, (heads, -1)), layout.head).flatten(-2)
        whole = (filled(q[part], layout.keys), filled(k[part], layout.keys))
        joined.append(torch.cat([*whole, filled(by_head, layout.end - layout.values)], dim=-1))
    packed = [*joined, *(filled(part, layout.keys) for part in affine(4))]
    none = packed[-1].new_empty(0)
    if len(weights) > 5:
        hidden = weights[6].shape[0]
        weight, bias = (filled(part, padded(hidden, lanes)) for part in affine(6, norm=5))
        packed += [weight.flatten(), bias]
        weight, bias = (filled(part, layout.keys) for part in affine(7))
        packed += [weight.flatten(), bias]
    else:
        packed += [none, none, none, packed[-1]]
    return Panels(*map(stored, (*packed, none if conv is None else conv.flatten())))


def shift_layers(
    norms: Sequence[Tensor], layers: Sequence[WholeWeights], heads: int, lanes: int
) -> tuple[Tensor, dict[str, WholeWeights]] | None:
    """What panels of integers hold, and the norms' weights [1 or 2, C], which have to stay apart.

    Args:
        norms: weights of the norm, and of the perceptron's norm where there is one.
        layers: q, k, v, out, and the perceptron's first and second layers.

    Returns:
        Projections (see `Layout`), out, first and second; None where heads are not whole vectors of their own.
    """
    q, k, v, out, *perceptron = layers
    width = q.integers.shape[1]
    layout = layout_of(lanes, width, heads)
    if layout.head * heads != width:
        return None
    named = {"projections": across(q, k, v, lanes=lanes), "out": across(out, lanes=lanes)}
    named |= {name: across(layer, lanes=lanes) for name, layer in zip(("first", "second"), perceptron, strict=False)}
    return stored(torch.stack([norm.detach() for norm in norms])), named


def shift_sizes(width: int, hidden: int, layout: Layout) -> list[tuple[int, int]]:
    """Inputs and outputs of the same; hidden units are whole vectors, or there are no such panels."""
    attention = [(width, layout.end), (width, layout.keys)]
    return attention + ([(width, hidden), (hidden, layout.keys)] if hidden else [])


def hidden_and_kernel(panels: Sequence[Tensor], heads: int) -> tuple[int, int]:
    """The perceptron's hidden units and the convolution's length, 0 where there is none."""
    return panels[6].numel() // panels[7].numel(), panels[8].numel() // heads


def sizes(lanes: int, width: int, heads: int, hidden: int, kernel: int) -> list[tuple[int, ...]]:
    """The shapes of the panels; `hidden` and `kernel` are 0 without a perceptron and without a convolution."""
    layout, deep = layout_of(lanes, width, heads), padded(hidden, lanes)
    wide = layout.keys
    attention = [(width, layout.end), (layout.end,), (width, wide), (wide,)]
    return [*attention, (width * deep,), (deep,), (hidden * wide,), (wide,), (heads * kernel,)]


def check_panels(panels: Sequence[Tensor], width: int, heads: int) -> int:
    """`lanes_of` the panels of a block with this many channels and heads."""
    hidden, kernel = hidden_and_kernel(panels, heads)
    of_lanes = partial(sizes, width=width, heads=heads, hidden=hidden, kernel=kernel)
    return lanes_of("ray_block", panels[: len(Panels._fields)], of_lanes)


class RayBlock(NamedTuple):
    """A transformer block along rays: see `shiftadd3d.kernels.reference.gnt.ray_block`.

    A kernel runs on CPUs in float32 and bfloat16 (computed in float32), and plain torch in all other cases. The outcome
    is [R, S, C], and how the first sample of each ray attends, [R, S], empty unless `return_weights`. Inference only.
    Raises `UserError` if shapes or names do not fit each other.

    Attributes:
        x: features of samples.
        panels: `Panels`. The weights of norms and panels of integers may follow (`shift_layers`).
        num_heads: heads of the attention.
        attention: one of ``"softmax"``, ``"pm1"``, ``"01"``.
        eps: epsilon of the norms.
        return_weights: whether the second outcome is wanted.
    """

    x: Tensor  # [R, S, C]
    panels: list[Tensor]
    num_heads: int
    attention: Attention
    eps: float
    return_weights: bool


@takes(RayBlock)
def ray_block_of_panels(given: RayBlock) -> tuple[Tensor, Tensor]:
    """The twin with the weights of panels, and with norms without weight and bias. It runs where no kernel serves."""
    x, panels, num_heads, attention, eps, return_weights = given
    width = x.shape[-1]
    layout = layout_of(check_panels(panels, width, num_heads), width, num_heads)
    hidden, kernel = hidden_and_kernel(panels, num_heads)
    ordinary = panels[: len(Panels._fields)]
    projections, projection_bias, out, out_bias, first, first_bias, second, second_bias, conv = ordinary

    def projected(part: Tensor) -> list[Tensor]:
        """Queries', keys' and values' columns [*, C] each."""
        values = part[..., layout.values : layout.values + num_heads * layout.head]
        values = values.unflatten(-1, (num_heads, -1))[..., : width // num_heads].flatten(-2)
        return [part[..., :width], part[..., layout.keys : layout.keys + width], values]

    ones = projections.new_ones(width)
    weights = [ones, *(weight.mT for weight in projected(projections)), out[:, :width].mT]
    biases = [None, *projected(projection_bias), out_bias[:width]]
    if hidden:
        weights += [ones, first.view(width, -1)[:, :hidden].mT, second.view(hidden, -1)[:, :width].mT]
        biases += [None, first_bias[:hidden], second_bias[:width]]
    taps = conv.view(num_heads, kernel) if kernel else None
    return ray_block_twin(x, weights, biases, taps, num_heads, attention, eps, return_weights)
