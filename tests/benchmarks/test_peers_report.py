"""docs/results/peers.md says what data/peers-*.json say."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def benchmark(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("peers")


def test_the_page_is_what_the_results_make_of_the_template(benchmark, repository: Path):
    folder = repository / "docs" / "results"
    made = benchmark.render_report(
        benchmark.read_results(folder / "data"), (folder / "peers.template.md").read_text(encoding="utf-8")
    )
    assert (folder / "peers.md").read_text(encoding="utf-8") == made, "run: python benchmarks/peers.py report"


def test_each_kind_of_machine_has_its_tables(benchmark, repository: Path):
    results = benchmark.read_results(repository / "docs" / "results" / "data")
    page = benchmark.render_report(results, "{{SUMMARY}}{{TABLES}}{{COMMANDS}}{{MACHINES}}")
    assert len(results) > 1
    for facts in results:
        assert page.count(f"**`{facts['instructions']}`**, {facts['machine']['cpu']}\n") == 2
        assert facts["command"] in page
        for row in facts["rows"]:
            assert benchmark.full_table(row) in page


def test_what_no_machine_has_measured_is_said_so(benchmark):
    assert benchmark.render_report([], "{{SUMMARY}} {{TABLES}}") == " ".join(2 * ["*Not measured yet.*"])


def test_ratios_are_against_the_fastest_of_the_others(benchmark):
    ms = {"torch, float32, eager": 30.0, "OpenVINO, f32": 20.0, "OpenVINO, NNCF int8, f32": 12.0}
    ms |= {"shiftadd3d, add+shift, int8": 6.0, "shiftadd3d, add+shift, exact": 16.0, "shiftadd3d, add, exact": 1.0}
    table = benchmark.summary_table([{"model": "m", "batch": 1, "threads": 2, "ms": ms}])
    assert "| m, 1, 2 | 6.0 | 5.00 | 2.00 (OpenVINO, NNCF int8, f32) | 16.0 | 1.25 |" in table


@pytest.mark.skipif(
    importlib.util.find_spec("openvino") is not None, reason="says what is missing only where it is missing"
)
def test_what_is_missing_is_one_line(benchmark, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["peers.py", "run"])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert str(stopped.value) == "error: openvino, nncf: not installed; expected what `make peers` brings"
