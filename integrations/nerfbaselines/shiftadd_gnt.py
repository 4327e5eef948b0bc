"""The methods of shiftadd3d as a method of NerfBaselines (https://nerfbaselines.github.io).

A dataset becomes a scene folder of nerfstudio's kind, which shiftadd3d's own parser reads and its own trainer trains
on. A checkpoint is

- `scene/`, that folder: the network renders from source views, so that they are part of the model;
- `model.ckpt`, the trainer's checkpoint;
- `shiftadd_gnt.json`: the method, the settings that were changed, and the colour behind transparent pixels.

Nothing in it is unpickled but tensors and plain containers.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import io
import json
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_type_hints

import numpy as np
import torch
import tyro
from nerfbaselines import Method, camera_model_from_int
from nerfstudio.cameras.cameras import Cameras as NerfstudioCameras
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from nerfstudio.plugins.types import MethodSpecification
from PIL import Image

from shiftadd3d._errors import UserError
from shiftadd3d.configs import methods
from shiftadd3d.nerf.checkpoint import read_checkpoint
from shiftadd3d.nerf.dataparsers import AutoDataParser, AutoDataParserConfig
from shiftadd3d.nerf.dataparsers.scene import Scene
from shiftadd3d.nerf.dataparsers.transforms import read_json
from shiftadd3d.nerf.near_far import near_far_from_bounds
from shiftadd3d.nerf.pipeline import GNTPipeline, GNTPipelineConfig
from shiftadd3d.nerf.trainer import GNTTrainer, GNTTrainerConfig

if TYPE_CHECKING:
    from nerfbaselines import Cameras, Dataset, MethodInfo, ModelInfo, RenderOutput

METHODS: dict[str, GNTTrainerConfig] = {
    str(found.config.method_name): cast(GNTTrainerConfig, found.config)
    for found in vars(methods).values()
    if isinstance(found, MethodSpecification)
}
"""What the setting `method` may be."""

_DEFAULT_METHOD = "shiftadd-gnt"
_FORMAT = "shiftadd3d checkpoint for NerfBaselines, version 1"
_DESCRIPTION, _WEIGHTS, _SCENE, _CAMERAS, _POINTS = (
    *("shiftadd_gnt.json", "model.ckpt", "scene"),
    *("transforms.json", "points.npy"),
)
_OPENCV_TO_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
_MODELS = {
    "pinhole": ("PINHOLE", CameraType.PERSPECTIVE, ()),
    "opencv": ("OPENCV", CameraType.PERSPECTIVE, ("k1", "k2", "p1", "p2", "k3", "k4")),
    "opencv_fisheye": ("OPENCV_FISHEYE", CameraType.FISHEYE, ("k1", "k2", "", "", "k3", "k4")),
}
"""NerfBaselines' camera models: nerfstudio's name and type, and what the distortion parameters are, in order."""
_GIVEN = (
    *("data", "output_dir", "experiment_name", "timestamp", "vis", "load_dir", "load_checkpoint", "load_step"),
    *("pipeline.datamanager.data", "pipeline.datamanager.dataparser"),
)
"""Settings that follow from the dataset and the checkpoint."""


# --------------------------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------------------------


def configured(overrides: Mapping[str, Any]) -> GNTTrainerConfig:
    """A method's configuration with some settings changed.

    Args:
        overrides: values by dotted name, such as `pipeline.model.num_samples`, as Python or as a command line has them;
            `method` chooses one of `METHODS`.

    Raises:
        UserError: no such method or setting, one that is not for the user to set, or a value that is none of its type.
    """
    changes = dict(overrides)
    method = changes.pop("method", _DEFAULT_METHOD)
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(f"method is {method!r}; expected one of: {', '.join(METHODS)}")
    config = copy.deepcopy(METHODS[method])
    for name, value in changes.items():
        if any(name == given or name.startswith(f"{given}.") for given in _GIVEN):
            raise UserError(f"{name} follows from the dataset and the checkpoint; expected it not to be set")
        config = _with_setting(config, name.split("."), value, name)
    return config


def _with_setting(holder: Any, path: Sequence[str], value: Any, name: str) -> Any:
    """A copy of a dataclass, or of a dictionary of such, with one setting changed, however deep in there."""
    first, rest = path[0], path[1:]
    known: dict[str, Any] = {}
    if isinstance(holder, Mapping) and rest:
        known = dict(holder)
    elif dataclasses.is_dataclass(holder):
        known = {each.name: getattr(holder, each.name) for each in dataclasses.fields(holder) if each.name[0] != "_"}
    if first not in known:
        before = ".".join(name.split(".")[: -len(path)])
        nearest = difflib.get_close_matches(first, known, n=1, cutoff=0.0)
        expected = f"expected {'.'.join(filter(None, [before, *nearest]))}" if nearest else f"{before} has none in it"
        raise UserError(f"there is no setting {name}: {expected}")
    if rest:
        known[first] = _with_setting(known[first], rest, value, name)
    else:
        known[first] = _parsed(get_type_hints(type(holder))[first], value, name)
    if isinstance(holder, Mapping):
        return known
    return dataclasses.replace(holder, **{first: known[first]})


def _parsed(kind: Any, value: Any, name: str) -> Any:
    """A value as a setting's type has it, read as ns-train reads its command line."""
    words = [str(word) for word in value] if isinstance(value, (list, tuple)) else [str(value)]
    if "tuple" in str(kind).lower() and isinstance(value, str):
        words = value.replace(",", " ").split()
    if kind is bool:
        words = [word.capitalize() for word in words]
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return tyro.cli(kind, args=words)
    except SystemExit:
        expected = kind.__name__ if isinstance(kind, type) else str(kind)
        raise UserError(f"{name} is {value!r}; expected {expected}") from None


