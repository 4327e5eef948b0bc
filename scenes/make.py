"""Make an embedded scene: path-trace the still life with Mitsuba 3 and write a nerfstudio data set.

    python -m shiftadd3d.scenes.make --out DIR

writes `DIR/images/*.png` (8-bit sRGB) and `DIR/transforms.json`. The same settings give the same pictures.

Conventions, which are nerfstudio's: `transform_matrix` is camera-to-world with OpenGL camera axes (x right, y up, the
camera looks along -z), the world is z up, and pixel (column i, row j) has its centre at (i + 0.5, j + 0.5), so that
a centred camera has cx = w / 2. Mitsuba is needed here only; the scenes themselves are plain files.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from shiftadd3d._errors import UserError
from shiftadd3d._extras import need

from ._still_life import scene_dict


@dataclass(frozen=True)
class Config:
    """Path-trace the still life from an arc of cameras and write it as a nerfstudio data set."""

    out: Path
    """Folder to write to: images/ and transforms.json; files of the same names are replaced."""
    size: tuple[int, int] = (160, 120)
    """Width and height of the pictures, in pixels."""
    spp: int = 144
    """Paths per pixel, rounded up to a whole grid; the noise falls with the square root."""
    seed: int = 0
    """Decides texture noise, camera jitter and sampling."""
    rows: int = 3
    """Heights of the training arc, from 18 to 38 degrees above the table."""
    columns: int = 14
    """Training cameras per height, over the sweep."""
    tests: int = 8
    """Held-out cameras, between the training cameras and never at the border of the arc."""
    sweep: float = 145.0
    """Angle of the training arc around the table, in degrees."""
    fov: float = 44.0
    """Horizontal field of view, in degrees."""

    def check(self) -> None:
        """Raise `UserError` for values no scene can be made with."""
        for name in ("spp", "rows", "columns", "tests"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if min(self.size) < 1:
            raise UserError(f"--size must be two positive numbers, not {self.size[0]} {self.size[1]}")
        if not 0 < self.sweep <= 180:
            raise UserError(f"--sweep must be above 0 and at most 180 degrees, not {self.sweep}")
        if not 5 <= self.fov <= 60:
            raise UserError(f"--fov must be between 5 and 60 degrees, not {self.fov}")
        if self.size[1] / self.size[0] * math.tan(math.radians(self.fov / 2)) > math.tan(math.radians(30)):
            raise UserError(f"--size {self.size[0]} {self.size[1]} is so tall that it would show the top of the wall")
        if self.seed < 0:
            raise UserError(f"--seed must not be negative, not {self.seed}")


@dataclass(frozen=True)
class View:
    """A picture to take.

    Attributes:
        name: file stem; begins with `train` or `test`.
        pose: [4, 4] camera-to-world, OpenGL axes.
    """

    name: str
    pose: np.ndarray


def look_at(origin: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The [4, 4] camera-to-world pose (OpenGL axes) of an upright camera at `origin` looking at `target`."""
    back = (origin - target) / np.linalg.norm(origin - target)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :4] = np.stack([right, np.cross(back, right), back, origin], axis=1)
    return pose


def camera_views(config: Config) -> list[View]:
    """The training views on a jittered arc of `rows` by `columns`, then the test views in its interior.

    Neighbouring rows are staggered by half a step, and every camera has its own small offset in direction, distance
    and aim, as a hand would have. Test views lie between two rows and two columns.
    """
    rng = np.random.default_rng(config.seed)

    def view(name: str, azimuth: float, elevation: float, jitter: float) -> View:
        azimuth, elevation = np.radians(np.array([azimuth, elevation]) + jitter * rng.uniform(-1, 1, 2))
        radius = 3.75 + 0.12 * rng.uniform(-1, 1)
        target = np.array([0.1, 0.1, 0.33]) + 0.06 * rng.uniform(-1, 1, 3)
        direction = [math.sin(azimuth) * math.cos(elevation), -math.cos(azimuth) * math.cos(elevation)]
        origin = np.array([0.1, 0.1, 0.3]) + radius * np.array([*direction, math.sin(elevation)])
        return View(name, look_at(origin, target))

    step = config.sweep / max(config.columns - 1, 1)
    elevations = np.linspace(18, 38, config.rows) if config.rows > 1 else np.array([28.0])
    views = []
    for row, elevation in enumerate(elevations):
        stagger = step / 4 * (-1) ** row if config.columns > 1 else 0.0
        for column in range(config.columns):
            azimuth = (column - (config.columns - 1) / 2) * step + stagger
            views.append(view(f"train_{len(views):02d}", azimuth, elevation, 1.0))
    for k in range(config.tests):
        azimuth = 0.42 * config.sweep * (2 * (k + 0.5) / config.tests - 1)
        elevation = (elevations[:-1] + elevations[1:])[k % (config.rows - 1)] / 2 if config.rows > 1 else 28.0
        views.append(view(f"test_{k:02d}", azimuth, elevation, 1.0))
    return views


def load_mitsuba() -> Any:
    """The mitsuba module with its `scalar_rgb` variant set; `UserError` where it is not installed."""
    need("making scenes", "mitsuba", extra="scenes")
    import mitsuba

    mitsuba.set_variant("scalar_rgb")
    mitsuba.set_log_level(mitsuba.LogLevel.Error)
    return mitsuba


