"""Labels, JSON, pictures and routing maps from a saved classifier, through the command line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import shiftadd3d
from bounds import assert_within, network_bound
from shiftadd3d import UserError, cli
from shiftadd3d.kernels import numerics
from shiftadd3d.kernels.whole import executable
from shiftadd3d.nn import CompiledModel, MoEMlp, freeze_, recipe
from shiftadd3d.nn.routing import RoutingMap, routing_maps
from shiftadd3d.vision import predict as predict_module
from shiftadd3d.vision.checkpoint import ClassifierConfig, create_classifier, save_classifier
from shiftadd3d.vision.data import eval_transform
from shiftadd3d.vision.pictures import save_curves, save_routing
from shiftadd3d.vision.predict import camera_frame, predict

SavePicture = Callable[..., None]


@pytest.fixture
def routed(config: ClassifierConfig) -> nn.Module:
    """A classifier with a mixture in each of its two blocks, on 2 x 2 patches and a class token."""
    torch.manual_seed(0)
    return create_classifier(replace(config, recipe=recipe("add+shift-attn+moe"))).eval()


@pytest.fixture
def checkpoint(routed: nn.Module, tmp_path: Path) -> Path:
    """`routed`, saved."""
    save_classifier(tmp_path / "best", routed.state_dict(), routed.classifier_config)
    return tmp_path / "best"


def test_a_prediction_is_what_the_model_says(routed: nn.Module, folder: Path):
    image = Image.open(folder / "val" / "red" / "000.png")
    prediction = predict(routed, image, "red.png")
    inputs = eval_transform(routed.classifier_config.input)(image.convert("RGB")).unsqueeze(0)
    with torch.no_grad():
        probabilities = routed(inputs).softmax(-1)[0]
    order = probabilities.argsort(descending=True).tolist()
    assert prediction.labels == tuple(routed.classifier_config.classes[i] for i in order)
    assert prediction.probabilities == pytest.approx(probabilities[order].tolist())
    assert prediction.seen.shape == (16, 16, 3)
    assert prediction.seen.mean((0, 1)) == pytest.approx((200, 50, 40), abs=8)


def test_routing_maps_show_the_expert_of_each_patch(routed: nn.Module, folder: Path):
    image = Image.open(folder / "val" / "red" / "000.png")
    mixture = routed.blocks[1].mlp
    assert isinstance(mixture, MoEMlp)
    maps = {layer.layer: layer for layer in predict(routed, image, routing=True).routing}
    assert set(maps) == {"blocks.0.mlp", "blocks.1.mlp"}
    assert maps["blocks.1.mlp"].experts == ("mult", "shift")
    # The class token comes first and is no patch.
    assert mixture.last_assignment.shape == (1, 5)
    assert maps["blocks.1.mlp"].assignment.tolist() == mixture.last_assignment[0, 1:].reshape(2, 2).tolist()
    # A router that knows only one answer.
    nn.init.zeros_(mixture.router.weight)
    with torch.no_grad():
        mixture.router.bias.copy_(torch.tensor([0.0, 1.0]))
    assert predict(routed, image, routing=True).routing[1].share(1) == 1.0


def test_a_frozen_classifier_routes_as_the_one_it_came_from(routed: nn.Module, folder: Path):
    image = Image.open(folder / "val" / "green" / "001.png")
    bound = network_bound(routed)
    exact, undecided = in_float64(routed, image)
    assert undecided > bound, "rounding alone may send a patch to the other expert"
    before = predict(routed, image, routing=True)
    freeze_(routed, verbose=False)
    after = predict(routed, image, routing=True)
    with numerics("twin"):
        plain = predict(routed, image, routing=True)
    assert plain.probabilities == before.probabilities  # the very same operations
    assert after.labels == before.labels
    for prediction in (before, after):  # kernels sum in an order of their own
        assert_within(torch.tensor(prediction.probabilities), exact, bound)
        for one, other in zip(before.routing, prediction.routing, strict=True):
            assert one.layer == other.layer and np.array_equal(one.assignment, other.assignment)


@pytest.mark.parametrize("more", [[], ["--no-compile"], ["--show-routing"]])
def test_packed_classifiers_are_compiled_unless_told_otherwise(
    more: list[str], routed: nn.Module, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("tvm")
    monkeypatch.chdir(tmp_path)
    config, bound = replace(routed.classifier_config, frozen=True), network_bound(routed)
    image = folder / "val" / "green" / "001.png"
    exact, _ = in_float64(routed, Image.open(image))
    freeze_(routed, verbose=False)
    save_classifier(tmp_path / "packed", routed.state_dict(), config)
    ran: list[str] = []
    monkeypatch.setattr(CompiledModel, "forward", _noted(CompiledModel.forward, ran))
    assert cli.main(["predict", "packed", str(image), "--json", "labels.json", *more]) == 0
    assert bool(ran) == (not more)
    (prediction,) = json.loads(Path("labels.json").read_text())["predictions"]
    assert_within(torch.tensor([one["probability"] for one in prediction["top"]]), exact, bound)


def _noted(forward: Callable[..., torch.Tensor], ran: list[str]) -> Callable[..., torch.Tensor]:
    def call(self: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        ran.append(type(self).__name__)
        return forward(self, *inputs)

    return call


def test_what_is_built_ahead_need_not_be_compiled_any_more(
    routed: nn.Module, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    pytest.importorskip("tvm")
    monkeypatch.chdir(tmp_path)
    config = replace(routed.classifier_config, frozen=True)
    save_classifier(tmp_path / "trained", routed.state_dict(), routed.classifier_config)
    freeze_(routed, verbose=False)
    save_classifier(tmp_path / "packed", routed.state_dict(), config)
    build = ["kernels", "build", "--json", "built.json", "--model"]
    assert cli.main([*build, "packed"]) == 0
    (row,) = json.loads(Path("built.json").read_text())["models"]
    assert row["model"] == "packed" and row["numerics"] == "exact"
    monkeypatch.setattr(executable, "compile_programs", lambda *_: pytest.fail("compiled again"))
    assert cli.main(["predict", "packed", str(folder / "val" / "green" / "001.png")]) == 0
    for wrong in (["trained"], ["nowhere"], ["packed", "--out", "bundle"], ["packed", "--target", "avx2"]):
        assert cli.main([*build, *wrong]) == 1
    assert cli.main(["kernels", "build", "--numerics", "int8"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 5 and errors[0].startswith("error: trained: not packed")


def test_what_keeps_a_classifier_from_being_compiled_is_said_in_one_line(
    routed: nn.Module, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = replace(routed.classifier_config, recipe=recipe("add+shift", binarizer="hash"), frozen=True)
    model = create_classifier(replace(other, frozen=False)).eval()
    freeze_(model, verbose=False)
    save_classifier(tmp_path / "packed", model.state_dict(), other)
    assert cli.main(["predict", str(tmp_path / "packed"), str(folder / "val" / "red" / "000.png")]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "compiled" in line]
    assert said == ["not compiled: blocks.0.attn.q_code is a HashBinarizer, which is not registered"]


def in_float64(model: nn.Module, image: Image.Image) -> tuple[torch.Tensor, float]:
    """The probabilities, best first, and by how much the two experts' logits differ where they differ least."""
    wide, margins = copy.deepcopy(model).double(), []
    for module in wide.modules():
        if isinstance(module, MoEMlp):
            module.register_forward_pre_hook(lambda mixture, x: margins.append(mixture.router(x[0]).diff(dim=-1).abs()))
    inputs = eval_transform(model.classifier_config.input)(image.convert("RGB")).unsqueeze(0)
    with torch.no_grad():
        probabilities = wide(inputs.double()).softmax(-1)[0]
    assert len(margins) == 2
    return probabilities.sort(descending=True).values, float(torch.cat(margins).min())


