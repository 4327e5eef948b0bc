"""CUDA kernels: compiled for each GPU offline, their arithmetic on an emulated GPU, and all of it on a real one."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import json
import shutil
import struct
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

from shiftadd3d import UserError, cli, kernels
from shiftadd3d.kernels import manage
from shiftadd3d.kernels.cuda import driver as cuda_driver
from shiftadd3d.kernels.cuda import matadd as cuda_matadd
from shiftadd3d.kernels.cuda import product
from shiftadd3d.kernels.cuda.driver import CUDA_KERNELS, CudaCode, CudaKernel
from shiftadd3d.kernels.ops import matadd as ops_matadd
from shiftadd3d.kernels.ops import matshift as ops_matshift
from shiftadd3d.kernels.ops import mlp as ops_mlp
from shiftadd3d.kernels.ops import moe as ops_moe
from shiftadd3d.kernels.ops.gnt import gather as ops_gather
from shiftadd3d.kernels.ops.gnt import view_attention as ops_view_attention
from shiftadd3d.kernels.pack.gnt import view_attention as pack_view_attention
from shiftadd3d.kernels.reference import matadd as reference_matadd
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.reference.gnt import gather as reference_gather
from shiftadd3d.kernels.reference.gnt import view_attention as reference_view_attention
from shiftadd3d.kernels.runtime import cache, targets
from shiftadd3d.kernels.runtime.numerics import KERNEL_DEVICES
from shiftadd3d.kernels.runtime.targets import CUDA_TARGETS, CudaTarget
from shiftadd3d.models.gnt.projection import PointSamples
from shiftadd3d.models.gnt.transformer import GNT, FeedForward
from shiftadd3d.nn import MoEMlp, Recipe, ShiftLinear, freeze_, reparameterize_

pytest.importorskip("tvm")

needs_nvcc = pytest.mark.skipif(cuda_driver.find_nvcc() is None, reason="no nvcc")
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to emulate a GPU with")
HOPPER = targets.CudaTarget(90)

SHIFT = {"bits": 4, "terms": 1, "activation": "gelu"}
# Of each kernel, one specialisation of every way it works in.
SPECS = [
    ("matshift", {"form": "float32", "dtype": "float32", **SHIFT}),
    ("matshift", {"form": "tensor", "dtype": "bfloat16", **SHIFT}),
    ("matshift", {"form": "tensor", "dtype": "float32", **SHIFT}),
    ("matshift", {"form": "tensor", "dtype": "float16", **SHIFT, "bits": 5, "terms": 2}),
    ("matshift", {"form": "float32", "dtype": "float16", **SHIFT, "bits": 6, "terms": 2}),
]
SPECS += [
    ("matadd_kv", {"codes": "float32", "dtype": "float32", "masked": True, "attention": True}),
    ("matadd_kv", {"codes": "uint8", "dtype": "float16", "masked": False, "attention": False}),
    ("matadd_q", {"codes": "float32", "dtype": "bfloat16", "attention": True}),
    ("matadd_q", {"codes": "uint8", "dtype": "float32", "attention": False}),
]
SPECS += [("view_attention", {"width": 32, "hidden": 4}), ("view_attention", {"width": 64, "hidden": 8})]
MIXTURE = {"experts": "mult,shift", "bits": 4, "terms": 1, "activation": "none"}
WHOLE = {"gathers": True, "scatters": True, "gated": True}
FIRST = {"gathers": True, "scatters": False, "gated": False, "activation": "gelu"}
LAST = {"gathers": False, "scatters": True, "gated": False, "bits": 5, "terms": 2}
SPECS += [
    ("moe_sort", {"experts": 2}),
    ("moe_layer", {**MIXTURE, **WHOLE, "form": "float32", "dtype": "float32"}),
    ("moe_layer", {**MIXTURE, **WHOLE, "form": "tensor", "dtype": "float32"}),
    ("moe_layer", {**MIXTURE, **FIRST, "form": "tensor", "dtype": "float16"}),
    ("moe_layer", {**MIXTURE, **LAST, "form": "tensor", "dtype": "bfloat16"}),
]
SPECS += [("point_samples", {"with_valid": True, "least_valid": reference_gather.VALID})]
SLOW = {2, 3, 4, 6, 8, 10, 13, 14}


def describe(item: Any) -> str:
    kernel, spec = item
    return "-".join([kernel, *(str(value) for value in spec.values())])


def each_spec(**marks: Any) -> Any:
    """One test for each of `SPECS`; some of them are slow."""
    parameters = [
        pytest.param(*spec, id=describe(spec), marks=[pytest.mark.slow] if number in SLOW else [])
        for number, spec in enumerate(SPECS)
    ]
    return pytest.mark.parametrize(("name", "spec"), parameters, **marks)


@functools.lru_cache
def compiled(name: str, target: CudaTarget, spec: tuple[tuple[str, Any], ...]) -> CudaCode:
    return CUDA_KERNELS[name].compile(target, **dict(spec))


def compile_spec(name: str, spec: dict[str, Any], target: CudaTarget = HOPPER) -> CudaCode:
    return compiled(name, target, tuple(spec.items()))


class EmulatedFunction:
    """Takes the place of a `CudaFunction`, and runs its source on the CPU under a sanitizer (`cuda_emulator.hpp`)."""

    device = torch.device("cpu")

    def __init__(self, code: CudaCode, folder: Path, sanitizer: str) -> None:
        self._code, self._program, self._file = code, folder / "kernel", folder / "arguments"
        header = Path(__file__).with_name("cuda_emulator.hpp")
        body = code.source[code.source.index('extern "C" __global__') :]
        main = f"int main(int, char **arguments) {{ return emulate({code.symbol}, arguments[1]); }}"
        text = folder / "kernel.cpp"
        text.write_text(f'#include "{header}"\n{body}\n{main}\n')
        options = ["-std=c++17", "-O1", "-g1", "-w", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
        subprocess.run(["g++", *options, "-o", self._program, text], check=True)

    def __call__(self, *grid: int, **arguments: Any) -> None:
        content = bytearray(struct.pack("5q", *(*grid, 1, 1)[:3], self._code.threads, len(self._code.parameters)))
        places = {}
        for (name, kind), value in zip(
            self._code.parameters, cuda_driver.pack_arguments(self._code.parameters, arguments), strict=True
        ):
            data = stored(arguments[name]).numpy().tobytes() if kind == "pointer" else bytes(value)
            content += struct.pack("2q", len(data), kind == "pointer")
            if kind == "pointer":
                places[name] = slice(len(content), len(content) + len(data))
            content += data
        self._file.write_bytes(content)
        done = subprocess.run([self._program, self._file], capture_output=True, text=True)
        assert not done.returncode, done.stderr[:4000]
        content = bytearray(self._file.read_bytes())
        for name, place in places.items():
            stored(arguments[name]).copy_(torch.frombuffer(content[place], dtype=torch.uint8))


def stored(x: torch.Tensor) -> torch.Tensor:
    """The bytes from a tensor's first element to its last."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((span,), (1,)).view(torch.uint8)


