"""Trial problems with shift weights, for view attention and ray blocks.

Each problem also has a reference whose layers round activations as a number form does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.forms.panels import error_bound
from shiftadd3d.kernels.cpu.trials import Draw, check_within
from shiftadd3d.kernels.pack.gnt import ray_block, view_attention
from shiftadd3d.kernels.pack.shift import PanelForm, WholeWeights, rounded
from shiftadd3d.kernels.reference.gnt import ray_block as reference_ray_block
from shiftadd3d.kernels.reference.gnt import view_attention as reference_view_attention
from shiftadd3d.kernels.reference.layers import Layer, linear, perceptron
from shiftadd3d.kernels.runtime.targets import current


class ShiftAttention(NamedTuple):
    """A view attention with shift weights.

    Attributes:
        inputs: query, views, ray_diff and mask.
        weights, biases: as the twin takes them.
        shifts: the weights for panels of integers, by name.
    """

    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    weights: list[Tensor]
    biases: list[Tensor]
    shifts: dict[str, WholeWeights]

    @property
    def panels(self) -> view_attention.Panels:
        return view_attention.panels(self.weights, self.biases, current().lanes)

    def rounded(self, form: PanelForm) -> Tensor:
        """The reference with layers that round their inputs as a form does.

        If a number lies halfway between two numbers of the form, float32 may round it either way.
        """
        w_q, w_k, w_v, w_p1, w_p2, w_a1, w_a2, w_o = self.weights
        b_p1, b_p2, b_a1, b_a2, b_o = self.biases
        return reference_view_attention.view_attention(
            *self.inputs,
            q=linear(w_q),
            k=lambda x: rounded(rounded(x, form) @ w_k.mT, form),
            v=linear(w_v),
            position=perceptron(linear(w_p1, b_p1), linear(w_p2, b_p2)),
            score=perceptron(linear(w_a1, b_a1), linear(w_a2, b_a2)),
            out=lambda x: linear(w_o, b_o)(rounded(x, form)),
        )


def random_shift_attention(seed: int, *, points: int, views: int, width: int, hidden: int) -> ShiftAttention:
    """A problem for a trial."""
    sizes = {"points": points, "views": views, "width": width, "hidden": hidden}
    query, shown, ray_diff, mask, weights, biases = reference_view_attention.random_attention(seed, **sizes)
    draw = Draw()
    whole = [draw.whole(*size) for size in ((width, width), (width, width), (width, hidden), (width, width))]
    for number, layer in zip((1, 2, 5, 7), whole, strict=True):
        weights[number] = layer.integers * layer.unit[:, None]
    inputs = query, shown, ray_diff, mask
    return ShiftAttention(inputs, weights, biases, view_attention.shift_layers(*whole, lanes=current().lanes))


class ShiftRayBlock(NamedTuple):
    """A ray block with shift weights.

    Attributes:
        x, weights, biases, conv, heads, attention, eps: as the twin takes them.
        norms: weights of the norms.
        shifts: the weights for panels of integers, by name.
    """

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    conv: Tensor | None
    heads: int
    attention: str
    norms: Tensor
    shifts: dict[str, WholeWeights]
    eps: float = 1e-6

    @property
    def panels(self) -> ray_block.Panels:
        return ray_block.panels(self.weights, self.biases, self.conv, self.heads, current().lanes)

    def check(self, out: Tensor, first: Tensor, form: PanelForm) -> None:
        """Raise `AssertionError` unless an outcome is that of the reference with layers that round as a form does.

        If a number lies halfway between two numbers of the form, float32 may round it either way. If a query or key
        changes its sign by that, it gets the other code. Such samples are not compared.

        Args:
            out: [R, S, C], from the kernel.
            first: [R, S], how the first sample of each ray attends, or empty.
        """
        x, conv = self.x.double(), None if self.conv is None else self.conv.double()
        weights = [weight.double() for weight in self.weights]
        biases = [x.new_zeros(()) if bias is None else bias.double() for bias in self.biases]

        def shift(number: int, of_norm: int | None = None) -> Layer:
            before = 0.0 if of_norm is None else biases[of_norm]
            return lambda x: linear(weights[number])(rounded(x - before, form) + before) + biases[number]

        layers = [
            reference_ray_block.norm(weights[0], biases[0], self.eps),
            *(shift(n, 0) for n in (1, 2, 3)),
            shift(4),
        ]
        if len(weights) > 5:
            layers += [reference_ray_block.norm(weights[5], biases[5], self.eps), shift(6, 5), shift(7)]
        expected, firsts = reference_ray_block.ray_block(x, layers, conv, self.heads, self.attention, True)
        certain = torch.ones(x.shape[:2], dtype=torch.bool)
        if self.attention != "softmax":
            normed = layers[0](x) - biases[0]
            slack = 2e-6 * normed.abs().amax(-1, keepdim=True)
            apart = (rounded(normed + slack, form) - rounded(normed - slack, form)).abs()
            of_query, of_key = (
                layers[n](normed + biases[0]).abs() > (apart + slack) @ weights[n].abs().mT for n in (1, 2)
            )
            certain = of_query.all(-1) & of_key.all(-1).all(-1, keepdim=True)
            assert certain.any(), "rounding decides a code in each ray"
        allowed = error_bound(form) * 4 * expected.abs().amax() + 1e-3
        check_within(out[certain], expected[certain], allowed)
        if len(first):
            torch.testing.assert_close(first[certain[:, 0]], firsts[certain[:, 0]].float(), rtol=1e-2, atol=1e-3)


def random_ray_block(seed: int, attention: str, **sizes: int) -> ShiftRayBlock:
    """A problem for a trial; `sizes` are those of `reference.gnt.ray_block.random_block`."""
    x, weights, biases, conv, heads = reference_ray_block.random_block(seed, **sizes)
    draw = Draw()
    whole = {n: draw.whole(*reversed(weights[n].shape)) for n in range(1, len(weights)) if weights[n].dim() > 1}
    for number, layer in whole.items():
        weights[number] = layer.integers * layer.unit[:, None]
    found = ray_block.shift_layers(weights[0::5], list(whole.values()), heads, current().lanes)
    assert found is not None, "there are no such panels"
    return ShiftRayBlock(x, weights, biases, conv, heads, attention, *found)
