"""Which files count as pictures, and what is said about the others."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from shiftadd3d import UserError
from shiftadd3d.vision import files
from shiftadd3d.vision.data import decode_picture, open_data
from shiftadd3d.vision.files import describe_unread, find_files, picture_suffixes
from shiftadd3d.vision.settings import DataSettings

MakeFolder = Callable[..., Path]
SavePicture = Callable[..., None]

FORMATS = {
    **{".jfif": "JPEG", ".jpe": "JPEG", ".JPG": "JPEG", ".png": "PNG", ".apng": "PNG", ".tif": "TIFF", ".TIFF": "TIFF"},
    **{".gif": "GIF", ".webp": "WEBP", ".bmp": "BMP", ".dib": "DIB", ".ppm": "PPM", ".pnm": "PPM", ".tga": "TGA"},
    **{".pcx": "PCX", ".ico": "ICO", ".sgi": "SGI", ".dds": "DDS", ".im": "IM", ".mpo": "MPO"},
    **({".avif": "AVIF"} if features.check("avif") else {}),
    **({".jp2": "JPEG2000", ".j2k": "JPEG2000"} if features.check("jpg_2000") else {}),
}


@pytest.fixture
def heic(repository: Path) -> Path:
    """A photo of 72x96 pixels, as a phone stores it."""
    return repository / "tests" / "scenes" / "upright.heic"


def test_whatever_suffix_pillow_reads_is_a_picture(tmp_path: Path):
    red = Image.new("RGB", (32, 32), (200, 50, 40))
    for number, (suffix, name) in enumerate(FORMATS.items()):
        for label in ("a", "b"):
            path = tmp_path / "set" / label / f"{number}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            red.save(path, format=name)
    data = open_data(DataSettings(data=tmp_path / "set", val_fraction=0.05))
    assert len(data.train) + len(data.val) == 2 * len(FORMATS) and data.skipped == ()
    for position in range(len(data.train)):
        color = np.asarray(data.train.read(position)).mean((0, 1))
        assert color == pytest.approx((200, 50, 40), abs=4), data.train.name(position)


def test_documents_films_and_tables_are_no_pictures():
    suffixes = picture_suffixes()
    assert not suffixes & {".pdf", ".eps", ".ps", ".mpg", ".mp4", ".h5", ".wmf", ".txt", ""}
    assert {".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"} <= suffixes


def test_postscript_called_a_picture_is_not_handed_to_an_interpreter(tmp_path: Path):
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match="not a picture in a format that Pillow knows"):
        decode_picture(tmp_path / "x.jpg")


@pytest.mark.parametrize("where", ["folder", "zip"])
def test_where_the_suffix_says_nothing_the_content_does(tmp_path: Path, make_folder: MakeFolder, where: str):
    root = make_folder(tmp_path / "colors")
    for number, name in enumerate(("photo", "photo.jpg_large", "by J.Smith", "2021.05.03")):
        (root / "train" / "red" / f"{number:03d}.png").rename(root / "train" / "red" / name)
    (root / "train" / "red" / "README").write_text("not a picture")
    (root / "train" / "red" / ".hidden").write_bytes((root / "train" / "red" / "photo").read_bytes())
    path = root if where == "folder" else Path(shutil.make_archive(str(tmp_path / "colors"), "zip", root))
    data = open_data(DataSettings(data=path))
    assert len(data.train) == 36
    assert data.skipped == (
        ("*", "1 file without a suffix, not read (convert them to .jpg or .png if they are pictures)", 1),
    )


@pytest.mark.usefixtures("no_heif")
def test_what_nobody_reads_is_counted_by_suffix(tmp_path: Path, make_folder: MakeFolder):
    root = make_folder(tmp_path / "colors")
    for number in range(3):
        (root / "train" / "red" / f"{number:03d}.png").rename(root / "train" / "red" / f"{number}.HEIC")
    (root / "train" / "red" / "film.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    (root / "notes.txt").write_text("where they come from")
    (root / "train" / "red" / "Thumbs.db").write_bytes(b"whatever")
    (root / "train" / "red" / "desktop.ini").write_bytes(b"whatever")
    data = open_data(DataSettings(data=root))
    assert len(data.train) == 33
    assert [(entry.name, entry.count) for entry in data.skipped] == [("*.heic", 3), ("*.mp4", 1), ("*.txt", 1)]
    assert data.skipped[0].reason == "3 files of .heic, not read (pip install pi-heif)"
    assert data.describe().endswith("; 5 skipped")


@pytest.mark.usefixtures("no_heif")
@pytest.mark.parametrize("where", ["folder", "zip"])
@pytest.mark.parametrize("layout", ["classes", "splits"])
def test_a_class_of_which_no_picture_is_read_is_an_error(
    tmp_path: Path, make_folder: MakeFolder, where: str, layout: str
):
    root = make_folder(tmp_path / "colors")
    for file in (root / "train" / "green").iterdir():
        file.rename(file.with_suffix(".heic"))
    root = root if layout == "splits" else root / "train"
    path = root if where == "folder" else Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", root))
    with pytest.raises(UserError) as caught:
        open_data(DataSettings(data=path))
    assert "no picture of green in train can be read: 12 files of .heic (pip install pi-heif)" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_heif")
def test_a_validation_of_which_no_picture_is_read_is_an_error_and_one_class_of_it_is_named(
    tmp_path: Path, make_folder: MakeFolder
):
    root = make_folder(tmp_path / "colors")
    for file in (root / "val" / "green").iterdir():
        file.rename(file.with_suffix(".heic"))
    data = open_data(DataSettings(data=root))
    assert data.describe().endswith("8 validation pictures; none of green in validation; 4 skipped")
    for file in (*(root / "val" / "red").iterdir(), *(root / "val" / "blue").iterdir()):
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(UserError, match=r"no picture of blue, green, red in val can be read: 12 files of \.heic"):
        open_data(DataSettings(data=root))


def test_notes_beside_pictures_make_no_class(tmp_path: Path, make_folder: MakeFolder):
    root = make_folder(tmp_path / "colors") / "train"
    (root / "annotations").mkdir()
    (root / "annotations" / "000.xml").write_text("<annotation/>")
    (root / "LICENSE").write_text("free")
    data = open_data(DataSettings(data=root))
    assert data.classes == ("blue", "green", "red")
    assert [entry.name for entry in data.skipped] == ["*", "*.xml"]


@pytest.mark.usefixtures("no_heif")
def test_a_folder_of_nothing_that_is_read_says_what_is_there(tmp_path: Path):
    (tmp_path / "set").mkdir()
    for name in ("train.zip", "test.zip", "a.heic"):
        (tmp_path / "set" / name).write_bytes(b"PK")
    with pytest.raises(UserError, match=r"found 2 files of \.zip \(unpack them\), 1 file of \.heic \(pip install"):
        open_data(DataSettings(data=tmp_path / "set"))


def test_a_zip_file_with_backslashes(tmp_path: Path, folder: Path):
    with zipfile.ZipFile(tmp_path / "colors.zip", "w") as archive:
        for file in sorted((folder / "train").glob("*/*")):
            name = f"set\\{file.parent.name}\\{file.name}"  # as some programs write it
            archive.writestr(zipfile.ZipInfo(name), file.read_bytes())
    data = open_data(DataSettings(data=tmp_path / "colors.zip"))
    assert data.classes == ("blue", "green", "red") and len(data.train) + len(data.val) == 36


def test_neither_pipes_nor_links_to_nowhere_are_files(tmp_path: Path, save_picture: SavePicture):
    save_picture(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    assert find_files(tmp_path) == (["a.png"], [])


@pytest.mark.usefixtures("no_heif")
def test_a_heic_picture_called_jpg_is_recognised(tmp_path: Path):
    (tmp_path / "IMG_0001.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    with pytest.raises(UserError, match="HEIC, whatever its suffix: pip install pi-heif"):
        decode_picture(tmp_path / "IMG_0001.jpg")


def test_with_pi_heif_heic_pictures_are_read(tmp_path: Path, heic: Path):
    pytest.importorskip("pi_heif")
    shutil.copy(heic, tmp_path / "a.HEIC")
    shutil.copy(heic, tmp_path / "IMG_0001.jpg")
    assert find_files(tmp_path).pictures == ["IMG_0001.jpg", "a.HEIC"]
    for name in ("a.HEIC", "IMG_0001.jpg"):
        assert decode_picture(tmp_path / name).size == (72, 96)


@pytest.mark.usefixtures("no_heif")
def test_without_it_they_are_none(tmp_path: Path, heic: Path):
    shutil.copy(heic, tmp_path / "a.heic")
    assert find_files(tmp_path).others == ["a.heic"]


def test_many_suffixes_are_not_all_listed():
    text = describe_unread([f"x.{letter}{letter}{letter}" for letter in "abcdefg"])
    assert text.count("1 file of") == files._LISTED and text.endswith("and 2 more suffixes")
