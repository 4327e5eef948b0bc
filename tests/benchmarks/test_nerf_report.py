"""docs/results/nerf.md says what the measurements say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "results"


@pytest.fixture(scope="module")
def nerf(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("nerf")


def test_the_committed_report_is_what_the_committed_measurements_make(nerf: ModuleType):
    results = nerf.read_results(RESULTS / "data")
    template = (RESULTS / "nerf.template.md").read_text(encoding="utf-8")
    assert (RESULTS / "nerf.md").read_text(encoding="utf-8") == nerf.render_report(results, template), (
        "run `python benchmarks/nerf.py report`"
    )


def test_the_template_states_no_result_of_its_own():
    """Decimal numbers are results, and those come from the JSON files."""
    template = (RESULTS / "nerf.template.md").read_text(encoding="utf-8")
    assert re.findall(r"\d+\.\d+", template) == []


def test_every_picture_that_the_report_shows_is_there():
    text = (RESULTS / "nerf.md").read_text(encoding="utf-8")
    missing = [name for name in re.findall(r"\]\((pictures/[^)]+)\)", text) if not (RESULTS / name).is_file()]
    assert missing == []


def test_measurements_name_no_place_on_a_machine():
    for path in sorted((RESULTS / "data").glob("nerf-*.json")):
        command = json.loads(path.read_text(encoding="utf-8"))["command"]
        assert command.startswith("python benchmarks/nerf.py ") and " /" not in command, path.name
