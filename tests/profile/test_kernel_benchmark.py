"""The benchmark of kernels, on problems small enough for a test, and the ratios it makes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shiftadd3d import UserError, cli
from shiftadd3d.profile import kernel_benchmark, kernel_cases
from shiftadd3d.profile.kernel_benchmark import GOALS, goals, measure, parse_threads, ratio_table, ratios, tables
from shiftadd3d.profile.kernel_cases import BASELINE, CASES, Case, Setup, cases

pytest.importorskip("tvm")


def halves(setup: Setup) -> Iterator[Case]:
    x = torch.randn(64, 64, device=setup.device)

    def broken() -> None:
        raise RuntimeError("no such instruction\nand more")

    yield Case(
        "halves",
        "64 x 64",
        operations=64 * 64,
        bytes=8 * 64 * 64,
        ours={"by shift": lambda: x * 0.5, "wrong": lambda: x * 0.6},
        others={BASELINE: lambda: x / 2, "broken": broken},
        reference=x.double() / 2,
        inexact=frozenset({"by shift"}),
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "halves", halves)
    monkeypatch.setattr(kernel_benchmark, "product_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(kernel_benchmark, "copy_rate", lambda device: 1e9)
    monkeypatch.setattr(kernel_benchmark, "_SECONDS_A_CASE", 0.0)


def test_every_solution_is_timed_and_what_fails_is_told(quick: None):
    lines: list[str] = []
    facts = measure(threads=[1, 2], groups=["halves"], report=lines.append)
    assert lines == ["1 thread, halves 64 x 64", "2 threads, halves 64 x 64"]
    assert json.loads(json.dumps(facts)) == facts
    rows = {row["solution"]: row for row in facts["rows"] if row["threads"] == 2}
    assert rows["broken"]["failed"] == "RuntimeError: no such instruction"
    assert "seconds" not in rows["broken"]
    assert len(rows["by shift"]["seconds"]) == 3
    assert "error" not in rows["by shift"]
    assert rows["wrong"]["error"] == pytest.approx(0.2, rel=1e-2)
    text = "\n".join(map(str, tables(facts, 2)))
    assert "halves: speedup over torch float32, 2 threads" in text
    assert "broken" not in text


def test_threads_are_as_before(quick: None):
    before = torch.get_num_threads()
    measure(threads=[before + 1], groups=["halves"])
    assert torch.get_num_threads() == before


def test_a_kernel_that_gave_up_is_noted(quick: None, monkeypatch: pytest.MonkeyPatch):
    import warnings

    def giving_up(setup: Setup) -> Iterator[Case]:
        warnings.warn("kernel x: too old a CPU; plain torch stands in", RuntimeWarning, stacklevel=1)
        yield from halves(setup)

    monkeypatch.setitem(CASES, "halves", giving_up)
    assert measure(groups=["halves"])["notes"] == ["kernel x: too old a CPU; plain torch stands in"]


def test_ratios_and_means():
    rows = [
        {"group": "g", "case": case, "solution": solution, "threads": 1, "seconds": [seconds, seconds, seconds]}
        for case, solution, seconds in (
            ("a", BASELINE, 4.0),
            ("a", "x", 1.0),
            ("b", BASELINE, 1.0),
            ("b", "x", 1.0),
            ("b", "y", 2.0),
        )
    ]
    facts = {"device": "cpu", "rows": rows, "peaks": []}
    assert ratios(facts, "g", BASELINE, 1)["x"] == {"a": 4.0, "b": 1.0}
    table = ratio_table(facts, "g", 1)
    assert table.header == ["solution", "a", "b", "mean"]
    assert ["x", "4.00", "1.00", "2.00"] in table.rows
    assert ["y", "-", "0.50", "0.50"] in table.rows


def test_goals_speak_of_solutions_that_there_are(monkeypatch: pytest.MonkeyPatch):
    """Every goal names a group and two solutions of it."""
    monkeypatch.setattr(kernel_cases, "LINEAR_SHAPES", ((8, 16, 16),))
    monkeypatch.setattr(kernel_cases, "ADD_SHAPES", ((1, 1, 8, 8),))
    monkeypatch.setattr(kernel_cases, "MLP_SHAPES", ((8, 16, 32),))
    for name, value in {"MOE_TOKENS": (8,), "POINTS": 64, "RAYS": 2, "SAMPLES": 4, "CHUNK": 2}.items():
        monkeypatch.setattr(kernel_cases, name, value)
    solutions = {group: next(iter(cases(group, Setup("cpu")))) for group in CASES}
    for goal in GOALS:
        case = solutions[goal.group]
        assert goal.ours in case.ours
        assert goal.other in {**case.others, **case.ours}
    for case in solutions.values():
        for name, run in case.ours.items():
            assert run() is not None, name
        assert case.others[BASELINE]() is not None


def test_the_smallest_ratio_counts_where_all_must_be_reached_and_small_problems_do_not():
    rows = [
        {"group": "moe", "case": case, "solution": solution, "threads": 1, "seconds": [seconds] * 3}
        for case, solution, seconds in (
            ("256 x 64", BASELINE, 1.0),
            ("256 x 64", "MoE fast", 9.0),
            ("2048 x 64", BASELINE, 3.0),
            ("2048 x 64", "MoE fast", 2.0),
            ("4096 x 64", BASELINE, 6.0),
            ("4096 x 64", "MoE fast", 2.0),
        )
    ]
    (outcome,) = goals({"rows": rows}, 1)
    assert (outcome.measured, outcome.lowest, outcome.highest) == (1.5, 1.5, 3.0)
    assert outcome.is_reached


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"device": "tpu"}, "--device tpu: no such device here; expected cpu"),
        ({"threads": [0]}, "--threads 0: expected numbers of 1 or more, such as 1,2"),
        ({"groups": ["matmul"]}, "--groups matmul: expected some of matshift, matadd"),
    ],
)
def test_what_is_not_there_is_refused(arguments: dict, complaint: str):
    with pytest.raises(UserError, match=complaint):
        measure(**arguments)


def test_threads_are_read_from_text():
    assert parse_threads("1,2") == [1, 2]
    with pytest.raises(UserError, match="--threads 1;2: expected numbers of 1 or more, such as 1,2"):
        parse_threads("1;2")


def test_the_command_measures_and_writes(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "facts.json"
    assert cli.main(["bench", "kernels", "--groups", "halves", "--json", str(file)]) == 0
    assert "by shift" in capsys.readouterr().out
    assert {row["solution"] for row in json.loads(file.read_text())["rows"]} == {
        "by shift",
        "wrong",
        BASELINE,
        "broken",
    }
    assert cli.main(["bench", "kernels", "--groups", "matmul"]) == 1


def test_an_interrupted_run_keeps_what_it_has_measured(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
):
    def interrupted(setup: Setup) -> Iterator[Case]:
        def interrupt() -> None:
            raise KeyboardInterrupt

        (case,) = halves(setup)
        yield case
        yield replace(case, name="larger", ours={"by shift": interrupt})

    monkeypatch.setitem(CASES, "halves", interrupted)
    file = tmp_path / "facts.json"
    assert cli.main(["bench", "kernels", "--groups", "halves", "--json", str(file)]) == 130
    assert {row["case"] for row in json.loads(file.read_text())["rows"]} == {"64 x 64"}
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_rivals_that_take_too_long_are_called_twice_and_no_more(quick: None, monkeypatch: pytest.MonkeyPatch):
    """On a clock that calls alone move: torch's and ours take as long, the first call of a third one compiles."""
    clock, calls = SimpleNamespace(now=0.0), Counter[str]()

    def taking(name: str, *seconds: float) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            clock.now += seconds[min(calls[name], len(seconds) - 1)]
            calls[name] += 1
            return torch.ones(1)

        return run

    others = {BASELINE: taking(BASELINE, 21), "slow": taking("slow", 21), "compiled": taking("compiled", 90, 1)}
    case = Case("g", "1", None, 4, ours={"ours": taking("ours", 21)}, others=others)
    monkeypatch.setattr(kernel_benchmark, "time", SimpleNamespace(monotonic=lambda: clock.now))
    rows = {row["solution"]: row for row in kernel_benchmark.measure_case(case, "cpu")}
    assert rows["slow"]["failed"] == "TimeoutError: a call takes 21 s, and 20 s is the most for a rival"
    assert calls["slow"] == 2
    assert all("seconds" in rows[name] for name in (BASELINE, "compiled", "ours"))


def test_it_needs_torch_and_tvm_only(repository: Path):
    """Bare machines with a GPU have no tyro, no rich, no nerfstudio and no timm."""
    code = """
import sys
for name in ("tyro", "rich", "nerfstudio", "timm", "matplotlib", "psutil", "imageio", "sklearn"):
    sys.modules[name] = None
sys.path.insert(0, "benchmarks")
import kernels
from shiftadd3d.profile.kernel_benchmark import measure
from shiftadd3d.profile.kernel_cases import Setup, cases
next(cases("matadd", Setup("cpu")))
"""
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True)
