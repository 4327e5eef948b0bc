"""Fixtures of the kernels' tests."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shiftadd3d.kernels import manage
from shiftadd3d.kernels.runtime import kernel as kernel_module
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.kernel import KERNELS
from shiftadd3d.kernels.runtime.targets import CpuTarget


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulated-cpu",
        metavar="TARGET",
        help="run all tests of kernels as if on such a CPU, for instance amx; its instructions are emulated",
    )


class EmulatedCpu:
    """Runs kernels for CPUs with AVX-512 or AMX on those that have AVX2 at most.

    Kernels are compiled for the target as ever. Then each instruction that LLVM is asked for by name is replaced by a
    call of a function that does the same (`cpu_emulator.cpp`), and machine code is made for the CPU at hand. LLVM
    itself takes care of vectors that are too long for it.

    Args:
        folder: for the emulator, and for the cache of kernels.
    """

    _HOST = "haswell"
    _NATIVE = ("sse", "ssse3.", "avx.", "avx2.", "fma.")  # the instructions that the host has
    _WORKSPACE = re.compile(r"^@__TVMBackend(Alloc|Free)Workspace = .*$", re.MULTILINE)
    _DECLARATION = re.compile(r"^declare (.+) @llvm\.x86\.([\w.]+)\((.*)\).*$", re.MULTILINE)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        library = folder / "emulator.so"
        options = ["-std=c++17", "-O2", "-mavx2", "-mfma", "-ffp-contract=off", "-shared", "-fPIC"]
        source = Path(__file__).with_name("cpu_emulator.cpp")
        subprocess.run(["g++", *options, "-o", library, source], check=True)
        self.instructions: Any = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        self._functions: dict[str, dict[Any, Any]] = {}
        self._lock, self._running = threading.Lock(), 0
        self._load, self._link = kernel_module.load_library, kernel_module.link
        kernel_module.install_launcher()  # which is not emulated

    def become(self, target: CpuTarget, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have this process take its CPU for the target's, until the patches are undone."""
        monkeypatch.setenv("SHIFTADD3D_CACHE", str(self.folder / "kernels"))
        monkeypatch.setenv(targets.ENVIRONMENT_VARIABLE, target.name)
        monkeypatch.setattr(targets, "cpu_flags", lambda: target.flags)
        monkeypatch.setattr(targets, "_amx_permitted", lambda: True)
        targets.current.cache_clear()
        list(manage.all_variants())  # imports all kernels
        for kernel in KERNELS.values():
            monkeypatch.setattr(kernel, "_functions", self._functions.setdefault(kernel.name, {}))
        monkeypatch.setattr(kernel_module, "link", self.link)
        monkeypatch.setattr(kernel_module, "load_library", self.load_library)

    def link(self, module: Any, library: Path) -> None:
        """Takes the place of `kernel.link`."""
        import tvm

        source = library.with_suffix(".ll")
        try:
            source.write_text(self.rewrite(module.inspect_source("ll")))
            self._link(tvm.runtime.load_module(str(source)), library)
        finally:
            source.unlink(missing_ok=True)  # where `rewrite` failed

    def load_library(self, library: Path) -> Any:
        """Takes the place of `kernel.load_library`."""
        module = self._load(library)

        class Checked:
            def __getitem__(_, name: str) -> Callable[..., None]:
                return self.checked(module[name])

        return Checked()

    def checked(self, function: Callable[..., None]) -> Callable[..., None]:
        """The function, which now fails if one of its instructions does."""

        def call(*arguments: Any) -> None:
            with self._lock:
                self._running += 1
            try:
                function(*arguments)
            finally:
                with self._lock:
                    self._running -= 1
                    # While others run, they have tiles configured.
                    fault = "" if self._running else self.fault()
            assert not fault, fault

        return call

    def fault(self) -> str:
        """What an instruction has failed for since the last time, or nothing."""
        text = ctypes.create_string_buffer(256)
        self.instructions.emulated_fault(text)
        return text.value.decode()

    def rewrite(self, text: str) -> str:
        """A module of LLVM's for the host instead of its target."""
        for target in targets.TARGETS:
            text = text.replace(f'"target-cpu"="{target.mcpu}"', f'"target-cpu"="{self._HOST}"')
            text = text.replace(rf"\22mcpu\22:\22{target.mcpu}\22", rf"\22mcpu\22:\22{self._HOST}\22")
        text = text.replace("x bfloat>", "x i16>")  # which carries the same bits, and which all CPUs have
        text = self._DECLARATION.sub(lambda found: self._wrapper(*found.groups()) or found[0], text)
        text = re.sub(r"@llvm\.x86\.(?!" + "|".join(map(re.escape, self._NATIVE)) + ")", "@emulated.", text)
        text = self._WORKSPACE.sub(
            lambda found: f"@emulated.{found[1]} = internal constant ptr @emulated_{found[1].lower()}", text
        )
        return re.sub(r"@__TVMBackend(Alloc|Free)Workspace\b", r"@emulated.\1", text) + (
            "declare ptr @emulated_alloc(i32, i32, i64, i32, i32)\ndeclare i32 @emulated_free(i32, i32, ptr)\n"
        )

    def _wrapper(self, result: str, name: str, parameters: str) -> str:
        """The definition of a function that takes an instruction's operands, and calls the emulator with them."""
        if name.startswith(self._NATIVE):
            return ""
        symbol = "emulated_" + name.replace(".", "_")
        assert hasattr(self.instructions, symbol), f"cpu_emulator.cpp does not know llvm.x86.{name}"
        types = [one.removesuffix(" immarg").strip() for one in parameters.split(",") if one]
        takes = ", ".join(f"{kind} %{i}" for i, kind in enumerate(types))
        lines, passed = [f"define internal {result} @emulated.{name}({takes}) {{"], []
        if result != "void":
            lines.append(f"  %result = alloca {result}, align 64")
            passed.append("ptr %result")
        for i, kind in enumerate(types):
            if kind.startswith("<"):
                lines += [f"  %place{i} = alloca {kind}, align 64", f"  store {kind} %{i}, ptr %place{i}, align 64"]
            passed.append(f"ptr %place{i}" if kind.startswith("<") else f"{kind} %{i}")
        lines.append(f"  call void @{symbol}({', '.join(passed)})")
        if result != "void":
            lines.append(f"  %value = load {result}, ptr %result, align 64")
        lines.append(f"  ret {result}{'' if result == 'void' else ' %value'}\n}}")
        declared = ", ".join(one.rpartition(" %")[0] for one in passed)
        return "\n".join([*lines, f"declare void @{symbol}({declared})"])


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> EmulatedCpu:
    """What runs kernels for other CPUs."""
    pytest.importorskip("tvm")
    if shutil.which("g++") is None or not {"avx2", "fma"} <= targets.cpu_flags():
        pytest.skip("a CPU is emulated by one with AVX2, with the help of g++")
    return EmulatedCpu(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def emulated_cpu(emulator: EmulatedCpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], CpuTarget]]:
    """Call it with a target's name to take this CPU for one of that kind."""

    def become(name: str) -> CpuTarget:
        emulator.become(targets.find(name), monkeypatch)
        return targets.current()

    yield become
    targets.current.cache_clear()


