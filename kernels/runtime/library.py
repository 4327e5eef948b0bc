"""Compiled code as libraries: linked, loaded, and able to start parallel work.

`tvm_ffi` calls compiled code and is small. TVM itself, the compiler, takes seconds to import: that happens where it is
needed, and its runtime library is loaded without it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import os
import platform
import re
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from shiftadd3d.kernels.runtime import bundle, cache, threads

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


@functools.cache
def versions() -> dict[str, str]:
    return {"tvm": cache.version_of("apache-tvm"), "tvm_ffi": cache.version_of("apache-tvm-ffi")}


def has_linker() -> bool:
    """Whether there is a compiler to link with; without one, machine code cannot be put on disk."""
    from tvm.support import cc

    return cc.get_cc() is not None


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
