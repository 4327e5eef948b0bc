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
        assert re.match(r"python benchmarks/(nerf|film)\.py ", command) and " /" not in command, path.name


def test_runs_from_random_weights_have_rows_of_their_own(nerf: ModuleType):
    shared = {"scene": "chair", "method": "gnt-tiny", "image_size": [9, 9], "minutes": 3.0}
    warm = {**shared, "warm_start": "pretrained", "psnr": 31.0, "ssim": 0.97}
    warm["at"] = [{"minutes": 0.0, "psnr": 28.5, "ssim": 0.93}, {"minutes": 1.0, "psnr": 30.25, "ssim": 0.95}]
    cold = {**shared, "warm_start": "none", "psnr": 29.0, "ssim": 0.94, "at": []}
    quality = nerf.quality_table([cold, warm], [])
    assert [line for line in quality.splitlines() if "gnt" in line] == [
        "| `gnt-tiny` | 31.00 / 0.970 |",
        "| `gnt-tiny`, from random weights | 29.00 / 0.940 |",
    ]
    (row,) = [line for line in nerf.progress_table([cold, warm]).splitlines() if "gnt" in line]
    assert row == "| chair, `gnt-tiny` | 28.50 / 0.930 | 30.25 / 0.950 | 31.00 / 0.970 |"
    assert "gnt" not in nerf.progress_table([cold])
    kept = {
        **warm,
        "against_overfitting": {"judged_views": 0, "average_weights": 0.995, "spare_source_views": 4},
        "psnr": 31.5,
    }
    table = nerf.quality_table([warm, kept], [])
    assert "| `gnt-tiny` | 31.00 / 0.970 |" in table
    assert "| `gnt-tiny`, 0 judged views, averaged (0.995) | 31.50 / 0.970 |" in table


@pytest.mark.slow
def test_a_run_is_measured_on_the_way_off_the_clock(nerf: ModuleType, tmp_path: Path):
    pytest.importorskip("nerfstudio")
    before = torch.get_num_threads()
    nerf.Train(method="gnt-tiny", scene="still_life", max_side=64, minutes=0.02, at=(0.0,), rays=32, out=tmp_path)()
    torch.set_num_threads(before)
    (facts,) = nerf.read_results(tmp_path)["train"]
    assert facts["warm_start"] == "pretrained" and "--warm-start pretrained --at 0" in facts["command"]
    (start,) = facts["at"]
    assert start["minutes"] == 0 and start["psnr"] > 20
    assert facts["steps"] >= 1


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
