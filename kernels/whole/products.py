"""Products with the weights of linear layers, norm before and activation, residual and all behind, in one pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.decode import Weights
from shiftadd3d.kernels.cpu.forms import Form, error_bound, forms, longest_block, shift_product, tile_shape
from shiftadd3d.kernels.cpu.forms.base import ShiftProduct
from shiftadd3d.kernels.cpu.forms.float32 import PanelProduct
from shiftadd3d.kernels.cpu.forms.int16 import OrdinaryInt16Product
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.matshift import BLOCK_BYTES
from shiftadd3d.kernels.cpu.mlp import BLOCK_BYTES as PERCEPTRON_BYTES
from shiftadd3d.kernels.cpu.mlp import emit_layers
from shiftadd3d.kernels.cpu.trials import Draw, check_within
from shiftadd3d.kernels.pack.whole import LinearWeights, code_panels, ordinary, shifts
from shiftadd3d.kernels.reference import activations
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Expr, Index
from shiftadd3d.kernels.whole.parts import Norm, block_of, control_argument, held, rows_of, threads_of, tiles_of
from shiftadd3d.kernels.whole.program import Exactness, Function, Program, Value


def form_of(target: CpuTarget, exactness: Exactness, bits: int, terms: int) -> Form:
    """How products with such weights are formed; 0 terms are ordinary weights."""
    if exactness in ("safe", "twin"):
        return "float32"
    if not terms:
        # On Sapphire Rapids, where float32 takes twice as much in a cycle, nobody has measured it.
        return "int16" if exactness == "int8" and target.has_vnni and not target.has_amx else "float32"
    return forms(target, exactness, bits, terms, "float32")[0]


def product_of(target: CpuTarget, form: Form, bits: int, terms: int) -> ShiftProduct:
    """The code of such a product. Among experts, `form` and `bits` are those of the ones with shifts."""
    if terms:
        product = shift_product(target, form, bits, terms, "float32")
        product.in_panels = _in_panels(target, bits, terms)
        return product
    integers = (form == "int16" and not bits) or (form == "int8" and target.has_vnni)
    return OrdinaryInt16Product(target) if integers else PanelProduct(target)


def _in_panels(target: CpuTarget, bits: int, terms: int) -> bool:
    """Whether a program's codes lie in the order in which products take weights. Matrix tiles take them as stored."""
    return bits == 4 and terms == 1 and "avx2" in target.flags and not target.has_amx


def weights_argument(product: ShiftProduct, name: str, terms: int, inputs: Expr, outputs: Expr) -> Weights:
    """The next arguments of a function: codes (in panels or not) and offset, or panels, words and peaks; and bias."""
    if product.in_panels:
        codes = T.argument(f"codes{name}", (*T.sizes(2), 4 * product.isa.lanes), "uint8")
        offset = T.argument(f"offset{name}", (1, outputs), "int8")
        return Weights(codes, offset, T.argument(f"bias{name}", (outputs,)), inputs, outputs)
    if terms:
        return Weights.argument(name, terms, inputs, outputs)
    panels = T.argument(f"panels{name}", (*T.sizes(1), inputs, product.columns))
    words = T.argument(f"words{name}", (*T.sizes(2), product.columns), "int32")
    peaks = T.argument(f"peaks{name}", (outputs,))
    taken = words if isinstance(product, OrdinaryInt16Product) else panels
    return Weights(taken, peaks, T.argument(f"bias{name}", (outputs,)), inputs, outputs)


def weight_values(program: Program, layer: LinearWeights) -> list[Value]:
    """What `weights_argument` is given."""
    return [program.weight(tensor) for tensor in tensors_of(layer)]


# One layer

_NARROW = 64  # inputs, up to which a function of its own is made for each number


