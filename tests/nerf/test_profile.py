"""`shiftadd3d profile` of nerfstudio runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shiftadd3d import cli


def test_a_run_stands_beside_the_same_with_multiplications(tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    assert cli.main(["profile", str(tiny_run.parent), "--rays", "12", "--json", str(file)]) == 0
    facts = json.loads(file.read_text())
    dense, own = facts["profiles"]
    assert dense["recipe"] == "mult" and own["recipe"] != "mult" and dense["model"] == str(tiny_run.parent)
    assert dense["work"]["shift"] == 0 < own["work"]["shift"]
    assert facts["unit"] == "ray" and facts["setting"].startswith("3 x 4 rays of a view")
    assert own["routing"] and not dense["routing"]
    for router in own["routing"]:
        cells = [cell for row in router["map"] for cell in row]
        assert len(router["map"]) == 3 and len(cells) == 12
        assert router["share"] == pytest.approx(sum(cells) / 12, abs=1e-6)


def test_a_run_that_does_not_load_is_one_line(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run.parent, folder)
    for checkpoint in (folder / "nerfstudio_models").iterdir():
        checkpoint.write_bytes(b"cut off")
    page = tmp_path / "page" / "a.html"
    for place, message in ((folder, "nerfstudio_models"), (tmp_path / "none" / "config.yml", "no such file or folder")):
        capsys.readouterr()
        assert cli.main(["profile", str(place), "--html", str(page)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    (folder / "config.yml").write_text("42")
    assert cli.main(["profile", str(folder), "--html", str(page)]) == 1
    assert "not a configuration of ours" in capsys.readouterr().err
    assert not page.parent.exists()
