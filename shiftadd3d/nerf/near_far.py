"""The range of depths to sample in a scene, from the information that the scene provides.

All depths are z-depths (along the optical axis, not along the ray) in the units of the parsed poses. On a nerfstudio
ray bundle, the distance along a ray is `depth * metadata["directions_norm"]`.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.source_bank import SourceBank

_BOUNDS_MARGINS = (0.9, 1.1)
"""Allowed for beyond LLFF's bounds: the 0.1 and 99.9 percentiles of each view's points."""
_DEPTHS_MARGINS = (0.85, 1.2)
"""Allowed for beyond the 1 and 99 percentiles of feature points: surfaces reach beyond them."""

_LEAST_RATIO = 4.0
"""Feature points that span less, from nearest to farthest, lie on one textured thing: what is behind it has none."""

_MIN_DEPTHS = 100
"""Fewer measured depths than this are not a distribution to take percentiles of."""


def scene_near_far(
    bank: SourceBank,
    hint: tuple[float, float] | None = None,
    bounds: Float[Tensor, "n 2"] | None = None,
    points: Float[Tensor, "p 3"] | None = None,
    near: float | None = None,
    far: float | None = None,
) -> tuple[float, float]:
    """The nearest and farthest z-depth to sample, from the best available information, which is printed.

    In this order: the arguments `near` and `far`, the scene's own hint, LLFF bounds, sparse points, points triangulated
    here from matches between the views, and the geometry of the cameras alone. Points miss a plain background. So with
    points, far is at least four times near, unless transparent pixels show that there is nothing behind.

    Args:
        bank: the source views.
        hint: (near, far) from the scene's camera file.
        bounds: each view's nearest and farthest depth (LLFF).
        points: a sparse reconstruction, in the frame of the poses.
        near: replaces the near end.
        far: replaces the far end.

    Raises:
        UserError: unless 0 < near < far.
    """
    if near is None or far is None:
        found, source = hint, "the scene's camera file"
        if found is None and bounds is not None:
            found, source = near_far_from_bounds(bounds), "LLFF bounds"
        if found is None and points is not None:
            found, source = near_far_from_points(bank, points), "sparse points"
        if found is None:
            found, source = near_far_from_matches(bank), "points triangulated between views"
        if found is not None and hint is None and bounds is None and bank.empty is None:
            found = found[0], max(found[1], _LEAST_RATIO * found[0])
        if found is None:
            found, source = near_far_from_cameras(bank), "the cameras' positions"
        near = found[0] if near is None else near
        far = found[1] if far is None else far
        CONSOLE.print(f"Near {near:.4g}, far {far:.4g}, from {source}")
    check_near_far(near, far)
    return float(near), float(far)


def check_near_far(near: float, far: float) -> None:
    """Refuse a range of depths that cannot be sampled.

    Raises:
        UserError: unless 0 < near < far.
    """
    if not 0 < near < far < float("inf"):
        raise UserError(f"near {near:g}, far {far:g}: expected 0 < near < far (z-depths in the scaled scene's units)")


def near_far_from_bounds(bounds: Float[Tensor, "n 2"]) -> tuple[float, float]:
    """From LLFF's bounds, with a margin, because they are percentiles of the reconstructed points."""
    return _BOUNDS_MARGINS[0] * float(bounds[:, 0].min()), _BOUNDS_MARGINS[1] * float(bounds[:, 1].max())


def near_far_from_points(bank: SourceBank, points: Float[Tensor, "p 3"]) -> tuple[float, float] | None:
    """From sparse points: percentiles of their z-depths in cameras with valid pixels there, with margins.

    Returns:
        (near, far), or None if too few points are in view.
    """
    world_to_camera = torch.linalg.inv(bank.camera_to_world)
    depths = []
    for view, (transform, intrinsics) in enumerate(zip(world_to_camera, bank.intrinsics, strict=True)):
        camera = points.float() @ transform[:3, :3].T + transform[:3, 3]
        pixels = camera @ intrinsics.T
        z = camera[:, 2]
        u, v = pixels[:, 0] / z, pixels[:, 1] / z
        inside = (z > 0) & (u >= 0) & (u <= bank.width - 1) & (v >= 0) & (v <= bank.height - 1)
        if bank.valid is not None:
            inside[inside.clone()] = bank.valid[view][v[inside].round().long(), u[inside].round().long()]
        depths.append(z[inside])
    return _from_depths(torch.cat(depths).numpy())


