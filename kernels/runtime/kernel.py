"""The common part of all kernels: compiling, checking, caching and falling back to the twin.

A `Kernel` has a function in TIR, which takes its vector width and instructions from the `CpuTarget`, and a trial that
compares it with the reference on a small problem. `docs/kernels.md` shows one from top to bottom.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.runtime import bundle, cache, targets, threads
from shiftadd3d.kernels.runtime.library import has_linker, install_launcher, link, load_library, versions
from shiftadd3d.kernels.runtime.sources import sources_digest, text_of
from shiftadd3d.kernels.runtime.targets import CpuTarget, CudaTarget
from shiftadd3d.kernels.runtime.tir import PrimFunc

if TYPE_CHECKING:
    from tvm.runtime import Executable
    from tvm_ffi import Module

FAILURES = (AssertionError, ImportError, OSError, RuntimeError, UserError)
"""What keeps a kernel from being used without being a bug in Python: a trial that found a difference; TVM missing; the
cache or the linker's files; TVM's errors (all of them are `RuntimeError`, as are the linker's, the CUDA driver's and
torch's of a device); a bundle or a GPU that does not fit."""

Compiled = Callable[..., None]
"""A compiled function. It takes contiguous torch tensors and numbers, and writes into some of them."""

SpecValue = str | int | bool | float
Spec = dict[str, SpecValue]
"""Values that are compiled in, by the names of `build`'s arguments."""

Target = TypeVar("Target", bound=CpuTarget | CudaTarget)
Function = TypeVar("Function", bound=Compiled)
Compiling = TypeVar("Compiling")
Given = TypeVar("Given")
Outcome = TypeVar("Outcome")


KERNELS: dict[str, Kernel] = {}
"""All kernels by name, if their modules have been imported."""

# Half of the time that compiling takes, for what LLVM does anyway.
SLOW_PASSES = ("tirx.CommonSubexprElim", "s_tir.CompactBufferAllocation", "s_tir.HoistIfThenElse")

# Compiling and loading happen under one lock, which a fork must not leave locked in the child.
_lock = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class DeviceKernel(ABC, Generic[Target]):
    """One function in TIR for one kind of device, with any number of specialisations.

    Args:
        name: its name in the cache, on the command line and in messages.
        build: ``build(target, **spec)`` returns the function (a `tvm` PrimFunc) for a target and a spec. TVM is
            imported inside of it.
        trial: ``trial(function, **spec)`` runs the compiled function on a small random problem, compares the outcome
            with the twin's, and raises `AssertionError` if they differ. Code must pass its trial on this machine before
            it enters the cache or is used.
        variants: the specs that `shiftadd3d kernels build` compiles ahead for a target.
    """

    suffix: str
    """The ending of its libraries in the cache."""

    def __init__(
        self,
        name: str,
        build: Callable[..., PrimFunc],
        trial: Callable[..., None],
        variants: Callable[..., Iterable[Mapping[str, SpecValue]]],
    ) -> None:
        self.name, self.build, self.trial, self.variants = name, build, trial, variants
        self._functions: dict[tuple[object, ...], Compiled | None] = {}
        self.register()
        if file := getattr(sys.modules[build.__module__], "__file__", None):
            text_of(Path(file))

    @abstractmethod
    def register(self) -> None:
        """Enter the kernel in the list of the command line."""

    @abstractmethod
    def load(self, target: Target, **spec: SpecValue) -> Compiled | None:
        """Put the compiled code for `target` into the cache, if it is not there, and load it if it can run here.

        Raises:
            Exception: one of `FAILURES`; anything else is a bug.
        """

    @abstractmethod
    def entry(self, target: Target, **spec: SpecValue) -> str:
        """The key in the cache. It depends on everything that the machine code depends on."""

    @abstractmethod
    def check(self, target: Target, **spec: SpecValue) -> None:
        """Run the trial again on this machine.

        Raises:
            AssertionError: if the outcome is not the twin's.
        """

    def _once(self, known: tuple[object, ...], load: Callable[[], Function | None]) -> Function | None:
        """The outcome of `load`, which is called once only; None if it raised one of `FAILURES`."""
        with _lock:
            if known not in self._functions:
                try:
                    self._functions[known] = load()
                except FAILURES as error:
                    self.decline(first_line(error))
                    self._functions[known] = None
            return cast("Function | None", self._functions[known])

    def decline(self, reason: str) -> None:
        """Warn, once, that the twin runs instead, and why."""
        _say_once(
            f"kernel {self.name}: {reason}; plain torch stands in, correct but slower (`shiftadd3d kernels check` "
            "tells more)"
        )

    def identity(self, target: Target, **spec: SpecValue) -> dict[str, object]:
        """The identity in a bundle: everything that it was compiled from, but not the compiler."""
        names = {"part": "kernel", "kernel": self.name, "target": target.name}
        return {**names, "spec": spec, "sources": self.sources_digest()}

    def packed(self, target: Target, **spec: SpecValue) -> bundle.Packed:
        """The compiled library for `target`, to be put into a bundle.

        Raises:
            Exception: if it could not be compiled.
        """
        self.load(target, **spec)
        entry = self.entry(target, **spec)
        library, record = cache.find(entry, self.suffix), cache.read_record(entry)
        if library is None or record is None:
            raise RuntimeError("it is not in the cache: a bundle takes a C compiler to make")
        return bundle.Packed(library, self.identity(target, **spec), record)

    def sources_digest(self) -> str:
        """A digest of all source text of this package that it is built from."""
        return sources_digest(self.build.__module__, __name__)


class Kernel(DeviceKernel[CpuTarget]):
    """A kernel for CPUs. Arguments are those of `DeviceKernel`."""

    suffix = ".so"

    def register(self) -> None:
        KERNELS[self.name] = self

    def function(self, **spec: SpecValue) -> Compiled | None:
        """The compiled function for this machine, from memory, from the cache or from the compiler.

        Returns:
            A function of contiguous torch tensors and numbers that writes into its last arguments. None if one of
            `FAILURES` prevents it; then the twin must be used, and a warning says so once.
        """
        target = targets.current()
        known = (target.name, *spec.items())
        if known in self._functions:
            return self._functions[known]
        return self._once(known, lambda: _with_torch_threads(self.load(target, **spec)))

    def load(self, target: CpuTarget, **spec: SpecValue) -> Compiled:
        """The compiled function for `target`, from the cache or from the compiler. It has passed its trial.

        Raises:
            Exception: one of `FAILURES`; anything else is a bug.
        """

        def packed() -> Path | None:
            found = bundle.find(**self.identity(target, **spec))
            return None if found is None else found.file

        def compile() -> Executable:
            try:
                return self.compile(target, **spec)
            except ImportError as error:
                if os.environ.get(bundle.ENVIRONMENT_VARIABLE) is None:
                    raise
                raise ImportError(
                    f"the bundle has no such kernel for {target.name}, and to compile it: {error}"
                ) from error

        library = obtain(
            self.entry(target, **spec),
            compile=compile,
            link=lambda executable, library: link(executable.mod, library),
            trial=lambda library: self.trial(library[self.name], **spec),
            facts={"kernel": self.name, "target": target.name, "spec": spec},
            packed=packed,
        )
        return library[self.name]

    def compile(self, target: CpuTarget, **spec: SpecValue) -> Executable:
        """Compile for any target, whether or not this machine can run it."""
        import tvm

        function = self.build(target, **spec).with_attr("global_symbol", self.name)
        with tvm.transform.PassContext(disabled_pass=list(SLOW_PASSES)):
            return tvm.compile(tvm.IRModule({self.name: function}), target=target.tvm_target())

    def assembly(self, target: CpuTarget, **spec: SpecValue) -> str:
        """The assembly code from `compile`, for reading."""
        return self.compile(target, **spec).mod.inspect_source("asm")

    def entry(self, target: CpuTarget, **spec: SpecValue) -> str:
        return cache.key(
            kernel=self.name,
            target=target.name,
            spec=sorted(spec.items()),
            sources=self.sources_digest(),
            **versions(),
        )

    def check(self, target: CpuTarget, **spec: SpecValue) -> None:
        self.trial(self.load(target, **spec), **spec)


def by_name(spec: Callable[..., Compiling], function: Callable[[Given, Compiling], Outcome]) -> Callable[..., Outcome]:
    """Make a `build` or `trial` for a `Kernel` from a function whose second argument is a named tuple `spec`."""

    @functools.wraps(function)
    def call(given: Given, **compiled_in: SpecValue) -> Outcome:
        return function(given, spec(**compiled_in))

    return call


def obtain(
    entry: str,
    *,
    compile: Callable[[], Executable],
    link: Callable[[Executable, Path], None],
    trial: Callable[[Module], None],
    facts: Mapping[str, object],
    packed: Callable[[], Path | None] = lambda: None,
) -> Module:
    """The library of an entry of the cache, ready to be called. If it is new, it has passed its trial.

    Args:
        entry: key of the entry.
        compile: compiles the code.
        link: ``link(executable, file)`` writes it to a library.
        trial: ``trial(library)`` runs the code, and raises `AssertionError` for a wrong outcome.
        facts: recorded with the entry.
        packed: finds the library if it was compiled elsewhere.

    Raises:
        Exception: one of `FAILURES`; anything else is a bug.
    """
    with _lock:
        library = cache.find(entry)
        if library is not None:
            return load_library(library)
        elsewhere = packed()
        executable = None if elsewhere else compile()
        with cache.first_run(entry):
            if executable is not None and not has_linker():
                _say_once("no C compiler found to link kernels with: they are compiled anew in each process")
                install_launcher(executable)
                loaded = executable.jit()
                trial(loaded)
                return loaded
            with cache.scratch_file(".so") as library:
                if elsewhere is not None:
                    shutil.copyfile(elsewhere, library)
                elif executable is not None:
                    link(executable, library)
                loaded = load_library(library)
                trial(loaded)
                cache.store(entry, library, {**facts, **versions()})
            return loaded


def _with_torch_threads(function: Compiled) -> Compiled:
    def call(*args: object) -> None:
        threads.follow_torch()
        function(*args)

    return call


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
