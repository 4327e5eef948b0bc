"""The mixture of experts: each token runs only through the expert with its largest logit.

Experts are chains of linear layers with an activation function between them. Weights are ordinary ones or powers of two
({Mult, Shift} in the paper).

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.reference import activations
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.arguments import takes
from shiftadd3d.kernels.reference.matshift import matshift_twin

TENSORS_OF_LAYER = 3
"""Weight or codes, offset (None for a weight), bias."""


class MoeMlp(NamedTuple):
    """A mixture of perceptrons that sends each token to the expert with the largest logit.

    Gives the outcome, and the number of each token's expert; the first of equal logits wins. Runs compiled code on CPUs
    in float32 and bfloat16, on CUDA GPUs in these and float16 (see `shiftadd3d.kernels.cuda.moe`), and `moe_mlp_twin`
    everywhere else. Raises `UserError` if shapes, dtypes or names do not fit together.

    Attributes:
        x: tokens, any leading shape.
        logits: of the router, floating point.
        layers: three tensors for each layer, expert by expert: ``weight [outputs, inputs], None, bias`` of an ordinary
            one, ``codes, offset, bias`` of one with powers of two, as `matshift` takes them. A bias may be None.
        depth: how many layers an expert has.
        bits: bits of one code, 2 to 6, in all layers.
        activation: between the layers of an expert, one of ``"none"``, ``"relu"``, ``"gelu"`` (with erf).
        gated: multiply each outcome by the softmax of the chosen logit.
    """

    x: Tensor  # [*, inputs]
    logits: Tensor  # [*, E]
    layers: list[Tensor | None]
    depth: int = 2
    bits: int = 4
    activation: Activation = "gelu"
    gated: bool = False


@takes(MoeMlp)
def moe_mlp_twin(given: MoeMlp) -> tuple[Tensor, Tensor]:
    """What `moe_mlp` computes, in plain torch."""
    x, logits, layers, depth, bits, activation, gated = given
    listed = layers_of_experts(layers)
    experts = [listed[i : i + depth] for i in range(0, len(listed), depth)]
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
                hidden = activations.apply(between, F.linear(hidden, weight.to(x.dtype), bias))
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
    parts = (layers[i::TENSORS_OF_LAYER] for i in range(TENSORS_OF_LAYER))
    return [ExpertLayer(*layer) for layer in zip(*parts, strict=True)]


def width_of(layer: ExpertLayer) -> int:
    """Outputs of a layer."""
    return layer.weight.shape[0 if layer.offset is None else 1]


def outputs_of(layers: Sequence[Tensor | None]) -> int:
    return width_of(layers_of_experts(layers)[-1])
