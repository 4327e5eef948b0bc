"""A checkpoint of the released GNT code as a nerfstudio run: `shiftadd3d import-gnt`."""

from __future__ import annotations

import copy
import dataclasses
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from nerfstudio.utils.rich_utils import CONSOLE
from torch import nn

from shiftadd3d._claim import claimed
from shiftadd3d._errors import UserError
from shiftadd3d.models.gnt import GNTConfig, GNTModel, load_official_checkpoint
from shiftadd3d.models.gnt.presets import may_change
from shiftadd3d.nerf.datamanager import GNTDataManagerConfig
from shiftadd3d.nerf.dataparsers import AutoDataParserConfig
from shiftadd3d.nerf.model import GNTNerfModel, GNTNerfModelConfig, method_recipe
from shiftadd3d.nerf.pipeline import GNTPipeline
from shiftadd3d.nerf.pretrained import scene_pipeline
from shiftadd3d.nerf.trainer import GNTTrainerConfig
from shiftadd3d.nn import calibrate_, recipe

_BATCHES = 16
"""Views that shifts are calibrated on."""
_RAYS = 32
"""Rays of each: some hundred of them at a few dozen depths, seen in several views, are many inputs of a layer."""
_SAMPLES = 64  # of a ray, as the released configurations have at least
_IMPORTANCE = 64
"""Samples for the fine network, where there is one; without them nothing would run it. The released code's default."""
_BIG_DEPTH = 8
"""Blocks of the paper's network, which the -big methods have."""


def import_gnt(
    methods: tuple[GNTTrainerConfig, GNTTrainerConfig],
    checkpoint: Path,
    data: Path,
    out: Path,
    recipe_name: str = "mult",
) -> Path:
    """Write a run with the weights of an official checkpoint, in the form of ns-train, for the nerfstudio commands.

    The checkpoint decides depth, widths and the number of networks, and the method everything else. `config.yml` is
    written last, so a folder with that file is complete.

    Args:
        methods: the method of the run, first for networks of less than 8 blocks, second for others.
        checkpoint: `model_NNNNNN.pth`, as the released code writes it.
        data: the scene to render, in any format that ns-train reads.
        out: the run's folder, new or empty.
        recipe_name: what the layers become. They are calibrated on the views of the scene, not trained.

    Returns:
        The run's `config.yml`.

    Raises:
        UserError: no such recipe, or the checkpoint, the scene or the folder cannot be used.
    """
    recipe(recipe_name)
    if out.is_file():
        raise UserError(f"--out {out}: a file is in the way; expected a new or empty folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out} holds something; expected a new or empty folder")
    gnt = load_official_checkpoint(checkpoint)
    method = methods[gnt.config.depth >= _BIG_DEPTH]
    with claimed(out, "--out"):
        config = _config_of(method, gnt, data, out, recipe_name)
        pipeline = scene_pipeline(config, cast(AutoDataParserConfig, _manager(config).dataparser))
        _manager(config).num_source_views = pipeline.datamanager.config.num_source_views
        _set_network(pipeline, gnt, _model(config).expert_latencies)
        config_file = _write(config, pipeline, out, _step_of(checkpoint))
    _show(config, method, config_file, checkpoint)
    return config_file


def _manager(config: GNTTrainerConfig) -> GNTDataManagerConfig:
    return cast(GNTDataManagerConfig, config.pipeline.datamanager)


def _model(config: GNTTrainerConfig) -> GNTNerfModelConfig:
    return cast(GNTNerfModelConfig, config.pipeline.model)


def _config_of(method: GNTTrainerConfig, gnt: GNTModel, data: Path, out: Path, recipe_name: str) -> GNTTrainerConfig:
    """A method's configuration with the sizes of a network, on a scene."""
    config = copy.deepcopy(method)
    folder = out.absolute()
    config.output_dir, config.experiment_name, config.timestamp = folder.parent, folder.name, "imported"
    config.data = _manager(config).data = data.absolute()
    cast(AutoDataParserConfig, _manager(config).dataparser).data = data.absolute()
    model = _model(config)
    model.gnt, model.recipe = gnt.config, recipe_name
    model.num_samples = max(model.num_samples, _SAMPLES)  # no plane sweep says where a ray's few samples should lie
    if not gnt.config.single_net:
        model.num_importance = _IMPORTANCE
    return config


