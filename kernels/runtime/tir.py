"""TVM's TIR, in which kernels are written. It has TVM's names, and types, and is imported when first used.

Modules say ``from shiftadd3d.kernels.runtime import tir as T``. Inside the block of `function`, calls emit statements
into the function, in the order of the calls. So a Python loop is unrolled, and the value of a Python variable is
compiled in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Protocol, TypeAlias, TypeVar
from typing import cast as typed


class Expr(Protocol):
    """A number, or a vector of numbers, that compiled code computes when it runs."""

    def __add__(self, other: Number, /) -> Expr: ...
    def __radd__(self, other: Number, /) -> Expr: ...
    def __sub__(self, other: Number, /) -> Expr: ...
    def __rsub__(self, other: Number, /) -> Expr: ...
    def __mul__(self, other: Number, /) -> Expr: ...
    def __rmul__(self, other: Number, /) -> Expr: ...
    def __truediv__(self, other: Number, /) -> Expr: ...
    def __rtruediv__(self, other: Number, /) -> Expr: ...
    def __floordiv__(self, other: Number, /) -> Expr: ...
    def __mod__(self, other: Number, /) -> Expr: ...
    def __neg__(self) -> Expr: ...
    def __and__(self, other: Number, /) -> Expr: ...
    def __or__(self, other: Number, /) -> Expr: ...
    def __xor__(self, other: Number, /) -> Expr: ...
    def __lshift__(self, other: Number, /) -> Expr: ...
    def __rshift__(self, other: Number, /) -> Expr: ...
    def __lt__(self, other: Number, /) -> Expr: ...
    def __le__(self, other: Number, /) -> Expr: ...
    def __gt__(self, other: Number, /) -> Expr: ...
    def __ge__(self, other: Number, /) -> Expr: ...
    def __eq__(self, other: Number, /) -> Expr: ...
    def __ne__(self, other: Number, /) -> Expr: ...


Named = TypeVar("Named")
Index: TypeAlias = "Expr | int"
Number: TypeAlias = "Expr | int | float"


class PrimFunc(Protocol):
    """A function as TVM compiles it."""

    def with_attr(self, name: str, value: object) -> PrimFunc: ...


class TvmBuffer(Protocol):
    """A buffer of TVM."""

    data: Expr

    def __getitem__(self, index: tuple[Index, ...], /) -> Expr: ...
    def access_ptr(self, access_mask: str, *, ptr_type: str, offset: Index) -> Expr: ...


class Buffer:
    """Memory of compiled code: reading an element gives an expression, assigning to one emits a store.

    An index that is a vector (`ramp`) reads and writes a vector.

    Attributes:
        shape: of the memory, numbers and expressions.
        dtype: of an element; ``"bfloat16"`` elements are read and written as their bits, int16.
        data: TVM's own buffer.
    """

    def __init__(
        self, data: TvmBuffer, shape: Sequence[Index], dtype: str, leading: tuple[Index, ...] = (), row: Index = 0
    ) -> None:
        self.data, self.shape, self.dtype, self._leading, self._row = data, tuple(shape), dtype, leading, row

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Expr:
        return self.data[self._whole(index)]

    def __setitem__(self, index: Index | tuple[Index, ...], value: Expr) -> None:
        _tirx().buffer_store(self.data, value, list(self._whole(index)))

    def _whole(self, index: Index | tuple[Index, ...]) -> tuple[Index, ...]:
        first, *others = index if isinstance(index, tuple) else (index,)
        return (*self._leading, self._moved(first), *others)

    def _moved(self, row: Index) -> Index:
        return row if isinstance(self._row, int) and self._row == 0 else self._row + row

    def part(self, *leading: Index) -> Buffer:
        """The part at these first indices: a row of a matrix, for instance."""
        return Buffer(self.data, self.shape[len(leading) :], self.dtype, self._whole(leading))

    def below(self, row: Index) -> Buffer:
        """The rows from `row` on."""
        first, *others = self.shape
        return Buffer(self.data, (first - row, *others), self.dtype, self._leading, self._moved(row))

    def extent(self, axis: int) -> int:
        """A size that is known while code is emitted."""
        size = self.shape[axis]
        assert isinstance(size, int)
        return size

    def address(self, *index: Index) -> Expr:
        """A pointer to an element."""
        return _tirx().address_of(self[index])

    def pointer(self, access: str, offset: Index) -> Expr:
        """A pointer for intrinsics of GPUs, `offset` elements from the start, to read (``"r"``) or write (``"w"``)."""
        return self.data.access_ptr(access, ptr_type=self.dtype, offset=offset)

    def flat(self) -> Buffer:
        """The same memory as one row."""
        size = self.shape[0]
        for extent in self.shape[1:]:
            size = size * extent
        return self.view(size)

    def view(self, *shape: Index, strides: Sequence[Index] | None = None, start: Index = 0) -> Buffer:
        """The same memory in another shape; all views come after all arguments.

        Args:
            strides: elements from one index to the next, for each axis; None for memory without gaps.
            start: the number of its first element.
        """
        stored = "int16" if self.dtype == "bfloat16" else self.dtype
        data = _tirx().decl_buffer(
            shape, stored, data=self.data.data, strides=strides, elem_offset=start, align=_alignment(stored)
        )
        return Buffer(data, shape, self.dtype)


@lru_cache(maxsize=1)
def _tirx() -> ModuleType:
    import tvm.script

    return tvm.script.tirx


def _expression(name: str) -> Callable[..., Expr]:
    """A function that makes an expression from its arguments; `name` is TVM's."""
    return lambda *arguments: getattr(_tirx(), name)(*arguments)


