"""Kernels for CPUs with AVX-512 and AMX, on CPUs that have neither: their instructions are emulated.

The emulator is compared with what the CPU at hand and torch make of the same numbers; then kernels of all kinds undergo
the trial that they have to pass on users' machines. ``pytest tests/kernels --emulated-cpu amx`` runs the kernels' other
tests on such a CPU.
"""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shiftadd3d import kernels
from shiftadd3d.kernels import manage
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.runtime.kernel import KERNELS
from shiftadd3d.kernels.runtime.targets import CpuTarget

pytest.importorskip("tvm")

Cpu = Callable[[str], CpuTarget]

# What AVX2 has of the same instructions, for one half of the vectors.
HALVES = """
#include <immintrin.h>
#define HALF(name, expression) \\
  extern "C" void name(__m256i *r, __m256i *x, __m256i *y, __m256i *z) { _mm256_storeu_si256(r, expression); }
#define LOAD(p) _mm256_loadu_si256(p)
HALF(pmaddw, _mm256_madd_epi16(LOAD(x), LOAD(y)))
HALF(vpdpwssd, _mm256_add_epi32(LOAD(x), _mm256_madd_epi16(LOAD(y), LOAD(z))))
HALF(pmaddubs, _mm256_maddubs_epi16(LOAD(x), LOAD(y)))
HALF(packsswb, _mm256_packs_epi16(LOAD(x), LOAD(y)))
HALF(packssdw, _mm256_packs_epi32(LOAD(x), LOAD(y)))
HALF(cvtps2dq, _mm256_cvtps_epi32(_mm256_castsi256_ps(LOAD(x))))
"""