def _hyperparameters(config: Any, prefix: str = "") -> dict[str, Any]:
    """The settings that say how a network is built and trained, by dotted name."""
    found: dict[str, Any] = {}
    items = config if isinstance(config, Mapping) else vars(config)
    for key, value in items.items():
        name = f"{prefix}{key}"
        if key.startswith("_") or name in _GIVEN or name.split(".")[0] in ("viewer", "logging", "machine"):
            continue
        if dataclasses.is_dataclass(value) or isinstance(value, Mapping):
            found |= _hyperparameters(value, f"{name}.")
        elif value is None or isinstance(value, (bool, int, float, str)):
            found[name] = value
        elif isinstance(value, (list, tuple, Path)):  # functions and tensors are no settings
            found[name] = str(value)
    return found


# --------------------------------------------------------------------------------------------------------------------
# Datasets
# --------------------------------------------------------------------------------------------------------------------


class SceneWithPointsParser(AutoDataParser):
    """Reads a scene folder with the sparse points that `write_scene` puts there."""

    def _read(self) -> Scene:
        scene = super()._read()
        points = self.config.data / _POINTS
        if points.is_file():
            scene.points = {"points3D_xyz": np.load(points, allow_pickle=False)}
        return scene


@dataclass
class SceneWithPointsParserConfig(AutoDataParserConfig):
    """All views of the folder, as source views and as targets: NerfBaselines holds back the others itself."""

    _target: type = field(default_factory=lambda: SceneWithPointsParser)
    """target class to instantiate"""


def describe(dataset: Dataset) -> dict[str, Any]:
    """What `transforms.json` says of a dataset: cameras in OpenGL axes, files of pictures and masks, near and far.

    Raises:
        UserError: colours that are not sRGB, or a camera model of another kind.
    """
    space = dataset["metadata"].get("color_space") or "srgb"
    if space != "srgb":
        raise UserError(f"the dataset's color_space is {space}; expected srgb, of which 8-bit pictures are")
    cameras, frames = dataset["cameras"], []
    for index in range(len(cameras)):
        camera = cameras[index]
        frame: dict[str, Any] = {"file_path": f"images/{index:05d}.png"}
        if dataset.get("masks") is not None:
            frame["mask_path"] = f"masks/{index:05d}.png"
        frame["transform_matrix"] = _opengl_pose(camera).tolist()
        for name, value in zip(("fl_x", "fl_y", "cx", "cy"), camera.intrinsics.tolist(), strict=True):
            frame[name] = value
        frame["w"], frame["h"] = (int(side) for side in camera.image_sizes)
        frame["camera_model"] = _model(camera)[0]
        frame |= _distortion(camera)
        frames.append(frame)
    scene: dict[str, Any] = {}
    if cameras.nears_fars is not None:
        scene["shiftadd3d"] = dict(zip(("near", "far"), _near_far(cameras.nears_fars), strict=True))
    return {**scene, "frames": frames}


def _opengl_pose(camera: Cameras) -> np.ndarray:
    """[4, 4] float64, camera to world: x right, y up, z back."""
    pose = np.eye(4)
    pose[:3] = camera.poses[:3]
    return pose @ _OPENCV_TO_OPENGL


def _model(camera: Cameras) -> tuple[str, CameraType, tuple[str, ...]]:
    name = camera_model_from_int(int(camera.camera_models))
    if name not in _MODELS:
        raise UserError(f"a camera's model is {name}; expected one of: {', '.join(_MODELS)}")
    return _MODELS[name]