# --------------------------------------------------------------------------------------------------------------------
# Without a GPU
# --------------------------------------------------------------------------------------------------------------------


def test_all_kernels_for_gpus_have_variants_and_those_tested_here_are_all():
    found = {variant.kernel.name for variant in manage.all_variants(target="cuda-sm_90")}
    assert found == set(CUDA_KERNELS) == {name for name, _ in SPECS}


@needs_nvcc
@each_spec()
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, id=target.arch, marks=[] if target == HOPPER else [pytest.mark.slow])
        for target in CUDA_TARGETS
    ],
)
def test_kernels_compile_offline_and_keep_their_numbers_in_registers(name: str, spec: Any, target: CudaTarget):
    if spec.get("form") == "tensor" and spec["dtype"] != "float16" and not target.has_bfloat16:
        pytest.skip("tensor cores without bfloat16")
    code = compile_spec(name, spec, target)
    cubin, resources = cuda_driver.assemble(code.source, target.arch)
    assert cubin.startswith(b"\x7fELF")
    assert resources.spilled_bytes == 0
    assert 8 <= resources.registers <= 168  # three blocks of 128 threads, at least, on one multiprocessor
    assert resources.shared_bytes <= 48 << 10
    assert ("mma_sync" in code.source) == (spec.get("form") == "tensor")


@needs_gcc
@each_spec()
@pytest.mark.parametrize("sanitizer", ["thread", pytest.param("address", marks=pytest.mark.slow)])
def test_an_emulated_gpu_computes_what_the_twin_does(name: str, spec: Any, sanitizer: str, tmp_path: Path):
    CUDA_KERNELS[name].trial(EmulatedFunction(compile_spec(name, spec), tmp_path, sanitizer), **spec)


