"""The predictions of a saved classifier for pictures: labels, JSON, and the routing of patches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from shiftadd3d._errors import UserError
from shiftadd3d.nn.routing import RoutingMap, keep_routing, routing_maps
from shiftadd3d.vision.checkpoint import ClassifierConfig
from shiftadd3d.vision.compiled import compiled_where_it_can_be
from shiftadd3d.vision.data import Skipped, decode_picture, eval_transform, skipped_files, to_rgb
from shiftadd3d.vision.deploy import DeployedClassifier, device_for, open_classifier
from shiftadd3d.vision.files import describe_unread, find_files, usual_suffixes
from shiftadd3d.vision.pictures import save_labelled, save_routing

_TOP = 5


class Prediction(NamedTuple):
    """The likeliest classes of a picture with probabilities, best first; the input of the model; its routing maps."""

    name: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    seen: np.ndarray
    """[size, size, 3] uint8: the part of the picture that evaluation uses."""
    routing: tuple[RoutingMap, ...]

    def as_dict(self) -> dict[str, Any]:
        """The prediction in plain types, for JSON."""
        return {
            "picture": self.name,
            "label": self.labels[0],
            "probability": self.probabilities[0],
            "top": [
                {"label": label, "probability": probability}
                for label, probability in zip(self.labels, self.probabilities, strict=True)
            ],
            "routing": [
                {
                    "layer": layer.layer,
                    "experts": list(layer.experts),
                    "shares": [layer.share(expert) for expert in range(len(layer.experts))],
                    "patches": layer.assignment.tolist(),
                }
                for layer in self.routing
            ],
        }


@torch.no_grad()
def predict(model: nn.Module, image: Image.Image, name: str = "", routing: bool = False) -> Prediction:
    """Classify one picture.

    Args:
        model: a classifier from `load`, in evaluation mode.
        image: a picture of any kind.
        name: its name in reports.
        routing: also read the routing maps.
    """
    config = model.classifier_config
    assert isinstance(config, ClassifierConfig)
    if routing:
        keep_routing(model)
    tensor = eval_transform(config.input)(to_rgb(image))
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    probabilities = model(tensor.unsqueeze(0).to(device)).float().softmax(-1)[0].cpu()
    best = probabilities.topk(min(_TOP, len(config.classes)))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.input.mean, config.input.std))
    seen = ((tensor * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Prediction(
        name,
        tuple(config.classes[i] for i in best.indices.tolist()),
        tuple(best.values.tolist()),
        seen,
        routing_maps(model) if routing else (),
    )


def predict_pictures(
    checkpoint: Path,
    pictures: Sequence[str],
    *,
    out: Path | None = None,
    show_routing: bool = False,
    device: str | None = None,
    compile: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Classify picture files, folders of them, or a frame of a camera. The arguments are those of `shiftadd3d predict`.

    Returns:
        `predictions` and `skipped` pictures, in plain types.

    Raises:
        UserError: no picture can be read, a picture would be overwritten, or another argument is wrong.
    """
    model = open_classifier(checkpoint, device_for(checkpoint, device))
    # Everything is found before anything is written: pictures may lie where results go.
    inputs, skipped = _find_pictures(pictures)
    outputs = [None] * len(inputs) if out is None else _name_outputs(inputs, out)
    if isinstance(model, DeployedClassifier) and show_routing:
        raise UserError(f"--show-routing: {checkpoint} is an executable; expected the classifier that it was made of")
    if compile and not show_routing:
        model = compiled_where_it_can_be(model, console)
    predictions: list[dict[str, Any]] = []
    for source, output in zip(inputs, outputs, strict=True):
        if isinstance(source, Path):
            name = str(source)
            try:
                image = decode_picture(source)
            except UserError as error:
                skipped.append(Skipped(name, str(error)))
                continue
        else:
            name, image = source.replace(":", "-"), camera_frame(source.partition(":")[2])
        prediction = predict(model, image, name, routing=show_routing)
        facts = prediction.as_dict()
        if output is not None:
            save_labelled(image, prediction.labels, prediction.probabilities, output.labelled)
            facts["labelled"] = str(output.labelled)
            if prediction.routing:
                title = f"{prediction.labels[0]} ({prediction.probabilities[0]:.0%})"
                save_routing(prediction.seen, prediction.routing, title, output.routing)
                facts["routing_picture"] = str(output.routing)
        predictions.append(facts)
        if console is not None:
            console.print(
                f"{name}: "
                + ", ".join(
                    f"{label} {probability:.1%}"
                    for label, probability in zip(prediction.labels[:3], prediction.probabilities[:3], strict=True)
                ),
                highlight=False,
                soft_wrap=True,
            )
    if console is not None:
        for entry in skipped:
            console.print(f"skipped {entry}", highlight=False, markup=False, soft_wrap=True)
        if out is not None and predictions:
            console.print(f"pictures in {out}", highlight=False, soft_wrap=True)
        if show_routing and predictions and not any(facts["routing"] for facts in predictions):
            console.print("no routing to show: this classifier has no mixtures of experts")
    if not predictions:
        first = f" ({skipped[-1]})" if skipped else ""
        raise UserError(f"none of {len(inputs)} pictures can be read{first}")
    listed = [{"name": entry.name, "reason": entry.reason} for entry in skipped]
    return {"checkpoint": str(checkpoint), "predictions": predictions, "skipped": listed}


