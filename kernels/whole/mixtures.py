"""Mixtures of experts: norm, router, experts and residual in one function."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.forms import Form, error_bound, longest_block, tile_shape
from shiftadd3d.kernels.cpu.forms.base import ShiftProduct
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.mlp import BLOCK_BYTES
from shiftadd3d.kernels.cpu.moe import Plan
from shiftadd3d.kernels.cpu.trials import Draw, check_within
from shiftadd3d.kernels.pack.whole import Format, LinearWeights
from shiftadd3d.kernels.reference import activations
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index
from shiftadd3d.kernels.whole.parts import Around, Ends, NormWeights, Source, block_of, held, threads_of
from shiftadd3d.kernels.whole.products import (
    Kind,
    form_of,
    norm_values,
    tensors_of,
    weight_values,
    weights_argument,
)
from shiftadd3d.kernels.whole.program import Exactness, Function, Program, Value
from shiftadd3d.kernels.whole.trials import RandomNorm, outcome_of, random_layer


class Mixture(NamedTuple):
    """What is asked of a mixture.

    Attributes:
        experts: terms of the layers of each, 0 for ordinary weights.
        depth: layers of an expert.
        bits: of the codes.
        gated: whether an expert's outcome is multiplied by its probability.
        around: activation functions come between layers.
        widths: of the tokens, and of all hidden layers.
    """

    experts: tuple[int, ...]
    depth: int
    bits: int
    gated: bool
    around: Around
    widths: tuple[int, ...]


class MixtureSpec(NamedTuple):
    experts: tuple[int, ...]
    depth: int
    form: Form
    bits: int
    gated: bool
    around: Around
    longest: int


class Router(NamedTuple):
    """The arguments that hold a router's weight [experts, width] and bias [experts]."""

    weight: Buffer
    bias: Buffer

    @classmethod
    def argument(cls, experts: int, width: Index, name: str = "") -> Router:
        return cls(T.argument(f"router{name}", (experts, width)), T.argument(f"router_bias{name}", (experts,)))