@pytest.fixture
def emulated_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have kernels for GPUs run on CPU tensors."""

    def function(kernel: CudaKernel, *, device: torch.device, **spec: Any) -> EmulatedFunction:
        folder = tmp_path / describe((kernel.name, spec))
        folder.mkdir(exist_ok=True)
        return EmulatedFunction(compile_spec(kernel.name, spec), folder, "address")

    monkeypatch.setattr(CudaKernel, "function", function)
    monkeypatch.setattr(targets, "of_gpu", lambda device: HOPPER)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2))


@needs_gcc
@pytest.mark.slow
def test_matshift_takes_any_leading_shape_and_no_bias(emulated_gpu: None):
    codes, offset, _ = power_of_two.encode(torch.randn(5, 33))
    x, codes = torch.randn(2, 0, 33), power_of_two.pack(codes, 4)
    given = ops_matshift.MatShift(x, codes, offset, None, 4, "relu")
    assert ops_matshift._cuda(given) is None
    x = torch.randn(3, 2, 66)[..., ::2]
    torch.testing.assert_close(
        ops_matshift._cuda(given._replace(x=x)), kernels.matshift_twin(x, codes, offset, activation="relu")
    )


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("op", ["kv", "q", "matadd", "attention", "contrast"])
def test_matadd_takes_strided_heads_masks_and_packed_codes(op: str, emulated_gpu: None):
    q, k = (torch.randn(2, 130, 3, 11).transpose(1, 2) for _ in range(2))
    v, mask, kv = torch.randn(2, 3, 130, 7), torch.rand(2, 1, 130) > 0.3, torch.randn(2, 3, 11, 7)
    mask[0] = False  # queries that see no key
    packed, contrast = reference_matadd.pack_signs(k), torch.tensor([0.0, 1.0, 16.0])
    found, twin = {
        "kv": lambda: (
            ops_matadd._kv(cuda_matadd, ops_matadd.MatAddKV(packed, v, mask, "01", 11)),
            reference_matadd.matadd_kv_twin(packed, v, mask, "01", 11),
        ),
        "q": lambda: (
            ops_matadd._q(cuda_matadd, ops_matadd.MatAddQ(q[0, 0], kv[0, 0])),
            reference_matadd.matadd_q_twin(q[0, 0], kv[0, 0]),
        ),
        "matadd": lambda: (
            ops_matadd._attention(cuda_matadd, ops_matadd.AddAttention(q, k, v, attention=False)),
            reference_matadd.add_attention_twin(q, k, v, attention=False),
        ),
        "attention": lambda: (
            ops_matadd._attention(cuda_matadd, ops_matadd.AddAttention(q, k, v, mask)),
            reference_matadd.add_attention_twin(q, k, v, mask),
        ),
        "contrast": lambda: (
            ops_matadd._attention(cuda_matadd, ops_matadd.AddAttention(q, k, v, mask, contrast=contrast)),
            reference_matadd.add_attention_twin(q, k, v, mask, contrast=contrast),
        ),
    }[op]()
    torch.testing.assert_close(found, twin, rtol=1e-5, atol=1e-4)


def random_layers(chains: str, widths: dict[str, tuple[int, ...]], bias: bool = True) -> list[Any]:
    """Tensors of experts as `moe_mlp` takes them: ``"mult mult, shift shift"``, with the widths of each expert."""
    layers: list[Any] = []
    for chain in chains.split(","):
        for kind, (inputs, outputs) in zip(chain.split(), itertools.pairwise(widths[chain]), strict=True):
            weight = torch.randn(outputs, inputs) / inputs**0.5
            if kind == "mult":
                layers += [weight, None]
            else:
                codes, offset, _ = power_of_two.encode(weight)
                layers += [power_of_two.pack(codes, 4), offset]
            layers.append(torch.randn(outputs) if bias else None)
    return layers


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
def test_a_mixture_takes_experts_of_other_widths_kinds_and_numbers(gated: bool, emulated_gpu: None):
    widths = {"shift mult": (37, 70, 9), "mult shift": (37, 5, 9), "mult mult": (37, 11, 9)}
    layers = random_layers(",".join(widths), widths, bias=gated)
    x, logits = torch.randn(150, 2, 37).transpose(0, 1), torch.randn(2, 150, 3)
    logits[..., 1] = -1e9  # nobody goes there
    logits[0, 0] = torch.nan
    given = ops_moe.MoeMlp(x, logits, layers, 2, 4, "relu", gated)
    found, assignment = ops_moe._cuda(given)
    twin, expected = kernels.moe_mlp_twin(x, logits, layers, 2, 4, "relu", gated)
    assert torch.equal(assignment, expected)
    torch.testing.assert_close(found, twin, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert ops_moe._cuda(given._replace(x=x[:, :0], logits=logits[:, :0])) is None


@needs_gcc
@pytest.mark.slow
def test_points_are_looked_up_among_valid_and_among_all_pixels(emulated_gpu: None):
    for with_valid in (False, True):
        scene = reference_gather.random_scene(1, rays=13, samples=3, views=4, channels=1, with_valid=with_valid)
        scene[0][0, 0] = torch.nan
        for found, twin in zip(ops_gather._cuda(scene), reference_gather.point_samples_twin(*scene), strict=True):
            torch.testing.assert_close(found[1:], twin[1:], rtol=1e-3, atol=1e-3)
        assert not found[0, 0].any()


@needs_gcc
@pytest.mark.slow
def test_a_perceptron_of_shifts_is_two_products(emulated_gpu: None, monkeypatch: pytest.MonkeyPatch):
    x, layers = torch.randn(3, 30, 33), random_layers("shift shift", {"shift shift": (33, 70, 9)})
    monkeypatch.setattr(ops_mlp, "matshift", lambda *given: ops_matshift._cuda(ops_matshift.MatShift(*given)))
    found = ops_mlp._cuda(ops_mlp.ShiftMlp(x, *layers, 4, "gelu"))
    torch.testing.assert_close(found, kernels.shift_mlp_twin(x, *layers, 4, "gelu"), rtol=1e-5, atol=1e-5)


REVERSE = """
extern "C" __global__ void __launch_bounds__(64) reverse_kernel(float* __restrict__ X_ptr, float* __restrict__ Y_ptr) {
  __shared__ alignas(64) float staged[64];
  staged[((int)threadIdx.x)] = X_ptr[((int)threadIdx.x)];
  BARRIER
  Y_ptr[((int)threadIdx.x)] = staged[63 - ((int)threadIdx.x)];
}"""


@needs_gcc
@pytest.mark.parametrize(
    ("sanitizer", "barrier", "size", "complaint"),
    [
        ("thread", "__syncthreads();", 64, None),
        ("thread", "", 64, "data race"),
        ("thread", "if (threadIdx.x) __syncthreads();", 64, "does not come to a barrier that others wait at"),
        ("address", "__syncthreads();", 63, "heap-buffer-overflow"),
    ],
)
def test_the_emulated_gpu_sees_what_a_real_one_may_hide(sanitizer, barrier, size, complaint, tmp_path: Path):
    function = EmulatedFunction(CudaCode.of(REVERSE.replace("BARRIER", barrier)), tmp_path, sanitizer)
    x, y = torch.randn(64), torch.zeros(64)
    if complaint is None:
        function(1, X=x, Y=y)
        assert torch.equal(y, x.flip(0))
    else:
        with pytest.raises(AssertionError, match=complaint):
            function(1, X=x, Y=y[:size])


def test_a_signature_is_read_by_name():
    source = """
