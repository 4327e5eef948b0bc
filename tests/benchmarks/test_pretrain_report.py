"""docs/results/pretraining.md says what the JSON files beside it say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def benchmark(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("pretrain")


def results(repository: Path) -> list[dict]:
    data = repository / "docs/results/data"
    paths = [*sorted(data.glob("untrained-*.json")), *sorted(data.glob("held-out-*.json"))]
    return [json.loads(path.read_text()) for path in paths]


def test_the_page_is_what_the_results_make_of_the_template(benchmark, repository: Path):
    folder = repository / "docs" / "results"
    template = (folder / "pretraining.template.md").read_text(encoding="utf-8")
    made = benchmark.render_report(results(repository), template)
    assert (folder / "pretraining.md").read_text(encoding="utf-8") == made, "run: python benchmarks/pretrain.py report"


def test_the_template_states_no_result_of_its_own(repository: Path):
    template = (repository / "docs/results/pretraining.template.md").read_text(encoding="utf-8")
    assert re.findall(r"\d+\.\d+", template) == []


def test_every_result_names_its_command_and_machine(repository: Path):
    found = results(repository)
    assert found
    for result in found:
        of = f"--scene {result['scene']}" if result["kind"] == "untrained" else "--factory HELD_OUT"
        assert f"{of} --method {result['method']}" in result["command"]
        assert result["machine"] and 0 < result["psnr"] < 60


def test_a_cell_without_a_result_is_empty(benchmark, repository: Path):
    template = "{{QUALITY}}"
    one = {"kind": "untrained", "scene": "s", "method": "gnt-tiny", "weights": "shipped", "psnr": 25.0, "ssim": 0.8}
    one |= {
        "command": "python benchmarks/pretrain.py evaluate",
        "commit": "c",
        "machine": results(repository)[0]["machine"],
    }
    assert "| s |  | 25.00 / 0.800 |  |" in benchmark.render_report([one], template)


@pytest.mark.slow
def test_the_weights_in_the_package_are_packed_again_and_stay_as_they_are(
    benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from shiftadd3d.configs.methods import shiftadd_gnt_tiny
    from shiftadd3d.nerf.weights import pretrained_file, read_weights
    from shiftadd3d.scenes import scene_path

    shipped = pretrained_file("gnt-tiny").read_bytes()
    monkeypatch.setattr(benchmark, "WEIGHTS", tmp_path)
    monkeypatch.setattr(benchmark, "REPOSITORY", tmp_path)
    monkeypatch.setattr(benchmark, "BATCHES", 1)
    monkeypatch.setattr(benchmark, "ATTENTION_STEPS", 1)
    factory = shutil.copytree(scene_path(), tmp_path / "factory")
    benchmark.Pack(factory=factory, again=True)()

    (written,) = tmp_path.glob("*.safetensors")
    packed, facts = read_weights(written)
    before, before_facts = read_weights(pretrained_file("shiftadd-gnt-tiny"))
    assert facts == before_facts
    assert {name: value.shape for name, value in packed.items()} == {
        name: value.shape for name, value in before.items()
    }
    assert pretrained_file("gnt-tiny").read_bytes() == shipped
    assert shiftadd_gnt_tiny.config.pipeline.datamanager.train_scenes == ()  # type: ignore[attr-defined]
