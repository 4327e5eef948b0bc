"""The demo: everything from an untrained network to a video.

It renders the test views of the embedded scene with the weights that come with the package, trains, renders them again,
compares the result with trivial renderers, and makes a video.
"""

from __future__ import annotations

import copy
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import UInt8
from nerfstudio.scripts.train import train_loop
from nerfstudio.utils.rich_utils import CONSOLE
from rich.table import Table

from shiftadd3d._claim import claimed
from shiftadd3d._errors import UserError
from shiftadd3d._progress import progress
from shiftadd3d._report import write_json
from shiftadd3d.nerf.datamanager import GNTDataManagerConfig
from shiftadd3d.nerf.dataparsers import AutoDataParserConfig
from shiftadd3d.nerf.model import GNTNerfModelConfig, image_metrics
from shiftadd3d.nerf.pictures import grid, save_picture
from shiftadd3d.nerf.pipeline import GNTPipeline
from shiftadd3d.nerf.pretrained import load_pretrained, scene_pipeline
from shiftadd3d.nerf.render import make_path, picture, to_bytes, write_path
from shiftadd3d.nerf.runs import Run, load_run
from shiftadd3d.nerf.trainer import GNTTrainer, GNTTrainerConfig
from shiftadd3d.nerf.trivial import average_metrics, nearest_image, trivial_metrics
from shiftadd3d.nerf.weights import pretrained_file
from shiftadd3d.scenes import scene_path

_COMPARED_VIEWS = 4

#: Fewer than ns-train's: a first try from trained weights needs no more.
DEMO_STEPS = 600


def train(config: GNTTrainerConfig, trainer: Callable[..., GNTTrainer] = GNTTrainer) -> Path:
    """Train with a method's configuration in this process, as ns-train does. Returns the run's `config.yml`.

    Args:
        config: the configuration of the method and its data. Afterwards it is that of the run.
        trainer: a trainer to use instead of ns-train's.

    Raises:
        UserError: the run's folder cannot be written.
    """
    config.set_timestamp()
    config.save_config()
    # After saving: the run stays one whose evaluation reports LPIPS. Here it would be a download in a first try.
    cast(GNTNerfModelConfig, config.pipeline.model).lpips = False
    config._target = cast("type[GNTTrainer]", trainer)
    # Not nerfstudio's `launch`: that one ends with a list of timings.
    train_loop(local_rank=0, world_size=1, config=config)
    return config.get_base_dir() / "config.yml"


@torch.no_grad()
def evaluate(pipeline: GNTPipeline) -> tuple[list[dict[str, float]], list[list[UInt8[np.ndarray, "h w 3"]]]]:
    """Render every evaluation view.

    Returns:
        For each view, `psnr`, `ssim` and `seconds` (of rendering); and for each view, four pictures: target, rendering,
        depth and nearest source view.
    """
    near, far = pipeline.model.near_far.tolist()
    metrics, pictures = [], []
    count = len(pipeline.datamanager.eval_dataset)
    with progress("Test views", count, unit="views", console=CONSOLE) as shown:
        for camera, batch in pipeline.datamanager.fixed_indices_eval_dataloader:
            start = time.perf_counter()
            outputs = pipeline.model.get_outputs_for_camera(camera)
            seconds = time.perf_counter() - start
            image = batch["image"].to(outputs["rgb"])
            metrics.append({**image_metrics(outputs["rgb"], image, batch.get("mask")), "seconds": seconds})
            pictures.append(
                [
                    to_bytes(image),
                    picture(outputs, ["rgb"], (near, far)),
                    picture(outputs, ["depth"], (near, far)),
                    to_bytes(nearest_image(pipeline.datamanager, camera)),
                ]
            )
            shown.advance()
    return metrics, pictures


def demo(
    config: GNTTrainerConfig,
    output_dir: Path = Path("outputs"),
    *,
    steps: int | None = None,
    data: Path | None = None,
    frames: int = 60,
) -> dict[str, Any]:
    """Render the test views, train, and render them again. Files go to `output_dir`/demo, and the run to a folder in
    it.

    Args:
        config: the method to train.
        output_dir: folder for results, as for ns-train.
        steps: training steps, or `DEMO_STEPS`.
        data: another scene instead of the embedded one.
        frames: number of frames of the video, at least 2.

    Returns:
        The contents of `metrics.json`.

    Raises:
        UserError: whatever is wrong with the arguments, the scene or the folder.
    """
    if steps is not None and steps < 1:
        raise UserError(f"--steps {steps}: expected 1 or more")
    if frames < 2:
        raise UserError(f"--frames {frames}: expected 2 or more")
    config = copy.deepcopy(config)
    config.output_dir, config.experiment_name, config.vis = output_dir, "demo", "tensorboard"
    config.pipeline.datamanager.data = scene_path() if data is None else data
    config.max_num_iterations = DEMO_STEPS if steps is None else steps
    folder = output_dir / "demo"
    with claimed(folder, "--output-dir"):
        return _demo(config, folder, frames)


