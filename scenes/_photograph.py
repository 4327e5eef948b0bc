"""Photographs of a `Stage`: with very little noise at few samples, and with true depths.

Light comes directly from lamps to surfaces, with shadows, and from all sides by a formula of normal and albedo. Lamps
without size give no noise. Lamps with size give a little at the borders of shadows. There are no reflections, and walls
do not scatter light.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._random_scene import Stage
from .make import depth_along_axis, develop

_SURVEY = 36
"""Pixels on the longer side of the small pictures that decide whether a stage will do."""


@dataclass(frozen=True)
class Photograph:
    """A picture from a camera.

    Attributes:
        radiance: [H, W, 3] linear, premultiplied by `alpha`.
        alpha: [H, W] how much of a pixel is covered.
        depth: [H, W] z-depth at the pixel's centre; 0 where there is nothing.
    """

    radiance: np.ndarray
    alpha: np.ndarray
    depth: np.ndarray


class Studio:
    """A stage, loaded into the renderer.

    Args:
        mi: the mitsuba module, its variant set.
        stage: what to show.
    """

    def __init__(self, mi: Any, stage: Stage) -> None:
        self._mi, self._stage = mi, stage
        scene: dict[str, Any] = {"type": "scene"}
        with tempfile.TemporaryDirectory() as folder:
            for k, thing in enumerate(stage.things):
                path = Path(folder) / f"{k:03d}.ply"
                thing.mesh.write_ply(path)
                scene[f"thing_{k:03d}"] = thing.to_dict(mi, path, wrap="mirror")
            for k, light in enumerate(stage.lights):
                scene[f"light_{k}"] = light
            self._scene = mi.load_dict(scene)

    def _sensor(self, pose: np.ndarray, size: tuple[int, int], sampler: dict[str, Any]) -> Any:
        mi = self._mi
        # A Mitsuba camera looks along +z with x to the left: OpenGL axes turned by half a turn about y.
        to_world = mi.ScalarTransform4f((pose @ np.diag([-1.0, 1.0, -1.0, 1.0])).tolist())
        film = {
            "type": "hdrfilm",
            "width": size[0],
            "height": size[1],
            "pixel_format": "rgba",
            "component_format": "float32",
            "rfilter": {"type": "box"},
        }
        return mi.load_dict(
            {
                "type": "perspective",
                "fov": self._stage.fov,
                "fov_axis": "larger",
                "near_clip": 0.01,
                "far_clip": 200.0,
                "to_world": to_world,
                "film": film,
                "sampler": sampler,
            }
        )

    def _depth(self, pose: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        sensor = self._sensor(pose, size, {"type": "stratified", "sample_count": 1, "jitter": False})
        integrator = self._mi.load_dict({"type": "aov", "aovs": "distance:depth,position:position"})
        seen = np.array(integrator.render(self._scene, sensor=sensor, spp=1))[..., -4:]
        return np.where(seen[..., 0] > 0, depth_along_axis(seen[..., 1:], pose), 0).astype(np.float32)

    def photograph(self, pose: np.ndarray, size: tuple[int, int], seed: int, grid: int = 3) -> Photograph:
        """Take a picture.

        Args:
            pose: [4, 4] camera-to-world, OpenGL axes.
            size: width and height.
            seed: of the samples' places in pixels.
            grid: samples along each side of a pixel.
        """
        # Stratified over lamps and over their area. Nine samples are a whole number of them for one lamp or three.
        spp = grid**2
        sensor = self._sensor(pose, size, {"type": "multijitter", "sample_count": spp, "seed": seed})
        direct = {"type": "direct", "bsdf_samples": 0, "emitter_samples": 1}
        aovs = "albedo:albedo,normal:sh_normal,position:position"
        integrator = self._mi.load_dict({"type": "aov", "aovs": aovs, "image": direct})
        seen = np.array(integrator.render(self._scene, sensor=sensor, seed=seed, spp=spp))
        alpha = np.clip(seen[..., 3], 0, 1)
        albedo, normal, position = seen[..., 4:7], seen[..., 7:10], seen[..., 10:13]
        covered = np.maximum(alpha, 1e-6)[..., None]
        normal, position = normal / covered, position / covered
        away = ((position - pose[:3, 3]) * normal).sum(axis=2, keepdims=True) > 0
        up = 0.5 + 0.5 * np.clip(np.where(away, -1, 1) * normal[..., 2:], -1, 1)
        ambient = self._stage.ground + up * (self._stage.sky - self._stage.ground)
        return Photograph(seen[..., :3] + albedo * ambient, alpha, self._depth(pose, size))

    def survey(self, pose: np.ndarray) -> Photograph:
        """A picture with few pixels and samples, which saves seconds."""
        width, height = self._stage.size
        scale = _SURVEY / max(width, height)
        return self.photograph(pose, (max(4, round(width * scale)), max(4, round(height * scale))), 0, grid=1)


def exposure(stage: Stage, photographs: list[Photograph]) -> float:
    """The factor for radiances that brings the middle of all pixels to `stage.brightness`."""
    seen = [(p.radiance.mean(axis=2) / np.maximum(p.alpha, 1e-6))[p.alpha > 0.9] for p in photographs]
    return stage.brightness / max(float(np.median(np.concatenate([*seen, [1e-4]]))), 1e-4)


def picture(photograph: Photograph, factor: float, keep_alpha: bool) -> np.ndarray:
    """8-bit sRGB, [H, W, 3], or [H, W, 4] with colours that are not multiplied by alpha."""
    alpha = np.maximum(photograph.alpha, 1e-6)[..., None]
    colour = develop(factor * photograph.radiance / alpha)
    if not keep_alpha:
        return colour
    opacity = np.rint(255 * photograph.alpha).astype(np.uint8)
    return np.concatenate([np.where(opacity[..., None] > 0, colour, 0), opacity[..., None]], axis=2)


def objection(stage: Stage, photographs: list[Photograph]) -> str | None:
    """The reason why a stage is not suitable for training, judged by its small pictures; None if there is none."""
    factor = exposure(stage, photographs)
    shared = _overlap(stage, photographs)
    for k, seen in enumerate(photographs):
        hit = seen.depth > 0
        covered = float(hit.mean())
        if stage.open and not 0.07 < covered < 0.85:
            return f"{covered:.0%} of a picture is covered"
        if not stage.open and covered < 0.995:
            return "a picture shows the void"
        depth = seen.depth[hit]
        if depth.min() < 0.15 or (depth < 0.35 * np.median(depth)).mean() > 0.3:
            return "something stands right before a camera"
        light = (picture(seen, factor, False)[hit] / 255.0).mean(axis=1)
        if np.mean(light < 0.04) > 0.3 or np.mean(light > 0.98) > 0.25 or not 0.15 < light.mean() < 0.85:
            return "a picture is too dark or too bright"
        if light.std() < 0.035:
            return "a picture shows hardly anything"
        if shared[k] < 0.45:
            return "what a picture shows is seen by too few other cameras"
    depths = np.concatenate([seen.depth[seen.depth > 0] for seen in photographs])
    near, far = np.percentile(depths, [0.5, 99.5])
    if far > 30 * near or far > 60:
        return "depths spread too far"
    return None


def _overlap(stage: Stage, photographs: list[Photograph]) -> list[float]:
    """For each picture the share of its surface that at least two others see."""
    height, width = photographs[0].depth.shape
    focal = max(height, width) / 2 / math.tan(math.radians(stage.fov) / 2)
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    rays = np.stack([(columns - width / 2) / focal, -(rows - height / 2) / focal, -np.ones_like(columns)], axis=2)
    shares = []
    for k, (pose, seen) in enumerate(zip(stage.poses, photographs, strict=True)):
        hit = seen.depth > 0
        points = (rays * seen.depth[..., None])[hit] @ pose[:3, :3].T + pose[:3, 3]
        witnesses = np.zeros(len(points))
        for j, (other, view) in enumerate(zip(stage.poses, photographs, strict=True)):
            if j == k:
                continue
            local = (points - other[:3, 3]) @ other[:3, :3]
            depth = np.maximum(-local[:, 2], 1e-6)
            column = np.floor(width / 2 + focal * local[:, 0] / depth)
            row = np.floor(height / 2 - focal * local[:, 1] / depth)
            inside = (local[:, 2] < -1e-3) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            found = view.depth[np.where(inside, row, 0).astype(int), np.where(inside, column, 0).astype(int)]
            witnesses += inside & (np.abs(found - depth) < 0.1 * depth)
        shares.append(float((witnesses >= 2).mean()) if len(points) else 0.0)
    return shares
