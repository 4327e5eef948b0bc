"""Photos and masks from files: every pixel format that can be 8-bit colour, or "use" and "leave out", without loss of
meaning.

nerfstudio hands a file's numbers on as they are: indices of a palette, the low bytes of 16-bit values, four inks. And
any number but zero in a mask means "use", the grey rim of a soft mask and the noise of a JPEG included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from jaxtyping import Bool, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.datasets.base_dataset import InputDataset
from PIL import ExifTags, Image, ImageOps

from shiftadd3d._errors import UserError

#: What Pillow raises, beside what is the user's to mend, for a file that is damaged or no picture at all.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

_SIXTEEN_BITS = {"I;16": "16-bit grey", "I;16L": "16-bit grey", "I;16B": "16-bit grey", "I;16N": "16-bit grey"}
_GREY = {"1": "black and white", "L": "8-bit grey", "LA": "grey with alpha", "La": "grey with alpha", **_SIXTEEN_BITS}
_COLOUR = {"P": "a palette", "PA": "a palette", "RGB": "RGB", "RGBX": "RGB", "RGBA": "RGBA", "RGBa": "RGBA"}

PHOTO_MODES: Mapping[str, str] = {**_GREY, **_COLOUR, "CMYK": "CMYK", "YCbCr": "YCbCr"}
"""Pillow's modes that a photo may have, and what they are called."""
MASK_MODES: Mapping[str, str] = {**_GREY, **_COLOUR}
"""Pillow's modes that a mask may have."""

#: Grey is what red, green and blue agree on, but for the rounding of a JPEG.
_GREY_TOLERANCE = 12


def photo_header(path: Path, size: tuple[int, int] | None = None) -> tuple[int, int, str]:
    """(width, height, mode) of a picture, from the file's header.

    Args:
        path: the file.
        size: (width, height) of its camera, if known: the picture is turned as its EXIF data says where only that fits.

    Returns:
        The size it is read at, and Pillow's mode (`I;16` for all that hold 16 bits).
    """
    with Image.open(path) as image:
        width, height = image.size[::-1] if _lies_on_its_side(image, size) else image.size
        # Pillow before 11 opens 16-bit PNG files as 32-bit ones.
        return width, height, "I;16" if image.mode == "I" and image.format in ("PNG", "PPM") else image.mode


def _lies_on_its_side(image: Image.Image, size: tuple[int, int] | None) -> bool:
    """Whether a picture has its camera's size only when turned as its EXIF data says.

    Where it fits as it is stored, the poses are those of the stored pixels: the programs that find them know no EXIF.
    """
    if size is None or _nearly(image.size, size) or not _nearly((image.height, image.width), size):
        return False
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # EXIF data are damaged in many ways, and the picture may still be whole
        return False