def _demo(config: GNTTrainerConfig, folder: Path, frames: int) -> dict[str, Any]:
    CONSOLE.print("With the weights that come with the package, untrained on this scene:", highlight=False)
    untrained_views, untrained = _evaluate_untrained(config)
    start = time.perf_counter()
    config_file = train(config)
    training_seconds = time.perf_counter() - start

    run = load_run(config_file)
    run.pipeline.model.config.lpips = False
    views, pictures = evaluate(run.pipeline)
    facts: dict[str, Any] = {
        "method": config.method_name,
        "scene": str(config.pipeline.datamanager.data),
        "steps": run.step + 1,
        "training_seconds": round(training_seconds, 1),
        "untrained_test_views": untrained_views,
        "test_views": views,
        "untrained": average_metrics(untrained_views),
        "model": average_metrics(views),
        **trivial_metrics(run.pipeline),
    }
    rows = [
        [target, before[1], after, depth, nearest]
        for before, (target, after, depth, nearest) in zip(untrained, pictures, strict=True)
    ]
    _save_comparison(folder / "comparison.png", untrained_views, views, rows)
    write_path(run.pipeline.model, make_path(run.pipeline, frames=frames), folder / "video.mp4", names=["rgb", "depth"])
    facts["files"] = {
        "video": str(folder / "video.mp4"),
        "comparison": str(folder / "comparison.png"),
        "config": str(config_file),
        "checkpoint": str(run.checkpoint),
        "tensorboard": str(config_file.parent),
    }
    write_json(folder / "metrics.json", facts)
    _show(facts, run, folder / "metrics.json")
    return facts


def _evaluate_untrained(
    config: GNTTrainerConfig,
) -> tuple[list[dict[str, float]], list[list[UInt8[np.ndarray, "h w 3"]]]]:
    """`evaluate`, with the weights that come with the package."""
    weights = pretrained_file(str(config.method_name))
    manager = cast(GNTDataManagerConfig, config.pipeline.datamanager)
    parser = cast(AutoDataParserConfig, copy.deepcopy(manager.dataparser))
    parser.data = cast(Path, manager.data)
    pipeline = scene_pipeline(config, parser)
    load_pretrained(pipeline.model, weights)
    pipeline.eval()
    return evaluate(pipeline)


def _save_comparison(
    path: Path,
    untrained: list[dict[str, float]],
    views: list[dict[str, float]],
    pictures: list[list[UInt8[np.ndarray, "h w 3"]]],
) -> None:
    count = min(_COMPARED_VIEWS, len(views))
    chosen = np.linspace(0, len(views) - 1, count).round().astype(int)
    captions = [[f"test view {i}", _caption(untrained[i]), _caption(views[i]), "", ""] for i in chosen]
    columns = ["target", "untrained", "trained", "depth, trained", "nearest source view"]
    sheet = grid([pictures[i] for i in chosen], columns, captions)
    save_picture(sheet, path)


def _caption(view: dict[str, float]) -> str:
    return f"{view['psnr']:.2f} dB, SSIM {view['ssim']:.3f}"


def _show(facts: dict[str, Any], run: Run, metrics_file: Path) -> None:
    table = Table(title=f"{facts['method']}, {facts['steps']} steps, {len(facts['test_views'])} test views")
    for heading in ("", "PSNR (dB)", "SSIM"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = (
        ("untrained", f"{facts['method']}, untrained on this scene"),
        ("model", f"{facts['method']}, trained"),
        ("nearest", "copy of the nearest source view"),
        ("mean", "mean of the projected source views"),
    )
    for key, name in rows:
        table.add_row(name, f"{facts[key]['psnr']:.2f}", f"{facts[key]['ssim']:.3f}")
    CONSOLE.print(table)
    files = {
        "Video": facts["files"]["video"],
        "Pictures": facts["files"]["comparison"],
        "Numbers": metrics_file,
        "Checkpoint": facts["files"]["checkpoint"],
        "Curves": f"tensorboard --logdir {facts['files']['tensorboard']}",
    }
    for name, value in files.items():
        CONSOLE.print(f"{name + ':':<12}{value}", soft_wrap=True, highlight=False, markup=False)
    config, demo = facts["files"]["config"], metrics_file.parent
    CONSOLE.print(f"Trained in {facts['training_seconds']:.0f} s. Go on with:", highlight=False)
    train_on = ["ns-train", facts["method"], "--load-dir", str(run.checkpoint.parent), "--data", facts["scene"]]
    for words in (
        ["ns-viewer", "--load-config", config],
        ["ns-eval", "--load-config", config, "--output-path", str(demo / "eval.json")],
        ["shiftadd3d", "render", "--load-config", config, "--path", "spiral", "--out", str(demo / "spiral.mp4")],
        [*train_on, "--max-num-iterations", str(2 * facts["steps"])],
    ):
        CONSOLE.print(f"  {shlex.join(words)}", soft_wrap=True, highlight=False, markup=False)
