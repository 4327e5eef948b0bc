"""Two mixtures of linear layers with a depthwise convolution between them, a band of a grid's rows at a time.

As in `conv_perceptrons`, the hidden activations stay in the second-level cache. Each mixture sorts the tokens of a band
by expert. For each panel of hidden channels, all experts of the first mixture come before the convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.decode import Weights
from shiftadd3d.kernels.cpu.forms import Form
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.moe import Plan
from shiftadd3d.kernels.cpu.trials import Draw
from shiftadd3d.kernels.pack.whole import Format, LinearWeights
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index, Load, Store
from shiftadd3d.kernels.whole.conv_perceptrons import (
    REACH,
    Band,
    RandomConvolution,
    Rows,
    Sizes,
    by_bands,
    convolution_arguments,
    parts_of_image,
    rows_of_band,
    scratch_of,
)
from shiftadd3d.kernels.whole.mixtures import Router, gate_of, gated_by, route
from shiftadd3d.kernels.whole.parts import Ends, NormWeights, Source, held, threads_of
from shiftadd3d.kernels.whole.products import (
    Kind,
    depthwise_values,
    form_of,
    norm_values,
    tensors_of,
    weight_values,
    weights_argument,
)
from shiftadd3d.kernels.whole.program import Exactness, Function, Program, Value
from shiftadd3d.kernels.whole.trials import RandomNorm, outcome_of, random_layer


class Mixed(NamedTuple):
    """What is compiled in of a mixture."""

    terms: tuple[int, ...]  # of the experts, 0 for ordinary weights
    gated: bool


class Experts(NamedTuple):
    """A mixture of linear layers.

    Attributes:
        router: its weight [experts, inputs] and bias.
        layers: one for each expert; codes have as many bits in all.
        gated: whether an expert's outcome is multiplied by its probability.
    """

    router: tuple[Tensor, Tensor]
    layers: Sequence[LinearWeights]
    gated: bool

    @property
    def mixed(self) -> Mixed:
        return Mixed(tuple(layer.terms for layer in self.layers), self.gated)


class _Mixture:
    """One of the two mixtures: its arguments, its memory in a task, and its code.

    Args:
        inputs, outputs: of its layers.
        name: of its arguments, the next of the function.
    """

    def __init__(
        self, target: CpuTarget, form: Form, bits: int, mixed: Mixed, inputs: Expr, outputs: Expr, name: str
    ) -> None:
        self._isa, self._gated, self._experts = Isa(target), mixed.gated, range(len(mixed.terms))
        self._products = [Kind(form, bits, terms).product(target) for terms in mixed.terms]
        self._inputs, self._outputs = inputs, outputs
        self.columns = self._products[0].columns
        self._router = Router.argument(len(mixed.terms), inputs, name)
        self._layers: list[Weights] = [
            weights_argument(product, f"{name}_{number}", terms, inputs, outputs)
            for number, (product, terms) in enumerate(zip(self._products, mixed.terms, strict=True))
        ]

    def allocate(self, room: int) -> None:
        """Memory of a task, for so many tokens."""
        experts = len(self._experts)
        self._scratch = [scratch_of(product, room, self._inputs) for product in self._products]
        self._logits, self._gates = T.alloc(room, experts), T.alloc(room)
        self._assignment = T.alloc(room, dtype="int64")
        self._plan = Plan(T.int64(room), experts, T.int64(room), T.int64(experts))

    def route(self, token: Expr, row: Callable[[Expr], Expr], width: Expr) -> None:
        """Choose a token's expert by its row [width]: ``row(start)``, a vector of it. Widths are whole vectors."""
        isa, logits = self._isa, self._logits.part(token)
        sums = [isa.register(0.0) for _ in self._experts]
        with T.serial(T.truncdiv(width, T.int64(isa.lanes))) as j:
            start = T.bind(j * isa.lanes)
            x = isa.keep(row(start))
            for expert, total in zip(self._experts, sums, strict=True):
                total.value = isa.fma(x, self._router.weight[expert, isa.at(start)], total.value)
        for expert, total in zip(self._experts, sums, strict=True):
            logits[expert] = isa.total(total.value) + self._router.bias[expert]
        self._weigh(token)

    def route_row(self, token: Expr, row: Buffer) -> None:
        """The same of a row of any width that lies in memory."""
        route(self._isa, row, self._inputs, self._router, self._logits.part(token))
        self._weigh(token)

    def _weigh(self, token: Expr) -> None:
        if self._gated:
            self._gates[token] = gate_of(self._logits.part(token), len(self._experts))

    def stage(self, tokens: Expr, load: Load, control: Buffer) -> None:
        """Bring the tokens, whose experts are chosen, into the forms that their experts take."""
        self._plan.sort(self._logits, self._assignment, tokens)
        for expert, product in zip(self._experts, self._products, strict=True):
            first, count = self._tokens_of(expert)

            def read(row: Index, column: Index, lanes: int, first: Expr = first) -> Expr:
                return load(self._token(first + row), column, lanes)

            with T.when(count > 0):
                product.stage(self._scratch[expert], count, self._inputs, read, control)

    def multiply(self, first_panel: Expr, last_panel: Expr, store: Store) -> None:
        """Multiply the staged tokens by the weights of some panels, and store the outcomes."""
        for expert, product in zip(self._experts, self._products, strict=True):
            first, count = self._tokens_of(expert)

            def write(row: Index, column: Index, value: Expr, lanes: int, first: Expr = first) -> None:
                token = self._token(first + row)
                value = gated_by(self._gates[token], value, lanes) if self._gated else value
                store(token, column, value, lanes)

            with T.when(count > 0):
                product.panels(
                    self._scratch[expert], count, self._layers[expert], first_panel, last_panel, lambda x: x, write
                )

    def release(self) -> None:
        for product in self._products:
            product.release()

    def _tokens_of(self, expert: int) -> tuple[Expr, Expr]:
        first, count = self._plan.of_expert(expert)
        return held(first), held(count)

    def _token(self, place: Expr) -> Expr:
        return T.cast(self._plan.order[place], "int64")


