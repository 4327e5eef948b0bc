"""MatShift on NVIDIA GPUs, two ways.

``"tensor"``: tensor cores multiply, 16 x 16 x 16 at a time, and add up in float32. Codes are decoded on the way into
shared memory, relative to the largest offset of their channel, so that weights lie in the range of the narrow type
whatever their exponents; that offset scales the sum in the end. float16 activations are multiplied as float16. All
others are bfloat16: bfloat16 as it is, float32 in two pieces, the upper 16 bits and what is left of it, rounded. So any
finite float32 goes in, none becomes infinite, and before the activation function
``|y - exact y| <= 2**-16 * sum |x| |w|`` beside the rounding of the sum. Of two terms that are more than 2**17
(float16; 2**120 for bfloat16) apart, the smaller one may vanish.

``"float32"``: the ordinary units, decoded weights and fused multiply-adds in float32 throughout.

A block of 128 threads computes 64 x 64 numbers of y. Any number of rows, inputs and outputs is served, by guarded loads
and stores.
"""

# TVMScript's annotations are calls:
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d.kernels import activations, power_of_two, targets
from shiftadd3d.kernels.activations import Activation
from shiftadd3d.kernels.cuda import MAX_ELEMENTS, CudaFunction, CudaKernel
from shiftadd3d.kernels.numerics import Numerics
from shiftadd3d.kernels.targets import CudaTarget

Form = Literal["tensor", "float32"]
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

_THREADS = 128
_ROWS, _COLUMNS = 64, 64  # of a block
_INPUTS = {"tensor": 32, "float32": 16}  # staged at once
_FRAGMENT = 16  # side of what one instruction of the tensor cores multiplies
_PADDING = {"tensor": 8, "float32": 4}  # elements between rows in shared memory, against conflicts of banks
# Of the numbers that a thread computes without tensor cores, so many are below one another, and side by side.
_DOWN, _ACROSS = 8, 4
_SMALLEST_EXPONENT = {"float16": -24, "bfloat16": -126}
_FLOAT16_BITS = 5  # codes of up to so many bits have windows that float16 holds


def form(target: CudaTarget, numerics: Numerics, bits: int, dtype: Dtype) -> Form:
    """The way that is as exact as `numerics` asks for."""
    if dtype == "float16":
        return "tensor" if bits <= _FLOAT16_BITS else "float32"
    if dtype == "float32" and numerics == "exact":
        return "float32"
    return "tensor" if target.has_bfloat16 else "float32"


class _Weights:
    """The packed weight of a linear layer as the kernels see it."""

    def __init__(self, codes: Any, offset: Any, bits: int, terms: int) -> None:
        import tvm.script

        self.tirx: Any = tvm.script.tirx
        self.codes, self.offset, self.bits, self.terms = codes, offset, bits, terms
        self.levels = power_of_two.num_exponents(bits)

    def top(self, row: Any) -> Any:
        """The exponent that the weights of a channel are scaled by: its largest offset."""
        T = self.tirx
        offsets = [T.cast(self.offset[term, row], "int32") for term in range(self.terms)]
        return offsets[0] if len(offsets) == 1 else T.max(*offsets)

    def value(self, term: int, row: Any, index: Any, scale: Any, smallest: int) -> Any:
        """``weight / 2**scale`` as a float32, 0 where its exponent is below `smallest`."""
        T = self.tirx
        code = T.bind(self._code(term, row, index))
        level = code & self.levels
        exponent = T.bind(T.cast(self.offset[term, row], "int32") - scale + level - self.levels)
        sign = (code >> (self.bits - 1)) << 31
        is_zero = T.Or(level == 0, exponent < smallest)
        return T.reinterpret("float32", T.Select(is_zero, T.int32(0), ((exponent + 127) << 23) | sign))

    def _code(self, term: int, row: Any, index: Any) -> Any:
        T = self.tirx
        bit = index * self.bits
        word = T.cast(self.codes[term, row, bit >> 3], "int32")
        if 8 % self.bits:
            # A code may reach into the next byte; the last one of a row does not.
            following = T.min((bit >> 3) + 1, self.codes.shape[2] - 1)
            word = word | (T.cast(self.codes[term, row, following], "int32") << 8)
        return (word >> (bit & 7)) & ((1 << self.bits) - 1)