def test_pyramids_have_maps_of_several_sizes(config: ClassifierConfig):
    small = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 2, 4)}
    pyramid = ClassifierConfig(
        "pvt_v2_b0", config.classes, replace(config.input, size=64), small, recipe("add+shift-attn+moe")
    )
    model = create_classifier(pyramid).eval()
    predict(model, Image.new("RGB", (64, 64)), routing=True)
    sides = {layer.layer: layer.assignment.shape for layer in routing_maps(model)}
    assert sides["stages.0.blocks.0.mlp.fc1"] == (16, 16)
    assert sides["stages.3.blocks.0.mlp.fc2"] == (2, 2)


@pytest.mark.usefixtures("no_heif")
def test_files_folders_and_what_cannot_be_read(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pictures = tmp_path / "pictures"
    (pictures / "deeper").mkdir(parents=True)
    Image.new("L", (30, 20), 100).save(pictures / "grey.png")
    Image.new("RGB", (30, 20)).save(pictures / "deeper" / "grey.jfif", format="JPEG")
    (pictures / "phone.heic").write_bytes(b"whatever")
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8nonsense")
    file, out = tmp_path / "labels.json", tmp_path / "labelled"
    red = folder / "val" / "red" / "000.png"
    arguments = [str(checkpoint), str(pictures), str(red), "--json", str(file), "--out", str(out), "--show-routing"]
    assert cli.main(["predict", *arguments]) == 0
    facts = json.loads(file.read_text())
    names = [prediction["picture"] for prediction in facts["predictions"]]
    assert names == [str(pictures / "deeper" / "grey.jfif"), str(pictures / "grey.png"), str(red)]
    assert [skipped["name"] for skipped in facts["skipped"]] == ["*.heic", str(pictures / "broken.jpg")]
    printed = capsys.readouterr().out
    for prediction in facts["predictions"]:
        top = prediction["top"]
        assert len(top) == 3 and top[0]["label"] == prediction["label"]
        assert sum(entry["probability"] for entry in top) == pytest.approx(1, abs=1e-5)
        assert f"{prediction['picture']}: {prediction['label']}" in printed
        assert {layer["layer"] for layer in prediction["routing"]} == {"blocks.0.mlp", "blocks.1.mlp"}
        for picture in (prediction["labelled"], prediction["routing_picture"]):
            with Image.open(picture) as image:
                assert image.width > 200
    # Two pictures of one name keep their own files.
    assert sorted(path.name for path in out.iterdir()) == [
        "000.label.png",
        "000.routing.png",
        "grey-2.label.png",
        "grey-2.routing.png",
        "grey.label.png",
        "grey.routing.png",
    ]
    assert "skipped" in printed


def test_no_picture_is_written_over(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], save_picture: SavePicture
):
    pictures = tmp_path / "pictures"
    for name in ("red.png", "red.routing.png", "red.jpg", "red-2.png"):
        save_picture(pictures / name)
    before = {file: file.read_bytes() for file in pictures.iterdir()}
    arguments = ["predict", "--out", str(pictures), str(checkpoint), str(pictures / "red.png")]
    assert cli.main(arguments) == 0
    assert sorted(file.name for file in set(pictures.iterdir()) - set(before)) == ["red.label.png"]
    # The names that both may get count, routing asked for or not.
    assert cli.main([*arguments, str(pictures / "red.routing.png")]) == 1
    assert "red.routing.png, one of the pictures; expected another folder" in capsys.readouterr().err
    # The label of the first run is a picture now, where whole folders are read.
    (tmp_path / "link").symlink_to(pictures)
    assert cli.main(["predict", str(checkpoint), str(pictures), "--out", str(tmp_path / "link")]) == 1
    assert "would write over" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in before} == before
    facts = predict_module.predict_pictures(checkpoint, [str(file) for file in before], out=tmp_path / "out")
    assert len({entry["labelled"] for entry in facts["predictions"]}) == len(before)
    assert len(list((tmp_path / "out").glob("*.label.png"))) == len(before)


