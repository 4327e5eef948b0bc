"""Tiny scenes in every format that is read, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    """Noise that differs from seed to seed. `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_nerfstudio(folder: Path, count: int = 10, mode: str = "RGB", masks: bool = False, **extra: object) -> Path:
    """`transforms.json` and `images/`; `extra` goes into the file. Returns the folder."""
    frames = []
    for index, pose in enumerate(orbit(count)):
        frame = {"file_path": f"images/{index:03d}.png", "transform_matrix": pose.tolist()}
        write_image(folder / frame["file_path"], mode=mode, seed=index)
        if masks:
            frame["mask_path"] = f"masks/{index:03d}.png"
            mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
            mask[4:9, 6:12] = 255
            (folder / "masks").mkdir(exist_ok=True)
            Image.fromarray(mask).save(folder / frame["mask_path"])
        frames.append(frame)
    camera = {"fl_x": FOCAL, "fl_y": FOCAL, "cx": WIDTH / 2, "cy": HEIGHT / 2, "w": WIDTH, "h": HEIGHT}
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
    (model / "cameras.txt").write_text(
        f"1 PINHOLE {width} {height} {FOCAL * factor} {FOCAL * factor} {width / 2} {height / 2}\n"
    )
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
