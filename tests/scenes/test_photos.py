"""Photos and videos before their poses are found: what is read, turned upright, shrunk, left out and chosen."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from shiftadd3d import UserError
from shiftadd3d.scenes import photos as module
from shiftadd3d.scenes import scene_path
from shiftadd3d.scenes.photos import Prepared, choose_frames, list_photos, prepare_photos, prepare_video

ORIENTATION, MAKE = 0x112, 0x10F
DETAILS, FOCAL_35, FOCAL, DENSITY, UNIT, WIDTH = 0x8769, 0xA405, 0x920A, 0xA20E, 0xA210, 0xA002


def picture(number: int = 0) -> Image.Image:
    with Image.open(scene_path() / "images" / f"train_{number:02d}.png") as image:
        return image.convert("RGB")


def prepared(folder: Path, max_side: int = 1600) -> tuple[Prepared, Path]:
    images = folder.parent / f"{folder.name}-prepared"
    return prepare_photos(list_photos(folder), images, max_side, 2, None), images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my photos ü").mkdir()
    return tmp_path / "my photos ü"


def test_photos_come_in_the_order_that_people_count_in(folder: Path):
    for name in ("IMG 10.jpg", "IMG 9.jpg", "img 11.PNG", ".hidden.jpg", "notes.txt"):
        (folder / name).touch()
    assert [path.name for path in list_photos(folder)] == ["IMG 9.jpg", "IMG 10.jpg", "img 11.PNG"]


def test_a_folder_without_photos_says_where_there_are_some(folder: Path):
    with pytest.raises(UserError, match=r"no photos in .*expected JPEG"):
        list_photos(folder)
    (folder / "DCIM").mkdir()
    picture().save(folder / "DCIM" / "a.jpg")
    with pytest.raises(UserError, match=r"there are some in .*DCIM"):
        list_photos(folder)


def test_photos_that_need_no_change_are_copied_byte_for_byte_and_originals_stay(folder: Path):
    picture().save(folder / "a.jpg", quality=80)
    picture(1).save(folder / "a.png")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result, images = prepared(folder)
    assert [(images / photo.file).read_bytes() for photo in result.photos] == [before["a.jpg"], before["a.png"]]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [photo.name for photo in result.photos] == ["a.jpg", "a.png"]
    assert len({Path(photo.file).stem for photo in result.photos}) == 2


@pytest.mark.parametrize(("orientation", "stored"), [(6, Image.Transpose.ROTATE_90), (3, Image.Transpose.ROTATE_180)])
def test_photos_are_turned_as_exif_says(orientation: int, stored: Image.Transpose, folder: Path):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture().transpose(stored).save(folder / "a.png", exif=exif)
    result, images = prepared(folder)
    with Image.open(images / result.photos[0].file) as image:
        assert image.size == picture().size
        assert image.getexif().get(ORIENTATION, 1) == 1
        assert np.abs(np.asarray(image, float) - np.asarray(picture(), float)).mean() < 3


def test_large_photos_are_shrunk_and_their_focal_length_with_them(folder: Path):
    exif = Image.Exif()
    exif.get_ifd(DETAILS)[FOCAL_35] = 26
    for name, size in (("a.jpg", (400, 300)), ("b.jpg", (300, 400))):
        picture().resize(size).save(folder / name, exif=exif)
    result, images = prepared(folder, max_side=200)
    assert [(photo.width, photo.height) for photo in result.photos] == [(200, 150), (150, 200)]
    for photo in result.photos:
        # A film frame has a diagonal of 43.27 mm, this photo now one of 250 pixels.
        assert photo.focal == pytest.approx(26 / 43.267 * 250, rel=1e-6)
        with Image.open(images / photo.file) as image:
            assert image.size == (photo.width, photo.height)
    assert result.photos[0].camera != result.photos[1].camera


def test_focal_length_comes_from_the_sensor_where_exif_lacks_its_equivalent(folder: Path):
    exif = Image.Exif()
    # 160 pixels at 40 to the centimetre are 4 cm of sensor, behind 50 mm of lens.
    exif.get_ifd(DETAILS).update({FOCAL: 50.0, DENSITY: 40.0, UNIT: 3, WIDTH: 160})
    picture().save(folder / "a.jpg", exif=exif)
    exif.get_ifd(DETAILS)[WIDTH] = 4000  # of a photo that was edited since
    picture(1).save(folder / "b.jpg", exif=exif)
    exif.get_ifd(DETAILS).update({WIDTH: 160, FOCAL: 50000.0})
    picture(2).save(folder / "c.jpg", exif=exif)
    result, _ = prepared(folder)
    assert [photo.focal for photo in result.photos] == [pytest.approx(200), None, None]


def test_photos_share_a_camera_by_size_device_and_lens(folder: Path):
    def save(name: str, make: str, focal: int) -> None:
        exif = Image.Exif()
        exif[MAKE] = make
        exif.get_ifd(DETAILS)[FOCAL_35] = focal
        picture(int(name[0])).save(folder / name, exif=exif)

    for name, make, focal in (("0.jpg", "A", 26), ("1.jpg", "A", 26), ("2.jpg", "A", 52), ("3.jpg", "B", 26)):
        save(name, make, focal)
    result, _ = prepared(folder)
    cameras = [photo.camera for photo in result.photos]
    assert cameras[0] == cameras[1] and len(set(cameras)) == 3


def test_damaged_photos_and_copies_are_left_out_and_named(folder: Path):
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
    shutil.copy(folder / "0.png", folder / "3.png")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "4.jpg").write_bytes(b"")
    (folder / "5.jpg").write_text("no picture")
    result, images = prepared(folder)
    assert [photo.name for photo in result.photos] == ["0.png", "2.png"]
    assert result.skipped["3.png"] == "a copy of 0.png"
    assert {"1.png", "4.jpg", "5.jpg"} == {name for name, why in result.skipped.items() if "cannot be read" in why}
    assert sorted(path.name for path in images.iterdir()) == sorted(photo.file for photo in result.photos)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "CMYK"])
def test_every_kind_of_pixel_becomes_rgb(mode: str, folder: Path):
    if mode == "I;16":
        image = Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257)
    else:
        image = picture().quantize(256) if mode == "P" else picture().convert(mode)
    image.save(folder / ("a.jpg" if mode == "CMYK" else "a.png"))
    result, images = prepared(folder)
    with Image.open(images / result.photos[0].file) as read:
        assert read.mode == "RGB"
        grey = np.asarray(picture().convert("L"), float)
        assert np.corrcoef(np.asarray(read.convert("L"), float).ravel(), grey.ravel())[0, 1] > 0.97


def test_heic_is_read_upright(folder: Path):
    pytest.importorskip("pi_heif")
    shutil.copy(Path(__file__).parent / "upright.heic", folder / "a.HEIC")
    result, images = prepared(folder)
    photo = result.photos[0]
    assert (photo.width, photo.height) == (72, 96)
    assert photo.focal == pytest.approx(26 / 43.267 * 120, rel=1e-6)
    with Image.open(images / photo.file) as image:
        turned = np.asarray(image.convert("L").rotate(90, expand=True), float)
    true = np.asarray(picture().resize((96, 72)).convert("L"), float)
    assert np.corrcoef(turned.ravel(), true.ravel())[0, 1] > 0.97


def test_heic_that_cannot_be_read_says_what_would_help(folder: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("pillow_heif", "pi_heif"):
        monkeypatch.setitem(sys.modules, name, None)
    shutil.copy(Path(__file__).parent / "upright.heic", folder / "a.heic")
    with pytest.raises(UserError, match=r"HEIC.*pip install pi-heif"):
        prepared(folder)
    picture().save(folder / "b.png")
    result, _ = prepared(folder)
    assert [photo.name for photo in result.photos] == ["b.png"]
    assert "pip install pi-heif" in result.skipped["a.heic"]


def test_a_full_disk_is_no_damaged_photo(folder: Path, monkeypatch: pytest.MonkeyPatch):
    picture().save(folder / "a.png")

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(module.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        prepared(folder)


# Videos


def video(path: Path, sharp_of_three: int = 1, pictures: int = 8) -> Path:
    """Three frames of each picture, two of them blurred; 10 frames a second, a key frame every 3."""
    import imageio_ffmpeg

    # MPEG-4 is in every build of ffmpeg.
    options = {"codec": "mpeg4", "output_params": ["-g", "3"], "macro_block_size": 1, "quality": 9}
    writer = imageio_ffmpeg.write_frames(str(path), (160, 120), fps=10, **options)
    writer.send(None)
    for number in range(pictures):
        for frame in range(3):
            image = picture(number)
            sharp = frame == sharp_of_three
            writer.send(np.asarray(image if sharp else image.filter(ImageFilter.GaussianBlur(3))).tobytes())
    writer.close()
    return path


def test_the_sharpest_frame_of_each_passage_of_a_video_is_taken(tmp_path: Path):
    result = prepare_video(video(tmp_path / "100%d -v.mkv"), tmp_path / "50% images", 100, 8, None)
    assert [photo.name.split()[1] for photo in result.photos] == [str(3 * number + 1) for number in range(8)]
    assert result.photos[0].name == "frame 1 (0.1 s)"
    assert {(photo.width, photo.height) for photo in result.photos} == {(100, 76)}
    for number, photo in enumerate(result.photos):
        with Image.open(tmp_path / "50% images" / photo.file) as image:
            shown = np.asarray(image.convert("L"), float).ravel()
        true = np.asarray(picture(number).convert("L").resize((100, 76)), float).ravel()
        assert np.corrcoef(shown, true)[0, 1] > 0.97
    assert len({photo.camera for photo in result.photos}) == 1


def test_a_video_that_breaks_off_is_used_as_far_as_it_goes(tmp_path: Path):
    whole = video(tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    result = prepare_video(tmp_path / "cut.mkv", tmp_path / "images", 1600, None, None)
    assert any("cut.mkv breaks off" in note for note in result.notes)
    assert 6 <= len(result.photos) <= 14
    assert not any(
        "breaks off" in note for note in prepare_video(tmp_path / "whole.mkv", tmp_path / "all", 1600, None, None).notes
    )


def test_what_is_no_video_says_so(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(UserError, match=r"a\.mp4 cannot be read as a video; expected"):
        prepare_video(tmp_path / "a.mp4", tmp_path / "images", 1600, None, None)


def test_a_camera_that_rests_is_not_looked_at_again_and_again():
    motion = np.concatenate([np.ones(50), np.zeros(100), np.ones(50)])
    chosen = np.array(choose_frames(np.ones(200), motion, 20))
    assert ((chosen >= 50) & (chosen < 150)).sum() <= 6  # not half of them
    assert (np.diff(chosen) > 0).all() and len(chosen) == 20
    assert choose_frames(np.ones(5), np.zeros(5), 20) == [0, 1, 2, 3, 4]
    assert len(choose_frames(np.ones(100), np.zeros(100), 10)) >= 5  # nothing moves at all
