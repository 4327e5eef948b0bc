"""Every script of `examples/` runs, in small, and says what it promises to."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from shiftadd3d.kernels.runtime import kernel
from shiftadd3d.models.gnt import GNTConfig, GNTModel

# Arguments that make a script small, what it prints, and the package without which it is skipped.
EXAMPLES: dict[str, tuple[list[str], str, str | None]] = {
    "01_timm_model": (["test_vit"], r"\d+% of the multiplications are gone", None),
    "02_hugging_face_vit": ([], r"\d+ layers replaced\s+tensor\(", "transformers"),
    "03_own_model": ([], r"torch\.Size\(\[1, 5, 2\]\)", None),
    "04_calibrate": ([], r"calibrated: [\d.]+%", None),
    "05_fine_tune_in_stages": (["1"], r"stage2-shift: top-1 [\d.]+%", None),
    "06_render_rays": (["view.png"], r"view\.png: 160 x 120 pixels, PSNR 2\d\.\d\d dB", None),
    "07_official_gnt": (["model_720000.pth"], r"mean change of colour by rounding alone: 0\.\d+", None),
    "08_photos_to_video": (["SCENE", "flight.gif", "48", "2"], r"flight\.gif: [\d,]+ bytes", "nerfstudio"),
    "09_budgeted_search": ([], r"budget 30%: \d+ layers change.*\n.*counted afterwards: (2\d|30)%", None),
    "10_new_kernel": ([], r"kernel \(7, 1000\)", "tvm"),
    "11_compile": ([], r"compiled: True, largest difference", "tvm"),
}

TRIED_ELSEWHERE = ["12_deploy_without_torch"]  # in tests/vision/test_deploy.py, as is deploy.cpp


def test_every_example_is_tried_and_listed_in_the_docs(repository: Path):
    scripts = sorted(path.stem for path in (repository / "examples").glob("*.py"))
    assert scripts == sorted([*EXAMPLES, *TRIED_ELSEWHERE])
    page = (repository / "docs/examples.md").read_text(encoding="utf-8")
    for script in scripts:
        lines = (repository / "examples" / f"{script}.py").read_text(encoding="utf-8").count("\n")
        assert 15 <= lines <= 60, script
        assert f"examples/{script}.py" in page


@pytest.mark.parametrize("name", ["07_official_gnt", "12_deploy_without_torch"])
def test_an_example_that_needs_a_file_says_so(name: str, repository: Path, monkeypatch: pytest.MonkeyPatch):
    if name == "12_deploy_without_torch":
        pytest.importorskip("tvm_ffi")
    script = repository / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script)])
    with pytest.raises(SystemExit, match=f"^usage: python .*{name}"):
        runpy.run_path(str(script), run_name="__main__")


def test_deployment_names_a_folder_that_is_none(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tvm_ffi")
    script = repository / "examples" / "12_deploy_without_torch.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path), "photo.jpg"])
    with pytest.raises(SystemExit, match=f"^{tmp_path} has no executable.json: name the folder"):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(
    name: str,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    arguments, printed, package = EXAMPLES[name]
    if package is not None:
        pytest.importorskip(package)
    if "SCENE" in arguments:
        from shiftadd3d.scenes import scene_path

        arguments = [str(scene_path()) if word == "SCENE" else word for word in arguments]
    if name == "07_official_gnt":  # what the released code saves, with random weights
        sizes = GNTConfig(depth=1, width=16, feature_dim=8, feature_widths=(8, 12, 8), feature_blocks=(1, 1, 1))
        parts = {part: module.state_dict() for part, module in GNTModel(sizes).named_children()}
        torch.save({"optimizer": {"state": {}}, "net_fine": None, **parts}, tmp_path / "model_720000.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kernel, "KERNELS", dict(kernel.KERNELS))
    script = repository / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    assert re.search(printed, capsys.readouterr().out)