extern "C" __global__ void __launch_bounds__(128) f_kernel(float* __restrict__ X_ptr, int rows, float scale);
extern "C" __global__ void __launch_bounds__(128) f_kernel(float* __restrict__ X_ptr, int rows, float scale) {
}"""
    code = CudaCode.of(source)
    assert (code.symbol, code.threads) == ("f_kernel", 128)
    assert code.parameters == (("X", "pointer"), ("rows", "int"), ("scale", "float"))
    x = torch.zeros(3)
    address, rows, scale = cuda_driver.pack_arguments(code.parameters, {"scale": 0.5, "X": x, "rows": 7})
    assert (address.value, rows.value, scale.value) == (x.data_ptr(), 7, 0.5)


@pytest.mark.parametrize(
    ("capability", "numerics", "dtype", "bits", "form"),
    [
        (90, "exact", "float32", 4, "float32"),
        (90, "fast", "float32", 4, "tensor"),
        (75, "fast", "float32", 4, "float32"),
        (80, "exact", "bfloat16", 6, "tensor"),
        (75, "exact", "bfloat16", 4, "float32"),
        (75, "exact", "float16", 5, "tensor"),
        (90, "exact", "float16", 6, "float32"),
    ],
)
def test_tensor_cores_are_used_where_they_are_exact_enough(capability, numerics, dtype, bits, form):
    assert product.form(CudaTarget(capability), numerics, bits, dtype) == form


@needs_nvcc
def test_kernels_are_built_and_listed_for_a_gpu_that_is_not_there(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = SPECS[0][1]
    monkeypatch.setattr(CUDA_KERNELS["matshift"], "variants", lambda target: [spec])
    file = tmp_path / "kernels.json"

    def run(verb: str) -> dict[str, Any]:
        assert cli.main(["kernels", verb, "matshift", "--target", "cuda-sm_80", "--json", str(file)]) == 0
        (row,) = json.loads(file.read_text())["variants"]
        return row

    assert run("list")["cached"] is False
    assert run("build")["built"] is True
    assert run("list") == {"kernel": "matshift", "target": "cuda-sm_80", "spec": spec, "cached": True}
    assert run("build")["built"] is False
    record = cache.read_record(CUDA_KERNELS["matshift"].entry(targets.find("cuda-sm_80"), **spec))
    assert record is not None
    assert record["passed_on"] == []
    assert record["spilled_bytes"] == 0
    cubin = cache.find(CUDA_KERNELS["matshift"].entry(targets.find("cuda-sm_80"), **spec), ".cubin")
    assert cubin is not None
    assert cubin.read_bytes().startswith(b"\x7fELF")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_check_says_that_there_is_no_such_gpu(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CUDA_KERNELS["matshift"], "variants", lambda target: [SPECS[0][1]])
    monkeypatch.setattr(cuda_driver, "assemble", lambda source, arch: (b"\x7fELF", cuda_driver.Resources(32, 0, 0)))
    file = tmp_path / "checked.json"
    assert cli.main(["kernels", "check", "matshift", "--target", "cuda-sm_90", "--json", str(file)]) == 1
    (row,) = json.loads(file.read_text())["variants"]
    assert row["error"] == "UserError: there is no GPU here to run cuda-sm_90 on"


def test_the_target_of_a_gpu_is_no_cpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SHIFTADD3D_TARGET", "cuda-sm_90")
    targets.current.cache_clear()
    with pytest.raises(UserError, match=r"no target 'cuda-sm_90' for CPUs: expected one of amx, .*, generic$"):
        targets.current()
    targets.current.cache_clear()


@pytest.mark.parametrize("name", ["cuda-sm_70", "cuda-90", "cuda", "cuda-sm_"])
def test_a_gpu_that_kernels_are_not_made_for_is_refused(name: str):
    with pytest.raises(UserError, match=f"no target '{name}': expected one of .*cuda-sm_75.* or a later GPU's"):
        targets.find(name)


def test_a_cpus_target_is_built_by_its_own_process():
    other = next(target.name for target in targets.TARGETS if target != targets.current())
    with pytest.raises(UserError, match=f"set SHIFTADD3D_TARGET={other}"):
        next(manage.all_variants(target=other))


class RecordingDriver:
    """Takes the place of libcuda."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.contexts: list[int | None] = []
        self.status = 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        context._obj.value = 11
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        self.contexts.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        self.contexts.pop()
        return 0

    def cuModuleLoadData(self, module: Any, image: bytes) -> int:
        assert self.contexts == [11]
        assert image == b"cubin"
        module._obj.value = 22
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        assert (module.value, name) == (22, b"f_kernel")
        function._obj.value = 33
        return 0

    def cuLaunchKernel(self, function: Any, *arguments: Any) -> int:
        assert self.contexts == [11]
        *sizes, shared, stream, values, extra = arguments
        assert (shared, extra) == (0, None)
        pointer = ctypes.c_void_p.from_address(values[0]).value
        number = ctypes.c_int.from_address(values[1]).value
        self.launches.append(
            {"function": function.value, "sizes": sizes, "stream": stream.value, "values": (pointer, number)}
        )
        return self.status

    def cuGetErrorString(self, status: int, message: Any) -> int:
        message._obj.value = b"an illegal memory access was encountered"
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> RecordingDriver:
    recording = RecordingDriver()
    monkeypatch.setattr(cuda_driver, "_load_driver", lambda: recording)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=44))
    return recording


