"""The page of energies is what its results and its template make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def energy(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("energy")


def test_the_page_is_made_of_its_results(energy: ModuleType, repository: Path) -> None:
    results = repository / "docs" / "results"
    template = (results / "energy.template.md").read_text(encoding="utf-8")
    read = (energy.read_results, energy.read_fronts, energy.read_counts)
    page = energy.render_report(*(of(results / "data") for of in read), template)
    assert page == (results / "energy.md").read_text(encoding="utf-8")


def test_counting_takes_less_than_three_forward_passes(energy: ModuleType, repository: Path) -> None:
    measured = [row for facts in energy.read_counts(repository / "docs" / "results" / "data") for row in facts["rows"]]
    assert measured and all(row["count"]["median"] < 3 * row["forward"]["median"] for row in measured)
    assert all(row["search"] < 20 for row in measured)


def test_fronts_of_three_models_have_six_recipes_at_least(energy: ModuleType, repository: Path) -> None:
    fronts = energy.read_fronts(repository / "docs" / "results" / "data")
    models = [facts["model"].split()[0] for facts in fronts]
    assert models == ["deit_tiny_patch16_224", "pvt_v2_b0", "gnt-tiny"]
    assert all(len(facts["rows"]) >= 6 for facts in fronts)


def test_savings_and_the_verdict_follow_from_the_numbers(energy: ModuleType) -> None:
    row = {"mult_share": None, "levels": {"accelerator": dict.fromkeys(energy.LEVELS, 1e6)}}
    rows = [
        {**row, "recipe": "mult", "pj": {"arithmetic": 100, "authors": 100, "accelerator": 100}},
        {**row, "recipe": "add+shift", "pj": {"arithmetic": 20, "authors": 50, "accelerator": 80}},
        {**row, "recipe": "moe", "mult_share": 0.5, "pj": {"arithmetic": 30, "authors": 40, "accelerator": 50}},
    ]
    facts = {"model": "pvt_v2_b0", "rows": rows, "variants": []}
    table = energy.savings_table([facts])
    assert "| PVT v2-b0 | add+shift | 80.0% | 50.0% | 20.0% |  |" in table and "| 50% |" in table
    verdict = energy.nearest([facts])
    assert "(a) 80.0% in `add+shift`, (b) 60.0% in `moe`, (c) 50.0% in `moe`; 42.9% by (c) reached" in verdict
    rows[2]["pj"]["accelerator"] = 60
    assert "42.9% by (c) not reached" in energy.nearest([facts])
    assert energy.assumptions([facts]) == energy.NOT_MEASURED


def test_the_deciding_assumption_is_the_one_that_changes_the_most(energy: ModuleType) -> None:
    names = ("as it is", "DRAM at half", "twice the buffer", "the last three together")
    saved = (0.3, 0.35, 0.1, 0.9)  # less is a change as well, and several at once are not one
    variants = [{"assumption": n, "pj": 1, "saved": {"add+shift": s}} for n, s in zip(names, saved, strict=True)]
    text = energy.deciding([{"model": "pvt_v2_b1", "variants": variants}])
    assert text == "- PVT v2-b1: twice the buffer, with which `add+shift` saves 10.0% instead of 30.0%."
    assert energy.deciding([{"model": "pvt_v2_b1", "variants": []}]) == energy.NOT_MEASURED


def test_stars_mark_what_no_other_recipe_beats(energy: ModuleType) -> None:
    def row(recipe: str, score: float, a: float, c: float) -> dict:
        return {"recipe": recipe, "score": score, "pj": {"arithmetic": a, "authors": 3e6, "accelerator": c}}

    rows = [row("mult", 0.9, 4e6, 9e6), row("add", 0.8, 3e6, 9.5e6), row("add+shift", 0.7, 1e6, 6e6)]
    facts = {"model": "small", "data": "pictures", "setting": "batch 1", "metric": "top-1", "rows": rows}
    assert energy.front_of(facts, "arithmetic") == ["add+shift", "add", "mult"]
    assert energy.front_of(facts, "accelerator") == ["add+shift", "mult"]
    table = energy.front_tables([facts])
    assert "| add | 80.0% | 3.00 * | 3.00 | 9.50 |" in table and "| mult | 90.0% | 4.00 * | 3.00 * | 9.00 * |" in table
    assert energy.front_tables([]) == energy.NOT_MEASURED


def test_the_model_that_is_priced_has_the_sizes_of_the_trained_one(energy: ModuleType, repository: Path) -> None:
    import json

    from shiftadd3d import UserError
    from shiftadd3d.nn import Recipe

    file = repository / "docs" / "results" / "data" / "layers-still_life-gnt-tiny.json"
    quality = json.loads(file.read_text(encoding="utf-8"))
    with pytest.raises(UserError, match=r"has \d+ parameters; 1 were trained"):
        energy.trained_sizes({**quality, "parameters": 1}, Recipe())
