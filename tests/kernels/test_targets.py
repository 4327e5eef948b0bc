"""Which instruction set is taken, and what `SHIFTADD3D_TARGET` says about it."""

from __future__ import annotations

import pytest

from shiftadd3d import UserError
from shiftadd3d.kernels.runtime import targets

AVX2 = "fpu sse2 avx avx2 fma f16c bmi1 bmi2 abm movbe popcnt"
AVX512 = f"{AVX2} avx512f avx512bw avx512dq avx512vl avx512cd"
SAPPHIRE_RAPIDS = f"{AVX512} avx512_vnni avx512_bf16 avx512_vbmi2 avx512vbmi gfni amx_tile amx_bf16 amx_int8"
FLAGS = {
    "generic": "fpu sse2",
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_vnni": f"{AVX512} avx512_vnni",
    "amx": SAPPHIRE_RAPIDS,
}


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch):
    """Pretend to run on another CPU."""

    def pretend(flags: str, amx_permitted: bool = True) -> None:
        monkeypatch.setattr(targets, "cpu_flags", lambda: frozenset(flags.split()))
        monkeypatch.setattr(targets, "_amx_permitted", lambda: amx_permitted)
        targets.current.cache_clear()

    monkeypatch.delenv("SHIFTADD3D_TARGET", raising=False)
    targets.current.cache_clear()
    yield pretend
    targets.current.cache_clear()


@pytest.mark.parametrize("name", FLAGS)
def test_the_best_that_the_cpu_has_is_taken(cpu, name: str):
    cpu(FLAGS[name])
    assert targets.current().name == name


@pytest.mark.parametrize(("lacking", "name"), [("gfni", "avx512_vnni"), ("avx512vl", "avx2"), ("movbe", "generic")])
def test_what_a_virtual_machine_hides_is_not_used(cpu, lacking: str, name: str):
    cpu(FLAGS["amx"].replace(f" {lacking}", ""))
    assert targets.current().name == name


def test_amx_needs_the_systems_permission(cpu):
    cpu(FLAGS["amx"], amx_permitted=False)
    assert targets.current().name == "avx512_vnni"


def test_a_system_that_tells_no_flags_gets_code_that_runs_anywhere(cpu):
    cpu("")
    assert targets.current().name == "generic"


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512"])
def test_a_smaller_target_can_be_asked_for(cpu, monkeypatch: pytest.MonkeyPatch, name: str):
    cpu(FLAGS["amx"])
    monkeypatch.setenv("SHIFTADD3D_TARGET", name)
    assert targets.current().name == name


def test_a_target_that_is_not_there_is_refused(cpu, monkeypatch: pytest.MonkeyPatch):
    cpu(FLAGS["avx2"])
    monkeypatch.setenv("SHIFTADD3D_TARGET", "sse9")
    expected = "^SHIFTADD3D_TARGET: no target 'sse9' for CPUs: expected one of amx, avx512_vnni, avx512, avx2, generic$"
    with pytest.raises(UserError, match=expected):
        targets.current()


def test_a_target_that_the_cpu_cannot_run_is_refused(cpu, monkeypatch: pytest.MonkeyPatch):
    cpu(FLAGS["avx2"])
    monkeypatch.setenv("SHIFTADD3D_TARGET", "avx512_vnni")
    with pytest.raises(UserError, match=r"cannot run 'avx512_vnni' \(it lacks .*avx512_vnni.*\), only avx2, generic"):
        targets.current()


def test_amx_without_permission_is_refused(cpu, monkeypatch: pytest.MonkeyPatch):
    cpu(FLAGS["amx"], amx_permitted=False)
    monkeypatch.setenv("SHIFTADD3D_TARGET", "amx")
    with pytest.raises(UserError, match=r"it lacks the system's permission to use AMX"):
        targets.current()


def test_this_machine_has_a_target_and_it_has_what_the_target_needs():
    target = targets.current()
    assert target.flags <= targets.cpu_flags()
    assert target in targets.TARGETS
