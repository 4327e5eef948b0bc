"""What a GNT's parts hand to fused kernels in inference: their weights as plain tensors.

A kernel sees weights, not layers, so it may stand in for layers only while these do nothing but multiply and add: a
mixture of experts, a layer with hooks that want to see its input, or a class of someone else's runs as it is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from shiftadd3d.nn import AddAttention, PackedShiftLinear, ShiftLinear, SignBinarizer, TokenConv
from shiftadd3d.nn.mlp import has_hooks


def weights_and_biases(layers: Sequence[nn.Module]) -> tuple[list[Tensor], list[Tensor | None]] | None:
    """The float weight and the bias of each layer, or None if one of them is more than a linear layer or a norm."""
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    for layer in layers:
        if type(layer) is nn.Linear or type(layer) is nn.LayerNorm:
            weights.append(layer.weight)
        elif type(layer) is ShiftLinear or type(layer) is PackedShiftLinear:
            weights.append(layer.quantized_weight())
        else:
            return None
        biases.append(layer.bias)
    return weights, biases


def codes_and_convolution(attention: AddAttention) -> tuple[str, Tensor | None] | None:
    """Kind of the codes, and kernels [heads, taps] of the convolution on the values if there is one.

    None if the attention takes other codes than signs, or convolves otherwise than along the sequence.
    """
    conv, query_code, key_code = attention.dwconv, attention.q_code, attention.k_code
    if type(query_code) is not SignBinarizer or not (key_code is None or type(key_code) is SignBinarizer):
        return None
    if key_code is not None and key_code.codes != query_code.codes:
        return None
    if conv is not None and type(conv) is not TokenConv:
        return None
    return query_code.codes, None if conv is None else conv.weight.flatten(1)


def is_free(blocks: Iterable[nn.Module]) -> bool:
    """Whether none of these is training, and nobody watches or changes what goes into and comes out of their parts."""
    if torch.nn.modules.module._has_any_global_hook():
        return False
    return not any(part.training or has_hooks(part) for block in blocks for part in block.modules())
