"""The instruction sets that kernels are compiled for.

A CPU's target is chosen when the first kernel runs, from the flags of this CPU. TVM's own detection is not used,
because it ignores features of processors whose names it does not know. `SHIFTADD3D_TARGET` names another target, for
instance to try what a smaller CPU would do. A GPU's target is its compute capability.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from shiftadd3d._errors import UserError

if TYPE_CHECKING:
    from tvm.target import Target

ENVIRONMENT_VARIABLE = "SHIFTADD3D_TARGET"

# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): x86-64 Linux hands out AMX's tile registers on request only.
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


@dataclass(frozen=True, eq=False)  # there is one object of each, whose hash is quick to take
class CpuTarget:
    """One instruction set for kernels.

    Attributes:
        name: its name in `SHIFTADD3D_TARGET`.
        lanes: float32 lanes of one vector register.
        mcpu: the processor that LLVM compiles for.
        flags: Linux's names of the features that code for this target uses (`/proc/cpuinfo`).
    """

    name: str
    lanes: int
    mcpu: str
    flags: frozenset[str]

    @property
    def has_fma(self) -> bool:
        """Whether ``llvm.fma`` is one instruction. Without it, it is a slow library call."""
        return "fma" in self.flags

    @property
    def has_avx512(self) -> bool:
        """Whether there are 512-bit vectors of bytes and words (AVX-512 F, BW, DQ, VL)."""
        return "avx512bw" in self.flags

    @property
    def has_vnni(self) -> bool:
        """Whether there are 512-bit integer dot products (AVX-512 VNNI)."""
        return "avx512_vnni" in self.flags

    @property
    def has_amx(self) -> bool:
        """Whether there are tile registers with bfloat16 products (AMX), and AVX-512 bfloat16."""
        return "amx_bf16" in self.flags

    def tvm_target(self) -> Target:
        """The target for TVM."""
        import tvm

        return tvm.target.Target({"kind": "llvm", "mcpu": self.mcpu})


# LLVM assumes that a processor has all features of its kind, but virtual machines do not always pass them on. So the
# features that LLVM may use in kernels are listed, too, whether or not kernels ask for them.
_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe", "popcnt"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
_AVX512_VNNI = _AVX512 | {"avx512_vnni"}
_AMX = _AVX512_VNNI | {"avx512_bf16", "avx512vbmi", "avx512_vbmi2", "gfni", "amx_tile", "amx_bf16", "amx_int8"}

# From the most capable to the least: the first one whose flags the CPU has is taken.
TARGETS: tuple[CpuTarget, ...] = (
    CpuTarget("amx", 16, "sapphirerapids", _AMX),
    CpuTarget("avx512_vnni", 16, "cascadelake", _AVX512_VNNI),
    CpuTarget("avx512", 16, "skylake-avx512", _AVX512),
    CpuTarget("avx2", 8, "haswell", _AVX2),
    CpuTarget("generic", 4, "generic" if platform.machine() in ("arm64", "aarch64") else "x86-64", frozenset()),
)


@dataclass(frozen=True)
class CudaTarget:
    """One generation of NVIDIA GPUs.

    Attributes:
        capability: its compute capability, times ten.
    """

    capability: int

    @property
    def name(self) -> str:
        """Its name on the command line."""
        return f"cuda-{self.arch}"

    @property
    def arch(self) -> str:
        """Its name for nvcc."""
        return f"sm_{self.capability}"

    @property
    def has_bfloat16(self) -> bool:
        """Whether tensor cores multiply bfloat16. All of them multiply float16."""
        return self.capability >= 80

    def tvm_target(self) -> Target:
        """The target for TVM. It also needs a host, whose code is not used."""
        import tvm

        return tvm.target.Target(
            {"kind": "cuda", "arch": self.arch, "max_threads_per_block": 1024}, host={"kind": "llvm"}
        )


# From the oldest that nvcc 13 compiles for. Any later one can be named, too.
CUDA_TARGETS = tuple(CudaTarget(capability) for capability in (75, 80, 89, 90))


def find(name: str) -> CpuTarget | CudaTarget:
    """The target called `name`. Names for GPUs look like ``cuda-sm_90``.

    Raises:
        UserError: there is no such target.
    """
    for target in TARGETS:
        if target.name == name:
            return target
    gpu = re.fullmatch(r"cuda-sm_(\d{2,3})", name)
    if gpu and int(gpu[1]) >= CUDA_TARGETS[0].capability:
        return CudaTarget(int(gpu[1]))
    names = ", ".join(target.name for target in (*TARGETS, *CUDA_TARGETS))
    raise UserError(f"no target {name!r}: expected one of {names} or a later GPU's")


def of_gpu(device: torch.device) -> CudaTarget:
    """The target of a CUDA device.

    Raises:
        UserError: there are no kernels for this generation.
    """
    target = CudaTarget(int("{}{}".format(*torch.cuda.get_device_capability(device))))
    if target.capability < CUDA_TARGETS[0].capability:
        raise UserError(f"this GPU is {target.arch}, and kernels are for {CUDA_TARGETS[0].arch} and later")
    return target


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """The CPU's features by their names in Linux; empty if the system does not list them."""
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return frozenset()
    return frozenset(found[1].split()) if found else frozenset()


def lacking(flags: frozenset[str]) -> list[str]:
    """The features that this CPU, with this version of Linux, lacks to run code that uses them."""
    missing = sorted(flags - cpu_flags())
    if not missing and "amx_tile" in flags and not _amx_permitted():
        return ["the system's permission to use AMX"]
    return missing


def runs_here(target: CpuTarget) -> bool:
    """Whether this CPU, with this version of Linux, can run code for `target`."""
    return not lacking(target.flags)


@lru_cache(maxsize=1)
def current() -> CpuTarget:
    """The target of this process: the best that this CPU can run, or the one that `SHIFTADD3D_TARGET` names.

    Every call of a kernel needs it, so the variable is only read once.

    Raises:
        UserError: the variable names no target, or one that this CPU cannot run.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not name:
        return next(target for target in TARGETS if runs_here(target))
    target = next((target for target in TARGETS if target.name == name), None)
    if target is None:
        names = ", ".join(target.name for target in TARGETS)
        raise UserError(f"{ENVIRONMENT_VARIABLE}: no target {name!r} for CPUs: expected one of {names}")
    if not runs_here(target):
        able = ", ".join(other.name for other in TARGETS if runs_here(other))
        missing = ", ".join(lacking(target.flags))
        raise UserError(f"{ENVIRONMENT_VARIABLE}: this CPU cannot run {name!r} (it lacks {missing}), only {able}")
    return target


@lru_cache(maxsize=1)
def _amx_permitted() -> bool:
    """Ask the system for AMX's registers, once for the process: without that, the first tile instruction kills it."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0
