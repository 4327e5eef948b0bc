"""Mixtures of experts on CPUs, in one call: tokens are routed, sorted by expert, taken through it, and put back.

A counting sort lists the tokens of each expert; each task then reads a block of one expert's tokens from where they
lie, takes it through all layers, and writes the outcome to where it belongs: no sorted copy of the tokens is ever
made.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu import bfloat16
from shiftadd3d.kernels.cpu.matshift import DTYPES
from shiftadd3d.kernels.cpu.mlp import emit_layers
from shiftadd3d.kernels.cpu.shift_product import (
    Dtype,
    Float32Product,
    Form,
    Scratch,
    ShiftProduct,
    Weights,
    all_forms,
    error_bound,
    shift_product,
    tile_shape,
    transpose,
)
from shiftadd3d.kernels.cpu.vectors import Vectors
from shiftadd3d.kernels.reference import power_of_two
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
from shiftadd3d.kernels.runtime.kernel import Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget


class _MultProduct(Float32Product):
    """A product with ordinary weights: panels are transposed, from [outputs, inputs] float32, where others decode."""

    def __init__(self, target: CpuTarget) -> None:
        super().__init__(target, "float32", bits=4, terms=1, dtype="float32")  # no codes are ever looked at

    def decode(self, scratch: Scratch, weights: Weights, start: Any, turn: Any, count: Any) -> None:
        T, lanes = self._T, self.lanes
        first = T.bind(turn * self.block)

        def weight(column: Any, inputs: Any) -> Any:
            # Columns beyond the last one come to something, which nobody stores.
            return weights.codes[T.min(start + column, weights.outputs - 1), inputs]

        with T.serial(count // lanes) as part:
            for j in self.vectors:
                rows = [T.bind(weight(j + i, self.at(first + part * lanes))) for i in range(lanes)]
                for k, row in enumerate(transpose(rows)):
                    T.buffer_store(scratch.panel, row, [part * lanes + k, self.at(j)])
        with T.serial(count % lanes) as rest, T.serial(self.columns) as column:
            position = count // lanes * lanes + rest
            T.buffer_store(scratch.panel, weight(column, first + position), [position, column])
        with T.serial(-count % self.unroll) as rest:
            for j in self.vectors:
                T.buffer_store(scratch.panel, self.splat(0, "float32"), [count + rest, self.at(j)])


def build(
    target: CpuTarget,
    experts: str,
    depth: int,
    form: Form,
    bits: int,
    terms: int,
    dtype: Dtype,
    activation: Activation,
) -> Any:
    """The function ``(x, logits, gates, all layers' tensors, y, assignment, flag, rows of a block)``.

    x and y are float32, or the bits of bfloat16 as int16; logits, gates (what each token's outcome is multiplied by),
    ordinary weights, which have no offset, and biases are float32. See `ShiftProduct.stage` for the flag.

    Args:
        experts: kinds of the experts, ``"mult"`` or ``"shift"``, with commas between them.
        depth: layers of an expert.
    """
    from tvm.script import tirx as T
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import prim_func

    vectors, kinds = Vectors(target), experts.split(",")
    storage = "int16" if dtype == "bfloat16" else "float32"

    def argument(name: str, shape: Sequence[Any], kind: str, align: int) -> Any:
        return T.match_buffer(T.arg(name, T.handle()), shape, kind, align=align)

    def layer(name: str, kind: str, inputs: Any, outputs: Any) -> Weights:
        if kind == "mult":
            weight, offset = argument(f"weight{name}", (outputs, inputs), "float32", 4), None
        else:
            bytes_of_row = T.int64()
            weight = argument(f"codes{name}", (terms, outputs, bytes_of_row), "uint8", 1)
            offset = argument(f"offset{name}", (terms, outputs), "int8", 1)
        return Weights(weight, offset, argument(f"bias{name}", (outputs,), "float32", 4), inputs, outputs)

    def product(kind: str) -> ShiftProduct:
        return _MultProduct(target) if kind == "mult" else shift_product(target, form, bits, terms, dtype)

    with IRBuilder() as builder, prim_func(s_tir=True):
        T.func_name("moe_mlp")
        T.func_attr({"tirx.noalias": True})
        tokens, inputs, outputs = T.int64(), T.int64(), T.int64()
        X = argument("x", (tokens, inputs), storage, 4)
        logits = argument("logits", (tokens, len(kinds)), "float32", 4)
        gates = argument("gates", (tokens,), "float32", 4)
        chains = []
        for number, kind in enumerate(kinds):
            widths = [inputs, *(T.int64() for _ in range(depth - 1)), outputs]
            ends = enumerate(itertools.pairwise(widths))
            chains.append([layer(f"{number}_{i}", kind, *between) for i, between in ends])
        Y = argument("y", (tokens, outputs), storage, 4)
        assignment = argument("assignment", (tokens,), "int64", 8)
        flag = argument("flag", (1,), "int32", 4)
        rows_of_block = T.arg("rows_of_block", T.int64())
        plan = _Plan(tokens, len(kinds), rows_of_block)
        plan.route(logits, assignment)
        with T.parallel(plan.blocks()) as task:
            first, rows = plan.tokens_of(task)

            def token(row: Any, first: Any = first) -> Any:
                return T.cast(plan.order[first + row], "int64")

            def at(start: Any, count: int) -> Any:
                return start if count == 1 else T.ramp(start, 1, count)

            def load(row: Any, start: Any, count: int) -> Any:
                x = X[token(row), at(start, count)]
                return bfloat16.widen(x, count) if dtype == "bfloat16" else x

            def store(row: Any, column: Any, y: Any, count: int) -> None:
                gate = gates[token(row)]
                y = y * (gate if count == 1 else T.broadcast(gate, count))
                y = bfloat16.narrow(y, count) if dtype == "bfloat16" else y
                T.buffer_store(Y, y, [token(row), at(column, count)])

            for number, (kind, chain) in enumerate(zip(kinds, chains, strict=True)):
                with T.If(plan.expert_of[task] == number), T.Then():
                    products = [product(kind) for _ in chain]
                    emit_layers(vectors, products, chain, activation, rows_of_block, rows, load, store, flag)
    return builder.get()


class _Plan:
    """Which tokens each task takes through which expert, as statements of a function.

    Args:
        tokens: their number, an int64 expression.
        experts: their number.
        block: tokens that a task takes at most, an int64 expression.
    """

    def __init__(self, tokens: Any, experts: int, block: Any) -> None:
        import tvm.script

        T = self._T = tvm.script.tirx
        self._tokens, self._experts, self._block = tokens, experts, block
        most = T.bind((tokens + block - 1) // block + experts)
        self.order = T.alloc_buffer((tokens,), "int32", align=64)  # tokens, sorted by expert
        self.expert_of = T.alloc_buffer((most,), "int32", align=64)  # of each task
        self._first = T.alloc_buffer((most,), "int64", align=64)  # place in `order` that each task begins at
        self._begin = T.alloc_buffer((experts + 1,), "int64", align=64)  # place that each expert's tokens begin at
        self._next = T.alloc_buffer((experts,), "int64", align=64)
        self._best = T.alloc_buffer((1,), "float32", align=64)
        self._count = T.alloc_buffer((1,), "int64", align=64)  # of tasks

    def route(self, logits: Any, assignment: Any) -> None:
        """Emit the choice of the experts [tokens] by their logits [tokens, experts], and a counting sort by it."""
        T, experts = self._T, range(self._experts)
        for expert in experts:
            T.buffer_store(self._next, T.int64(0), [expert])
        with T.serial(self._tokens) as token:
            T.buffer_store(assignment, T.int64(0), [token])
            T.buffer_store(self._best, logits[token, 0], [0])
            for expert in experts[1:]:
                rival, best = T.bind(logits[token, expert]), self._best[0]
                # As in torch, NaN counts as the largest of all, and the first of equals wins.
                with T.If(T.Or(rival > best, T.And(self._is_nan(rival), T.Not(self._is_nan(best))))), T.Then():
                    T.buffer_store(assignment, T.int64(expert), [token])
                    T.buffer_store(self._best, rival, [0])
            T.buffer_store(self._next, self._next[assignment[token]] + 1, [assignment[token]])
        T.buffer_store(self._begin, T.int64(0), [0])
        for expert in experts:
            T.buffer_store(self._begin, self._begin[expert] + self._next[expert], [expert + 1])
            T.buffer_store(self._next, self._begin[expert], [expert])
        with T.serial(self._tokens) as token:
            expert = T.bind(assignment[token])
            T.buffer_store(self.order, T.cast(token, "int32"), [self._next[expert]])
            T.buffer_store(self._next, self._next[expert] + 1, [expert])
        self._share_out()

    def _is_nan(self, x: Any) -> Any:
        """By its bits: TVM's simplifier knows nothing of NaN, and takes ``x == x`` for true."""
        T = self._T
        return (T.reinterpret("int32", x) & T.int32(0x7FFFFFFF)) > T.int32(0x7F800000)

    def _share_out(self) -> None:
        """Experts take turns in the list of tasks, so that threads with equal parts of it have equally much to do."""
        T, experts = self._T, range(self._experts)
        for expert in experts:
            T.buffer_store(self._next, self._begin[expert], [expert])
        T.buffer_store(self._count, T.int64(0), [0])
        largest = T.bind(self._largest())
        with T.serial((largest + self._block - 1) // self._block):
            for expert in experts:
                with T.If(self._next[expert] < self._begin[expert + 1]), T.Then():
                    T.buffer_store(self.expert_of, T.int32(expert), [self._count[0]])
                    T.buffer_store(self._first, self._next[expert], [self._count[0]])
                    T.buffer_store(self._next, self._next[expert] + self._block, [expert])
                    T.buffer_store(self._count, self._count[0] + 1, [0])

    def _largest(self) -> Any:
        """The number of tokens of the expert that has most."""
        T = self._T
        largest = T.int64(0)
        for expert in range(self._experts):
            largest = T.max(largest, self._begin[expert + 1] - self._begin[expert])
        return largest

    def blocks(self) -> Any:
        """How many tasks there are."""
        return self._T.bind(self._count[0])

    def tokens_of(self, task: Any) -> tuple[Any, Any]:
        """The place in `order` that a task's tokens begin at, and their number."""
        T = self._T
        first = T.bind(self._first[task])
        end = T.bind(self._begin[T.cast(self.expert_of[task], "int64") + 1])
        return first, T.bind(T.min(self._block, end - first))


def trial(
    function: Any, experts: str, depth: int, form: Form, bits: int, terms: int, dtype: Dtype, activation: Activation
) -> None:
    """Odd sizes with tails on every side, several blocks for each expert, more than one block of inputs."""
    rows, columns = tile_shape(targets.current(), form)
    generator = torch.Generator().manual_seed(0)
    widths = [16 * 20 + 5, *[columns + 3] * (depth - 1), columns + 7]
    tokens, kinds = 7 * rows + 1, experts.split(",")
    layers: list[Tensor | None] = []
    gain = 1.0
    for kind, (inputs, outputs) in itertools.product(kinds, itertools.pairwise(widths)):
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        codes, offset, _ = power_of_two.encode(weight, bits, terms)
        layers += [weight, None] if kind == "mult" else [power_of_two.pack(codes, bits), offset]
        layers.append(torch.randn(outputs, generator=generator))
        gain = max(gain, float(power_of_two.decode(codes, offset, bits).abs().sum(-1).max()))
    x = torch.randn(tokens, widths[0], generator=generator).to(getattr(torch, dtype))
    logits = torch.randn(tokens, len(kinds), generator=generator)
    outcome = run(function, x, logits, layers, depth, gated=True, block_rows=2 * rows)
    assert outcome is not None, "it found an activation that it cannot express"
    # The twin in float32, so that its hidden activations are not rounded.
    twin, assignment = moe_mlp_twin(x.float(), logits, layers, depth, bits, activation, gated=True)
    assert torch.equal(outcome[1], assignment), "it chose other experts"
    largest = (x.float().abs().amax(-1, keepdim=True) + 4) * gain**depth
    bound = depth * (error_bound(form, bits) + 1e-6 + (2.0**-8 if dtype == "bfloat16" else 0.0)) * 1.2 * largest
    worst = ((outcome[0].float() - twin).abs() - bound).max().item()
    assert worst <= 0, f"it is off by {worst:.2g} more than it may be"


def variants(target: CpuTarget) -> Iterator[dict[str, Any]]:
    """The paper's two experts, of one layer and of two: 4 bits, one term, both dtypes, all numerics."""
    for dtype, (depth, activation) in itertools.product(DTYPES.values(), ((1, "none"), (2, "relu"), (2, "gelu"))):
        for form in all_forms(target, 4, 1, dtype):
            shift = {"form": form, "bits": 4, "terms": 1, "dtype": dtype}
            yield {"experts": "mult,shift", "depth": depth, **shift, "activation": activation}


MOE = Kernel("moe_mlp", build, trial, variants)


def run(
    function: Any,
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
    flag = torch.zeros(1, dtype=torch.int32)
    logits = logits.float().contiguous()
    gates = gates_of(logits) if gated else torch.ones(len(x))
    ready: list[Tensor] = []
    for weight, offset, bias in layers_of_experts(layers):
        # Ordinary weights are rounded as the twin's.
        ready += (
            [weight.to(x.dtype).float().contiguous()] if offset is None else [weight.contiguous(), offset.contiguous()]
        )
        ready.append(memory.float32_bias(bias, width_of(ExpertLayer(weight, offset, bias))))
    numbers = [tensor.view(torch.int16) if x.dtype == torch.bfloat16 else tensor for tensor in (x, y)]
    function(numbers[0], logits, gates, *ready, numbers[1], assignment, flag, block_rows)
    return None if flag.item() else (y, assignment)
