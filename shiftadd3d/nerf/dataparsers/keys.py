"""Every key that known programs write into camera files of the `transforms.json` kind, and what becomes of it here.

A key that changes the geometry is read or refused by name. The others are harmless. `docs/camera-files.md` shows this
list as a table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shiftadd3d._errors import UserError


@dataclass(frozen=True)
class Key:
    """What becomes of one key."""

    verdict: Literal["read", "harmless", "refused"]
    note: str
    """Read: what it is. Harmless: why nobody needs to read it. Refused: what would be right."""
    writers: str
    """Programs that write or read it."""


_GROUPS: list[tuple[Literal["read", "harmless", "refused"], str, str, str]] = [
    # Read
    ("read", "frames", "the views", "all"),
    ("read", "fx fy c_x c_y width height", "other names of `fl_x`, `fl_y`, `cx`, `cy`, `w`, `h`", "converters"),
    (
        "read",
        "K intrinsics intrinsic_matrix camera_intrinsics",
        "a 3x3 matrix of focal lengths and principal point, where those are not given; other forms are not read",
        "converters",
    ),
    ("read", "file_path", "the picture; `\\`, `./`, other machines' folders and a missing suffix are mended", "all"),
    ("read", "transform_matrix", "camera to world, OpenGL axes, 4x4 or 3x4", "all"),
    ("read", "fl_x fl_y", "focal length in pixels; `fl_y` is `fl_x` where it is not given", "all"),
    (
        "read",
        "camera_angle_x camera_angle_y",
        "angle of view in radians, where there is no `fl_x`",
        "Blender, instant-ngp",
    ),
    ("read", "x_fov y_fov", "angle of view in degrees, where there is no `fl_x`", "instant-ngp"),
    ("read", "cx cy", "principal point in pixels, the corner of the picture at 0; its middle where not given", "all"),
    ("read", "w h", "size of the full picture in pixels; the picture's own where not given", "all"),
    (
        "read",
        "k1 k2 k3 k4 p1 p2",
        "lens distortion as OpenCV has it; for a perspective lens, k4 is the factor of r^8, which OpenCV has not",
        "all",
    ),
    ("read", "distortion_params", "the six of them: k1, k2, k3, k4, p1, p2", "nerfstudio"),
    ("read", "camera_model", "perspective and OPENCV_FISHEYE kinds; for the file or for a frame", "nerfstudio"),
    ("read", "is_fisheye", "true is camera_model OPENCV_FISHEYE", "instant-ngp"),
    ("read", "fisheye_crop_radius", "pixels farther from the centre of a fisheye picture are not used", "nerfstudio"),
    ("read", "mask_path", "white where a pixel may be used; frames without one use all pixels", "nerfstudio"),
    (
        "read",
        "depth_file_path depth_unit_scale_factor",
        "files of true z depths, and their unit (0.001 if not given): read only to train across scenes, and only if "
        "all frames have them",
        "nerfstudio",
    ),
    ("read", "train_filenames val_filenames test_filenames", "which views are in which split", "nerfstudio"),
    ("read", "orientation_override", "how to turn the scene: up, vertical, pca or none", "nerfstudio, Polycam"),
    (
        "read",
        "applied_transform applied_scale",
        "what was done to the matrices before; undone on the way back",
        "nerfstudio",
    ),
    ("read", "from_na", "true: the matrices have OpenCV axes", "instant-ngp"),
    (
        "read",
        "normal_mts_args",
        "its presence: the matrices have Mitsuba's axes (x left, y up, z ahead)",
        "instant-ngp",
    ),
    ("read", "camera_convention coordinate_system", "`opengl` or `opencv`: axes of the matrices", "converters"),
    ("read", "is_bad", "true: the frame is left out", "ScanNet++"),
    ("read", "shiftadd3d", "near and far in units of the matrices", "shiftadd3d"),
    # Refused, unless they say nothing (zero, false, empty)
    ("refused", "k5 k6", "expected no more than k1, k2, k3, k4, p1, p2: undistort the pictures", "COLMAP converters"),
    ("refused", "p3 p4", "expected no more than k1, k2, k3, k4, p1, p2: undistort the pictures", "Metashape"),
    ("refused", "s1 s2 s3 s4", "no thin prism is modelled: undistort the pictures", "OpenCV, Aria"),
    ("refused", "b1 b2 sk_x sk_y skew", "no skew is modelled: undistort the pictures", "Metashape, instant-ngp"),
    (
        "refused",
        "ftheta_p0 ftheta_p1 ftheta_p2 ftheta_p3 ftheta_p4",
        "expected a perspective or OPENCV_FISHEYE lens",
        "instant-ngp",
    ),
    (
        "refused",
        "latlong equirectangular",
        "expected a perspective or OPENCV_FISHEYE lens: cut the panoramas into views",
        "instant-ngp",
    ),
    ("refused", "shift_x shift_y", "expected the principal point in pixels, cx and cy", "Blender add-ons"),
    ("refused", "orthographic", "expected a perspective or OPENCV_FISHEYE lens", "Blender add-ons"),
    (
        "refused",
        "rolling_shutter",
        "expected one pose of every picture: those of a global shutter, or 0",
        "instant-ngp",
    ),
    (
        "refused",
        "transform_matrix_start transform_matrix_end",
        "expected one pose of every picture, its transform_matrix",
        "instant-ngp",
    ),
    ("refused", "time", "expected a scene that stands still, not another state of it in every picture", "D-NeRF"),
    (
        "refused",
        "test_frames",
        "expected all views in frames, and test_filenames to say which are held out",
        "ScanNet++",
    ),
    # Harmless
    (
        "harmless",
        "aabb_scale aabb render_aabb aabb_range scale offset up",
        "instant-ngp's own box and units",
        "instant-ngp",
    ),
    ("harmless", "importance_sampling n_extra_learnable_dims sharpen", "how instant-ngp trains", "instant-ngp"),
    ("harmless", "sharpness sharpness_discard_threshold blur_score motion_blur_score", "all frames are read", "many"),
    ("harmless", "n_frames", "all frames are read", "instant-ngp"),
    (
        "harmless",
        "white_transparent black_transparent mask_color fix_premult is_hdr",
        "colours stay as they are in the pictures",
        "instant-ngp",
    ),
    ("harmless", "envmap driver_parameters light_dir", "no light is modelled", "instant-ngp"),
    ("harmless", "enable_ray_loading", "files of rays are refused where there are any", "instant-ngp"),
    (
        "harmless",
        "enable_depth_loading integer_depth_scale depth_path depth_scale",
        "depth maps under this name are not read: rename `depth_path` to `depth_file_path`, and write the unit of "
        "depths as `depth_unit_scale_factor`",
        "instant-ngp, Polycam, Record3D",
    ),
    (
        "harmless",
        "normal_file_path normal_path mono_depth_path mono_normal_path confidence_path semantic_path lidar",
        "only pictures and masks are read",
        "SDFStudio, converters",
    ),
    ("harmless", "ply_file_path pointcloud_path", "a file of points, which other methods start from", "nerfstudio"),
    (
        "harmless",
        "colmap_im_id colmap_id camera_id image_id frame_id id index name timestamp timestamp_us time_stamp",
        "names",
        "many",
    ),
    ("harmless", "rotation", "how far a turntable turned between renders", "Blender"),
    ("harmless", "from_photos original", "what became of the photos, and what they were called", "shiftadd3d"),
    (
        "harmless",
        "exposure_time rolling_shutter_time camera_linear_velocity camera_angular_velocity imu",
        "motion within a picture is not modelled",
        "Spectacular AI",
    ),
    (
        "harmless",
        "exposure iso aperture white_balance focus_distance",
        "colours stay as they are in the pictures",
        "phones",
    ),
    (
        "harmless",
        "fov fov_x fov_y",
        "programs disagree about its unit and side; a file without any other focal length is refused: write `x_fov` "
        "(degrees) or `camera_angle_x` (radians)",
        "converters",
    ),
    ("harmless", "version comment date source generator description license copyright", "words", "many"),
    (
        "harmless",
        "camera_angle_z sensor_width sensor_height focal_length_mm lens",
        "says no more than the focal length in pixels",
        "Blender add-ons",
    ),
]

KEYS: dict[str, Key] = {
    name: Key(verdict, note, writers) for verdict, names, note, writers in _GROUPS for name in names.split()
}
"""What becomes of each key, by name; of the file and of its frames alike."""


_PIXELS = ("b1", "b2", "sk_x", "sk_y", "skew")
"""Keys in pixels: half of one moves nothing that a photo shows."""


def says_nothing(value: Any) -> bool:
    """Whether a value means nothing: null, false, zero, empty, or a list of only these."""
    if isinstance(value, (list, tuple)):
        return all(says_nothing(item) for item in value)
    return value is None or value is False or value == 0 or value in ("", {})


def refuse_keys(values: Mapping[str, Any], where: str) -> None:
    """Refuses keys that would change the geometry and are not supported.

    Args:
        values: a camera file, or one of its frames.
        where: what to call it in the message.

    Raises:
        UserError: the key, its value, and what would be right.
    """
    for name, value in values.items():
        key = KEYS.get(name)
        if key is None or key.verdict != "refused" or name == "time":  # of times it matters whether they differ
            continue
        small = name in _PIXELS and isinstance(value, (int, float)) and abs(value) < 0.5
        if not small and not says_nothing(value):
            raise UserError(f"{where}: {name} is {shown(value)}, which is not supported; {key.note}")


def unknown_keys(frames: Iterable[Mapping[str, Any]], meta: Mapping[str, Any]) -> list[str]:
    """Names that are on no list, of the file and then of its frames, each once."""
    names = dict.fromkeys(name for values in (meta, *frames) for name in values if name not in KEYS)
    return list(names)


def unknown_keys_line(path: Path, names: list[str]) -> str:
    """The one line that names them."""
    shown_names = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{path}: not read, as no program known here writes it: {shown_names}"


def shown(value: Any) -> str:
    """A value as JSON has it, cut to what fits into a line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
