"""Two mixtures of linear layers with a depthwise convolution between them, a band of a grid's rows at a time.

As in `conv_perceptrons`, the hidden activations stay in the second-level cache. Each mixture sorts the tokens of a band
by expert. For each panel of hidden channels, all experts of the first mixture come before the convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.blocks import COARSE_GELU_ERROR
from shiftadd3d.kernels.cpu.decode import Weights
from shiftadd3d.kernels.cpu.forms import Form, error_bound
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.moe import Plan
from shiftadd3d.kernels.cpu.trials import Draw
from shiftadd3d.kernels.pack.whole import LinearWeights
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.depthwise import depthwise_conv_twin
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index, Load, Store
from shiftadd3d.kernels.whole.conv_perceptrons import (
    KERNEL,
    REACH,
    Band,
    Rows,
    Sizes,
    by_bands,
    parts_of_image,
    rows_of_band,
    scratch_of,
)
from shiftadd3d.kernels.whole.mixtures import gate_of, route
from shiftadd3d.kernels.whole.parts import Norm, control_argument, held, rows_of, threads_of
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


class _Kinds(NamedTuple):
    """What is compiled in of a mixture."""

    terms: tuple[int, ...]  # of the experts, 0 for ordinary weights
    gated: bool


class _Mixture:
    """One of the two mixtures: its arguments, its memory in a task, and its code.

    Args:
        inputs, outputs: of its layers.
        name: of its arguments, the next of the function.
    """

    def __init__(
        self, target: CpuTarget, form: Form, bits: int, kinds: _Kinds, inputs: Expr, outputs: Expr, name: str
    ) -> None:
        self._isa, self._gated, self._experts = Isa(target), kinds.gated, range(len(kinds.terms))
        self._products = [product_of(target, form, bits, terms) for terms in kinds.terms]
        self._inputs, self._outputs = inputs, outputs
        self.columns = self._products[0].columns
        self._router = T.argument(f"router{name}", (len(kinds.terms), inputs))
        self._router_bias = T.argument(f"router_bias{name}", (len(kinds.terms),))
        self._layers: list[Weights] = [
            weights_argument(product, f"{name}_{number}", terms, inputs, outputs)
            for number, (product, terms) in enumerate(zip(self._products, kinds.terms, strict=True))
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
                total.value = isa.fma(x, self._router[expert, isa.at(start)], total.value)
        for expert, total in zip(self._experts, sums, strict=True):
            logits[expert] = isa.total(total.value) + self._router_bias[expert]
        self._weigh(token)

    def route_row(self, token: Expr, row: Buffer) -> None:
        """The same of a row of any width that lies in memory."""
        route(self._isa, row, self._inputs, self._router, self._router_bias, self._logits.part(token))
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
                gate = self._gates[token]
                value = value * (gate if lanes == 1 else T.broadcast(gate, lanes)) if self._gated else value
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


def _build(
    target: CpuTarget,
    form: Form,
    bits: int,
    mixtures: tuple[_Kinds, _Kinds],
    eps: float,
    activation: Activation,
    sizes: tuple[int, ...],
    rows: int,
) -> T.PrimFunc:
    """The function ``(x, norm's two, first mixture's, taps, bias, second mixture's, added, control, y)``.

    A mixture's arguments are its router's weight and bias, and its layers' weights. x [B, tokens, inputs], taps [9,
    hidden], added and y [B, tokens, outputs].
    """
    isa, size = Isa(target), Sizes(*sizes)
    with T.function("conv_mixture") as function:
        (batch,) = T.sizes(1)
        inputs, hidden, outputs = (T.int64(width) for width in size[:3])
        height, width = size.height, size.width
        x, norm = T.argument("x", (batch, height * width, inputs)), Norm.arguments(inputs, eps)
        one = _Mixture(target, form, bits, _Kinds(*mixtures[0]), inputs, hidden, "1")
        taps, bias = T.argument("taps", (KERNEL * KERNEL, hidden)), T.argument("bias", (hidden,))
        two = _Mixture(target, form, bits, _Kinds(*mixtures[1]), hidden, outputs, "2")
        added, control = T.argument("added", (batch, height * width, outputs)), control_argument()
        y = T.argument("y", (batch, height * width, outputs))
        x, y, added = rows_of(x), rows_of(y), rows_of(added)
        parts = parts_of_image(batch, height, threads_of(control))
        apply = product_of(target, form, bits, max(mixtures[1][0])).activation(activation)
        with T.parallel(batch * parts) as task:
            rows_of_task = Rows.of_task(task, parts, height)
            band = Band(isa, size, one.columns, rows)
            room = (rows + 2 * REACH) * width
            normal = T.alloc(room, inputs)
            one.allocate(room)
            two.allocate(rows * width)
            with band.each(rows_of_task) as (fresh, count, first, last):
                source = held((rows_of_task.image * height + fresh) * width)
                load, store = isa.reader(x, lambda row: source + row), isa.writer(normal, lambda row: row)
                with T.serial((count + (isa.lanes - 1)) // isa.lanes) as group:
                    begin = T.bind(group * isa.lanes)
                    some = T.bind(T.min(T.int64(isa.lanes), count - begin))
                    norm.emit(isa, load, begin, some, inputs, store)
                    with T.serial(some) as i:
                        token = T.bind(begin + i)
                        one.route_row(token, normal.part(token))
                one.stage(count, isa.reader(normal, lambda row: row), control)
                with T.serial(size.hidden // one.columns) as panel:
                    one.multiply(panel, panel + 1, band.store)
                    band.convolve(panel, first, last, taps, bias, apply, band.keep)
                count = held((last - first) * width)
                with T.serial(count) as token:
                    two.route(token, lambda start: band.load(token, start, isa.lanes), hidden)
                two.stage(count, band.load, control)
                top = held((rows_of_task.image * height + first) * width)

                def add(row: Index, column: Index, value: Expr, lanes: int) -> None:
                    at = top + row, T.at(column, lanes)
                    y[at] = value + added[at]

                two.multiply(T.int64(0), T.int64(-(-size.outputs // two.columns)), add)
            one.release()
            two.release()
    return function.get()


def _resolve(target: CpuTarget, exactness: Exactness, spec: dict[str, Any]) -> dict[str, Any]:
    terms = max(*spec["mixtures"][0][0], *spec["mixtures"][1][0])
    form = form_of(target, exactness, spec["bits"], terms)
    return spec | {"form": form, "rows": rows_of_band(Sizes(*spec["sizes"]))}


def _try(
    function: Compiled,
    form: Form,
    bits: int,
    mixtures: tuple[_Kinds, _Kinds],
    eps: float,
    activation: Activation,
    sizes: tuple[int, ...],
    rows: int,
) -> None:
    """Try both: one thread for each image, and two threads that share an image."""
    draw, size = Draw(), Sizes(*sizes)
    inputs, hidden, outputs, height, width = size
    tokens, error = height * width, error_bound(form, bits) + 1e-6
    ends = (inputs, hidden), (hidden, outputs)
    kinds = [_Kinds(*mixture) for mixture in mixtures]
    made = [
        [random_layer(draw, *between, bits, terms) for terms in kind.terms]
        for kind, between in zip(kinds, ends, strict=True)
    ]
    routers = [
        (draw.normal(len(kind.terms), end[0]) / end[0] ** 0.5, draw.normal(len(kind.terms)) / 10)
        for kind, end in zip(kinds, ends, strict=True)
    ]
    taps, bias = draw.normal(hidden, 1, KERNEL, KERNEL) / KERNEL, draw.normal(hidden)
    gain, shift = draw.normal(inputs) + 1, draw.normal(inputs)
    given = [[tensor for layer, _ in layers for tensor in tensors_of(layer)] for layers in made]
    flat, coarse = taps.flatten(1).T.contiguous(), COARSE_GELU_ERROR if error_bound(form, bits) else 0.0
    for threads in (1, 2):
        x, added = draw.normal(1, tokens, inputs), draw.normal(1, tokens, outputs)
        control, y = torch.tensor([0, threads], dtype=torch.int32), torch.empty(added.shape)
        function(x, gain, shift, *routers[0], *given[0], flat, bias, *routers[1], *given[1], added, control, y)
        assert control[0] == 0, "it found an activation that it cannot express"
        normal = F.layer_norm(x, (inputs,), gain, shift, eps)
        none = torch.zeros_like(normal)
        # The first choice is made in float32.
        outcomes, bounds, logits = _outcomes(normal, none, made[0], routers[0], kinds[0].gated, error)
        chosen = logits.argmax(-1)[..., None, None].expand(1, tokens, hidden, 1)
        before, off = outcomes.gather(-1, chosen).squeeze(-1), bounds.gather(-1, chosen).squeeze(-1)
        mixed = depthwise_conv_twin(before, taps, bias, height, width, activation)
        # The effect of errors before the convolution on its outputs, with the steepest slope of gelu.
        off = depthwise_conv_twin(off, taps.abs(), torch.zeros(hidden), height, width, "none") * 1.2 + coarse
        outcomes, bounds, logits = _outcomes(mixed, off, made[1], routers[1], kinds[1].gated, error)
        # Each token may come from any expert that such errors can make its best.
        largest = routers[1][0].abs().sum(0) if len(kinds[1].terms) > 1 else torch.zeros(hidden)
        doubt = (off @ largest).unsqueeze(-1) + 1e-5
        if kinds[1].gated:
            bounds = bounds + (outcomes.abs() + bounds) * doubt.unsqueeze(-1)
        wrong = (y - added).unsqueeze(-1) - outcomes
        right = (wrong.abs() <= bounds + (1 + added.abs()).unsqueeze(-1) * 2e-5).all(-2)
        possible = logits >= logits.amax(-1, keepdim=True) - doubt
        assert bool((right & possible).any(-1).all()), "a token is off by more than it may be"


def _outcomes(
    x: Tensor,
    off: Tensor,
    layers: Sequence[tuple[LinearWeights, Tensor]],
    router: tuple[Tensor, Tensor],
    gated: bool,
    error: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of tokens that are off by no more than `off`: what each expert makes of them [1, tokens, outputs, experts], what
    that may be off by, and logits [1, tokens, experts]. `error`: of the products, see `error_bound`."""
    logits = F.linear(x, *router)
    shares = logits.softmax(-1) if gated else torch.ones_like(logits)
    peaks = (x.abs() + off).amax(-1, keepdim=True)
    outcomes = [F.linear(x, matrix, layer.bias) for layer, matrix in layers]
    bounds = [off @ matrix.abs().T + error * peaks * matrix.abs().sum(-1) for _, matrix in layers]
    return torch.stack(outcomes, -1) * shares.unsqueeze(-2), torch.stack(bounds, -1) * shares.unsqueeze(-2), logits


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
    norm: tuple[Tensor, Tensor, float],
    residual: Value,
) -> Value:
    """``second(activation(convolution of first(norm(x)))) + residual``, where each token has an expert of both.

    Args:
        x: [B, tokens, inputs], row by row of the grid.
        mixtures: codes of all layers have as many bits.
        weight, bias: of the convolution [hidden, 1, 3, 3].
    """
    first, second = mixtures
    taps = weight.detach().float().flatten(1).T.contiguous()
    shift = torch.zeros(len(weight)) if bias is None else bias.detach().float().contiguous()
    arguments = [x, *norm_values(program, norm), *_values(program, first), program.weight(taps)]
    arguments += [program.weight(shift), *_values(program, second), residual]
    return program.call(
        CONV_MIXTURE,
        arguments,
        residual.shape,
        bits=max(layer.bits for layer in (*first.layers, *second.layers)),
        mixtures=tuple((tuple(layer.terms for layer in some.layers), some.gated) for some in mixtures),
        eps=norm[2],
        activation=activation,
        sizes=(first.layers[0].inputs, first.layers[0].outputs, second.layers[0].outputs, *grid),
    )


def _values(program: Program, mixture: Experts) -> list[Value]:
    layers = [value for layer in mixture.layers for value in weight_values(program, layer)]
    return [program.weight(tensor) for tensor in mixture.router] + layers


def serves(mixtures: tuple[Experts, Experts], weight: Tensor, grid: tuple[int, int], columns: int) -> bool:
    """Whether to use `conv_mixture` for such mixtures, with panels of this many columns."""
    formats = {layer.bits for mixture in mixtures for layer in mixture.layers if layer.terms}
    return len(formats) <= 1 and by_bands(weight, grid, columns)
