"""Where pictures come from, what they become, and what happens to those that cannot be read."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from shiftadd3d import UserError
from shiftadd3d.vision.data import (
    InputConfig,
    PictureData,
    PictureSet,
    TrainBatches,
    TransformedPictures,
    decode_picture,
    eval_transform,
    input_of,
    open_data,
    open_split,
    split_by_class,
    to_rgb,
    train_loader,
    train_transform,
)
from shiftadd3d.vision.settings import DataSettings, TrainSettings

MakeFolder = Callable[..., Path]
SavePicture = Callable[..., None]

# --------------------------------------------------------------------------------------------------------------------
# Sources
# --------------------------------------------------------------------------------------------------------------------


def test_a_folder_with_train_and_val(data: PictureData):
    assert data.classes == ("blue", "green", "red")
    assert len(data.train) == 36 and len(data.val) == 12
    assert data.train.targets == [0] * 12 + [1] * 12 + [2] * 12
    red = np.asarray(data.train.read(30))
    assert red.shape == (20, 20, 3) and red.mean((0, 1)) == pytest.approx((200, 50, 40), abs=6)
    assert data.train.name(30) == "train/red/006.png"


def test_class_folders_alone_are_split_by_themselves(folder: Path):
    data = open_data(DataSettings(data=folder / "train", val_fraction=0.25))
    assert len(data.train) == 27 and len(data.val) == 9
    assert sorted(data.val.targets) == [0] * 3 + [1] * 3 + [2] * 3
    assert not {data.train.name(i) for i in range(27)} & {data.val.name(i) for i in range(9)}


@pytest.mark.parametrize("prefix", ["", "train/", "colors/train/", "colors/"])
def test_a_zip_file_with_or_without_folders_around_the_classes(folder: Path, tmp_path: Path, prefix: str):
    with zipfile.ZipFile(tmp_path / "colors.zip", "w") as archive:
        for file in sorted((folder / "train").glob("*/*")):
            archive.write(file, prefix + file.relative_to(folder / "train").as_posix())
        archive.writestr(prefix + "red/notes.txt", "not a picture")
        archive.writestr("__MACOSX/" + prefix + "red/._000.png", b"resource fork")
    zipped = open_data(DataSettings(data=tmp_path / "colors.zip", val_fraction=0.25))
    assert zipped.classes == ("blue", "green", "red")
    assert len(zipped.train) == 27 and zipped.skipped == (("*.txt", "1 file of .txt, not read", 1),)
    assert np.array_equal(
        zipped.train.read(0),
        decode_picture(folder / "train" / zipped.train.name(0).rpartition("train/")[2].removeprefix("colors/")),
    )


def test_without_data_there_are_the_digits():
    data = open_data(DataSettings())
    assert data.classes == tuple("0123456789")
    assert len(data.train) + len(data.val) == 1797
    assert data.train.read(0).size == (8, 8)
    assert data.describe() == "digits: 10 classes, 1618 training and 179 validation pictures"


def test_a_torchvision_set(tmp_path: Path):
    # The set's own files; all values of a picture are its number.
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 40), ("t10k", 20)):
        pictures = np.repeat(np.arange(count, dtype=np.uint8), 28 * 28).tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, count, 28, 28) + pictures)
        labels = (np.arange(count, dtype=np.uint8) % 10).tobytes()
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels)
    data = open_data(DataSettings(data=tmp_path, dataset="torch/fashion_mnist"))
    assert data.classes[:2] == ("Ankle boot", "Bag")
    assert len(data.train) == 40 and len(data.val) == 20
    assert data.classes[data.train.targets[3]] == "Dress"
    assert data.train.read(3).getpixel((5, 5)) == (3, 3, 3)
    with pytest.raises(UserError, match=r"torch/fashion_mnist in --data .*Dataset not found"):
        open_data(DataSettings(data=tmp_path / "elsewhere", dataset="torch/fashion_mnist"))
    with pytest.raises(UserError, match="torch/nonsense"):
        open_data(DataSettings(data=tmp_path, dataset="torch/nonsense"))


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_a_folder_of_hugging_face_datasets(folder: Path, tmp_path: Path, form: str):
    datasets = pytest.importorskip("datasets")
    opened = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {
                    "image": [str(file) for file in sorted((folder / split).glob("*/*"))],
                    "label": [file.parent.name for file in sorted((folder / split).glob("*/*"))],
                },
                features=datasets.Features(
                    {"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "green", "blue"])}
                ),
            )
            for split in ("train", "val")
        }
    )
    root = tmp_path / "saved"
    if form == "saved":
        opened.save_to_disk(str(root))
    else:
        for split, part in opened.items():
            part.to_parquet(str(root / "data" / f"{split}-00000-of-00001.parquet"))
    data = open_data(DataSettings(data=root))
    assert data.classes == ("blue", "green", "red")  # by name, as everywhere, not as that set numbers them
    assert len(data.train) == 36 and len(data.val) == 12
    assert data.train.targets == [0] * 12 + [1] * 12 + [2] * 12
    assert np.array_equal(data.train.read(0), decode_picture(folder / "train" / "blue" / "000.png"))


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_rows_without_a_label_are_left_out_and_listed(folder: Path, tmp_path: Path, form: str):
    datasets = pytest.importorskip("datasets")
    names = ["red", "green", "blue"]

    def dataset(split: str, labels: Callable[[str], int | None]) -> object:
        files = sorted((folder / split).glob("*/*"))
        columns = {"image": [str(file) for file in files], "label": [labels(file.parent.name) for file in files]}
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

    opened = {
        "train": dataset("train", lambda name: None if name == "green" else names.index(name)),
        "test": dataset("val", lambda name: -1),
    }
    root = tmp_path / "pictures"
    if form == "saved":
        datasets.DatasetDict(opened).save_to_disk(str(root))
    else:
        for split, part in opened.items():
            part.to_parquet(str(root / "data" / f"{split}-00000-of-00001.parquet"))
    data = open_data(DataSettings(data=root))
    assert data.classes == ("blue", "red")
    assert (len(data.train), len(data.val)) == (22, 2)  # held out, as no picture of test has a label
    assert len(data.skipped) == 13 and data.skipped[0] == ("pictures/train/0000012", "it has no label", 1)
    assert data.skipped[-1] == ("pictures/test", "none of its 12 pictures has a label", 12)
    red = data.train.targets.index(1)
    assert np.asarray(data.train.read(red)).mean((0, 1)) == pytest.approx((200, 50, 40), abs=6)
    with pytest.raises(UserError, match=r"no test pictures .*none of its 12 pictures has a label"):
        open_split(DataSettings(data=root), "test", data.classes)


def test_a_table_of_metadata_does_not_make_a_folder_a_dataset(tmp_path: Path, make_folder: MakeFolder):
    root = make_folder(tmp_path / "colors")
    (root / "metadata.parquet").write_bytes(b"whatever")
    assert len(open_data(DataSettings(data=root)).train) == 36


@pytest.mark.parametrize("where", ["folder", "zip"])
def test_folders_beside_the_splits_are_no_classes(
    tmp_path: Path, make_folder: MakeFolder, save_picture: SavePicture, where: str
):
    root = make_folder(tmp_path / "colors")
    save_picture(root / "demo" / "x" / "000.png")
    path = root if where == "folder" else Path(shutil.make_archive(str(tmp_path / "colors"), "zip", root))
    data = open_data(DataSettings(data=path))
    assert data.classes == ("blue", "green", "red") and (len(data.train), len(data.val)) == (36, 12)
    assert data.skipped == (("demo/", "beside the splits, with 1 of the pictures", 1),)


@pytest.mark.parametrize("name", ["dev", "eval", "Validation"])
def test_the_splits_have_several_names(tmp_path: Path, make_folder: MakeFolder, name: str):
    root = make_folder(tmp_path / "colors")
    (root / "val").rename(root / name)
    data = open_data(DataSettings(data=root))
    assert data.classes == ("blue", "green", "red") and (len(data.train), len(data.val)) == (36, 12)


def test_train_can_be_a_class(tmp_path: Path, make_folder: MakeFolder, save_picture: SavePicture):
    for name in ("bus", "train"):
        for index in range(10):
            save_picture(tmp_path / "vehicles" / name / f"{index}.png", seed=index)
    assert open_data(DataSettings(data=tmp_path / "vehicles")).classes == ("bus", "train")


def test_the_numbering_comes_from_train_where_val_lacks_classes(tmp_path: Path, make_folder: MakeFolder):
    root = make_folder(tmp_path / "colors")
    shutil.rmtree(root / "val" / "green")
    data = open_data(DataSettings(data=root))
    assert data.classes == ("blue", "green", "red")
    assert set(data.val.targets) == {0, 2}
    assert data.describe().endswith("8 validation pictures; none of green in validation")


def test_grocery_fruit_is_numbered_as_its_class_list(shared: Path):
    root = shared / "data" / "cls" / "grocery_fruit"
    data = open_data(DataSettings(data=root, check=False))
    assert list(data.classes) == (root / "classes.txt").read_text().split()
    assert len(data.train) == 1142 and len(data.val) == 111
    assert "none of Nectarine, Papaya, Plum in validation" in data.describe()
    for position in (0, 60, 110):
        assert data.classes[data.val.targets[position]] == data.val.name(position).split("/")[1]


# --------------------------------------------------------------------------------------------------------------------
# The held-out part
# --------------------------------------------------------------------------------------------------------------------


def test_the_held_out_part_depends_on_names_and_seed_only():
    names = [f"{label}/{i}" for label in "abc" for i in range(20)]
    labels = [name[0] for name in names]
    kept, held_out = split_by_class(names, labels, 0.2)
    assert sorted(kept + held_out) == list(range(60)) and len(held_out) == 12
    shuffled = random.Random(0).sample(range(60), 60)
    _, again = split_by_class([names[i] for i in shuffled], [labels[i] for i in shuffled], 0.2)
    assert {names[shuffled[i]] for i in again} == {names[i] for i in held_out}
    assert split_by_class(names, labels, 0.2, seed=1)[1] != held_out


def test_a_class_of_one_picture_keeps_it_for_training():
    kept, held_out = split_by_class(["a", "b1", "b2"], ["a", "b", "b"], 0.9)
    assert 0 in kept and len(kept) == 2 and len(held_out) == 1


# --------------------------------------------------------------------------------------------------------------------
# Pictures of all kinds
# --------------------------------------------------------------------------------------------------------------------


def gradient(dtype: type, top: float) -> np.ndarray:
    return np.linspace(0, top, 64).reshape(8, 8).astype(dtype)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("grey", Image.fromarray(gradient(np.uint8, 255))),
        ("16 bits", Image.fromarray(gradient(np.uint16, 65535))),
        ("32 bits with 16 used", Image.fromarray(gradient(np.int32, 65535))),
        ("float 0..1", Image.fromarray(gradient(np.float32, 1))),
        ("float 0..255", Image.fromarray(gradient(np.float32, 255))),
        ("CMYK", Image.fromarray(gradient(np.uint8, 255)).convert("RGB").convert("CMYK")),
        ("palette", Image.fromarray(gradient(np.uint8, 255)).convert("P")),
        ("opaque", Image.fromarray(gradient(np.uint8, 255)).convert("RGBA")),
        ("grey with alpha", Image.fromarray(gradient(np.uint8, 255)).convert("LA")),
    ],
)
def test_every_kind_of_picture_becomes_8_bit_rgb(name: str, image: Image.Image):
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    expected = np.repeat(gradient(np.float64, 255)[..., None], 3, axis=2)
    assert np.abs(np.asarray(rgb) - expected).max() <= 1.5


def test_one_bit_transparent_animated_and_turned_pictures(tmp_path: Path):
    one_bit = to_rgb(Image.fromarray(np.eye(8, dtype=bool)))
    assert np.array_equal(np.asarray(one_bit)[..., 0], 255 * np.eye(8, dtype=np.uint8))
    transparent = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert to_rgb(transparent).getpixel((0, 0)) == (255, 255, 255)
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    assert decode_picture(tmp_path / "animated.gif").getpixel((3, 3)) == pytest.approx((255, 0, 0), abs=2)
    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert decode_picture(tmp_path / "turned.jpg").size == (4, 8)


def test_damaged_exif_data_turn_nothing(tmp_path: Path):
    Image.new("RGB", (8, 4), "red").save(tmp_path / "picture.jpg", exif=b"Exif\0\0garbage")
    assert to_rgb(decode_picture(tmp_path / "picture.jpg")).size == (8, 4)
    with Image.open(tmp_path / "picture.jpg") as image:
        assert to_rgb(to_rgb(image)).size == (8, 4)


def test_evaluation_sees_the_middle_of_a_long_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 120, 3), dtype=np.uint8)
    transform = eval_transform(InputConfig(size=16))
    for turned in (pixels, pixels.transpose(1, 0, 2)):
        whole = Image.fromarray(turned)
        expected = whole
        for step in cast(Any, transform).transforms[1:]:
            expected = step(expected)
        torch.testing.assert_close(transform(whole), expected)
    # As a whole it would be resized to 248 x 24 million pixels.
    assert eval_transform(InputConfig())(Image.new("RGB", (1, 100_000), "white")).shape == (3, 224, 224)


@pytest.fixture
def damaged(tmp_path: Path, make_folder: MakeFolder) -> Path:
    """Colours with four unreadable pictures and one empty file that is no picture at all."""
    root = make_folder(tmp_path / "colors")
    whole = (root / "train" / "red" / "000.png").read_bytes()
    (root / "train" / "red" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "red" / "empty.jpg").write_bytes(b"")
    (root / "train" / "green" / "text.jpg").write_text("this is not a picture")
    (root / "val" / "blue" / "cut.png").write_bytes(whole[:30])
    (root / "train" / "green" / "Thumbs.db").write_bytes(b"whatever")
    return root


def test_pictures_that_cannot_be_read_are_left_out_counted_and_listed(damaged: Path):
    data = open_data(DataSettings(data=damaged))
    assert len(data.train) == 36 and len(data.val) == 12
    reasons = {entry.name: entry.reason for entry in data.skipped}
    assert sorted(reasons) == ["train/green/text.jpg", "train/red/cut.png", "train/red/empty.jpg", "val/blue/cut.png"]
    assert "not a picture in a format that Pillow knows" in reasons["train/green/text.jpg"]
    assert data.describe().endswith("; 4 skipped")


def test_unchecked_a_picture_that_cannot_be_read_is_named_when_its_turn_comes(damaged: Path):
    data = open_data(DataSettings(data=damaged, check=False))
    assert len(data.train) == 39
    with pytest.raises(UserError, match=r"train/green/text\.jpg: cannot be read as a picture"):
        [data.train.read(i) for i in range(39)]


def test_a_picture_too_large_to_be_one_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_folder: MakeFolder, save_picture: SavePicture
):
    root = make_folder(tmp_path / "colors")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    save_picture(root / "train" / "red" / "bomb.png", size=64)
    data = open_data(DataSettings(data=root))
    assert [entry.name for entry in data.skipped] == ["train/red/bomb.png"]


@pytest.mark.parametrize(
    ("compression", "offset", "reason"),
    [
        (zipfile.ZIP_STORED, 0, "Bad CRC-32"),
        (zipfile.ZIP_DEFLATED, 0, "Error -3 while decompressing"),
        (zipfile.ZIP_LZMA, 20, "Corrupt input data"),
    ],
)
def test_a_zip_whose_member_is_damaged(folder: Path, tmp_path: Path, compression: int, offset: int, reason: str):
    path = tmp_path / "colors.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted((folder / "train").glob("*/*")):
            archive.write(file, file.relative_to(folder / "train").as_posix())
        where = archive.getinfo("red/003.png").header_offset + 30 + len("red/003.png") + offset
    content = bytearray(path.read_bytes())
    content[where : where + 60] = b"\xff" * 60
    path.write_bytes(content)
    data = open_data(DataSettings(data=path))
    assert [entry.name for entry in data.skipped] == ["red/003.png"]
    assert reason in data.skipped[0].reason


# --------------------------------------------------------------------------------------------------------------------
# Folders that are wrong
# --------------------------------------------------------------------------------------------------------------------


def test_wrong_folders_are_refused_in_one_line(tmp_path: Path, make_folder: MakeFolder, save_picture: SavePicture):
    def complaint(path: Path, **options) -> str:
        with pytest.raises(UserError) as caught:
            open_data(DataSettings(data=path, **options))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such file or folder" in complaint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no pictures in there; expected class folders" in complaint(tmp_path / "empty")
    save_picture(tmp_path / "flat" / "a.png")
    assert "1 of 1 pictures are in no class folder (a.png)" in complaint(tmp_path / "flat")
    save_picture(tmp_path / "one" / "red" / "0.png")
    assert "only one class, red; expected two or more" in complaint(tmp_path / "one")
    (tmp_path / "text.zip").write_text("no zip file")
    assert "not a zip file that can be read" in complaint(tmp_path / "text.zip")
    root = make_folder(tmp_path / "mismatch")
    save_picture(root / "val" / "yellow" / "0.png")
    assert "validation has classes that training lacks: yellow; training has blue, green, red" in complaint(root)
    root = make_folder(tmp_path / "unreadable")
    for file in (root / "train" / "green").iterdir():
        file.write_bytes(b"")
    assert "no readable training picture of green; the first of 12" in complaint(root)
    with pytest.raises(UserError, match="expected --data FOLDER, where the set lies"):
        open_data(DataSettings(dataset="torch/cifar10"))
    with pytest.raises(UserError, match="expected a number between 0 and 1"):
        open_data(DataSettings(val_fraction=1.5))
    with pytest.raises(UserError, match="expected a torchvision set by timm's name"):
        open_data(DataSettings(dataset="cifar10"))


def test_a_folder_that_links_to_itself_ends(tmp_path: Path, make_folder: MakeFolder):
    root = make_folder(tmp_path / "colors")
    os.symlink(root, root / "train" / "red" / "again")
    data = open_data(DataSettings(data=root))
    assert len(data.train) == 36


def test_training_pictures_are_those_that_are_not_held_out(folder: Path):
    settings, classes = DataSettings(data=folder / "train"), ("blue", "green", "red")
    train, val = (open_split(settings, split, classes)[0] for split in ("train", "val"))
    assert (len(train), len(val)) == (33, 3) and not set(train.indices) & set(val.indices)
    data = open_data(settings)
    assert (train.indices, val.indices) == (data.train.indices, data.val.indices)


def test_a_split_is_numbered_as_the_model_numbers_its_classes(folder: Path):
    wanted = ("red", "yellow", "green", "blue")
    pictures, skipped = open_split(DataSettings(data=folder), "val", wanted)
    assert pictures.targets == [3] * 4 + [2] * 4 + [0] * 4 and skipped == ()
    with pytest.raises(UserError, match="the model does not know the classes blue, green; it knows red, yellow"):
        open_split(DataSettings(data=folder), "val", ("red", "yellow"))
    with pytest.raises(UserError, match="no test pictures; there are train, val"):
        open_split(DataSettings(data=folder), "test", wanted)


# --------------------------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_together_see_the_batches_that_one_alone_sees(world_size: int):
    alone = list(TrainBatches(50, 8, seed=3))
    parts = [list(TrainBatches(50, 8, 3, rank, world_size)) for rank in range(world_size)]
    together = [list(itertools.chain(*shares)) for shares in zip(*parts, strict=True)]
    assert together == alone
    assert len(alone) == 6 and len({index for batch in alone for index in batch}) == 48


def test_batches_differ_between_epochs_and_can_be_resumed_within_one():
    batches = TrainBatches(50, 8, seed=3)
    first = list(batches)
    batches.start_at(1)
    second = list(batches)
    assert [[p for _, p in batch] for batch in first] != [[p for _, p in batch] for batch in second]
    batches.start_at(1, batch=4)
    assert len(batches) == 2 and list(batches) == second[4:]


def test_batches_that_cannot_be():
    with pytest.raises(UserError, match="there are only 10 training pictures"):
        TrainBatches(10, 11, 0)
    with pytest.raises(UserError, match="expected a multiple of the 3 processes"):
        TrainBatches(10, 4, 0, rank=0, world_size=3)


def test_what_happens_to_a_picture_depends_on_seed_epoch_and_picture_only(data: PictureData):
    transform = train_transform(InputConfig(size=16), TrainSettings(auto_augment="rand-m9-mstd0.5", random_erase=0.5))
    pictures = TransformedPictures(data.train, transform, seed=1)
    torch.manual_seed(5)
    first = pictures[2, 7][0]
    random.seed(9)
    assert torch.equal(pictures[2, 7][0], first)
    assert not torch.equal(pictures[3, 7][0], first)
    assert not torch.equal(TransformedPictures(data.train, transform, seed=2)[2, 7][0], first)


@pytest.mark.parametrize("source", ["folder", "zip"])
def test_workers_read_the_same_as_this_process(folder: Path, tmp_path: Path, source: str):
    path = folder
    if source == "zip":
        path = Path(shutil.make_archive(str(tmp_path / "colors"), "zip", folder))
    opened = open_data(DataSettings(data=path))
    batches = TrainBatches(len(opened.train), 12, seed=0)
    config, device = InputConfig(size=16), torch.device("cpu")
    alone, shared = (
        list(train_loader(opened.train, batches, config, TrainSettings(workers=workers), device)) for workers in (0, 2)
    )
    assert len(alone) == 3
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_a_policy_that_timm_does_not_know(data: PictureData):
    with pytest.raises(UserError, match="--auto-augment nonsense: timm does not understand it"):
        train_transform(InputConfig(size=16), TrainSettings(auto_augment="nonsense"))


def test_a_picture_set_can_be_indexed_by_position(data: PictureData):
    some = PictureSet(data.train.source, [30, 0], data.classes)
    assert some.targets == [2, 0] and some.name(0) == data.train.name(30)


def test_a_palette_with_transparency_shows_white_where_it_is_transparent(tmp_path: Path):
    image = Image.new("P", (4, 4))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 1)
    for index, colors in ((0, ((0, 0, 255), (255, 255, 255))), (1, ((255, 255, 255), (255, 0, 0)))):
        image.save(tmp_path / "palette.png", transparency=index)
        rgb = decode_picture(tmp_path / "palette.png")
        assert (rgb.getpixel((0, 0)), rgb.getpixel((3, 3))) == colors


@pytest.mark.parametrize(
    ("architecture", "mean"),
    [
        ("deit_tiny_patch16_224", (0.485, 0.456, 0.406)),
        ("pvt_v2_b0", (0.485, 0.456, 0.406)),
        ("vit_tiny_patch16_224", (0.5, 0.5, 0.5)),
        ("no_model_of_timms", (0.485, 0.456, 0.406)),
    ],
)
def test_pictures_are_normalised_as_the_pretrained_weights_have_seen_them(architecture, mean):
    config = input_of(architecture, 112)
    assert config.size == 112 and config.mean == mean