def _set_network(pipeline: GNTPipeline, gnt: GNTModel, latencies: tuple[float, float] | None) -> None:
    """Give a pipeline a dense network, and let that become what the recipe says; see `method_recipe`."""
    model = pipeline.model
    gnt = gnt.to(model.device)
    if model.config.recipe != "mult":
        chosen = method_recipe(model.config, latencies)
        report = calibrate_(
            gnt,
            list(_batches(pipeline, gnt)),
            chosen,
            forward=lambda network, batch: _render(model, network, batch),
            filter_fn=may_change,
            verbose=False,
        )
        _say(f"{len(report.layers)} layers of shifts, calibrated on {_BATCHES * _RAYS} rays of the scene's views")
        for what in report.untuned:
            _say(f"needs fine-tuning: {what}")
    model.stage, model.gnt = 2, gnt


@torch.no_grad()
def _batches(pipeline: GNTPipeline, gnt: GNTModel) -> Iterator[dict[str, Any]]:
    """Rays of views, with what the network needs of the views beside them; no recipe changes the feature network."""
    model = pipeline.model
    model.gnt = gnt
    sampler = pipeline.datamanager.train_pixel_sampler
    assert sampler is not None
    sampler.set_num_rays_per_batch(_RAYS)
    for step in range(_BATCHES):
        rays, _ = pipeline.datamanager.next_train(step)
        directions = rays.directions * rays.metadata["directions_norm"]
        sources = model._sources(rays.metadata["source_ids"][0])
        yield {"sources": sources, "origins": rays.origins, "directions": directions}


def _render(model: GNTNerfModel, gnt: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    near, far = model.near_far.tolist()
    config = model.config
    return gnt(
        **batch,
        near=near,
        far=far,
        num_samples=config.num_samples,
        inverse_depth=config.inverse_depth,
        num_importance=config.num_importance,
    )["rgb"]


def _step_of(checkpoint: Path) -> int:
    """The step in an official checkpoint's name, 0 if it has been given another one."""
    named = re.fullmatch(r"model_(\d{1,9})", checkpoint.stem)
    return int(named[1]) if named else 0


def _write(config: GNTTrainerConfig, pipeline: GNTPipeline, out: Path, step: int) -> Path:
    models, config_file = out / config.relative_model_dir, out / "config.yml"
    transforms = out / "dataparser_transforms.json"
    try:
        models.mkdir()
        torch.save({"step": step, "pipeline": pipeline.state_dict()}, models / f"step-{step:09d}.ckpt")
        # The trainer writes it, too: ns-export and others put their results back into the scene's own coordinates.
        pipeline.datamanager.train_dataparser_outputs.save_dataparser_transform(transforms)
        config_file.write_text(yaml.dump(config), encoding="utf-8")
    except BaseException as error:
        shutil.rmtree(models, ignore_errors=True)
        for file in (transforms, config_file):
            file.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch raises an error of its own over what the file said
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(f"cannot write {out}: {reason}; name a writable --out") from None
        raise
    return config_file


def _say(line: str) -> None:
    CONSOLE.print(line, soft_wrap=True, highlight=False, markup=False)


def _show(config: GNTTrainerConfig, method: GNTTrainerConfig, config_file: Path, checkpoint: Path) -> None:
    run, out = str(config_file), config_file.parent
    sizes, name = _model(config).gnt, str(config.method_name)
    networks = "one network" if sizes.single_net else "a coarse and a fine network"
    _say(f"Run:     {out}")
    _say(f"Method:  {name}, recipe {_model(config).recipe}: {networks} of {sizes.depth} blocks, {sizes.width} channels")
    _say("Go on with:")
    train_on = ["ns-train", name, "--data", str(config.data), "--pipeline.warm-start", str(checkpoint)]
    for words, what in (
        (["ns-viewer", "--load-config", run], "look around in the browser"),
        (["ns-eval", "--load-config", run, "--output-path", str(out / "eval.json")], "quality on the test views"),
        (["shiftadd3d", "render", "--load-config", run, "--out", str(out / "video.mp4")], "a video"),
        ([*train_on, *_options(config, method)], "train on"),
    ):
        _say(f"  {shlex.join(words)}  # {what}")


def _options(config: GNTTrainerConfig, method: GNTTrainerConfig) -> Iterator[str]:
    """What ns-train has to be told for a run's network, beyond the method's name."""
    told = (
        ("pipeline.datamanager", _manager(config), _manager(method), ("num_source_views",)),
        ("pipeline.model", _model(config), _model(method), ("recipe", "num_samples", "num_importance")),
        ("pipeline.model.gnt", _model(config).gnt, _model(method).gnt, [f.name for f in dataclasses.fields(GNTConfig)]),
    )
    for prefix, own, default, names in told:
        for name in names:
            value = getattr(own, name)
            if value != getattr(default, name):
                yield f"--{prefix}.{name.replace('_', '-')}"
                yield from map(str, value if isinstance(value, tuple) else (value,))
