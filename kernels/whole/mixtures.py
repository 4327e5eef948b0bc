"""Mixtures of experts: norm, router, experts and residual in one function."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.forms import Form, error_bound, longest_block, tile_shape
from shiftadd3d.kernels.cpu.forms.base import ShiftProduct
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.mlp import BLOCK_BYTES
from shiftadd3d.kernels.cpu.moe import Plan
from shiftadd3d.kernels.cpu.trials import Draw, check_within
from shiftadd3d.kernels.pack.whole import LinearWeights
from shiftadd3d.kernels.reference import activations
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index
from shiftadd3d.kernels.whole.parts import Norm, block_of, control_argument, held, rows_of, threads_of
from shiftadd3d.kernels.whole.products import (
    form_of,
    norm_values,
    product_of,
    random_layer,
    tensors_of,
    weight_values,
    weights_argument,
)
from shiftadd3d.kernels.whole.program import Exactness, Function, Program, Value


def _build(
    target: CpuTarget,
    experts: tuple[int, ...],
    depth: int,
    form: Form,
    bits: int,
    activation: Activation,
    gated: bool,
    eps: float | None,
    residual: bool,
    longest: int,
) -> T.PrimFunc:
    """The function ``(x, norm's weight and bias, router's, all layers' weights, what is added, control, y)``.

    Args:
        experts: terms of the layers of each, 0 for ordinary weights.
    """
    isa = Isa(target)
    with T.function("mixture") as function:
        batch, tokens, inputs, outputs = T.sizes(4)
        x = T.argument("x", (batch, tokens, inputs))
        norm = None if eps is None else Norm.arguments(inputs, eps)
        router = T.argument("router", (len(experts), inputs))
        router_bias = T.argument("router_bias", (len(experts),))
        chains = []
        for number, terms in enumerate(experts):
            ends = enumerate(itertools.pairwise([inputs, *T.sizes(depth - 1), outputs]))
            product = product_of(target, form, bits, terms)
            chains.append([weights_argument(product, f"{number}_{i}", terms, *between) for i, between in ends])
        added = T.argument("added", (batch, tokens, outputs)) if residual else None
        control = control_argument()
        y = T.argument("y", (batch, tokens, outputs))
        count = batch * tokens
        x, y, added = rows_of(x), rows_of(y), None if added is None else rows_of(added)
        normal = x if norm is None else T.alloc(count, inputs)
        logits, assignment, gates = T.alloc(count, len(experts)), T.alloc(count, dtype="int64"), T.alloc(count)
        with T.parallel((count + (isa.lanes - 1)) // isa.lanes) as batch:
            first = held(batch * isa.lanes)
            some = held(T.min(T.int64(isa.lanes), count - first))
            if norm is not None:
                reader, writer = isa.reader(x, lambda row: row), isa.writer(normal, lambda row: row)
                norm.emit(isa, reader, first, some, inputs, writer)
            with T.serial(some) as i:
                token = T.bind(first + i)
                route(isa, normal.part(token), inputs, router, router_bias, logits.part(token))
                gates[token] = gate_of(logits.part(token), len(experts)) if gated else T.float32(1)
        rows = held(count)
        share = held(T.truncdiv(rows + (len(experts) - 1), T.int64(len(experts))))
        tile, _ = tile_shape(target, form)
        block = block_of(share, longest, tile, threads_of(control))
        plan = Plan(count, len(experts), block, count + len(experts))
        plan.route(logits, assignment)

        def store(token: Index, column: Index, value: Expr, lanes: int) -> None:
            at = token, T.at(column, lanes)
            gate = gates[token]
            value = value * (gate if lanes == 1 else T.broadcast(gate, lanes)) if gated else value
            y[at] = value if added is None else value + added[at]

        def products(number: int) -> Sequence[ShiftProduct]:
            return [product_of(target, form, bits, experts[number]) for _ in range(depth)]

        load = isa.reader(normal, lambda token: token)
        plan.emit(chains, products, activation, longest, load, store, control)
    return function.get()


def route(isa: Isa, row: Buffer, width: Expr, weight: Buffer, bias: Buffer, logits: Buffer) -> None:
    """Emit a router's logits [experts] of a row, with its weight [experts, width] and bias."""
    lanes = isa.lanes
    whole = T.bind(T.truncdiv(width, T.int64(lanes)))
    for expert in range(logits.extent(0)):
        sums, of_expert = isa.register(0.0), weight.part(expert)
        with T.serial(whole) as j:
            at = isa.at(j * lanes)
            sums.value = isa.fma(row[at], of_expert[at], sums.value)
        logits[expert] = isa.total(sums.value) + bias[expert]
        with T.serial(width - whole * lanes) as j:
            at = whole * lanes + j
            logits[expert] = logits[expert] + row[at] * of_expert[at]


def gate_of(logits: Buffer, experts: int) -> Expr:
    """The softmax of the largest logit."""
    largest = T.alloc(1, align=4)
    largest[0] = logits[0]
    for expert in range(1, experts):
        largest[0] = T.max(largest[0], logits[expert])
    return T.float32(1) / T.total([T.exp(logits[expert] - largest[0]) for expert in range(experts)])


def _resolve(target: CpuTarget, exactness: Exactness, spec: dict[str, Any]) -> dict[str, Any]:
    form = form_of(target, exactness, spec["bits"], max(spec["experts"]))
    widths = spec.pop("widths")
    floats = widths[0] + (1 if form == "float32" else 2) * max(widths[1:], default=0)
    return spec | {"form": form, "longest": longest_block(target, form, floats, BLOCK_BYTES)}


def _try(
    function: Compiled,
    experts: tuple[int, ...],
    depth: int,
    form: Form,
    bits: int,
    activation: Activation,
    gated: bool,
    eps: float | None,
    residual: bool,
    longest: int,
) -> None:
    """Odd sizes with tails on every side, several blocks for each expert."""
    rows, columns = tile_shape(targets.current(), form)
    draw = Draw()
    widths = [16 * 3 + 5, *[columns + 3] * (depth - 1), columns + 7]
    made = [[random_layer(draw, *between, bits, terms) for between in itertools.pairwise(widths)] for terms in experts]
    tokens = 2 * longest + rows + 1
    x, added = draw.normal(1, tokens, widths[0]), draw.normal(1, tokens, widths[-1])
    norm = [draw.normal(widths[0]) + 1, draw.normal(widths[0])] if eps is not None else []
    router, router_bias = draw.normal(len(experts), widths[0]), draw.normal(len(experts))
    control, y = torch.tensor([0, 2], dtype=torch.int32), torch.empty(added.shape)
    layers = [tensor for chain in made for layer, _ in chain for tensor in tensors_of(layer)]
    function(x, *norm, router, router_bias, *layers, *([added] if residual else []), control, y)
    assert control[0] == 0, "it found an activation that it cannot express"
    normal = x if eps is None else F.layer_norm(x, (widths[0],), norm[0], norm[1], eps)
    logits = F.linear(normal.double(), router.double(), router_bias.double())
    outcomes, gain = [], 1.0
    for chain in made:
        hidden = normal
        for number, (layer, matrix) in enumerate(chain):
            gain = max(gain, float(matrix.abs().sum(-1).max()))
            hidden = F.linear(hidden if number == 0 else activations.apply(activation, hidden), matrix, layer.bias)
        outcomes.append(hidden)
    chosen = logits.argmax(-1, keepdim=True)
    expected = torch.stack(outcomes, -1).gather(-1, chosen.unsqueeze(-2).expand(*y.shape, 1)).squeeze(-1)
    expected = expected * (logits.softmax(-1).gather(-1, chosen) if gated else 1) + (added if residual else 0)
    largest = (normal.abs().amax(-1, keepdim=True) + 4) * gain**depth
    bound = depth * (error_bound(form, bits) + 2e-6) * 1.2 * largest
    # Where two experts are equally good, either will do.
    ordered = logits.sort(-1, descending=True).values
    clear = (ordered[..., 0] - ordered[..., 1] > 1e-4).unsqueeze(-1)
    check_within(y, expected.float(), torch.where(clear, bound, torch.inf))


MIXTURE = Function("mixture", _build, _try, _resolve)


def mixture(
    program: Program,
    x: Value,
    router: tuple[Tensor, Tensor],
    experts: Sequence[Sequence[LinearWeights]],
    activation: Activation,
    *,
    gated: bool,
    norm: tuple[Tensor, Tensor, float] | None = None,
    residual: Value | None = None,
) -> Value:
    """Each token's ``expert(norm(x)) + residual``: [B, N, inputs] to [B, N, outputs].

    Args:
        router: its weight [experts, inputs] and bias.
        experts: the layers of each, equally many. Those of one expert are alike, and codes have as many bits in all.
        activation: between the layers.
        gated: whether an expert's outcome is multiplied by its probability.
        norm: weight, bias and epsilon of a layer norm.
    """
    layers = [layer for chain in experts for layer in chain]
    values = [value for layer in layers for value in weight_values(program, layer)]
    routers = [program.weight(tensor) for tensor in router]
    return program.call(
        MIXTURE,
        [x, *norm_values(program, norm), *routers, *values, *([residual] if residual else [])],
        (*x.shape[:-1], layers[-1].outputs),
        experts=tuple(chain[0].terms for chain in experts),
        depth=len(experts[0]),
        bits=max(layer.bits for layer in layers),
        activation=activation if len(experts[0]) > 1 else "none",
        gated=gated,
        eps=None if norm is None else norm[2],
        residual=residual is not None,
        widths=(experts[0][0].inputs, *(layer.outputs for chain in experts for layer in chain[:-1])),
    )
