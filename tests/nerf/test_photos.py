"""Photos and masks of every pixel format, turned photos, and the circle of a fisheye lens."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nerfstudio")

from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from shiftadd3d import UserError
from shiftadd3d.nerf.datamanager import GNTDataManager, GNTDataManagerConfig
from shiftadd3d.nerf.dataparsers import AutoDataParserConfig
from shiftadd3d.nerf.photos import PhotoDataset, is_cut_out, photo_header, read_mask, read_photo, scaled_size

ORIENTATION = 0x0112
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
GREYS = RNG.integers(0, 256, (6, 8), dtype=np.uint8)
LEFT = np.arange(8) < 3
"""Columns that the masks below leave in."""


def saved(path, image, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def palette_picture(colours: np.ndarray, indices: np.ndarray) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), "L").convert("P")
    image.putpalette(colours.astype(np.uint8).tobytes())
    image.frombytes(indices.astype(np.uint8).tobytes())
    return image


def manager(scene, **settings) -> GNTDataManager:
    config = GNTDataManagerConfig(
        data=scene,
        num_source_views=3,
        train_num_rays_per_batch=2000,
        **{"dataparser": AutoDataParserConfig(eval_mode="all"), **settings},
    )
    return config.setup(device="cpu", test_mode="val")


def edit_scene(scene, **changes):
    path = scene / "transforms.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return scene


# Photos


def test_a_scaled_photo_is_as_large_as_its_scaled_camera():
    for side in range(20, 400):
        for part in (0.5, 1 / 3, 30 / 44, 63 / side, 252 / 1920):
            cameras = Cameras(torch.eye(4)[None, :3], 50.0, 50.0, 10.0, 10.0, width=side, height=2 * side)
            cameras.rescale_output_resolution(part)
            assert scaled_size((side, 2 * side), part) == (int(cameras.width), int(cameras.height))


def test_a_palette_is_read_by_its_colours(tmp_path):
    colours = RNG.integers(0, 256, (48, 3))
    path = saved(tmp_path / "a.png", palette_picture(colours, np.arange(48).reshape(6, 8)))
    assert photo_header(path)[2] == "P"
    np.testing.assert_array_equal(read_photo(path), colours.reshape(6, 8, 3))


def test_a_palette_with_transparency_has_alpha(tmp_path):
    picture = palette_picture(np.array([[255, 0, 0], [0, 255, 0]]), np.arange(48).reshape(6, 8) % 2)
    photo = read_photo(saved(tmp_path / "a.png", picture, transparency=bytes([0, 200])))
    np.testing.assert_array_equal(photo[0, :2], [[255, 0, 0, 0], [0, 255, 0, 200]])


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 128, 257, 300, 32767, 32768, 65278, 65535]], dtype=np.uint16)
    photo = read_photo(saved(tmp_path / f"a.{suffix}", values))
    np.testing.assert_array_equal(photo[0, :, 0], (values[0] / 257).round())
    assert photo.shape == (1, 8, 3)


def test_grey_black_and_white_and_grey_with_alpha(tmp_path):
    grey = read_photo(saved(tmp_path / "grey.png", GREYS))
    np.testing.assert_array_equal(grey, np.repeat(GREYS[..., None], 3, axis=-1))
    bits = read_photo(saved(tmp_path / "bits.png", GREYS > 99))
    np.testing.assert_array_equal(bits[..., 1], np.where(GREYS > 99, 255, 0))
    both = Image.merge("LA", [Image.fromarray(GREYS), Image.fromarray(255 - GREYS)])
    alpha = read_photo(saved(tmp_path / "alpha.png", both))
    np.testing.assert_array_equal(alpha[..., 0], GREYS)
    np.testing.assert_array_equal(alpha[..., 3], 255 - GREYS)


@pytest.mark.parametrize("name", ["a.tif", "a.jpg"])
def test_inks_become_the_colours_they_print(tmp_path, name):
    flat = np.tile(np.array([200, 60, 30], dtype=np.uint8), (16, 16, 1))
    photo = read_photo(saved(tmp_path / name, Image.fromarray(flat).convert("CMYK")))
    np.testing.assert_allclose(photo.astype(int), flat, atol=4)


def test_numbers_without_a_scale_are_refused(tmp_path):
    for name, values in (("float.tif", GREYS.astype(np.float32)), ("long.tif", GREYS.astype(np.int32))):
        path = saved(tmp_path / name, values)
        with pytest.raises(UserError, match=rf"{name} is [FI]; expected one of: black and white, 8-bit grey"):
            read_photo(path)
        with pytest.raises(UserError, match=rf"mask .*{name} is [FI]; expected one of"):
            read_mask(path, (8, 6))


def test_scenes_of_any_pixel_format_train_and_those_without_a_scale_are_refused(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path)
    expected = {}
    for index, mode in enumerate(["P", "L", "1", "LA", "CMYK", "I;16"]):
        path = scene / f"images/{index:03d}.png"
        picture = Image.open(path).convert("L" if mode == "I;16" else mode)
        if mode == "I;16":
            picture = Image.fromarray(np.array(picture).astype(np.uint16) * 257)
        picture.save(path, format="TIFF" if mode == "CMYK" else "PNG")
        expected[index] = np.array(picture.convert("RGB") if mode != "I;16" else Image.open(path)) / (
            255 if mode != "I;16" else 65535
        )
    data = manager(scene)
    for index, picture in expected.items():
        found = data.source_bank.gather([index]).images[0].numpy()
        np.testing.assert_allclose(found, picture if picture.ndim == 3 else picture[..., None].repeat(3, -1), atol=0.01)
    assert data.next_eval_image(0)[1]["image"].shape == (16, 24, 3)
    Image.new("F", (24, 16)).save(scene / "images/004.png", format="TIFF")
    with pytest.raises(UserError, match=r"1 of 10 images in a pixel format .* \(\S*004.png is F\); expected one of"):
        manager(scene)


# EXIF


def turned(path, pixels, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return saved(path, pixels, exif=exif)


def test_a_photo_is_turned_only_if_its_camera_fits_no_other_way(tmp_path):
    path = turned(tmp_path / "a.png", COLOURS, 6)
    upright = np.rot90(COLOURS, -1)
    for size in (None, (8, 6), (9, 6), (3, 3)):
        np.testing.assert_array_equal(read_photo(path, size), COLOURS)
        assert photo_header(path, size)[:2] == (8, 6)
    for size in ((6, 8), (5, 8)):  # a pixel is rounding
        np.testing.assert_array_equal(read_photo(path, size), upright)
        assert photo_header(path, size)[:2] == (6, 8)


def test_a_photo_that_says_nothing_of_its_rotation_is_refused_where_it_does_not_fit(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path)
    path = scene / "images/002.png"
    pixels = np.array(Image.open(path))
    turned(path, np.rot90(pixels), 6)  # lies on its side, and says so
    bank = manager(scene).source_bank
    np.testing.assert_array_equal(bank.images[2].numpy(), pixels)
    turned(path, np.rot90(pixels), 3)
    with pytest.raises(UserError, match=r"002.png is 16x24, its camera 24x16"):
        manager(scene)
    Image.fromarray(np.rot90(pixels)).save(path, exif=b"Exif\0\0 not at all")
    with pytest.raises(UserError, match=r"002.png is 16x24, its camera 24x16"):
        manager(scene)


def test_photos_of_a_poses_file_are_turned_with_their_focal_length(write_scene, tmp_path):
    scene = write_scene["llff"](tmp_path)
    path = scene / "images_4/image002.png"
    pixels = np.array(Image.open(path))
    turned(path, np.rot90(pixels), 6)
    bank = manager(scene).source_bank
    np.testing.assert_array_equal(bank.images[2].numpy(), pixels)
    torch.testing.assert_close(bank.intrinsics[2], bank.intrinsics[1])


# Masks


def mask_of(levels: np.ndarray, low: int, high: int) -> np.ndarray:
    return np.where(levels, high, low)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("plain.png", mask_of(LEFT, 0, 255).astype(np.uint8)),
        ("soft.png", mask_of(LEFT, 127, 128).astype(np.uint8)),
        ("labels.png", mask_of(LEFT, 0, 1).astype(np.uint8)),
        ("sixteen.png", mask_of(LEFT, 32767, 32768).astype(np.uint16)),
        ("sixteen.tif", mask_of(LEFT, 9000, 65535).astype(np.uint16)),
        ("bits.png", LEFT),
        ("colour.png", mask_of(LEFT[..., None], 3, 250).astype(np.uint8).repeat(3, axis=-1)),
        ("opaque.png", np.dstack([mask_of(LEFT[None, :, None], 3, 250).repeat(3, -1), np.full((1, 8), 255)])),
        ("cut_out.png", mask_of(LEFT[None, :, None], 0, 255).repeat(4, axis=-1)),
    ],
)
def test_a_mask_is_used_where_it_is_lighter_than_middle_grey(tmp_path, name, pixels):
    pixels = pixels if pixels.dtype in (bool, np.uint16) else pixels.astype(np.uint8)
    pixels = np.broadcast_to(pixels, (6, *pixels.shape[1:])) if pixels.shape[0] == 1 else np.stack([pixels] * 6)
    use = read_mask(saved(tmp_path / name, np.ascontiguousarray(pixels)), (8, 6))
    assert use.dtype == bool
    np.testing.assert_array_equal(use, np.tile(LEFT, (6, 1)))


def test_noise_of_a_jpeg_mask_is_no_use(tmp_path):
    ring = np.zeros((64, 64), dtype=np.uint8)
    ring[20:40, 13:50] = 255
    path = saved(tmp_path / "a.jpg", ring, quality=40)
    assert (np.array(Image.open(path)) > 0).sum() > 1.1 * (ring > 0).sum()
    np.testing.assert_array_equal(read_mask(path, (64, 64)), ring > 0)


def test_a_palette_mask_is_read_by_its_colours_not_its_indices(tmp_path):
    indices = np.tile(np.where(LEFT, 0, 1), (6, 1))
    path = saved(tmp_path / "a.png", palette_picture(np.array([[255] * 3, [0] * 3]), indices))
    np.testing.assert_array_equal(read_mask(path, (8, 6)), indices == 0)


@pytest.mark.parametrize("size", [(7, 6), (9, 7), (8, 5), (16, 12)])
def test_a_mask_is_fitted_to_its_photo_without_mixing(tmp_path, size):
    use = read_mask(saved(tmp_path / "a.png", mask_of(np.tile(LEFT, (6, 1)), 0, 255).astype(np.uint8)), size)
    assert use.shape == size[::-1]
    assert 0 < int(use[0].sum()) - size[0] * 3 / 8 + 1 < 2


def test_masks_that_could_mean_either_are_refused(tmp_path):
    grey = np.tile(np.where(LEFT, 255, 0), (6, 1)).astype(np.uint8)
    white = np.full_like(grey, 255)
    inverted = np.dstack([white, white, white, grey])
    dark = np.dstack([grey, grey, grey, 255 - grey])
    for pixels, words in (
        (COLOURS, "has colours; expected black and white"),
        (inverted, "alpha that contradicts its grey"),
        (dark, "alpha that contradicts its grey"),
        (grey // 5, "lightest pixel is 51 of 255; expected black and white"),
        ((grey > 0).astype(np.uint16) * 255, "lightest pixel is 255 of 65535"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            read_mask(saved(tmp_path / "a.png", pixels), (8, 6))
        assert "a.png" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_black_mask_leaves_out_all(tmp_path):
    assert not read_mask(saved(tmp_path / "a.png", np.zeros((6, 8), dtype=np.uint8)), (8, 6)).any()


def test_masks_of_a_pixel_more_or_less_serve_and_of_more_do_not(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path, masks=True)
    mask = Image.open(scene / "masks/003.png")
    mask.resize((25, 15), Image.Resampling.NEAREST).save(scene / "masks/003.png")
    assert manager(scene).eval_dataset[3]["mask"].shape == (16, 24, 1)
    mask.resize((26, 16), Image.Resampling.NEAREST).save(scene / "masks/003.png")
    with pytest.raises(UserError, match=r"003.png is 26x16, its image 24x16"):
        manager(scene)


# Alpha


def set_alpha(scene, alpha) -> None:
    """Give every photo of a scene the alpha [h, w] that the function makes of its number."""
    for index, path in enumerate(sorted((scene / "images").iterdir())):
        picture = Image.open(path).convert("RGB")
        picture.putalpha(Image.fromarray(alpha(index).astype(np.uint8)))
        picture.save(path)


def disc(_index: int) -> np.ndarray:
    """Opaque within, transparent without, and a soft rim of a pixel."""
    y, x = np.mgrid[:16, :24]
    return (255 * (7 - np.hypot(x - 12, y - 8))).clip(0, 255)


def haze(index: int) -> np.ndarray:
    """A ramp that is another in each photo, transparent at one side."""
    return np.roll(np.tile(np.linspace(0, 230, 24), (16, 1)), index, axis=1)


def test_a_cut_out_is_blended_with_the_background(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path)
    set_alpha(scene, disc)
    data = manager(scene)
    rgba = np.asarray(Image.open(scene / "images/004.png")) / 255
    white = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
    np.testing.assert_allclose(data.source_bank.gather([4]).images[0], white, atol=0.51 / 255)
    np.testing.assert_allclose(data.eval_dataset[4]["image"], white, atol=1e-6)
    assert "mask" not in data.eval_dataset[4]
    assert data.source_bank.valid is None
    empty = data.source_bank.gather([4, 4]).empty
    assert empty is not None
    np.testing.assert_array_equal(empty[1].numpy(), rgba[..., 3] == 0)


def test_masked_pixels_and_those_of_opaque_photos_are_not_known_to_be_empty(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path, masks=True)
    assert manager(scene).source_bank.empty is None
    set_alpha(scene, lambda _: np.where(np.arange(24) < 8, 0, 255) * np.ones((16, 1)))
    bank = manager(scene).source_bank
    assert bank.empty is not None
    assert bank.valid is not None
    left = (torch.arange(24) < 8).expand(10, 16, 24)
    torch.testing.assert_close(bank.empty, left & bank.valid)


def test_a_lens_bends_what_is_empty_with_the_photo(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path, k1=0.4)
    set_alpha(scene, disc)
    bank = manager(scene).source_bank
    assert bank.empty is not None
    assert bank.valid is not None
    white = (bank.images == 255).all(dim=-1)
    assert 0.3 < bank.empty.float().mean() < 0.8
    assert bool(white[bank.empty].all())
    assert not bank.empty[~bank.valid].any()


def test_alpha_that_belongs_to_the_photo_is_a_mask_where_it_is_zero(write_scene, tmp_path, capsys):
    scene = write_scene["nerfstudio"](tmp_path)
    pixels = [np.array(Image.open(path)) for path in sorted((scene / "images").iterdir())]
    set_alpha(scene, haze)
    data = manager(scene)
    assert "partly transparent over large parts" in " ".join(capsys.readouterr().out.split())
    for index in (0, 4):
        clear = haze(index).astype(np.uint8) == 0
        assert 0 < clear.sum() < 40
        expected = np.where(clear[..., None], 0, pixels[index])
        np.testing.assert_array_equal(data.source_bank.images[index].numpy(), expected)
        assert data.source_bank.valid is not None
        np.testing.assert_array_equal(data.source_bank.valid[index].numpy(), ~clear)
        np.testing.assert_allclose(data.eval_dataset[index]["image"], pixels[index] / 255, atol=1e-6)
        np.testing.assert_array_equal(data.eval_dataset[index]["mask"][..., 0].numpy(), ~clear)


def test_thin_cut_outs_that_are_mostly_outline_are_cut_out(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path)
    set_alpha(scene, lambda index: np.where(np.arange(24) % 6 == index % 6, 128, 0) * np.ones((16, 1)))
    assert is_cut_out(sorted((scene / "images").iterdir()))


def test_opaque_photos_and_those_that_cannot_be_read_are_as_good_as_cut_out(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path)
    paths = sorted((scene / "images").iterdir())
    assert is_cut_out(paths)
    set_alpha(scene, haze)
    assert not is_cut_out(paths)
    for path in paths:
        path.write_bytes(path.read_bytes()[:60])
    assert is_cut_out(paths)  # those who read all of them complain


# The circle of a fisheye lens

CIRCLE = {"camera_model": "OPENCV_FISHEYE", "fisheye_crop_radius": 6.0, "cx": 11.0, "cy": 7.5}


def inside_circle(width: int, height: int, cx: float, cy: float, radius: float) -> np.ndarray:
    y, x = np.mgrid[:height, :width] + 0.5
    return (x - cx) ** 2 + (y - cy) ** 2 < radius**2


def test_nothing_is_drawn_or_judged_outside_a_fisheyes_circle(write_scene, tmp_path):
    data = manager(edit_scene(write_scene["nerfstudio"](tmp_path), **CIRCLE))
    inside = torch.from_numpy(inside_circle(24, 16, 11.0, 7.5, 6.0))
    assert 90 < inside.sum() < 130
    for draw in (data.next_train, data.next_eval):
        _, rows, columns = torch.cat([draw(step)[1]["indices"] for step in range(3)]).T
        drawn = torch.zeros_like(inside)
        drawn[rows, columns] = True
        torch.testing.assert_close(drawn, inside)
    torch.testing.assert_close(data.next_eval_image(0)[1]["mask"][..., 0], inside)


def test_a_circle_is_the_same_as_masks_of_it(write_scene, tmp_path):
    circle = manager(edit_scene(write_scene["nerfstudio"](tmp_path / "circle"), **CIRCLE)).source_bank
    masked = write_scene["nerfstudio"](tmp_path / "masks", masks=True)
    edit_scene(masked, camera_model="OPENCV_FISHEYE", cx=11.0, cy=7.5)
    for mask in (masked / "masks").iterdir():
        Image.fromarray(inside_circle(24, 16, 11.0, 7.5, 6.0)).save(mask)
    bank = manager(masked).source_bank
    assert circle.valid is not None
    assert bank.valid is not None
    torch.testing.assert_close(circle.valid, bank.valid)
    torch.testing.assert_close(circle.images, bank.images)
    assert not circle.images[~circle.valid].any()


@pytest.mark.parametrize("parser", [AutoDataParserConfig, NerfstudioDataParserConfig])
def test_a_circle_shrinks_with_the_pictures(write_scene, tmp_path, parser):
    scene = edit_scene(write_scene["nerfstudio"](tmp_path, size=(96, 64)), **CIRCLE, fl_x=80.0, fl_y=80.0)
    edit_scene(scene, cx=44.0, cy=30.0, fisheye_crop_radius=24.0)
    for path in sorted((scene / "images").iterdir()):
        small = scene / "images_2" / path.name
        small.parent.mkdir(exist_ok=True)
        Image.open(path).resize((48, 32)).save(small)
    data = manager(scene, dataparser=parser(downscale_factor=2, eval_mode="all"), camera_res_scale_factor=0.5)
    expected = inside_circle(24, 16, 11.0, 7.5, 6.0)
    np.testing.assert_array_equal(data.eval_dataset[0]["mask"][..., 0].numpy(), expected)


def blacken(scene, where: np.ndarray, names: slice = slice(None)) -> None:
    """Make some pixels of some photos black."""
    for path in sorted((scene / "images").iterdir())[names]:
        pixels = np.array(Image.open(path)) | 16  # noise has black pixels of its own
        pixels[where] = 0
        Image.fromarray(pixels).save(path)


def test_what_a_lens_leaves_black_in_all_photos_is_no_scene_though_the_circle_holds_it(write_scene, tmp_path):
    scene = edit_scene(write_scene["nerfstudio"](tmp_path), **CIRCLE)
    below = np.zeros((16, 24), dtype=bool)
    below[10:] = True  # reaches the circle's edge
    spot = np.zeros((16, 24), dtype=bool)
    spot[6:8, 10:13] = True  # black in every photo as well, but in the middle of the picture
    blacken(scene, below | spot)
    data = manager(scene)
    expected = torch.from_numpy(inside_circle(24, 16, 11.0, 7.5, 6.0) & ~below)
    torch.testing.assert_close(data.next_eval_image(0)[1]["mask"][..., 0], expected)
    _, rows, columns = data.next_train(0)[1]["indices"].T
    assert bool(expected[rows, columns].all())


def test_what_one_photo_shows_is_scene(write_scene, tmp_path):
    scene = edit_scene(write_scene["nerfstudio"](tmp_path), **CIRCLE)
    below = np.zeros((16, 24), dtype=bool)
    below[10:] = True
    blacken(scene, below, slice(1, None))  # dark in all but the first
    mask = manager(scene).next_eval_image(0)[1]["mask"][..., 0]
    torch.testing.assert_close(mask, torch.from_numpy(inside_circle(24, 16, 11.0, 7.5, 6.0)))


@pytest.mark.parametrize("radius", [0, -3.0, "wide", True, [38.0], float("inf")])
def test_a_circle_without_a_radius_is_refused(write_scene, tmp_path, radius):
    scene = edit_scene(write_scene["nerfstudio"](tmp_path), **{**CIRCLE, "fisheye_crop_radius": radius})
    with pytest.raises(UserError, match=r"fisheye_crop_radius is .*; expected a positive number of pixels"):
        manager(scene)


def test_a_circle_that_holds_no_pixel_is_refused(write_scene, tmp_path):
    scene = edit_scene(write_scene["nerfstudio"](tmp_path), **{**CIRCLE, "fisheye_crop_radius": 0.1})
    with pytest.raises(UserError, match=r"all 10 views are masked throughout; expected .* fisheye_crop_radius"):
        manager(scene).next_train(0)


def test_perspective_cameras_have_no_circle(write_scene, tmp_path):
    scene = edit_scene(write_scene["nerfstudio"](tmp_path), fisheye_crop_radius=2.0)
    outputs = AutoDataParserConfig(data=scene).setup().get_dataparser_outputs("train")
    assert "mask" not in PhotoDataset(outputs)[0]
