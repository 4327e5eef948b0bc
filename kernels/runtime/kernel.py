"""What all kernels have in common: compiling, checking, caching and falling back.

A `Kernel` has a function in TIR, which takes its vector width and its instructions from the `CpuTarget` it is built
for, and a trial that compares it with the reference on a small problem. `docs/kernels.md` shows one from top to
bottom.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import os
import platform
import re
import shutil
import sys
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import torch

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.runtime import bundle, cache, targets, threads
from shiftadd3d.kernels.runtime.targets import CpuTarget, CudaTarget
from shiftadd3d.kernels.runtime.tir import PrimFunc

if TYPE_CHECKING:
    from tvm.runtime import Executable
    from tvm_ffi import Module

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__") and not hasattr(torch.Tensor, "__c_dlpack_exchange_api__"):
    # With an older torch it would compile an extension of torch first, for calls that are some microseconds faster.
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")

try:
    TVM_FFI: ModuleType | None = importlib.import_module("tvm_ffi")
except ImportError:
    TVM_FFI = None
"""The small library that calls compiled code; the compiler, `tvm`, is imported where it is needed."""

PACKAGE = __name__.rpartition(".runtime")[0]
FAILURES = (AssertionError, ImportError, OSError, RuntimeError, UserError)
"""What keeps a kernel from being used without being a bug in Python: a trial that found a difference; TVM missing; the
cache or the linker's files; TVM's errors (all of them are `RuntimeError`, as are the linker's, the CUDA driver's and
torch's of a device); a bundle or a GPU that does not fit."""

Compiled = Callable[..., None]
"""A compiled function: it takes contiguous torch tensors and numbers, and writes into some of them."""

SpecValue = str | int | bool | float
Spec = dict[str, SpecValue]
"""What is compiled in, by the names of `build`'s arguments."""

Target = TypeVar("Target", bound=CpuTarget | CudaTarget)
Function = TypeVar("Function", bound=Compiled)
Compiling = TypeVar("Compiling")
Given = TypeVar("Given")
Outcome = TypeVar("Outcome")


KERNELS: dict[str, Kernel] = {}
"""All kernels by name, those whose modules have been imported."""

# Half of the time that compiling takes, for what LLVM does anyway.
SLOW_PASSES = ("tirx.CommonSubexprElim", "s_tir.CompactBufferAllocation", "s_tir.HoistIfThenElse")

# Compiling and loading happen under one lock, which a fork must not leave locked in the child.
_lock = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class DeviceKernel(ABC, Generic[Target]):
    """One function in TIR for one kind of device, in as many specialisations as are asked for.

    Args:
        name: what it is called everywhere: in the cache, on the command line, in messages.
        build: ``build(target, **spec)`` returns the function (a `tvm` PrimFunc) specialised to a target and a spec. TVM
            is imported inside of it.
        trial: ``trial(function, **spec)`` runs the compiled function on a small random problem, compares the outcome
            with the twin's, and raises `AssertionError` where they differ. Only code that has passed its trial on the
            machine at hand enters the cache or is ever used.
        variants: the specs that `shiftadd3d kernels build` compiles ahead, for a target.
    """

    suffix: str
    """Of its libraries in the cache."""

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
            _digest_of_text(Path(file))

    @abstractmethod
    def register(self) -> None:
        """Let the command line find it."""

    @abstractmethod
    def load(self, target: Target, **spec: SpecValue) -> Compiled | None:
        """Have the cache hold the compiled code for `target`, and load it where it can run.

        Raises:
            Exception: one of `FAILURES`; anything else is a bug.
        """

    @abstractmethod
    def entry(self, target: Target, **spec: SpecValue) -> str:
        """The key in the cache: everything that the machine code depends on."""

    @abstractmethod
    def check(self, target: Target, **spec: SpecValue) -> None:
        """Run the trial once more on this machine.

        Raises:
            AssertionError: if the outcome is not the twin's.
        """

    def _once(self, known: tuple[object, ...], load: Callable[[], Function | None]) -> Function | None:
        """What `load` makes, if that has not been tried before; None if one of `FAILURES` kept it from that."""
        with _lock:
            if known not in self._functions:
                try:
                    self._functions[known] = load()
                except FAILURES as error:
                    self.decline(first_line(error))
                    self._functions[known] = None
            return cast("Function | None", self._functions[known])

    def decline(self, reason: str) -> None:
        """Say, once, that the twin stands in, and why."""
        _say_once(
            f"kernel {self.name}: {reason}; plain torch stands in, correct but slower (`shiftadd3d kernels check` "
            "tells more)"
        )

    def identity(self, target: Target, **spec: SpecValue) -> dict[str, object]:
        """What a bundle knows it by: all that it was compiled from, but for the compiler."""
        names = {"part": "kernel", "kernel": self.name, "target": target.name}
        return {**names, "spec": spec, "sources": self.sources_digest()}

    def packed(self, target: Target, **spec: SpecValue) -> bundle.Packed:
        """The compiled library for `target`, to be put into a bundle.

        Raises:
            Exception: whatever kept it from being compiled.
        """
        self.load(target, **spec)
        entry = self.entry(target, **spec)
        library, record = cache.find(entry, self.suffix), cache.read_record(entry)
        if library is None or record is None:
            raise RuntimeError("it is not in the cache: a bundle takes a C compiler to make")
        return bundle.Packed(library, self.identity(target, **spec), record)

    def sources_digest(self) -> str:
        """A digest of all source text of this package that it is built from."""
        return sources_digest(sys.modules[self.build.__module__])


class Kernel(DeviceKernel[CpuTarget]):
    """A kernel for CPUs."""

    suffix = ".so"

    def register(self) -> None:
        KERNELS[self.name] = self

    def function(self, **spec: SpecValue) -> Compiled | None:
        """The compiled function for this machine, from memory, from the cache or from the compiler.

        Returns:
            A function of contiguous torch tensors and numbers that writes into its last arguments, or None where one of
            `FAILURES` kept it from being used: then the twin has to do. That is said once.
        """
        target = targets.current()
        known = (target.name, *spec.items())
        if known in self._functions:
            return self._functions[known]
        return self._once(known, lambda: _with_torch_threads(self.load(target, **spec)))

    def load(self, target: CpuTarget, **spec: SpecValue) -> Compiled:
        """The compiled function for `target`, from the cache or from the compiler, having passed its trial.

        Raises:
            Exception: one of `FAILURES`; anything else is a bug.
        """

        def packed() -> Path | None:
            found = bundle.find(**self.identity(target, **spec))
            return None if found is None else found.file

        library = obtain(
            self.entry(target, **spec),
            compile=lambda: self.compile(target, **spec),
            link=lambda executable, library: link(executable.mod, library),
            trial=lambda library: self.trial(library[self.name], **spec),
            facts={"kernel": self.name, "target": target.name, "spec": spec},
            packed=packed,
        )
        return library[self.name]

    def compile(self, target: CpuTarget, **spec: SpecValue) -> Executable:
        """For any target, whether or not this machine could run it."""
        import tvm

        function = self.build(target, **spec).with_attr("global_symbol", self.name)
        with tvm.transform.PassContext(disabled_pass=list(SLOW_PASSES)):
            return tvm.compile(tvm.IRModule({self.name: function}), target=target.tvm_target())

    def assembly(self, target: CpuTarget, **spec: SpecValue) -> str:
        """What `compile` makes of it, to read."""
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
    """What a `Kernel` takes, of a function of a target, or of compiled code, and of a spec that is a named tuple."""

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
    """The library of an entry of the cache, ready to be called: from there, or new, once it has passed its trial.

    Args:
        compile: makes it.
        link: ``link(executable, file)`` puts that into a library.
        trial: ``trial(library)`` runs the code, and raises `AssertionError` if it computes what it should not.
        facts: recorded with it.
        packed: finds the library itself, compiled elsewhere.

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


def has_linker() -> bool:
    """Whether there is a compiler to link with; without one, machine code cannot be put on disk."""
    from tvm.support import cc

    return cc.get_cc() is not None


def _with_torch_threads(function: Compiled) -> Compiled:
    def call(*args: object) -> None:
        threads.follow_torch()
        function(*args)

    return call


def runtime_library() -> Path | None:
    """What compiled code calls while it runs, as TVM comes with it; None where TVM is not installed."""
    package = find_spec("tvm")
    if package is None or not package.submodule_search_locations:
        return None
    return next(Path(package.submodule_search_locations[0]).glob("lib/libtvm_runtime.*"), None)


def ffi_library() -> Path | None:
    """What TVM's runtime and compiled code are called through."""
    return None if TVM_FFI is None else Path(importlib.import_module("tvm_ffi.libinfo").find_libtvm_ffi())


def packed_launcher() -> bundle.Packed:
    """What starts parallel work (see `threads`), to be put into a bundle."""
    install_launcher()
    library = cache.find(_launcher_entry())
    if library is None:
        raise RuntimeError("it is not in the cache: a bundle takes a C compiler to make")
    return bundle.Packed(library, _launcher_identity(), {})


def _launcher_entry() -> str:
    return cache.key(launcher=threads.LAUNCHER_LLVM, machine=platform.machine(), **versions())


def _launcher_identity() -> dict[str, str]:
    source = hashlib.sha256(threads.LAUNCHER_LLVM.encode()).hexdigest()
    return {"part": threads.LAUNCHER_NAME, "sources": source}


@functools.cache
def _ffi() -> ModuleType:
    """`TVM_FFI`, with what compiled kernels are linked against, but not the rest of TVM: that takes seconds to import.

    Raises:
        RuntimeError: where one of the two is missing.
    """
    runtime = runtime_library() or bundle.runtime()
    if TVM_FFI is None or runtime is None:
        raise RuntimeError(f"TVM is not installed, and {bundle.ENVIRONMENT_VARIABLE} names no bundle of kernels")
    ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
    return TVM_FFI


_launcher_is_installed = False


def install_launcher(neighbour: Executable | None = None, library: Path | None = None) -> None:
    """Compile and install what starts parallel work (see `threads`), once.

    Args:
        neighbour: where there is no linker, a compiled kernel that it is to share the process with.
        library: where it has been compiled already.
    """
    global _launcher_is_installed
    if _launcher_is_installed:
        return
    ffi, entry = _ffi(), _launcher_entry()
    library, module = library or cache.find(entry), None
    if library is None and (packed := bundle.find(**_launcher_identity())):
        library = packed.file
    if library is None:
        import tvm

        with cache.scratch_file(".ll") as source, cache.scratch_file(".so") as built:
            text = _machine_code(neighbour).inspect_source("ll") if neighbour else ""
            header = re.findall(r"^target .*$", text, re.MULTILINE)
            source.write_text("\n".join([*header, threads.LAUNCHER_LLVM]))
            module = tvm.runtime.load_module(str(source))
            if neighbour is None:
                link(module, built)
                library = cache.store(entry, built, {"kernel": threads.LAUNCHER_NAME} | versions())
    if library is not None:
        module = ffi.load_module(str(library))
    assert module is not None
    threads.install(module)
    _launcher_is_installed = True


def _machine_code(executable: Executable) -> Module:
    """LLVM's part of what TVM has compiled."""
    return next(module for module in (executable.mod, *executable.mod.imports) if module.kind == "llvm")


def load_library(library: Path) -> Module:
    """A compiled library, whose functions are items by name, ready to be called."""
    install_launcher()
    return _ffi().load_module(str(library))


def link(module: Module, library: Path) -> None:
    """Put compiled code into a shared library: the linker is all that a C compiler is needed for."""
    from tvm.support import cc

    with cache.scratch_file(".o") as code:
        module.write_to_file(str(code), "o")
        cc.create_shared(str(library), [str(code)])


@functools.cache
def _digest_of_text(file: Path) -> bytes:
    """Of a file when this is first asked for, which is when it is imported: no later text is what runs here."""
    return hashlib.sha256(file.read_bytes()).digest()


for _file in Path(__file__).parents[1].rglob("*.py"):
    _digest_of_text(_file)


def sources_digest(*modules: ModuleType) -> str:
    """A digest of the text of modules, which may stand elsewhere, and of all modules of this package that they use."""
    found: dict[str, ModuleType] = {}
    waiting = [*modules, sys.modules[__name__]]
    while waiting:
        one = waiting.pop()
        if one.__name__ in found or not (one in modules or one.__name__.startswith(PACKAGE)):
            continue
        found[one.__name__] = one
        for name, value in vars(one).items():
            if isinstance(value, ModuleType) and value.__name__ == f"{one.__name__}.{name}":
                continue  # a package has its modules by name once anyone has imported them, here or elsewhere
            used = value if isinstance(value, ModuleType) else sys.modules.get(getattr(value, "__module__", None) or "")
            if used is not None:
                waiting.append(used)
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(_digest_of_text(Path(str(found[name].__file__))))
    return digest.hexdigest()


@functools.cache
def versions() -> dict[str, str]:
    return {"tvm": cache.version_of("apache-tvm"), "tvm_ffi": cache.version_of("apache-tvm-ffi")}


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
