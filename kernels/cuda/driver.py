"""Kernels for NVIDIA GPUs: source from TVM, code from nvcc, started by the driver on torch's current stream.

A `CudaKernel` is a `Kernel` whose function in TIR binds its loops to blocks and threads itself. TVM turns it into CUDA
source, nvcc into a cubin, and that is all that lies in the cache: it can be built without a GPU (``shiftadd3d kernels
build --target cuda-sm_90``), and where it is run neither TVM nor nvcc is needed, only the driver.

Nothing is copied and nothing waits: a function takes the addresses of tensors as they are and is queued on the current
stream of their device, so calls can be captured in CUDA graphs once the function has been loaded. The first time on a
kind of GPU, a cubin is run on its trial and compared with the twin, as on CPUs; that one call waits for the device.

Compiled without fast arithmetic: divisions, exponentials and denormal numbers are as in torch.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias, TypedDict, cast

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.runtime import bundle, cache, targets
from shiftadd3d.kernels.runtime.kernel import DeviceKernel, Spec, SpecValue
from shiftadd3d.kernels.runtime.targets import CudaTarget

CUDA_KERNELS: dict[str, CudaKernel] = {}
"""All kernels for GPUs by name, those whose modules have been imported."""

# Offsets within tensors are 32-bit numbers in the kernels.
MAX_ELEMENTS = 2**31 - 1
_SIGNATURE = re.compile(r'extern "C" __global__ void __launch_bounds__\((\d+)\) (\w+)\(([^)]*)\) \{')
_Value: TypeAlias = ctypes.c_void_p | ctypes.c_int32 | ctypes.c_int64 | ctypes.c_float
_NUMBERS = {"int": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}

# Merging buffers of several types into one defeats the checks on tensor-core fragments; compaction, the padding that
# keeps threads off each other's memory banks.
_CONFIG = {"tirx.disable_storage_rewrite": True}
_DISABLED_PASSES = ("s_tir.CompactBufferAllocation", "tirx.CommonSubexprElim")


@dataclass(frozen=True)
class CudaCode:
    """What TVM makes of a function.

    Attributes:
        source: CUDA C++.
        symbol: the name of the kernel in it.
        threads: of a block, along x.
        parameters: (name in TIR, ``"pointer"`` or the C type of a number), in the kernel's order.
    """

    source: str
    symbol: str
    threads: int
    parameters: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, source: str) -> CudaCode:
        """Read the signature of the one kernel in a source."""
        found = _SIGNATURE.findall(source)
        if len(found) != 1:
            raise ValueError(f"expected one kernel in the source, not {len(found)}")
        threads, symbol, declarations = found[0]
        parameters = []
        for declaration in declarations.split(","):
            kind, _, name = declaration.strip().rpartition(" ")
            parameters.append((name.removesuffix("_ptr"), "pointer" if "*" in kind else kind))
        return cls(source, symbol, int(threads), tuple(parameters))


@dataclass(frozen=True)
class Resources:
    """What a thread and a block take up of a multiprocessor, as the assembler tells."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


class CubinRecord(TypedDict):
    """What the cache keeps with a cubin, beside what it was made from and its `Resources`.

    Attributes:
        symbol, threads, parameters: as those of `CudaCode`.
        passed_on: names of the GPUs on which it has passed its trial.
    """

    symbol: str
    threads: int
    parameters: list[tuple[str, str]]
    passed_on: list[str]


