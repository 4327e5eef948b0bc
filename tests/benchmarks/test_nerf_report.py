"""docs/results/nerf.md says what the measurements say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

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


@pytest.mark.slow
def test_the_speed_of_a_frame_is_measured_and_shown(nerf: ModuleType, tmp_path: Path):
    pytest.importorskip("nerfstudio")
    before = torch.get_num_threads()
    nerf.Speed(forms=("torch", "exact"), frame=(40, 32), seconds=0.1, out=tmp_path)()
    torch.set_num_threads(before)
    results = nerf.read_results(tmp_path)
    (facts,) = results["speed"]
    assert [(row["method"], row["form"]) for row in facts["rows"]] == [
        (method, form) for method in ("gnt-tiny", "shiftadd-gnt-tiny") for form in ("torch", "exact")
    ]
    dense, exact = (facts["rows"][number]["seconds"][0] for number in (0, 3))
    assert f"{dense / exact:.2f}" in nerf.speed_table(results["speed"])


def test_every_form_of_a_frame_shows_the_same_picture(nerf: ModuleType):
    pytest.importorskip("nerfstudio")
    for method in ("gnt-tiny", "shiftadd-gnt-tiny"):
        plain, exact, fast = (nerf.frame_renderer(method, form, 40, 32)()["rgb"] for form in ("torch", "exact", "fast"))
        torch.testing.assert_close(exact, plain, rtol=0, atol=1e-4)
        torch.testing.assert_close(fast, plain, rtol=0, atol=2e-2)