# Functions.


class Builder(Protocol):
    """A function that is being made, or is finished."""

    def get(self) -> PrimFunc:
        """The function, once its block has ended."""
        ...


@contextmanager
def function(name: str) -> Iterator[Builder]:
    """A block that makes a function: first its arguments, in order, then its statements. No two buffers overlap."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import prim_func

    builder = IRBuilder()
    with builder, prim_func(s_tir=True):
        _tirx().func_name(name)
        _tirx().func_attr({"tirx.noalias": True})
        yield typed(Builder, builder)


def sizes(count: int) -> list[Expr]:
    """`count` sizes (int64), which the shapes of arguments bind."""
    return [_tirx().int64() for _ in range(count)]


def argument(
    name: str,
    shape: Sequence[Index],
    dtype: str = "float32",
    *,
    strides: Sequence[Index] | None = None,
    align: int | None = None,
) -> Buffer:
    """The next argument, a tensor.

    Args:
        shape: numbers, which are checked, and `sizes`, bound by the first argument that has them.
        strides: for a tensor that need not be contiguous.
        align: bytes that its address is a multiple of; by default the size of an element.
    """
    stored = "int16" if dtype == "bfloat16" else dtype
    align = align or _alignment(stored)
    return tensor(name, shape, stored, dtype, strides=strides, align=align)


def tensor(name: str, shape: Sequence[Index], stored: str, dtype: str | None = None, **layout: object) -> Buffer:
    """The next argument, with elements of the type `stored`. `dtype` is the name in `Buffer.dtype`, if another."""
    handle = _tirx().arg(f"{name}_handle", _tirx().handle())
    return Buffer(_named(name, _tirx().match_buffer(handle, shape, stored, **layout)), shape, dtype or stored)


def _alignment(dtype: str) -> int:
    """Bytes that the address of an element is a multiple of."""
    return {"uint8": 1, "int8": 1, "int16": 2, "int64": 8}.get(dtype, 4)


def _named(name: str, x: Named) -> Named:
    """`x`, with a name for messages about calls that do not fit."""
    from tvm.script.ir_builder import IRBuilder

    return IRBuilder.name(name, x)


def panel(name: str, *shape: int) -> Buffer:
    """The next argument, packed weights, aligned to whole vectors."""
    return argument(name, shape, align=64)


def panels(shapes: Sequence[tuple[int, ...]], names: Sequence[str] = ()) -> list[Buffer]:
    """The next arguments, panels of these shapes."""
    names = names or [f"panel{number}" for number in range(len(shapes))]
    return [panel(name, *shape) for name, shape in zip(names, shapes, strict=True)]


def scalar(name: str, dtype: str = "int64") -> Expr:
    """The next argument, a number."""
    return _tirx().arg(name, getattr(_tirx(), dtype)())


def scalars(*names: str) -> list[Expr]:
    """The next arguments, int32."""
    return [scalar(name, "int32") for name in names]


# Statements.


def alloc(*shape: Index, dtype: str = "float32", align: int = 64, scope: str = "global") -> Buffer:
    """Scratch memory; registers where it is small and indexed by constants."""
    return Buffer(_tirx().alloc_buffer(shape, dtype, align=align, scope=scope), shape, dtype)


def serial(count: Index, unroll: int | None = None) -> AbstractContextManager[Expr]:
    """A loop over 0 to `count` - 1. `unroll` tells a GPU's compiler how many turns to unroll."""
    return _tirx().serial(count, unroll=unroll)


def unroll(count: int) -> AbstractContextManager[Expr]:
    """A loop that is unrolled."""
    return _tirx().unroll(count)


def bound(count: Index, place: str) -> AbstractContextManager[Expr]:
    """A loop whose turns are blocks or threads of a GPU; `place` is ``"blockIdx.x"`` or similar."""
    return _tirx().thread_binding(count, place)


def parallel(count: Index) -> AbstractContextManager[Expr]:
    """A loop whose turns are divided among torch's number of threads."""
    return _tirx().parallel(count)


def If(condition: Expr | bool) -> AbstractContextManager[object]:
    """A block of a `Then` and perhaps an `Else`."""
    return _tirx().If(condition)


def Then() -> AbstractContextManager[object]:
    return _tirx().Then()