class ConvMixture(NamedTuple):
    """What is asked of two mixtures with a convolution between them."""

    bits: int
    mixtures: tuple[Mixed, Mixed]
    eps: float
    activation: Activation
    sizes: Sizes


class ConvMixtureSpec(NamedTuple):
    form: Form
    bits: int
    mixtures: tuple[Mixed, Mixed]
    eps: float
    activation: Activation
    sizes: Sizes
    rows: int  # of a band


def _build(target: CpuTarget, spec: ConvMixtureSpec) -> T.PrimFunc:
    """The function ``(x, norm's two, first mixture's, taps, bias, second mixture's, added, control, y)``.

    A mixture's arguments are its router's weight and bias, and its layers' weights. x [B, tokens, inputs], taps [9,
    hidden], added and y [B, tokens, outputs].
    """
    form, bits, (first, second), eps, activation, size, _ = spec
    with T.function("conv_mixture") as function:
        (batch,) = T.sizes(1)
        inputs, hidden, outputs = (T.int64(width) for width in size[:3])
        source = Source.argument(batch, size.tokens, inputs, eps)
        one = _Mixture(target, form, bits, first, inputs, hidden, "1")
        taps, bias = convolution_arguments(hidden)
        two = _Mixture(target, form, bits, second, hidden, outputs, "2")
        ends = Ends.arguments(source, outputs, residual=True)
        parts = parts_of_image(batch, size.height, threads_of(ends.control))
        apply = Kind(form, bits, max(second.terms)).product(target).activation(activation)
        with T.parallel(batch * parts) as task:
            rows_of_task = Rows.of_task(task, parts, size.height)
            _emit_rows(Isa(target), spec, (one, two), (taps, bias), apply, ends, rows_of_task)
    return function.get()