@pytest.fixture(autouse=True)
def cpu_under_test(request: pytest.FixtureRequest) -> None:
    """What `--emulated-cpu` names."""
    name = request.config.getoption("--emulated-cpu", None)
    if name:
        request.getfixturevalue("emulated_cpu")(name)


@pytest.fixture(autouse=True)
def no_twin_stands_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that cannot be used fails the test, whatever its twin computes, but for tests of just that."""
    if not request.node.get_closest_marker("twin_may_stand_in"):
        monkeypatch.setattr(kernel_module.Kernel, "decline", _refuse_to_decline)


def _refuse_to_decline(kernel: kernel_module.Kernel, reason: str) -> None:
    pytest.fail(f"kernel {kernel.name}: {reason}")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that the cache of compiled kernels lies in for the length of a test."""
    monkeypatch.setenv("SHIFTADD3D_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture(params=[1, 2])
def torch_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run with one thread and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def on_target(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Call it with a target's name to have kernels built for that one; skips if this CPU cannot run it."""

    def switch(name: str) -> None:
        if not targets.runs_here(targets.find(name)):
            pytest.skip(f"this CPU cannot run {name}")
        monkeypatch.setenv("SHIFTADD3D_TARGET", name)
        targets.current.cache_clear()

    yield switch
    targets.current.cache_clear()