def near_far_from_matches(
    bank: SourceBank, max_pairs: int = 60, max_side: int = 640, max_error: float = 1.5
) -> tuple[float, float] | None:
    """From points triangulated between neighbouring views: SIFT matches that agree with the poses.

    A match counts if it is mutual and distinct (Lowe's ratio test), if the point triangulated from it falls within
    `max_error` pixels of both features and in front of both cameras, and if its two rays meet at more than a degree.

    Args:
        bank: the source views; pixels that are not valid give no features.
        max_pairs: how many pairs of views to match, spread evenly over the views.
        max_side: larger images are shrunk to this side first.
        max_error: largest reprojection error in pixels of the image as matched.

    Returns:
        (near, far), or None where too little matches: no texture, or poses that are off.
    """
    pairs = _neighbour_pairs(bank, max_pairs)
    if not pairs:
        return None
    scale = min(1.0, max_side / max(bank.height, bank.width))
    sift = cv2.SIFT.create(nfeatures=2000)
    matcher = cv2.BFMatcher(cv2.NORM_L2)
    features = {view: _features(bank, view, scale, sift) for view in sorted({view for pair in pairs for view in pair})}

    intrinsics = bank.intrinsics.double().numpy().copy()
    # Pixel centres at whole numbers: shrinking by s maps u to s * (u + 0.5) - 0.5.
    intrinsics[:, :2, 2] = (intrinsics[:, :2, 2] + 0.5) * scale - 0.5
    intrinsics[:, [0, 1], [0, 1]] *= scale
    world_to_camera = np.linalg.inv(bank.camera_to_world.double().numpy())[:, :3]

    depths = []
    for a, b in pairs:
        (points_a, descriptors_a), (points_b, descriptors_b) = features[a], features[b]
        matches = _mutual_matches(matcher, descriptors_a, descriptors_b)
        if len(matches) == 0:
            continue
        depths.append(
            _triangulated_depths(
                points_a[matches[:, 0]],
                points_b[matches[:, 1]],
                intrinsics[[a, b]],
                world_to_camera[[a, b]],
                max_error,
            )
        )
    return _from_depths(np.concatenate(depths)) if depths else None


def near_far_from_cameras(bank: SourceBank) -> tuple[float, float]:
    """From the cameras alone, if the images give no information.

    Cameras that look inwards have a point closest to all optical axes, at some depth d from each. The range is half the
    smallest d to one and a half times the largest, which is 2 to 6 for the synthetic scenes of NeRF. Otherwise, or if
    that point is behind a camera, it is half to twenty times the largest distance between two cameras. This is a guess,
    and a message says so.
    """
    centres, axes = bank.camera_to_world[:, :3, 3].double(), bank.camera_to_world[:, :3, 2].double()
    spread = float(torch.cdist(centres, centres).max()) if len(bank) > 1 else 0.0
    # Least squares: sum over views of (I - a a^T)(x - c) = 0.
    projectors = torch.eye(3, dtype=torch.float64) - axes[:, :, None] * axes[:, None, :]
    normal = projectors.sum(0)
    eigenvalues = torch.linalg.eigvalsh(normal)
    # Nearly parallel axes leave the point free to slide along them: 0.02 is a spread of some 8 degrees.
    if float(eigenvalues[0]) > 0.02 * len(bank):
        focus = torch.linalg.solve(normal, (projectors @ centres[:, :, None]).sum(0))[:, 0]
        depths = ((focus - centres) * axes).sum(-1)
        if float(depths.min()) > 0:
            return 0.5 * float(depths.min()), 1.5 * float(depths.max())
    spread = spread or 1.0
    CONSOLE.log("[yellow]Near and far are a guess for this scene: set --pipeline.datamanager.near and .far if you know")
    return 0.5 * spread, 20.0 * spread


def _from_depths(depths: np.ndarray) -> tuple[float, float] | None:
    if len(depths) < _MIN_DEPTHS:
        return None
    low, high = np.percentile(depths, [1.0, 99.0])
    return _DEPTHS_MARGINS[0] * float(low), _DEPTHS_MARGINS[1] * float(high)