RECORD = {"symbol": "f_kernel", "threads": 128, "parameters": [["X", "pointer"], ["rows", "int"]]}


def test_a_function_is_queued_on_torchs_current_stream_in_torchs_context(driver: RecordingDriver):
    function = cuda_driver.CudaFunction(b"cubin", RECORD, torch.device("cuda", 0))
    x = torch.zeros(3)
    function(5, 2, X=x, rows=7)
    sizes = [5, 2, 1, 128, 1, 1]
    assert driver.launches == [{"function": 33, "sizes": sizes, "stream": 44, "values": (x.data_ptr(), 7)}]
    assert driver.contexts == []


def test_what_the_driver_complains_of_is_raised(driver: RecordingDriver):
    function = cuda_driver.CudaFunction(b"cubin", RECORD, torch.device("cuda", 0))
    driver.status = 700
    with pytest.raises(RuntimeError, match="cuLaunchKernel: an illegal memory access was encountered"):
        function(1, X=torch.zeros(3), rows=7)
    assert driver.contexts == []


@pytest.fixture
def pretended_gpu(driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU that can be asked for its name and can do nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return torch.device("cuda", 0)


@pytest.fixture
def pretended_kernel(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaKernel]:
    """A kernel without code whose trial passes; each trial is noted in `tried`."""
    tried: list[dict[str, Any]] = []
    kernel = CudaKernel("test_pretended", RecordingDriver, lambda function, **spec: tried.append(spec), lambda _: [])
    monkeypatch.setattr(kernel, "tried", tried, raising=False)
    monkeypatch.setattr(kernel, "compile", lambda target, **spec: CudaCode("", "f_kernel", 128, (("X", "pointer"),)))
    monkeypatch.setattr(cuda_driver, "assemble", lambda source, arch: (b"cubin", cuda_driver.Resources(32, 0, 0)))
    yield kernel
    del CUDA_KERNELS["test_pretended"]


def test_a_cubin_is_tried_once_on_each_kind_of_gpu(pretended_kernel: Any, pretended_gpu: torch.device, monkeypatch):
    assert pretended_kernel.function(device=pretended_gpu, size=3) is not None
    assert pretended_kernel.function(device=pretended_gpu, size=3) is not None
    monkeypatch.setattr(pretended_kernel, "_functions", {})  # as in the next process
    assert pretended_kernel.function(device=pretended_gpu, size=3) is not None
    assert pretended_kernel.tried == [{"size": 3}]
    monkeypatch.setattr(pretended_kernel, "_functions", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another")
    assert pretended_kernel.function(device=pretended_gpu, size=3) is not None
    assert pretended_kernel.tried == [{"size": 3}] * 2
    record = cache.read_record(pretended_kernel.entry(HOPPER, size=3))
    assert record is not None
    assert record["passed_on"] == ["Pretended", "Another"]


@pytest.mark.twin_may_stand_in
def test_a_kernel_that_differs_from_its_twin_is_not_used(pretended_kernel: Any, pretended_gpu, monkeypatch):
    def trial(function: Any, **spec: Any) -> None:
        raise AssertionError("it is off by 1 more than it may be")

    monkeypatch.setattr(pretended_kernel, "trial", trial)
    with pytest.warns(RuntimeWarning, match="test_pretended: it is off by 1 .*; plain torch stands in"):
        assert pretended_kernel.function(device=pretended_gpu, size=3) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pretended_kernel.function(device=pretended_gpu, size=3) is None


@pytest.mark.twin_may_stand_in
def test_a_kernel_that_breaks_the_device_is_not_run_by_the_next_process(
    pretended_kernel: Any, pretended_gpu, monkeypatch
):
    def trial(function: Any, **spec: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(pretended_kernel, "trial", trial)
    with pytest.warns(RuntimeWarning, match="illegal memory access"):
        assert pretended_kernel.function(device=pretended_gpu, size=3) is None
    monkeypatch.setattr(pretended_kernel, "trial", lambda function, **spec: pytest.fail("it was run again"))
    monkeypatch.setattr(pretended_kernel, "_functions", {})
    with pytest.warns(RuntimeWarning, match=r"crashed earlier processes; to try again, remove .*\.trial"):
        assert pretended_kernel.function(device=pretended_gpu, size=3) is None


@pytest.mark.twin_may_stand_in
def test_a_gpu_that_is_too_old_gets_the_twin(pretended_kernel: Any, pretended_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.warns(RuntimeWarning, match="this GPU is sm_70, and kernels are for sm_75 and later; plain torch"):
        assert pretended_kernel.function(device=pretended_gpu, size=3) is None


@pytest.mark.twin_may_stand_in
def test_nothing_is_loaded_while_a_graph_is_captured(pretended_kernel: Any, pretended_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(RuntimeWarning, match="while a CUDA graph is captured; call it once before"):
        assert pretended_kernel.function(device=pretended_gpu, size=3) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert pretended_kernel.function(device=pretended_gpu, size=3) is not None


def test_without_nvcc_the_twin_stands_in(pretended_kernel: Any, pretended_gpu, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(cuda_driver, "find_nvcc", lambda: None)
    with pytest.raises(RuntimeError, match="no nvcc found to compile it with"):
        cuda_driver.assemble("", "sm_90")


# --------------------------------------------------------------------------------------------------------------------
# Layers on a GPU that is only pretended: tensors without numbers, which cannot be waited for
# --------------------------------------------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    """The names of the ops of this project that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "shiftadd3d":
            self.called.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fake_cuda() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


@contextlib.contextmanager
def autocast_of_fake_cuda(dtype: torch.dtype | None) -> Iterator[None]:
    """What `torch.autocast` does, but where there is no GPU; nothing for None."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", dtype or before)
    torch.set_autocast_enabled("cuda", dtype is not None)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


def frozen(module: nn.Module) -> nn.Module:
    freeze_(module.eval(), verbose=False)
    return module


def to_fake_cuda(module: nn.Module) -> nn.Module:
    return module._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"))


def ops_of(module: nn.Module, *inputs: Any) -> set[str]:
    with Ops() as ops:
        module(*inputs)
    return ops.called


FROZEN_LAYERS = ("matshift", "shift_mlp", "moe_mlp")


def frozen_layer(op: str) -> nn.Module:
    """A layer from 8 channels to 8 that runs as this op."""
    mlp = FeedForward(8, 16, dropout=0.0)
    for name in ("fc1", "fc2"):
        setattr(mlp, name, ShiftLinear.from_linear(getattr(mlp, name)))
    return frozen(nn.Sequential({"matshift": ShiftLinear(8, 8), "shift_mlp": mlp, "moe_mlp": MoEMlp(8, 16)}[op]))


@pytest.mark.parametrize("op", FROZEN_LAYERS)
def test_frozen_layers_on_a_gpu_call_their_kernels_without_waiting_for_it(op: str, fake_cuda: None):
    with unset_fake_temporarily():
        layer = frozen_layer(op)
    to_fake_cuda(layer)
    x = torch.empty(2, 5, 8, device="cuda")
    assert ops_of(layer, x) == {op}
    with kernels.numerics("twin"), contextlib.suppress(DynamicOutputShapeException, DataDependentOutputException):
        assert ops_of(layer, x) == set()
    with torch.enable_grad(), contextlib.suppress(DynamicOutputShapeException, DataDependentOutputException):
        assert ops_of(layer, x) == set()


def test_where_a_gpu_has_no_kernel_a_network_runs_as_it_is_written(fake_cuda: None):
    recipe = Recipe(attention="add")
    with unset_fake_temporarily():
        model = nn.ModuleDict({"network": GNT(depth=1, width=32, feature_dim=4, color_head=True)})
        reparameterize_(model, recipe, verbose=False)
        network = frozen(model)["network"]

    def samples(device: str) -> tuple[Any, ...]:
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        seen = PointSamples(empty(3, 6, 5, 7), empty(3, 6, 5, 4), empty(3, 6, 5, 1, dtype=torch.bool))
        return seen, empty(3, 6, 3), empty(3, 3)

    on_cpu = ops_of(network, *samples("cpu"))
    assert on_cpu >= {"view_attention", "ray_block", "position_layer", "view_embedding", "color_blend"}
    on_gpu = ops_of(to_fake_cuda(network), *samples("cuda"))
    assert on_gpu >= {"view_attention"}
    assert all("cuda" in KERNEL_DEVICES[op] for op in on_gpu)


@pytest.mark.parametrize("half", [False, True])
def test_a_frozen_classifier_on_a_gpu_runs_on_kernels_without_waiting_for_it(half: bool, fake_cuda: None):
    with unset_fake_temporarily():
        model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=2, num_classes=3)
        reparameterize_(model, "add+shift-attn+moe", verbose=False)
        frozen(model)
    to_fake_cuda(model)
    images = torch.empty(2, 3, 224, 224, device="cuda")
    with autocast_of_fake_cuda(torch.float16 if half else None), Ops() as ops:
        assert model(images).dtype == (torch.float16 if half else torch.float32)
    assert ops.called == {"matshift", "add_attention", "moe_mlp"}


def test_a_model_and_its_input_on_different_devices_are_a_clear_error(fake_cuda: None):
    with unset_fake_temporarily():
        layer = frozen_layer("matshift")
    with pytest.raises(UserError, match="matshift: x is on cuda:0, but codes on cpu; move the input to the device of"):
        layer(torch.empty(2, 8, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", FROZEN_LAYERS)
def test_autocast_makes_frozen_layers_compute_in_its_dtype(op: str, dtype: torch.dtype, fake_cuda: None):
    with unset_fake_temporarily():
        layer = frozen_layer(op)
    to_fake_cuda(layer)
    x = torch.empty(2, 5, 8, device="cuda")
    with autocast_of_fake_cuda(dtype):
        assert layer(x).dtype == dtype
        assert layer(x.double()).dtype == torch.float64


@pytest.mark.parametrize("op", FROZEN_LAYERS)
def test_autocast_casts_the_input_and_nothing_else(op: str):
    layer, x = frozen_layer(op), torch.randn(7, 8)
    with torch.no_grad():
        expected = layer(x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


# --------------------------------------------------------------------------------------------------------------------
# On a GPU
# --------------------------------------------------------------------------------------------------------------------


def shift_layer(inputs: int, outputs: int, bits: int = 4, terms: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(inputs)
    codes, offset, _ = power_of_two.encode(torch.randn(outputs, inputs, generator=generator), bits, terms)
    x = torch.randn(3, 67, inputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator)
    return [tensor.cuda() for tensor in (x, power_of_two.pack(codes, bits), offset, bias)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize(("bits", "terms"), [(4, 1), (5, 2), (6, 1)])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (33, 65), (256, 192)])
def test_matshift_is_its_twin_on_a_gpu(dtype, numerics, bits, terms, inputs, outputs):
    x, codes, offset, bias = shift_layer(inputs, outputs, bits, terms, dtype)
    with warnings.catch_warnings(), kernels.numerics(numerics):
        warnings.simplefilter("error")  # no twin stands in
        y = kernels.matshift(x, codes, offset, bias, bits, "gelu")
    twin = kernels.matshift_twin(x.double(), codes, offset, bias, bits, "gelu")
    error = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert (y.double() - twin).norm() <= error * twin.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codes", ["pm1", "01"])
@pytest.mark.parametrize(("tokens", "features", "columns"), [(1, 1, 1), (197, 64, 64), (3136, 33, 65)])
def test_matadd_is_its_twin_on_a_gpu(dtype, codes, tokens, features, columns):
    q, k = (torch.randn(2, tokens, 3, features, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(2))
    v = torch.randn(2, 3, tokens, columns, device="cuda", dtype=dtype)
    mask = torch.rand(2, 1, tokens, device="cuda") > 0.2
    error = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    twins = {"matadd_kv": reference_matadd.matadd_kv_twin, "add_attention": reference_matadd.add_attention_twin}
    twins["matadd"] = functools.partial(reference_matadd.add_attention_twin, attention=False)
    for op, twin_of in twins.items():
        inputs = (k, v) if op == "matadd_kv" else (q, k, v)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no twin stands in
            found = getattr(ops_matadd, op)(*inputs, mask, codes)
        twin = twin_of(*inputs[:-1], v.double(), mask, codes)
        assert (found.double() - twin).norm() <= error * twin.norm(), op
    kv = torch.randn(2, 3, features, columns, device="cuda", dtype=dtype)
    found, twin = (
        f(reference_matadd.pack_signs(q), kv, codes) for f in (ops_matadd.matadd_q, reference_matadd.matadd_q_twin)
    )
    assert (found - twin).norm() <= error * twin.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("points", "count", "width"), [(1, 1, 32), (101, 8, 64), (70, 32, 64)])
def test_view_attention_is_its_twin_on_a_gpu(dtype, points, count, width):
    sizes = reference_view_attention.weight_sizes(width, width // 8)
    weights = [torch.randn(*size, device="cuda") / size[1] ** 0.5 for size in sizes]
    biases = [torch.randn(sizes[number][0], device="cuda") for number in (3, 4, 5, 6, 7)]
    query, views, ray_diff = (
        torch.randn(*shape, device="cuda", dtype=dtype)
        for shape in ((points, width), (points, count, width), (points, count, 4))
    )
    mask = torch.rand(points, count, device="cuda") > 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no twin stands in
        packed = pack_view_attention.panels(weights, biases, lanes=1)
        out = ops_view_attention.view_attention(query, views, ray_diff, mask, packed)
    twin = reference_view_attention.view_attention_twin(
        query.double(), views.double(), ray_diff.double(), mask, weights, biases
    )
    assert (out.double() - twin).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * twin.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize(
    ("tokens", "chains"), [(1, "shift,mult"), (3137, "mult mult,shift shift"), (777, "mult,shift")]
)
def test_a_mixture_is_its_twin_on_a_gpu(dtype, numerics, tokens, chains):
    torch.manual_seed(0)
    depth = len(chains.split(",")[0].split())
    layers = random_layers(chains, dict.fromkeys(chains.split(","), (65, 192, 65)[: depth + 1]))
    layers = [None if tensor is None else tensor.cuda() for tensor in layers]
    x, logits = torch.randn(tokens, 65, device="cuda", dtype=dtype), torch.randn(tokens, 2, device="cuda")
    with warnings.catch_warnings(), kernels.numerics(numerics):
        warnings.simplefilter("error")  # no twin stands in
        found, assignment = kernels.moe_mlp(x, logits, layers, depth, gated=True)
    twin, expected = kernels.moe_mlp_twin(x.double(), logits, layers, depth, gated=True)
    assert torch.equal(assignment, expected)
    error = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert (found.double() - twin).norm() <= error * twin.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("op", FROZEN_LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_frozen_layers_on_a_gpu_agree_with_plain_torch_compiled_captured_and_under_autocast(op: str, dtype):
    layer = frozen_layer(op).cuda()
    x = torch.randn(300, 8, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        with kernels.numerics("twin"):
            expected = layer(x)
        found = layer(x)
        assert found.dtype == expected.dtype == dtype
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), found)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, found)


@pytest.mark.gpu
@pytest.mark.parametrize("with_valid", [False, True])
@pytest.mark.parametrize("channels", [1, 32])
def test_points_are_looked_up_as_the_twin_does_on_a_gpu(with_valid: bool, channels: int):
    scene = reference_gather.random_scene(0, rays=65, samples=33, views=10, channels=channels, with_valid=with_valid)
    scene = [None if tensor is None else tensor.cuda() for tensor in scene]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no twin stands in
        found = ops_gather.point_samples(*scene)
    for one, twin in zip(found[:2], reference_gather.point_samples_twin(*scene)[:2], strict=True):
        torch.testing.assert_close(one, twin, rtol=1e-3, atol=1e-3)
    assert (
        found[2] == reference_gather.point_samples_twin(*scene)[2]
    ).float().mean() > 0.999  # a border may be a rounding away


@pytest.mark.gpu
def test_kernels_run_on_the_current_stream_and_in_graphs():
    x, codes, offset, bias = shift_layer(256, 64)
    expected = kernels.matshift(x, codes, offset, bias)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = x * 2  # what the kernel must wait for
        assert torch.equal(kernels.matshift(late, codes, offset, bias) - bias, (expected - bias) * 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.matshift(x, codes, offset, bias)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
def test_check_passes_on_a_gpu(tmp_path: Path):
    target = targets.of_gpu(torch.device("cuda", torch.cuda.current_device()))
    assert cli.main(["kernels", "check", "--target", target.name, "--json", str(tmp_path / "checked.json")]) == 0
