"""Optional parts: what is missing is named with the extra that brings it, and the layers need torch alone."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shiftadd3d import UserError, _extras, cli, load
from shiftadd3d.profile.subjects import subject

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

# What the base install brings that is not torch's.
BEYOND_TORCH = ("tvm", "tvm_ffi", "numpy", "PIL", "platformdirs", "psutil", "rich", "safetensors", "tyro")

LAYERS = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {names} else found(name, package)

import torch
from torch import nn
from shiftadd3d.nn import calibrate_, count_operations, freeze_, reparameterize_, search_recipe

def layers():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))

x = torch.randn(5, 8)
from shiftadd3d.nn import Recipe
recipe = Recipe("shifts", other_linear="shift")
model = layers()
reparameterize_(model, recipe)
model(x).sum().backward()
freeze_(model)
with torch.inference_mode():
    assert model(x).shape == (5, 4)
calibrate_(layers(), [x], recipe)
assert count_operations(layers(), x).mult > 0
"""


def test_the_layers_need_torch_alone():
    code = LAYERS.format(names=set(BEYOND_TORCH))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert '"before": "Linear' in result.stdout, "without rich, the report is JSON"


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name in missing else find_spec(name, *args)
    )


@pytest.mark.parametrize(
    ("args", "missing", "complaint"),
    [
        (["finetune"], "timm", "this needs timm, which is not installed: pip install 'shiftadd3d[vision]'"),
        (["evaluate", "."], "matplotlib", "this needs matplotlib, which is not installed: pip install"),
        (["predict", ".", "a.jpg"], "sklearn", "this needs scikit-learn, which is not installed: pip install"),
        (["export", ".", "--out", "x"], "timm", "this needs timm, which is not installed: pip install"),
        (["demo"], "nerfstudio", "this needs nerfstudio, which is not installed: pip install 'shiftadd3d[nerf]'"),
        (["profile", "resnet18"], "timm", "resnet18, a name of timm's, needs timm, which is not installed: pip"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_command_whose_part_is_missing_names_the_extra_in_one_line(
    args: list[str],
    missing: str,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
):
    monkeypatch.chdir(tmp_path)
    without(monkeypatch, missing)
    assert cli.main(args) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {complaint}") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_in_python_it_is_an_import_error_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    without(monkeypatch, "timm")
    for call in (lambda: load(tmp_path), lambda: subject("deit_tiny_patch16_224")):
        with pytest.raises(ImportError, match=r"pip install 'shiftadd3d\[vision\]'") as caught:
            call()
        assert isinstance(caught.value, UserError)


def test_a_timm_that_nerfstudio_has_pinned_is_too_old(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_extras, "version", lambda name: "0.6.7")
    with pytest.raises(UserError, match=r"this needs timm 1\.0\.28 or newer, not 0\.6\.7: pip install"):
        _extras.need("this", "timm", extra="vision")


def test_messages_name_extras_that_there_are(repository: Path):
    project: dict[str, Any] = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) == {"nerf", "vision", "poses", "scenes"}
    metadata = importlib.metadata.metadata("shiftadd3d")
    assert set(metadata.get_all("Provides-Extra") or []) == set(project["optional-dependencies"])
