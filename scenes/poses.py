"""Camera poses of photos: features, matches and structure from motion, by pycolmap.

COLMAP's database holds the results of all long steps, so that an interrupted run continues where it was.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from shiftadd3d._errors import UserError
from shiftadd3d._extras import need
from shiftadd3d._progress import progress
from shiftadd3d.scenes.photo_options import LensModel
from shiftadd3d.scenes.photos import Photo

if TYPE_CHECKING:
    import pycolmap

__all__ = ["Lens", "Poses", "find_poses", "need_pycolmap", "pairs_to_match"]

_COLMAP_MODELS = {"radial": "SIMPLE_RADIAL", "opencv": "OPENCV", "pinhole": "SIMPLE_PINHOLE"}

_ALL_PAIRS_UP_TO = 60
"""Photos: of so many, every pair is matched."""
_SIMILAR = 20
"""Of more photos, each is matched with as many as look most like it,"""
_NEIGHBOURS = 5
"""and with so many on either side in the order of names or of time."""
_LOOPS = 5
"""Frames of a video have twice as many neighbours, and meet so many that look alike from other passages."""

_LARGEST = 192
"""Features of a photo, the largest ones, by which photos are found to look alike."""

_CLOSE = 0.9
"""Cosine between descriptors. Photos of three rooms had up to 9 features closer than that across rooms, and 11 to 40 on
average within one; at 0.8 the two were hard to tell apart."""

_FEW_FEATURES = 150
"""A photo with fewer is blurred, dark or plain."""


@dataclass(frozen=True)
class Lens:
    """A camera with nerfstudio's OPENCV parameters, in pixels, with the corner of the picture at (0, 0)."""

    width: int
    height: int
    fl_x: float
    fl_y: float
    cx: float
    cy: float
    k1: float = 0.0
    k2: float = 0.0
    p1: float = 0.0
    p2: float = 0.0


@dataclass(frozen=True)
class Poses:
    """The result for all photos."""

    lenses: dict[str, Lens]
    """Each registered photo's camera, by file."""
    camera_to_world: dict[str, np.ndarray]
    """Each registered photo's pose by file, [4, 4]: x right, y down, z forward, in a world whose z is up."""
    point_cloud: Path
    """A PLY file of the points that were triangulated, with colours."""
    points: int
    """How many these are."""
    depths: np.ndarray
    """The z-depth of every point in every photo that shows it."""
    error: float
    """Mean distance in pixels between where a point is seen and where it should be."""


def _take_sigterm_back() -> None:
    """Give Python's handler its place again: pycolmap's, there once it is imported, shows a stack and aborts."""
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGTERM)
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)


def need_pycolmap() -> None:
    """Check that pycolmap is installed.

    Raises:
        UserError: it is not installed.
    """
    need("finding poses", "pycolmap", extra="poses")


