"""docs/results/kernels.md says what the measurements say."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def benchmark(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("kernels")


def test_the_committed_report_is_what_the_committed_measurements_make(benchmark: ModuleType):
    template = (RESULTS / "kernels.template.md").read_text(encoding="utf-8")
    made = benchmark.render_report(benchmark.read_results(RESULTS / "data"), template)
    assert (RESULTS / "kernels.md").read_text(encoding="utf-8") == made, "run `python benchmarks/kernels.py report`"
    assert "{{" not in made


def test_the_template_states_no_result_of_its_own():
    """Decimal numbers are results, and those come from the JSON files."""
    template = (RESULTS / "kernels.template.md").read_text(encoding="utf-8")
    assert re.findall(r"\d+\.\d+", template) == []


def test_measurements_name_no_place_on_a_machine(benchmark: ModuleType):
    for facts in benchmark.read_results(RESULTS / "data"):
        assert facts["command"].startswith("python benchmarks/kernels.py ")
        assert " /" not in facts["command"]
        assert all("/" not in row.get("failed", "") for row in facts["rows"])


def test_every_chart_that_is_shown_is_there(benchmark: ModuleType):
    for facts in benchmark.read_results(RESULTS / "data"):
        assert (RESULTS / "pictures" / f"kernels-{facts['device']}-{facts['target']}.png").is_file()


def test_no_results_at_all_make_a_report(benchmark: ModuleType):
    template = (RESULTS / "kernels.template.md").read_text(encoding="utf-8")
    assert benchmark.NOT_MEASURED in benchmark.render_report([], template)


def row(solution: str, seconds: float, *, ours: bool = False, **facts: object) -> dict[str, object]:
    times = {"seconds": [seconds, seconds * 0.9, seconds * 1.1]}
    return {
        "threads": 1,
        "group": "matshift",
        "case": "8 x 8 x 8",
        "solution": solution,
        "ours": ours,
        "operations": 1024,
        "bytes": 512,
        **times,
        **facts,
    }


FACTS = {
    "device": "cpu",
    "target": "avx2",
    "machine": {"cpu": "a CPU", "cores": 2, "device": "cpu", "python": "3.11", "torch": "2.4"},
    "commit": "abc",
    "command": "python benchmarks/kernels.py",
    "date": "2026-01-01",
    "load": [0.1, 1.0],
    "peaks": [{"threads": 1, "float32": 1e9, "bfloat16": 2e9, "bytes": 1e9}],
    "rows": [row("torch float32", 4e-6), row("MatShift fast", 2e-6, ours=True, error=1e-3)],
    "notes": [],
    "starts": {"first call": [0.01, 0.02, 0.03]},
}


def test_a_report_holds_ratios_rates_goals_and_what_failed(benchmark: ModuleType):
    facts = copy.deepcopy(FACTS)
    facts["rows"].append({**row("torch int8 dynamic", 1.0), "failed": "ImportError: no such thing"})
    del facts["rows"][-1]["seconds"]
    slots = ("goals", "ratios", "times", "peaks", "starts", "notes")
    text = benchmark.render_report([facts], "\n".join(f"{{{{{slot}}}}}" for slot in slots))
    assert "| MatShift fast | 2.00 | 2.00 |" in text
    assert "| MatShift fast, float32 in and out | torch float32 | 5.0 | 2.00 | 2.00 to 2.00 | no |" in text
    assert "| 8 x 8 x 8, MatShift fast | 2 | 2 to 2 | 0.5 | 51% | 26% | 1.0e-03 |" in text
    assert "| first call | 20.0 | 10.0 to 30.0 |" in text
    assert "torch int8 dynamic (matshift) failed: `ImportError: no such thing`" in text


def test_the_chart_shows_every_solution(benchmark: ModuleType, tmp_path: Path):
    benchmark.draw_chart(FACTS, tmp_path / "pictures" / "chart.png")
    assert (tmp_path / "pictures" / "chart.png").stat().st_size > 5000
