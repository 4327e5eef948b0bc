"""Tiny scenes in every format that is read, made on the spot."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from shiftadd3d.nerf.trainer import GNTTrainerConfig

WIDTH, HEIGHT, FOCAL = 24, 16, 20.0


def orbit(count: int, radius: float = 4.0, height: float = 1.0) -> np.ndarray:
    """Camera-to-world matrices [count, 4, 4] in OpenGL axes, on a circle around the origin, which they look at."""
    poses = np.tile(np.eye(4), (count, 1, 1))
    for pose, angle in zip(poses, np.arange(count) * 2 * np.pi / count, strict=True):
        centre = np.array([radius * np.cos(angle), radius * np.sin(angle), height])
        back = centre / np.linalg.norm(centre)
        right = np.cross([0.0, 0.0, 1.0], back)
        right /= np.linalg.norm(right)
        pose[:3] = np.stack([right, np.cross(back, right), back, centre], axis=1)
    return poses


def write_image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), mode: str = "RGB", seed: int = 0) -> None:
    """Noise that differs from seed to seed; a tenth of its alpha is neither 0 nor 255. `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    if mode == "RGBA":
        pixels[..., 3] = np.where(pixels[..., 3] % 10 == 0, pixels[..., 3], 255 * (pixels[..., 3] > 127))
    Image.fromarray(pixels).save(path)


def write_nerfstudio(
    folder: Path,
    count: int = 10,
    mode: str = "RGB",
    masks: bool = False,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    **extra: object,
) -> Path:
    """`transforms.json` and `images/`; `extra` goes into the file. Returns the folder."""
    width, height = size
    frames = []
    for index, pose in enumerate(orbit(count)):
        frame = {"file_path": f"images/{index:03d}.png", "transform_matrix": pose.tolist()}
        write_image(folder / frame["file_path"], size, mode, seed=index)
        if masks:
            frame["mask_path"] = f"masks/{index:03d}.png"
            mask = np.zeros((height, width), dtype=np.uint8)
            mask[4:9, 6:12] = 255
            (folder / "masks").mkdir(exist_ok=True)
            Image.fromarray(mask).save(folder / frame["mask_path"])
        frames.append(frame)
    focal = FOCAL * width / WIDTH
    camera = {"fl_x": focal, "fl_y": focal, "cx": width / 2, "cy": height / 2, "w": width, "h": height}
    (folder / "transforms.json").write_text(json.dumps({**camera, **extra, "frames": frames}))
    return folder


def write_blender(folder: Path, splits: tuple[str, ...] = ("train", "val", "test"), count: int = 6) -> Path:
    """`transforms_*.json` and RGBA renders."""
    for split in splits:
        frames = []
        for index, pose in enumerate(orbit(count)):
            write_image(folder / split / f"r_{index}.png", mode="RGBA", seed=index)
            frames.append({"file_path": f"./{split}/r_{index}", "transform_matrix": pose.tolist()})
        meta = {"camera_angle_x": 2 * float(np.arctan(WIDTH / 2 / FOCAL)), "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(meta))
    return folder


def write_llff(folder: Path, count: int = 9, factor: int = 4, poses: np.ndarray | None = None) -> Path:
    """`poses_bounds.npy` of photos `factor` times larger than those in `images_N`."""
    poses = orbit(count) if poses is None else poses
    right, up, back, centre = (poses[:, :3, i] for i in range(4))
    size = np.tile([HEIGHT * factor, WIDTH * factor, FOCAL * factor], (len(poses), 1))
    matrices = np.stack([-up, right, back, centre, size], axis=-1)
    bounds = np.tile([2.0, 8.0], (len(poses), 1))
    images = folder / ("images" if factor == 1 else f"images_{factor}")
    for index in range(count):
        write_image(images / f"image{index:03d}.png", seed=index)
    np.save(folder / "poses_bounds.npy", np.concatenate([matrices.reshape(-1, 15), bounds], axis=1))
    return folder


def write_colmap(
    folder: Path, count: int = 9, size: tuple[int, int] = (WIDTH, HEIGHT), prefix: str = "photo", factor: int = 1
) -> Path:
    """`sparse/0` (text) for photos `factor` times larger than those written, and their `images` or `images_N`."""
    model = folder / "sparse/0"
    model.mkdir(parents=True)
    width, height = size[0] * factor, size[1] * factor
    focal = FOCAL * width / WIDTH
    (model / "cameras.txt").write_text(f"1 PINHOLE {width} {height} {focal} {focal} {width / 2} {height / 2}\n")
    lines = []
    for index, pose in enumerate(orbit(count)):
        world_to_camera = np.linalg.inv(pose @ np.diag([1.0, -1.0, -1.0, 1.0]))
        w = np.sqrt(max(0.0, 1 + np.trace(world_to_camera[:3, :3]))) / 2
        r = world_to_camera
        quaternion = (
            [w, (r[2, 1] - r[1, 2]) / (4 * w), (r[0, 2] - r[2, 0]) / (4 * w), (r[1, 0] - r[0, 1]) / (4 * w)]
            if w > 1e-6
            else [0.0, 1.0, 0.0, 0.0]
        )
        numbers = " ".join(f"{value:.12f}" for value in (*quaternion, *r[:3, 3]))
        lines.append(f"{index + 1} {numbers} 1 {prefix}{index:03d}.png\n\n")
        write_image(folder / ("images" if factor == 1 else f"images_{factor}") / f"{prefix}{index:03d}.png", size)
    (model / "images.txt").write_text("".join(lines))
    (model / "points3D.txt").write_text("1 0.0 0.0 0.0 10 20 30 0.5 1 0 2 0 3 0\n")
    return folder


@pytest.fixture(scope="session")
def write_scene() -> dict[str, Callable[..., Path]]:
    """Writers of tiny scenes by format; each takes the folder to write to and returns it."""
    return {"nerfstudio": write_nerfstudio, "blender": write_blender, "llff": write_llff, "colmap": write_colmap}


@pytest.fixture(scope="session")
def orbit_poses() -> Callable[..., np.ndarray]:
    """`orbit`."""
    return orbit


@pytest.fixture(scope="session", autouse=True)
def _no_downloads():
    """LPIPS would fetch its network."""

    def refuse(url: str, *_: object, **__: object) -> None:
        raise OSError(f"no network in tests: {url}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.hub.download_url_to_file", refuse)
        yield


@pytest.fixture(scope="session")
def tiny_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten views of 64x48 pixels, of which one is held out; the smallest that a feature network takes, and a bit."""
    folder = tmp_path_factory.mktemp("tiny") / "scene"
    return write_nerfstudio(folder, size=(64, 48), shiftadd3d={"near": 2.0, "far": 8.0})


@pytest.fixture(scope="session")
def make_config() -> Callable[..., GNTTrainerConfig]:
    """A config of a -tiny method, yet smaller, without viewer: `make_config(scene, output, method, steps)`.

    It saves and evaluates at every second step.
    """
    from shiftadd3d.configs import methods

    defaults = {
        name: copy.deepcopy(getattr(methods, name.replace("-", "_")).config)
        for name in ("gnt-tiny", "shiftadd-gnt-tiny")
    }

    def make(scene: Path, output: Path, method: str = "shiftadd-gnt-tiny", steps: int = 4) -> GNTTrainerConfig:
        config = copy.deepcopy(defaults[method])
        config.data = config.pipeline.datamanager.data = scene
        config.output_dir, config.experiment_name, config.timestamp = output, "scene", "run"
        config.machine.device_type = "cpu"
        config.vis = "tensorboard"
        config.max_num_iterations = steps
        config.steps_per_save = config.steps_per_eval_batch = config.steps_per_eval_image = 2
        config.logging.steps_per_log = 1
        config.logging.local_writer.enable = False
        datamanager, model = config.pipeline.datamanager, config.pipeline.model
        datamanager.num_source_views = 3
        datamanager.train_num_rays_per_batch = datamanager.eval_num_rays_per_batch = 64
        model.gnt = dataclasses.replace(
            model.gnt, depth=1, width=16, proposal_samples=8, feature_widths=(8, 8, 8), feature_dim=8
        )
        config.pipeline.warm_start = None  # no weights come for a network that small
        model.num_samples, model.lpips = 4, True
        model.expert_latencies = (1.0, 1.0)  # nothing to measure
        return config

    return make


@pytest.fixture(scope="session")
def ns_train() -> Callable[[GNTTrainerConfig], Path]:
    """What `ns-train` does with a config; returns the run's folder."""
    from nerfstudio.scripts import train
    from nerfstudio.utils import writer

    def run(config: GNTTrainerConfig) -> Path:
        writer.EVENT_WRITERS.clear()  # of a run before, in this process
        writer.GLOBAL_BUFFER.clear()
        train.main(config)
        return config.get_base_dir()

    return run


@pytest.fixture(scope="session")
def tiny_run(make_config, ns_train, tiny_scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.yml of a run of four steps. Not to be changed: copy its folder first."""
    return ns_train(make_config(tiny_scene, tmp_path_factory.mktemp("tiny_run"))) / "config.yml"