def _build_linear(
    target: CpuTarget,
    form: Form,
    bits: int,
    terms: int,
    eps: float | None,
    activation: Activation,
    residual: bool,
    longest: int,
    narrow: int,
    tile: int,
) -> T.PrimFunc:
    """The function ``(x, norm's weight and bias, layer's weights, what is added, control, y)``.

    x [B, N, inputs], y and what is added [B, N, outputs]. There is a norm with an `eps`, an addition if `residual`.
    Inputs are `narrow` unless that is 0.
    """
    isa, product = Isa(target), product_of(target, form, bits, terms)
    product.rows = tile
    with T.function("linear") as function:
        batch, tokens, inputs, outputs = T.sizes(4)
        inputs = T.int64(narrow) if narrow else inputs
        x = T.argument("x", (batch, tokens, inputs))
        norm = None if eps is None else Norm.arguments(inputs, eps)
        weights = weights_argument(product, "", terms, inputs, outputs)
        added = T.argument("added", (batch, tokens, outputs)) if residual else None
        control = control_argument()
        y = T.argument("y", (batch, tokens, outputs))
        x, y, added = rows_of(x), rows_of(y), None if added is None else rows_of(added)
        rows, threads = held(batch * tokens), threads_of(control)
        block = block_of(rows, longest, product.rows, threads)
        blocks = held((rows + block - 1) // block)
        panels = held((outputs + (product.columns - 1)) // product.columns)
        shares = held(T.min((threads + blocks - 1) // blocks, panels))
        with T.parallel(blocks * shares) as task:
            top = held(T.truncdiv(task, shares) * block)
            height = held(T.min(block, rows - top))
            share = held(T.truncdiv(panels + shares - 1, shares))
            first = held(T.truncmod(task, shares) * share)
            last = held(T.max(first, T.min(first + share, panels)))
            scratch = product.scratch(longest, inputs)
            load, before_rows = isa.reader(x, lambda row: top + row), None
            if norm is not None:
                load, before_rows = normed(isa, norm, load, inputs)
            product.stage(scratch, height, inputs, load, control, before_rows)

            def store(row: Index, column: Index, value: Expr, count: int) -> None:
                at = top + row, T.at(column, count)
                y[at] = value if added is None else value + added[at]

            product.panels(scratch, height, weights, first, last, product.activation(activation), store)
            product.release()
    return function.get()


def normed(isa: Isa, norm: Norm, load: T.Load, width: Expr) -> tuple[T.Load, Callable[[Expr, Expr], None]]:
    """`load` and `before_rows` of rows that are normalised as they are staged, in memory that stays in the cache."""
    rows = T.alloc(isa.lanes, width)

    def store(row: Index, column: Index, value: Expr, count: int) -> None:
        rows[row % isa.lanes, T.at(column, count)] = value

    return (
        lambda row, start, count: rows[row % isa.lanes, T.at(start, count)],
        lambda first, count: norm.emit(isa, load, first, count, width, store),
    )


def _resolve_linear(target: CpuTarget, exactness: Exactness, spec: dict[str, Any]) -> dict[str, Any]:
    form = form_of(target, exactness, spec["bits"], spec["terms"])
    inputs, tokens = spec.pop("inputs"), spec.pop("tokens")
    # Of so few, each that is taken at a time counts.
    narrow = inputs if inputs <= _NARROW and inputs % target.lanes == 0 else 0
    longest = longest_block(target, form, inputs, BLOCK_BYTES)
    return spec | {"form": form, "narrow": narrow} | tiles_of(target, form, longest, tokens)


def _try_linear(
    function: Compiled,
    form: Form,
    bits: int,
    terms: int,
    eps: float | None,
    activation: Activation,
    residual: bool,
    longest: int,
    narrow: int,
    tile: int,
) -> None:
    """Odd sizes with tails on every side, more than one block of inputs and of rows."""
    rows, columns = tile_shape(targets.current(), form)
    draw, inputs, outputs = Draw(), narrow or 16 * 36 + 5, columns + 3
    layer, matrix = random_layer(draw, inputs, outputs, bits, terms)
    x, added = draw.normal(3, longest // 2 + rows + 1, inputs), draw.normal(3, longest // 2 + rows + 1, outputs)
    norm = [draw.normal(inputs) + 1, draw.normal(inputs)] if eps is not None else []
    control, y = torch.tensor([0, 2], dtype=torch.int32), torch.empty(added.shape)
    function(x, *norm, *tensors_of(layer), *([added] if residual else []), control, y)
    assert control[0] == 0, "it found an activation that it cannot express"
    normal = x if eps is None else F.layer_norm(x, (inputs,), norm[0], norm[1], eps)
    expected = activations.apply(activation, F.linear(normal, matrix, layer.bias)) + (added if residual else 0)
    bound = _bound(form, bits, normal, matrix) * (1.2 if activation == "gelu" else 1)
    check_within(y, expected, bound + (1 + layer.bias.abs() + added.abs()) * 1e-5)


LINEAR = Function("linear", _build_linear, _try_linear, _resolve_linear)


def linear(
    program: Program,
    x: Value,
    layer: LinearWeights,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    activation: Activation = "none",
    residual: Value | None = None,
) -> Value:
    """``activation(norm(x) W^T + bias) + residual``: [B, N, inputs] to [B, N, outputs].

    Args:
        norm: weight, bias and epsilon of a layer norm.
    """
    arguments = [x, *norm_values(program, norm), *weight_values(program, layer), *([residual] if residual else [])]
    return program.call(
        LINEAR,
        arguments,
        (*x.shape[:-1], layer.outputs),
        bits=layer.bits,
        terms=layer.terms,
        eps=None if norm is None else norm[2],
        activation=activation,
        residual=residual is not None,
        inputs=layer.inputs,
        tokens=x.shape[1],
    )


def norm_values(program: Program, norm: tuple[Tensor, Tensor, float] | None) -> list[Value]:
    return [] if norm is None else [program.weight(tensor) for tensor in norm[:2]]


# Two layers


def _build_perceptron(
    target: CpuTarget,
    form: Form,
    bits: int,
    terms: int,
    eps: float | None,
    activation: Activation,
    residual: bool,
    longest: int,
) -> T.PrimFunc:
    """The function ``(x, norm's weight and bias, weights of both layers, what is added, control, y)``; see `linear`."""
    isa, products = Isa(target), [product_of(target, form, bits, terms) for _ in range(2)]
    with T.function("perceptron") as function:
        batch, tokens, inputs, hidden, outputs = T.sizes(5)
        x = T.argument("x", (batch, tokens, inputs))
        norm = None if eps is None else Norm.arguments(inputs, eps)
        ends = (("1", inputs, hidden), ("2", hidden, outputs))
        layers = [
            weights_argument(product, name, terms, *between)
            for product, (name, *between) in zip(products, ends, strict=True)
        ]
        added = T.argument("added", (batch, tokens, outputs)) if residual else None
        control = control_argument()
        y = T.argument("y", (batch, tokens, outputs))
        x, y, added = rows_of(x), rows_of(y), None if added is None else rows_of(added)
        rows = held(batch * tokens)
        block = block_of(rows, longest, products[0].rows, threads_of(control))
        with T.parallel((rows + block - 1) // block) as task:
            top = held(task * block)
            height = held(T.min(block, rows - top))
            load, before_rows = isa.reader(x, lambda row: top + row), None
            if norm is not None:
                load, before_rows = normed(isa, norm, load, inputs)

            def store(row: Index, column: Index, value: Expr, count: int) -> None:
                at = top + row, T.at(column, count)
                y[at] = value if added is None else value + added[at]

            emit_layers(products, layers, activation, longest, height, load, store, control, before_rows)
    return function.get()


def _resolve_perceptron(target: CpuTarget, exactness: Exactness, spec: dict[str, Any]) -> dict[str, Any]:
    form = form_of(target, exactness, spec["bits"], spec["terms"])
    floats = spec.pop("inputs") + (1 if form == "float32" else 2) * spec.pop("hidden")
    return spec | {"form": form, "longest": longest_block(target, form, floats, PERCEPTRON_BYTES)}


def _try_perceptron(
    function: Compiled,
    form: Form,
    bits: int,
    terms: int,
    eps: float | None,
    activation: Activation,
    residual: bool,
    longest: int,
) -> None:
    rows, columns = tile_shape(targets.current(), form)
    draw = Draw()
    widths = (columns + 3, 16 * 36 + 5, columns + 7)
    (one, first), (two, second) = (random_layer(draw, *between, bits, terms) for between in itertools.pairwise(widths))
    x, added = draw.normal(1, longest + rows + 1, widths[0]), draw.normal(1, longest + rows + 1, widths[-1])
    norm = [draw.normal(widths[0]) + 1, draw.normal(widths[0])] if eps is not None else []
    control, y = torch.tensor([0, 1], dtype=torch.int32), torch.empty(added.shape)
    function(x, *norm, *tensors_of(one), *tensors_of(two), *([added] if residual else []), control, y)
    assert control[0] == 0, "it found an activation that it cannot express"
    normal = x if eps is None else F.layer_norm(x, (widths[0],), norm[0], norm[1], eps)
    hidden = activations.apply(activation, F.linear(normal, first, one.bias))
    expected = F.linear(hidden, second, two.bias) + (added if residual else 0)
    of_hidden = _bound(form, bits, normal, first).amax(-1, keepdim=True) * 1.2  # gelu's steepest
    bound = of_hidden * second.abs().sum(-1) + _bound(form, bits, hidden + of_hidden, second)
    check_within(y, expected, bound + (1 + two.bias.abs() + added.abs()) * 1e-5)


PERCEPTRON = Function("perceptron", _build_perceptron, _try_perceptron, _resolve_perceptron)


def perceptron(
    program: Program,
    x: Value,
    first: LinearWeights,
    second: LinearWeights,
    activation: Activation,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    residual: Value | None = None,
) -> Value:
    """``second(activation(first(norm(x)))) + residual``, of two layers of one format."""
    values = [value for layer in (first, second) for value in weight_values(program, layer)]
    return program.call(
        PERCEPTRON,
        [x, *norm_values(program, norm), *values, *([residual] if residual else [])],
        (*x.shape[:-1], second.outputs),
        bits=first.bits,
        terms=first.terms,
        eps=None if norm is None else norm[2],
        activation=activation,
        residual=residual is not None,
        inputs=first.inputs,
        hidden=first.outputs,
    )


# Trials


def random_layer(draw: Draw, inputs: int, outputs: int, bits: int, terms: int) -> tuple[LinearWeights, Tensor]:
    """A layer, and its weight [outputs, inputs]."""
    if not terms:
        weight, columns = draw.normal(outputs, inputs) / inputs**0.5, tile_shape(targets.current(), "float32")[1]
        return ordinary(weight, draw.normal(outputs), columns, integers=True), weight
    layer = draw.layer(inputs, outputs, bits, terms)
    return shifts(layer.codes, layer.offset, layer.bias, inputs, bits), layer.decoded


def tensors_of(layer: LinearWeights) -> Sequence[Tensor]:
    """What `weights_argument` is given on this machine."""
    if layer.words is not None:
        return [layer.weight, layer.words, layer.offset, layer.bias]
    target = targets.current()
    in_panels = _in_panels(target, layer.bits, layer.terms)
    return [code_panels(layer, target.lanes) if in_panels else layer.weight, layer.offset, layer.bias]


def _bound(form: Form, bits: int, x: Tensor, weight: Tensor) -> Tensor:
    """What outputs may be off by: the form's error, and that of sums in float32."""
    size = x.abs() @ weight.abs().T
    return error_bound(form, bits) * x.abs().amax(-1, keepdim=True) * weight.abs().sum(-1) + size * 1e-6
