"""docs/results/layers.md says what the measurements say, and the measurements reach what they must."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "results"


@pytest.fixture(scope="module")
def layers() -> ModuleType:
    """benchmarks/layers.py, which is a script and no package."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")  # as when it is run
    spec = importlib.util.spec_from_file_location("benchmarks_layers", REPOSITORY / "benchmarks" / "layers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    monkeypatch.undo()
    return module


def test_the_committed_report_is_what_the_committed_measurements_make(layers: ModuleType):
    results = layers.read_results(RESULTS / "data")
    template = (RESULTS / "layers.template.md").read_text(encoding="utf-8")
    assert (RESULTS / "layers.md").read_text(encoding="utf-8") == layers.render_report(results, template), (
        "run `python benchmarks/layers.py report`"
    )


def test_the_template_states_no_result_of_its_own():
    """Decimal numbers are results, and those come from the JSON files."""
    template = (RESULTS / "layers.template.md").read_text(encoding="utf-8")
    assert re.findall(r"\d+\.\d+", template) == []


def test_measurements_name_no_place_on_a_machine(layers: ModuleType):
    for facts in layers.read_results(RESULTS / "data"):
        assert facts["command"].startswith("python benchmarks/layers.py ") and " /" not in facts["command"]


def test_rows_hold_recipes_that_can_be_applied_again(layers: ModuleType):
    from shiftadd3d.nn import Recipe

    for facts in layers.read_results(RESULTS / "data"):
        for row in facts["rows"]:
            assert json.loads(json.dumps(Recipe.from_dict(row["recipe"]).as_dict())) == row["recipe"]


def test_a_result_without_rows_and_no_results_at_all_make_a_report(layers: ModuleType):
    template = (RESULTS / "layers.template.md").read_text(encoding="utf-8")
    assert layers.NOT_MEASURED in layers.render_report([], template)


def test_a_search_that_was_not_timed_has_no_seconds(layers: ModuleType):
    searched = {"name": "searched", "recipe": {"rules": [{"terms": 2}]}}
    facts = {"model": "m", "data": "d", "rows": [searched], "search": {"estimated_error": 0.1, "energy_share": 0.5}}
    assert layers.search_table([facts]).endswith("| `m` on d | 0 | 1 | 10.0% | 50.0% |  |")
    facts["search"]["seconds"] = 12.3
    assert layers.search_table([facts]).endswith("| 50.0% | 12 |")
    for facts in layers.read_results(RESULTS / "data"):  # what cannot be measured is absent, not empty
        times = [facts["search"].get("seconds", 1), *(row.get("calibration_seconds", 1) for row in facts["rows"])]
        assert None not in times


def test_no_times_are_taken_where_none_are_asked_for(layers: ModuleType):
    import torch
    from torch import nn

    torch.manual_seed(0)
    subject = layers.Subject(
        model=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(),
        batches=[torch.randn(8, 4)],
        forward=lambda model, batch: model(batch),
        exclude=(),
        score=lambda model: 0.5,
        divergence=None,
        finetune=lambda model, recipe: model,
        inputs=8,
        dwconv=3,
    )
    for times in (True, False):
        found: list[dict] = []
        layers.measure(subject, found.append, times)
        assert len(found[-1]["rows"]) == 7
        assert all(("calibration_seconds" in row) == times for row in found[-1]["rows"])
        assert ("seconds" in found[-1]["search"]) == times


def test_a_command_says_what_it_was_told(layers: ModuleType):
    command = layers.Nerf(Path("config.yml"), test_views=4, times=False)
    assert layers.own_options(command, ("finetune_steps", "test_views", "times")) == ["--test-views", "4", "--no-times"]
    assert layers.own_options(layers.Nerf(Path("config.yml")), ("finetune_steps", "times")) == []