def _distortion(camera: Cameras) -> dict[str, float]:
    """By nerfstudio's names; those that are not stated are zero."""
    names = _model(camera)[2]
    return {name: float(value) for name, value in zip(names, camera.distortion_parameters, strict=False) if name}


def _near_far(bounds: np.ndarray) -> tuple[float, float]:
    """Of all views, from each one's nearest and farthest depth [n, 2].

    As they are where they are one for all, else with the margins that LLFF's bounds get.
    """
    if (bounds == bounds[0]).all():
        return float(bounds[0, 0]), float(bounds[0, 1])
    return near_far_from_bounds(torch.from_numpy(np.asarray(bounds)))


def write_scene(dataset: Dataset, folder: Path) -> None:
    """Write a dataset as a scene folder: `transforms.json`, pictures, masks and sparse points, where there are any.

    Raises:
        UserError: see `describe`; also a dataset whose pictures have not been read.
    """
    description = describe(dataset)
    if dataset.get("images") is None:
        raise UserError("the dataset has no pictures; expected one that was read with load_features=True")
    for name, arrays in (("images", dataset["images"]), ("masks", dataset.get("masks"))):
        if arrays is not None:
            (folder / name).mkdir(parents=True)
            for index, (array, frame) in enumerate(zip(arrays, description["frames"], strict=True)):
                # Pictures of several sizes may come in one array, padded.
                pixels = _to_bytes(np.asarray(array)[: frame["h"], : frame["w"]])
                Image.fromarray(pixels).save(folder / name / f"{index:05d}.png")
    points = dataset.get("points3D_xyz")
    if points is not None and len(points):
        np.save(folder / _POINTS, np.asarray(points, dtype=np.float64))
    (folder / _CAMERAS).write_text(json.dumps(description, indent=1), encoding="utf-8")


def _to_bytes(array: np.ndarray) -> np.ndarray:
    """uint8, from 0..255, from floats in 0..1, or from a mask's True and False."""
    if array.dtype == np.uint8:
        return array
    return (array.astype(np.float64) * 255.0).round().clip(0, 255).astype(np.uint8)


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------------------------


class Description(NamedTuple):
    """What `shiftadd_gnt.json` says."""

    overrides: dict[str, Any]
    """See `configured`."""
    background: list[float]
    """RGB in 0..1 behind transparent pixels."""


def read_description(checkpoint: Path) -> Description:
    """Of a checkpoint's folder.

    Raises:
        UserError: no folder, no checkpoint of this method, or one that was not written to the end.
    """
    expected = f"expected a folder that this method saved: {_DESCRIPTION}, {_WEIGHTS} and {_SCENE}"
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such folder; {expected}")
    missing = [name for name in (_DESCRIPTION, _WEIGHTS, f"{_SCENE}/{_CAMERAS}") if not (checkpoint / name).is_file()]
    if missing:
        raise UserError(f"{checkpoint}: {', '.join(missing)} missing; {expected}")
    facts = read_json(checkpoint / _DESCRIPTION)
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        raise UserError(f"{checkpoint / _DESCRIPTION}: of another method or version; {expected}")
    overrides, background = facts.get("config_overrides"), facts.get("background")
    numbers = isinstance(background, list) and all(isinstance(value, (int, float)) for value in background)
    if not isinstance(overrides, dict) or not numbers or len(background) != 3:
        raise UserError(f"{checkpoint / _DESCRIPTION}: damaged; {expected}")
    return Description(overrides, [float(value) for value in background])


def _background(dataset: Dataset) -> list[float]:
    """What NerfBaselines blends transparent pixels of a dataset with."""
    colour = dataset["metadata"].get("background_color")
    return [0.0, 0.0, 0.0] if colour is None else (np.asarray(colour) / 255.0).tolist()


# --------------------------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------------------------


