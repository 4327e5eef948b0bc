"""Every format and dialect of camera files, and every key: read, harmless or refused."""

from __future__ import annotations

import json
import struct
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("nerfstudio")

from nerfstudio.cameras.cameras import CameraType
from nerfstudio.data.datasets.base_dataset import InputDataset

from shiftadd3d import UserError
from shiftadd3d.nerf.dataparsers import AutoDataParserConfig, files, find_scene
from shiftadd3d.nerf.dataparsers.keys import KEYS
from shiftadd3d.nerf.near_far import near_far_from_matches, scene_near_far
from shiftadd3d.nerf.photos import PhotoDataset
from shiftadd3d.nerf.source_bank import SourceBank
from shiftadd3d.scenes import scene_path

# --------------------------------------------------------------------------------------------------------------------
# One scene, written in every format and dialect
# --------------------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, FOCAL = 24, 16, 20.0
OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def names(count: int, stem: str = "view", suffix: str = ".png") -> list[str]:
    return [f"{stem}{index:03d}{suffix}" for index in range(count)]


def _pictures(folder: Path, files: Sequence[str]) -> None:
    for seed, file in enumerate(files):
        picture(folder / file, seed)


def pinhole() -> dict[str, Any]:
    return {"fl_x": FOCAL, "fl_y": FOCAL, "cx": WIDTH / 2, "cy": HEIGHT / 2, "w": WIDTH, "h": HEIGHT}


def angle() -> float:
    return 2 * float(np.arctan(WIDTH / 2 / FOCAL))


def nerfstudio(folder: Path, poses: np.ndarray, stem: str = "view") -> None:
    files = [f"images/{name}" for name in names(len(poses), stem)]
    _pictures(folder, files)
    frames = [{"file_path": f, "transform_matrix": p.tolist()} for f, p in zip(files, poses, strict=True)]
    (folder / "transforms.json").write_text(json.dumps({**pinhole(), "camera_model": "OPENCV", "frames": frames}))


def per_frame(folder: Path, poses: np.ndarray, stem: str = "view") -> None:
    """Polycam, Record3D: a lens for each frame; a rough one for all of them beside it."""
    nerfstudio(folder, poses, stem)
    meta = json.loads((folder / "transforms.json").read_text())
    for frame in meta["frames"]:
        frame.update(pinhole())
    meta.update(fl_x=FOCAL * 1.4, fl_y=FOCAL * 1.4)
    (folder / "transforms.json").write_text(json.dumps(meta))


def ngp(folder: Path, poses: np.ndarray, stem: str = "view") -> None:
    """instant-ngp: an angle of view, no size, no suffix, its own units."""
    files = [f"images/{name}" for name in names(len(poses), stem)]
    _pictures(folder, files)
    frames = [
        {"file_path": f"./{f.removesuffix('.png')}", "sharpness": 30.0, "transform_matrix": p.tolist()}
        for f, p in zip(files, poses, strict=True)
    ]
    meta = {"camera_angle_x": angle(), "aabb_scale": 16, "scale": 0.33, "offset": [0.5, 0.5, 0.5], "k1": 0, "k2": 0}
    (folder / "transforms.json").write_text(json.dumps({**meta, "is_fisheye": False, "frames": frames}))


def ngp_degrees(folder: Path, poses: np.ndarray, stem: str = "view") -> None:
    """instant-ngp's `x_fov`, and matrices with OpenCV axes; a byte-order mark, UTF-16, Windows' separators."""
    files = [f"images/{name}" for name in names(len(poses), stem)]
    _pictures(folder, files)
    frames = [
        {"file_path": f.replace("/", "\\"), "transform_matrix": (p @ OPENCV)[:3].tolist()}
        for f, p in zip(files, poses, strict=True)
    ]
    meta = {"x_fov": np.degrees(angle()), "from_na": True, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(meta), encoding="utf-16")


def blender(folder: Path, poses: np.ndarray, stem: str = "view") -> None:
    """NeRF's synthetic scenes: no suffix, depth maps and normals beside the pictures."""
    files = [f"train/{name}" for name in names(len(poses), stem)]
    _pictures(folder, files)
    for file in files:
        for kind in ("depth", "normal"):
            picture(folder / file.replace(".png", f"_{kind}_0001.png"))
    frames = [
        {"file_path": f"./{f.removesuffix('.png')}", "rotation": 0.01, "transform_matrix": p.tolist()}
        for f, p in zip(files, poses, strict=True)
    ]
    meta = {"camera_angle_x": angle(), "frames": frames}
    (folder / "transforms_train.json").write_text(json.dumps(meta))
    for split in ("val", "test"):
        (folder / f"transforms_{split}.json").write_text(json.dumps({**meta, "frames": frames[:2]}))


def blender_nerf(folder: Path, poses: np.ndarray, stem: str = "view") -> None:
    """The BlenderNeRF add-on: with suffix, lens in pixels, sizes as floats, no validation views."""
    files = [f"images_train/{name}" for name in names(len(poses), stem, ".jpg")]
    _pictures(folder, files)
    frames = [{"file_path": f, "transform_matrix": p.tolist()} for f, p in zip(files, poses, strict=True)]
    lens = {key: float(value) for key, value in pinhole().items()} | {"k1": 0.0, "k2": 0.0, "p1": 0.0, "p2": 0.0}
    meta = {"camera_angle_x": angle(), "camera_angle_y": 2 * float(np.arctan(HEIGHT / 2 / FOCAL)), **lens}
    (folder / "transforms_train.json").write_text(json.dumps({**meta, "aabb_scale": 4, "frames": frames}))
    (folder / "transforms_test.json").write_text(json.dumps({**meta, "frames": frames[-1:]}))


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """w, x, y, z of a rotation matrix: the eigenvector of its largest eigenvalue (Bar-Itzhack)."""
    r = rotation
    k = np.array(
        [
            [r[0, 0] - r[1, 1] - r[2, 2], 0, 0, 0],
            [r[0, 1] + r[1, 0], r[1, 1] - r[0, 0] - r[2, 2], 0, 0],
            [r[0, 2] + r[2, 0], r[1, 2] + r[2, 1], r[2, 2] - r[0, 0] - r[1, 1], 0],
            [r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], np.trace(r)],
        ]
    )
    x, y, z, w = np.linalg.eigh(k)[1][:, -1]  # of the lower triangle
    return np.array([w, x, y, z])


def colmap_text(
    folder: Path,
    poses: np.ndarray,
    stem: str = "view",
    model: str = "sparse/0",
    points: np.ndarray | None = None,
    camera: str = f"PINHOLE {WIDTH} {HEIGHT} {FOCAL} {FOCAL} {WIDTH / 2} {HEIGHT / 2}",
) -> None:
    """A text model, with comments, and (COLMAP 3.12) files of rigs and frames beside it."""
    files = names(len(poses), stem)
    _pictures(folder / "images", files)
    where = folder / model
    where.mkdir(parents=True)
    (where / "cameras.txt").write_text(f"# Camera list\n1 {camera}\n")
    lines = ["# Image list", "#   IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME"]
    for index, (file, (rotation, translation)) in enumerate(zip(files, _world_to_camera(poses), strict=True)):
        numbers = " ".join(repr(float(value)) for value in (*quaternion(rotation), *translation))
        lines += [f"{index + 1} {numbers} 1 {file}", ""]
    (where / "images.txt").write_text("\n".join(lines) + "\n")
    rows = [] if points is None else points
    (where / "points3D.txt").write_text(
        "".join(
            f"{i} {p[0]!r} {p[1]!r} {p[2]!r} 9 9 9 0.5 1 0 2 0 3 0\n" for i, p in enumerate(np.asarray(rows).tolist())
        )
    )
    for file in ("rigs.txt", "frames.txt"):
        (where / file).write_text("# COLMAP 3.12\n1 1 CAMERA 1\n")