def _find_pictures(words: Sequence[str]) -> tuple[list[Path | str], list[Skipped]]:
    """Files by their paths, and cameras by their words; and what in folders is no picture."""
    found: list[Path | str] = []
    others: list[str] = []
    for word in words:
        path = Path(word)
        if word == "camera" or word.startswith("camera:"):
            found.append(word)
        elif path.is_dir():
            try:
                files = find_files(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
            if not files.pictures:
                there = f"; found {describe_unread(files.others)}" if files.others else ""
                raise UserError(f"{path}: no pictures in there; expected files of {usual_suffixes()}{there}")
            found += [path / name for name in files.pictures]
            others += files.others
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder; expected pictures, folders of them, or camera:0")
    return found, skipped_files(others)


class _Output(NamedTuple):
    labelled: Path
    routing: Path


def _name_outputs(inputs: Sequence[Path | str], out: Path) -> list[_Output]:
    """What is written about each input: files of different names.

    Raises:
        UserError: one of them is an input.
    """
    outputs: list[_Output] = []
    taken: set[str] = set()  # without capitals, which some file systems take no notice of
    for source in inputs:
        stem = name = source.stem if isinstance(source, Path) else source.replace(":", "-")
        number = 2
        while name.casefold() in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name.casefold())
        outputs.append(_Output(out / f"{name}.label.png", out / f"{name}.routing.png"))
    pictures = {source.resolve() for source in inputs if isinstance(source, Path)}
    for file in (file for output in outputs for file in output):
        if file.resolve() in pictures:
            raise UserError(f"--out {out}: would write over {file}, one of the pictures; expected another folder")
    return outputs


def camera_frame(number: str) -> Image.Image:
    """One frame of a camera.

    Args:
        number: which camera, as digits; "" for the first.

    Raises:
        UserError: no such camera, no frame, or OpenCV is not installed.
    """
    if number and not number.isdecimal():
        raise UserError(f"camera:{number}: expected a number, as in camera:0")
    try:
        import cv2
    except ImportError:
        raise UserError("a camera needs OpenCV: pip install opencv-python-headless") from None
    cv2.setLogLevel(0)  # it would print what the error below says
    capture: Any = cv2.VideoCapture(int(number or "0"))
    try:
        there, frame = capture.read()
    finally:
        capture.release()
    if not there:
        raise UserError(f"camera:{number or 0}: no such camera, or it gives no picture")
    return Image.fromarray(np.ascontiguousarray(frame[..., ::-1]))  # OpenCV's colours are blue, green, red
