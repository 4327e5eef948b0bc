"""Products with the weights of linear layers, norm before and activation, residual and all behind, in one pass."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels.cpu.decode import Weights
from shiftadd3d.kernels.cpu.forms import Form, forms, longest_block, shift_product, tile_shape
from shiftadd3d.kernels.cpu.forms.base import ShiftProduct
from shiftadd3d.kernels.cpu.forms.float32 import PanelProduct
from shiftadd3d.kernels.cpu.forms.int16 import OrdinaryInt16Product
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.matshift import BLOCK_BYTES
from shiftadd3d.kernels.cpu.mlp import BLOCK_BYTES as PERCEPTRON_BYTES
from shiftadd3d.kernels.cpu.mlp import emit_layers
from shiftadd3d.kernels.cpu.trials import Draw, check_within
from shiftadd3d.kernels.pack.whole import Format, LinearWeights, code_panels
from shiftadd3d.kernels.reference import activations
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.matadd import decode_signs
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Expr
from shiftadd3d.kernels.whole.parts import (
    Around,
    Ends,
    NormWeights,
    Source,
    block_of,
    each_block,
    held,
    threads_of,
    tiles_of,
)
from shiftadd3d.kernels.whole.program import Exactness, Function, Program, Value
from shiftadd3d.kernels.whole.trials import RandomNorm, error_of, outcome_of, random_layer


class Kind(NamedTuple):
    """What is compiled in of a product: how it is formed, and the format of its weights.

    Among experts, `form` and `bits` are those of the ones with shifts; 0 terms are ordinary weights.
    """

    form: Form
    bits: int
    terms: int

    @classmethod
    def of(cls, target: CpuTarget, exactness: Exactness, weights: Format) -> Kind:
        return cls(form_of(target, exactness, *weights), *weights)

    @property
    def weights(self) -> Format:
        return Format(self.bits, self.terms)

    def product(self, target: CpuTarget) -> ShiftProduct:
        """The code of the product."""
        form, bits, terms = self
        if terms:
            product = shift_product(target, form, bits, terms, "float32")
            product.in_panels = _in_panels(target, bits, terms)
            return product
        integers = (form == "int16" and not bits) or (form == "int8" and target.has_vnni)
        return OrdinaryInt16Product(target) if integers else PanelProduct(target)


def form_of(target: CpuTarget, exactness: Exactness, bits: int, terms: int) -> Form:
    """How products with such weights are formed; 0 terms are ordinary weights."""
    if exactness in ("safe", "twin"):
        return "float32"
    if not terms:
        # On Sapphire Rapids, where float32 takes twice as much in a cycle, nobody has measured it.
        return "int16" if exactness == "int8" and target.has_vnni and not target.has_amx else "float32"
    return forms(target, exactness, bits, terms, "float32")[0]


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


def depthwise_values(program: Program, weight: Tensor, bias: Tensor | None) -> list[Value]:
    """Weight [taps, C] and bias [C] of a depthwise convolution, from its weight [C, 1, k, k]."""
    taps = weight.detach().float().flatten(1).T.contiguous()
    shift = torch.zeros(len(weight)) if bias is None else bias.detach().float().contiguous()
    return [program.weight(taps), program.weight(shift)]


# One layer

_NARROW = 64  # inputs, up to which a function of its own is made for each number


class Linear(NamedTuple):
    """What is asked of a linear layer."""

    weights: Format
    around: Around
    inputs: int
    tokens: int | str  # of a picture
    signs: bool = False  # whether of the first outputs only signs are kept


class LinearSpec(NamedTuple):
    kind: Kind
    around: Around
    signs: bool
    narrow: int  # inputs, or 0 if there may be any number
    tile: int
    longest: int


def _build_linear(target: CpuTarget, spec: LinearSpec) -> T.PrimFunc:
    """The function ``(x, norm's weight and bias, layer's weights, what is added, control, signs, y)``.

    x [B, N, inputs], y and what is added [B, N, outputs]. With signs [B, N, bytes] of the first outputs, whole panels,
    y has the others.
    """
    around, isa, product = spec.around, Isa(target), spec.kind.product(target)
    product.rows = spec.tile
    with T.function("linear") as function:
        batch, tokens, inputs, outputs = T.sizes(4)
        inputs = T.int64(spec.narrow) if spec.narrow else inputs
        source = Source.argument(batch, tokens, inputs, around.eps)
        weights = weights_argument(product, "", spec.kind.terms, inputs, outputs)
        ends = Ends.arguments(source, outputs, residual=around.residual, signs=spec.signs)
        rows, threads = held(batch * tokens), threads_of(ends.control)
        block = block_of(rows, spec.longest, product.rows, threads)
        blocks = held((rows + block - 1) // block)
        panels = held((outputs + (product.columns - 1)) // product.columns)
        shares = held(T.min((threads + blocks - 1) // blocks, panels))
        with T.parallel(blocks * shares) as task:
            top = held(T.truncdiv(task, shares) * block)
            height = held(T.min(block, rows - top))
            share = held(T.truncdiv(panels + shares - 1, shares))
            first = held(T.truncmod(task, shares) * share)
            last = held(T.max(first, T.min(first + share, panels)))
            scratch = product.scratch(spec.longest, inputs)
            load, before_rows = ends.load(isa, top)
            product.stage(scratch, height, inputs, load, ends.control, before_rows)
            apply = product.activation(around.activation)
            if spec.signs:
                middle = held(T.max(first, T.min(last, T.truncdiv(ends.signed, T.int64(product.columns)))))
                product.panels(scratch, height, weights, first, middle, apply, ends.store_signs(isa, top))
                first = middle
            product.panels(scratch, height, weights, first, last, apply, ends.store(top))
            product.release()
    return function.get()


def _resolve_linear(target: CpuTarget, exactness: Exactness, asked: Linear) -> LinearSpec:
    kind = Kind.of(target, exactness, asked.weights)
    # Of so few, each that is taken at a time counts.
    narrow = asked.inputs if asked.inputs <= _NARROW and asked.inputs % target.lanes == 0 else 0
    longest = longest_block(target, kind.form, asked.inputs, BLOCK_BYTES)
    return LinearSpec(kind, asked.around, asked.signs, narrow, *tiles_of(target, kind.form, longest, asked.tokens))


def _try_linear(function: Compiled, spec: LinearSpec) -> None:
    """Odd sizes with tails on every side, more than one block of inputs and of rows."""
    kind, around, has_signs, narrow, _, longest = spec
    rows, columns = tile_shape(targets.current(), kind.form)
    draw, inputs, outputs = Draw(), narrow or 16 * 36 + 5, 2 * columns + 3
    layer, matrix = random_layer(draw, inputs, outputs, kind.weights)
    x, added = draw.normal(3, longest // 2 + rows + 1, inputs), draw.normal(3, longest // 2 + rows + 1, outputs)
    norm, residual = RandomNorm(draw, inputs, around.eps), [added] if around.residual else []
    signed = columns if has_signs else 0
    codes = [torch.empty(*added.shape[:2], signed // 8, dtype=torch.uint8)] if has_signs else []
    given = [x, *norm.tensors, *tensors_of(layer), *residual]
    y = outcome_of(function, given, *added.shape[:2], outputs - signed, others=codes)
    normal = norm(x)
    expected = sum(residual, activations.apply(around.activation, F.linear(normal, matrix, layer.bias)))
    bound = error_of(kind.form, kind.bits, normal, matrix) * (1.2 if around.activation == "gelu" else 1)
    bound += (1 + layer.bias.abs() + added.abs()) * 1e-5
    check_within(y, expected[..., signed:], bound[..., signed:])
    for some in codes:
        is_set = decode_signs(some, "pm1", signed, torch.float32) > 0
        certain = expected[..., :signed].abs() > bound[..., :signed]
        assert torch.equal(is_set & certain, (expected[..., :signed] > 0) & certain), "signs are wrong"


LINEAR = Function("linear", _build_linear, _try_linear, _resolve_linear)


def linear(
    program: Program,
    x: Value,
    layer: LinearWeights,
    *,
    norm: NormWeights | None = None,
    activation: Activation = "none",
    residual: Value | None = None,
) -> Value:
    """``activation(norm(x) W^T + bias) + residual``: [B, N, inputs] to [B, N, outputs].

    Args:
        norm: weight, bias and epsilon of a layer norm.
    """
    around = Around.of(norm, activation, residual)
    arguments = [x, *norm_values(program, norm), *weight_values(program, layer), *([residual] if residual else [])]
    asked = Linear(layer.format, around, layer.inputs, x.shape[1])
    return program.call(LINEAR, arguments, (*x.shape[:-1], layer.outputs), asked)


def linear_with_signs(
    program: Program, x: Value, layer: LinearWeights, signed: int, norm: NormWeights | None = None
) -> tuple[Value, Value]:
    """`linear` of which only the signs are kept of the first outputs: [B, N, signed / 8] uint8, and the others."""
    asked = Linear(layer.format, Around.of(norm, "none", None), layer.inputs, x.shape[1], signs=True)
    arguments, lead = [x, *norm_values(program, norm), *weight_values(program, layer)], x.shape[:-1]
    outcomes = [((*lead, signed // 8), "uint8"), ((*lead, layer.outputs - signed), "float32")]
    signs, others = program.call_for(LINEAR, arguments, outcomes, asked)
    return signs, others


def keeps_signs(signed: int) -> bool:
    """Whether `linear_with_signs` takes so many outputs: whole panels, on CPUs with AVX2."""
    target = targets.current()
    return "avx2" in target.flags and signed % (2 * target.lanes) == 0


def norm_values(program: Program, norm: NormWeights | None) -> list[Value]:
    return [] if norm is None else [program.weight(tensor) for tensor in norm[:2]]


# Two layers


class Perceptron(NamedTuple):
    """What is asked of a perceptron."""

    weights: Format
    around: Around
    inputs: int
    hidden: int
    tokens: int | str  # of a picture


class PerceptronSpec(NamedTuple):
    kind: Kind
    around: Around
    tile: int
    longest: int


def _build_perceptron(target: CpuTarget, spec: PerceptronSpec) -> T.PrimFunc:
    """The function ``(x, norm's weight and bias, weights of both layers, what is added, control, y)``; see `linear`."""
    kind, around, tile, longest = spec
    isa, products = Isa(target), [kind.product(target) for _ in range(2)]
    for product in products:
        product.rows = tile
    with T.function("perceptron") as function:
        batch, tokens, inputs, hidden, outputs = T.sizes(5)
        source = Source.argument(batch, tokens, inputs, around.eps)
        ends_of_layers = (("1", inputs, hidden), ("2", hidden, outputs))
        layers = [
            weights_argument(product, name, kind.terms, *between)
            for product, (name, *between) in zip(products, ends_of_layers, strict=True)
        ]
        ends = Ends.arguments(source, outputs, residual=around.residual)
        rows = held(batch * tokens)
        block = block_of(rows, longest, products[0].rows, threads_of(ends.control))
        with each_block(rows, block) as (top, height):
            load, before_rows = ends.load(isa, top)
            store = ends.store(top)
            emit_layers(products, layers, around.activation, longest, height, load, store, ends.control, before_rows)
    return function.get()


def _resolve_perceptron(target: CpuTarget, exactness: Exactness, asked: Perceptron) -> PerceptronSpec:
    kind = Kind.of(target, exactness, asked.weights)
    floats = asked.inputs + (1 if kind.form == "float32" else 2) * asked.hidden
    longest = longest_block(target, kind.form, floats, PERCEPTRON_BYTES)
    return PerceptronSpec(kind, asked.around, *tiles_of(target, kind.form, longest, asked.tokens))


def _try_perceptron(function: Compiled, spec: PerceptronSpec) -> None:
    (form, bits, _), around, _, longest = spec
    rows, columns = tile_shape(targets.current(), form)
    draw = Draw()
    widths = (columns + 3, 16 * 36 + 5, columns + 7)
    made = [random_layer(draw, *between, spec.kind.weights) for between in itertools.pairwise(widths)]
    (one, first), (two, second) = made
    x, added = draw.normal(1, longest + rows + 1, widths[0]), draw.normal(1, longest + rows + 1, widths[-1])
    norm, residual = RandomNorm(draw, widths[0], around.eps), [added] if around.residual else []
    given = [x, *norm.tensors, *tensors_of(one), *tensors_of(two), *residual]
    y, normal = outcome_of(function, given, *added.shape, threads=1), norm(x)
    hidden = activations.apply(around.activation, F.linear(normal, first, one.bias))
    expected = sum(residual, F.linear(hidden, second, two.bias))
    of_hidden = error_of(form, bits, normal, first).amax(-1, keepdim=True) * 1.2  # gelu's steepest
    bound = of_hidden * second.abs().sum(-1) + error_of(form, bits, hidden + of_hidden, second)
    check_within(y, expected, bound + (1 + two.bias.abs() + added.abs()) * 1e-5)


PERCEPTRON = Function("perceptron", _build_perceptron, _try_perceptron, _resolve_perceptron)


def perceptron(
    program: Program,
    x: Value,
    first: LinearWeights,
    second: LinearWeights,
    activation: Activation,
    *,
    norm: NormWeights | None = None,
    residual: Value | None = None,
) -> Value:
    """``second(activation(first(norm(x)))) + residual``, of two layers of one format."""
    values = [value for layer in (first, second) for value in weight_values(program, layer)]
    arguments = [x, *norm_values(program, norm), *values, *([residual] if residual else [])]
    asked = Perceptron(first.format, Around.of(norm, activation, residual), first.inputs, first.outputs, x.shape[1])
    return program.call(PERCEPTRON, arguments, (*x.shape[:-1], second.outputs), asked)


def tensors_of(layer: LinearWeights) -> Sequence[Tensor]:
    """What `weights_argument` is given on this machine."""
    if layer.words is not None:
        return [layer.weight, layer.words, layer.offset, layer.bias]
    target = targets.current()
    in_panels = _in_panels(target, layer.bits, layer.terms)
    return [code_panels(layer, target.lanes) if in_panels else layer.weight, layer.offset, layer.bias]
