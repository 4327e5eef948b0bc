"""Render scenes with the networks that come with the package (`shiftadd3d.nerf.weights`), without any training.

nerfstudio's pipeline and trainer are not imported here, because importing them takes longer than opening a scene.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from nerfstudio.data.datasets.base_dataset import InputDataset

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.checkpoint import list_misfits, misfits
from shiftadd3d.nerf.dataparsers import AutoDataParserConfig
from shiftadd3d.nerf.model import GNTNerfModel, GNTNerfModelConfig
from shiftadd3d.nerf.scene_views import all_photos, near_and_far, say_whether_cut_out, scale_to
from shiftadd3d.nerf.source_bank import SourceBank
from shiftadd3d.nerf.weights import pretrained_file, read_weights

if TYPE_CHECKING:
    from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs

    from shiftadd3d.nerf.datamanager import GNTDataManagerConfig
    from shiftadd3d.nerf.pipeline import GNTPipeline, GNTPipelineConfig
    from shiftadd3d.nerf.trainer import GNTTrainerConfig


@dataclass(frozen=True)
class PretrainedMethod:
    """A method whose weights come with the package, with the settings that rendering needs."""

    name: str
    """Name of the method, such as `shiftadd-gnt-tiny`."""
    model: GNTNerfModelConfig
    """Settings of its model."""
    num_source_views: int
    """Number of source views of a frame."""
    training: Callable[[], GNTTrainerConfig]
    """Settings to train it with, which take seconds to import."""


@dataclass(frozen=True)
class OpenScene:
    """A scene that is ready to be rendered."""

    views: InputDataset
    """All photos of the scene."""
    scale: float
    """Size of the views, as a multiple of the size of the files."""
    bank: SourceBank
    """The views, undistorted."""
    model: GNTNerfModel
    """In evaluation mode, with its weights, the source views and the scene's range of depths."""


def load_pretrained(model: GNTNerfModel, path: Path) -> None:
    """Load weights that `benchmarks/pretrain.py` wrote. The network is for inference afterwards, packed or not.

    Raises:
        UserError: they cannot be read, or are of another network.
    """
    tensors, facts = read_weights(path)
    if facts.get("packed") == "true":
        model.pack()
    own = model.gnt.state_dict()
    tensors = {name: value.to(own[name].dtype) if name in own else value for name, value in tensors.items()}
    missing, strange = misfits(tensors, own)
    if missing or strange:
        raise UserError(
            f"{path} holds another network than this method's ({list_misfits(missing, strange)}); expected weights of "
            f"{facts.get('method', 'the same method')} and the same version"
        )
    model.gnt.load_state_dict(tensors)
    if facts.get("packed") != "true":
        model.freeze()


def open_scene(
    method: PretrainedMethod, data: Path, *, max_side: int | None = None, weights: Path | None = None
) -> OpenScene:
    """Open a scene for rendering by the network that comes with the package, without any training.

    Args:
        method: a method such as `shiftadd3d.configs.pretrained.shiftadd_gnt_tiny`.
        data: the scene's folder, in any format that ns-train reads. All of its views are source views.
        max_side: shrink views to at most this many pixels on the longer side; None leaves them as they are.
        weights: a file with other weights than those of the package.

    Raises:
        UserError: no scene, fewer than three views, or weights that do not fit.
    """
    path = pretrained_file(method.name) if weights is None else weights
    outputs = _views(AutoDataParserConfig(data=data, eval_mode="all"))
    scale = scale_to(outputs, max_side)
    views = all_photos(outputs, scale, say_whether_cut_out(outputs.image_filenames))
    bank = SourceBank.from_dataset(views)
    model: GNTNerfModel = _for_evaluation(method.model).setup(scene_box=views.scene_box, num_train_data=len(views))
    load_pretrained(model, path)
    model.set_sources(bank, min(method.num_source_views, len(bank) - 1))
    model.near_far.copy_(torch.tensor(near_and_far(views, bank)))
    return OpenScene(views, scale, bank, model.to(_device()).eval())


def scene_pipeline(config: GNTTrainerConfig, parser: AutoDataParserConfig, max_side: int | None = None) -> GNTPipeline:
    """A method's pipeline on a scene, for evaluation, with random weights. Near and far are those of the scene.

    Args:
        config: configuration of the method, or of a run.
        parser: gives the place of the scene and its held-out views.
        max_side: shrink views to at most this many pixels on the longer side; None leaves them as they are.

    Raises:
        UserError: no scene, or fewer than three views to render from.
    """
    outputs = _views(parser)
    settings = cast("GNTPipelineConfig", copy.deepcopy(config.pipeline))
    settings.warm_start = None
    settings.model = _for_evaluation(cast(GNTNerfModelConfig, settings.model))
    manager = cast("GNTDataManagerConfig", settings.datamanager)
    manager.data, manager.dataparser, manager.train_scenes = parser.data, parser, ()
    manager.num_source_views = min(manager.num_source_views, len(outputs.image_filenames) - 1)
    manager.near = manager.far = None
    manager.camera_res_scale_factor = scale_to(outputs, max_side)
    pipeline: GNTPipeline = settings.setup(device=_device(), test_mode="test")
    pipeline.model.near_far.copy_(torch.tensor(pipeline.datamanager.near_far))
    pipeline.eval()
    return pipeline


def _views(parser: AutoDataParserConfig) -> DataparserOutputs:
    outputs = parser.setup().get_dataparser_outputs(split="train")
    views = len(outputs.image_filenames)
    if views < 3:
        raise UserError(f"{parser.data} has {views} views to render from; expected at least 3")
    return outputs


def _for_evaluation(model: GNTNerfModelConfig) -> GNTNerfModelConfig:
    model = copy.deepcopy(model)
    model.expert_latencies = model.expert_latencies or (1.0, 1.0)  # nothing is trained by them
    return model


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