def _nearly(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """The same size up to the rounding of a downscale factor."""
    return abs(a[0] - b[0]) <= 1 and abs(a[1] - b[1]) <= 1


def read_photo(path: Path, size: tuple[int, int] | None = None, scale: float = 1.0) -> UInt8[np.ndarray, "h w c"]:
    """A photo as 8-bit RGB, or RGBA where its file says what is transparent.

    16 bits become 8 by division by 257, palettes and inks the colours that they stand for, grey three times itself.

    Args:
        path: the file.
        size: (width, height) of its camera; see `photo_header`.
        scale: of the picture that is returned, as nerfstudio scales cameras (see `scaled_size`).

    Raises:
        UserError: a pixel format whose numbers have no scale (floats, 32 bits) or are no such colours.
    """
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened) if _lies_on_its_side(opened, size) else opened
        sixteen = _sixteen_bits(image, path)
        if sixteen is not None:
            image = Image.fromarray(((sixteen + 128) // 257).astype(np.uint8)).convert("RGB")
        elif image.mode not in PHOTO_MODES:
            raise UserError(f"{path} is {image.mode}; expected one of: {_names(PHOTO_MODES)}")
        else:
            image = image.convert("RGBA" if _has_alpha(image) else "RGB")
    if scale != 1.0:
        image = image.resize(scaled_size(image.size, scale), resample=Image.Resampling.BILINEAR)
    return np.array(image)


def read_mask(path: Path, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """A mask: True where the photo's pixel may be used, that is where the mask is lighter than middle grey.

    Masks of zeros and ones are read as such. Colours count by what they look like, in palettes, too.

    Args:
        path: the file.
        size: (width, height) of the photo as it was read, to which the mask is fitted without mixing pixels.

    Raises:
        UserError: colours other than grey; alpha that says something else than the grey; shades that are all darker
            than middle grey, though not black.
    """
    with Image.open(path) as image:
        sixteen = _sixteen_bits(image, path)
        if sixteen is not None:
            grey, white = sixteen, 65535
        elif image.mode not in MASK_MODES:
            raise UserError(f"mask {path} is {image.mode}; expected one of: {_names(MASK_MODES)}")
        else:
            grey, white = _grey(image, path), 255
    # Zeros and ones are labels, whatever the range; a file that is black throughout says nothing of its range.
    use = grey > 0 if grey.max() <= 1 else 2 * grey > white
    if not use.any() and grey.max() > 0:
        raise UserError(
            f"mask {path}: its lightest pixel is {grey.max()} of {white}; expected black and white (0 and {white}, "
            "or 0 and 1), white where a pixel may be used"
        )
    return np.array(Image.fromarray(use).resize(size, resample=Image.Resampling.NEAREST))


def _grey(image: Image.Image, path: Path) -> np.ndarray:
    """[h, w] int32, 0..255, of a mask in any of `MASK_MODES` of 8 bits."""
    if image.mode in ("1", "L") and "transparency" not in image.info:
        return np.array(image.convert("L")).astype(np.int32)
    rgba = np.array(image.convert("RGBA")).astype(np.int32)
    rgb, alpha = rgba[..., :3], rgba[..., 3]
    visible = rgb[alpha > 0]
    if visible.size and np.ptp(visible, axis=-1).max() > _GREY_TOLERANCE:
        raise UserError(f"mask {path} has colours; expected black and white, white where a pixel may be used")
    grey = rgb.mean(axis=-1).round().astype(np.int32)
    if (alpha < 255).any() and not np.array_equal(2 * alpha > 255, 2 * grey > 255):
        raise UserError(
            f"mask {path} has alpha that contradicts its grey; expected a mask without alpha, white where "
            "a pixel may be used"
        )
    return grey


def _sixteen_bits(image: Image.Image, path: Path) -> np.ndarray | None:
    """[h, w] int32, 0..65535, of a picture of 16-bit grey; None of others."""
    if image.mode in _SIXTEEN_BITS:
        return np.array(image).astype(np.int32)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return np.array(image).clip(0, 65535).astype(np.int32)
    return None


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _names(modes: Mapping[str, str]) -> str:
    return ", ".join(dict.fromkeys(modes.values()))


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Both sides scaled and rounded down, in the float32 of nerfstudio's cameras.

    With the same numbers in float64, as nerfstudio's own dataset has them, a picture of 1920 pixels scaled to 252 has
    one pixel more than its camera.
    """
    width, height = (np.float32(side) * np.float32(scale) for side in size)
    return int(width), int(height)


# --------------------------------------------------------------------------------------------------------------------
# The circle of a fisheye lens
# --------------------------------------------------------------------------------------------------------------------


def scale_crop_radius(cameras: Cameras, scale: float) -> None:
    """Scales `metadata["fisheye_crop_radius"]` in place, which nerfstudio leaves as it is in the camera file.

    Raises:
        UserError: it is no positive number.
    """
    metadata = cameras.metadata or {}
    radius = metadata.get("fisheye_crop_radius")
    if radius is None:
        return
    if isinstance(radius, bool) or not isinstance(radius, (int, float)) or not 0 < radius < float("inf"):
        raise UserError(f"fisheye_crop_radius is {radius!r}; expected a positive number of pixels")
    metadata["fisheye_crop_radius"] = radius * scale


def crop_circle(cameras: Cameras, index: int) -> Bool[np.ndarray, "h w"] | None:
    """True at the pixels whose centre a fisheye lens shows: nearer to the principal point than `fisheye_crop_radius`.

    Args:
        cameras: those of a dataset.
        index: which.

    Returns:
        None where the camera has no such circle.
    """
    radius = (cameras.metadata or {}).get("fisheye_crop_radius")
    if radius is None:
        return None
    width, height = int(cameras.width[index]), int(cameras.height[index])
    x = np.arange(width) + 0.5 - float(cameras.cx[index])
    y = np.arange(height) + 0.5 - float(cameras.cy[index])
    return np.hypot(x, y[:, None]) < radius


_DARK = 8
"""Of 255: black, but for the noise of a JPEG."""
_FEWEST_DARK = 5
"""Photos: what only a few of them show black may be the scene."""


def unlit_border(cameras: Cameras, paths: Sequence[Path], scale: float = 1.0) -> Bool[np.ndarray, "h w"] | None:
    """True at pixels within the circle of a fisheye lens that no light has reached in any photo.

    The circle of a camera file often reaches beyond the lens's own, or beyond the sensor. What is black in every photo,
    and joined to the outside of the circle, is lens and no scene.

    Args:
        cameras: of the training views, not scaled; those of a lens have one size and one principal point.
        paths: their photos.
        scale: of the pictures that the outcome is for.

    Returns:
        [h, w], or None where there is no circle, no such pixel, no single lens, or too few photos to tell.

    Raises:
        UserError: what `read_photo` refuses, and a radius that is no positive number.
    """
    scale_crop_radius(cameras, 1.0)  # refuses what is no radius
    lens = torch.cat([cameras.width, cameras.height, cameras.cx, cameras.cy], dim=-1)
    circle = crop_circle(cameras, 0)
    if circle is None or len(paths) < _FEWEST_DARK or bool((lens != lens[0]).any()):
        return None
    size = int(cameras.width[0]), int(cameras.height[0])
    dark = np.ones((size[1], size[0]), dtype=bool)
    for path in paths:
        try:
            dark &= read_photo(path, size)[..., :3].max(axis=-1) <= _DARK
        except UNREADABLE as error:
            if isinstance(error, UserError):
                raise
            continue  # whoever reads all of them names all of them
    labels = cv2.connectedComponents((dark | ~circle).astype(np.uint8), connectivity=4)[1]
    unlit = circle & np.isin(labels, np.unique(labels[~circle]))
    if not unlit.any():
        return None
    return np.array(Image.fromarray(unlit).resize(scaled_size(size, scale), resample=Image.Resampling.NEAREST))


# --------------------------------------------------------------------------------------------------------------------
# What alpha means
# --------------------------------------------------------------------------------------------------------------------

_LOOKED_AT = 8
_PARTLY = (26, 229)
"""Alpha between these is neither opaque nor transparent."""
_MOST_PARTLY = 1 / 3
"""Of a photo's pixels: an object that is cut out is partly transparent along its outline only."""


def is_cut_out(paths: Sequence[Path]) -> bool:
    """Whether photos with alpha show objects cut out of their background, seen from up to eight of them.

    There alpha is a property of the scene: partly transparent pixels are its outlines, and blending with one background
    makes pictures that agree with each other. Where alpha is partial over large parts of the photos (soft masks,
    vignettes, faded layers), it belongs to the photo: blended, each view would see its own haze in another place, and
    no scene explains that.

    Raises:
        UserError: what `read_photo` refuses, and files that cannot be read.
    """
    step = -(-len(paths) // _LOOKED_AT)
    shares = []
    for path in paths[::step]:
        try:
            with Image.open(path) as image:
                if not _has_alpha(image):
                    continue
            alpha = read_photo(path)[..., 3]
            shares.append(float(((alpha > _PARTLY[0]) & (alpha < _PARTLY[1])).mean()))
        except UserError:
            raise
        except UNREADABLE:
            continue  # whoever reads all of them names all of them
    return not shares or float(np.mean(shares)) < _MOST_PARTLY


# --------------------------------------------------------------------------------------------------------------------
# Dataset
# --------------------------------------------------------------------------------------------------------------------


class PhotoDataset(InputDataset):
    """nerfstudio's dataset, with photos and masks read as above; masks leave out what lies beyond a fisheye's circle.

    Args:
        outputs: what a data parser made of a split; `fisheye_crop_radius` as large as its cameras.
        scale_factor: of the pictures.
        cut_out: whether alpha says where the scene ends (see `is_cut_out`). Otherwise colours are taken as they are,
            and alpha of zero is a mask.
        unlit: what the lens leaves black (see `unlit_border`), of the pictures' size.

    Raises:
        UserError: on reading, a file whose header is all that is good about it, and what `read_photo` and `read_mask`
            refuse.
    """

    def __init__(
        self,
        outputs: DataparserOutputs,
        scale_factor: float = 1.0,
        cut_out: bool = True,
        unlit: Bool[np.ndarray, "h w"] | None = None,
    ) -> None:
        super().__init__(outputs, scale_factor)
        self.cut_out, self.unlit = cut_out, unlit
        scale_crop_radius(self.cameras, scale_factor)

    def get_numpy_image(self, image_idx: int) -> UInt8[np.ndarray, "h w c"]:
        photo = self._read(image_idx)
        return photo if self.cut_out else photo[..., :3]

    def _read(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        outputs = self._dataparser_outputs
        size = int(outputs.cameras.width[index]), int(outputs.cameras.height[index])
        return read_photo(outputs.image_filenames[index], size, self.scale_factor)

    def get_data(self, image_idx: int, image_type: Literal["uint8", "float32"] = "float32") -> dict[str, Any]:
        outputs = self._dataparser_outputs
        path = outputs.image_filenames[image_idx]
        try:
            image = self.get_image_float32(image_idx) if image_type == "float32" else self.get_image_uint8(image_idx)
            mask = crop_circle(self.cameras, image_idx)
            if mask is not None and self.unlit is not None and self.unlit.shape == mask.shape:
                mask &= ~self.unlit
            if not self.cut_out and (photo := self._read(image_idx)).shape[-1] == 4:
                use = photo[..., 3] > 0
                mask = use if mask is None else use & mask
            if outputs.mask_filenames is not None:
                path = outputs.mask_filenames[image_idx]
                use = read_mask(path, (image.shape[1], image.shape[0]))
                mask = use if mask is None else use & mask
        except UserError:
            raise
        except UNREADABLE as error:
            raise UserError(f"{path} cannot be read ({error}); expected a whole image: copy it again") from error
        data: dict[str, Any] = {"image_idx": image_idx, "image": image}
        if mask is not None:
            data["mask"] = torch.from_numpy(mask)[..., None]
            if self.mask_color:
                data["image"] = torch.where(data["mask"], image, torch.tensor(self.mask_color).to(image))
        data.update(self.get_metadata(data))
        return data

    def empty(self, image_idx: int) -> Bool[np.ndarray, "h w"] | None:
        """Where a photo of something cut out shows nothing but background: alpha is zero. None if nowhere."""
        if not self.cut_out:
            return None
        with Image.open(self._dataparser_outputs.image_filenames[image_idx]) as image:
            if not _has_alpha(image):
                return None
        empty = self._read(image_idx)[..., 3] == 0
        return empty if empty.any() else None
