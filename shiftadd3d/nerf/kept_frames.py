"""Frames of a movie that is not complete yet, kept so that the same command goes on after them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
from jaxtyping import UInt8
from nerfstudio.cameras.cameras import Cameras

from shiftadd3d._errors import UserError
from shiftadd3d._extras import installed_version
from shiftadd3d.kernels import get_numerics
from shiftadd3d.nerf.model import GNTNerfModel
from shiftadd3d.nerf.source_bank import SourceBank


def fingerprint(model: GNTNerfModel, bank: SourceBank, cameras: Cameras, names: Sequence[str]) -> str:
    """A number, in hexadecimal digits, that differs where frames may differ.

    It is made of the version, the settings and weights of the model, the numerics of the process, the source views, the
    cameras and the names of the outputs.
    """
    words = (installed_version("shiftadd3d"), model.config, get_numerics(), tuple(names))
    digest = hashlib.sha256(repr(words).encode())
    of_cameras = (cameras.camera_to_worlds, cameras.fx, cameras.fy, cameras.cx, cameras.cy)
    of_frames = (cameras.width, cameras.height, cameras.distortion_params)
    of_bank = (bank.images, bank.valid, bank.intrinsics, bank.camera_to_world)
    tensors = (*model.gnt.state_dict().values(), model.near_far, *of_bank, *of_cameras, *of_frames)
    for tensor in tensors:
        if tensor is None:  # lenses without distortion
            continue
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class KeptFrames:
    """A folder of PNG frames. Those that an earlier command left with the same fingerprint are kept, others removed.

    Args:
        folder: the folder: none yet, or one that an earlier command made.
        of: the fingerprint of the frames.

    Raises:
        UserError: the folder holds something else, or cannot be read.
    """

    def __init__(self, folder: Path, of: str) -> None:
        self._folder, self._note, self._of = folder, folder / "fingerprint.txt", of
        try:
            if folder.is_dir() and any(folder.iterdir()) and not self._note.is_file():
                raise UserError(
                    f"{folder} holds something else; frames are kept there: move it, or choose another --out"
                )
            if not self._note.is_file() or self._note.read_text(encoding="utf-8") != of:
                self.remove()
        except OSError as error:
            raise self._unwritable(error) from None
        self.count = next(number for number in itertools.count() if not self._path(number).is_file())

    def read(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The frames, in their order."""
        for number in range(self.count):
            yield imageio.imread(self._path(number))

    def add(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        """Keep the next frame, whole or not at all. The first one makes the folder."""
        path = self._path(self.count)
        unfinished = path.with_suffix(".unfinished")
        try:
            if self.count == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._note.write_text(self._of, encoding="utf-8")
            # The files are soon removed, and imageio's own level, 9, takes three times as long.
            imageio.imwrite(unfinished, frame, format="PNG", compress_level=1)  # type: ignore[call-overload]
            unfinished.replace(path)
        except OSError as error:
            raise self._unwritable(error) from None
        self.count += 1

    def remove(self) -> None:
        """Remove the frames, and the folder if nothing else is in it."""
        with contextlib.suppress(OSError):
            for path in (*self._folder.glob("frame_*.png"), *self._folder.glob("frame_*.unfinished"), self._note):
                path.unlink(missing_ok=True)
            self._folder.rmdir()

    def _path(self, number: int) -> Path:
        return self._folder / f"frame_{number:05d}.png"

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"cannot keep frames in {self._folder}: {error.strerror or error}; name a writable --out")
