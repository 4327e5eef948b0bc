"""The check for GPUs: packed here, and run as far as a CPU goes, where nothing but torch and timm is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from shiftadd3d import UserError
from shiftadd3d.kernels import manage
from shiftadd3d.kernels.cuda import driver
from shiftadd3d.kernels.cuda.driver import CUDA_KERNELS
from shiftadd3d.profile import kernel_benchmark
from shiftadd3d.profile.kernel_cases import BASELINE, Case, Setup

pytest.importorskip("tvm")
pytest.importorskip("timm")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# What a bare machine with a GPU does not have.
LACKING = ("tvm", "apache_tvm", "nerfstudio", "tyro", "platformdirs", "torchao", "shiftadd3d", "__editable__")
IN_A_PROCESS_OF_THEIR_OWN = ("machine", "kernels", "matshift", "deit")
IN_THIS_PROCESS = ("matadd", "view-attention", "gnt", "moe", "mlp", "pvt", "gather")


@pytest.fixture(scope="module")
def check(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("gpu_check")


@pytest.fixture(scope="module")
def few_kernels() -> Any:
    """Of every CUDA kernel one variant, which nvcc is not asked for."""
    list(manage.all_variants(target="cuda-sm_90"))  # imports all of them
    with pytest.MonkeyPatch.context() as patch:
        for kernel in CUDA_KERNELS.values():
            patch.setattr(kernel, "variants", lambda target, make=kernel.variants: list(make(target))[:1])
        patch.setattr(driver, "assemble", lambda source, arch: (b"\x7fELF", driver.Resources(32, 0, 0)))
        yield


@pytest.fixture(scope="module")
def packed(check: ModuleType, few_kernels: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zip file, made with an empty cache."""
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHIFTADD3D_CACHE", str(folder / "cache"))
        patch.syspath_prepend(BENCHMARKS)
        patch.setattr(sys, "argv", ["gpu_check.py", "pack", "--out", str(folder / "check.zip")])
        check.main()
    return folder / "check.zip"


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """A Python that has the packages of this one but for those that a bare machine lacks, and its environment."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "python", with_pip=False)
    packages = folder / "packages"
    packages.mkdir()
    for place in Path(sysconfig.get_path("purelib")).iterdir():
        if not place.name.startswith(LACKING):
            (packages / place.name).symlink_to(place)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SHIFTADD3D", "PYTHON"))}
    return str(folder / "python" / "bin" / "python"), environment | {"PYTHONPATH": str(packages)}


@pytest.mark.slow
def test_what_is_packed_runs_where_there_is_neither_tvm_nor_nerfstudio(
    packed: Path, bare_python: tuple[str, dict[str, str]], tmp_path: Path
):
    python, environment = bare_python
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path / "check")
    command = [python, str(tmp_path / "check" / "gpu_check.py"), "run", "--dry-run", "--out", "found/results.json"]
    command += ["--sections", ",".join(IN_A_PROCESS_OF_THEIR_OWN)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "found" / "results.json").read_text())
    sections = results["sections"]
    assert tuple(sections) == IN_A_PROCESS_OF_THEIR_OWN
    assert not any({"cut", "failed"} & facts.keys() for facts in sections.values())
    (machine,) = sections["machine"]["rows"]
    assert machine["missing"] == ["tvm", "tvm_ffi", "nerfstudio", "tyro"]
    opened = [row["kernel"] for row in sections["kernels"]["rows"] if row.get("outcome") == "opened, not run"]
    assert sorted(opened) == sorted(CUDA_KERNELS)
    others = [row for row in sections["kernels"]["rows"] if "outcome" not in row]
    assert others
    assert all("No module named 'tvm'" in row["failed"] for row in others)
    for name, solution in (("matshift", "MatShift fast, float16"), ("deit", "add+shift exact")):
        rows = {row["solution"]: row for row in sections[name]["rows"]}
        assert len(rows[solution]["seconds"]) == 3
        assert rows[solution]["error"] < 1e-2
    assert "speedup over torch float32" in done.stdout
    assert "failed: " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_THIS_PROCESS)
def test_each_section_has_problems_that_all_solve(name: str, check: ModuleType, tmp_path: Path):
    check.work(name, "sm_90", dry=True, after=0, seconds=600, file=tmp_path / "rows")
    facts: dict[str, Any] = {"rows": [], "notes": []}
    assert check.collect(tmp_path / "rows", facts, broken="") == 0
    assert [row for row in facts["rows"] if "failed" in row] == []
    solutions = {row["solution"]: row for row in facts["rows"]}
    assert {BASELINE, "torch.compile float32"} <= solutions.keys()
    assert any(row["ours"] for row in solutions.values())
    assert any("float16" in solution for solution in solutions) or name == "gather"


def test_every_section_is_tried(check: ModuleType):
    assert {*IN_A_PROCESS_OF_THEIR_OWN, *IN_THIS_PROCESS} == set(check.SECTIONS)


def test_more_than_fits_is_refused(check: ModuleType, packed: Path, few_kernels: None, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SHIFTADD3D_CACHE", str(packed.parent / "cache"))
    monkeypatch.syspath_prepend(BENCHMARKS)
    with pytest.raises(UserError, match=r"more would have \d\.\d MiB, more than the 0\.1 MiB that it may have"):
        check.pack(tmp_path / "more", "sm_90", most_bytes=100_000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["pack", "--out", "there"], "there exists already: name a new folder or zip file"),
        (["pack", "--out", "new", "--arch", "sm_1"], "no target 'cuda-sm_1': expected one of"),
        (["run", "--dry-run"], "a dry run is one of what `pack` made: run the gpu_check.py in there"),
        (["run", "--sections", "speed"], "no section 'speed': expected some of machine, kernels"),
        pytest.param(
            ["run"],
            "there is no GPU here that torch can use (--dry-run does what a CPU can do)",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(check, words: list[str], complaint: str, tmp_path: Path, monkeypatch):
    (tmp_path / "there").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words])
    with pytest.raises(SystemExit) as stopped:
        check.main()
    assert str(stopped.value).startswith(f"error: {complaint}")
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


def test_kernels_of_another_gpu_are_refused(check: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert check.check_machine({"arch": "sm_80"}, dry=False) == "sm_80"
    with pytest.raises(UserError, match="packed for sm_90, and this GPU is sm_80: pack them with --arch sm_80"):
        check.check_machine({"arch": "sm_90"}, dry=False)


class Worker:
    """Takes the place of `subprocess.run`: writes what a process would, and ends as one would."""

    def __init__(self, *lives: tuple[list[dict[str, Any]], int | None]) -> None:
        self.lives, self.commands = list(lives), []

    def __call__(self, command: list[str], timeout: float, **options: Any) -> SimpleNamespace:
        self.commands.append(command)
        lines, status = self.lives.pop(0)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        Path(command[command.index("--file") + 1]).write_text(text + '{"half')
        if status is None:
            raise subprocess.TimeoutExpired(command, timeout)
        options["stderr"].write("a\nCUDA error: misaligned address\n")
        return SimpleNamespace(returncode=status)


def began(number: int) -> dict[str, Any]:
    return {"number": number, "job": f"job {number}"}


def ended(number: int, *notes: str) -> dict[str, Any]:
    return {"number": number, "rows": [{"case": f"job {number}"}], "notes": list(notes)}


def section_of(check: ModuleType, worker: Worker, folder: Path, monkeypatch: Any, seconds: float = 60) -> Any:
    monkeypatch.setattr(subprocess, "run", worker)
    return check.run_section("mlp", "sm_90", False, seconds, folder, {})


def test_what_breaks_the_device_takes_nothing_along(check: ModuleType, tmp_path: Path, monkeypatch):
    worker = Worker(([began(0), ended(0, "kernel x: off"), began(1)], -6), ([began(2), ended(2, "kernel x: off")], 0))
    facts = section_of(check, worker, tmp_path, monkeypatch)
    failed = "exit status -6: CUDA error: misaligned address"
    assert facts["rows"] == [{"case": "job 0"}, {"case": "job 1", "failed": failed}, {"case": "job 2"}]
    assert facts["notes"] == ["kernel x: off"]
    after = [command[command.index("--after") + 1] for command in worker.commands]
    assert after == ["0", "2"]
    assert "3 rows, 1 failed" in check.summary(facts)


def test_a_device_that_broke_after_its_job_gets_another_process(check: ModuleType, tmp_path: Path, monkeypatch):
    facts = section_of(check, Worker(([began(0), ended(0)], 1), ([], 0)), tmp_path, monkeypatch)
    assert facts["rows"] == [{"case": "job 0"}]


def test_what_hangs_is_stopped_and_told(check: ModuleType, tmp_path: Path, monkeypatch):
    facts = section_of(check, Worker(([began(0)], None), ([began(1), {"cut": "job 2"}], 0)), tmp_path, monkeypatch)
    assert facts["rows"][0] == {"case": "job 0", "failed": "stopped: it took too long"}
    assert facts["cut"] == "no time left from job 2 on"


def test_a_process_that_does_not_begin_is_not_started_again(check: ModuleType, tmp_path: Path, monkeypatch):
    facts = section_of(check, Worker(([], 1)), tmp_path, monkeypatch)
    assert facts["failed"] == "exit status 1: CUDA error: misaligned address"


def test_a_section_without_time_is_dropped_and_says_so(check: ModuleType, tmp_path: Path, monkeypatch):
    facts = section_of(check, Worker(), tmp_path, monkeypatch, seconds=0.5)
    assert facts["cut"] == "no time left"
    assert "no time left" in check.summary(facts)


def test_no_job_begins_after_the_end(check: ModuleType, tmp_path: Path):
    check.work("matadd", "sm_90", dry=True, after=0, seconds=-1.0, file=tmp_path / "rows")
    assert json.loads((tmp_path / "rows").read_text()) == {"cut": "1 x 2 x 9 x 8"}


def test_every_solution_comes_as_a_graph_too(check: ModuleType, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    class Graph:
        def __enter__(self) -> None:
            calls.append("capture")

        def __exit__(self, *_: object) -> None:
            calls.append("end")

        def replay(self) -> None:
            calls.append("replay")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)

    def solve() -> int:
        calls.append("solve")
        return 7

    case = check.with_graphs(Case("g", "c", None, 1, {"ours": solve}, {BASELINE: solve}, inexact=frozenset({"ours"})))
    assert list(case.others) == [BASELINE, f"{BASELINE}, CUDA graph"]
    assert case.inexact == {"ours", "ours, CUDA graph"}
    assert [case.ours["ours, CUDA graph"]() for _ in range(2)] == [7, 7]
    assert calls == ["capture", "solve", "end", "replay", "replay"]


def test_a_gpu_without_bfloat16_is_measured_in_float16(check: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert check.setup_of(check.SECTIONS["mlp"], dry=False).narrow == (torch.float16,)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    setup = check.setup_of(check.SECTIONS["mlp"], dry=False)
    assert isinstance(setup, Setup)
    assert (setup.device, setup.narrow) == ("cuda", (torch.bfloat16, torch.float16))


def test_peak_memory_is_what_a_call_adds(monkeypatch: pytest.MonkeyPatch):
    held = {"now": 100, "most": 500}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(most=held["now"]))
    assert kernel_benchmark.peak_bytes(lambda: held.update(most=130)) == 30
