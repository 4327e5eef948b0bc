"""How well one network renders the held-out views of many scenes, without training on them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from nerfstudio.utils.rich_utils import CONSOLE

from shiftadd3d._errors import UserError
from shiftadd3d._progress import progress
from shiftadd3d._report import RichReport
from shiftadd3d.nerf.checkpoint import latest_checkpoint, read_checkpoint
from shiftadd3d.nerf.dataparsers import AutoDataParserConfig
from shiftadd3d.nerf.model import image_metrics
from shiftadd3d.nerf.pipeline import GNTPipeline
from shiftadd3d.nerf.pretrained import load_pretrained, scene_pipeline
from shiftadd3d.nerf.runs import read_config
from shiftadd3d.nerf.scene_mixture import list_scenes
from shiftadd3d.nerf.trainer import GNTTrainerConfig
from shiftadd3d.nerf.trivial import average_metrics, nearest_image
from shiftadd3d.nerf.weights import pretrained_file

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class SceneQuality:
    """The quality of one scene's held-out views."""

    scene: str
    views: int
    """Number of rendered views."""
    psnr: float
    """Mean PSNR of the views, in dB."""
    ssim: float
    nearest_psnr: float
    """Mean PSNR of copies of the nearest source view, for comparison."""
    seconds_per_view: float
    """Median seconds for a view."""


@dataclass(frozen=True)
class ScenesReport(RichReport):
    """A table of scenes."""

    network: str
    """Where the weights come from."""
    scenes: tuple[SceneQuality, ...]
    skipped: dict[str, str]
    """Scenes that could not be read, and why."""

    @property
    def mean_psnr(self) -> float:
        """Mean PSNR of scenes, in dB."""
        return statistics.fmean(scene.psnr for scene in self.scenes)

    def __rich__(self) -> RenderableType:
        from rich.table import Table

        table = Table(title=f"{self.network}, {len(self.scenes)} scenes, no training on any of them")
        table.add_column("scene")
        for heading in ("views", "PSNR (dB)", "SSIM", "nearest view (dB)", "s a view"):
            table.add_column(heading, justify="right")
        for row in self.scenes:
            numbers = f"{row.psnr:.2f}", f"{row.ssim:.3f}", f"{row.nearest_psnr:.2f}", f"{row.seconds_per_view:.2f}"
            table.add_row(row.scene, str(row.views), *numbers)
        ssim = statistics.fmean(scene.ssim for scene in self.scenes)
        nearest = statistics.fmean(scene.nearest_psnr for scene in self.scenes)
        table.add_row("mean", "", f"{self.mean_psnr:.2f}", f"{ssim:.3f}", f"{nearest:.2f}", "", style="bold")
        return table


def evaluate_scenes(
    config: GNTTrainerConfig, scenes: Sequence[Path], *, load_config: Path | None = None, max_side: int | None = None
) -> ScenesReport:
    """Render the held-out views of scenes.

    Args:
        config: the method whose weights come with the package. With `load_config`, the configuration of the run is used
            instead.
        scenes: scene folders, folders of scene folders, and list files, as for `--pipeline.datamanager.train-scenes`.
        load_config: the config.yml of a run; None for the weights that come with the package.
        max_side: shrink views to at most this many pixels on the longer side; None leaves them as they are.

    Raises:
        UserError: no scene can be read, or the run cannot be read.
    """
    if max_side is not None and max_side < 1:
        raise UserError(f"--max-side {max_side}: expected 1 or more")
    listed = list_scenes(scenes, "--scenes")
    if not listed:
        raise UserError("--scenes: expected at least one scene")
    state = None
    if load_config is None:
        weights = pretrained_file(str(config.method_name))
        network = f"{config.method_name} as it comes with the package"
    else:
        weights = None
        config = read_config(load_config)
        config.lie_at(load_config)
        checkpoint = latest_checkpoint(config.get_base_dir() / config.relative_model_dir)
        state = read_checkpoint(checkpoint)
        network = f"{config.method_name} of {checkpoint}"
    rows: list[SceneQuality] = []
    skipped: dict[str, str] = {}
    with progress("Scenes", len(listed), unit="scenes", console=CONSOLE) as shown:
        for scene in listed:
            try:
                pipeline = scene_pipeline(config, AutoDataParserConfig(data=scene.path), max_side)
            except UserError as error:
                skipped[str(scene.path)] = str(error)
                CONSOLE.print(f"[yellow]left out: {error}", soft_wrap=True, highlight=False)
                continue
            if weights is not None:
                load_pretrained(pipeline.model, weights)
            elif state is not None:
                near_far = pipeline.model.near_far.clone()
                pipeline.load_pipeline(state["pipeline"], state["step"])
                pipeline.model.near_far.copy_(near_far)  # the run's own are those of its scene
            rows.append(scene_quality(scene.path.name, pipeline))
            shown.advance(status=f"{scene.path.name} {rows[-1].psnr:.2f} dB")
    if not rows:
        raise UserError(f"none of {len(listed)} scenes can be read; {next(iter(skipped.values()))}")
    return ScenesReport(network, tuple(rows), skipped)


@torch.no_grad()
def scene_quality(name: str, pipeline: GNTPipeline) -> SceneQuality:
    """Render all held-out views of the scene that a pipeline has open, in evaluation mode."""
    pipeline.eval()
    views, nearest = [], []
    for camera, batch in pipeline.datamanager.fixed_indices_eval_dataloader:
        began = time.perf_counter()
        outputs = pipeline.model.get_outputs_for_camera(camera)
        seconds = time.perf_counter() - began
        image = batch["image"].to(outputs["rgb"])
        mask = batch.get("mask")
        views.append({**image_metrics(outputs["rgb"], image, mask), "seconds": seconds})
        nearest.append(image_metrics(nearest_image(pipeline.datamanager, camera).to(image), image, mask)["psnr"])
    mean = average_metrics(views)
    return SceneQuality(
        scene=name,
        views=len(views),
        psnr=mean["psnr"],
        ssim=mean["ssim"],
        nearest_psnr=statistics.fmean(nearest),
        seconds_per_view=statistics.median(view["seconds"] for view in views),
    )
