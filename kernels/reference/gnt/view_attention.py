"""Subtraction attention of points over source views (GNT's view transformer).

For each point, with x_v what view v shows and d_v how its ray differs::

    k_v = W_k x_v        p_v = P_2 relu(P_1 d_v + b_1) + b_2
    s_v = A_2 relu(A_1 (k_v - W_q query + p_v) + a_1) + a_2        one score a channel, -1e9 where the view is masked
    out = W_o sum_v softmax_v(s)_v (W_v k_v + p_v) + b_o

Source: Varma T. et al., "Is Attention All That NeRF Needs?" (ICLR 2023), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.reference import power_of_two

MAX_VIEWS = 32
WEIGHTS = ("q", "k", "v", "position 1", "position 2", "attention 1", "attention 2", "out")
BIASES = ("position 1", "position 2", "attention 1", "attention 2", "out")


def view_attention_twin(
    query: Tensor,  # [*, C]
    views: Tensor,  # [*, V, C]
    ray_diff: Tensor,  # [*, V, 4]
    mask: Tensor,  # [*, V] bool
    weights: list[Tensor],
    biases: list[Tensor],
) -> Tensor:  # [*, C]
    """What `view_attention` computes, in plain torch."""
    w_q, w_k, w_v, w_p1, w_p2, w_a1, w_a2, w_o = (weight.to(query.dtype) for weight in weights)
    b_p1, b_p2, b_a1, b_a2, b_o = (bias.to(query.dtype) for bias in biases)
    q = F.linear(query, w_q)
    k = F.linear(views, w_k)
    v = F.linear(k, w_v)
    position = F.linear(F.relu(F.linear(ray_diff, w_p1, b_p1)), w_p2, b_p2)
    scores = F.linear(F.relu(F.linear(k - q.unsqueeze(-2) + position, w_a1, b_a1)), w_a2, b_a2)
    share = torch.softmax(scores.masked_fill(~mask.unsqueeze(-1), -1e9), dim=-2)
    return F.linear(((v + position) * share).sum(-2), w_o, b_o)


def view_attention_shift_twin(
    query: Tensor,
    views: Tensor,
    ray_diff: Tensor,
    mask: Tensor,
    codes: list[Tensor],
    offsets: list[Tensor],
    biases: list[Tensor],
    bits: int,
) -> Tensor:
    """What `view_attention_shift` computes, in plain torch."""
    return view_attention_twin(query, views, ray_diff, mask, decoded(codes, offsets, bits, query.shape[-1]), biases)


def decoded(codes: list[Tensor], offsets: list[Tensor], bits: int, width: int) -> list[Tensor]:
    hidden = codes[3].shape[-2]
    inputs = (width, width, width, 4, hidden, width, hidden, width)
    return [
        power_of_two.decode(power_of_two.unpack(code, bits, count), offset, bits)
        for code, offset, count in zip(codes, offsets, inputs, strict=True)
    ]


def compare_with_twin(run: Callable[..., Tensor], device: torch.device, width: int, hidden: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    points, views = 37, 5
    inputs = (draw(points, width), draw(points, views, width), draw(points, views, 4))
    mask = torch.rand(points, views, generator=generator) > 0.3
    mask[3] = False
    sizes = weight_sizes(width, hidden)
    weights = [draw(*size) / size[1] ** 0.5 for size in sizes]
    biases = [draw(sizes[i][0]) for i in (3, 4, 5, 6, 7)]
    on_device = (
        *(x.to(device) for x in (*inputs, mask)),
        [weight.to(device) for weight in weights],
        [bias.to(device) for bias in biases],
    )
    torch.testing.assert_close(
        run(*on_device).cpu(), view_attention_twin(*inputs, mask, weights, biases), rtol=1e-4, atol=1e-5
    )


def weight_sizes(width: int, hidden: int) -> tuple[tuple[int, int], ...]:
    square, up, down = (width, width), (width, hidden), (hidden, width)
    return (square, square, square, (hidden, 4), up, down, up, square)


def check(
    query: Tensor, views: Tensor, ray_diff: Tensor, mask: Tensor, weights: list[Tensor], biases: list[Tensor]
) -> None:
    count, width = views.shape[-2:]
    expected = {
        "views": (views, (*query.shape[:-1], count, query.shape[-1])),
        "ray_diff": (ray_diff, (*query.shape[:-1], count, 4)),
        "mask": (mask, (*query.shape[:-1], count)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise UserError(
                f"{name} must be {list(shape)} beside queries {list(query.shape)}, not {list(tensor.shape)}"
            )
    if mask.dtype != torch.bool:
        raise UserError(f"mask must be bool, not {mask.dtype}")
    if not 1 <= count <= MAX_VIEWS:
        raise UserError(f"view attention takes 1 to {MAX_VIEWS} views, not {count}")
    if len(weights) != len(WEIGHTS) or len(biases) != len(BIASES):
        raise UserError(f"view attention takes weights of {', '.join(WEIGHTS)} and biases of {', '.join(BIASES)}")
    sizes = weight_sizes(width, weights[3].shape[0])
    for name, weight, size in zip(WEIGHTS, weights, sizes, strict=True):
        if weight.shape != size:
            raise UserError(f"the weight of {name} must be {list(size)}, not {list(weight.shape)}")
    for name, bias in zip(BIASES, biases, strict=True):
        size = sizes[WEIGHTS.index(name)][0]
        if bias.shape != (size,):
            raise UserError(f"the bias of {name} must be [{size}], not {list(bias.shape)}")
