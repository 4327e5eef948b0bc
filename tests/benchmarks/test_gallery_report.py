"""docs/results/gallery.md says what the JSON files beside it say, and its pictures are there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def benchmark(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("gallery")


def test_the_page_is_what_the_results_make_of_the_template(benchmark, repository: Path):
    results = repository / "docs" / "results"
    found = benchmark.read_results(results / "data")
    made = benchmark.render_report(found, (results / "gallery.template.md").read_text(encoding="utf-8"))
    assert (results / "gallery.md").read_text(encoding="utf-8") == made, "run: python benchmarks/gallery.py report"
    assert len(found) >= 3
    for picture in re.findall(r"\]\((pictures/[^)]+)\)", made):
        assert (results / picture).stat().st_size < 400_000


def test_a_view_that_is_not_there_is_one_line(benchmark, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path):
    monkeypatch.setattr("sys.argv", ["gallery.py", "draw", "--scene", "still_life", "--name", "a", "--view", "99"])
    monkeypatch.setattr(benchmark, "DATA", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert str(stopped.value).startswith("error: --view 99: still_life has ")
    assert not list(tmp_path.iterdir())
