"""Linear layers in the form that programs of whole networks read: as codes or as panels.

Layers with one input become one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.pack.panel import filled, padded, stored

_LEAST_PEAK = 2.0**-64  # so that it has a reciprocal

MOST_WEIGHT = 2047
"""The integer that stands for the largest magnitude of an output's ordinary weights."""


class Format(NamedTuple):
    """How weights are stored: bits and terms of the codes of powers of two; 0 and 0 are ordinary weights."""

    bits: int
    terms: int


class LinearWeights(NamedTuple):
    """A linear layer as the functions of a program take it.

    Attributes:
        weight: codes [terms, outputs, bytes] of powers of two, or panels [panels, inputs, columns] of ordinary weights.
        offset: of the codes [terms, outputs]; of ordinary weights the largest magnitude of each output's [outputs].
        bias: [outputs] float32.
        inputs: their number.
        bits, terms: of the codes; 0 of ordinary weights.
        words: ordinary weights as 16-bit integers, two inputs to an int32 [panels, pairs of inputs, columns]; empty if
            no product is of integers; None of codes.
    """

    weight: Tensor
    offset: Tensor
    bias: Tensor
    inputs: int
    bits: int
    terms: int
    words: Tensor | None = None

    @property
    def outputs(self) -> int:
        return self.bias.shape[0]

    @property
    def format(self) -> Format:
        return Format(self.bits, self.terms)


def shifts(codes: Tensor, offset: Tensor, bias: Tensor | None, inputs: int, bits: int) -> LinearWeights:
    """A layer of powers of two."""
    bias = _bias(bias, codes.shape[1], codes)
    return LinearWeights(codes.contiguous(), offset.contiguous(), bias, inputs, bits, codes.shape[0])


def ordinary(weight: Tensor, bias: Tensor | None, columns: int, *, integers: bool = False) -> LinearWeights:
    """A layer of ordinary weights [outputs, inputs], in panels of `columns` outputs. The last panel is filled with
    zeros.

    Args:
        integers: whether to keep them as integers, too.
    """
    outputs, inputs = weight.shape
    panels = filled(weight.mT, padded(outputs, columns)).unflatten(1, (-1, columns)).transpose(0, 1)
    peaks = stored(weight.abs().amax(1).clamp(min=_LEAST_PEAK))
    if integers:
        whole = (weight.float() * (MOST_WEIGHT / peaks).unsqueeze(1)).round().to(torch.int32)
        pairs = F.pad(whole, (0, inputs % 2, 0, -outputs % columns)).unflatten(1, (-1, 2))
        words = (pairs[..., 0] & 0xFFFF) | (pairs[..., 1] << 16)  # [padded outputs, pairs]
        words = words.mT.unflatten(1, (-1, columns)).transpose(0, 1).contiguous()
    else:
        words = torch.empty(0, 1, columns, dtype=torch.int32, device=weight.device)
    return LinearWeights(stored(panels), peaks, _bias(bias, outputs, weight), inputs, 0, 0, words)


def code_panels(layer: LinearWeights, lanes: int) -> Tensor:
    """Codes of 4 bits and one term, in the order in which a product takes weights: [panels, words, 4 * lanes] uint8.

    A panel has the codes of 2 * lanes outputs, and each of its words those of four inputs. Byte 4 c + i has output c's
    of the word's input i in its lower half, and output lanes + c's in its upper half. Behind the last output and the
    last input are zeros.
    """
    halves = torch.stack([layer.weight[0] & 15, layer.weight[0] >> 4], -1).flatten(1)[:, : layer.inputs]
    rows, columns = padded(layer.outputs, 2 * lanes), padded(layer.inputs, 4)
    codes = F.pad(halves, (0, columns - layer.inputs, 0, rows - layer.outputs))
    low, high = codes.view(-1, 2, lanes, columns // 4, 4).permute(1, 0, 3, 2, 4)
    return (low | high << 4).flatten(2).contiguous()


def side_by_side(layers: Sequence[LinearWeights]) -> LinearWeights:
    """Layers of powers of two in one format that take the same inputs, as one with the outputs of all."""
    first = layers[0]
    weight = torch.cat([layer.weight for layer in layers], 1)
    offset = torch.cat([layer.offset for layer in layers], 1)
    return first._replace(weight=weight, offset=offset, bias=torch.cat([layer.bias for layer in layers]))


def _bias(bias: Tensor | None, outputs: int, like: Tensor) -> Tensor:
    return torch.zeros(outputs, device=like.device) if bias is None else stored(bias)