class ShiftAddGNT(Method):
    """GNT, dense or of shifts and adds, in NerfBaselines; see its `Method`.

    Args:
        checkpoint: a folder that `save` wrote. Alone, it is opened to render, not to train on.
        train_dataset: the views to train on. With a checkpoint, training goes on with the views in there: the dataset
            has to be the one that it was trained on.
        config_overrides: see `configured`; on top of those that the checkpoint was trained with.

    Raises:
        UserError: neither of the two; a broken checkpoint, or one of something else; another dataset; settings and data
            that shiftadd3d refuses.
    """

    def __init__(
        self,
        *,
        checkpoint: str | None = None,
        train_dataset: Dataset | None = None,
        config_overrides: dict[str, Any] | None = None,
    ) -> None:
        if checkpoint is None and train_dataset is None:
            raise UserError("expected a checkpoint, a train_dataset, or both")
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        found = Description({}, [0.0, 0.0, 0.0]) if self._checkpoint is None else read_description(self._checkpoint)
        background = _background(train_dataset) if self._checkpoint is None and train_dataset else found.background
        self._description = Description({**found.overrides, **(config_overrides or {})}, background)
        self._config = configured(self._description.overrides)
        self._num_iterations = self._config.max_num_iterations
        self._temporary = tempfile.TemporaryDirectory(prefix="shiftadd-gnt-")
        folder = Path(self._temporary.name)
        self._scene = folder / _SCENE
        self._weights: Path | None = None
        self._step, self._loaded_step = 0, cast("int | None", None)
        try:
            if self._checkpoint is None:
                write_scene(cast("Dataset", train_dataset), self._scene)
            else:
                self._open(self._checkpoint, train_dataset)
            self._fit_config(folder)
            self._trainer = None if train_dataset is None else self._set_up_trainer()
            self._pipeline = self._load_pipeline() if self._trainer is None else self._trainer.pipeline
        except UserError as error:
            self._temporary.cleanup()
            shown = "the dataset" if self._checkpoint is None else str(self._checkpoint / _SCENE)
            raise UserError(str(error).replace(str(self._scene), shown)) from None
        except BaseException:
            self._temporary.cleanup()
            raise

    def _open(self, checkpoint: Path, train_dataset: Dataset | None) -> None:
        """Copy a checkpoint, which may be gone, or overwritten, before this method is."""
        cameras = read_json(checkpoint / _SCENE / _CAMERAS)
        if train_dataset is not None and cameras != describe(train_dataset):
            raise UserError(
                f"{checkpoint} was trained on another dataset ({len(cameras['frames'])} views; this one has "
                f"{len(train_dataset['cameras'])}); expected the same views, cameras, near and far to go on with"
            )
        self._step = self._loaded_step = read_checkpoint(checkpoint / _WEIGHTS)["step"] + 1
        shutil.copytree(checkpoint / _SCENE, self._scene)
        self._weights = Path(shutil.copy(checkpoint / _WEIGHTS, self._temporary.name))

    def _fit_config(self, folder: Path) -> None:
        """Say where the scene lies, and where the trainer may write."""
        config = self._config
        config.output_dir, config.experiment_name, config.timestamp = folder, "run", "now"
        config.vis = cast(Any, None)  # NerfBaselines shows and evaluates
        datamanager = cast(GNTPipelineConfig, config.pipeline).datamanager
        datamanager.data = self._scene
        datamanager.dataparser = SceneWithPointsParserConfig(
            data=self._scene, eval_mode="all", alpha_color=cast(Any, self._description.background)
        )
        views = len(read_json(self._scene / _CAMERAS)["frames"])
        if views < 3:
            raise UserError(f"the dataset has {views} views to train on; expected at least 3")
        datamanager.num_source_views = min(datamanager.num_source_views, views - 1)

    def _set_up_trainer(self) -> GNTTrainer:
        config = self._config
        config.load_checkpoint = self._weights
        random.seed(config.machine.seed)
        np.random.seed(config.machine.seed)
        torch.manual_seed(config.machine.seed)
        trainer: GNTTrainer = config.setup(local_rank=0, world_size=1)
        trainer.setup()
        return trainer

    def _load_pipeline(self) -> GNTPipeline:
        """The pipeline with a checkpoint's weights, frozen."""
        assert self._weights is not None
        config = cast(GNTPipelineConfig, self._config.pipeline)
        config.model.expert_latencies = config.model.expert_latencies or (1.0, 1.0)  # nothing is trained by them
        pipeline: GNTPipeline = config.setup(device=self._config.machine.device_type, test_mode="test")
        pipeline.eval()
        state = read_checkpoint(self._weights)
        pipeline.load_pipeline(state["pipeline"], state["step"])
        return pipeline

    @classmethod
    def get_method_info(cls) -> MethodInfo:
        return {
            "method_id": "",  # NerfBaselines fills it in
            "required_features": frozenset(("color", "points3D_xyz")),  # points, where there are any, tell near and far
            "supported_camera_models": frozenset(_MODELS),
            "supported_outputs": ("color", "depth", "accumulation"),
            "can_resume_training": True,
            "viewer_default_resolution": 128,
        }

    def get_info(self) -> ModelInfo:
        pipeline = cast(GNTPipelineConfig, self._config.pipeline)
        return {
            **self.get_method_info(),
            "num_iterations": self._num_iterations,
            "loaded_step": self._loaded_step,
            "loaded_checkpoint": None if self._checkpoint is None else str(self._checkpoint),
            "batch_size": pipeline.datamanager.train_num_rays_per_batch,
            "eval_batch_size": pipeline.model.eval_num_rays_per_chunk,
            "hparams": _hyperparameters(self._config),
        }

    def train_iteration(self, step: int) -> dict[str, float]:
        trainer = self._trainer
        if trainer is None:
            raise UserError("opened without a train_dataset, thus to render; expected one to go on training")
        self._weights = None
        trainer.step = step
        trainer.pipeline.train()
        for callback in trainer.callbacks:
            callback.run_callback_at_location(step, location=TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
        loss, losses, metrics = trainer.train_iteration(step)
        for callback in trainer.callbacks:
            callback.run_callback_at_location(step, location=TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
        self._step = step + 1
        rays = self._config.pipeline.datamanager.train_num_rays_per_batch
        told = {**metrics, **losses, "loss": loss, "num_rays": rays}
        return {name: float(torch.as_tensor(value).detach()) for name, value in told.items()}

    @torch.no_grad()
    def render(self, camera: Cameras, *, options: Any = None) -> RenderOutput:
        """Render a camera from the source views nearest to it; one that stands where the camera does is left out.

        Returns:
            `color` [h, w, 3], `depth` [h, w], along the ray, in the dataset's units, `accumulation` [h, w]: how much of
            the ray some source view has seen; all float32.
        """
        del options
        model = self._pipeline.model
        outputs = self._pipeline.datamanager.train_dataparser_outputs
        with self._weights_to_keep():
            if model.training:
                self._pipeline.eval()
            found = model.get_outputs_for_camera(self._nerfstudio_camera(camera.item()).to(model.device))
        shown = {
            "color": found["rgb"],
            "depth": found["depth"][..., 0] / outputs.dataparser_scale,
            "accumulation": found["accumulation"][..., 0],
        }
        return {name: value.float().cpu().numpy() for name, value in shown.items()}

    @contextlib.contextmanager
    def _weights_to_keep(self) -> Iterator[None]:
        """While this lasts, the network has the weights that `save` writes."""
        if self._trainer is None:
            yield
        else:
            with self._trainer.kept_weights(self._step):
                yield

    def _nerfstudio_camera(self, camera: Cameras) -> NerfstudioCameras:
        """[1], where the dataset's cameras went when they were centred and scaled."""
        outputs = self._pipeline.datamanager.train_dataparser_outputs
        transform = np.eye(4)
        transform[:3] = outputs.dataparser_transform.double().numpy()
        pose = transform @ _opengl_pose(camera)
        pose[:3, 3] *= outputs.dataparser_scale
        _, kind, _ = _model(camera)
        lens = {"k1": 0.0, "k2": 0.0, "k3": 0.0, "k4": 0.0, "p1": 0.0, "p2": 0.0, **_distortion(camera)}
        fx, fy, cx, cy = (torch.tensor([value], dtype=torch.float32) for value in camera.intrinsics.tolist())
        width, height = (torch.tensor([int(side)]) for side in camera.image_sizes)
        return NerfstudioCameras(
            camera_to_worlds=torch.from_numpy(pose[None, :3]).float(),
            **{"fx": fx, "fy": fy, "cx": cx, "cy": cy, "width": width, "height": height},
            distortion_params=torch.tensor([list(lens.values())], dtype=torch.float32),
            camera_type=torch.tensor([kind.value]),
        )

    def save(self, path: str) -> None:
        """Write a checkpoint. One that has not been trained on is written as it was read, byte for byte.

        Raises:
            UserError: it cannot be written. What is unfinished then is no checkpoint.
        """
        folder = Path(path)
        if self._weights is None:
            assert self._trainer is not None
            self._trainer.save_checkpoint(self._step - 1)
            self._weights = self._trainer.checkpoint_dir / f"step-{self._step - 1:09d}.ckpt"
        description = {
            "format": _FORMAT,
            "background": self._description.background,
            "config_overrides": self._description.overrides,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _DESCRIPTION).unlink(missing_ok=True)  # it comes last: without it, this is no checkpoint
            if (folder / _SCENE).exists():
                shutil.rmtree(folder / _SCENE)
            shutil.copytree(self._scene, folder / _SCENE)
            shutil.copyfile(self._weights, folder / _WEIGHTS)
            text = json.dumps(description, indent=2, sort_keys=True, default=str)
            (folder / _DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{folder}: the checkpoint cannot be written: {error.strerror or error}") from None

    def close(self) -> None:
        """Remove what was written for this process alone."""
        self._temporary.cleanup()