class CudaFunction:
    """A kernel that is ready to be started on one device.

    Args:
        cubin: the machine code.
        record: what the cache has recorded with it.
        device: the CUDA device.
    """

    def __init__(self, cubin: bytes, record: CubinRecord, device: torch.device) -> None:
        self.device = device
        self._threads, self._parameters = record["threads"], record["parameters"]
        self._context, module, self._function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        number = ctypes.c_int()
        _driver("cuDeviceGet", ctypes.byref(number), device.index)
        # The context that torch uses. Neither it nor the module is ever given back: functions live as long as kernels.
        _driver("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), number)
        with _Current(self._context):
            _driver("cuModuleLoadData", ctypes.byref(module), cubin)
            _driver("cuModuleGetFunction", ctypes.byref(self._function), module, record["symbol"].encode())

    def __call__(self, *grid: int, **arguments: Tensor | float) -> None:
        """Queue it on torch's current stream.

        Args:
            grid: blocks along x, and along y and z if given.
            arguments: contiguous tensors on `device`, and numbers, by their names in TIR.
        """
        values = pack_arguments(self._parameters, arguments)
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        blocks = (*grid, 1, 1)[:3]
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        with _Current(self._context):
            _driver("cuLaunchKernel", self._function, *blocks, self._threads, 1, 1, 0, stream, pointers, None)


def pack_arguments(parameters: Iterable[tuple[str, str]], arguments: Mapping[str, Tensor | float]) -> list[_Value]:
    """C values of a kernel's arguments, in its order: the addresses of tensors, and numbers."""
    return [
        ctypes.c_void_p(arguments[name].data_ptr())  # pyright: ignore[reportAttributeAccessIssue]
        if kind == "pointer"
        else _NUMBERS[kind](arguments[name])  # pyright: ignore[reportArgumentType]
        for name, kind in parameters
    ]


class CudaKernel(DeviceKernel[CudaTarget]):
    """A kernel for GPUs; arguments as those of `DeviceKernel`, but that ``build`` gets a `CudaTarget`, its function
    binds ``blockIdx`` and ``threadIdx.x`` itself, and ``trial`` gets a `CudaFunction`, whose `device` says where to put
    tensors.
    """

    suffix = ".cubin"

    def register(self) -> None:
        CUDA_KERNELS[self.name] = self

    def function(self, *, device: torch.device, **spec: SpecValue) -> CudaFunction | None:
        """The function for a CUDA device, from memory, from the cache or from the compiler.

        Returns:
            The function, or None where the twin has to do, which is said once: for want of a compiler, because the
            kernel failed its trial, or while a CUDA graph is captured, if the function has not been loaded before.
        """
        known = (device.index, *spec.items())
        if known not in self._functions and torch.cuda.is_current_stream_capturing():
            self.decline("it cannot be loaded while a CUDA graph is captured; call it once before")
            return None
        return self._once(known, lambda: self.load(targets.of_gpu(device), device=device, **spec))

    def load(self, target: CudaTarget, *, device: torch.device | None = None, **spec: SpecValue) -> CudaFunction | None:
        """See to it that the cache has the cubin for `target`, and load it where a GPU can run it.

        Args:
            device: where to; by default, the current one, if it is of this target.

        Returns:
            The function, having passed its trial on this kind of GPU, or None where there is no such GPU.

        Raises:
            Exception: one of `FAILURES`; anything else is a bug.
        """
        entry = self.entry(target, **spec)
        cubin = cache.find(entry, self.suffix)
        if cubin is None:
            packed = bundle.find(**self.identity(target, **spec))
            if packed is not None:
                cubin = _store(entry, packed.file.read_bytes(), {**packed.facts, "passed_on": []})
        if cubin is None:
            code = self.compile(target, **spec)
            binary, resources = assemble(code.source, target.arch)
            facts = {name: value for name, value in asdict(code).items() if name != "source"} | asdict(resources)
            cubin = _store(entry, binary, {"kernel": self.name, "target": target.name, "spec": spec, **facts})
        device = device or _current_device(target)
        if device is None:
            return None
        record, binary = cast("CubinRecord | None", cache.read_record(entry)), cubin.read_bytes()
        if record is None:
            raise RuntimeError("another process has just removed it from the cache")
        function = CudaFunction(binary, record, device)
        gpu = torch.cuda.get_device_name(device)
        if gpu not in record["passed_on"]:
            self._try(function, entry, spec)
            _store(entry, binary, {**record, "passed_on": [*record["passed_on"], gpu]})
        return function

    def _try(self, function: CudaFunction, entry: str, spec: Spec) -> None:
        with cache.first_run(entry):
            try:
                with torch.cuda.device(function.device):
                    self.trial(function, **spec)
                    torch.cuda.synchronize()
                return
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:  # torch's and the driver's
                broken = error
        # After an error of the device, such as a wrong address, torch cannot use it either in this process.
        cache.condemn(entry)
        raise broken

    def compile(self, target: CudaTarget, **spec: SpecValue) -> CudaCode:
        """The source, as TVM generates it, for any target, whether or not there is such a GPU."""
        import tvm

        function = self.build(target, **spec).with_attr("global_symbol", self.name)
        tvm_target = target.tvm_target()
        options = tvm.transform.PassContext(config=_CONFIG, disabled_pass=list(_DISABLED_PASSES))
        with tvm_target, options:
            executable = tvm.compile(tvm.IRModule({self.name: function}), target=tvm_target)
        return CudaCode.of(executable.mod.imports[0].inspect_source())

    def entry(self, target: CudaTarget, **spec: SpecValue) -> str:
        """The key in the cache. Versions of TVM are left out: where cubins are run, it need not be there."""
        return cache.key(kernel=self.name, target=target.name, spec=sorted(spec.items()), sources=self.sources_digest())

    def check(self, target: CudaTarget, **spec: SpecValue) -> None:
        """Run the trial on the current GPU.

        Raises:
            UserError: if there is none of this target.
            AssertionError: if the outcome is not the twin's.
        """
        function = self.load(target, device=None, **spec) if _current_device(target) is not None else None
        if function is None:
            raise UserError(f"there is no GPU here to run {target.name} on")
        self._try(function, self.entry(target, **spec), spec)


def find_nvcc() -> str | None:
    """The compiler: in ``CUDA_HOME``, on the search path, or as pip installs it (``nvidia-cuda-nvcc``)."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home, "bin")] if home else []
    places += [Path(folder, "nvidia", "cu13", "bin") for folder in sys.path]
    for place in places:
        if found := shutil.which("nvcc", path=str(place)):
            return found
    return shutil.which("nvcc")


def assemble(source: str, arch: str) -> tuple[bytes, Resources]:
    """The cubin of a CUDA source, and what it takes up.

    Raises:
        RuntimeError: if there is no nvcc, or it refuses.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc found to compile it with (CUDA_HOME names its toolkit)")
    with tempfile.TemporaryDirectory() as folder:
        text, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        text.write_text(source)
        command = [nvcc, "--cubin", "-O3", "-arch", arch, "-std=c++17", "--ptxas-options=-v", "-o", cubin, text]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise RuntimeError(f"nvcc: {next((line for line in said if 'error' in line), said[-1] if said else '')}")
        binary, said = cubin.read_bytes(), done.stderr
    spilled = sum(int(size) for size in re.findall(r"(\d+) bytes spill stores", said))
    used = re.search(r"Used (\d+) registers", said)
    shared = re.search(r"(\d+) bytes smem", said)
    return binary, Resources(int(used[1]) if used else 0, spilled, int(shared[1]) if shared else 0)


def _store(entry: str, binary: bytes, record: Mapping[str, object]) -> Path:
    with cache.scratch_file(".cubin") as file:
        file.write_bytes(binary)
        return cache.store(entry, file, {"passed_on": [], **record})


def _current_device(target: CudaTarget) -> torch.device | None:
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    return device if targets.of_gpu(device) == target else None


class _Current:
    """Make a context of the driver's the calling thread's current one."""

    def __init__(self, context: ctypes.c_void_p) -> None:
        self._context = context

    def __enter__(self) -> None:
        _driver("cuCtxPushCurrent_v2", self._context)

    def __exit__(self, *_: object) -> None:
        _driver("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@lru_cache(maxsize=1)
def _load_driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _driver(name: str, *arguments: object) -> None:
    """Call the CUDA driver.

    Raises:
        RuntimeError: with its own words, if it reports an error.
    """
    driver = _load_driver()
    status = getattr(driver, name)(*arguments)
    if status:
        message = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(message))
        raise RuntimeError(f"{name}: {(message.value or b'').decode() or f'error {status}'}")
