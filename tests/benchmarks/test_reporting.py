"""What benchmarks share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import pytest

from shiftadd3d._errors import UserError


@pytest.fixture(scope="module")
def reporting(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("reporting")


class Replaced(Exception):
    """Where this process would end, and another one begin."""


def test_memory_is_kept_from_the_start_of_a_process(reporting: ModuleType, monkeypatch: pytest.MonkeyPatch):
    def execve(program: str, arguments: list[str], environment: dict[str, str]) -> None:
        assert (program, arguments) == (sys.executable, [sys.executable, *sys.argv])
        assert environment.items() >= {"KEPT": "1", **reporting.KEEP_MEMORY}.items()
        raise Replaced

    monkeypatch.setattr(reporting.os, "execve", execve)
    monkeypatch.setenv("KEPT", "1")
    for name in reporting.KEEP_MEMORY:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Replaced):
        reporting.start_again_keeping_memory()
    for name, value in reporting.KEEP_MEMORY.items():
        monkeypatch.setenv(name, value)
    reporting.start_again_keeping_memory()  # it goes on, and does not raise


@pytest.fixture
def code(reporting: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the code that is measured."""
    monkeypatch.setattr(reporting, "REPOSITORY", tmp_path)
    path = tmp_path / "kernels" / "cpu" / "op.py"
    path.parent.mkdir(parents=True)
    path.write_text("x = 1\n")
    return path


def test_results_of_the_code_of_today_are_shown(reporting: ModuleType, code: Path, tmp_path: Path):
    result = tmp_path / "speed.json"
    facts = {"commit": "abc", "command": "python benchmarks/nerf.py speed"}
    result.write_text(json.dumps(facts | {"code": reporting.code_digest()}))
    reporting.refuse_old([result, tmp_path / "not-measured.json"])


@pytest.mark.parametrize("change", ["edit", "rename", "no digest"])
def test_results_of_other_code_are_refused(reporting: ModuleType, code: Path, tmp_path: Path, change: str):
    result = tmp_path / "speed.json"
    facts = {"commit": "abc", "command": "python benchmarks/nerf.py speed", "code": reporting.code_digest()}
    if change == "edit":
        code.write_text("x = 2\n")
    elif change == "rename":
        code.rename(code.with_name("other.py"))
    else:
        del facts["code"]
    result.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"(?s)expected new measurements, or --old.*speed.json \(commit abc\): python"):
        reporting.refuse_old([result])


def test_results_outlive_a_change_of_prose(reporting: ModuleType, code: Path):
    before = reporting.code_digest()
    code.write_text('"""What the module is for."""\n\n# Why.\nx = 1  # here, too\n"""What x is.\n\nAnd more.\n"""\n')
    assert reporting.code_digest() == before


def test_strings_that_are_code_are_no_prose(reporting: ModuleType):
    source = 'def f():\n    """What it gives."""\n    return "# no comment"\n'
    assert reporting.without_prose(source) == 'def f():\n    return "# no comment"'


@pytest.mark.parametrize("name", ["nerf", "classification", "peers"])
def test_reports_refuse_old_results(load_benchmark, name: str, monkeypatch: pytest.MonkeyPatch):
    """With --old, and not without."""
    benchmark, pages = load_benchmark(name), []

    def refuse(paths: Iterable[Path]) -> None:
        assert list(paths)
        raise UserError("old")

    monkeypatch.setattr(benchmark, "refuse_old", refuse)
    monkeypatch.setattr(benchmark, "write_page", lambda name, fill_in: pages.append(name))
    monkeypatch.setattr(benchmark, "plot_memory", lambda *_: None, raising=False)
    with pytest.raises(UserError, match="old"):
        benchmark.Report()()
    assert pages == []
    benchmark.Report(old=True)()
    assert pages == [name]