def find_poses(
    photos: Sequence[Photo],
    images: Path,
    work: Path,
    *,
    in_sequence: bool,
    lens: LensModel,
    threads: int,
    seed: int,
    console: Console | None,
) -> Poses:
    """Find the poses of as many of `photos` as one model can hold.

    Args:
        photos: in order.
        images: the folder with their files.
        work: folder for the database. Results in it are not computed again.
        in_sequence: whether they are frames of a video, so that neighbours overlap.
        lens: distortion to fit: one radial term, four terms, or none.
        threads: CPU threads.
        seed: seed of the random samples of robust estimators.
        console: shows progress; None shows none.

    Raises:
        UserError: there is no model, or one without parallax. The message says how to take better photos.
    """
    need_pycolmap()
    import pycolmap

    _take_sigterm_back()
    # Its log is for people who know COLMAP; what went wrong is told below.
    pycolmap.logging.minloglevel = pycolmap.logging.FATAL.value
    pycolmap.set_random_seed(seed)
    database = work / "database.db"
    _extract(pycolmap, database, images, photos, lens, threads, console)
    with pycolmap.Database.open(database) as opened:
        ids = {image.name: image.image_id for image in opened.read_all_images()}
        features = {photo.file: opened.num_keypoints_for_image(ids[photo.file]) for photo in photos}
        pairs = pairs_to_match(len(photos), in_sequence, lambda: _similarity(opened, [ids[p.file] for p in photos]))
    _match(pycolmap, database, work, [(photos[a].file, photos[b].file) for a, b in pairs], threads, seed, console)

    graph = _Overlaps.read(pycolmap, database, [ids[photo.file] for photo in photos])
    settings = (pycolmap, database, images, work, len(photos), threads, seed, console)
    model = _largest(_map(*settings, at_once=False))
    if model is None or 2 * model.num_reg_images() < len(photos):
        # Global mapping starts from all photos at once, and finds its way where no pair is a good start.
        other = _largest(_map(*settings, at_once=True))
        if other is not None and (model is None or other.num_reg_images() > model.num_reg_images()):
            model = other
    if model is None or model.num_reg_images() < 3:
        raise UserError(_why_nothing(photos, features, graph))
    _turn_upright(pycolmap, model)
    poses = _poses(model, work / "sparse_pc.ply")
    centres = np.stack([pose[:3, 3] for pose in poses.camera_to_world.values()])
    spread = float(np.linalg.norm(centres - centres.mean(0), axis=1).max())
    # Of photos from one spot a wrong focal length can make a model; their pairs tell: a homography explains each.
    flat = graph.without_parallax > 0.9 * graph.verified
    if flat or not len(poses.depths) or spread < 0.01 * float(np.median(poses.depths)):
        raise UserError(_NO_PARALLAX)
    return poses


# --------------------------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------------------------


def _extract(
    pycolmap: Any,
    database: Path,
    images: Path,
    photos: Sequence[Photo],
    lens: LensModel,
    threads: int,
    console: Console | None,
) -> None:
    """Features of all photos that have none in the database yet, one camera for each `Photo.camera`."""
    cameras: dict[str, int] = {}
    with pycolmap.Database.open(database) as opened:
        known = {image.name: image for image in opened.read_all_images()}
        done = {name for name, image in known.items() if opened.exists_keypoints(image.image_id)}
        for photo in photos:
            if photo.file in known:
                cameras[photo.camera] = known[photo.file].camera_id
    options = pycolmap.FeatureExtractionOptions()
    options.num_threads = threads
    options.use_gpu = False
    left = [photo for photo in photos if photo.file not in done]
    with progress(
        "finding features",
        len(photos),
        unit="photos",
        done=len(photos) - len(left),
        console=console,
        disable=console is None,
    ) as steps:
        while left:
            # The first photo of a camera makes the camera; those that follow it name it.
            camera = cameras.get(left[0].camera)
            chunk = [photo for photo in left if photo.camera == left[0].camera][: 1 if camera is None else 2 * threads]
            reader = pycolmap.ImageReaderOptions()
            reader.camera_model = _COLMAP_MODELS[lens]
            if camera is not None:
                reader.existing_camera_id = camera
            elif chunk[0].focal is not None:
                reader.camera_params = _camera_params(chunk[0], lens)
            pycolmap.extract_features(
                database,
                images,
                image_names=[photo.file for photo in chunk],
                camera_mode=pycolmap.CameraMode.SINGLE,
                reader_options=reader,
                extraction_options=options,
            )
            if camera is None:
                with pycolmap.Database.open(database) as opened:
                    cameras[left[0].camera] = opened.read_image_with_name(chunk[0].file).camera_id
            left = [photo for photo in left if photo not in chunk]
            steps.advance(len(chunk))


