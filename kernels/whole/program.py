"""A network as a list of calls of functions, before anything is compiled.

A `Program` knows shapes and weights, but no TVM: that it is compiled already can be told from its description alone.
Weights are arguments of the compiled program, so that networks that differ in weights only share their code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from torch import Tensor

from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.numerics import Numerics
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import PrimFunc

Dim = int | str
"""A size; a name stands for one that is known only when the program runs, such as that of a batch."""

Exactness = Numerics | Literal["safe"]
"""What a program is compiled for: numerics, or ``"safe"``, in which products take every number that float32 holds."""


Asked = TypeVar("Asked", bound=tuple[object, ...])
Spec = TypeVar("Spec", bound=tuple[object, ...])


@dataclass(frozen=True)
class Function(Generic[Asked, Spec]):
    """A function in TIR that programs call, in as many specialisations as are asked for.

    Both what a call asks for and what is compiled in are named tuples of numbers, strings and such tuples.

    Attributes:
        name: what it is called in the executable and in messages.
        build: ``build(target, spec)``: the function. Its arguments are tensors: those of the call, then `control`, then
            the outcomes.
        trial: ``trial(function, spec)`` runs it, compiled, on a small problem, and raises `AssertionError` where the
            outcome is not what plain torch computes.
        resolve: ``resolve(target, exactness, asked)``: the spec for what a call asks for.
    """

    name: str
    build: Callable[[CpuTarget, Spec], PrimFunc]
    trial: Callable[[Compiled, Spec], None]
    resolve: Callable[[CpuTarget, Exactness, Asked], Spec]


AnyFunction = Function[Any, Any]


def fixed(
    name: str, build: Callable[[CpuTarget, Spec], PrimFunc], trial: Callable[[Compiled, Spec], None]
) -> Function[Spec, Spec]:
    """A function into which is compiled what calls ask for, whatever the target and the numerics."""
    return Function(name, build, trial, _as_asked)


def _as_asked(target: CpuTarget, exactness: Exactness, asked: Spec) -> Spec:
    return asked


class Value(NamedTuple):
    """A tensor of a program: an input, a weight or an outcome."""

    number: int
    shape: tuple[Dim, ...]
    dtype: str = "float32"


class Call(NamedTuple):
    """A call of a function; without one, the argument in another shape."""

    function: AnyFunction | None
    asked: tuple[object, ...]
    arguments: tuple[Value, ...]
    outs: tuple[Value, ...]


class Program:
    """What a network does with its inputs: first `input`, then `weight` and `call`, and `output` last.

    Beside its inputs and weights it is given `control`, two int32: the first is set to 1 where a product could not
    express an activation, so that the outcome means nothing; the second says how many threads there are.
    """

    def __init__(self) -> None:
        self.inputs: list[Value] = []
        self.weights: list[Tensor] = []
        self.weight_values: list[Value] = []
        self.calls: list[Call] = []
        self.outputs: list[Value] = []
        self._count = 0
        self._of_tensor: dict[int, Value] = {}

    def _value(self, shape: Sequence[Dim], dtype: str) -> Value:
        self._count += 1
        return Value(self._count - 1, tuple(shape), dtype)

    def input(self, *shape: Dim, dtype: str = "float32") -> Value:
        """The next input."""
        self.inputs.append(self._value(shape, dtype))
        return self.inputs[-1]

    def weight(self, tensor: Tensor) -> Value:
        """A weight, given once however often it is asked for. It is kept as it is, and has to be contiguous."""
        known = self._of_tensor.get(id(tensor))
        if known is None:
            dtype = str(tensor.dtype).removeprefix("torch.")
            known = self._of_tensor[id(tensor)] = self._value(tensor.shape, dtype)
            self.weights.append(tensor)
            self.weight_values.append(known)
        return known

    def call(
        self, function: Function[Asked, Spec], arguments: Sequence[Value], shape: Sequence[Dim], asked: Asked
    ) -> Value:
        """What a function makes of some values, float32 of a shape; `asked` is for its `resolve`."""
        return self.call_for(function, arguments, [(shape, "float32")], asked)[0]

    def call_for(
        self,
        function: Function[Asked, Spec],
        arguments: Sequence[Value],
        outcomes: Sequence[tuple[Sequence[Dim], str]],
        asked: Asked,
    ) -> tuple[Value, ...]:
        """`call` of a function with several outcomes, given by shape and dtype."""
        outs = tuple(self._value(shape, dtype) for shape, dtype in outcomes)
        self.calls.append(Call(function, asked, tuple(arguments), outs))
        return outs

    def reshape(self, x: Value, shape: Sequence[Dim]) -> Value:
        """The same numbers in another shape."""
        out = self._value(shape, x.dtype)
        self.calls.append(Call(None, (), (x,), (out,)))
        return out

    def output(self, *values: Value) -> None:
        """What the program gives back."""
        self.outputs = list(values)

    def without_weights(self) -> Program:
        """The same without the tensors of its weights, whose shapes are all that compiling takes."""
        bare = copy.copy(self)
        bare.weights, bare._of_tensor = [], {}
        return bare

    def resolved(self, target: CpuTarget, exactness: Exactness) -> list[tuple[Call, tuple[object, ...]]]:
        """All calls, with what is compiled into their functions."""
        return [
            (call, call.function.resolve(target, exactness, call.asked) if call.function else ()) for call in self.calls
        ]

    def description(self, target: CpuTarget, exactness: Exactness) -> Mapping[str, Any]:
        """All that the compiled program depends on, but for the source text, in plain types."""
        return {
            "inputs": [tuple(value) for value in self.inputs],
            "weights": [tuple(value) for value in self.weight_values],
            "calls": [
                (
                    call.function.name if call.function else "reshape",
                    spec,
                    [value.number for value in call.arguments],
                    [tuple(out) for out in call.outs],
                )
                for call, spec in self.resolved(target, exactness)
            ],
            "outputs": [value.number for value in self.outputs],
        }
