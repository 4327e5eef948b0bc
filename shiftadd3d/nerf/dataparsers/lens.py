"""The lens of each frame of a camera file: from the frame itself, or from what the file says for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from nerfstudio.cameras.cameras import CameraType

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.dataparsers.files import say
from shiftadd3d.nerf.dataparsers.keys import shown

CAMERA_MODELS: dict[str, CameraType] = {
    "OPENCV": CameraType.PERSPECTIVE,
    "OPENCV_FISHEYE": CameraType.FISHEYE,
    "PINHOLE": CameraType.PERSPECTIVE,
    "SIMPLE_PINHOLE": CameraType.PERSPECTIVE,
    "RADIAL": CameraType.PERSPECTIVE,
    "SIMPLE_RADIAL": CameraType.PERSPECTIVE,
    "RADIAL_FISHEYE": CameraType.FISHEYE,
    "SIMPLE_RADIAL_FISHEYE": CameraType.FISHEYE,
    "FULL_OPENCV": CameraType.PERSPECTIVE,
    "PERSPECTIVE": CameraType.PERSPECTIVE,
}
"""Camera models that are read, by nerfstudio's and COLMAP's names."""

_QUANTITIES = {
    "fx": ("fl_x", "fx", "K[0][0]", "x_fov", "camera_angle_x"),
    "fy": ("fl_y", "fy", "K[1][1]", "y_fov", "camera_angle_y"),
    "cx": ("cx", "c_x", "K[0][2]"),
    "cy": ("cy", "c_y", "K[1][2]"),
    "w": ("w", "width"),
    "h": ("h", "height"),
}
"""Keys that state the same thing, best first."""
_PAIRS = (("fx", "fy"), ("cx", "cy"), ("w", "h"))
_ANGLES = ("x_fov", "y_fov", "camera_angle_x", "camera_angle_y")
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
NUMBERS = (
    *("fl_x", "fl_y", "cx", "cy", "w", "h", "fx", "fy", "c_x", "c_y", "width", "height"),
    *_ANGLES,
    *DISTORTION,
    "applied_scale",
)
MATRICES = ("K", "intrinsics", "intrinsic_matrix", "camera_intrinsics")
"""Names of the 3x3 matrix [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]."""


@dataclass
class Lens:
    """What a camera file says of one view's lens, in pixels of the full picture; None where it says nothing."""

    width: float | None
    height: float | None
    focal: dict[str, float]
    """Keys of `_QUANTITIES["fx"]` and `["fy"]`."""
    cx: float | None
    cy: float | None
    distortion: np.ndarray
    """[6], nerfstudio's order."""
    kind: CameraType

    def focal_lengths(self, width: float, height: float, where: str) -> tuple[float, float]:
        """(fx, fy) in pixels of a picture of this size.

        Raises:
            UserError: angles that no perspective lens has.
        """
        found: dict[str, float] = {}
        for quantity, side in (("fx", width), ("fy", height)):
            for key in _QUANTITIES[quantity]:
                if key not in self.focal:
                    continue
                value = self.focal[key]
                found[quantity] = value if key not in _ANGLES else _focal_of_angle(key, value, side, self.kind, where)
                break
        if "fx" not in found:
            found["fx"] = found["fy"]
        return found["fx"], found.get("fy", found["fx"])


def _focal_of_angle(key: str, value: float, side: float, kind: CameraType, where: str) -> float:
    degrees = value if key.endswith("_fov") else math.degrees(value)
    if not 0 < degrees < 170:
        unit = "degrees" if key.endswith("_fov") else "radians"
        raise UserError(
            f"{where}: {key} is {value:g}, a view of {degrees:.0f} degrees; expected {unit}, 0 to 170 degrees"
        )
    if kind == CameraType.FISHEYE:
        raise UserError(f"{where}: {key} of a fisheye lens depends on its distortion; expected fl_x and fl_y in pixels")
    return side / (2 * math.tan(math.radians(degrees) / 2))


def lens_of(meta: Mapping[str, Any], frame: Mapping[str, Any], where: str) -> Lens:
    """The lens of a frame. Its own numbers win over the file's, if they are all there.

    Args:
        meta: the file.
        frame: one of its frames.
        where: what to call the frame in messages.

    Raises:
        UserError: half of the numbers in the frame and half in the file; no focal length at all; an unknown or
            contradictory camera model.
    """
    own, common = _stated(frame), _stated(meta)
    contradicted = [
        quantity
        for quantity in _QUANTITIES
        if own[quantity] and common[quantity] and not _agree(own[quantity], common[quantity])
    ]
    lacking = [q for q in ("fx", "fy", "cx", "cy") if contradicted and common[q] and not own[q]]
    for pair in _PAIRS:
        for here, there in (pair, pair[::-1]):
            if own[here] and not own[there] and common[there] and not common[here]:
                lacking.append(there)
    if lacking:
        have = ", ".join(key for quantity in _QUANTITIES for key in own[quantity])
        need = ", ".join(_QUANTITIES[quantity][0] for quantity in dict.fromkeys(lacking))
        raise UserError(
            f"{where}: has its own {have}, but takes {need} from the file; expected all of fl_x, fl_y, cx, cy in the "
            "frame, or all of them once for the file"
        )
    merged = {q: (own[q] if contradicted and own[q] else common[q] or own[q]) for q in _QUANTITIES}
    kind = _kind(frame, where)
    if kind is None:
        kind = _kind(meta, where) or CameraType.PERSPECTIVE
    if not merged["fx"] and not merged["fy"]:
        other = next((key for key in ("fov", "fov_x", "fov_y", *MATRICES) if key in frame or key in meta), None)
        hint = f" ({other} is not read)" if other else ""
        raise UserError(
            f"{where} lacks fl_x{hint}; expected fl_x and fl_y in pixels, or camera_angle_x in radians, once for the "
            "file or in every frame"
        )

    def one(quantity: str) -> float | None:
        return next(iter(merged[quantity].values()), None)

    return Lens(
        width=one("w"),
        height=one("h"),
        focal={**merged["fx"], **merged["fy"]},
        cx=one("cx"),
        cy=one("cy"),
        distortion=_distortion(meta, frame, where),
        kind=kind,
    )


