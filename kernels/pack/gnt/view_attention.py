"""The weights of view attention, in the panels that kernels read.

`shiftadd3d.kernels.reference.gnt.view_attention` has the formulas. Values and scores are linear in ``(x_v, relu(P_1 d_v
+ b_1))`` before the next ReLU. So the products ``W_v W_k``, ``A_1 W_k``, ``A_1 P_2`` and ``A_1 W_q`` are computed once,
in float64, and rounded to float32. This saves nearly half of the multiplications. ``a_2`` is the same for all views and
drops out of the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.pack.panel import across, filled, lanes_of, padded, row, stored
from shiftadd3d.kernels.pack.shift import (
    GRANULE,
    PanelForm,
    WholeWeights,
    in_int16,
    in_pieces,
    panel_form,
    panel_forms,
    shift_panel,
)
from shiftadd3d.kernels.pack.shift import across as across_whole
from shiftadd3d.kernels.reference.arguments import takes
from shiftadd3d.kernels.reference.gnt.view_attention import blend_views
from shiftadd3d.kernels.runtime.numerics import Numerics
from shiftadd3d.kernels.runtime.targets import CpuTarget, current


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


def panels(weights: Sequence[Tensor], biases: Sequence[Tensor], lanes: int) -> Panels:
    """The panels of weights and biases as `view_attention_twin` takes them."""
    w_q, w_k, w_v, w_p1, w_p2, w_a1, w_a2, w_o = (weight.detach().double() for weight in weights)
    b_p1, b_p2, b_a1, _, b_o = (bias.detach().double() for bias in biases)
    packed = Panels(
        row=torch.cat([across(w_v @ w_k, w_a1 @ w_k, lanes=lanes), across(w_p2, w_a1 @ w_p2, lanes=lanes)]),
        row_bias=torch.cat([row(b_p2, lanes), row(torch.zeros_like(b_a1), lanes)]),
        position=torch.cat([across(w_p1, lanes=lanes), row(b_p1, lanes)[None]]),
        query=-across(w_a1 @ w_q, lanes=lanes),
        query_bias=row(w_a1 @ b_p2 + b_a1, lanes),
        score=across(w_a2, lanes=lanes),
        out=across(w_o, lanes=lanes),
        out_bias=row(b_o, lanes),
    )
    return Panels(*map(stored, packed))


def merges_key(target: CpuTarget) -> bool:
    """Whether panels of integers also hold products of shift weights, rounded to 16 bits (`in_int16`).

    Without VNNI, float32 with half as many products is as fast as integers. Relative to its speed, key and row in bytes
    reach 0.97, in 16 bits 0.88, and one product of 16-bit integers reaches 1.21.
    """
    return not target.has_vnni


def shift_forms(target: CpuTarget) -> tuple[PanelForm, ...]:
    """The forms that are faster than float32. float32 needs half as many products."""
    forms = panel_forms(target)
    return forms[:1] if merges_key(target) else forms


def shift_form(target: CpuTarget, numerics: Numerics) -> PanelForm | None:
    """The form for these numerics; None if it is float32."""
    if not merges_key(target):
        return panel_form(target, numerics)
    found = shift_forms(target) if numerics == "int8" else ()  # the weights are too coarse for "fast"
    return found[0] if found else None


def shift_layers(
    key: WholeWeights, value: WholeWeights, score: WholeWeights, out: WholeWeights, lanes: int
) -> dict[str, WholeWeights]:
    """The weights for panels of integers, from W_k, W_v, A_1 and W_o: key, row and out, or row and out."""
    row = across_whole(value, score, lanes=lanes)
    if not merges_key(current()):
        return {"key": across_whole(key, lanes=lanes), "row": row, "out": across_whole(out, lanes=lanes)}
    of_key, of_row = (layer.integers.double() * layer.unit.double()[:, None] for layer in (key, row))
    return {"row": in_int16(of_row @ of_key), "out": across_whole(out, lanes=lanes)}


def shift_sizes(target: CpuTarget, width: int, hidden: int) -> list[tuple[int, int]]:
    """Inputs and outputs of the layers of `shift_layers`."""
    wide, narrow = padded(width, target.lanes), padded(hidden, target.lanes)
    key = [] if merges_key(target) else [(width, wide)]
    return [*key, (width, wide + narrow), (width, wide)]


class TilePanels(NamedTuple):
    """The weights for matrix tiles in executables. Embeddings are packed, and the norm of queries is folded in.

    Attributes:
        position: [5, 2 H + 2], to the further numbers of a row: the H positions twice, and two ones.
        query: [C, H]. query_bias: [H].
        score: [H, C], for base-2 logits.
        out_bias: [C].
        row: [C + 17, C + H] words, from (embedding, embedding, further numbers) to (value, scores' hidden layer). Each
            weight has two bfloat16 pieces. All units are 1.
        out: [C / 2 + 1, C] words.
    """

    position: Tensor
    query: Tensor
    query_bias: Tensor
    score: Tensor
    out_bias: Tensor
    row: Tensor
    out: Tensor


def tile_panels(panels: Panels, out: Tensor, gain: Tensor, shift: Tensor, lanes: int) -> TilePanels:
    """The weights for matrix tiles.

    Args:
        out: panel of the last layer, in bfloat16.
        gain, shift: [C], weight and bias of the queries' norm.
    """
    width, hidden = panels.query.shape[0], panels.score.shape[0]
    place = panels.position[:, :hidden]
    ones = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]).to(place)[:, None].expand(5, 2)
    further = in_pieces(torch.stack([*panels.row[width:], panels.row_bias]).mT).integers
    # First pieces of the H positions, their second pieces, and the two pieces of the bias.
    first, second = further[:, : hidden + 1], further[:, hidden + 1 :]
    further = torch.cat([first[:, :-1], second[:, :-1], first[:, -1:], second[:, -1:]], dim=1)
    whole = in_pieces(panels.row[:width].mT)
    row = whole._replace(integers=torch.cat([whole.integers, filled(further, 2 * lanes)], dim=1))
    query, query_bias = behind_norm(panels.query, panels.query_bias, gain, shift)
    return TilePanels(
        position=stored(filled(torch.cat([place, place, ones], dim=1), padded(2 * hidden + 2, lanes))),
        query=query,
        query_bias=query_bias,
        score=stored(math.log2(math.e) * panels.score),
        out_bias=panels.out_bias,
        row=shift_panel(row, "bfloat16"),
        out=out,
    )


def behind_norm(query: Tensor, bias: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """A panel of queries and its bias, with the weight and bias of the norm before it folded in."""
    query, bias = query.double(), bias.double()
    return stored(gain.double()[:, None] * query), stored(bias + shift.double() @ query)


def fits_tiles(panels: Panels) -> bool:
    """Whether the sizes of an attention fit matrix tiles in executables."""
    width, hidden = panels.query.shape[0], panels.score.shape[0]
    return width % GRANULE == 0 and 2 * hidden + 2 <= GRANULE


def tile_sizes(lanes: int, width: int, hidden: int) -> list[tuple[int, int]]:
    """Inputs and outputs of their panels."""
    return [(2 * width + GRANULE, width + padded(hidden, lanes)), (width, width)]


def hidden_of(panels: Sequence[Tensor], width: int) -> int:
    """H, from the panels for this many channels."""
    return panels[0].shape[0] - width


def sizes(lanes: int, width: int, hidden: int) -> list[tuple[int, ...]]:
    """The shapes of the panels for C channels and H hidden units of the scores."""
    wide, narrow = padded(width, lanes), padded(hidden, lanes)
    both = (width + hidden, wide + narrow), (wide + narrow,)
    return [*both, (5, narrow), (width, narrow), (narrow,), (hidden, wide), (width, wide), (wide,)]


def check_panels(panels: Sequence[Tensor], width: int) -> int:
    """`lanes_of` the panels of an attention over this many channels."""
    of_sizes = partial(sizes, width=width, hidden=hidden_of(panels, width))
    return lanes_of("view_attention", panels[: len(Panels._fields)], of_sizes)


class ViewAttention(NamedTuple):
    """Attention of points over source views: see `shiftadd3d.kernels.reference.gnt.view_attention`.

    Kernels run on CPUs in float32 and bfloat16, and on CUDA GPUs in these and float16, for 1 to 32 views; they compute
    in float32. Plain torch runs in all other cases. The outcome is [*, C] in the dtype of the query. Inference only.
    Raises `UserError` if shapes or dtypes do not fit each other.

    NaN makes its point NaN, as in the reference. The reference subtracts infinities, which gives NaN. The kernel may
    return infinities instead.

    Attributes:
        query: features of points.
        views: features of what each view shows.
        ray_diff: differences of rays, of `point_samples`.
        mask: which views see a point.
        panels: `Panels`. Panels of integers may follow (`shift_layers`).
    """

    query: Tensor  # [*, C]
    views: Tensor  # [*, V, C]
    ray_diff: Tensor  # [*, V, 4]
    mask: Tensor  # [*, V] bool
    panels: list[Tensor]


@takes(ViewAttention)
def view_attention_of_panels(given: ViewAttention) -> Tensor:
    """View attention with the weights of panels, in plain torch. It runs where no kernel serves."""
    query, views, ray_diff, mask, panels = given
    width = query.shape[-1]
    hidden = hidden_of(panels, width)
    rows, row_bias, position, to_query, query_bias, score, out, out_bias = (
        panel.to(query.dtype) for panel in panels[: len(Panels._fields)]
    )
    place = F.relu(ray_diff @ position[:4, :hidden] + position[4, :hidden])
    seen = torch.cat([views, place], dim=-1) @ rows + row_bias
    values, activation = seen.split([out.shape[1], to_query.shape[1]], dim=-1)
    activation = F.relu(activation + (query @ to_query + query_bias).unsqueeze(-2))[..., :hidden]
    pooled = blend_views(activation @ score, values, mask)[..., :width]
    return (pooled @ out + out_bias)[..., :width]
