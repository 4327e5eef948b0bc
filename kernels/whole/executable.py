"""Programs compiled: one library for the machine code of all functions and the order they are called in.

Compiling is TVM's: its Relax builder plans memory and shapes, and its virtual machine runs the outcome, which needs the
small runtime library only. Libraries are kept as those of kernels are (see `shiftadd3d.kernels.runtime.cache`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shiftadd3d.kernels.runtime import cache, kernel, targets
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.whole.program import AnyFunction, Exactness, Program, Value

# Of what TVM does to functions: these take long, and LLVM does the same, or there is nothing for them to do.
_SLOW_PASSES = kernel.SLOW_PASSES
_CPU, _POOLED = 1, 2


class Executable:
    """Compiled programs, by the names that they were compiled under; call one with tensors, see `Program`."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._machine = library["vm_load_executable"]()
        self._machine["vm_initialization"](_CPU, 0, _POOLED)

    def __getitem__(self, name: str) -> Any:
        return self._machine[name]

    def another(self) -> Executable:
        """The same programs, for another thread: those of one executable must not run at the same time."""
        return Executable(self._library)


def load(programs: Mapping[str, Program], exactness: Exactness) -> Executable:
    """Programs by name, compiled together for this machine, from the cache or by the compiler.

    Raises:
        Exception: one of `kernel.FAILURES`; anything else is a bug.
    """
    target = targets.current()
    return Executable(
        kernel.obtain(
            entry(programs, exactness),
            compile=lambda: compile_programs(programs, target, exactness),
            link=_link,
            trial=lambda library: _try(library, _functions(programs, target, exactness)),
            facts={"kernel": "whole", "target": target.name, "spec": {"exactness": exactness}},
        )
    )


def open_library(library: Path) -> Executable:
    """Programs in a library that has been compiled and tried; its code is run."""
    return Executable(kernel.load_library(library))


def entry(programs: Mapping[str, Program], exactness: Exactness) -> str:
    """The key in the cache: everything that the machine code depends on."""
    target = targets.current()
    return cache.key(
        programs=sorted((name, str(program.description(target, exactness))) for name, program in programs.items()),
        target=target.name,
        sources=_sources_digest(programs),
        passes=_SLOW_PASSES,
        **kernel.versions(),
    )


def _sources_digest(programs: Mapping[str, Program]) -> str:
    functions = {call.function for program in programs.values() for call in program.calls if call.function}
    return kernel.sources_digest(*(function.build.__module__ for function in functions), __name__)


_Specialised = tuple[AnyFunction, tuple[object, ...]]


def _functions(programs: Mapping[str, Program], target: CpuTarget, exactness: Exactness) -> dict[str, _Specialised]:
    """Each function that programs call, once for all alike, by its name in the library."""
    return {
        _name(call.function, spec): (call.function, spec)
        for program in programs.values()
        for call, spec in program.resolved(target, exactness)
        if call.function
    }


def _name(function: AnyFunction, spec: tuple[object, ...]) -> str:
    return f"{function.name}_{cache.key(spec=spec)[:8]}"


def compile_programs(programs: Mapping[str, Program], target: CpuTarget, exactness: Exactness) -> Any:
    """TVM's executable, for any target."""
    import tvm
    from tvm import relax

    kernel.install_launcher()
    module = _module(programs, target, exactness)
    with tvm.transform.PassContext(disabled_pass=list(_SLOW_PASSES)):
        return relax.build(module, target.tvm_target(), relax_pipeline=_pipeline())


def _pipeline() -> Any:
    """What TVM does to calls of functions: it plans memory and shapes. There is nothing left to fuse."""
    import tvm

    names = (
        ("ToNonDataflow", "RemovePurityChecking", "CallTIRRewrite"),
        ("StaticPlanBlockMemory", "LowerAllocTensor", "KillAfterLastUse"),
        ("LowerRuntimeBuiltin", "ComputePrimValue", "VMShapeLower", "AttachGlobalSymbol"),
    )
    passes = [getattr(tvm.relax.transform, name)() for some in names for name in some]
    return tvm.transform.Sequential(passes)