def _neighbour_pairs(bank: SourceBank, max_pairs: int) -> list[tuple[int, int]]:
    """Pairs of views near each other: every view (or as many as are allowed) with its nearest and its third nearest.

    The third nearest because the nearest may be too close to measure depth from.
    """
    if len(bank) < 2:
        return []
    ranks = [0, 2] if len(bank) > 3 else [0]
    views = np.unique(np.linspace(0, len(bank) - 1, min(len(bank), max_pairs // len(ranks))).round().astype(int))
    pairs = set()
    for view in views.tolist():
        nearest = bank.nearest(bank.camera_to_world[view], k=ranks[-1] + 1, exclude=view).tolist()
        pairs.update((min(view, nearest[rank]), max(view, nearest[rank])) for rank in ranks)
    return sorted(pairs)


def _features(bank: SourceBank, view: int, scale: float, sift: cv2.SIFT) -> tuple[np.ndarray, np.ndarray | None]:
    """SIFT positions [m, 2] (pixel centres at whole numbers) and descriptors of one view, shrunk by `scale`."""
    grey = cv2.cvtColor(bank.images[view].numpy(), cv2.COLOR_RGB2GRAY)
    usable = np.ones_like(grey)
    if bank.valid is not None:
        # Away from the edge of what is valid, where the edge itself would be the feature.
        valid = bank.valid[view].numpy().astype(np.uint8)
        usable = cv2.erode(valid, np.ones((7, 7), np.uint8), borderType=cv2.BORDER_REPLICATE)
    if scale < 1.0:
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        usable = cv2.resize(usable, (grey.shape[1], grey.shape[0]), interpolation=cv2.INTER_NEAREST)
    keypoints, descriptors = sift.detectAndCompute(grey, usable)
    return np.array([keypoint.pt for keypoint in keypoints], dtype=np.float64).reshape(-1, 2), descriptors


def _mutual_matches(
    matcher: cv2.BFMatcher, descriptors_a: np.ndarray | None, descriptors_b: np.ndarray | None, ratio: float = 0.75
) -> np.ndarray:
    """[m, 2] indices into a and b: each the other's nearest, and clearly nearer than the second nearest."""
    if descriptors_a is None or descriptors_b is None or min(len(descriptors_a), len(descriptors_b)) < 2:
        return np.empty((0, 2), dtype=int)
    forward = [
        m[0] for m in matcher.knnMatch(descriptors_a, descriptors_b, k=2) if m[0].distance < ratio * m[1].distance
    ]
    backward = {m.queryIdx: m.trainIdx for m in matcher.match(descriptors_b, descriptors_a)}
    return np.array(
        [(m.queryIdx, m.trainIdx) for m in forward if backward.get(m.trainIdx) == m.queryIdx], dtype=int
    ).reshape(-1, 2)


def _triangulated_depths(
    points_a: np.ndarray, points_b: np.ndarray, intrinsics: np.ndarray, world_to_camera: np.ndarray, max_error: float
) -> np.ndarray:
    """z-depths, in both cameras, of those matches [m, 2] that two cameras ([2, 3, 3], [2, 3, 4]) agree on."""
    homogeneous = cv2.triangulatePoints(
        intrinsics[0] @ world_to_camera[0], intrinsics[1] @ world_to_camera[1], points_a.T, points_b.T
    ).T
    with np.errstate(divide="ignore", invalid="ignore"):
        points = np.concatenate([homogeneous[:, :3] / homogeneous[:, 3:], np.ones((len(homogeneous), 1))], axis=1)
        good = np.isfinite(points).all(axis=1)
        rays, depths = [], []
        for observed, k, transform in zip((points_a, points_b), intrinsics, world_to_camera, strict=True):
            camera = points @ transform.T
            pixels = camera @ k.T
            error = np.linalg.norm(pixels[:, :2] / pixels[:, 2:] - observed, axis=1)
            good &= (camera[:, 2] > 0) & (error < max_error)
            depths.append(camera[:, 2])
            rays.append(camera @ transform[:, :3] / np.linalg.norm(camera, axis=1, keepdims=True))
        good &= (rays[0] * rays[1]).sum(axis=1) < np.cos(np.deg2rad(1.0))
    return np.concatenate([depth[good] for depth in depths])
