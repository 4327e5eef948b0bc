"""Scenes rendered by the networks that come with the package (`shiftadd3d.nerf.weights`), without any training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import torch

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.checkpoint import list_misfits, misfits
from shiftadd3d.nerf.datamanager import GNTDataManagerConfig
from shiftadd3d.nerf.dataparsers import AutoDataParserConfig
from shiftadd3d.nerf.model import GNTNerfModel, GNTNerfModelConfig
from shiftadd3d.nerf.pipeline import GNTPipeline, GNTPipelineConfig
from shiftadd3d.nerf.trainer import GNTTrainerConfig
from shiftadd3d.nerf.weights import pretrained_file, read_weights


def load_pretrained(model: GNTNerfModel, path: Path) -> None:
    """Load weights as `benchmarks/pretrain.py` writes them; they leave a network for inference, packed or not.

    Raises:
        UserError: unreadable, or of another network.
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
    config: GNTTrainerConfig, data: Path, *, max_side: int | None = None, weights: Path | None = None
) -> GNTPipeline:
    """A scene, ready to be rendered by the network that comes with the package, without any training.

    Args:
        config: of the method, such as `shiftadd3d.configs.methods.shiftadd_gnt_tiny.config`.
        data: the scene's folder, in any format that ns-train reads. All of its views are source views.
        max_side: longest side in pixels that its views are shrunk to; None leaves them as they are.
        weights: instead of those that come with the package.

    Raises:
        UserError: no scene, fewer than three views, or weights that do not fit.
    """
    path = pretrained_file(str(config.method_name)) if weights is None else weights
    pipeline = scene_pipeline(config, AutoDataParserConfig(data=data, eval_mode="all"), max_side)
    load_pretrained(pipeline.model, path)
    pipeline.eval()
    return pipeline


def scene_pipeline(config: GNTTrainerConfig, parser: AutoDataParserConfig, max_side: int | None = None) -> GNTPipeline:
    """A method's pipeline on a scene, for evaluation: near and far are those of the scene, weights are random.

    Args:
        config: of the method, or of a run.
        parser: says where the scene is and which views are held out.
        max_side: longest side in pixels that its views are shrunk to; None leaves them as they are.

    Raises:
        UserError: no scene, or fewer than three views to render from.
    """
    outputs = parser.setup().get_dataparser_outputs(split="train")
    views = len(outputs.image_filenames)
    if views < 3:
        raise UserError(f"{parser.data} has {views} views to render from; expected at least 3")
    settings = cast(GNTPipelineConfig, copy.deepcopy(config.pipeline))
    settings.warm_start = None
    model = cast(GNTNerfModelConfig, settings.model)
    model.expert_latencies = model.expert_latencies or (1.0, 1.0)  # nothing is trained by them
    manager = cast(GNTDataManagerConfig, settings.datamanager)
    manager.data, manager.dataparser, manager.train_scenes = parser.data, parser, ()
    manager.num_source_views = min(manager.num_source_views, views - 1)
    manager.near = manager.far = None
    longest = int(max(outputs.cameras.width.max(), outputs.cameras.height.max()))
    manager.camera_res_scale_factor = 1.0 if max_side is None else min(1.0, max_side / longest)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline: GNTPipeline = settings.setup(device=device, test_mode="test")
    pipeline.model.near_far.copy_(torch.tensor(pipeline.datamanager.near_far))
    pipeline.eval()
    return pipeline