def _activate(activation: Activation, y: Any) -> Any:
    import tvm.script

    T: Any = tvm.script.tirx
    if activation == "relu":
        return T.Select(y < T.float32(0), T.float32(0), y)  # NaN stays
    if activation == "gelu":
        return T.float32(0.5) * y * (T.float32(1) + T.erf(y * T.float32(0.5**0.5)))
    return y


def build(target: CudaTarget, form: Form, bits: int, terms: int, dtype: Dtype, activation: Activation) -> Any:
    """The function of (x, codes, offset, bias, y); x and y in `dtype`, bias float32. Blocks: rows along x, outputs
    along y."""
    return (_build_tensor if form == "tensor" else _build_float32)(bits, terms, dtype, activation)


def _build_float32(bits: int, terms: int, dtype: Dtype, activation: Activation) -> Any:
    from tvm.script import tirx as T

    depth, padding = _INPUTS["float32"], _PADDING["float32"]
    across = _COLUMNS // _ACROSS  # threads that share rows
    per_pass = _THREADS // depth

    def stage(xs: Any, at: Any, row: Any, x: Any, is_there: Any) -> None:
        T.buffer_store(xs, T.Select(is_there, T.cast(x, "float32"), T.float32(0)), [at, row])

    def accumulate(sums: Any, place: list[Any], x: Any, w: Any) -> None:
        T.buffer_store(sums, sums[place[0], place[1]] + x * w, place)  # nvcc makes it a fused multiply-add

    def stage_weight(ws: Any, at: Any, column: Any, weights: _Weights, channel: Any, k: Any, is_there: Any) -> None:
        values = [weights.value(term, channel, k, 0, power_of_two.MIN_EXPONENT) for term in range(terms)]
        T.buffer_store(ws, T.Select(is_there, sum(values[1:], values[0]), T.float32(0)), [at, column])

    @T.prim_func(s_tir=True)
    def matshift(x: T.handle, codes: T.handle, offset: T.handle, bias: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        rows = T.int32()
        inputs = T.int32()
        outputs = T.int32()
        length = T.int32()
        X = T.match_buffer(x, (rows, inputs), dtype)
        C = T.match_buffer(codes, (terms, outputs, length), "uint8")
        E = T.match_buffer(offset, (terms, outputs), "int8")
        B = T.match_buffer(bias, (outputs,), "float32")
        Y = T.match_buffer(y, (rows, outputs), dtype)
        for block_row in T.thread_binding((rows + (_ROWS - 1)) // _ROWS, "blockIdx.x"):
            for block_column in T.thread_binding((outputs + (_COLUMNS - 1)) // _COLUMNS, "blockIdx.y"):
                for thread in T.thread_binding(_THREADS, "threadIdx.x"):
                    # Inputs down, so that a thread's rows, and the columns of neighbouring threads, lie side by side.
                    xs = T.alloc_buffer((depth, _ROWS + padding), "float32", scope="shared")
                    ws = T.alloc_buffer((depth, _COLUMNS + padding), "float32", scope="shared")
                    sums = T.alloc_buffer((_DOWN, _ACROSS), "float32", scope="local")
                    for i in T.unroll(_DOWN):
                        for j in T.unroll(_ACROSS):
                            sums[i, j] = T.float32(0)
                    for step in T.serial((inputs + (depth - 1)) // depth):
                        k: T.let[T.int32] = step * depth + thread % depth
                        for i in T.serial(_ROWS // per_pass):
                            row: T.let[T.int32] = i * per_pass + thread // depth
                            from_row: T.let[T.int32] = block_row * _ROWS + row
                            x_there: T.let[T.bool] = T.And(from_row < rows, k < inputs)
                            stage(xs, thread % depth, row, X[T.min(from_row, rows - 1), T.min(k, inputs - 1)], x_there)
                        for i in T.serial(_COLUMNS // per_pass):
                            column: T.let[T.int32] = i * per_pass + thread // depth
                            channel: T.let[T.int32] = block_column * _COLUMNS + column
                            w_there: T.let[T.bool] = T.And(channel < outputs, k < inputs)
                            stage_weight(
                                ws,
                                thread % depth,
                                column,
                                _Weights(C, E, bits, terms),
                                T.min(channel, outputs - 1),
                                T.min(k, inputs - 1),
                                w_there,
                            )
                        for inner in T.unroll(depth):
                            for i in T.unroll(_DOWN):
                                for j in T.unroll(_ACROSS):
                                    sums[i, j] = (
                                        sums[i, j]
                                        + xs[inner, thread // across * _DOWN + i]
                                        * ws[inner, thread % across + j * across]
                                    )
                    for i in T.unroll(_DOWN):
                        for j in T.unroll(_ACROSS):
                            to_row: T.let[T.int32] = block_row * _ROWS + thread // across * _DOWN + i
                            to_column: T.let[T.int32] = block_column * _COLUMNS + thread % across + j * across
                            if T.And(to_row < rows, to_column < outputs):
                                Y[to_row, to_column] = T.cast(_activate(activation, sums[i, j] + B[to_column]), dtype)

    return matshift


def _build_tensor(bits: int, terms: int, dtype: Dtype, activation: Activation) -> Any:
    from tvm.script import tirx as T

    depth, stride = _INPUTS["tensor"], _INPUTS["tensor"] + _PADDING["tensor"]
    side, size = _FRAGMENT, _FRAGMENT**2
    narrow = "float16" if dtype == "float16" else "bfloat16"
    pieces = 2 if dtype == "float32" else 1
    # Four warps, two by two, have half of the rows and half of the columns each: two fragments by two.
    half, out_stride = _ROWS // 2, _FRAGMENT + 4
    per_pass = _THREADS // depth

    def upper(x: Any) -> Any:
        """The upper half of a float32: never infinite where x is finite, as rounding could make it."""
        return T.reinterpret("float32", T.reinterpret("int32", x) & -65536)

    def lower(x: Any) -> Any:
        return T.Select(x == upper(x), T.float32(0), x - upper(x))  # infinity leaves nothing, NaN stays NaN

    def stage(xs: Any, row: Any, at: Any, x: Any, is_there: Any) -> None:
        if pieces == 2:
            x = T.bind(T.Select(is_there, x, T.float32(0)))
            T.buffer_store(xs, T.cast(upper(x), narrow), [0, row, at])
            T.buffer_store(xs, T.cast(lower(x), narrow), [1, row, at])
        else:
            T.buffer_store(xs, T.Select(is_there, x, T.cast(T.float32(0), narrow)), [0, row, at])

    def stage_weight(ws: Any, column: Any, at: Any, weights: _Weights, channel: Any, k: Any, is_there: Any) -> None:
        top = T.bind(weights.top(channel))
        for term in range(terms):
            value = weights.value(term, channel, k, top, _SMALLEST_EXPONENT[narrow])
            T.buffer_store(ws, T.cast(T.Select(is_there, value, T.float32(0)), narrow), [term, column, at])

    def power(exponent: Any) -> Any:
        return T.reinterpret("float32", (exponent + 127) << 23)

    @T.prim_func(s_tir=True)
    def matshift(x: T.handle, codes: T.handle, offset: T.handle, bias: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        rows = T.int32()
        inputs = T.int32()
        outputs = T.int32()
        length = T.int32()
        X = T.match_buffer(x, (rows, inputs), dtype)
        C = T.match_buffer(codes, (terms, outputs, length), "uint8")
        E = T.match_buffer(offset, (terms, outputs), "int8")
        B = T.match_buffer(bias, (outputs,), "float32")
        Y = T.match_buffer(y, (rows, outputs), dtype)
        for block_row in T.thread_binding((rows + (_ROWS - 1)) // _ROWS, "blockIdx.x"):
            for block_column in T.thread_binding((outputs + (_COLUMNS - 1)) // _COLUMNS, "blockIdx.y"):
                for thread in T.thread_binding(_THREADS, "threadIdx.x"):
                    xs = T.alloc_buffer((pieces, _ROWS, stride), narrow, scope="shared")
                    ws = T.alloc_buffer((terms, _COLUMNS, stride), narrow, scope="shared")
                    out = T.alloc_buffer((_THREADS // 32, side, out_stride), "float32", scope="shared")
                    a = T.alloc_buffer((2 * pieces, size), narrow, scope="wmma.matrix_a")
                    b = T.alloc_buffer((2 * terms, size), narrow, scope="wmma.matrix_b")
                    sums = T.alloc_buffer((4, size), "float32", scope="wmma.accumulator")
                    warp: T.let[T.int32] = thread // 32
                    for i in T.unroll(4):
                        T.evaluate(T.tvm_fill_fragment(sums.data, side, side, side, i, T.float32(0)))
                    for step in T.serial((inputs + (depth - 1)) // depth):
                        k: T.let[T.int32] = step * depth + thread % depth
                        for i in T.serial(_ROWS // per_pass):
                            row: T.let[T.int32] = i * per_pass + thread // depth
                            from_row: T.let[T.int32] = block_row * _ROWS + row
                            x_there: T.let[T.bool] = T.And(from_row < rows, k < inputs)
                            stage(xs, row, thread % depth, X[T.min(from_row, rows - 1), T.min(k, inputs - 1)], x_there)
                        for i in T.serial(_COLUMNS // per_pass):
                            column: T.let[T.int32] = i * per_pass + thread // depth
                            channel: T.let[T.int32] = block_column * _COLUMNS + column
                            w_there: T.let[T.bool] = T.And(channel < outputs, k < inputs)
                            stage_weight(
                                ws,
                                column,
                                thread % depth,
                                _Weights(C, E, bits, terms),
                                T.min(channel, outputs - 1),
                                T.min(k, inputs - 1),
                                w_there,
                            )
                        for inner in T.serial(depth // side):
                            for i in T.unroll(2):
                                for piece in T.unroll(pieces):
                                    T.evaluate(
                                        T.tvm_load_matrix_sync(
                                            a.data,
                                            side,
                                            side,
                                            side,
                                            i * pieces + piece,
                                            xs.access_ptr(
                                                "r",
                                                ptr_type=narrow,
                                                offset=(piece * _ROWS + warp // 2 * half + i * side) * stride
                                                + inner * side,
                                            ),
                                            stride,
                                            "row_major",
                                        )
                                    )
                                for term in T.unroll(terms):
                                    T.evaluate(
                                        T.tvm_load_matrix_sync(
                                            b.data,
                                            side,
                                            side,
                                            side,
                                            i * terms + term,
                                            ws.access_ptr(
                                                "r",
                                                ptr_type=narrow,
                                                offset=(term * _COLUMNS + warp % 2 * half + i * side) * stride
                                                + inner * side,
                                            ),
                                            stride,
                                            "col_major",
                                        )
                                    )
                            for i in T.unroll(2):
                                for j in T.unroll(2):
                                    for piece in T.unroll(pieces):
                                        for term in T.unroll(terms):
                                            T.evaluate(
                                                T.tvm_mma_sync(
                                                    sums.data,
                                                    i * 2 + j,
                                                    a.data,
                                                    i * pieces + piece,
                                                    b.data,
                                                    j * terms + term,
                                                    sums.data,
                                                    i * 2 + j,
                                                )
                                            )
                    for i in T.unroll(2):
                        for j in T.unroll(2):
                            T.evaluate(
                                T.tvm_store_matrix_sync(
                                    sums.data,
                                    side,
                                    side,
                                    side,
                                    i * 2 + j,
                                    out.access_ptr("w", ptr_type="float32", offset=warp * side * out_stride),
                                    out_stride,
                                    "row_major",
                                )
                            )
                            to_column: T.let[T.int32] = (
                                block_column * _COLUMNS + warp % 2 * half + j * side + thread % side
                            )
                            for e in T.serial(size // 32):
                                of_row: T.let[T.int32] = e * 2 + thread % 32 // side
                                to_row: T.let[T.int32] = block_row * _ROWS + warp // 2 * half + i * side + of_row
                                if T.And(to_row < rows, to_column < outputs):
                                    Y[to_row, to_column] = T.cast(
                                        _activate(
                                            activation,
                                            out[warp, of_row, thread % side]
                                            * power(_Weights(C, E, bits, terms).top(to_column))
                                            + B[to_column],
                                        ),
                                        dtype,
                                    )

    return matshift


def trial(function: CudaFunction, form: Form, bits: int, terms: int, dtype: Dtype, activation: Activation) -> None:
    """Odd sizes with tails on every side, several blocks each way, exponents far apart."""
    generator = torch.Generator().manual_seed(0)
    rows, inputs, outputs = _ROWS + 19, 3 * _INPUTS["tensor"] + 5, _COLUMNS + 7
    weight = torch.randn(outputs, inputs, generator=generator) * torch.exp2(torch.arange(outputs) % 24 - 12.0)[:, None]
    codes, offset, _ = power_of_two.encode(weight, bits, terms)
    x = torch.randn(rows, inputs, generator=generator).to(getattr(torch, dtype))
    bias = torch.randn(outputs, generator=generator)
    arguments = (x, power_of_two.pack(codes, bits), offset, bias)
    y = run(function, *(argument.to(function.device) for argument in arguments)).cpu()
    weight = power_of_two.decode(codes, offset, bits).double()
    exact = F.linear(x.double(), weight, bias.double())
    size = x.double().abs() @ weight.abs().T + bias.abs()
    error = (2.0**-16 if form == "tensor" and dtype == "float32" else 2.0**-20) * size
    rounding = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-10}[dtype] * (exact.abs() + error)
    # The slope of the activation functions is at most 1.13; 2**-24 is the smallest float16.
    bound = 1.2 * (error + rounding) + (2.0**-24 if dtype == "float16" else 0.0)
    worst = ((y.double() - activations.apply(activation, exact)).abs() - bound).max().item()
    assert worst <= 0, f"it is off by {worst:.2g} more than it may be"


def variants(target: CudaTarget) -> Iterator[dict[str, Any]]:
    """4 and 5 bits, one and two terms, all dtypes, exact and fast, with each activation."""
    for bits, terms, dtype in itertools.product((4, 5), (1, 2), DTYPES.values()):
        found = dict.fromkeys(form(target, numerics, bits, dtype) for numerics in ("exact", "fast"))
        for one, activation in itertools.product(found, activations.ACTIVATIONS):
            yield {"form": one, "bits": bits, "terms": terms, "dtype": dtype, "activation": activation}


MATSHIFT = CudaKernel("matshift", build, trial, variants)


def run(function: Callable[..., None], x: Tensor, codes: Tensor, offset: Tensor, bias: Tensor) -> Tensor:
    """Call a compiled function: x [rows, inputs], codes [terms, outputs, bytes], offset [terms, outputs], bias float32
    [outputs], all contiguous; y [rows, outputs] in the dtype of x."""
    rows, inputs = x.shape
    _, outputs, length = codes.shape
    y = x.new_empty(rows, outputs)
    function(
        -(-rows // _ROWS),
        -(-outputs // _COLUMNS),
        X=x,
        C=codes,
        E=offset,
        B=bias,
        Y=y,
        rows=rows,
        inputs=inputs,
        outputs=outputs,
        length=length,
    )
    return y


def matshift(
    x: Tensor,
    codes: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    bits: int,
    activation: Activation,
    numerics: Numerics,
) -> Tensor | None:
    """The product of x [rows, inputs], none of them 0, or None where the twin has to do."""
    terms, outputs, _ = codes.shape
    if len(x) * max(x.shape[1], outputs) > MAX_ELEMENTS or outputs > 65535 * _COLUMNS:
        MATSHIFT.decline(f"a product of {list(x.shape)} with {outputs} outputs is too large for it")
        return None
    dtype = DTYPES[x.dtype]
    function = MATSHIFT.function(
        device=x.device,
        form=form(targets.of_gpu(x.device), numerics, bits, dtype),
        bits=bits,
        terms=terms,
        dtype=dtype,
        activation=activation,
    )
    if function is None:
        return None
    row = torch.zeros(outputs, device=x.device) if bias is None else bias.to(torch.float32)
    return run(function, *(tensor.contiguous() for tensor in (x, codes, offset, row)))
