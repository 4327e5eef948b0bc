"""Scenes of Blender: `transforms_train.json`, and `transforms_val.json` and `_test.json` where there are any."""

from __future__ import annotations

from pathlib import Path

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.dataparsers.checks import check_spread
from shiftadd3d.nerf.dataparsers.files import Folder
from shiftadd3d.nerf.dataparsers.scene import Scene, say_what_is_held_out
from shiftadd3d.nerf.dataparsers.transforms import assemble, read_camera_file, read_settings

SPLITS = ("train", "val", "test")


def split_file(folder: Path, split: str) -> Path:
    """Where the views of a split are listed."""
    return folder / f"transforms_{split}.json"


def read_blender(folder: Path, requested_factor: float | None) -> Scene:
    """Read the scene in a folder of Blender's files. The training views define its middle.

    Args:
        folder: holds `transforms_train.json`.
        requested_factor: None or 1.

    Raises:
        UserError: another factor; what `read_camera_file` and `assemble` refuse.
    """
    if requested_factor not in (None, 1):
        raise UserError(
            f"downscale-factor {requested_factor:g}: Blender scenes have one size; expected "
            "--pipeline.datamanager.camera-res-scale-factor 0.5 or the like"
        )
    train = split_file(folder, "train")
    files = {"train": read_camera_file(train)}
    check_spread(files["train"].poses, train)
    for split in SPLITS[1:]:
        path = split_file(folder, split)
        if path.is_file():
            files[split] = read_camera_file(path, may_be_empty=True)
    scene, groups = assemble(list(files.values()), Folder(folder), factor=1)
    scene.splits = dict(zip(files, groups, strict=True))
    scene.reference = groups[0]
    scene.orientation = "none"  # up is z already
    read_settings(scene, files["train"])
    say_what_is_held_out(scene, {split: split_file(folder, split).name for split in SPLITS})
    return scene