def test_a_picture_with_damaged_exif_data_is_classified(checkpoint: Path, tmp_path: Path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "damaged.jpg", exif=b"Exif\0\0garbage")
    facts = predict_module.predict_pictures(checkpoint, [str(tmp_path / "damaged.jpg")])
    assert len(facts["predictions"]) == 1


@pytest.mark.parametrize(
    ("size", "labelled"),
    [
        ((1, 3000), (480, 1440 + 66)),
        ((3000, 1), (480, 1 + 66)),
        ((20, 30), (480, 720 + 66)),
        ((960, 40), (480, 20 + 66)),
    ],
)
def test_labelled_pictures_have_bounds(checkpoint: Path, tmp_path: Path, size: tuple, labelled: tuple):
    Image.new("RGB", size).save(tmp_path / "picture.png")
    predict_module.predict_pictures(checkpoint, [str(tmp_path / "picture.png")], out=tmp_path)
    with Image.open(tmp_path / "picture.label.png") as image:
        assert image.size == labelled


def test_the_routing_picture_shows_experts_in_their_colours(routed: nn.Module, tmp_path: Path):
    for block in routed.blocks:
        nn.init.zeros_(block.mlp.router.weight)

    def mean_blue(shift_bias: float) -> float:
        for block in routed.blocks:
            with torch.no_grad():
                block.mlp.router.bias.copy_(torch.tensor([0.0, shift_bias]))
        prediction = predict(routed, Image.new("RGB", (16, 16), "gray"), routing=True)
        save_routing(prediction.seen, prediction.routing, "title", tmp_path / "routing.png")
        pixels = np.asarray(Image.open(tmp_path / "routing.png").convert("RGB")).astype(float)
        return float((pixels[..., 2] - pixels[..., 0]).mean())

    assert mean_blue(1.0) > 5 + mean_blue(-1.0)