def Else() -> AbstractContextManager[object]:
    return _tirx().Else()


@contextmanager
def when(condition: Expr | bool) -> Iterator[None]:
    """A block that runs where the condition holds."""
    with If(condition), Then():
        yield


bind: Callable[[Expr], Expr] = _expression("bind")
"""An expression that is computed here, once."""


def evaluate(x: Expr) -> None:
    """Emit an expression for its effect."""
    _tirx().evaluate(x)


def emit(name: str, *arguments: Buffer | Number | str) -> None:
    """Emit an intrinsic of TVM for its effect. It gets the memory of buffers."""
    evaluate(getattr(_tirx(), name)(*(x.data.data if isinstance(x, Buffer) else x for x in arguments)))


# Expressions.


def number(dtype: str, x: Number) -> Expr:
    """A constant."""
    return getattr(_tirx(), dtype)(x)


int32: Callable[[int], Expr] = _expression("int32")
int64: Callable[[int], Expr] = _expression("int64")
float32: Callable[[float], Expr] = _expression("float32")


def known(x: Index) -> int | None:
    """An integer that is known while code is emitted, Python's or TVM's; None for any other expression."""
    return x if isinstance(x, int) else getattr(x, "value", None) if type(x).__name__ == "IntImm" else None


def ramp(start: Index, count: int) -> Expr:
    """The vector start, start + 1, ...: the index of `count` elements side by side."""
    return _tirx().ramp(start, 1, count)


def at(start: Index, count: int) -> Index:
    """The index of `count` elements from `start`; a scalar if `count` is 1."""
    return start if count == 1 else ramp(start, count)


def shuffle(vectors: Sequence[Expr], order: Sequence[int]) -> Expr:
    """The vector of these lanes. Lanes are numbered through all vectors."""
    return _tirx().Shuffle(list(vectors), list(order))


broadcast: Callable[[Expr, int], Expr] = _expression("broadcast")
"""``broadcast(x, count)``: a number in `count` lanes."""

cast: Callable[[Expr, str], Expr] = _expression("cast")
"""The nearest number of another type."""

reinterpret: Callable[[str, Expr], Expr] = _expression("reinterpret")
"""``reinterpret(dtype, x)``: the bits of `x` as another type."""

select: Callable[[Expr, Number, Number], Expr] = _expression("Select")
"""``select(condition, x, y)``: `x` where the condition holds, else `y`; both are computed."""

if_then_else: Callable[[Expr, Expr, Expr], Expr] = _expression("if_then_else")
"""``if_then_else(condition, x, y)``: `x` if the condition holds, else `y`; only one is computed."""

both: Callable[[Expr, Expr], Expr] = _expression("And")
"""Whether two conditions hold."""

either: Callable[[Expr, Expr], Expr] = _expression("Or")
"""Whether one of two conditions holds."""

negate: Callable[[Expr], Expr] = _expression("Not")
"""Whether a condition does not hold."""

min: Callable[[Number, Number], Expr] = _expression("min")
max: Callable[[Number, Number], Expr] = _expression("max")

truncdiv: Callable[[Index, Index], Expr] = _expression("truncdiv")
"""``a // b``, rounded towards zero: quick to compile, where the sign of a is not known."""

truncmod: Callable[[Index, Index], Expr] = _expression("truncmod")
"""The remainder of `truncdiv`."""

exp: Callable[[Expr], Expr] = _expression("exp")
sqrt: Callable[[Expr], Expr] = _expression("sqrt")
erf: Callable[[Expr], Expr] = _expression("erf")
floor: Callable[[Expr], Expr] = _expression("floor")

nearbyint: Callable[[Expr], Expr] = _expression("nearbyint")
"""The nearest whole number, ties to even."""


def intrinsic(dtype: str, name: str, *arguments: Expr) -> Expr:
    """The result of an instruction; `name` is LLVM's, without its prefix."""
    return _tirx().call_llvm_pure_intrin(dtype, f"llvm.{name}", *arguments)


def call(dtype: str, function: str, *arguments: Expr) -> Expr:
    """The result of a function of the compiler's library."""
    return _tirx().call_extern(dtype, function, *arguments)


def instruct(name: str, *arguments: Expr) -> None:
    """Emit an instruction for its effect; `name` is LLVM's, without its prefix."""
    evaluate(_tirx().call_llvm_intrin("void", f"llvm.{name}", *arguments))


def total(terms: Sequence[Expr]) -> Expr:
    """The sum of a few expressions, pairs first."""
    while len(terms) > 1:
        terms = [sum(terms[i + 1 : i + 2], terms[i]) for i in range(0, len(terms), 2)]
    return terms[0]


Load: TypeAlias = Callable[[Index, Index, int], Expr]
"""``load(row, column, count)`` reads `count` float32 numbers of a row, a vector, or a scalar if `count` is 1."""

Store: TypeAlias = Callable[[Index, Index, Expr, int], None]
"""``store(row, column, x, count)`` stores `count` float32 numbers of a row."""