class Studio:
    """The loaded scene and a way to photograph it.

    Args:
        config: size, field of view, samples and seed.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._mi = load_mitsuba()
        with tempfile.TemporaryDirectory() as folder:
            self._scene = self._mi.load_dict(scene_dict(self._mi, Path(folder), config.seed))

    def _render(self, pose: np.ndarray, integrator: dict[str, Any], spp: int, seed: int, rfilter: str) -> Any:
        mi = self._mi
        # A Mitsuba camera looks along +z with x to the left: OpenGL axes turned by half a turn about y.
        to_world = pose @ np.diag([-1.0, 1.0, -1.0, 1.0])
        width, height = self.config.size
        sensor = {
            "type": "perspective",
            "fov": self.config.fov,
            "fov_axis": "x",
            "near_clip": 0.01,
            "far_clip": 100.0,
            "to_world": mi.ScalarTransform4f(to_world.tolist()),
            "film": {
                "type": "hdrfilm",
                "width": width,
                "height": height,
                "pixel_format": "rgb",
                "component_format": "float32",
                "rfilter": {"type": rfilter},
            },
            "sampler": {"type": "multijitter", "sample_count": spp, "seed": seed},
        }
        sensor = mi.load_dict(sensor)
        return mi.load_dict(integrator).render(self._scene, sensor=sensor, seed=seed, spp=spp)

    def photograph(self, pose: np.ndarray, seed: int) -> np.ndarray:
        """The picture from a pose: [H, W, 3] uint8 sRGB."""
        image = self._render(pose, {"type": "path", "max_depth": 5}, self.config.spp, seed, "gaussian")
        return develop(np.array(image)[..., :3])

    def positions(self, pose: np.ndarray, spp: int = 1) -> np.ndarray:
        """World position of the surface each pixel sees, averaged over `spp` points in the pixel: [H, W, 3]."""
        image = self._render(pose, {"type": "aov", "aovs": "position:position"}, spp, 0, "box")
        return np.array(image)[..., -3:]


def develop(radiance: np.ndarray) -> np.ndarray:
    """Linear radiance to 8-bit sRGB, with a shoulder above 0.7 that keeps highlights from clipping hard."""
    knee = 0.7
    over = np.maximum(radiance - knee, 0)
    linear = np.minimum(radiance, knee) + (1 - knee) * (1 - np.exp(-over / (1 - knee)))
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055)
    return np.rint(255 * np.clip(encoded, 0, 1)).astype(np.uint8)


def depth_along_axis(positions: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Camera z-depth (distance along the optical axis, positive in front) of world positions [..., 3]."""
    return (positions - pose[:3, 3]) @ -pose[:3, 2]


def transforms(config: Config, views: list[View], near: float, far: float) -> dict[str, Any]:
    """The contents of `transforms.json`; `near` and `far` are z-depths in its units."""
    width, height = config.size
    focal = width / 2 / math.tan(math.radians(config.fov) / 2)
    files = {view.name: f"images/{view.name}.png" for view in views}
    test = [path for name, path in files.items() if name.startswith("test")]
    return {
        "camera_model": "OPENCV",
        "w": width,
        "h": height,
        "fl_x": focal,
        "fl_y": focal,
        "cx": width / 2,
        "cy": height / 2,
        "k1": 0.0,
        "k2": 0.0,
        "p1": 0.0,
        "p2": 0.0,
        "shiftadd3d": {"near": round(near, 3), "far": round(far, 3), "made_by": "python -m shiftadd3d.scenes.make"},
        "train_filenames": [path for name, path in files.items() if name.startswith("train")],
        "val_filenames": test,
        "test_filenames": test,
        "frames": [
            {"file_path": files[view.name], "transform_matrix": np.round(view.pose, 9).tolist()} for view in views
        ],
    }


def make(config: Config, console: Console | None = None) -> Path:
    """Render every view and write the data set.

    Returns:
        The path of `transforms.json`.

    Raises:
        UserError: for a bad setting, a missing mitsuba or a folder that cannot be written to.
    """
    config.check()
    console = console or Console()
    images = config.out / "images"
    try:
        images.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {config.out}: {error.strerror}") from error
    studio = Studio(config)
    views = camera_views(config)
    near, far = math.inf, 0.0
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("path tracing", total=len(views))
        for k, view in enumerate(views):
            depth = depth_along_axis(studio.positions(view.pose, spp=4), view.pose)
            near, far = min(near, float(depth.min())), max(far, float(depth.max()))
            Image.fromarray(studio.photograph(view.pose, config.seed + k)).save(
                images / f"{view.name}.png", optimize=True
            )
            progress.advance(task)
    path = config.out / "transforms.json"
    path.write_text(json.dumps(transforms(config, views, 0.95 * near, 1.05 * far), indent=1) + "\n")
    size = sum(file.stat().st_size for file in (*images.glob("*.png"), path))
    console.print(f"{path}: {len(views)} views, {size / 1e6:.2f} MB, depth {near:.2f} to {far:.2f}")
    return path


def main(args: list[str] | None = None) -> int:
    """Command line of the maker; returns 0, or 1 with the reason on stderr."""
    try:
        make(tyro.cli(Config, args=args, prog="python -m shiftadd3d.scenes.make"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