def _module(programs: Mapping[str, Program], target: CpuTarget, exactness: Exactness) -> Any:
    from tvm import relax

    builder: Any = relax.BlockBuilder()
    functions = {
        name: builder.add_func(function.build(target, spec).with_attr("global_symbol", name), name)
        for name, (function, spec) in _functions(programs, target, exactness).items()
    }
    for name, program in programs.items():
        called = [
            functions[_name(call.function, spec)] if call.function else None
            for call, spec in program.resolved(target, exactness)
        ]
        _emit(builder, name, program, called)
    return builder.finalize()


def _emit(builder: Any, name: str, program: Program, functions: Sequence[Any]) -> None:
    import tvm

    relax: Any = tvm.relax
    sizes: dict[str, Any] = {}

    def type_of(value: Value) -> Any:
        shape = [sizes.setdefault(d, tvm.tirx.Var(d, "int64")) if isinstance(d, str) else d for d in value.shape]
        return relax.TensorType(shape, value.dtype)

    inputs = [relax.Var(f"input{i}", type_of(value)) for i, value in enumerate(program.inputs)]
    control = relax.Var("control", relax.TensorType((2,), "int32"))
    # An object of unknown type: of a tuple, each call would check all shapes, which took 1.5 % of a DeiT-tiny.
    weights = relax.Var("weights", relax.ObjectType())
    known: dict[int, Any] = {value.number: x for value, x in zip(program.inputs, inputs, strict=True)}
    with builder.function(name, [*inputs, control, weights]):
        with builder.dataflow():
            for i, value in enumerate(program.weight_values):
                taken = relax.call_pure_packed("vm.builtin.tuple_getitem", weights, i, ty_args=type_of(value))
                known[value.number] = builder.emit(taken)
            for call, function in zip(program.calls, functions, strict=True):
                arguments = [known[value.number] for value in call.arguments]
                types = [type_of(out) for out in call.outs]
                if function is None:
                    outcome = builder.emit(relax.op.reshape(arguments[0], types[0].shape))
                else:
                    outcome = builder.emit(relax.call_tir(function, [*arguments, control], types))
                for i, out in enumerate(call.outs):
                    known[out.number] = outcome if len(types) == 1 else builder.emit(relax.TupleGetItem(outcome, i))
            outcomes = [known[value.number] for value in program.outputs]
            outcome = builder.emit_output(outcomes[0] if len(outcomes) == 1 else relax.Tuple(outcomes))
        builder.emit_func_output(outcome)


def _link(executable: Any, library: Path) -> None:
    executable.export_library(str(library))


def _try(library: Any, functions: Mapping[str, _Specialised]) -> None:
    for name, (function, spec) in functions.items():
        try:
            function.trial(library.get_function(name, query_imports=True), spec)
        except AssertionError as error:
            raise AssertionError(f"{function.name}: {error}") from error


def weights_of(program: Program) -> Any:
    """What compiled code takes a program's weights as."""
    return _ffi().Array([_ffi().from_dlpack(tensor.detach()) for tensor in program.weights])


def _ffi() -> Any:
    import tvm_ffi

    return tvm_ffi


class Control:
    """The two numbers that a program is called with.

    Attributes:
        tensor: as compiled code takes them.
    """

    def __init__(self) -> None:
        import numpy as np  # TVM needs it, but the layers do without both

        self._numbers = np.zeros(2, np.int32)
        self.tensor = _ffi().from_dlpack(self._numbers)

    def reset(self, threads: int) -> None:
        """Before a call."""
        self._numbers[0], self._numbers[1] = 0, threads

    @property
    def overflowed(self) -> bool:
        """Whether the last call met an activation that a product cannot express, so that its outcome means nothing."""
        return bool(self._numbers[0])
