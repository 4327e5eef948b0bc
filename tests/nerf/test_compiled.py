"""Rendering with a frozen network as one executable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("nerfstudio")
pytest.importorskip("tvm")

from torch import nn

from shiftadd3d.configs.pretrained import shiftadd_gnt_tiny
from shiftadd3d.kernels import numerics
from shiftadd3d.models.gnt.compiled import CompiledGNT
from shiftadd3d.nerf import render as render_module
from shiftadd3d.nerf.model import GNTNerfModel
from shiftadd3d.nerf.pretrained import open_scene


@pytest.fixture
def opened(tmp_path: Path, write_scene):
    scene = write_scene["nerfstudio"](tmp_path, size=(64, 48), shiftadd3d={"near": 2.0, "far": 8.0})
    return open_scene(shiftadd_gnt_tiny, scene)


def outputs_of(model: GNTNerfModel, opened) -> dict[str, torch.Tensor]:
    return model.get_outputs_for_camera(render_module.scale_cameras(opened.views.cameras[0:1], 0.5))


def test_a_frame_is_by_an_executable_and_the_same_as_without(opened) -> None:
    model = opened.model
    # What is compared is the network. An exposure that it finds a little differently changes all pixels a little.
    model.config.match_exposure = False
    found = outputs_of(model, opened)
    with torch.no_grad():
        network = model._network()
        assert isinstance(network, CompiledGNT)
        model.train()
        model.eval()
        assert model._network() is network, "it is the same network still"
        with numerics("int8"):
            other = model._network()
            assert isinstance(other, CompiledGNT) and other.numerics == "int8"
        with numerics("twin"):
            assert model._network() is model.gnt
        model.config.compile = False
        assert model._network() is model.gnt
    expected = outputs_of(model, opened)
    assert set(found) == set(expected) and "routing" in found
    for name, value in expected.items():
        same = torch.isclose(found[name], value, rtol=1e-3, atol=1e-3).double().mean()
        assert same > 0.98, f"{name}: {same:.3f} are the same"


def test_what_is_loaded_is_compiled_again(opened) -> None:
    model = opened.model
    before = outputs_of(model, opened)["rgb"]
    state = model.state_dict()
    changed = {name: value + 0.1 if name.endswith("norm.bias") else value for name, value in state.items()}
    model.load_state_dict(changed)
    after = outputs_of(model, opened)["rgb"]
    assert not torch.allclose(before, after, atol=1e-3)
    model.config.compile = False
    same = torch.isclose(outputs_of(model, opened)["rgb"], after, rtol=1e-3, atol=1e-3).double().mean()
    assert same > 0.98


def test_one_line_says_why_a_network_is_not_compiled(opened, capsys) -> None:
    model = opened.model
    model.gnt.net_coarse.norm.register_forward_hook(lambda *_: None)
    for _ in range(2):
        outputs_of(model, opened)
    lines = [line for line in capsys.readouterr().out.splitlines() if "not compiled" in line]
    assert lines == [
        "not compiled, so it renders as before: net_coarse.norm is a LayerNorm, which has hooks",
    ]
    assert isinstance(model.gnt.net_coarse.norm, nn.LayerNorm)