def _emit_rows(
    isa: Isa,
    spec: ConvMixtureSpec,
    mixtures: tuple[_Mixture, _Mixture],
    convolution: tuple[Buffer, Buffer],
    apply: Callable[[Expr], Expr],
    ends: Ends,
    task: Rows,
) -> None:
    """The code of a task, a band at a time."""
    (one, two), size, rows, norm = mixtures, spec.sizes, spec.rows, ends.norm
    assert norm is not None
    band = Band(isa, size, one.columns, rows)
    room = (rows + 2 * REACH) * size.width
    normal = T.alloc(room, T.int64(size.inputs))
    one.allocate(room)
    two.allocate(rows * size.width)
    with band.each(task) as (fresh, count, first, last):
        source = held((task.image * size.height + fresh) * size.width)
        load, store = isa.reader(ends.x, lambda row: source + row), isa.writer(normal, lambda row: row)
        with isa.groups(count) as (begin, some):
            norm.emit(isa, load, begin, some, T.int64(size.inputs), store)
            with T.serial(some) as i:
                token = T.bind(begin + i)
                one.route_row(token, normal.part(token))
        one.stage(count, isa.reader(normal, lambda row: row), ends.control)
        with T.serial(size.hidden // one.columns) as panel:
            one.multiply(panel, panel + 1, band.store)
            band.convolve(panel, first, last, *convolution, apply, band.keep)
        count = held((last - first) * size.width)
        with T.serial(count) as token:
            two.route(token, lambda start: band.load(token, start, isa.lanes), T.int64(size.hidden))
        two.stage(count, band.load, ends.control)
        top = held((task.image * size.height + first) * size.width)
        two.multiply(T.int64(0), T.int64(-(-size.outputs // two.columns)), ends.store(top))
    one.release()
    two.release()


def _resolve(target: CpuTarget, exactness: Exactness, asked: ConvMixture) -> ConvMixtureSpec:
    terms = max(terms for mixed in asked.mixtures for terms in mixed.terms)
    form = form_of(target, exactness, asked.bits, terms)
    return ConvMixtureSpec(form, *asked, rows=rows_of_band(asked.sizes))


class _RandomMixture:
    """A mixture with random weights, and what tokens that are not exact may be off by behind it."""

    def __init__(self, draw: Draw, bits: int, mixed: Mixed, inputs: int, outputs: int) -> None:
        self.gated, self.experts = mixed.gated, len(mixed.terms)
        self._made = [random_layer(draw, inputs, outputs, Format(bits, terms)) for terms in mixed.terms]
        self.router = draw.normal(self.experts, inputs) / inputs**0.5, draw.normal(self.experts) / 10

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.router, *(tensor for layer, _ in self._made for tensor in tensors_of(layer))]

    def outcomes(self, x: Tensor, off: Tensor, error: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of tokens that are off by no more than `off`: what each expert makes of them [1, tokens, outputs, experts],
        what that may be off by, and logits [1, tokens, experts].

        Args:
            error: of the products, see `RandomConvolution`.
        """
        logits = F.linear(x, *self.router)
        shares = logits.softmax(-1) if self.gated else torch.ones_like(logits)
        peaks = (x.abs() + off).amax(-1, keepdim=True)
        outcomes = [F.linear(x, matrix, layer.bias) for layer, matrix in self._made]
        bounds = [off @ matrix.abs().T + error * peaks * matrix.abs().sum(-1) for _, matrix in self._made]
        return torch.stack(outcomes, -1) * shares.unsqueeze(-2), torch.stack(bounds, -1) * shares.unsqueeze(-2), logits


def _try(function: Compiled, spec: ConvMixtureSpec) -> None:
    """Try both: one thread for each image, and two threads that share an image."""
    draw, size = Draw(), spec.sizes
    one = _RandomMixture(draw, spec.bits, spec.mixtures[0], size.inputs, size.hidden)
    two = _RandomMixture(draw, spec.bits, spec.mixtures[1], size.hidden, size.outputs)
    convolution = RandomConvolution(draw, size, spec.activation, spec.form, spec.bits)
    norm = RandomNorm(draw, size.inputs, spec.eps)
    for threads in (1, 2):
        x, added = draw.normal(1, size.tokens, size.inputs), draw.normal(1, size.tokens, size.outputs)
        given = [x, *norm.tensors, *one.tensors, *convolution.tensors, *two.tensors, added]
        y, normal = outcome_of(function, given, *added.shape, threads=threads), norm(x)
        # The first choice is made in float32.
        outcomes, bounds, logits = one.outcomes(normal, torch.zeros_like(normal), convolution.error)
        chosen = logits.argmax(-1)[..., None, None].expand(1, size.tokens, size.hidden, 1)
        before, off = outcomes.gather(-1, chosen).squeeze(-1), bounds.gather(-1, chosen).squeeze(-1)
        off = convolution.off_behind(off)
        outcomes, bounds, logits = two.outcomes(convolution(before), off, convolution.error)
        # Each token may come from any expert that such errors can make its best.
        largest = two.router[0].abs().sum(0) if two.experts > 1 else torch.zeros(size.hidden)
        doubt = (off @ largest).unsqueeze(-1) + 1e-5
        if two.gated:
            bounds = bounds + (outcomes.abs() + bounds) * doubt.unsqueeze(-1)
        wrong = (y - added).unsqueeze(-1) - outcomes
        right = (wrong.abs() <= bounds + (1 + added.abs()).unsqueeze(-1) * 2e-5).all(-2)
        possible = logits >= logits.amax(-1, keepdim=True) - doubt
        assert bool((right & possible).any(-1).all()), "a token is off by more than it may be"


CONV_MIXTURE = Function("conv_mixture", _build, _try, _resolve)


def conv_mixture(
    program: Program,
    x: Value,
    mixtures: tuple[Experts, Experts],
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    activation: Activation,
    *,
    norm: NormWeights,
    residual: Value,
) -> Value:
    """``second(activation(convolution of first(norm(x)))) + residual``, where each token has an expert of both.

    Args:
        x: [B, tokens, inputs], row by row of the grid.
        mixtures: codes of all layers have as many bits.
        weight, bias: of the convolution [hidden, 1, 3, 3].
    """
    first, second = mixtures
    arguments = [x, *norm_values(program, norm), *_values(program, first)]
    arguments += [*depthwise_values(program, weight, bias), *_values(program, second), residual]
    layers, outputs = (*first.layers, *second.layers), second.layers[0].outputs
    mixed = first.mixed, second.mixed
    sizes = Sizes(first.layers[0].inputs, first.layers[0].outputs, outputs, *grid)
    asked = ConvMixture(max(layer.bits for layer in layers), mixed, norm[2], activation, sizes)
    return program.call(CONV_MIXTURE, arguments, residual.shape, asked)


def _values(program: Program, mixture: Experts) -> list[Value]:
    layers = [value for layer in mixture.layers for value in weight_values(program, layer)]
    return [program.weight(tensor) for tensor in mixture.router] + layers


def serves(mixtures: tuple[Experts, Experts], weight: Tensor, grid: tuple[int, int], columns: int) -> bool:
    """Whether to use `conv_mixture` for such mixtures, with panels of this many columns."""
    formats = {layer.bits for mixture in mixtures for layer in mixture.layers if layer.terms}
    return len(formats) <= 1 and by_bands(weight, grid, columns)
