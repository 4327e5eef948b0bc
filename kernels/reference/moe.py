"""The mixture of experts: each token runs through the expert with its largest logit, and through no other.

Experts are chains of linear layers with an activation function between them, of ordinary weights or of powers of two
({Mult, Shift} in the paper).

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.reference import activations
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.matshift import check_arguments, matshift_twin
from shiftadd3d.kernels.runtime.numerics import check_numerics

# Weight or codes, offset (None for a weight), bias.
_TENSORS_OF_LAYER = 3


def moe_mlp_twin(
    x: Tensor,
    logits: Tensor,
    layers: list[Tensor | None],
    depth: int = 2,
    bits: int = 4,
    activation: str = "gelu",
    gated: bool = False,
    numerics: str = "exact",
) -> tuple[Tensor, Tensor]:
    """What `moe_mlp` computes, in plain torch; always exact, `numerics` being there for the op's signature only."""
    experts = check_moe(x, logits, layers, depth, bits, activation, numerics)
    assignment = logits.argmax(-1)
    tokens = x.reshape(assignment.numel(), x.shape[-1])
    out = x.new_zeros(len(tokens), outputs_of(layers))
    for number, expert in enumerate(experts):
        chosen = assignment.flatten() == number
        hidden = tokens[chosen]
        for layer, (weight, offset, bias) in enumerate(expert):
            between = activation if layer + 1 < depth else "none"
            if offset is None:
                bias = bias if bias is None else bias.to(x.dtype)
                hidden = activations.apply(cast(Activation, between), F.linear(hidden, weight.to(x.dtype), bias))
            else:
                hidden = matshift_twin(hidden, weight, offset, bias, bits, between)
        out[chosen] = hidden
    if gated:
        out = out * gates_of(logits).to(x.dtype).unsqueeze(-1)
    return out.view(*x.shape[:-1], out.shape[-1]), assignment


def gates_of(logits: Tensor) -> Tensor:
    """The softmax of the largest logit of each token, [tokens]."""
    return logits.reshape(-1, logits.shape[-1]).softmax(-1).amax(-1)


class ExpertLayer(NamedTuple):
    weight: Tensor  # [outputs, inputs], or codes
    offset: Tensor | None
    bias: Tensor | None


def layers_of_experts(layers: Sequence[Tensor | None]) -> list[ExpertLayer]:
    """The layers of all experts in a row."""
    parts = (layers[i::_TENSORS_OF_LAYER] for i in range(_TENSORS_OF_LAYER))
    return [ExpertLayer(*layer) for layer in zip(*parts, strict=True)]


def width_of(layer: ExpertLayer) -> int:
    """Outputs of a layer."""
    return layer.weight.shape[0 if layer.offset is None else 1]


def outputs_of(layers: Sequence[Tensor | None]) -> int:
    return width_of(layers_of_experts(layers)[-1])


def check_moe(
    x: Tensor,
    logits: Tensor,
    layers: Sequence[Tensor | None],
    depth: int,
    bits: int,
    activation: str,
    numerics: str,
) -> list[list[ExpertLayer]]:
    """The layers, expert by expert.

    Raises:
        UserError: unless all fits together.
    """
    if not x.is_floating_point() or x.ndim == 0:
        raise UserError(f"x must be floating point [*, inputs], not {x.dtype} {list(x.shape)}")
    if logits.ndim == 0 or not logits.is_floating_point() or logits.shape[:-1] != x.shape[:-1]:
        raise UserError(f"logits must be floating point {[*x.shape[:-1], 'E']} beside x, not {list(logits.shape)}")
    number = logits.shape[-1]
    if depth < 1 or number < 1 or len(layers) != _TENSORS_OF_LAYER * depth * number:
        raise UserError(
            f"{number} experts of {depth} layers have {_TENSORS_OF_LAYER * depth * number} tensors, not {len(layers)}"
        )
    if any(weight is None for weight in layers[::_TENSORS_OF_LAYER]):
        raise UserError("every layer of an expert needs a weight or codes")
    listed = layers_of_experts(layers)
    experts = [listed[i : i + depth] for i in range(0, len(listed), depth)]
    for place, expert in enumerate(experts):
        width = x.shape[-1]
        for layer in expert:
            try:
                _check_layer(layer, x.new_empty(0, width), bits, activation, numerics)
            except UserError as error:
                raise UserError(f"expert {place}: {error}") from None
            width = width_of(layer)
        if width != width_of(listed[-1]):
            raise UserError(f"expert {place} has {width} outputs, the last one {width_of(listed[-1])}")
    return experts


def _check_layer(layer: ExpertLayer, x: Tensor, bits: int, activation: str, numerics: str) -> None:
    weight, offset, bias = layer
    if offset is not None:
        check_arguments(x, weight, offset, bias, bits, activation, numerics)
        return
    activations.check_activation(activation)
    check_numerics(numerics)
    if weight.ndim != 2 or not weight.is_floating_point() or weight.shape[1] != x.shape[1]:
        raise UserError(
            f"a weight without an offset must be floating point [outputs, {x.shape[1]}], not {weight.dtype} "
            f"{list(weight.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise UserError(f"bias must be floating point [{weight.shape[0]}], not {bias.dtype} {list(bias.shape)}")
