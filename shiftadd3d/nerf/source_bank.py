"""The training views as source views: undistorted images and pinhole cameras, and the choice of the nearest.

This is the one place where nerfstudio's cameras (OpenGL axes: x right, y up, z back; pixel centres at 0.5) become those
of the projection code (OpenCV axes: x right, y down, z forward; pixel centres at whole numbers, the first at 0).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datasets.base_dataset import InputDataset
from rich.progress import track
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.photos import PhotoDataset

_OPENGL_TO_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
_RAYS_AT_ONCE = 1 << 16
#: Types of cameras that see a picture in one direction; nerfstudio's others are panoramas.
PROJECTIONS = (CameraType.PERSPECTIVE.value, CameraType.FISHEYE.value)


def opencv_cameras(cameras: Cameras) -> tuple[Float[Tensor, "n 3 3"], Float[Tensor, "n 4 4"]]:
    """Nerfstudio's cameras as pinhole cameras in OpenCV axes with whole-numbered pixel centres.

    A point X in the world falls on pixel column u, row v with `depth * [u, v, 1] = K @ (inverse(camera_to_world) @ X)`,
    where (0, 0) is the centre of the top left pixel. Lens distortion is left out: `undistort` removes it from images.

    Args:
        cameras: any number of cameras, batch shape [n] or [].

    Returns:
        Intrinsics K in pixels and camera-to-world matrices, float32, on the cameras' device.
    """
    flat = cameras.reshape((1,)) if cameras.shape == () else cameras.flatten()
    count, device = flat.shape[0], flat.device
    intrinsics = torch.zeros(count, 3, 3, device=device)
    intrinsics[:, 0, 0] = flat.fx[:, 0].float()
    intrinsics[:, 1, 1] = flat.fy[:, 0].float()
    intrinsics[:, 0, 2] = flat.cx[:, 0].float() - 0.5
    intrinsics[:, 1, 2] = flat.cy[:, 0].float() - 0.5
    intrinsics[:, 2, 2] = 1.0
    camera_to_world = torch.eye(4, device=device).repeat(count, 1, 1)
    camera_to_world[:, :3] = flat.camera_to_worlds.float()
    return intrinsics, camera_to_world @ _OPENGL_TO_OPENCV.to(device)


def camera_rays(camera: Cameras) -> RayBundle:
    """Rays through all pixels of one camera of any type, [h, w], those of fisheye cameras mended.

    Those of a plain pinhole are made here: nerfstudio looks up a camera for each of them, and takes ten times as long.
    Pixel areas are zeros then, as nothing asks for them.

    Args:
        camera: batch shape [1].
    """
    distortion = camera.distortion_params
    if (
        int(camera.camera_type) != CameraType.PERSPECTIVE.value
        or (distortion is not None and bool(distortion.any()))
        or camera.metadata
        or camera.times is not None
    ):
        rays = camera.generate_rays(camera_indices=0, keep_shape=True)
        mend_fisheye_rays(rays, camera)
        return rays
    fx, fy, cx, cy = (x.flatten()[0] for x in (camera.fx, camera.fy, camera.cx, camera.cy))
    height, width = int(camera.height), int(camera.width)
    pose = camera.camera_to_worlds.reshape(3, 4)
    x = (torch.arange(width, device=pose.device) + 0.5 - cx) / fx
    y = (torch.arange(height, device=pose.device) + 0.5 - cy) / fy
    across, up, back = pose[:, :3].unbind(dim=1)
    directions = (x[:, None] * across)[None] - (y[:, None] * up)[:, None] - back
    length = directions.norm(dim=-1, keepdim=True)
    return RayBundle(
        origins=pose[:, 3].expand_as(directions),
        directions=directions / length,
        pixel_area=torch.zeros_like(length),
        metadata={"directions_norm": length},
    )


def mend_fisheye_rays(rays: RayBundle, camera: Cameras) -> None:
    """Gives a fisheye camera's rays, in place, what nerfstudio leaves out; those of other cameras stay as they are.

    `metadata["directions_norm"]` becomes the length at which a ray counts z depth, as it is for perspective cameras
    (for 84 degrees and more beside the optical axis, where planes are far or behind, that of 84 degrees). The direction
    of a ray along the axis, for which nerfstudio divides zero by zero, becomes the axis.

    Args:
        rays: any number of rays of one camera.
        camera: that one, batch shape [1] or [].
    """
    if int(camera.camera_type) != CameraType.FISHEYE.value:
        return
    axis = opencv_cameras(camera)[1][0, :3, 2].to(rays.directions)
    finite = rays.directions.isfinite().all(dim=-1, keepdim=True)
    rays.directions = torch.where(finite, rays.directions, axis)
    rays.metadata["directions_norm"] = 1.0 / (rays.directions @ axis)[..., None].clamp(min=0.1)


def distort(xy: np.ndarray, distortion: np.ndarray, camera_type: int) -> np.ndarray:
    """Where nerfstudio's lens model puts a point, in units of the focal length.

    Args:
        xy: undistorted (pinhole) coordinates x/z, y/z, [..., 2].
        distortion: nerfstudio's [k1, k2, k3, k4, p1, p2]. k1..k4 are coefficients of r^2, r^4, r^6, r^8 (OpenCV's
            perspective model has no such k4), of theta in place of r for a fisheye lens, as in OpenCV's.
        camera_type: `CameraType.PERSPECTIVE.value` or `CameraType.FISHEYE.value`.

    Returns:
        Distorted coordinates, [..., 2].
    """
    k1, k2, k3, k4, p1, p2 = (float(value) for value in distortion)
    if camera_type == CameraType.FISHEYE.value:
        radius = np.linalg.norm(xy, axis=-1, keepdims=True)
        xy = xy * np.where(radius > 1e-8, np.arctan(radius) / np.maximum(radius, 1e-8), 1.0)
    x, y = xy[..., 0], xy[..., 1]
    r2 = x * x + y * y
    radial = 1.0 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
    return np.stack(
        [
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y),
        ],
        axis=-1,
    )


def undistort(
    image: np.ndarray, intrinsics: np.ndarray, distortion: np.ndarray, camera_type: int, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The picture that a pinhole camera of the same intrinsics and size would have taken.

    Args:
        image: [h, w, 3] uint8.
        intrinsics: K [3, 3], pixel centres at whole numbers.
        distortion: nerfstudio's [k1, k2, k3, k4, p1, p2].
        camera_type: `CameraType.PERSPECTIVE.value` or `CameraType.FISHEYE.value`.
        mask: [h, w] bool, True where the image may be used.

    Returns:
        The image, [h, w, 3] uint8, black where the lens did not look, and [h, w] bool: True where it did (and the mask
        allows).
    """
    height, width = image.shape[:2]
    focal, centre = intrinsics[[0, 1], [0, 1]].astype(np.float64), intrinsics[:2, 2].astype(np.float64)
    pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1)
    where = distort((pixels - centre) / focal, distortion, camera_type) * focal + centre
    x, y = where.astype(np.float32)[..., 0], where.astype(np.float32)[..., 1]
    valid = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    image = cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    image[~valid] = 0
    if mask is not None:
        # As the image is interpolated: where a masked pixel was mixed in, the colour is not the scene's.
        valid &= cv2.remap(mask.astype(np.float32), x, y, cv2.INTER_LINEAR) > 0.999
    return image, valid