class Address(ctypes.c_void_p):
    """Of a tensor, which lives as long."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x.data_ptr())
        self.tensor = x


def halves(x: Tensor) -> list[Tensor]:
    return list(x.view(torch.uint8).view(2, 32))


@pytest.fixture(scope="module")
def avx2(emulator: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("avx2")
    (folder / "halves.cpp").write_text(HALVES)
    library = folder / "halves.so"
    subprocess.run(["g++", "-O1", "-mavx2", "-shared", "-fPIC", "-o", library, folder / "halves.cpp"], check=True)
    return ctypes.CDLL(str(library))


# --------------------------------------------------------------------------------------------------------------------
# The emulator
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("half", "whole", "operands"),
    [
        ("pmaddw", "avx512_pmaddw_d_512", 2),
        ("vpdpwssd", "avx512_vpdpwssd_512", 3),
        ("pmaddubs", "avx512_pmaddubs_w_512", 2),
        ("packsswb", "avx512_packsswb_512", 2),
        ("packssdw", "avx512_packssdw_512", 2),
        ("cvtps2dq", "avx512_mask_cvtps2dq_512", 1),
    ],
)
def test_instructions_of_avx_512_are_those_of_avx2_on_longer_vectors(
    emulator: Any, avx2: Any, half: str, whole: str, operands: int
):
    special = torch.tensor([0.5, 1.5, -2.5, 2.0**31, -(2.0**31), 1e30, float("nan"), float("inf")])
    for round_ in range(200):
        xs = [torch.randint(-(2**31), 2**31, (16,), dtype=torch.int64).int() for _ in range(operands)]
        if round_ % 4 == 0:
            xs = [x >> 14 for x in xs]
        if round_ == 1:
            xs = [torch.full((32,), -(2**15), dtype=torch.int16).view(torch.int32) for _ in xs]
        if half == "cvtps2dq":
            xs = [torch.randn(16) * 2.0 ** (round_ % 40 - 4)]
            xs[0][::2] = special
        found, expected = torch.zeros(16, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
        masked = [Address(found), ctypes.c_uint16(0xFFFF), 4] if half == "cvtps2dq" else []
        getattr(emulator.instructions, f"emulated_{whole}")(Address(found), *map(Address, xs), *masked)
        for result, *parts in zip(*map(halves, (expected, *xs)), strict=True):
            getattr(avx2, half)(*map(Address, [result, *parts, *[parts[0]] * (3 - operands)]))
        assert torch.equal(found, expected)


def test_dot_products_of_bytes_do_not_saturate(emulator: Any):
    """AVX2 has no such instruction; the sums are those of torch, and wrap around."""
    for largest in (4, 2**31):
        weights, xs = (torch.randint(low, low + 256, (16, 4)) for low in (0, -128))
        weights[0], xs[0] = 255, -128
        total = torch.randint(-largest, largest, (16,))
        found = torch.zeros(16, dtype=torch.int32)
        operands = (total.int(), weights.to(torch.uint8), xs.to(torch.int8))
        emulator.instructions.emulated_avx512_vpdpbusd_512(Address(found), *map(Address, operands))
        assert torch.equal(found, (total + (weights * xs).sum(-1)).int())


def test_lanes_beside_the_mask_keep_what_was_there(emulator: Any):
    x, before, found = torch.full((16,), 7.0), torch.arange(16).int(), torch.zeros(16, dtype=torch.int32)
    convert = emulator.instructions.emulated_avx512_mask_cvtps2dq_512
    convert(Address(found), Address(x), Address(before), ctypes.c_uint16(0x8001), 4)
    assert found.tolist() == [7, *range(1, 15), 7]


def test_bfloat16_is_rounded_as_in_torch_but_for_denormals(emulator: Any):
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4028235e38, 1 + 2**-8, 1 + 3 * 2**-8]
    low, high = torch.randn(16) * 2.0 ** torch.randint(-120, 120, (16,)), torch.tensor(special * 2)
    found = torch.zeros(32, dtype=torch.bfloat16)
    emulator.instructions.emulated_avx512bf16_cvtne2ps2bf16_512(Address(found), Address(high), Address(low))
    assert torch.allclose(found, torch.cat([low, high]).bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit(), torch.cat([low, high]).signbit())
    low[:] = 2.0**-127
    emulator.instructions.emulated_avx512bf16_cvtne2ps2bf16_512(Address(found), Address(high), Address(low))
    assert (found[:16] == 0).all()


def configuration(rows: int = 16, size: int = 64) -> Tensor:
    """Eight tiles of `rows` rows of `size` bytes."""
    tiles = torch.zeros(64, dtype=torch.uint8)
    tiles[0], tiles[16:32:2], tiles[48:56] = 1, size, rows
    return tiles


def tile_product(emulator: Any, x: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    """``total + x @ weight`` by one instruction; x [16, 32] and weight [32, 16] of bfloat16."""
    amx, total = emulator.instructions, total.clone()
    pairs = weight.view(16, 2, 16).transpose(1, 2).contiguous()
    amx.emulated_ldtilecfg(Address(configuration()))
    for tile, memory in enumerate((total, x.contiguous(), pairs)):
        amx.emulated_tileloadd64(tile, Address(memory), ctypes.c_int64(64))
    amx.emulated_tdpbf16ps(0, 1, 2)
    amx.emulated_tilestored64(0, Address(total), ctypes.c_int64(64))
    amx.emulated_tilerelease()
    assert not emulator.fault()
    return total


def test_a_product_of_tiles_is_that_of_matrices(emulator: Any):
    x, weight = torch.randint(-99, 99, (16, 32)).bfloat16(), torch.randint(-99, 99, (32, 16)).bfloat16()
    total = torch.randint(-99, 99, (16, 16)).float()
    assert torch.equal(tile_product(emulator, x, weight, total), total + x.float() @ weight.float())


def test_a_product_of_tiles_rounds_as_the_manual_says(emulator: Any):
    """Even inputs and odd ones are summed up each for themselves, and only then with what was there."""
    x, weight, total = torch.zeros(16, 32).bfloat16(), torch.ones(32, 16).bfloat16(), torch.zeros(16, 16)
    x[0, :4] = torch.tensor([2.0**24, 1, 1, 1])  # 2**24 + 1 is 2**24, and 1 + 1 + 2**24 is 2**24 + 2
    x[1, :4], total[1] = torch.tensor([1.0, 0, 1, 0]), 2.0**24
    x[2, 0], total[2] = 2.0**-130, 2.0**-140  # denormals count as zero
    x[3, 0], x[4, :2] = 2.0**-120, torch.tensor([2.0**-60, -(2.0**-60)])
    weight[0, 1], weight[:2, 2] = 2.0**-10, 2.0**-70
    y = tile_product(emulator, x, weight, total)
    assert y[:5, 0].tolist() == [2.0**24 + 2, 2.0**24 + 2, 0, 2.0**-120, 0]
    assert y[3, 1] == 0 and y[4, 2] == 0


MISUSES: dict[str, tuple[str, Callable[[Any, Tensor], None]]] = {
    "unconfigured": ("no tiles configured", lambda amx, memory: amx.emulated_tilezero(0)),
    "released": (
        "no tiles configured",
        lambda amx, memory: (
            amx.emulated_ldtilecfg(Address(configuration())),
            amx.emulated_tilerelease(),
            amx.emulated_tileloadd64(1, Address(memory), ctypes.c_int64(64)),
        ),
    ),
    "kept": ("threads have tiles configured", lambda amx, memory: amx.emulated_ldtilecfg(Address(configuration()))),
    "too large": ("17 rows of 64 bytes", lambda amx, memory: amx.emulated_ldtilecfg(Address(configuration(17)))),
    "not there": (
        "no tile 9",
        lambda amx, memory: (amx.emulated_ldtilecfg(Address(configuration())), amx.emulated_tilezero(9)),
    ),
    "unequal": (
        "tiles do not fit together",
        lambda amx, memory: (amx.emulated_ldtilecfg(Address(configuration(8))), amx.emulated_tdpbf16ps(0, 1, 2)),
    ),
    "twice": (
        "one tile serves twice",
        lambda amx, memory: (amx.emulated_ldtilecfg(Address(configuration())), amx.emulated_tdpbf16ps(0, 1, 1)),
    ),
    "beyond memory": (
        "wrote beyond its 100 bytes",
        lambda amx, memory: (
            ctypes.memset(place := allocate(amx, 100), 0, 101),
            amx.emulated_free(1, 0, ctypes.c_void_p(place)),
        ),
    ),
}


def allocate(amx: Any, size: int) -> int:
    amx.emulated_alloc.restype = ctypes.c_void_p
    return amx.emulated_alloc(1, 0, ctypes.c_uint64(size), 0, 0)


@pytest.mark.parametrize(("complaint", "misuse"), MISUSES.values(), ids=MISUSES)
def test_what_hardware_would_not_forgive_is_a_fault(emulator: Any, complaint: str, misuse: Callable[..., None]):
    run = emulator.checked(lambda: misuse(emulator.instructions, torch.zeros(1024)))
    with pytest.raises(AssertionError, match=complaint):
        run()
    emulator.instructions.emulated_tilerelease()
    assert not emulator.fault()


# --------------------------------------------------------------------------------------------------------------------
# The kernels
# --------------------------------------------------------------------------------------------------------------------

SHIFT = {"bits": 4, "terms": 1, "dtype": "float32", "activation": "gelu"}
TRIALS = [
    ("amx", "matshift", {**SHIFT, "form": "bfloat16x1"}),
    ("amx", "matshift", {**SHIFT, "form": "bfloat16x3", "bits": 5, "terms": 2}),
    ("amx", "shift_mlp", {**SHIFT, "form": "bfloat16x3"}),
    ("avx512_vnni", "matshift", {**SHIFT, "form": "int16"}),
    ("avx512", "matshift", {**SHIFT, "form": "int16", "bits": 5}),
]


@pytest.mark.parametrize(("name", "kernel", "spec"), TRIALS, ids=lambda value: value if isinstance(value, str) else "")
def test_each_kind_of_product_passes_its_trial(emulated_cpu: Cpu, name: str, kernel: str, spec: dict[str, Any]):
    KERNELS[kernel].check(emulated_cpu(name), **spec)


@pytest.mark.parametrize("exponent", [-110, -70, -40, 0, 40, 70, 100])
def test_matrix_tiles_are_exact_for_numbers_of_any_size(emulated_cpu: Cpu, exponent: int, torch_threads: int):
    """They take denormals for zero, so the pieces of small numbers and products of small numbers are at risk."""
    emulated_cpu("amx")
    weight = torch.randn(37, 70) * 2.0 ** torch.randint(-9, 5, (37, 1))
    codes, offset, _ = power_of_two.encode(weight * 2.0**-exponent)
    weight = power_of_two.decode(codes, offset, 4)
    x = torch.randn(75, 70) * 2.0 ** torch.randint(exponent - 9, exponent + 9, (75, 1))
    x[3], x[4, 5] = 0, -(2.0 ** (exponent - 30))
    y = kernels.matshift(x, power_of_two.pack(codes, 4), offset)
    error = (y - x.double() @ weight.double().T).abs()
    assert (error <= 1e-6 * (x.abs().double() @ weight.abs().double().T)).all()


def test_matrix_tiles_leave_infinity_and_nan_to_others(emulated_cpu: Cpu):
    emulated_cpu("amx")
    codes, offset, _ = power_of_two.encode(torch.randn(20, 33))
    x = torch.randn(9, 33)
    x[2, 5], x[7, 31], x[7, 32] = float("nan"), float("inf"), -float("inf")
    packed = power_of_two.pack(codes, 4)
    y, twin = kernels.matshift(x, packed, offset), kernels.matshift_twin(x, packed, offset)
    assert torch.allclose(y, twin, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", sorted({variant.kernel.name for variant in manage.all_variants()}))
@pytest.mark.parametrize("name", ["amx", "avx512_vnni", "avx512"])
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_variants_pass_their_trials(emulated_cpu: Cpu, every: int, name: str, kernel: str):
    target = emulated_cpu(name)
    for spec in itertools.islice(KERNELS[kernel].variants(target), None, None, every):
        KERNELS[kernel].check(target, **spec)
