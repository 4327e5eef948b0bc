"""The page "Reproduce the paper": its commands for NeRF run in small."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion
from nerfstudio.scripts.eval import ComputePSNR
from PIL import Image

from shiftadd3d import cli
from shiftadd3d.models.gnt import GNTConfig, GNTModel

SIZE = (64, 48)
# What makes a training of the page one of seconds.
SMALL = shlex.split(
    "--max-num-iterations 2 --steps-per-save 1 --machine.device-type cpu "
    "--pipeline.model.gnt.depth 1 --pipeline.model.gnt.width 16 --pipeline.model.gnt.feature-dim 8 "
    "--pipeline.model.gnt.feature-widths 8 8 8 --pipeline.model.gnt.feature-blocks 1 1 1 "
    "--pipeline.model.num-samples 4 --pipeline.model.expert-latencies 1 1 --pipeline.model.lpips False "
    "--pipeline.datamanager.num-source-views 3 --pipeline.datamanager.train-num-rays-per-batch 32"
)


def write_llff(folder: Path, poses: np.ndarray) -> None:
    """LLFF's files, with pictures a quarter of the size that the cameras are for."""
    rows = []
    for index, pose in enumerate(poses):
        pixels = np.random.default_rng(index).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
        (folder / "images_4").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"images_4/{index:03d}.png")
        right, up, back, centre = pose[:3].T
        matrix = np.stack([-up, right, back, centre, [SIZE[1] * 4, SIZE[0] * 4, 240.0]], axis=1)
        rows.append([*matrix.reshape(-1), 2.0, 8.0])
    np.save(folder / "poses_bounds.npy", np.array(rows))


@pytest.mark.slow
def test_the_commands_for_nerf_run(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_scene: dict[str, Callable[..., Path]],
    orbit_poses: Callable[..., np.ndarray],
    ns_train: Callable,
):
    monkeypatch.chdir(tmp_path)
    write_llff(tmp_path / "nerf_llff_data/fern", orbit_poses(9))
    for name in ("a", "b"):
        depths = {"near": 2.0, "far": 8.0}
        write_scene["nerfstudio"](tmp_path / "train_scenes" / name, size=SIZE, shiftadd3d=depths)
    sizes = GNTConfig(depth=1, width=16, feature_dim=8, feature_widths=(8, 8, 8), feature_blocks=(1, 1, 1))
    parts = {part: module.state_dict() for part, module in GNTModel(sizes).named_children()}
    torch.save({"net_fine": None, **parts}, "model_250000.pth")

    page = (repository / "docs/reproduce.md").read_text(encoding="utf-8")
    code = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    ran = set()
    for line in "".join(code).replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        if words[0] == "ns-train":
            ns_train(tyro.cli(AnnotatedBaseConfigUnion, args=[words[1], *SMALL, *words[2:]]))
        elif words[0] == "ns-eval":
            tyro.cli(ComputePSNR, args=words[1:]).main()
        elif words[:2] in (["shiftadd3d", "import-gnt"], ["shiftadd3d", "eval-scenes"]):
            assert cli.main(words[1:]) == 0, line
        else:
            continue
        ran.add(words[1] if words[0] in ("shiftadd3d", "ns-train") else words[0])
    assert ran == {"gnt-big", "shiftadd-gnt-big", "ns-eval", "import-gnt", "eval-scenes"}
    for name in ("fern-gnt-big", "fern-shiftadd-gnt-big"):
        assert json.loads(Path(f"{name}.json").read_text())["results"]["psnr"] > 0
    for name in ("across", "official"):
        assert json.loads(Path(f"{name}.json").read_text())
