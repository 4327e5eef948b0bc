"""The tables of README.md say what the JSON files in docs/results/data say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def benchmark(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("readme")


def test_the_tables_are_what_the_results_make_of_them(benchmark, repository: Path):
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert benchmark.fill_in(text) == text, "run: python benchmarks/readme.py report"


def test_every_table_is_shown_once(benchmark, repository: Path):
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"<!-- table (\w+) -->", text)) == sorted(benchmark.TABLES)
    assert text.count("<!-- end -->") == len(benchmark.TABLES)


def test_the_prose_states_no_result_of_its_own(repository: Path):
    text = (repository / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"<!-- table \w+ -->.*?<!-- end -->|```.*?```", "", text, flags=re.DOTALL)
    assert re.findall(r"\d+\.\d+ (?:dB|times)", prose) == []


def test_the_readme_is_short(repository: Path):
    assert len((repository / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_a_mark_for_an_unknown_table_is_an_error(benchmark):
    with pytest.raises(KeyError, match="unknown"):
        benchmark.fill_in("<!-- table unknown -->\n<!-- end -->")