def colmap_binary(
    folder: Path,
    poses: np.ndarray,
    stem: str = "view",
    model: str = "sparse/0",
    points: np.ndarray | None = None,
    camera: tuple[int, tuple[float, ...]] = (1, (FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2)),
) -> None:
    """A binary model."""
    files = names(len(poses), stem)
    _pictures(folder / "images", files)
    where = folder / model
    where.mkdir(parents=True)
    number, parameters = camera
    (where / "cameras.bin").write_bytes(
        struct.pack(f"<QiiQQ{len(parameters)}d", 1, 1, number, WIDTH, HEIGHT, *parameters)
    )
    data = struct.pack("<Q", len(poses))
    for index, (file, (rotation, translation)) in enumerate(zip(files, _world_to_camera(poses), strict=True)):
        data += struct.pack("<i7di", index + 1, *quaternion(rotation), *translation, 1) + file.encode() + b"\0"
        data += struct.pack("<Q", 2) + struct.pack("<2dq", 1.0, 2.0, -1) * 2
    (where / "images.bin").write_bytes(data)
    rows = [] if points is None else points.tolist()
    data = struct.pack("<Q", len(rows))
    for index, point in enumerate(rows):
        data += struct.pack("<Q3d3BdQ6i", index, *point, 9, 9, 9, 0.5, 3, 1, 0, 2, 0, 3, 0)
    (where / "points3D.bin").write_bytes(data)


def _world_to_camera(poses: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    turned = poses @ OPENCV
    return [(pose[:3, :3].T, -pose[:3, :3].T @ pose[:3, 3]) for pose in turned]


def llff(folder: Path, poses: np.ndarray, stem: str = "view") -> None:
    """Images four times smaller than the photos that the file speaks of."""
    _pictures(folder / "images_4", names(len(poses), stem))
    right, up, back, centre = (poses[:, :3, i] for i in range(4))
    size = np.tile([HEIGHT * 4, WIDTH * 4, FOCAL * 4], (len(poses), 1))
    matrices = np.stack([-up, right, back, centre, size], axis=-1).reshape(-1, 15)
    extent = float(np.abs(centre - centre.mean(axis=0)).max())
    bounds = np.tile([0.5 * extent, 2.0 * extent], (len(poses), 1))
    np.save(folder / "poses_bounds.npy", np.concatenate([matrices, bounds], axis=1))


WRITERS: dict[str, Callable[..., None]] = {
    "nerfstudio": nerfstudio,
    "per-frame": per_frame,
    "ngp": ngp,
    "ngp-degrees": ngp_degrees,
    "blender": blender,
    "blender-nerf": blender_nerf,
    "colmap-text": colmap_text,
    "colmap-binary": colmap_binary,
    "llff": llff,
}


# --------------------------------------------------------------------------------------------------------------------
# What is read
# --------------------------------------------------------------------------------------------------------------------


def parse(data: Path, split: str = "train", **options: Any):
    return AutoDataParserConfig(data=data, **{"eval_mode": "all", **options}).setup().get_dataparser_outputs(split)


def refused(data: Path, **options: Any) -> str:
    """The message of the UserError that parsing ends in, which is one line."""
    with pytest.raises(UserError) as caught:
        parse(data, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What is said on the console, line by line."""
    lines: list[str] = []
    monkeypatch.setattr(files.CONSOLE, "print", lambda line, **_: lines.append(line))
    return lines


def edit(path: Path, **changes: Any) -> Path:
    """Puts keys into a camera file; None takes one out."""
    meta = json.loads(path.read_text())
    meta.update(changes)
    path.write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))
    return path.parent


def edit_frames(path: Path, change: Callable[[int, dict[str, Any]], Any]) -> Path:
    meta = json.loads(path.read_text())
    for index, frame in enumerate(meta["frames"]):
        change(index, frame)
    path.write_text(json.dumps(meta))
    return path.parent


def rays(outputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Origins and directions [n, h, w, 3] of every pixel, float64, seen from the first camera; the farthest camera is
    at distance one from it."""
    cameras = outputs.cameras
    found = [cameras.generate_rays(index, keep_shape=True) for index in range(len(cameras))]
    origins = torch.stack([bundle.origins for bundle in found]).double()
    directions = torch.stack([bundle.directions for bundle in found]).double()
    first = cameras.camera_to_worlds[0].double()
    origins = (origins - first[:, 3]) @ first[:, :3]
    return origins / origins.norm(dim=-1).max(), directions @ first[:, :3]


def assert_same_rays(outputs, expected, tolerance: float = 1e-4) -> None:
    for found, wanted in zip(rays(outputs), rays(expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def orbit(orbit_poses) -> np.ndarray:
    """Ten views that no symmetry maps onto each other."""
    poses = orbit_poses(10)
    poses[:, :3, 3] += np.random.default_rng(1).normal(size=(10, 3)) * 0.3
    return poses


@pytest.fixture(scope="module")
def plain(orbit, tmp_path_factory):
    """The outputs of the scene in nerfstudio's form, at the origin."""
    folder = tmp_path_factory.mktemp("plain")
    nerfstudio(folder, orbit)
    return parse(folder)


def similar(poses: np.ndarray, shift: Sequence[float], scale: float, turn: Sequence[float]) -> np.ndarray:
    """Poses in another world: turned about an axis (a rotation vector), scaled, moved."""
    angle_ = float(np.linalg.norm(turn)) or 1e-12
    x, y, z = np.array(turn) / angle_
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation = np.eye(3) + np.sin(angle_) * cross + (1 - np.cos(angle_)) * cross @ cross
    moved = poses.copy()
    moved[:, :3, :3] = rotation @ poses[:, :3, :3]
    moved[:, :3, 3] = scale * poses[:, :3, 3] @ rotation.T + shift
    return moved


UTM = (441547.5, 5121946.5, 2345.1)


@pytest.mark.parametrize("name", WRITERS)
def test_a_scene_in_map_coordinates_gives_the_rays_of_the_plain_one(name, orbit, plain, tmp_path):
    moved = similar(orbit, UTM, 1.0, (0.3, -0.2, 2.0))
    WRITERS[name](tmp_path, moved)
    outputs = parse(tmp_path)
    assert_same_rays(outputs, plain, tolerance=2e-5)
    centres = outputs.cameras.camera_to_worlds[:, :, 3]
    assert float(centres.abs().max()) == pytest.approx(1.0)
    torch.testing.assert_close(centres.mean(dim=0), torch.zeros(3), rtol=0, atol=1e-5)
    # And back: to the millimetre, which float32 does not have at 5,000 km.
    original = outputs.transform_poses_to_original_space(outputs.cameras.camera_to_worlds, camera_convention="opengl")
    np.testing.assert_allclose(original.numpy(), moved[:, :3], rtol=0, atol=1e-3 if "colmap" not in name else 2e-3)
    # A command that keeps the transform in JSON keeps it whole.
    outputs.save_dataparser_transform(tmp_path / "kept.json")
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert np.array_equal(np.array(kept["transform"]), outputs.dataparser_transform.numpy())
    assert outputs.dataparser_transform.dtype == torch.float64


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(WRITERS)),
    shift=st.sampled_from([0.0, 1.0, 1e5, 5e6]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    turn=st.tuples(*[st.floats(-3, 3)] * 3),
    stem=st.sampled_from(["view", "with a blank ", "deep/er/", "grün_", "100%[red]_"]),
)
def test_a_scene_moved_scaled_turned_and_renamed_in_any_format_gives_the_same_rays(
    name, shift, scale, turn, stem, orbit, plain, tmp_path_factory
):
    if name == "llff" and "/" in stem:
        stem = "flat_"  # its images are those directly in the folder
    folder = tmp_path_factory.mktemp("scene")
    WRITERS[name](folder, similar(orbit, (shift, -shift, 0.3 * shift), scale, turn), stem=stem)
    outputs = parse(folder)
    assert_same_rays(outputs, plain, tolerance=2e-3 if shift / scale > 1e9 else 1e-4)
    assert [path.stem for path in outputs.image_filenames] == [f"{stem}{i:03d}".split("/")[-1] for i in range(10)]


@pytest.mark.parametrize("shift", [0.0, 5e6])
@pytest.mark.parametrize("writer", [colmap_text, colmap_binary])
def test_colmap_points_move_with_the_cameras(writer, shift, orbit, tmp_path):
    points = np.random.default_rng(0).normal(size=(300, 3))
    writer(tmp_path, similar(orbit, (shift, shift, 0), 1.0, (0, 0, 0)), points=points + np.array([shift, shift, 0]))
    outputs = parse(tmp_path)
    scaled = outputs.metadata["points3D_xyz"]
    pose = torch.eye(4)[:3].repeat(300, 1, 1)
    pose[:, :, 3] = scaled
    back = outputs.transform_poses_to_original_space(pose, camera_convention="opengl")[:, :, 3]
    np.testing.assert_allclose(back.numpy(), points + np.array([shift, shift, 0]), rtol=0, atol=1e-4)
    assert (outputs.metadata["points3D_num_points2D"] == 3).all()


@contextmanager
def _rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    path = folder / "transforms.json"
    before = path.read_text()
    meta = json.loads(before)
    change(meta)
    path.write_text(json.dumps(meta))
    try:
        yield
    finally:
        path.write_text(before)


@pytest.fixture(scope="module")
def scene_folder(orbit, tmp_path_factory) -> Path:
    """The plain scene; a test puts back what it changes."""
    folder = tmp_path_factory.mktemp("keys")
    nerfstudio(folder, orbit)
    return folder


# --------------------------------------------------------------------------------------------------------------------
# Keys
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "frame"])
def test_harmless_keys_change_nothing(place, scene_folder, plain, said):
    values = [0.25, 7, True, "words", [1.0, 2.0], {"a": 1}, None]
    harmless = [name for name, key in KEYS.items() if key.verdict == "harmless"]

    def add(meta):
        for index, name in enumerate(harmless):
            (meta if place == "file" else meta["frames"][3])[name] = values[index % len(values)]

    with _rewritten(scene_folder, add):
        assert_same_rays(parse(scene_folder), plain, tolerance=0)
    assert not said


@pytest.mark.parametrize("place", ["file", "frame"])
@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.verdict == "refused"])
def test_keys_that_cannot_be_read_are_refused_by_name_unless_they_say_nothing(name, place, scene_folder, plain):
    def put(meta, value):
        if name == "time":  # what matters is whether it differs
            for index, frame in enumerate(meta["frames"]):
                frame[name] = value and index / 10
        elif name.startswith("transform_matrix_"):
            frame = meta["frames"][3]
            frame[name] = frame["transform_matrix"]
            if value:
                moved = np.array(frame["transform_matrix"])
                moved[0, 3] += 1
                frame["transform_matrix"] = moved.tolist()
        else:
            (meta if place == "file" else meta["frames"][3])[name] = value

    with _rewritten(scene_folder, lambda meta: put(meta, 0)):
        assert_same_rays(parse(scene_folder), plain, tolerance=0)
    with _rewritten(scene_folder, lambda meta: put(meta, [0, 1.5])):
        message = refused(scene_folder)
        assert name in message
        assert "is not supported; " in message and ("expected" in message or "undistort" in message)


