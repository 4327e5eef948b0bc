"""docs/results/classification.md says what the measurements say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def classification(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("classification")


def made_up(recipe: str, seed: int, top1: float, **facts: object) -> dict:
    """A result as `train` writes it, less what no table shows."""
    return {
        "data": "digits",
        "pictures": {"train": 90, "val": 10},
        "classes": 10,
        "model": "deit",
        "architecture": "deit_tiny_patch16_224",
        "model_args": ["depth=3"],
        "image_size": 16,
        "recipe": recipe,
        "seed": seed,
        "epochs": [3, 2, 1],
        "top1": top1,
        "loss": 0.5,
        "mult_share": 0.25 if "moe" in recipe else None,
        "multiplications_removed": 0.0 if recipe == "mult" else 0.5,
        "bytes": 2_000_000,
        "machine": {"cpu": "a cpu", "cores": 2, "device": "cpu", "python": "3.11", "torch": "2.9"},
        "commit": "abc",
        "command": "python benchmarks/classification.py train",
        **facts,
    }


def test_the_committed_report_is_what_the_committed_measurements_make(classification: ModuleType):
    results = classification.read_results(RESULTS / "data")
    template = (RESULTS / "classification.template.md").read_text(encoding="utf-8")
    assert (RESULTS / "classification.md").read_text(encoding="utf-8") == classification.render_report(
        results, template, classification.read_speeds(RESULTS / "data"), classification.read_roundings(RESULTS / "data")
    ), "run `python benchmarks/classification.py report`"


def test_the_template_states_no_result_of_its_own():
    """Decimal numbers are results, and those come from the JSON files."""
    template = (RESULTS / "classification.template.md").read_text(encoding="utf-8")
    assert re.findall(r"\d+\.\d+", template) == []


def test_measurements_name_no_place_on_a_machine():
    for path in sorted((RESULTS / "data").glob("*.json")):
        if not path.name.startswith(("classification-", "rounding-")):
            continue
        command = json.loads(path.read_text(encoding="utf-8"))["command"]
        assert re.match(r"python benchmarks/classification\.py (train|rounding|speed) ", command), path.name
        assert " /" not in command, path.name


def test_rows_are_means_over_seeds_and_differences_are_within_a_seed(classification: ModuleType):
    results = [
        made_up(recipe, seed, top1)
        for recipe, tops in {"mult": (0.8, 0.9), "add+shift": (0.79, 0.87), "moe": (0.80, 0.91)}.items()
        for seed, top1 in enumerate(tops)
    ]
    text = classification.accuracy_tables(results)
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines()[2:5]
    }
    assert rows["`mult` (dense)"][:2] == ["85.0 ± 7.1", ""]
    assert rows["`add+shift`"][:2] == ["83.0 ± 5.7", "-2.0 ± 1.4"]
    assert rows["`moe`"] == ["85.5 ± 7.8", "+0.5 ± 0.7", "0.500 ± 0.000", "2", "50.0%", "2.00", "25%"]
    assert "Best: `moe`, +0.5 points against dense." in text
    assert "Mixtures against `add+shift`: `moe` +2.5 ± 2.1 points and +0.000 ± 0.000 loss." in text


def test_verdicts_compare_within_the_seeds_that_both_have(classification: ModuleType):
    results = [
        made_up(*run)
        for run in (("mult", 0, 0.8), ("add+shift", 0, 0.5), ("add+shift", 1, 0.9), ("moe", 0, 0.6), ("add", 2, 1.0))
    ]
    text = classification.accuracy_tables(results)
    assert "Best: `moe`, -20.0 points against dense. Mixtures against `add+shift`: `moe` +10.0 points" in text


def test_coarser_codes_have_tables_of_their_own(classification: ModuleType):
    results = [
        made_up("mult", 0, 0.8),
        made_up("add+shift", 0, 0.78),
        made_up("add+shift", 0, 0.7, bits=2),
        made_up("moe", 0, 0.75, bits=2),
    ]
    coarse = classification.coarse_tables(results)
    assert "| digits, deit, 2 bits |" in coarse and "| `add+shift` | 70.0 | -10.0 |" in coarse
    assert "Mixtures against `add+shift`: `moe` +5.0 points" in coarse
    page = classification.render_report(results, "{{accuracy}}")
    assert "| `add+shift` | 78.0 | -2.0 |" in page and "70.0" not in page
    assert classification.coarse_tables(results[:2]) == classification.NOT_MEASURED


def test_recipes_without_shifts_have_no_bits(classification: ModuleType, tmp_path: Path):
    from shiftadd3d import UserError

    with pytest.raises(UserError, match="--bits 2: recipe 'add' has no shifts"):
        classification.Train(recipe="add", bits=2, out=tmp_path)()


def test_cells_come_in_the_order_of_the_report(classification: ModuleType, tmp_path: Path):
    for recipe, seed in (("moe", 1), ("moe", 0), ("mult", 0)):
        path = classification.result_path(tmp_path, "digits", "deit", recipe, seed)
        path.write_text(json.dumps(made_up(recipe, seed, 0.5)))
    assert [(facts["recipe"], facts["seed"]) for facts in classification.read_results(tmp_path)] == [
        ("mult", 0),
        ("moe", 0),
        ("moe", 1),
    ]


def test_pictures_are_found_by_the_variable(
    classification: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from shiftadd3d import UserError

    assert classification.find_pictures("digits") is None
    monkeypatch.setenv("SHIFTADD3D_PICTURES", str(tmp_path))
    with pytest.raises(UserError, match=r"--data grocery_fruit: no grocery_fruit in a folder that \$"):
        classification.find_pictures("grocery_fruit")
    (tmp_path / "grocery_fruit").mkdir()
    assert classification.find_pictures("grocery_fruit") == tmp_path / "grocery_fruit"


def test_speeds_are_compared_with_each_of_timms(classification: ModuleType):
    ms = {**dict(zip(classification.BASELINES.values(), (30.0, 25.0, 20.0, 15.0), strict=True)), "shiftadd, moe": 10.0}
    operations = [{"name": "shiftadd3d::matshift", "share": 0.75, "calls": 48}]
    row = {"model": "pvt_v2_b0", "batch": 32, "ms": ms, "breakdown": {"shiftadd, moe": operations}}
    last = classification.speed_table({"rows": [row]}).splitlines()[-1]
    assert last == "| pvt_v2_b0, batch 32: shiftadd, moe | 10.0 | 3.00 | 2.50 | 2.00 | 1.50 |"
    assert "| `shiftadd3d::matshift` | 75.0% | 48 |" in classification.breakdown_tables({"rows": [row]})
    assert classification.speed_table(None) == classification.NOT_MEASURED


def test_a_measurement_with_memory_kept_has_a_file_of_its_own(
    classification: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    begun, written = [], []
    monkeypatch.setattr(classification, "start_again_keeping_memory", lambda: begun.append(True))
    monkeypatch.setattr(classification.Speed, "_measure", lambda self, model, batch: {})
    monkeypatch.setattr(classification, "write_result", lambda path, facts: written.append((path.name, facts)))
    classification.Speed(keep_memory=True)()
    ((name, facts),) = written
    assert begun == [True] and name == classification.SPEED_FILES[True] and "--keep-memory" in facts["command"]


@pytest.mark.slow
def test_a_cell_is_measured_and_shown(classification: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from dataclasses import replace

    from shiftadd3d.vision.settings import StageSettings

    one = StageSettings(epochs=1, lr=1e-3)
    short = replace(classification.EXPERIMENTS["digits", "deit"], stage0=one, stage1=one, stage2=one)
    monkeypatch.setitem(classification.EXPERIMENTS, ("digits", "deit"), short)
    monkeypatch.setattr(classification, "OUTPUTS", tmp_path)
    classification.All(("digits",), ("deit",), ("mult", "moe"), (0,), out=tmp_path)()
    results = classification.read_results(tmp_path)
    assert [facts["recipe"] for facts in results] == ["mult", "moe"]
    dense, mixed = results
    assert len(dense["history"]) == 2 and len(mixed["history"]) == 1
    assert dense["start"] == mixed["start"]
    assert dense["multiplications_removed"] == 0.0 < mixed["multiplications_removed"] < 1.0
    assert 0 < mixed["mult_share"] < 1
    template = (RESULTS / "classification.template.md").read_text(encoding="utf-8")
    assert f"{100 * mixed['top1']:.1f}" in classification.render_report(results, template)


def test_rounding_is_shown_in_points_and_pictures(classification: ModuleType):
    facts = made_up("add+shift", 0, 0.5) | {"pictures": 200, "top1": {"exact": 0.75, "fast": 0.75, "int8": 0.74}}
    assert classification.rounding_table([facts]).splitlines()[-1].endswith("| 200 | 75.00 | +0.00 (+0) | -1.00 (-2) |")
    assert classification.rounding_table([]) == classification.NOT_MEASURED


def test_rounding_needs_a_trained_model(classification: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(classification, "OUTPUTS", tmp_path)
    with pytest.raises(classification.UserError, match=r"run `python benchmarks/classification\.py train`"):
        classification.Rounding(out=tmp_path)()
