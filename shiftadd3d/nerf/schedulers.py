"""Learning rates over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nerfstudio.engine.schedulers import Scheduler, SchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


@dataclass
class WarmupCosineSchedulerConfig(SchedulerConfig):
    """A linear warm-up, then half a cosine down to a fraction of the initial rate at the end of the run.

    nerfstudio's own cosine leaves NumPy scalars in the checkpoint, which torch's safe loading refuses.
    """

    _target: type = field(default_factory=lambda: WarmupCosineScheduler)
    """Target class to instantiate."""
    warmup_steps: int = 50
    """Steps over which the rate rises to its initial value."""
    final_fraction: float = 0.05
    """Rate at the end of the run, as a fraction of the initial one."""
    max_steps: int | None = None
    """Step at which the rate is down. If not set, the run's --max-num-iterations."""


class WarmupCosineScheduler(Scheduler):
    """See `WarmupCosineSchedulerConfig`."""

    config: WarmupCosineSchedulerConfig

    def get_scheduler(self, optimizer: Optimizer, lr_init: float) -> LRScheduler:
        warmup, final, end = self.config.warmup_steps, self.config.final_fraction, self.config.max_steps
        if end is None:
            raise ValueError("max_steps is not set: GNTTrainer sets it from max_num_iterations")

        def factor(step: int) -> float:
            decay = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / max(end, 1))))
            return min(1.0, (step + 1) / max(warmup, 1)) * (final + (1.0 - final) * decay)

        return LambdaLR(optimizer, factor)