def test_unknown_keys_are_named_in_one_line_once(scene_folder, plain, said):
    def add(meta):
        meta["camera_roll"] = 1
        for frame in meta["frames"]:
            frame.update(gimbal=[1], sharpness=3.0)

    parser = AutoDataParserConfig(data=scene_folder, eval_mode="all").setup()
    with _rewritten(scene_folder, add):
        assert_same_rays(parser.get_dataparser_outputs("train"), plain, tolerance=0)
        parser.get_dataparser_outputs("test")
    assert said == [
        f"{scene_folder}/transforms.json: not read, as no program known here writes it: camera_roll, gimbal"
    ]


def test_the_page_on_camera_files_lists_every_key(repository):
    page = (repository / "docs/camera-files.md").read_text()
    for name, key in KEYS.items():
        assert f"| `{name}` | {key.verdict} | {key.note} | {key.writers} |" in page
    assert page.partition("## Keys")[2].count("\n| `") == len(KEYS)


def test_null_is_as_good_as_absent(scene_folder, plain, said):
    names_ = [name for name in KEYS if name not in ("frames", "file_path", "transform_matrix")]

    def add(meta):
        for values in (meta, *meta["frames"]):
            values.update({name: None for name in names_ if name not in values})

    with _rewritten(scene_folder, add):
        assert_same_rays(parse(scene_folder), plain, tolerance=0)
    assert not said


INTRINSICS = [[FOCAL, 0.0, WIDTH / 2 + 2], [0.0, FOCAL * 1.1, HEIGHT / 2 - 1], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize("place", ["file", "frame"])
@pytest.mark.parametrize(
    "other",
    [
        {"fx": FOCAL, "fy": FOCAL * 1.1, "c_x": WIDTH / 2 + 2, "c_y": HEIGHT / 2 - 1, "width": WIDTH, "height": HEIGHT},
        *({name: INTRINSICS} for name in ("K", "intrinsics", "intrinsic_matrix", "camera_intrinsics")),
    ],
    ids=lambda other: next(iter(other)),
)
def test_other_names_of_a_lens_are_read(place, other, scene_folder, said):
    def write(meta, lens):
        for key in pinhole():
            del meta[key]
        for values in (meta,) if place == "file" else meta["frames"]:
            values.update(lens)

    own = {"fl_x": FOCAL, "fl_y": FOCAL * 1.1, "cx": WIDTH / 2 + 2, "cy": HEIGHT / 2 - 1}
    with _rewritten(scene_folder, lambda meta: write(meta, own)):
        expected = parse(scene_folder)
    with _rewritten(scene_folder, lambda meta: write(meta, other)):
        assert_same_rays(parse(scene_folder), expected, tolerance=0)
    assert not said


def test_width_and_height_of_larger_pictures_are_a_size_that_disagrees(scene_folder):
    def enlarge(meta):
        for key in ("w", "h", "cx", "cy"):
            del meta[key]
        meta.update(width=4 * WIDTH, height=4 * HEIGHT)

    with _rewritten(scene_folder, enlarge):
        assert f"its camera {4 * WIDTH}x{4 * HEIGHT}" in refused(scene_folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"K": [[2 * FOCAL, 0, 12], [0, 2 * FOCAL, 8], [0, 0, 1]]},
            "K[0][0] says a focal length of 40 pixels, fl_x one of 20",
        ),
        ({"fl_y": FOCAL * 1.5}, "focal lengths are 20 pixels in x and 30 in y, as if pixels were not square"),
    ],
)
def test_numbers_of_a_lens_that_disagree_are_said(change, words, scene_folder, said):
    with _rewritten(scene_folder, lambda meta: meta.update(change)):
        parse(scene_folder)
    assert any(words in line for line in said), said