def test_the_panels_of_a_routing_picture_stand_close_together(tmp_path: Path):
    maps = [RoutingMap(f"blocks.{i}.mlp", ("mult", "shift"), np.zeros((4, 4), int)) for i in range(10)]
    save_routing(np.zeros((16, 16, 3), np.uint8), maps, "title", tmp_path / "routing.png")
    pixels = np.asarray(Image.open(tmp_path / "routing.png").convert("L"))
    white = (pixels[-pixels.shape[0] // 4 :] == 255).all(axis=0)  # the lower row of panels
    edges = np.flatnonzero(np.diff(white.astype(int)))
    gaps = edges[2:-1:2] - edges[1:-2:2]
    assert len(gaps) == 5 and gaps.max() - gaps.min() <= 1 and gaps.max() < 20


def test_a_classifier_without_mixtures_has_no_routing(
    config: ClassifierConfig, model: nn.Module, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_classifier(tmp_path / "dense", model.state_dict(), config)
    red = str(folder / "val" / "red" / "000.png")
    assert cli.main(["predict", str(tmp_path / "dense"), red, "--show-routing", "--out", str(tmp_path / "out")]) == 0
    assert "no routing to show: this classifier has no mixtures of experts" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["000.label.png"]


def test_a_camera_gives_a_frame(monkeypatch: pytest.MonkeyPatch, checkpoint: Path):
    cv2 = pytest.importorskip("cv2")

    class Camera:
        def __init__(self, number: int) -> None:
            self.number = number

        def read(self) -> tuple[bool, np.ndarray | None]:
            frame = np.zeros((4, 6, 3), np.uint8)
            frame[..., 0] = 255  # blue comes first
            return (True, frame) if self.number == 1 else (False, None)

        def release(self) -> None:
            pass

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    assert camera_frame("1").getpixel((0, 0)) == (0, 0, 255)
    facts = predict_module.predict_pictures(checkpoint, ["camera:1"])
    assert [prediction["picture"] for prediction in facts["predictions"]] == ["camera-1"]
    with pytest.raises(UserError, match="camera:0: no such camera, or it gives no picture"):
        camera_frame("")
    with pytest.raises(UserError, match="camera:front: expected a number"):
        camera_frame("front")


def test_wrong_paths_are_one_line_and_exit_with_1(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], save_picture: SavePicture
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    save_picture(tmp_path / "whole.png")
    for arguments, complaint in (
        (
            ["nowhere", "nowhere.png"],
            "nowhere: no such file or folder; expected a folder that finetune or export wrote",
        ),
        ([str(checkpoint), "nowhere.png"], "nowhere.png: no such file or folder; expected pictures"),
        ([str(checkpoint), str(tmp_path / "empty")], "no pictures in there"),
        ([str(checkpoint), str(tmp_path / "text.png")], "none of 1 pictures can be read"),
        ([str(checkpoint)], "no pictures named; expected files, folders of them, or camera:0"),
        ([str(tmp_path), str(tmp_path / "whole.png")], f"no config.json there; there is one in {checkpoint}"),
        ([str(tmp_path / "empty"), str(tmp_path / "whole.png")], "no config.json there; expected a folder"),
        ([str(checkpoint), str(tmp_path / "whole.png"), "--out", str(tmp_path / "whole.png")], "cannot write"),
    ):
        assert cli.main(["predict", *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and complaint in error


@pytest.mark.parametrize(("top5", "drawn"), [(1.0, False), (0.9, True)])
def test_curves_leave_top_5_out_where_it_says_nothing(tmp_path: Path, top5: float, drawn: bool):
    record = {"train_loss": 1.0, "val_loss": 1.2, "top1": 0.5, "top5": top5, "mult_shares": {}}
    save_curves([{"epoch": epoch, **record} for epoch in (1, 2)], "title", tmp_path / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    accuracy = pixels[:, pixels.shape[1] // 2 :]
    assert (accuracy == (0xFF, 0x7F, 0x0E)).all(-1).any() == drawn  # matplotlib's second colour


def test_load_is_the_packages_own_verb(checkpoint: Path, routed: nn.Module):
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(shiftadd3d.load(checkpoint)(images), routed(images))