def _camera_params(photo: Photo, lens: LensModel) -> str:
    """COLMAP's list of a camera's parameters, with the focal length that EXIF tells."""
    focal, centre = f"{photo.focal}", f"{photo.width / 2},{photo.height / 2}"
    return {
        "radial": f"{focal},{centre},0",
        "opencv": f"{focal},{focal},{centre},0,0,0,0",
        "pinhole": f"{focal},{centre}",
    }[lens]


# --------------------------------------------------------------------------------------------------------------------
# Matches
# --------------------------------------------------------------------------------------------------------------------


def pairs_to_match(count: int, in_sequence: bool, similarity: Callable[[], np.ndarray]) -> list[tuple[int, int]]:
    """The photos to compare: all pairs if there are few photos, else those that look alike, and neighbours in order.

    Frames of a video are compared with 10 neighbours and with those 16, 32, ... frames later, which bridges blurred
    passages, and with a few similar frames of other passages, which closes loops.

    Args:
        count: number of photos.
        in_sequence: whether they are frames of a video.
        similarity: gives how alike two photos look, [count, count]. It is called only if needed.
    """
    if count <= _ALL_PAIRS_UP_TO and not (in_sequence and count > _ALL_PAIRS_UP_TO // 2):
        return [(a, b) for a in range(count) for b in range(a + 1, count)]
    pairs: set[tuple[int, int]] = set()
    alike = np.array(similarity(), dtype=np.float64)
    np.fill_diagonal(alike, -1)
    near = 2 * _NEIGHBOURS if in_sequence else _NEIGHBOURS
    steps = {*range(1, near + 1), *(2**k for k in range(4, 10) if in_sequence)}
    for a in range(count):
        pairs.update((a, a + step) for step in steps if a + step < count)
        others = [b for b in np.argsort(-alike[a], kind="stable").tolist() if not in_sequence or abs(a - b) > near]
        pairs.update((min(a, b), max(a, b)) for b in others[: _LOOPS if in_sequence else _SIMILAR] if alike[a, b] > 0)
    return sorted(pairs)


def _similarity(database: pycolmap.Database, ids: Sequence[int]) -> np.ndarray:
    """How many of the largest features of two photos are each other's nearest, [n, n].

    Large features are few, and the same from near and from far: a fraction of what matching all would take finds the
    pairs worth it (Wu, "Towards linear-time incremental structure from motion", 2013, section 3.1).
    """
    descriptors = np.zeros((len(ids), _LARGEST, 128), dtype=np.float32)
    for row, image in enumerate(ids):
        keypoints = np.asarray(database.read_keypoints(image))
        if len(keypoints) == 0:
            continue
        found = database.read_descriptors(image)
        data = np.asarray(found.data if hasattr(found, "data") else found, dtype=np.float32)
        scale = np.hypot(keypoints[:, 2], keypoints[:, -2]) if keypoints.shape[1] > 4 else keypoints[:, 2]
        largest = data[np.argsort(-scale, kind="stable")[:_LARGEST]]
        descriptors[row, : len(largest)] = largest / np.maximum(np.linalg.norm(largest, axis=1, keepdims=True), 1e-9)
    count = np.zeros((len(ids), len(ids)))
    flat = descriptors.reshape(-1, 128)
    for a in range(len(ids)):
        products = (descriptors[a] @ flat[a * _LARGEST :].T).reshape(_LARGEST, -1, _LARGEST)
        forward = products.argmax(axis=2)  # [features, photos]
        backward = products.argmax(axis=0)  # [photos, features]
        close = products.max(axis=2) > _CLOSE
        mutual = np.arange(_LARGEST)[:, None] == np.take_along_axis(backward, forward.T, axis=1).T
        count[a, a:] = count[a:, a] = (mutual & close).sum(axis=0)
    return count


def _match(
    pycolmap: Any,
    database: Path,
    work: Path,
    pairs: Sequence[tuple[str, str]],
    threads: int,
    seed: int,
    console: Console | None,
) -> None:
    """Matches the pairs that the database has no matches of yet, and verifies their geometry."""
    with pycolmap.Database.open(database) as opened:
        ids = {image.name: image.image_id for image in opened.read_all_images()}
        left = [
            (a, b)
            for a, b in pairs
            if not (opened.exists_matches(ids[a], ids[b]) and opened.exists_two_view_geometry(ids[a], ids[b]))
        ]
    matching = pycolmap.FeatureMatchingOptions()
    matching.num_threads = threads
    matching.use_gpu = False
    geometry = pycolmap.TwoViewGeometryOptions()
    geometry.ransac.random_seed = seed
    listed = work / "pairs.txt"
    pairing = pycolmap.ImportedPairingOptions()
    pairing.match_list_path = listed
    chunk = 25 * threads
    with progress(
        "comparing photos",
        len(pairs),
        unit="pairs",
        done=len(pairs) - len(left),
        console=console,
        disable=console is None,
    ) as steps:
        for start in range(0, len(left), chunk):
            some = left[start : start + chunk]
            listed.write_text("".join(f"{a} {b}\n" for a, b in some))
            pycolmap.match_image_pairs(
                database, matching_options=matching, pairing_options=pairing, verification_options=geometry
            )
            steps.advance(len(some))


@dataclass(frozen=True)
class _Overlaps:
    """Which photos see the same things."""

    verified: int
    """Pairs whose matches obey some geometry."""
    without_parallax: int
    """Those of them that a single homography explains: seen from one spot, or of a flat thing."""
    connected: int
    """Photos in the largest group that verified pairs hold together."""

    @staticmethod
    def read(pycolmap: Any, database: Path, ids: Sequence[int]) -> _Overlaps:
        with pycolmap.Database.open(database) as opened:
            keys, geometries = opened.read_two_view_geometries()
        kind = pycolmap.TwoViewGeometryConfiguration
        parent = {image: image for image in ids}

        def root(image: int) -> int:
            while parent[image] != image:
                image = parent[image]
            return image

        verified = flat = 0
        for key, geometry in zip(keys, geometries, strict=True):
            if len(geometry.inlier_matches) < 15:
                continue
            verified += 1
            flat += kind(geometry.config) in (kind.PLANAR, kind.PANORAMIC, kind.PLANAR_OR_PANORAMIC)
            a, b = pycolmap.pair_id_to_image_pair(key)
            parent[root(a)] = root(b)
        roots = [root(image) for image in ids]
        return _Overlaps(verified, flat, max(roots.count(each) for each in set(roots)))


# --------------------------------------------------------------------------------------------------------------------
# Structure from motion
# --------------------------------------------------------------------------------------------------------------------


def _map(
    pycolmap: Any,
    database: Path,
    images: Path,
    work: Path,
    count: int,
    threads: int,
    seed: int,
    console: Console | None,
    *,
    at_once: bool,
) -> dict[int, Any]:
    """Models of the photos: by global mapping of all `at_once`, or from photo to photo."""
    options = pycolmap.GlobalPipelineOptions() if at_once else pycolmap.IncrementalPipelineOptions()
    options.num_threads, options.random_seed = threads, seed
    title = "placing photos, second try" if at_once else "placing photos"
    with progress(title, count, unit="photos", console=console, disable=console is None) as steps:
        if at_once:
            return pycolmap.global_mapping(database, images, work / "global", options=options)
        options.min_model_size = 3

        def placed() -> None:
            # Several models may be tried, and photos placed in each.
            if steps.done < count:
                steps.advance()

        return pycolmap.incremental_mapping(
            database, images, work / "incremental", options=options, next_image_callback=placed
        )


def _largest(models: dict[int, Any]) -> Any | None:
    """The model with the most photos, and of these with the most points."""
    sizes = [(model.num_reg_images(), model.num_points3D(), model) for model in models.values()]
    return max(sizes, key=lambda size: size[:2])[2] if sizes else None


def _turn_upright(pycolmap: Any, model: pycolmap.Reconstruction) -> None:
    """Let the world's z be up: a model has no up of its own, and viewers and paths need one.

    Up is what is at right angles to the photos' horizontal axes, as people hold cameras level; where these all point
    one way and leave it free, it is the mean of what is up in the photos.
    """
    axes = np.stack([model.image(image).cam_from_world().matrix()[:, :3] for image in model.reg_image_ids()])
    right, mean = axes[:, 0], -axes[:, 1].mean(0)  # y in the camera points down
    up = np.linalg.solve(right.T @ right / len(right) + 1e-3 * np.eye(3), mean)
    if not np.linalg.norm(mean) > 1e-6:
        return
    up /= np.linalg.norm(up)
    # The right-angled frame whose third axis is up, and whose first is as near as can be to the world's.
    first = np.eye(3)[int(np.argmin(np.abs(up)))]
    second = np.cross(up, first)
    second /= np.linalg.norm(second)
    rotation = np.stack([np.cross(second, up), second, up])
    model.transform(pycolmap.Sim3d(1.0, pycolmap.Rotation3d(rotation), np.zeros(3)))


def _poses(model: pycolmap.Reconstruction, point_cloud: Path) -> Poses:
    model.export_PLY(point_cloud)
    lenses, poses, depths = {}, {}, []
    for image_id in model.reg_image_ids():
        image = model.image(image_id)
        world_to_camera = np.vstack([image.cam_from_world().matrix(), [0, 0, 0, 1]])
        poses[image.name] = np.linalg.inv(world_to_camera)
        lenses[image.name] = _lens(model.camera(image.camera_id))
        seen = [model.point3D(point.point3D_id).xyz for point in image.get_observation_points2D()]
        if seen:
            depths.append(np.stack(seen) @ world_to_camera[2, :3] + world_to_camera[2, 3])
    order = sorted(poses)
    return Poses(
        lenses={name: lenses[name] for name in order},
        camera_to_world={name: poses[name] for name in order},
        point_cloud=point_cloud,
        points=model.num_points3D(),
        depths=np.concatenate(depths) if depths else np.empty(0),
        error=model.compute_mean_reprojection_error(),
    )


def _lens(camera: pycolmap.Camera) -> Lens:
    distortion = list(camera.params[max(*camera.focal_length_idxs(), *camera.principal_point_idxs()) + 1 :])
    k1, k2, p1, p2 = (*distortion, 0.0, 0.0, 0.0, 0.0)[:4]
    return Lens(
        width=camera.width,
        height=camera.height,
        fl_x=camera.focal_length_x,
        fl_y=camera.focal_length_y,
        cx=camera.principal_point_x,
        cy=camera.principal_point_y,
        k1=k1,
        k2=k2,
        p1=p1,
        p2=p2,
    )


_NO_PARALLAX = (
    "the photos show no parallax: they seem taken from one spot, or show one flat thing; step sideways between photos, "
    "so that near things move before far ones"
)


def _why_nothing(photos: Sequence[Photo], features: dict[str, int], graph: _Overlaps) -> str:
    """What keeps the photos from being placed, and what to do about it."""
    few = [photo.name for photo in photos if features[photo.file] < _FEW_FEATURES]
    start = f"none of the {len(photos)} photos could be placed"
    if 2 * len(few) > len(photos):
        return (
            f"{start}: {len(few)} of them show hardly anything to recognise (blurred, dark, or plain walls); "
            "hold still, take more light, and have something with texture in every photo"
        )
    if graph.verified and 2 * graph.without_parallax > graph.verified:
        return _NO_PARALLAX
    if graph.connected < 3:
        return (
            f"{start}: no three of them show the same things; photograph one scene, each photo overlapping "
            "the one before by two thirds"
        )
    return f"{start}: too few overlap well; take more photos with smaller steps between them, from all around"