@pytest.mark.parametrize("name", ["nerfstudio", "colmap-text", "blender"])
def test_a_camera_that_stands_far_from_all_others_is_named(name, orbit, tmp_path, said):
    poses = orbit.copy()
    poses[3, :3, 3] *= 1e4
    WRITERS[name](tmp_path, poses)
    parse(tmp_path)
    assert sum("1 camera of " in line and "(view003.png)" in line for line in said) == 1


@pytest.mark.parametrize("below", ["dense", "dense/0"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_scene_further_down_is_pointed_to(name, below, orbit, tmp_path):
    (tmp_path / below).mkdir(parents=True)
    WRITERS[name](tmp_path / below, orbit)
    assert refused(tmp_path).endswith(f"there is a scene in {below}")


@pytest.mark.parametrize("name", ["nerfstudio", "colmap-text", "llff"])
def test_masks_of_the_full_size_photos_do_for_smaller_ones(name, orbit, tmp_path):
    WRITERS[name](tmp_path, orbit)
    times, width, height = (4, 4 * WIDTH, 4 * HEIGHT) if name == "llff" else (2, WIDTH, HEIGHT)
    if name != "llff":
        for file in names(10):
            picture(tmp_path / "images_2" / file, size=(width // 2, height // 2))
    (tmp_path / "masks").mkdir()
    full = np.zeros((height, width), np.uint8)
    full[:, : width // 2] = 255
    for file in names(10):
        Image.fromarray(full).save(tmp_path / "masks" / file)
    if name == "nerfstudio":
        edit_frames(tmp_path / "transforms.json", lambda i, frame: frame.update(mask_path=f"masks/view{i:03d}.png"))
    outputs = parse(tmp_path, downscale_factor=times)
    mask = PhotoDataset(outputs).get_data(0)["mask"][..., 0]
    assert mask.shape == (height // times, width // times)
    assert mask[:, : mask.shape[1] // 2].all() and not mask[:, mask.shape[1] // 2 :].any()


@pytest.mark.parametrize("name", ["nerfstudio", "blender", "blender-nerf"])
@pytest.mark.parametrize("folder", ["mask", "masks"])
def test_a_folder_of_masks_that_no_frame_names_is_said(name, folder, orbit, tmp_path, said):
    WRITERS[name](tmp_path, orbit)
    picture(tmp_path / folder / "view000.png")
    parse(tmp_path)
    assert any(f"1 picture in {folder} are not read; expected mask_path" in line for line in said), said


def test_colmap_masks_of_which_none_fits_are_counted(orbit, tmp_path, said):
    colmap_text(tmp_path, orbit)
    picture(tmp_path / "masks/other.png")
    parse(tmp_path)
    assert any("10 of 10 photos have no mask" in line for line in said), said


def test_views_in_none_of_the_lists_are_counted(scene_folder, said):
    def split(meta):
        files = [frame["file_path"] for frame in meta["frames"]]
        meta.update(train_filenames=files[:5], val_filenames=files[5:7], test_filenames=[])

    with _rewritten(scene_folder, split):
        assert len(parse(scene_folder).image_filenames) == 5
    assert any("3 views of 10 are in none of the lists and are left out" in line for line in said), said


def cameras_after(scene_folder, change) -> Any:
    with _rewritten(scene_folder, change):
        return parse(scene_folder).cameras


def test_is_fisheye_is_a_fisheye_lens(scene_folder):
    kinds = {
        "key": lambda meta: (meta.pop("camera_model"), meta.update(is_fisheye=True)),
        "model": lambda meta: meta.update(camera_model="OPENCV_FISHEYE"),
        "frame": lambda meta: [frame.update(camera_model="OPENCV_FISHEYE") for frame in meta["frames"]],
    }
    for change in kinds.values():
        assert (cameras_after(scene_folder, change).camera_type == CameraType.FISHEYE.value).all()
    mixed = cameras_after(scene_folder, lambda meta: meta["frames"][3].update(is_fisheye=True))
    assert mixed.camera_type.flatten().tolist() == [1, 1, 1, 2, 1, 1, 1, 1, 1, 1]
    with _rewritten(scene_folder, lambda meta: meta.update(is_fisheye=True)):
        assert "camera_model is OPENCV, but is_fisheye is true" in refused(scene_folder)


@pytest.mark.parametrize(
    ("camera", "kind", "distortion"),
    [
        ("SIMPLE_PINHOLE 24 16 20 12 8", 1, [0, 0, 0, 0, 0, 0]),
        ("SIMPLE_RADIAL 24 16 20 12 8 0.1", 1, [0.1, 0, 0, 0, 0, 0]),
        ("RADIAL 24 16 20 12 8 0.1 0.2", 1, [0.1, 0.2, 0, 0, 0, 0]),
        ("OPENCV 24 16 20 20 12 8 0.1 0.2 0.01 0.02", 1, [0.1, 0.2, 0, 0, 0.01, 0.02]),
        ("OPENCV_FISHEYE 24 16 20 20 12 8 0.1 0.2 0.3 0.4", 2, [0.1, 0.2, 0.3, 0.4, 0, 0]),
        ("FULL_OPENCV 24 16 20 20 12 8 0.1 0.2 0.01 0.02 0.3 0 0 0", 1, [0.1, 0.2, 0.3, 0, 0.01, 0.02]),
        ("SIMPLE_RADIAL_FISHEYE 24 16 20 12 8 0.1", 2, [0.1, 0, 0, 0, 0, 0]),
        ("RADIAL_FISHEYE 24 16 20 12 8 0.1 0.2", 2, [0.1, 0.2, 0, 0, 0, 0]),
        ("THIN_PRISM_FISHEYE 24 16 20 20 12 8 0.1 0.2 0 0 0.3 0.4 0 0", 2, [0.1, 0.2, 0.3, 0.4, 0, 0]),
    ],
)
def test_colmap_lenses(camera, kind, distortion, orbit, tmp_path):
    colmap_text(tmp_path, orbit, camera=camera)
    cameras = parse(tmp_path).cameras
    assert (
        (cameras.fx == 20).all() and (cameras.fy == 20).all() and (cameras.cx == 12).all() and (cameras.cy == 8).all()
    )
    assert (cameras.camera_type == kind).all()
    torch.testing.assert_close(cameras.distortion_params[3], torch.tensor(distortion, dtype=torch.float32))


@pytest.mark.parametrize(
    ("camera", "expected"),
    [
        ("FULL_OPENCV 24 16 20 20 12 8 0 0 0 0 0 0.5 0 0", "FULL_OPENCV with d1, which is not supported"),
        ("FOV 24 16 20 20 12 8 0.9", "FOV with omega, which is not supported"),
        ("THIN_PRISM_FISHEYE 24 16 20 20 12 8 0.1 0.2 0.3 0 0 0 0 0.4", "with sy1, p1, which is not supported"),
        ("RAD_TAN_THIN_PRISM_FISHEYE 24 16 20", "a camera is of type RAD_TAN_THIN_PRISM_FISHEYE"),
        ("PINHOLE 24 16 20 20 12", "a camera of type PINHOLE has 3 parameters"),
        ("PINHOLE 24 16 nan 20 12 8", "not finite"),
        ("PINHOLE 24 0 20 20 12 8", "24x0 pixels"),
    ],
)
def test_colmap_lenses_that_cannot_be_read_are_refused_by_name(camera, expected, orbit, tmp_path):
    colmap_text(tmp_path, orbit, camera=camera)
    message = refused(tmp_path)
    assert expected in message
    assert "expected" in message


def test_a_frames_own_numbers_win_when_they_are_complete(scene_folder):
    own = {"fl_x": 30.0, "fl_y": 31.0, "cx": 11.0, "cy": 7.0}
    cameras = cameras_after(scene_folder, lambda meta: meta["frames"][2].update(own))
    assert [float(getattr(cameras, key)[2]) for key in ("fx", "fy", "cx", "cy")] == [30, 31, 11, 7]
    assert [float(getattr(cameras, key)[3]) for key in ("fx", "fy", "cx", "cy")] == [20, 20, 12, 8]
    cameras = cameras_after(scene_folder, lambda meta: meta["frames"][2].update(k1=0.1))
    assert cameras.distortion_params[:, 0].tolist() == pytest.approx([0, 0, 0.1, 0, 0, 0, 0, 0, 0, 0])


def test_what_only_the_frames_or_only_the_file_say_goes_together(scene_folder, plain):
    def split_up(meta):
        for frame in meta["frames"]:
            frame.update(fl_x=meta["fl_x"], fl_y=meta["fl_y"])
        del meta["fl_x"], meta["fl_y"]

    with _rewritten(scene_folder, split_up):
        assert_same_rays(parse(scene_folder), plain, tolerance=0)


@pytest.mark.parametrize(
    ("own", "lacking"),
    [
        ({"fl_x": 30.0}, "fl_y, cx, cy"),
        ({"fl_x": 30.0, "fl_y": 30.0}, "cx, cy"),
        ({"cx": 11.0, "cy": 8.0}, "fl_x, fl_y"),
        ({"camera_angle_x": 1.0}, None),
    ],
)
def test_half_of_a_lens_in_a_frame_and_half_in_the_file_is_refused(own, lacking, scene_folder):
    with _rewritten(scene_folder, lambda meta: meta["frames"][2].update(own)):
        message = refused(scene_folder)
    assert "view002.png: has its own " in message
    assert lacking is None or f"takes {lacking} from the file" in message


def test_half_of_the_distortion_in_a_frame_is_refused(scene_folder):
    def change(meta):
        meta.update(k1=0.1, k2=0.05)
        meta["frames"][2].update(k1=0.2)

    with _rewritten(scene_folder, change):
        assert "has its own k1, but takes k2 from the file" in refused(scene_folder)


IMPOSSIBLE = {
    "shares": (
        {"fl_x": 20 / 24, "fl_y": 20 / 16, "cx": 0.5, "cy": 0.5},
        "fx is 0.833333 (view000.png, view001.png, view002.png and 7 more); expected 2.4 pixels or more, a tenth of "
        "the "
        "image's width of 24, a view of 172 degrees: is this a share of the picture? expected pixels",
    ),
    "corner": ({"cx": 0.5}, "cx is 0.5"),
    "edge": ({"cy": 3.0}, "expected a point in the middle half of the image, 4 < cy < 12"),
    "full-size": ({"cx": 19.0}, "are these numbers of the full-size photos, and the images smaller ones?"),
    "zero": (
        {"fl_x": 0.0, "fl_y": 0.0},
        "fx is 0 (view000.png, view001.png, view002.png and 7 more); expected a positive",
    ),
    "wide": ({"fl_x": 2.0, "fl_y": 2.0}, "a view of 161 degrees"),
    "angle": ({"fl_x": None, "fl_y": None, "camera_angle_x": 3.0}, "camera_angle_x is 3, a view of 172 degrees"),
    "degrees": ({"fl_x": None, "fl_y": None, "camera_angle_x": 62.0}, "camera_angle_x is 62, a view of 3552 degrees"),
    "negative": ({"fl_x": None, "fl_y": None, "x_fov": -5.0}, "x_fov is -5"),
    "infinite": ({"fl_x": float("inf")}, "fl_x is Infinity; expected a number"),
    "no lens": ({"fl_x": None, "fl_y": None, "fov": 60.0}, "lacks fl_x (fov is not read)"),
    "fov_x": ({"fl_x": None, "fl_y": None, "fov_x": 60.0}, "lacks fl_x (fov_x is not read)"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_numbers_that_no_lens_has_are_refused_with_their_value(case, orbit, tmp_path):
    changes, expected = IMPOSSIBLE[case]
    nerfstudio(tmp_path, orbit)
    edit(tmp_path / "transforms.json", **changes)
    assert expected in refused(tmp_path)


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "llff"])
def test_such_numbers_are_refused_in_every_format(name, orbit, tmp_path):
    WRITERS[name](tmp_path, orbit)
    if name == "colmap-binary":
        path = tmp_path / "sparse/0/cameras.bin"
        path.write_bytes(path.read_bytes()[:-32] + struct.pack("<4d", 0.8, 0.8, 12.0, 8.0))
    elif name == "colmap-text":
        (tmp_path / "sparse/0/cameras.txt").write_text("1 PINHOLE 24 16 0.8 0.8 12 8\n")
    else:
        path = next(p for p in (tmp_path / "transforms.json", tmp_path / "transforms_train.json") if p.exists())
        meta = json.loads(path.read_bytes())
        for values in (meta, *meta["frames"]):
            for key in ("x_fov", "camera_angle_x", "camera_angle_y", "fl_x", "fl_y", "cx", "cy"):
                values.pop(key, None)
        path.write_text(json.dumps({**meta, "fl_x": 0.8, "fl_y": 0.8}))
    assert "camera parameter fx is 0.8 " in refused(tmp_path)


def test_an_angle_that_disagrees_with_the_focal_length_is_said_and_not_taken(scene_folder, plain, said):
    with _rewritten(scene_folder, lambda meta: meta.update(camera_angle_x=0.5)):
        assert_same_rays(parse(scene_folder), plain, tolerance=0)
    assert len(said) == 1 and "camera_angle_x says a view of 28.6 degrees" in said[0]
    said.clear()
    with _rewritten(scene_folder, lambda meta: meta.update(camera_angle_x=0, camera_angle_y=0)):  # placeholders
        assert_same_rays(parse(scene_folder), plain, tolerance=0)
    assert not said


@pytest.mark.parametrize("factor", [1, 2])
def test_the_crop_radius_of_a_fisheye_lens_is_handed_on_in_pixels_of_the_images(factor, orbit, tmp_path, said):
    nerfstudio(tmp_path, orbit)
    for path in (tmp_path / "images").iterdir():
        picture(tmp_path / "images_2" / path.name, size=(WIDTH // 2, HEIGHT // 2))
    edit(tmp_path / "transforms.json", camera_model="OPENCV_FISHEYE", fisheye_crop_radius=9)
    outputs = parse(tmp_path, downscale_factor=factor)
    assert outputs.cameras.metadata == {"fisheye_crop_radius": 9 / factor}
    assert outputs.metadata["fisheye_crop_radius"] == 9 / factor
    assert outputs.cameras[3].metadata == outputs.cameras.metadata
    edit(tmp_path / "transforms.json", camera_model="OPENCV")
    assert parse(tmp_path).cameras.metadata is None
    assert any("fisheye_crop_radius is not used" in line for line in said)
    edit(tmp_path / "transforms.json", camera_model="OPENCV_FISHEYE", fisheye_crop_radius=-9)
    assert "fisheye_crop_radius is -9; expected a positive number" in refused(tmp_path)


def test_what_was_done_to_the_matrices_before_is_undone_on_the_way_back(orbit, tmp_path):
    """x' = applied_scale * (applied_transform x)."""
    before = np.array([[0, 1, 0, 3], [1, 0, 0, -7], [0, 0, -1, 0.5], [0, 0, 0, 1]], dtype=np.float64)
    poses = before @ similar(orbit, UTM, 1.0, (0, 0, 1))
    original = np.linalg.inv(before) @ poses
    poses[:, :3, 3] *= 10.0
    nerfstudio(tmp_path, poses)
    edit(tmp_path / "transforms.json", applied_transform=before[:3].tolist(), applied_scale=10.0)
    outputs = parse(tmp_path)
    back = outputs.transform_poses_to_original_space(outputs.cameras.camera_to_worlds, camera_convention="opengl")
    np.testing.assert_allclose(back.numpy(), original[:, :3], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "change", [{"camera_convention": "OpenCV"}, {"coordinate_system": "colmap"}, {"from_na": True}]
)
def test_matrices_with_opencv_axes_are_turned(change, orbit, plain, tmp_path):
    nerfstudio(tmp_path, orbit @ OPENCV)
    assert_same_rays(parse(edit(tmp_path / "transforms.json", **change)), plain)
    assert "expected opengl or opencv" in refused(edit(tmp_path / "transforms.json", camera_convention="RUB"))


def test_matrices_of_mitsuba_are_turned(orbit, plain, tmp_path):
    nerfstudio(tmp_path, orbit @ np.diag([-1.0, 1.0, -1.0, 1.0]))
    assert_same_rays(parse(edit(tmp_path / "transforms.json", normal_mts_args={})), plain)
    assert "contradict each other" in refused(edit(tmp_path / "transforms.json", from_na=True))


def test_transposed_matrices_are_recognised(orbit, tmp_path):
    nerfstudio(tmp_path, orbit.transpose(0, 2, 1))
    assert "are the matrices transposed?" in refused(tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# JSON
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_in_other_encodings_is_read(encoding, orbit, plain, tmp_path):
    nerfstudio(tmp_path, orbit)
    path = tmp_path / "transforms.json"
    path.write_text(path.read_text(), encoding=encoding)
    assert_same_rays(parse(tmp_path), plain, tolerance=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"frames": [1, 2,\n ]}', "line 2, column 2: a comma before ]; expected none after the last entry"),
        ('{"w": 3,\n}', "line 2, column 1: a comma before }; expected none"),
        ('{"w": 3 // pixels\n}', "a comment; expected none in JSON"),
        ("{'w': 3}", "line 1, column 2: a name in single quotes; expected double ones"),
        ('{"w": 3', "the file ends too early"),
        ('{"w": 3 "h": 4}', "line 1, column 9: Expecting ',' delimiter"),
        ("", "it is empty"),
        ('{"w": 3, "w": 4}', 'the key "w" is there twice'),
        ("[" * 100_000, "nested too deeply"),
        ('{"w": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("[1]", "has no frames"),
        ("null", "has no frames"),
    ],
)
def test_json_that_is_none_is_refused_with_its_place(text, expected, tmp_path):
    (tmp_path / "transforms.json").write_text(text)
    message = refused(tmp_path)
    assert expected in message
    assert str(tmp_path / "transforms.json") in message


def test_json_in_latin_1_is_refused(tmp_path):
    (tmp_path / "transforms.json").write_bytes('{"file": "ü"}'.encode("latin-1"))
    assert "byte 10 is no utf-8; expected UTF-8" in refused(tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------

PATHS = {
    "as it is": "images/view000.png",
    "here": "./images/view000.png",
    "windows": "images\\view000.png",
    "windows, absolute": "C:\\Users\\me\\scan\\images\\view000.png",
    "another machine": "/Volumes/scan/images/view000.png",
    "without suffix": "images/view000",
    "capitals": "Images/VIEW000.PNG",
    "up and down": "images/../images/view000.png",
}


@pytest.mark.parametrize("name", ["nerfstudio", "blender-nerf"])
@pytest.mark.parametrize("kind", PATHS)
def test_names_from_other_machines_are_found(kind, name, orbit, plain, tmp_path):
    WRITERS[name](tmp_path, orbit)
    file = next(p for p in (tmp_path / "transforms.json", tmp_path / "transforms_train.json") if p.exists())

    def rename(index, frame):
        written = PATHS[kind].replace("000", f"{index:03d}")
        if name == "blender-nerf":
            written = written.replace("images", "images_train").replace("Images", "Images_train")
            written = written.replace(".png", ".jpg").replace(".PNG", ".JPG")
        frame["file_path"] = written

    assert_same_rays(parse(edit_frames(file, rename)), plain)


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".tif", ".JPG"])
def test_a_suffix_that_is_left_out_may_be_any_pictures(suffix, orbit, plain, tmp_path):
    blender(tmp_path, orbit)
    for path in (tmp_path / "train").glob("view[0-9][0-9][0-9].png"):
        Image.open(path).save(path.with_suffix(suffix))
        path.unlink()
    outputs = parse(tmp_path)
    assert_same_rays(outputs, plain)
    assert {path.suffix for path in outputs.image_filenames} == {suffix}
    assert not any("depth" in path.name for path in outputs.image_filenames)


@pytest.mark.parametrize(("written", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("name", ["nerfstudio", "blender", "colmap-text", "colmap-binary"])
def test_names_in_the_other_unicode_normal_form_are_found(name, written, stored, orbit, plain, tmp_path):
    WRITERS[name](tmp_path, orbit, stem=unicodedata.normalize(written, "Grün é "))
    for path in list(tmp_path.rglob("*.png")):
        path.rename(path.with_name(unicodedata.normalize(stored, path.name)))
    assert_same_rays(parse(tmp_path), plain)


@pytest.mark.parametrize("name", ["nerfstudio", "blender-nerf"])
def test_masks_for_some_frames_leave_the_others_whole(name, orbit, tmp_path, said):
    WRITERS[name](tmp_path, orbit)
    file = next(p for p in (tmp_path / "transforms.json", tmp_path / "transforms_train.json") if p.exists())

    def mask(index, frame):
        if index in (1, 4):
            frame["mask_path"] = f"masks/{index}.png"
            (tmp_path / "masks").mkdir(exist_ok=True)
            Image.new("L", (WIDTH, HEIGHT), 0).save(tmp_path / frame["mask_path"])

    outputs = parse(edit_frames(file, mask))
    assert outputs.mask_filenames is not None
    means = [np.array(Image.open(path)).mean() for path in outputs.mask_filenames]
    assert means == [255, 0, 255, 255, 0, 255, 255, 255, 255, 255]
    assert any("have no mask_path; all their pixels are used" in line for line in said)
    assert InputDataset(outputs)[0]["mask"].all()


@pytest.mark.parametrize("style", ["{stem}.png", "{name}.png"])
def test_masks_for_some_photos_of_a_colmap_model(style, orbit, tmp_path, said):
    colmap_text(tmp_path, orbit)
    (tmp_path / "masks").mkdir()
    for index in (1, 4):
        name = style.format(stem=f"view{index:03d}", name=f"view{index:03d}.png")
        Image.new("L", (WIDTH, HEIGHT), 0).save(tmp_path / "masks" / name)
    means = [np.array(Image.open(path)).mean() for path in parse(tmp_path).mask_filenames]
    assert means == [255, 0, 255, 255, 0, 255, 255, 255, 255, 255]
    assert any("8 of 10 photos have no mask" in line for line in said)


def test_frames_that_are_listed_twice_are_read_once_or_refused(orbit, plain, tmp_path, said):
    nerfstudio(tmp_path, orbit)
    path = tmp_path / "transforms.json"
    meta = json.loads(path.read_text())
    meta["frames"].append({**meta["frames"][3], "file_path": "./images\\view003"})
    path.write_text(json.dumps(meta))
    assert_same_rays(parse(tmp_path), plain)
    assert any("1 frame listed twice; each is read once" in line for line in said)
    meta["frames"][-1]["transform_matrix"] = meta["frames"][4]["transform_matrix"]
    path.write_text(json.dumps(meta))
    assert "listed twice with different poses" in refused(tmp_path)


def test_photos_of_no_frame_are_counted(orbit, tmp_path, said):
    nerfstudio(tmp_path, orbit)
    picture(tmp_path / "images/more.png")
    picture(tmp_path / "images/view000_depth.png")
    picture(tmp_path / "images/dynamic_mask_view000.png")
    parse(tmp_path)
    assert any("1 of 11 photos beside each other are in no frame and are left out (more.png)" in line for line in said)
    assert any("1 dynamic_mask beside the pictures are not read" in line for line in said)


def test_rays_of_instant_ngp_are_refused(orbit, tmp_path):
    nerfstudio(tmp_path, orbit)
    (tmp_path / "images/rays_view003.dat").write_bytes(b"")
    assert "rays_view003.dat has rays of its own" in refused(tmp_path)
    parse(edit(tmp_path / "transforms.json", enable_ray_loading=False))


def test_frames_that_are_marked_bad_are_left_out(orbit, tmp_path, said):
    nerfstudio(tmp_path, orbit)
    outputs = parse(edit_frames(tmp_path / "transforms.json", lambda i, frame: frame.update(is_bad=i == 3)))
    assert [path.name for path in outputs.image_filenames] == [n for n in names(10) if n != "view003.png"]
    assert any("1 of 10 frames are marked is_bad" in line for line in said)


def test_subfolders_of_the_same_names_stay_apart_when_smaller_images_are_read(orbit, tmp_path):
    nerfstudio(tmp_path, orbit)

    def rename(index, frame):
        for folder, size in (("images", 1), ("images_2", 2)):
            picture(tmp_path / folder / f"cam{index}/a.png", index, (WIDTH // size, HEIGHT // size))
        frame["file_path"] = f"images/cam{index}/a.png"

    outputs = parse(edit_frames(tmp_path / "transforms.json", rename), downscale_factor=2)
    assert len(set(outputs.image_filenames)) == 10
    assert outputs.image_filenames[3] == tmp_path / "images_2/cam3/a.png"
    assert float(outputs.cameras.fx[0]) == FOCAL / 2


# --------------------------------------------------------------------------------------------------------------------
# Parts that are empty or absent, and parts that are there several times
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["empty", "absent", "damaged"])
@pytest.mark.parametrize("writer", [colmap_text, colmap_binary])
def test_a_colmap_model_needs_no_points(writer, state, orbit, plain, tmp_path, said):
    writer(tmp_path, orbit)
    path = next((tmp_path / "sparse/0").glob("points3D.*"))
    if state == "absent":
        path.unlink()
    elif state == "damaged":
        path.write_bytes(b"\x05\0\0\0\0\0\0\0 no points")
    outputs = parse(tmp_path)
    assert_same_rays(outputs, plain)
    assert "points3D_xyz" not in outputs.metadata
    assert any("near and far come from the pictures" in line for line in said)


@pytest.mark.parametrize("writer", [colmap_text, colmap_binary])
def test_near_and_far_without_points_are_those_of_the_same_scene_in_another_format(writer, orbit, plain, tmp_path):
    writer(tmp_path, orbit)
    found, wanted = (scene_near_far(SourceBank.from_dataset(InputDataset(o))) for o in (parse(tmp_path), plain))
    assert found == pytest.approx(wanted, rel=1e-4)


def test_a_photo_line_without_its_line_of_points_is_a_photo_line(orbit, plain, tmp_path):
    colmap_text(tmp_path, orbit)
    path = tmp_path / "sparse/0/images.txt"
    path.write_text("\r\n".join(line for line in path.read_text().splitlines() if line))
    assert_same_rays(parse(tmp_path), plain)


@pytest.mark.parametrize("state", ["absent", "empty", "null"])
@pytest.mark.parametrize("lacking", [("val",), ("test",), ("val", "test")])
def test_blender_scenes_without_held_out_views_hold_some_out(lacking, state, orbit, tmp_path, said):
    blender(tmp_path, orbit)
    for split in lacking:
        path = tmp_path / f"transforms_{split}.json"
        if state == "absent":
            path.unlink()
        else:
            path.write_text(json.dumps({"camera_angle_x": 0.6, "frames": [] if state == "empty" else None}))
    train, val, test = (parse(tmp_path, split, eval_mode=None).image_filenames for split in ("train", "val", "test"))
    assert val == test
    if len(lacking) == 1:
        assert (len(train), len(val)) == (10, 2)
    else:
        assert (len(train), len(val)) == (8, 2)
        assert not set(train) & set(val)
        assert any("have no views; some of transforms_train.json are held out" in line for line in said)


@pytest.mark.parametrize(
    "lists", [{"train": 8}, {"train": 8, "val": 0, "test": 0}, {"test": 2}, {"train": 0, "val": 2}]
)
def test_lists_of_views_that_are_empty_or_absent_are_filled(lists, orbit, tmp_path, said):
    nerfstudio(tmp_path, orbit)
    everything = [f"images/{name}" for name in names(10)]
    changes = {f"{s}_filenames": everything[:n] if s == "train" else everything[10 - n :] for s, n in lists.items()}
    edit(tmp_path / "transforms.json", **changes)
    train, val, test = (parse(tmp_path, split, eval_mode=None).image_filenames for split in ("train", "val", "test"))
    assert val == test and val and not set(train) & set(val)
    assert len(train) == (7 if lists.get("train") else 8)
    assert len([line for line in said if "have no views" in line or "has no views" in line]) >= 1


def test_lists_of_names_that_are_no_frames_are_refused(orbit, tmp_path):
    nerfstudio(tmp_path, orbit)
    edit(tmp_path / "transforms.json", train_filenames=["images/view000.png", "images/nobody.png"])
    assert "train_filenames lists 1 name that no frame has (images/nobody.png)" in refused(tmp_path)


@pytest.mark.parametrize("listed", ["val_list.txt", "validation_list.txt", "test_list.txt"])
def test_a_colmap_scenes_list_of_held_out_photos_is_read(listed, orbit, tmp_path):
    colmap_text(tmp_path, orbit)
    (tmp_path / listed).write_text("view002.png\nview005.png\n")
    assert [path.stem for path in parse(tmp_path, "val").image_filenames] == ["view002", "view005"]
    assert len(parse(tmp_path, "train").image_filenames) == 8
    (tmp_path / listed).write_text("nobody.png\n")
    assert f"{listed} lists 1 name not in the COLMAP model (nobody.png)" in refused(tmp_path)


@pytest.mark.parametrize("root", ["sparse", "colmap/sparse"])
@pytest.mark.parametrize("writers", [(colmap_text, colmap_binary), (colmap_binary, colmap_binary)])
def test_the_colmap_model_with_most_photos_is_read_and_the_others_are_named(
    writers, root, orbit, plain, tmp_path, said
):
    for number, (writer, count) in enumerate(zip(writers, (4, 10), strict=True)):
        writer(tmp_path, orbit[:count], model=f"{root}/{number}")
    assert_same_rays(parse(tmp_path), plain)
    expected = f"{tmp_path}: reads the COLMAP model {root}/1 (10 photos); also there: {root}/0 (4 photos)"
    assert expected in said


def test_a_damaged_colmap_model_beside_a_whole_one_is_named(orbit, plain, tmp_path, said):
    colmap_text(tmp_path, orbit, model="sparse/1")
    colmap_binary(tmp_path, orbit[:4], model="sparse/0")
    (tmp_path / "sparse/0/images.bin").write_bytes(b"no")
    assert_same_rays(parse(tmp_path), plain)
    assert any("sparse/0/images.bin (cannot be read)" in line for line in said)


def test_photos_that_are_in_no_colmap_model_are_counted(orbit, tmp_path, said):
    colmap_text(tmp_path, orbit)
    picture(tmp_path / "images/late.png")
    parse(tmp_path)
    assert any("1 of 11 photos are not in the COLMAP model 0 and are left out (late.png)" in line for line in said)


def test_of_several_folders_the_one_with_most_photos_of_a_colmap_model_is_read(orbit, plain, tmp_path, said):
    colmap_text(tmp_path, orbit)
    (tmp_path / "images").rename(tmp_path / "input")
    picture(tmp_path / "images/view000.png")
    outputs = parse(tmp_path)
    assert_same_rays(outputs, plain)
    assert outputs.image_filenames[0].parent.name == "input"
    assert any("reads the photos in input (10); also there: images (1)" in line for line in said)


def test_a_colmap_models_names_may_begin_with_their_folder(orbit, plain, tmp_path):
    colmap_text(tmp_path, orbit)
    path = tmp_path / "sparse/0/images.txt"
    path.write_text(path.read_text().replace(" view", " images/view"))
    assert_same_rays(parse(tmp_path), plain)


def test_photos_of_a_colmap_model_that_are_missing_are_named(orbit, tmp_path):
    colmap_text(tmp_path, orbit)
    (tmp_path / "images/view003.png").unlink()
    message = refused(tmp_path)
    assert "1 of 10 images not found" in message and "view003.png" in message


def test_of_two_camera_files_the_one_with_more_photos_is_read_and_the_other_is_named(orbit, plain, tmp_path, said):
    blender_nerf(tmp_path, orbit)
    nerfstudio(tmp_path, orbit[:4])
    assert find_scene(tmp_path)[0] == "blender"
    assert_same_rays(parse(tmp_path), plain)
    assert any("also there: transforms.json (4 photos)" in line for line in said)
    said.clear()
    nerfstudio(tmp_path, np.concatenate([orbit, orbit_shifted(orbit)]))
    assert find_scene(tmp_path)[0] == "nerfstudio"
    parse(tmp_path)
    assert any("reads transforms.json; also there: transforms_*.json (11 photos)" in line for line in said)


def test_a_colmap_model_of_more_photos_than_the_camera_file_that_is_read_is_named(orbit, tmp_path, said):
    nerfstudio(tmp_path, orbit[:4])
    colmap_text(tmp_path, orbit[:4], model="colmap/sparse/0")
    colmap_text(tmp_path, orbit, model="colmap/sparse/1")
    parse(tmp_path)
    assert any("reads transforms.json; also there: colmap/sparse/1 (10 photos)" in line for line in said)


def orbit_shifted(poses: np.ndarray) -> np.ndarray:
    moved = poses.copy()
    moved[:, :3, 3] += 0.1
    return moved


def test_a_camera_file_that_is_named_is_read_whatever_its_name(orbit, plain, tmp_path):
    nerfstudio(tmp_path, orbit[:3])
    for name in ("transforms_undistorted.json", "transforms_test.json", "cameras.json"):
        path = tmp_path / name
        nerfstudio(tmp_path / "other", orbit)
        meta = json.loads((tmp_path / "other/transforms.json").read_text())
        for frame in meta["frames"]:
            frame["file_path"] = "other/" + frame["file_path"]
        path.write_text(json.dumps(meta))
        assert_same_rays(parse(path), plain)
    (tmp_path / "transforms.json").unlink()
    assert_same_rays(parse(tmp_path), plain)  # the only one of such a name


def test_depth_maps_among_llff_images_are_no_images(orbit, plain, tmp_path):
    llff(tmp_path, orbit)
    for name in names(10):
        picture(tmp_path / "images_4" / name.replace(".png", "_depth.png"))
    assert_same_rays(parse(tmp_path), plain)


def test_cameras_of_which_half_stand_on_their_heads_are_not_turned(orbit, tmp_path):
    poses = orbit.copy()
    poses[:5] = poses[5:] @ np.diag([-1.0, -1.0, 1.0, 1.0])
    poses[:5, :3, 3] += 0.1
    nerfstudio(tmp_path, poses)
    outputs = parse(tmp_path)
    assert outputs.cameras.camera_to_worlds.isfinite().all()


def test_near_and_far_of_photos_are_the_same_wherever_the_origin_is(tmp_path):
    scene = scene_path()
    meta = json.loads((scene / "transforms.json").read_text())
    for key in ("shiftadd3d", "train_filenames", "val_filenames", "test_filenames"):
        meta.pop(key, None)
    meta["frames"] = meta["frames"][:8]
    found = []
    for shift in ((0.0, 0.0, 0.0), UTM):
        for frame in meta["frames"]:
            frame["file_path"] = str(scene / frame["file_path"])
            for row, value in enumerate(shift):
                frame["transform_matrix"][row][3] += value
        (tmp_path / "transforms.json").write_text(json.dumps(meta))
        bank = SourceBank.from_dataset(InputDataset(parse(tmp_path)))
        found.append(near_far_from_matches(bank))
    assert found[1] == pytest.approx(found[0], rel=1e-3)


# --------------------------------------------------------------------------------------------------------------------
# Anything at all
# --------------------------------------------------------------------------------------------------------------------

_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from([1e308, 10**400, -0.0])
)
_JSON = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


@pytest.fixture(scope="module")
def every_scene(orbit, tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for name, write in WRITERS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        write(folders[name], orbit)
    return folders


def read_or_refuse(folder: Path) -> None:
    """Every split is read, or refused in one line; nothing else may come of it."""
    for split in ("train", "test"):
        try:
            parse(folder, split, eval_mode=None)
        except UserError as error:
            message = str(error)
        else:
            continue
        assert "\n" not in message


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["nerfstudio", "ngp", "blender-nerf"])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_a_camera_file_says_it_is_read_or_refused_in_one_line(name, data, every_scene):
    folder = every_scene[name]
    path = next(p for p in (folder / "transforms.json", folder / "transforms_train.json") if p.exists())
    before = path.read_bytes()
    meta = json.loads(before)
    for _ in range(data.draw(st.integers(1, 3))):
        values = data.draw(st.sampled_from([meta, meta["frames"][0], meta["frames"][-1]]))
        key = data.draw(st.sampled_from([*KEYS, "unknown"]))
        if key == "frames" and data.draw(st.booleans()):
            continue
        values[key] = data.draw(_JSON)
        if "frames" not in meta or not isinstance(meta["frames"], list) or len(meta["frames"]) < 2:
            break
        if not all(isinstance(frame, dict) for frame in meta["frames"]):
            break
    try:
        path.write_text(json.dumps(meta))
        read_or_refuse(folder)
    finally:
        path.write_bytes(before)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_a_damaged_file_holds_it_is_read_or_refused_in_one_line(name, data, every_scene):
    folder = every_scene[name]
    kept = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix in (".json", ".txt", ".bin", ".npy")]
    path = data.draw(st.sampled_from(kept))
    before = path.read_bytes()
    content = bytearray(before)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        length = data.draw(st.sampled_from([0, 1, 8, 100]))
        content[at : at + length] = data.draw(st.binary(max_size=12))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    try:
        path.write_bytes(bytes(content))
        read_or_refuse(folder)
    finally:
        path.write_bytes(before)
