"""Parity with the released GNT code, through checkpoints in its own layout."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from shiftadd3d.models.gnt import load_official_checkpoint, render_rays
from shiftadd3d.models.gnt.projection import Cameras

FILES = ["gnt_depth4.npz", "gnt_depth4_noalpha_inv.npz"]
TOLERANCE = 1e-4


def refill(keys: dict[str, dict[str, list[int]]], seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """The weights the golden outputs were made with, from their names."""
    filled = {}
    for prefix, shapes in keys.items():
        filled[prefix] = {}
        for name, shape in shapes.items():
            rng = np.random.default_rng(zlib.crc32(f"{seed}/{prefix}.{name}".encode()))
            x = rng.standard_normal(shape).astype(np.float32)
            if len(shape) >= 2:
                x = x / np.sqrt(np.prod(shape[1:]))
            else:
                x = 1 + 0.1 * x if name.endswith("weight") else 0.1 * x
            filled[prefix][name] = torch.from_numpy(np.asarray(x, dtype=np.float32))
    return filled


@pytest.fixture(params=FILES)
def golden(request, shared: Path, tmp_path: Path):
    data = np.load(shared / "golden" / request.param)
    config = json.loads(str(data["config"]))
    path = tmp_path / "model_250000.pth"
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    torch.save(
        {"optimizer": optimizer.state_dict(), "scheduler": {}, **refill(json.loads(str(data["keys"])), config["seed"])},
        path,
    )
    return data, config, load_official_checkpoint(path)


def test_an_official_checkpoint_renders_what_the_released_code_rendered(golden):
    data, config, model = golden
    sources = {"intrinsics": torch.from_numpy(data["intrinsics"]), "camera_to_world": data["source_c2w"]}
    target = {"intrinsics": data["intrinsics"], "camera_to_world": data["target_c2w"]}
    near, far = map(float, data["near_far"])
    with torch.no_grad():
        out = render_rays(
            model,
            torch.from_numpy(data["source_images"]),
            sources,
            target,
            torch.from_numpy(data["pixels_xy"]),
            near,
            far,
            config["samples"],
            inverse_depth=config["inv_uniform"],
        )
    assert len(model.net_coarse.view_crosstrans) == config["depth"]
    for key in ("rgb", "depth", "weights"):
        if key in data:
            np.testing.assert_allclose(out[key].numpy(), data[key], atol=TOLERANCE, rtol=0)


def test_source_features_are_those_of_the_released_code(golden):
    data, _, model = golden
    cameras = Cameras.of({"intrinsics": data["intrinsics"], "camera_to_world": data["source_c2w"]})
    with torch.no_grad():
        features = model.encode(torch.from_numpy(data["source_images"]), cameras).features[0]
    np.testing.assert_allclose(features.numpy(), data["featmap"], atol=TOLERANCE, rtol=0)