def _build(target: CpuTarget, spec: MixtureSpec) -> T.PrimFunc:
    """The function ``(x, norm's weight and bias, router's, all layers' weights, what is added, control, y)``."""
    isa, around, experts = Isa(target), spec.around, len(spec.experts)
    with T.function("mixture") as function:
        batch, tokens, inputs, outputs = T.sizes(4)
        source = Source.argument(batch, tokens, inputs, around.eps)
        router = Router.argument(experts, inputs)
        chains = []
        for number, terms in enumerate(spec.experts):
            between = enumerate(itertools.pairwise([inputs, *T.sizes(spec.depth - 1), outputs]))
            product = Kind(spec.form, spec.bits, terms).product(target)
            chains.append([weights_argument(product, f"{number}_{i}", terms, *widths) for i, widths in between])
        ends = Ends.arguments(source, outputs, residual=around.residual)
        count = batch * tokens
        normal = ends.x if ends.norm is None else T.alloc(count, inputs)
        logits, assignment, gates = T.alloc(count, experts), T.alloc(count, dtype="int64"), T.alloc(count)
        with T.parallel((count + (isa.lanes - 1)) // isa.lanes) as batch:
            first = held(batch * isa.lanes)
            some = held(T.min(T.int64(isa.lanes), count - first))
            if ends.norm is not None:
                reader, writer = isa.reader(ends.x, lambda row: row), isa.writer(normal, lambda row: row)
                ends.norm.emit(isa, reader, first, some, inputs, writer)
            with T.serial(some) as i:
                token = T.bind(first + i)
                route(isa, normal.part(token), inputs, router, logits.part(token))
                gates[token] = gate_of(logits.part(token), experts) if spec.gated else T.float32(1)
        rows = held(count)
        share = held(T.truncdiv(rows + (experts - 1), T.int64(experts)))
        block = block_of(share, spec.longest, tile_shape(target, spec.form)[0], threads_of(ends.control))
        plan = Plan(count, experts, block, count + experts)
        plan.route(logits, assignment)
        leave = ends.store(T.int64(0))

        def store(token: Index, column: Index, value: Expr, lanes: int) -> None:
            leave(token, column, gated_by(gates[token], value, lanes) if spec.gated else value, lanes)

        def products(number: int) -> Sequence[ShiftProduct]:
            return [Kind(spec.form, spec.bits, spec.experts[number]).product(target) for _ in range(spec.depth)]

        load = isa.reader(normal, lambda token: token)
        plan.emit(chains, products, around.activation, spec.longest, load, store, ends.control)
    return function.get()


def gated_by(gate: Expr, value: Expr, lanes: int) -> Expr:
    """A vector, or one number, times a gate."""
    return value * (gate if lanes == 1 else T.broadcast(gate, lanes))


def route(isa: Isa, row: Buffer, width: Expr, router: Router, logits: Buffer) -> None:
    """Emit a router's logits [experts] of a row [width]."""
    lanes = isa.lanes
    whole = T.bind(T.truncdiv(width, T.int64(lanes)))
    for expert in range(logits.extent(0)):
        sums, of_expert = isa.register(0.0), router.weight.part(expert)
        with T.serial(whole) as j:
            at = isa.at(j * lanes)
            sums.value = isa.fma(row[at], of_expert[at], sums.value)
        logits[expert] = isa.total(sums.value) + router.bias[expert]
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


def _resolve(target: CpuTarget, exactness: Exactness, asked: Mixture) -> MixtureSpec:
    form, (inputs, *hidden) = form_of(target, exactness, asked.bits, max(asked.experts)), asked.widths
    floats = inputs + (1 if form == "float32" else 2) * max(hidden, default=0)
    longest = longest_block(target, form, floats, BLOCK_BYTES)
    return MixtureSpec(asked.experts, asked.depth, form, asked.bits, asked.gated, asked.around, longest)


def _try(function: Compiled, spec: MixtureSpec) -> None:
    """Odd sizes with tails on every side, several blocks for each expert."""
    experts, depth, form, bits, gated, around, longest = spec
    rows, columns = tile_shape(targets.current(), form)
    draw = Draw()
    widths = [16 * 3 + 5, *[columns + 3] * (depth - 1), columns + 7]
    made = [
        [random_layer(draw, *between, Format(bits, terms)) for between in itertools.pairwise(widths)]
        for terms in experts
    ]
    tokens = 2 * longest + rows + 1
    x, added = draw.normal(1, tokens, widths[0]), draw.normal(1, tokens, widths[-1])
    norm, residual = RandomNorm(draw, widths[0], around.eps), [added] if around.residual else []
    router, router_bias = draw.normal(len(experts), widths[0]), draw.normal(len(experts))
    layers = [tensor for chain in made for layer, _ in chain for tensor in tensors_of(layer)]
    given = [x, *norm.tensors, router, router_bias, *layers, *residual]
    y, normal = outcome_of(function, given, *added.shape), norm(x)
    logits = F.linear(normal.double(), router.double(), router_bias.double())
    outcomes, gain = [], 1.0
    for chain in made:
        hidden = normal
        for number, (layer, matrix) in enumerate(chain):
            gain = max(gain, float(matrix.abs().sum(-1).max()))
            hidden = F.linear(
                hidden if number == 0 else activations.apply(around.activation, hidden), matrix, layer.bias
            )
        outcomes.append(hidden)
    chosen = logits.argmax(-1, keepdim=True)
    expected = torch.stack(outcomes, -1).gather(-1, chosen.unsqueeze(-2).expand(*y.shape, 1)).squeeze(-1)
    expected = sum(residual, expected * (logits.softmax(-1).gather(-1, chosen) if gated else 1))
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
    norm: NormWeights | None = None,
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
    arguments = [x, *norm_values(program, norm), *routers, *values, *([residual] if residual else [])]
    depth = len(experts[0])
    asked = Mixture(
        tuple(chain[0].terms for chain in experts),
        depth,
        max(layer.bits for layer in layers),
        gated,
        Around.of(norm, activation if depth > 1 else "none", residual),
        (experts[0][0].inputs, *(layer.outputs for chain in experts for layer in chain[:-1])),
    )
    return program.call(MIXTURE, arguments, (*x.shape[:-1], layers[-1].outputs), asked)
