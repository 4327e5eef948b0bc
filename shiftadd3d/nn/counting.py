"""What a model does, operator by operator: its products, its elementwise work, and the bytes that these read and write.

`counting` watches a model run. It sees the operators that torch dispatches. So it works for any `nn.Module`, and counts
mixtures by the routing that happened. Ops of kernels (`torch.ops.shiftadd3d`) are counted like their plain-torch twins,
which specify them.

Work on weights alone (quantising or transposing them) is not counted, because it is done once and not for each input.

`torch.utils.flop_counter.FlopCounterMode` is not enough here. It has one number for an operator. It does not know what
the operands are, which weights are read, or how much elementwise work there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from shiftadd3d.kernels import numerics
from shiftadd3d.kernels.ops.define import OP_NAMESPACE, TWINS
from shiftadd3d.nn.shift import PackedShiftLayer, ShiftLayer

Primitive = Literal["mult", "shift", "add"]
"""The kind of a product: a multiplication, a shift, or only the addition that follows all three."""

CODE_BITS = 1
"""Stored width of a binary code."""


@dataclass(frozen=True)
class Product:
    """A matrix product or a convolution, as loops. Every output is a sum of `inputs` times `kernel` products.

    A matrix product has a kernel of (1, 1), and `size` holds its rows. Bits are those of the stored operands.
    """

    primitive: Primitive
    groups: int
    """Number of independent problems with own operands: heads of an attention, groups of a convolution."""
    batch: int
    """Number of images that one weight multiplies."""
    outputs: int
    """Output channels of one group."""
    inputs: int
    """Input channels of one group."""
    size: tuple[int, int]
    """Rows and columns of the outcome."""
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    input_size: tuple[int, int] | None = None
    """Rows and columns of the input, without padding; None for the same as `size`."""
    dtype: str = "float32"
    """Number format of the arithmetic."""
    weight_bits: int = 32
    """Bits of one element of the operand with the output channels."""
    input_bits: int = 32
    """Bits of one element of the operand with the rows."""
    output_bits: int = 32
    terms: int = 1
    """Powers of two in a weight."""
    is_weight: bool = True
    """Whether the operand with the output channels is a weight of the model, not an activation."""

    @property
    def products(self) -> int:
        """Number of products of two elements."""
        return self.output_elements * self.inputs * math.prod(self.kernel)

    @property
    def weight_elements(self) -> int:
        return self.groups * self.outputs * self.inputs * math.prod(self.kernel)

    @property
    def input_elements(self) -> int:
        return self.groups * self.batch * self.inputs * math.prod(self.input_size or self.size)

    @property
    def output_elements(self) -> int:
        return self.groups * self.batch * self.outputs * math.prod(self.size)

    @property
    def mult(self) -> int:
        """Number of multiplications. `shift` and `add` count likewise."""
        return self.products if self.primitive == "mult" else 0

    @property
    def shift(self) -> int:
        return self.products * self.terms if self.primitive == "shift" else 0

    @property
    def add(self) -> int:
        return self.products * (self.terms if self.primitive == "shift" else 1)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that are read. Weights of shifts have an offset for each term of each row."""
        if not self.is_weight:
            return 0
        row = self.inputs * math.prod(self.kernel)
        if self.primitive == "shift":
            return self.terms * self.groups * self.outputs * (_bytes(row, self.weight_bits // self.terms) + 1)
        return _bytes(self.weight_elements, self.weight_bits)

    @property
    def input_bytes(self) -> int:
        """Bytes of activations that are read: both operands if neither is a weight."""
        other = 0 if self.is_weight else _bytes(self.weight_elements, self.weight_bits)
        return _bytes(self.input_elements, self.input_bits) + other

    @property
    def output_bytes(self) -> int:
        return _bytes(self.output_elements, self.output_bits)


def _bytes(elements: int, bits: int) -> int:
    return (elements * bits + 7) // 8


class Elementwise(NamedTuple):
    """Arithmetic outside matrix products: norms, softmax, activation functions, residuals, sums."""

    mult: int = 0
    add: int = 0
    compare: int = 0
    special: int = 0
    """Divisions, roots, exponentials and the like."""

    def plus(self, other: Elementwise) -> Elementwise:
        return Elementwise(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, number: int) -> Elementwise:
        return Elementwise(*(number * each for each in self))


@dataclass
class ModuleWork:
    """The work of one module itself, without its submodules."""

    kind: str
    products: dict[Product, int] = field(default_factory=dict)
    """How often each ran."""
    elementwise: dict[str, Elementwise] = field(default_factory=dict)
    """By number format."""
    elementwise_bytes: tuple[int, int] = (0, 0)
    """Bytes that elementwise operators read and write, if each goes through memory."""


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[str, ModuleWork]]:
    """Inside this context, the work of `model` is recorded by qualified name, in the order of first use."""
    names = {module: name or "(root)" for name, module in model.named_modules()}
    running: list[nn.Module] = [model]
    work: dict[str, ModuleWork] = {}

    def current() -> tuple[nn.Module, ModuleWork]:
        module = running[-1]
        return module, work.setdefault(names[module], ModuleWork(type(module).__name__))

    def enter(module: nn.Module, _: Any) -> None:
        running.append(module)

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        running.pop()

    handles = [module.register_forward_pre_hook(enter) for module in names]
    handles += [module.register_forward_hook(leave, always_call=True) for module in names]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    _quantize_weights(model)
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole attention layer: it hides products
        with numerics("twin"), _Watch(model, current):
            yield work
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()


def _quantize_weights(model: nn.Module) -> None:
    """Let shift layers quantise their weights, which they keep, so that these many operators are not recorded later."""
    if torch.is_grad_enabled():
        return
    for module in model.modules():
        if isinstance(module, ShiftLayer) and module.mode == "Q" and not module.training:
            module.quantized_weight()


class _Watch(TorchDispatchMode):
    """Records each operator that runs."""

    def __init__(self, model: nn.Module, current: Callable[[], tuple[nn.Module, ModuleWork]]) -> None:
        super().__init__()
        self._current = current
        self._format: tuple[set[int], int, int] | None = None  # storages of codes, bits, terms: within an op's twin
        # By the address of the storage, which lives as long as this does: nothing else can come to lie there.
        self._constants: dict[int, Any] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self._make_constant(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        rules = _rules_of(func)
        if rules.is_kernel:
            return self._run_twin(func, args, kwargs)
        if rules.has_parts:
            with self:  # inference mode shows operators before their parts
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        module, work = self._current()
        in_shift = isinstance(module, ShiftLayer | PackedShiftLayer)  # however they compute their weights
        if in_shift and rules.products is None:
            return out
        tensors, results = _tensors((*args, *kwargs.values())), _tensors(out)
        # `lift_fresh` brings in a tensor that Python numbers were made into.
        is_constant = rules.name == "lift_fresh" or all(self._is_constant(tensor) for tensor in tensors)
        for tensor in results:
            if is_constant:
                self._make_constant(tensor)
            elif rules.is_mutable:
                self._constants.pop(_storage(tensor), None)
        if is_constant and not in_shift:
            return out
        if rules.products is not None:
            for product in rules.products(self._operands(rules.name, args, module), args, kwargs, out):
                work.products[product] = work.products.get(product, 0) + 1
            if rules.arithmetic is not None:
                self._add(work, args[0], rules.arithmetic(args, kwargs, results[0]), (0, 0))
        elif rules.arithmetic is not None and results:
            floats = [tensor for tensor in tensors if tensor.is_floating_point()] or tensors
            if floats:
                read = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
                written = sum(tensor.numel() * tensor.element_size() for tensor in results)
                self._add(work, floats[0], rules.arithmetic(args, kwargs, results[0]), (read, written))
        return out

    @staticmethod
    def _add(work: ModuleWork, like: Tensor, done: Elementwise, moved: tuple[int, int]) -> None:
        dtype = _format_of(like)
        work.elementwise[dtype] = work.elementwise.get(dtype, Elementwise()).plus(done)
        work.elementwise_bytes = work.elementwise_bytes[0] + moved[0], work.elementwise_bytes[1] + moved[1]

    def _run_twin(self, func: Any, args: tuple, kwargs: dict) -> Any:
        arguments = func._schema.arguments
        given = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
        given |= {**dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}
        before = self._format
        if "bits" in given:
            codes = [
                tensor for tensor in _tensors((*args, *kwargs.values())) if tensor.dtype in (torch.uint8, torch.int8)
            ]
            for tensor in codes:
                self._make_constant(tensor)
            terms = max((tensor.shape[0] for tensor in codes), default=1)
            self._format = {_storage(tensor) for tensor in codes}, int(given["bits"]), terms
        try:
            with self:
                return TWINS[func._schema.name.rpartition(":")[2]](*args, **kwargs)
        finally:
            self._format = before

    def _operands(self, name: str, args: tuple, module: nn.Module) -> _Operands:
        """What the two operands of a product are made of."""
        first = _FIRST_OPERAND.get(name, 0)
        left, right = args[first], args[first + 1]
        if isinstance(module, ShiftLayer | PackedShiftLayer):
            return _Operands(left, right, "shift", 0, module.bits * module.terms, module.terms, False, True)
        if self._format is not None and _storage(right) in self._format[0]:
            _, bits, terms = self._format
            return _Operands(left, right, "shift", 0, bits * terms, terms, False, True)
        codes = [name in _FIRST_OPERAND and _holds_codes(operand) for operand in (left, right)]
        bits = [CODE_BITS if code else 0 for code in codes]
        weights = self._is_constant(left), self._is_constant(right)
        return _Operands(left, right, "add" if any(codes) else "mult", bits[0], bits[1], 1, *weights)

    def _is_constant(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._constants

    def _make_constant(self, tensor: Tensor) -> None:
        address = _storage(tensor)
        if address:
            self._constants[address] = tensor.untyped_storage()
            if self._format is not None:
                self._format[0].add(address)


class _Rules(NamedTuple):
    """What is known about an operator, whatever its arguments."""

    name: str
    is_kernel: bool
    """Whether it is one of ours, whose twin says what it does."""
    has_parts: bool
    """Whether it is nothing but other operators, and not counted as a whole."""
    is_mutable: bool
    products: Callable[[_Operands, tuple, dict, Any], Iterator[Product]] | None
    arithmetic: _Formula | None


@cache
def _rules_of(func: Any) -> _Rules:
    packet = getattr(func, "_overloadpacket", func)
    name = packet.__name__
    products, arithmetic = _PRODUCTS.get(name), _ELEMENTWISE.get(name)
    if not isinstance(func, OpOverload):
        return _Rules(name, False, False, False, products, arithmetic)
    implicit = torch._C.DispatchKey.CompositeImplicitAutograd
    has_parts = products is None and arithmetic is None and func.has_kernel_for_dispatch_key(implicit)
    if arithmetic is None and torch.Tag.pointwise in func.tags and name not in _FREE:
        arithmetic = _special
    return _Rules(name, func.namespace == OP_NAMESPACE, has_parts, func._schema.is_mutable, products, arithmetic)


class _Operands(NamedTuple):
    left: Tensor
    right: Tensor
    primitive: Primitive
    left_bits: int
    """0 for those of its dtype."""
    right_bits: int
    terms: int
    left_is_weight: bool
    right_is_weight: bool

    def turned(self) -> _Operands:
        """The transposed product."""
        return _Operands(
            self.right,
            self.left,
            self.primitive,
            self.right_bits,
            self.left_bits,
            self.terms,
            self.right_is_weight,
            self.left_is_weight,
        )


def _storage(tensor: Tensor) -> int:
    """The address of what a tensor is a view of; 0 where there is none."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # within torch.func tensors have no storage
        return 0


def _tensors(values: Any) -> list[Tensor]:
    """Those among an operator's arguments or outcomes: operators know no containers but lists and tuples."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, tuple | list):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


def _format_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bits_of(tensor: Tensor) -> int:
    return 8 * tensor.element_size()


def _holds_codes(operand: Tensor) -> bool:
    """Whether all values are -1, 0 or 1, and not all 0: a product with such a value adds, subtracts or does nothing."""
    if operand.is_meta or not operand.numel():
        return False
    row = operand[(0,) * (operand.dim() - 1)]  # tells most operands apart, whatever their size
    return _are_signs(row) and _are_signs(operand) and bool(operand.any())


def _are_signs(values: Tensor) -> bool:
    return torch.equal(values.sgn(), values)


# --------------------------------------------------------------------------------------------------------------------
# Products
# --------------------------------------------------------------------------------------------------------------------


def _matrix_product(of: _Operands, groups: int, rows: int, inputs: int, outputs: int, out: Tensor) -> Product:
    """``[groups, rows, inputs] @ [groups, inputs, outputs]``; transposed where the weight comes first."""
    if of.left_is_weight and not of.right_is_weight:
        of, rows, outputs = of.turned(), outputs, rows
    return Product(
        of.primitive,
        groups,
        1,
        outputs,
        inputs,
        (rows, 1),
        dtype=_format_of(out),
        weight_bits=of.right_bits or _bits_of(of.right),
        input_bits=of.left_bits or _bits_of(of.left),
        output_bits=_bits_of(out),
        terms=of.terms,
        is_weight=of.right_is_weight,
    )


def _mm(of: _Operands, args: tuple, kwargs: dict, out: Tensor) -> Iterator[Product]:
    yield _matrix_product(of, 1, of.left.shape[0], of.left.shape[1], of.right.shape[1], out)


def _bmm(of: _Operands, args: tuple, kwargs: dict, out: Tensor) -> Iterator[Product]:
    groups, rows, inputs = of.left.shape
    if of.right_is_weight and of.right.stride(0) == 0:  # one weight for all: a matrix product
        groups, rows = 1, groups * rows
    yield _matrix_product(of, groups, rows, inputs, of.right.shape[2], out)


def _mv(of: _Operands, args: tuple, kwargs: dict, out: Tensor) -> Iterator[Product]:
    yield _matrix_product(of, 1, of.left.shape[0], of.left.shape[1], 1, out)


def _dot(of: _Operands, args: tuple, kwargs: dict, out: Tensor) -> Iterator[Product]:
    yield _matrix_product(of, 1, 1, of.left.numel(), 1, out)


def _convolution(of: _Operands, args: tuple, kwargs: dict, out: Tensor) -> Iterator[Product]:
    x, weight, _, stride, _, _, transposed, _, groups = args[:9]
    kernel = _pair(weight.shape[2:])
    common: dict[str, Any] = {
        "dtype": _format_of(out),
        "weight_bits": _bits_of(weight),
        "input_bits": _bits_of(x),
        "output_bits": _bits_of(out),
    }
    if of.primitive == "shift":
        common |= {"weight_bits": of.right_bits, "terms": of.terms}
    batch, inputs = x.shape[0], x.shape[1] // groups
    if transposed:  # every input goes to as many outputs as the kernel has taps; these are summed up in the end
        outputs = weight.shape[1] * math.prod(kernel)
        rows = batch * math.prod(x.shape[2:])
        yield Product(of.primitive, groups, 1, outputs, inputs, (rows, 1), **common)
        return
    yield Product(
        of.primitive,
        groups,
        batch,
        out.shape[1] // groups,
        inputs,
        _pair(out.shape[2:]),
        kernel,
        _pair(stride),
        _pair(x.shape[2:]),
        **common,
    )


def _pair(size: Any) -> tuple[int, int]:
    """Rows and columns; of three dimensions, the first two as one."""
    size = [int(length) for length in size]
    return (1, size[0]) if len(size) == 1 else (math.prod(size[:-1]), size[-1])


def _attention(of: _Operands, args: tuple, kwargs: dict, out: Any) -> Iterator[Product]:
    q, k, v = args[:3]
    groups, rows = math.prod(q.shape[:-2]), q.shape[-2]
    y = out[0] if isinstance(out, tuple | list) else out
    plain = _Operands(q, k, "mult", 0, 0, 1, False, False)
    yield _matrix_product(plain, groups, rows, q.shape[-1], k.shape[-2], y)
    yield _matrix_product(plain, groups, rows, k.shape[-2], v.shape[-1], y)


def _recurrent(of: _Operands, args: tuple, kwargs: dict, out: Any) -> Iterator[Product]:
    """One layer of an LSTM, in one direction: inputs of all steps at once, then the state step by step."""
    x, weight, recurrent, state = args[0], args[1], args[2], args[5]
    steps, batch, inputs = x.shape
    y = out[0]
    yield _matrix_product(of, 1, steps * batch, inputs, weight.shape[0], y)
    for _ in range(steps):
        step = of._replace(left=state, right=recurrent)
        yield _matrix_product(step, 1, batch, recurrent.shape[1], recurrent.shape[0], y)


def _trilinear(of: _Operands, args: tuple, kwargs: dict, out: Tensor) -> Iterator[Product]:
    """What `nn.Bilinear` runs: the outer product of x [rows, i] and y [rows, j] times a weight [outputs, i, j]."""
    outputs, *pair = args[1].shape
    yield _matrix_product(of, 1, args[0].shape[0], math.prod(pair), outputs, out)


# Where the two operands stand in those operators that may meet binary codes.
_FIRST_OPERAND = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}
_PRODUCTS: dict[str, Callable[[_Operands, tuple, dict, Any], Iterator[Product]]] = {
    "mm": _mm,
    "addmm": _mm,
    "bmm": _bmm,
    "baddbmm": _bmm,
    "mv": _mv,
    "addmv": _mv,
    "dot": _dot,
    "vdot": _dot,
    "convolution": _convolution,
    "_convolution": _convolution,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "mkldnn_rnn_layer": _recurrent,
    "_trilinear": _trilinear,
}


# --------------------------------------------------------------------------------------------------------------------
# Elementwise work
# --------------------------------------------------------------------------------------------------------------------

_Formula = Callable[[tuple, dict, Tensor], Elementwise]
_SOFTMAX = Elementwise(add=2, compare=1, special=2)  # the largest, the difference to it, exp, the sum, the division
# Four sums of input and state, three sigmoids and two tanh, two gated products and their sum, and one more product.
_LSTM_CELL = Elementwise(mult=3, add=8, special=8)


def _each(**counts: int) -> _Formula:
    one = Elementwise(**counts)
    return lambda args, kwargs, out: one.times(out.numel())


def _special(args: tuple, kwargs: dict, out: Tensor) -> Elementwise:
    return Elementwise(special=out.numel())


def _addition(args: tuple, kwargs: dict, out: Tensor) -> Elementwise:
    scaled = kwargs.get("alpha", 1) != 1
    return Elementwise(add=out.numel(), mult=out.numel() if scaled else 0)


def _clamp(args: tuple, kwargs: dict, out: Tensor) -> Elementwise:
    bounds = (*args[1:3], kwargs.get("min"), kwargs.get("max"))
    return Elementwise(compare=sum(bound is not None for bound in bounds) * out.numel())


def _power(args: tuple, kwargs: dict, out: Tensor) -> Elementwise:
    return Elementwise(mult=out.numel()) if args[1:] == (2,) else Elementwise(special=out.numel())


def _sum(args: tuple, kwargs: dict, out: Tensor) -> Elementwise:
    return Elementwise(add=args[0].numel() - out.numel())


def _mean(args: tuple, kwargs: dict, out: Tensor) -> Elementwise:
    return Elementwise(add=args[0].numel() - out.numel(), mult=out.numel())


def _variance(args: tuple, kwargs: dict, out: Tensor) -> Elementwise:
    return Elementwise(mult=args[0].numel(), add=3 * args[0].numel(), special=out.numel())


def _extreme(args: tuple, kwargs: dict, out: Tensor) -> Elementwise:
    return Elementwise(compare=args[0].numel() - out.numel())


def _sort(args: tuple, kwargs: dict, out: Tensor) -> Elementwise:
    length = args[0].shape[-1] if args[0].dim() else 1
    return Elementwise(compare=args[0].numel() * math.ceil(math.log2(max(length, 1))))


def _norm(weight: int, bias: int, statistics: bool) -> _Formula:
    """A norm whose weight and bias are the arguments of these numbers; `statistics`: of its input, not stored ones."""

    def formula(args: tuple, kwargs: dict, out: Tensor) -> Elementwise:
        count = out.numel()
        scaled, shifted = args[weight] is not None, args[bias] is not None
        if not statistics:  # one factor and one offset a channel, worked out once
            return Elementwise(mult=count, add=count)
        # mean: a sum. Variance: differences, squares, a sum. Then the scale.
        return Elementwise(mult=(2 + scaled) * count, add=(3 + shifted) * count)

    return formula


def _attention_weights(args: tuple, kwargs: dict, out: Tensor) -> Elementwise:
    q, k = args[:2]
    return _SOFTMAX.times(q.shape[:-1].numel() * k.shape[-2])


def _outer_product(args: tuple, kwargs: dict, out: Tensor) -> Elementwise:
    return Elementwise(mult=args[0].shape[0] * args[1].shape[1:].numel())


def _pool(args: tuple, kwargs: dict, out: Tensor) -> Elementwise:
    return Elementwise(add=max(0, args[0].numel() - out.numel()), mult=out.numel())


def _window(args: tuple) -> int:
    size = args[1]
    return math.prod(size) if len(size) > 1 else size[0] ** 2


_ELEMENTWISE: dict[str, _Formula] = {
    **dict.fromkeys(("add", "add_", "sub", "sub_", "rsub"), _addition),
    **dict.fromkeys(("mul", "mul_", "square"), _each(mult=1)),
    **dict.fromkeys(("lerp", "lerp_", "addcmul", "addcmul_"), _each(mult=1, add=2)),
    **dict.fromkeys(("relu", "relu_", "maximum", "minimum", "threshold"), _each(compare=1)),
    **dict.fromkeys(("ge", "gt", "le", "lt", "eq", "ne", "ge_", "gt_", "le_", "lt_"), _each(compare=1)),
    **dict.fromkeys(("clamp", "clamp_", "hardtanh"), _clamp),
    **dict.fromkeys(("clamp_min", "clamp_max", "clamp_min_", "clamp_max_", "leaky_relu"), _each(compare=1)),
    **dict.fromkeys(("pow", "pow_"), _power),
    "gelu": _each(mult=3, add=1, special=1),  # x / 2 (1 + erf(x / sqrt 2))
    **dict.fromkeys(("silu", "silu_"), _each(mult=1, add=1, special=2)),
    **dict.fromkeys(("sigmoid", "sigmoid_"), _each(add=1, special=2)),
    **dict.fromkeys(("elu", "elu_"), _each(compare=1, add=1, special=1)),
    **dict.fromkeys(
        ("_softmax", "_safe_softmax", "_log_softmax"), lambda args, kwargs, out: _SOFTMAX.times(out.numel())
    ),
    **dict.fromkeys(("sum", "nansum", "cumsum"), _sum),
    "cumprod": lambda args, kwargs, out: Elementwise(mult=out.numel()),
    "mean": _mean,
    **dict.fromkeys(("var", "var_mean", "std"), _variance),
    **dict.fromkeys(("max", "min", "amax", "amin", "argmax", "argmin", "any", "all"), _extreme),
    **dict.fromkeys(("sort", "argsort", "topk"), _sort),
    # Beside products: of attention, LSTMs and bilinear layers.
    **dict.fromkeys((name for name, products in _PRODUCTS.items() if products is _attention), _attention_weights),
    "mkldnn_rnn_layer": lambda args, kwargs, out: _LSTM_CELL.times(out.numel()),
    "_trilinear": _outer_product,
    "native_layer_norm": _norm(2, 3, True),
    "native_group_norm": _norm(1, 2, True),
    "native_batch_norm": lambda args, kwargs, out: _norm(1, 2, bool(args[5]))(args, kwargs, out),
    "_native_batch_norm_legit": lambda args, kwargs, out: _norm(1, 2, bool(args[5]))(args, kwargs, out),
    "_native_batch_norm_legit_no_training": _norm(1, 2, False),
    "cudnn_batch_norm": _norm(1, 2, False),
    "_batch_norm_with_update": _norm(1, 2, True),
    "instance_norm": _norm(1, 2, True),
    "linalg_vector_norm": lambda args, kwargs, out: Elementwise(
        mult=args[0].numel(), add=args[0].numel() - out.numel(), special=out.numel()
    ),
    **dict.fromkeys(("_adaptive_avg_pool2d", "avg_pool2d"), _pool),
    "max_pool2d_with_indices": lambda args, kwargs, out: Elementwise(compare=out.numel() * (_window(args) - 1)),
    "upsample_bilinear2d": _each(mult=4, add=3),
    "grid_sampler_2d": _each(mult=4, add=3),
    "upsample_bicubic2d": _each(mult=16, add=15),
}
# Pointwise to torch, but no arithmetic: signs, copies, choices and bits.
_FREE = {
    *("abs", "neg", "sign", "sgn", "copy_", "_to_copy", "clone", "fill_", "where", "masked_fill", "masked_fill_"),
    *("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "logical_and", "logical_or", "logical_not"),
    *("bitwise_left_shift", "bitwise_right_shift", "isnan", "isinf", "isfinite", "dropout", "native_dropout", "zero_"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "fill", "copy", "signbit", "copysign", "conj", "real"),
    *("__and__", "__or__", "__xor__", "floor", "ceil", "round", "trunc", "masked_scatter", "nan_to_num"),
}
