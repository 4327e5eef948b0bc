"""Training for some time, however many steps that makes."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.utils.rich_utils import CONSOLE
from torch.optim.lr_scheduler import LambdaLR

from shiftadd3d._errors import UserError
from shiftadd3d._progress import Steps, duration, progress
from shiftadd3d.nerf.checkpoint import latest_checkpoint, read_checkpoint
from shiftadd3d.nerf.datamanager import GNTDataManagerConfig
from shiftadd3d.nerf.demo import train
from shiftadd3d.nerf.pipeline import GNTPipelineConfig
from shiftadd3d.nerf.schedulers import WarmupCosineSchedulerConfig
from shiftadd3d.nerf.trainer import GNTTrainer, GNTTrainerConfig


def train_for(seconds: float, config: GNTTrainerConfig) -> Path:
    """Train from the weights that come with the package; returns the run's config.yml.

    A run of the same method, data and length that lies where this one would go on, and that was interrupted, goes on;
    one that came to its end serves again.

    Args:
        seconds: how long.
        config: of the method and its data; the run's own afterwards.
    """
    manager = cast(GNTDataManagerConfig, config.pipeline.datamanager)
    settings = {
        "seconds": seconds,
        "data": str(cast(Path, manager.data).resolve()),
        "scale": manager.camera_res_scale_factor,
        "source_views": manager.num_source_views,
    }
    earlier = _earlier(config, settings)
    if earlier is not None:
        run, gone = earlier
        if gone >= seconds:
            CONSOLE.print(f"Trained already, in {run}; remove that folder to train anew", soft_wrap=True)
            return run / "config.yml"
        CONSOLE.print(f"Going on with {run}, after {duration(gone)} of {duration(seconds)}", soft_wrap=True)
        config.timestamp, config.load_dir = run.name, run / config.relative_model_dir
    cast(GNTPipelineConfig, config.pipeline).warm_start = Path("pretrained")
    config.vis = "tensorboard"
    config.max_num_iterations = GNTTrainerConfig.max_num_iterations  # the clock stops it
    for name in ("batch", "image", "all_images"):  # time that training would lose
        setattr(config, f"steps_per_eval_{name}", config.max_num_iterations)
    return train(config, functools.partial(_ClockedTrainer, settings=settings))


def _earlier(config: GNTTrainerConfig, settings: dict[str, Any]) -> tuple[Path, float] | None:
    """The newest run of such settings where this one would lie, and the seconds that it was trained for."""
    for run in sorted(config.get_base_dir().parent.glob("*"), reverse=True):
        with contextlib.suppress(UserError):  # a folder of something else, or a file that broke off
            state = read_checkpoint(latest_checkpoint(run / config.relative_model_dir))
            clock = state.get("training", {}).get("clock")
            if clock is not None and clock["settings"] == settings and (run / "config.yml").is_file():
                return run, clock["gone"]
    return None


class _ClockedTrainer(GNTTrainer):
    """Stops after some time; learning rates fall, and the second stage comes, with the share of it that has gone.

    Args:
        config: of the run.
        settings: `seconds`, how long; whatever else tells one such run from another. Checkpoints hold them.
    """

    def __init__(self, config: GNTTrainerConfig, *args: Any, settings: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._settings, self._seconds = settings, float(settings["seconds"])
        self._gone, self._began = 0.0, math.nan

    def _keeping_state(self) -> dict[str, Any]:
        return {**super()._keeping_state(), "clock": {"settings": self._settings, "gone": self._gone}}

    def _go_on_keeping(self, state: dict[str, Any]) -> None:
        super()._go_on_keeping(state)
        self._gone = float(state["clock"]["gone"])

    def setup_optimizers(self) -> Optimizers:
        optimizers = super().setup_optimizers()
        for name, scheduler in optimizers.schedulers.items():
            settings = self.config.optimizers[name]["scheduler"]
            if isinstance(settings, WarmupCosineSchedulerConfig):
                cast(LambdaLR, scheduler).lr_lambdas = [self._factor(settings)]
        return optimizers

    def _factor(self, settings: WarmupCosineSchedulerConfig) -> Callable[[int], float]:
        def factor(step: int) -> float:
            decay = 0.5 * (1.0 + math.cos(math.pi * self.share_done(step)))
            warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
            return warmup * (settings.final_fraction + (1.0 - settings.final_fraction) * decay)

        return factor

    def train(self) -> None:
        total, gone = max(1, round(self._seconds)), min(round(self._gone), round(self._seconds))
        with progress("Training", total, done=gone, unit="seconds", console=CONSOLE) as self._clock:
            super().train()

    def _show_progress(self) -> contextlib.AbstractContextManager[Steps]:
        return progress("steps", 0, disable=True)  # nobody knows how many there will be

    def share_done(self, step: int) -> float:
        return min(1.0, self._gone / self._seconds)

    def train_iteration(self, step: int) -> Any:
        if math.isnan(self._began):
            self._began = time.monotonic() - self._gone
        result = super().train_iteration(step)
        self._gone = time.monotonic() - self._began
        self.stop_training = self._gone >= self._seconds
        gone = min(round(self._gone), self._clock.total) - self._clock.done
        if gone > 0:
            self._clock.advance(gone, status=f"step {step + 1}, loss {result[0].item():.4f}")
        return result
