"""Mixtures of experts on CPUs, in one call: tokens are routed, sorted by expert, taken through it, and put back.

A counting sort lists the tokens of each expert; each task then reads a block of one expert's tokens from where they
lie, takes it through all layers, and writes the outcome to where it belongs: no sorted copy of the tokens is ever
made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.decode import Weights
from shiftadd3d.kernels.cpu.forms import Form, all_forms, error_bound, shift_product, tile_shape
from shiftadd3d.kernels.cpu.forms.base import ShiftProduct
from shiftadd3d.kernels.cpu.forms.float32 import OrdinaryProduct
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.mlp import emit_layers
from shiftadd3d.kernels.cpu.trials import Draw, check_within
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.moe import (
    ExpertLayer,
    gates_of,
    layers_of_experts,
    moe_mlp_twin,
    outputs_of,
    width_of,
)
from shiftadd3d.kernels.runtime import memory, targets
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, Spec, by_name
from shiftadd3d.kernels.runtime.memory import DTYPES, FLAG, Dtype
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index, Load, Store


class MoeSpec(NamedTuple):
    """What is compiled in: kinds of the experts, ``"mult"`` or ``"shift"``, with commas between them; their layers; the
    rest as in a `ShiftSpec`."""

    experts: str
    depth: int
    form: Form
    bits: int
    terms: int
    dtype: Dtype
    activation: Activation


def build(target: CpuTarget, spec: MoeSpec) -> T.PrimFunc:
    """The function ``(x, logits, gates, all layers' tensors, y, assignment, flag, rows of a block)``.

    x and y are of the spec's dtype; logits, gates (what each token's outcome is multiplied by), ordinary weights, which
    have no offset, and biases are float32. See `ShiftProduct.stage` for the flag.
    """
    experts, depth, form, bits, terms, dtype, activation = spec
    isa, kinds = Isa(target), experts.split(",")

    with T.function("moe_mlp") as function:
        tokens, inputs, outputs = T.sizes(3)
        x = T.argument("x", (tokens, inputs), dtype)
        logits = T.argument("logits", (tokens, len(kinds)))
        gates = T.argument("gates", (tokens,))
        chains = []
        for number, kind in enumerate(kinds):
            ends = enumerate(itertools.pairwise([inputs, *T.sizes(depth - 1), outputs]))
            of_kind = 0 if kind == "mult" else terms
            chains.append([Weights.argument(f"{number}_{i}", of_kind, *between) for i, between in ends])
        y = T.argument("y", (tokens, outputs), dtype)
        assignment = T.argument("assignment", (tokens,), "int64")
        flag = T.argument("flag", (1,), "int32")
        block = T.scalar("block")
        plan = Plan(tokens, len(kinds), block, T.bind((tokens + block - 1) // block + len(kinds)))
        plan.route(logits, assignment)

        def store(token: Index, column: Index, value: Expr, count: int) -> None:
            gate = gates[token]
            value = value * (gate if count == 1 else T.broadcast(gate, count))
            isa.write(y.part(token), column, value, count)

        def products(number: int) -> list[ShiftProduct]:
            if kinds[number] == "mult":
                return [OrdinaryProduct(target) for _ in range(depth)]
            return [shift_product(target, form, bits, terms, dtype) for _ in range(depth)]

        plan.emit(chains, products, activation, block, isa.reader(x, lambda token: token), store, flag)
    return function.get()


class Plan:
    """Which tokens each task takes through which expert, as statements of a function.

    Args:
        tokens: their number.
        experts: their number.
        block: tokens that a task takes at most.
        most: tasks to allocate memory for.
    """

    def __init__(self, tokens: Expr, experts: int, block: Expr, most: Expr) -> None:
        self._tokens, self._experts, self._block = tokens, range(experts), block
        self.order = T.alloc(tokens, dtype="int32")  # tokens, sorted by expert
        self.expert_of = T.alloc(most, dtype="int32")  # of each task
        self._first = T.alloc(most, dtype="int64")  # place in `order` that each task begins at
        self._begin = T.alloc(experts + 1, dtype="int64")  # place that each expert's tokens begin at
        self._next = T.alloc(experts, dtype="int64")
        self._best = T.alloc(1)
        self._count = T.alloc(1, dtype="int64")  # of tasks

    def emit(
        self,
        chains: Sequence[Sequence[Weights]],
        products: Callable[[int], Sequence[ShiftProduct]],
        activation: Activation,
        longest: Index,
        load: Load,
        store: Store,
        flag: Buffer,
    ) -> None:
        """Take all tokens through their experts, once they are routed.

        Args:
            chains: layers of each expert.
            products: ``products(expert)``: theirs.
            longest: tokens to allocate memory for.
            load, store: of the tokens' rows; flag: see `ShiftProduct.stage`.
        """
        with T.parallel(self.tasks()) as task:
            first, rows = self.tokens_of(task)

            def token(row: Index) -> Expr:
                return T.cast(self.order[first + row], "int64")

            def read(row: Index, column: Index, count: int) -> Expr:
                return load(token(row), column, count)

            def write(row: Index, column: Index, value: Expr, count: int) -> None:
                store(token(row), column, value, count)

            for number, chain in enumerate(chains):
                with T.when(self.expert_of[task] == number):
                    emit_layers(products(number), chain, activation, longest, rows, read, write, flag)

    def route(self, logits: Buffer, assignment: Buffer) -> None:
        """Emit the choice of the experts [tokens] by their logits [tokens, experts], and share them out to tasks."""
        self.sort(logits, assignment, self._tokens)
        self._share_out()

    def sort(self, logits: Buffer, assignment: Buffer, tokens: Expr) -> None:
        """Emit the choice of the experts of the first tokens, and a counting sort by it."""
        for expert in self._experts:
            self._next[expert] = T.int64(0)
        with T.serial(tokens) as token:
            choose(logits.part(token), len(self._experts), assignment, self._best, token)
            chosen = assignment[token]
            self._next[chosen] = self._next[chosen] + 1
        self._begin[0] = T.int64(0)
        for expert in self._experts:
            self._begin[expert + 1] = self._begin[expert] + self._next[expert]
            self._next[expert] = self._begin[expert]
        with T.serial(tokens) as token:
            expert = T.bind(assignment[token])
            self.order[self._next[expert]] = T.cast(token, "int32")
            self._next[expert] = self._next[expert] + 1

    def of_expert(self, expert: int) -> tuple[Expr, Expr]:
        """The place in `order` that an expert's tokens begin at, and their number."""
        return self._begin[expert], self._begin[expert + 1] - self._begin[expert]

    def _share_out(self) -> None:
        """Experts take turns in the list of tasks, so that threads with equal parts of it have equally much to do."""
        for expert in self._experts:
            self._next[expert] = self._begin[expert]
        self._count[0] = T.int64(0)
        largest = T.int64(0)  # number of tokens of an expert
        for expert in self._experts:
            largest = T.max(largest, self._begin[expert + 1] - self._begin[expert])
        largest = T.bind(largest)
        with T.serial((largest + self._block - 1) // self._block):
            for expert in self._experts:
                with T.when(self._next[expert] < self._begin[expert + 1]):
                    self.expert_of[self._count[0]] = T.int32(expert)
                    self._first[self._count[0]] = self._next[expert]
                    self._next[expert] = self._next[expert] + self._block
                    self._count[0] = self._count[0] + 1

    def tasks(self) -> Expr:
        """How many there are."""
        return T.bind(self._count[0])

    def tokens_of(self, task: Expr) -> tuple[Expr, Expr]:
        """The place in `order` that a task's tokens begin at, and their number."""
        first = T.bind(self._first[task])
        end = T.bind(self._begin[T.cast(self.expert_of[task], "int64") + 1])
        return first, T.bind(T.min(self._block, end - first))


def choose(logits: Buffer, experts: int, chosen: Buffer, best: Buffer, at: Index = 0) -> None:
    """Emit the choice of the largest logit: as in torch, NaN counts as the largest of all, the first of equals wins.

    Args:
        chosen: int64, where the expert's number goes, to the place `at`.
        best: [1], scratch memory.
    """
    chosen[at] = T.int64(0)
    best[0] = logits[0]
    for expert in range(1, experts):
        rival = T.bind(logits[expert])
        with T.when(T.either(rival > best[0], T.both(_is_nan(rival), T.negate(_is_nan(best[0]))))):
            chosen[at] = T.int64(expert)
            best[0] = rival


def _is_nan(x: Expr) -> Expr:
    """By its bits: TVM's simplifier knows nothing of NaN, and takes ``x == x`` for true."""
    return (T.reinterpret("int32", x) & T.int32(0x7FFFFFFF)) > T.int32(0x7F800000)


def trial(function: Compiled, spec: MoeSpec) -> None:
    """Odd sizes with tails on every side, several blocks for each expert, more than one block of inputs."""
    experts, depth, form, bits, terms, dtype, activation = spec
    rows, columns = tile_shape(targets.current(), form)
    draw = Draw()
    widths = [16 * 20 + 5, *[columns + 3] * (depth - 1), columns + 7]
    tokens, kinds = 7 * rows + 1, experts.split(",")
    layers: list[Tensor | None] = []
    gain = 1.0
    for kind, between in itertools.product(kinds, itertools.pairwise(widths)):
        layer = draw.layer(*between, bits, terms)
        layers += [layer.weight, None] if kind == "mult" else [layer.codes, layer.offset]
        layers.append(layer.bias)
        gain = max(gain, layer.gain)
    x, logits = draw.normal(tokens, widths[0], dtype=dtype), draw.normal(tokens, len(kinds))
    outcome = run(function, x, logits, layers, depth, gated=True, block_rows=2 * rows)
    assert outcome is not None, "it found an activation that it cannot express"
    # The twin in float32, so that its hidden activations are not rounded.
    twin, assignment = moe_mlp_twin(x.float(), logits, layers, depth, bits, activation, gated=True)
    assert torch.equal(outcome[1], assignment), "it chose other experts"
    largest = (x.float().abs().amax(-1, keepdim=True) + 4) * gain**depth
    bound = depth * (error_bound(form, bits) + 1e-6 + (2.0**-8 if dtype == "bfloat16" else 0.0)) * 1.2 * largest
    check_within(outcome[0], twin, bound)


def variants(target: CpuTarget) -> Iterator[Spec]:
    """The paper's two experts, of one layer and of two: 4 bits, one term, both dtypes, all numerics."""
    for dtype, (depth, activation) in itertools.product(DTYPES.values(), ((1, "none"), (2, "relu"), (2, "gelu"))):
        for form in all_forms(target, 4, 1, dtype):
            shift = {"form": form, "bits": 4, "terms": 1, "dtype": dtype}
            yield {"experts": "mult,shift", "depth": depth, **shift, "activation": activation}


MOE = Kernel("moe_mlp", by_name(MoeSpec, build), by_name(MoeSpec, trial), variants)


def run(
    function: Compiled,
    x: Tensor,
    logits: Tensor,
    layers: Sequence[Tensor | None],
    depth: int,
    gated: bool,
    block_rows: int,
) -> tuple[Tensor, Tensor] | None:
    """Call a compiled function; None if its form cannot express an activation."""
    y = memory.empty(x.shape[0], outputs_of(layers), dtype=x.dtype)
    assignment = torch.empty(len(x), dtype=torch.int64)
    logits = logits.float().contiguous()
    gates = gates_of(logits) if gated else torch.ones(len(x))
    ready: list[Tensor] = []
    for weight, offset, bias in layers_of_experts(layers):
        # Ordinary weights are rounded as the twin's.
        ready += (
            [weight.to(x.dtype).float().contiguous()] if offset is None else [weight.contiguous(), offset.contiguous()]
        )
        ready.append(memory.float32_bias(bias, width_of(ExpertLayer(weight, offset, bias))))
    function(memory.stored(x), logits, gates, *ready, memory.stored(y), assignment, FLAG.tensor, block_rows)
    return None if FLAG.was_raised() else (y, assignment)