def load_image(
    dataset: InputDataset, index: int, background: Float[Tensor, " 3"] | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """One image of a dataset as 8-bit RGB, and its mask.

    Args:
        dataset: nerfstudio's dataset, which scales the image and blends RGBA over the scene's own background colour.
        index: which image.
        background: RGB in 0..1 behind what is still transparent then; white if None.

    Returns:
        [h, w, 3] uint8 and [h, w] bool (True: use this pixel), or None without masks.
    """
    data = dataset[index]
    image = data["image"]
    if image.shape[-1] == 4:
        colour = torch.ones(3) if background is None else background
        image = image[..., :3] * image[..., 3:] + colour * (1.0 - image[..., 3:])
    mask = data["mask"][..., 0].numpy().astype(bool) if "mask" in data else None
    return (image * 255.0).round().clamp(0, 255).to(torch.uint8).numpy(), mask


class SourceViews(NamedTuple):
    """Some views of a `SourceBank`, ready for projection and feature extraction."""

    images: Float[Tensor, "k h w 3"]
    """RGB in 0..1."""
    valid: Bool[Tensor, "k h w"] | None
    """False at pixels that hold nothing (undistortion border, padding) or are masked; None if all hold something."""
    intrinsics: Float[Tensor, "k 3 3"]
    """K in pixels, pixel centres at whole numbers."""
    camera_to_world: Float[Tensor, "k 4 4"]
    """OpenCV axes."""
    empty: Bool[Tensor, "k h w"] | None = None
    """True at pixels whose photo is wholly transparent: nothing but background; None if none is."""


class DrawnSources(NamedTuple):
    """What the rays drawn last are to be rendered from, training across scenes."""

    views: SourceViews
    near: float
    far: float


class SourceBank:
    """The training views as undistorted images and pinhole cameras. A plain object: it stays out of state dicts.

    Images are kept as uint8 on the CPU and become float on the device where they are asked for. Images of different
    sizes are padded at the bottom and right, so that their intrinsics hold.

    Args:
        images: [n, h, w, 3] uint8, black where not valid.
        valid: [n, h, w], False where a pixel holds nothing or is masked, or None if all hold something.
        intrinsics: K in pixels, pixel centres at whole numbers.
        camera_to_world: OpenCV axes.
        image_paths: the images' files, in order.
        pristine: whether valid pixels are those of the files (no undistortion, no padding).
        empty: [n, h, w], True where a pixel is known to show background alone, or None if none is.
    """

    def __init__(
        self,
        images: UInt8[Tensor, "n h w 3"],
        valid: Bool[Tensor, "n h w"] | None,
        intrinsics: Float[Tensor, "n 3 3"],
        camera_to_world: Float[Tensor, "n 4 4"],
        image_paths: Sequence[Path] = (),
        pristine: bool = False,
        empty: Bool[Tensor, "n h w"] | None = None,
    ) -> None:
        count = images.shape[0]
        assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[-1] == 3
        assert valid is None or valid.shape == images.shape[:3]
        assert intrinsics.shape == (count, 3, 3) and camera_to_world.shape == (count, 4, 4)
        self.images = images
        self.valid = valid
        self.intrinsics = intrinsics.float().cpu()
        self.camera_to_world = camera_to_world.float().cpu()
        self.image_paths = list(image_paths)
        self.pristine = pristine
        self.empty = empty
        self._distance_unit, self._angle_unit = self._neighbour_spacing()

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def height(self) -> int:
        """Height of the images in pixels, padding included."""
        return self.images.shape[1]

    @property
    def width(self) -> int:
        """Width of the images in pixels, padding included."""
        return self.images.shape[2]

    @classmethod
    def from_dataset(cls, dataset: InputDataset, background: Float[Tensor, " 3"] | None = None) -> SourceBank:
        """Reads, blends and undistorts every image of a dataset.

        Args:
            dataset: nerfstudio's training dataset.
            background: RGB in 0..1 behind transparent pixels if the dataset does not blend them itself; white if None.

        Raises:
            UserError: cameras that are neither perspective nor fisheye.
        """
        cameras = dataset.cameras
        count = len(dataset)
        types = cameras.camera_type.flatten().tolist()
        odd = sorted({CameraType(value).name for value in types if value not in PROJECTIONS})
        if odd:
            raise UserError(f"camera type {', '.join(odd)} cannot be a source view; expected PERSPECTIVE or FISHEYE")
        intrinsics, camera_to_world = opencv_cameras(cameras)
        distortions = np.zeros((count, 6))
        if cameras.distortion_params is not None:
            distortions[:] = cameras.distortion_params.cpu().numpy()
        distorted = np.array(types) == CameraType.FISHEYE.value
        distorted |= np.any(distortions != 0, axis=1)

        def read(index: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
            image, usable = load_image(dataset, index, background)
            clear = dataset.empty(index) if isinstance(dataset, PhotoDataset) else None
            if distorted[index]:
                lens = intrinsics[index].numpy(), distortions[index], types[index]
                if clear is not None:
                    clear = undistort(np.full_like(image, 255), *lens, mask=clear)[1]
                image, usable = undistort(image, *lens, usable)
            if usable is not None:
                image[~usable] = 0  # features reach beyond a pixel: what must not be used must not be seen
                clear = None if clear is None else clear & usable
            return image, usable, clear

        heights, widths = cameras.height.flatten(), cameras.width.flatten()
        height, width = int(heights.max()), int(widths.max())
        padded = bool((heights != height).any() or (widths != width).any())
        # Written in place: a list of images and then a stack would need the memory twice.
        images = torch.zeros(count, height, width, 3, dtype=torch.uint8)
        valid, empty = torch.zeros(2, count, height, width, dtype=torch.bool)
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            views = track(
                pool.map(read, range(count)),
                total=count,
                description="Reading source views",
                transient=True,
                disable=count < 20,
            )
            for index, (image, usable, clear) in enumerate(views):
                h, w = image.shape[:2]
                images[index, :h, :w] = torch.from_numpy(image)
                valid[index, :h, :w] = True if usable is None else torch.from_numpy(usable)
                if clear is not None:
                    empty[index, :h, :w] = torch.from_numpy(clear)
        return cls(
            images=images,
            valid=None if bool(valid.all()) else valid,
            intrinsics=intrinsics,
            camera_to_world=camera_to_world,
            image_paths=dataset.image_filenames,
            pristine=not padded and not distorted.any(),
            empty=empty if bool(empty.any()) else None,
        )

    def gather(self, ids: Int[Tensor, " k"] | Sequence[int], device: torch.device | str = "cpu") -> SourceViews:
        """The views of these ids, images as float32 in 0..1, on a device (bytes travel, floats are made there)."""
        ids = torch.as_tensor(ids, dtype=torch.long, device="cpu")
        return SourceViews(
            images=self.images[ids].to(device).float().div_(255.0),
            valid=None if self.valid is None else self.valid[ids].to(device),
            intrinsics=self.intrinsics[ids].to(device),
            camera_to_world=self.camera_to_world[ids].to(device),
            empty=None if self.empty is None else self.empty[ids].to(device),
        )

    def nearest(
        self,
        camera_to_world: Float[Tensor, "4 4"],
        k: int,
        exclude: int | Sequence[int] | Int[Tensor, " m"] | None = None,
        exclude_same_pose: bool = False,
        spare: int = 0,
    ) -> Int[Tensor, " k"]:
        """Ids of the k source views nearest to a camera, nearest first.

        Near means: the distance between the camera centres plus the angle between the optical axes, each divided by its
        median over the views' own nearest neighbours. The two sum to about 2 for a view next door. On an orbit both
        parts say the same; for cameras that look ahead side by side the distance decides, and for one that turns on the
        spot the angle. (IBRNet and GNT use the distance for forward-facing scenes and the angle at the scene's centre
        for orbits, and must be told which it is.)

        Args:
            camera_to_world: the target camera, OpenCV axes.
            k: how many.
            exclude: an id or ids to leave out: the target itself in training.
            exclude_same_pose: leave out views at the target's own pose, as in rendering the training views.
            spare: choose the k at random among the k + spare nearest, as IBRNet does in training so that the model
                learns to cope with sparser views. Draws from torch's global generator.

        Raises:
            UserError: fewer than k views are left.
        """
        target = camera_to_world.detach().to("cpu", torch.float32)
        distance, angle = _distance_and_angle(target, self.camera_to_world)
        score = distance / self._distance_unit + angle / self._angle_unit
        allowed = torch.ones(len(self), dtype=torch.bool)
        if exclude is not None:
            allowed[torch.as_tensor(exclude, dtype=torch.long, device="cpu")] = False
        if exclude_same_pose:
            allowed &= ~((distance < 1e-3 * self._distance_unit) & (angle < 1e-3))
        left = int(allowed.sum())
        if left < k:
            raise UserError(f"{k} source views asked for, {left} to choose from; expected num-source-views <= {left}")
        order = score.masked_fill(~allowed, torch.inf).argsort(stable=True)[: min(k + spare, left)]
        if len(order) > k:
            order = order[torch.randperm(len(order))[:k].sort().values]
        return order

    def nearest_to_rays(
        self, origins: Float[Tensor, "rays 3"], directions: Float[Tensor, "rays 3"]
    ) -> Int[Tensor, " rays"]:
        """Id of the source view nearest to each ray, which is taken for a camera that looks along it; see `nearest`.

        Args:
            origins: where the rays start, on any device.
            directions: of any length.
        """
        centres, axes = self.camera_to_world[:, :3, 3], self.camera_to_world[:, :3, 2]
        plain = "donot_use_mm_for_euclid_dist"  # the fast way cancels digits where cameras stand far from the origin
        found = [torch.zeros(0, dtype=torch.long)]
        for start in range(0, len(origins), _RAYS_AT_ONCE):
            these = slice(start, start + _RAYS_AT_ONCE)
            distance = torch.cdist(origins[these].cpu().float(), centres, compute_mode=plain)
            chord = torch.cdist(F.normalize(directions[these].cpu().float(), dim=-1), axes, compute_mode=plain)
            angle = 2.0 * torch.asin((chord / 2.0).clamp(max=1.0))
            found.append((distance / self._distance_unit + angle / self._angle_unit).argmin(dim=1))
        return torch.cat(found)

    def stand_at(self, ids: Int[Tensor, " rays"], origins: Float[Tensor, "rays 3"]) -> Bool[Tensor, " rays"]:
        """Whether each point is the centre of the source view of that id, as far as float32 can tell."""
        return (self.camera_to_world[ids, :3, 3] - origins).norm(dim=-1) < 1e-3 * self._distance_unit

    def _neighbour_spacing(self) -> tuple[float, float]:
        """Median distance (scene units) and angle (radians) from a view to its nearest neighbour in each."""
        if len(self) < 2:
            return 1.0, 1.0
        distances, angles = [], []
        for index in range(len(self)):
            distance, angle = _distance_and_angle(self.camera_to_world[index], self.camera_to_world)
            nearest = distance.masked_fill(torch.arange(len(self)) == index, torch.inf).argmin()
            distances.append(distance[nearest])
            angles.append(angle[nearest])
        distance, angle = torch.stack(distances).median(), torch.stack(angles).median()
        if distance == 0:  # pairs of views from one place
            distance = torch.stack(distances).max()
        # At least a degree: where all cameras look ahead, tiny differences in angle must not outweigh distance.
        return max(float(distance), 1e-9), max(float(angle), np.deg2rad(1.0))


def _distance_and_angle(
    target: Float[Tensor, "4 4"], cameras: Float[Tensor, "n 4 4"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Distances between camera centres, and angles in radians between optical axes."""
    distance = (cameras[:, :3, 3] - target[:3, 3]).norm(dim=-1)
    # From the chord, not the arc cosine: in float32 the latter sees no angle below 3e-4.
    chord = (cameras[:, :3, 2] - target[:3, 2]).norm(dim=-1)
    return distance, 2.0 * torch.asin((chord / 2.0).clamp(max=1.0))