def _stated(values: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The keys that are given for each quantity, best first. An angle of zero counts as not given."""
    matrix = next((numbers for key in MATRICES if (numbers := _matrix(values.get(key))) is not None), None)
    if matrix is not None:
        values = {**values, **{f"K[{i}][{j}]": matrix[i, j] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2))}}
    return {
        quantity: {
            key: float(values[key]) for key in keys if key in values and not (key in _ANGLES and not float(values[key]))
        }
        for quantity, keys in _QUANTITIES.items()
    }


def _matrix(value: Any) -> np.ndarray | None:
    """A 3x3 matrix of intrinsics; None where it is something else."""
    try:
        found = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    whole = found.shape == (3, 3) and bool(np.isfinite(found).all())
    return found if whole and np.abs(found[2] - [0.0, 0.0, 1.0]).max() < 1e-6 else None


def _agree(own: Mapping[str, float], common: Mapping[str, float]) -> bool:
    """Whether both state the same: a key has the same value in both, or two keys mean the same number of pixels."""
    return any(
        math.isclose(value, other, rel_tol=1e-6)
        for key, value in own.items()
        for name, other in common.items()
        if key == name or not {key, name} & set(_ANGLES)
    )


def _kind(values: Mapping[str, Any], where: str) -> CameraType | None:
    model = values.get("camera_model")
    kind = None if model is None else CAMERA_MODELS[model.upper()]
    if model is not None and model.upper() == "FULL_OPENCV" and float(values.get("k4", 0.0)) != 0:
        raise UserError(
            f"{where}: k4 of camera_model FULL_OPENCV is a divisor, which is not supported; undistort the pictures"
        )
    flag = values.get("is_fisheye")
    if flag is None:
        return kind
    flagged = CameraType.FISHEYE if flag else CameraType.PERSPECTIVE
    if kind is not None and kind != flagged:
        raise UserError(
            f"{where}: camera_model is {model}, but is_fisheye is {shown(flag)}; expected one of the two, or both alike"
        )
    return flagged


def _distortion(meta: Mapping[str, Any], frame: Mapping[str, Any], where: str) -> np.ndarray:
    own, common = _distortion_stated(frame, where), _distortion_stated(meta, where)
    contradicted = any(
        key in common and not math.isclose(value, common[key], rel_tol=1e-6) for key, value in own.items()
    )
    if contradicted:
        lacking = [key for key, value in common.items() if value != 0 and key not in own]
        if lacking:
            raise UserError(
                f"{where}: has its own {', '.join(own)}, but takes {', '.join(lacking)} from the file; expected all "
                "distortion in the frame, or all of it once for the file"
            )
        merged = own
    else:
        merged = {**own, **common}
    return np.array([merged.get(key, 0.0) for key in DISTORTION])


def _distortion_stated(values: Mapping[str, Any], where: str) -> dict[str, float]:
    single = {key: float(values[key]) for key in DISTORTION if key in values}
    if "distortion_params" not in values:
        return single
    vector: dict[str, float] = dict(zip(DISTORTION, map(float, values["distortion_params"]), strict=True))
    if any(value != vector[key] for key, value in single.items()):
        raise UserError(
            f"{where}: distortion_params and {', '.join(single)} contradict each other; expected one of them"
        )
    return vector


def say_where_numbers_disagree(lens: Lens, width: float, height: float, where: str) -> None:
    """Print a line if an angle of view contradicts the focal length beside it. The focal length is used.

    Print a line if pixels are far from square: some programs write one angle of view for both sides.
    """
    fx, fy = lens.focal_lengths(width, height, where)
    if min(fx, fy) > 0 and max(fx, fy) > 1.2 * min(fx, fy):
        say(
            f"{where}: focal lengths are {fx:g} pixels in x and {fy:g} in y, as if pixels were not square; both are "
            "taken as they are"
        )
    for quantity, side in (("fx", width), ("fy", height)):
        stated = {key: self_value for key, self_value in lens.focal.items() if key in _QUANTITIES[quantity]}
        length = next((value for key, value in stated.items() if key not in _ANGLES), 0.0)
        others = [
            (key, value) for key, value in stated.items() if key not in _ANGLES and abs(value - length) > 0.05 * length
        ]
        if length > 0 and others:
            key, value = others[0]
            say(
                f"{where}: {key} says a focal length of {value:g} pixels, {next(iter(stated))} one of {length:g}, "
                "which is taken"
            )
        for key in stated.keys() & set(_ANGLES):
            radians = math.radians(stated[key]) if key.endswith("_fov") else stated[key]
            if length > 0 and lens.kind == CameraType.PERSPECTIVE:
                expected = 2 * math.atan(side / (2 * length))
                if abs(expected - radians) > 0.05 * expected:
                    say(
                        f"{where}: {key} says a view of {math.degrees(radians):.1f} degrees, the focal length of "
                        f"{length:g} pixels one of {math.degrees(expected):.1f}; the focal length is taken"
                    )
