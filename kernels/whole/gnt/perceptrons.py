"""Perceptrons of narrow tokens, one for all of them or a mixture of several, with norm and residual.

A general mixture (`shiftadd3d.kernels.whole.mixtures`) sorts all tokens first, and decodes weights for each block of
tokens. With narrow layers, moving tokens costs as much as multiplying them. Here a task routes its tokens while they
are in the first-level cache. It puts the tokens of each expert side by side, and computes both layers for some tens of
them at a time. It reads panels, so nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import activate, folded_each, normalize
from shiftadd3d.kernels.cpu.forms import panels as forms
from shiftadd3d.kernels.cpu.forms.panels import AnyForm, panel_arguments, panel_product
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.moe import choose
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, product
from shiftadd3d.kernels.cpu.trials import Draw, check_within
from shiftadd3d.kernels.pack.panel import across, row, stored
from shiftadd3d.kernels.pack.shift import PanelForm, WholeWeights, shift_panel
from shiftadd3d.kernels.reference import activations
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget, current
from shiftadd3d.kernels.runtime.tir import Buffer, Expr
from shiftadd3d.kernels.whole.mixtures import Router, gate_of
from shiftadd3d.kernels.whole.parts import Norm, NormWeights, control_argument, held, rows_of
from shiftadd3d.kernels.whole.program import Dim, Program, Value, fixed

# Tokens of a task, and tokens that an expert takes at once: so few that hidden activations stay in the first-level
# cache. A multiple of the height of all tiles, except those of float32, which have 4 or 6 rows.
_TOKENS, _ROWS = 192, 64


class Perceptron(NamedTuple):
    """Two layers as panels.

    Attributes:
        form: of the products.
        hidden: units between the layers.
        tensors: panel [inputs, hidden], bias [hidden], panel [hidden, outputs], bias [outputs]; padded to whole
            vectors.
    """

    form: AnyForm
    hidden: int
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]


def perceptron_of(weights: Sequence[Tensor], biases: Sequence[Tensor | None], lanes: int) -> Perceptron:
    """A perceptron in float32, from two weights [outputs, inputs] and their biases."""
    tensors: list[Tensor] = []
    for weight, bias in zip(weights, biases, strict=True):
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        tensors += [stored(across(weight, lanes=lanes)), stored(row(bias, lanes))]
    return Perceptron("float32", weights[0].shape[0], (tensors[0], tensors[1], tensors[2], tensors[3]))


def shift_perceptron_of(
    layers: Sequence[WholeWeights], biases: Sequence[Tensor | None], form: AnyForm
) -> Perceptron | None:
    """A perceptron in panels of integers; None if a number of inputs or outputs is not a multiple of 32."""
    if form == "float32" or any(size % 32 for layer in layers for size in layer.integers.shape):
        return None
    first, second = (shift_panel(layer, form) for layer in layers)
    of_first, of_second = (
        torch.zeros(len(layer.unit)) if bias is None else stored(bias)
        for layer, bias in zip(layers, biases, strict=True)
    )
    return Perceptron(form, len(layers[0].unit), (first, of_first, second, of_second))


class _FloatLayers:
    """A perceptron in float32: arguments of a function, and its code within a task."""

    def __init__(self, target: CpuTarget, name: str, width: int, hidden: int) -> None:
        self._isa, self._width, self._hidden = Isa(target), width, hidden
        deep, wide = self._isa.padded(hidden), self._isa.padded(width)
        self._first, self._first_bias = T.panel(f"first{name}", width, deep), T.panel(f"first_bias{name}", deep)
        self._second, self._second_bias = T.panel(f"second{name}", hidden, wide), T.panel(f"second_bias{name}", wide)

    def begin(self) -> None:
        self._activation = T.alloc(_ROWS + ROW_PADDING, self._first_bias.extent(0))

    def emit(self, rows: Expr, tokens: Buffer, activation: Activation, out: Buffer) -> None:
        isa = self._isa
        deep, wide = self._first_bias.extent(0), self._second_bias.extent(0)
        first, second = (self._width, tokens, self._first), (self._hidden, self._activation, self._second)
        product(isa, rows, deep, self._first_bias, [first], self._activation, partial(activate, isa, activation))
        product(isa, rows, wide, self._second_bias, [second], out)

    def finish(self, control: Buffer) -> None:
        pass


class _ShiftLayers:
    """The methods of `_FloatLayers` for panels of integers."""

    def __init__(self, target: CpuTarget, name: str, width: int, hidden: int, form: PanelForm) -> None:
        self._target, self._width, self._hidden = target, width, hidden
        self._form: PanelForm = form
        (self._first,) = panel_arguments(form, [(width, hidden)], f"{name}_first")
        self._first_bias = T.panel(f"first_bias{name}", hidden)
        (self._second,) = panel_arguments(form, [(hidden, width)], f"{name}_second")
        self._second_bias = T.panel(f"second_bias{name}", width)

    def begin(self) -> None:
        self._product = panel_product(self._target, self._form)
        self._tokens, self._staged = self._product.staged(_ROWS, self._width), self._product.staged(_ROWS, self._hidden)
        self._activation = T.alloc(_ROWS + forms.ROW_PADDING, self._hidden)

    def emit(self, rows: Expr, tokens: Buffer, activation: Activation, out: Buffer) -> None:
        isa, hidden = self._product.isa, self._activation

        def keep(r: Expr, c: int, x: Expr) -> None:
            hidden[r, isa.at(c)] = activate(isa, activation, x)

        self._product.stage(self._tokens, rows, tokens)
        self._product.multiply(rows, self._tokens, self._first, self._first_bias, keep)
        self._product.stage(self._staged, rows, hidden)
        self._product.multiply(rows, self._staged, self._second, self._second_bias, out)

    def finish(self, control: Buffer) -> None:
        self._product.finish(control)


class _Tokens(NamedTuple):
    """Those of a task, normalised, each expert's side by side from a multiple of `_TOKENS` on."""

    packed: Buffer  # [experts * _TOKENS, C]
    origin: Buffer  # [experts * _TOKENS] int64: the token's number
    gates: Buffer  # [experts * _TOKENS]: what its outcome is multiplied by
    counts: Buffer  # [experts] int64

    @classmethod
    def of(cls, experts: int, width: int) -> _Tokens:
        """Memory for them."""
        room = experts * _TOKENS
        return cls(T.alloc(room, width), T.alloc(room, dtype="int64"), T.alloc(room), T.alloc(experts, dtype="int64"))

    def fill(
        self,
        isa: Isa,
        x: Buffer,
        top: Expr,
        count: Expr,
        norm: Norm,
        routing: tuple[Router, Buffer] | None,
        *,
        gated: bool,
    ) -> None:
        """Take up `count` rows of x from `top` on.

        Args:
            routing: of several experts, the router, and where the number of each token's expert goes.
        """
        experts, width, lanes = self.counts.extent(0), self.packed.extent(1), isa.lanes
        normal, sums, table = T.alloc(lanes, width), T.alloc(lanes, lanes), T.alloc(experts, lanes)
        logits, chosen, best = T.alloc(experts), T.alloc(1, dtype="int64"), T.alloc(1)
        for number in range(experts):
            self.counts[number] = T.int64(0)

        def keep(i: Expr, c: int, x: Expr) -> None:
            normal[i, isa.at(c)] = isa.fma(x, norm.gain[isa.at(c)], norm.shift[isa.at(c)])

        with T.serial((count + (lanes - 1)) // lanes) as batch:
            first = T.bind(top + batch * lanes)
            here = T.bind(T.min(T.int64(lanes), top + count - first))
            normalize(isa, here, width, lambda i, c: x[first + i, isa.at(c)], keep, T.float32(norm.eps))
            if routing is not None:
                for number in range(experts):
                    _score(isa, here, normal, routing[0].weight.part(number), sums)
                    scores = folded_each(isa, sums, lambda a, b: a + b)
                    table[number, isa.at(0)] = scores + isa.splat(routing[0].bias[number])
            with T.serial(here) as i:
                chosen[0] = T.int64(0)
                if routing is not None:
                    for number in range(experts):
                        logits[number] = table[number, i]
                    choose(logits, experts, chosen, best)
                    routing[1][first + i] = chosen[0]
                place = T.bind(chosen[0] * _TOKENS + self.counts[chosen[0]])
                self.counts[chosen[0]] = self.counts[chosen[0]] + 1
                self.origin[place] = first + i
                if gated:
                    self.gates[place] = gate_of(logits, experts)
                for c in range(0, width, lanes):
                    self.packed[place, isa.at(c)] = normal[i, isa.at(c)]


def _score(isa: Isa, rows: Expr, x: Buffer, weight: Buffer, sums: Buffer) -> None:
    """Multiply rows by a weight [width]. `sums` gets a vector for each row; its lanes are still to be summed up."""
    with T.serial(rows) as i:
        total = isa.splat(0.0)
        for c in range(0, x.extent(1), isa.lanes):
            total = isa.fma(x[i, isa.at(c)], weight[isa.at(c)], total)
        sums[i, isa.at(0)] = total


class PerceptronsSpec(NamedTuple):
    """What is compiled in.

    Attributes:
        width: of the tokens.
        experts: form and hidden units of each expert.
        gated: whether an expert's outcome is multiplied by its probability.
        eps: epsilon of the norm.
    """

    width: int
    experts: tuple[tuple[AnyForm, int], ...]
    activation: Activation
    gated: bool
    eps: float


def _build(target: CpuTarget, spec: PerceptronsSpec) -> T.PrimFunc:
    """The function ``(x, weight and bias of the norm, of the router, panels of all experts, control, y, assignment)``.

    With one expert there is neither a router nor an assignment.
    """
    isa, (width, experts, activation, gated, eps) = Isa(target), spec
    with T.function("perceptrons") as function:
        B, N = T.sizes(2)
        x = T.argument("x", (B, N, width))
        norm = Norm.arguments(T.int64(width), eps)
        router = Router.argument(len(experts), width) if len(experts) > 1 else None
        layers = [
            _FloatLayers(target, str(number), width, hidden)
            if form == "float32"
            else _ShiftLayers(target, str(number), width, hidden, form)
            for number, (form, hidden) in enumerate(experts)
        ]
        control = control_argument()
        y = T.argument("y", (B, N, width))
        assignment = T.argument("assignment", (B, N), "int64").flat() if router else None
        x, y = rows_of(x), rows_of(y)
        tokens = held(B * N)
        with T.parallel((tokens + (_TOKENS - 1)) // _TOKENS) as task:
            top = T.bind(task * _TOKENS)
            count = T.bind(T.min(T.int64(_TOKENS), tokens - top))
            of_experts = _Tokens.of(len(experts), width)
            for of_expert in layers:
                of_expert.begin()
            outcome = T.alloc(_ROWS + max(ROW_PADDING, forms.ROW_PADDING), width)
            routing = None if router is None or assignment is None else (router, assignment)
            of_experts.fill(isa, x, top, count, norm, routing, gated=gated)
            for number, of_expert in enumerate(layers):
                many = of_experts.counts[number]
                with T.serial((many + (_ROWS - 1)) // _ROWS) as part:
                    first = T.bind(number * _TOKENS + part * _ROWS)
                    rows = T.bind(T.min(T.int64(_ROWS), many - part * _ROWS))
                    of_expert.emit(rows, of_experts.packed.below(first), activation, outcome)
                    with T.serial(rows) as r:
                        token = T.bind(of_experts.origin[first + r])
                        for c in range(0, width, isa.lanes):
                            value = outcome[r, isa.at(c)]
                            value = value * isa.splat(of_experts.gates[first + r]) if gated else value
                            y[token, isa.at(c)] = x[token, isa.at(c)] + value
            for of_expert in layers:
                of_expert.finish(control)
    return function.get()


def _try(function: Compiled, spec: PerceptronsSpec) -> None:
    """More tokens than a task takes; experts with more tokens than they take at once, and with fewer."""
    width, experts, activation, gated, eps = spec
    draw, lanes = Draw(), current().lanes
    x, gain, shift = draw.normal(3, 2 * _TOKENS // 3 + 11, width), 1 + 0.1 * draw.normal(width), draw.normal(width)
    router, router_bias = draw.normal(len(experts), width), draw.normal(len(experts))
    normal = F.layer_norm(x, (width,), gain, shift, eps)
    outcomes, bounds, tensors = [], [], []
    for form, hidden in experts:
        layers = [draw.whole(width, hidden), draw.whole(hidden, width)]
        weights = [layer.integers * layer.unit[:, None] for layer in layers]
        biases = [draw.normal(hidden), draw.normal(width)]
        made = shift_perceptron_of(layers, biases, form) or perceptron_of(weights, biases, lanes)
        assert made.form == form
        tensors += made.tensors
        first = F.linear(normal, weights[0], biases[0])
        second = activations.apply(activation, first)
        outcomes.append(F.linear(second, weights[1], biases[1]))
        error = 0.0 if form == "float32" else forms.error_bound(form)
        size = [(abs(inputs), abs(weight).sum(-1)) for inputs, weight in zip((normal, second), weights, strict=True)]
        of_hidden = (error + 1e-6) * (size[0][0].amax(-1, keepdim=True) * size[0][1]).amax(-1, keepdim=True) * 1.2
        bounds.append((of_hidden + (error + 1e-6) * (size[1][0].amax(-1, keepdim=True) + of_hidden)) * size[1][1])
    control, y = torch.tensor([0, 2], dtype=torch.int32), torch.empty_like(x)
    assignment = torch.empty(x.shape[:2], dtype=torch.int64)
    routing = ([router, router_bias], [assignment]) if len(experts) > 1 else ([], [])
    function(x, gain, shift, *routing[0], *tensors, control, y, *routing[1])
    assert control[0] == 0, "it found an activation that it cannot express"
    logits = F.linear(normal.double(), router.double(), router_bias.double())
    chosen = logits.argmax(-1, keepdim=True)
    index = chosen[..., None].expand(*x.shape, 1)
    expected, bound = (torch.stack(some, -1).gather(-1, index)[..., 0] for some in (outcomes, bounds))
    if gated:
        expected = expected * logits.softmax(-1).gather(-1, chosen).float()
    # If the logits of two experts are nearly equal, either is right.
    ordered = F.pad(logits.sort(-1, descending=True).values, (0, 1), value=-torch.inf)
    clear = ordered[..., 0] - ordered[..., 1] > 1e-4
    check_within(y, x + expected, torch.where(clear[..., None], bound + 1e-5, torch.inf))
    if len(experts) > 1:
        assert torch.equal(assignment[clear], chosen[..., 0][clear]), "it chose other experts"


PERCEPTRONS = fixed("perceptrons", _build, _try)


def perceptrons(
    program: Program,
    x: Value,
    norm: NormWeights,
    experts: Sequence[Perceptron],
    activation: Activation,
    *,
    router: tuple[Tensor, Tensor] | None = None,
    gated: bool = False,
) -> tuple[Value, ...]:
    """``x + expert(norm(x))`` [B, N, C]. With several experts also the number of each token's expert, [B, N] int64.

    Args:
        norm: weight, bias and epsilon.
        activation: between the layers of an expert.
        router: weight [experts, C] and bias [experts]; only with several experts.
        gated: whether an expert's outcome is multiplied by its probability.
    """
    *affine, eps = norm
    tensors = [*affine, *(router or ()), *(tensor for expert in experts for tensor in expert.tensors)]
    outcomes: list[tuple[tuple[Dim, ...], str]] = [(x.shape, "float32")]
    if router is not None:
        outcomes.append((x.shape[:2], "int64"))
    width = x.shape[-1]
    assert isinstance(width, int)
    kinds: tuple[tuple[AnyForm, int], ...] = tuple((expert.form, expert.hidden) for expert in experts)
    asked = PerceptronsSpec(width, kinds, activation, gated, eps)
    return program.call_for(PERCEPTRONS, [x, *map(program.weight, tensors)], outcomes, asked)
