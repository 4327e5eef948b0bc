"""Learning rates that depend on whether training starts from trained weights."""

from __future__ import annotations

from dataclasses import dataclass

from nerfstudio.engine.optimizers import AdamOptimizerConfig


@dataclass
class StartAdamConfig(AdamOptimizerConfig):
    """Adam with a learning rate that depends on the start, unless one is set: trained weights need smaller steps than
    random ones.
    """

    lr: float | None = None  # GNTTrainer has set it when nerfstudio reads it
    """Peak of the learning rate. If not set, one of the following two."""
    lr_from_random: float = 2e-3
    """Peak of the learning rate from random weights (--pipeline.warm-start none)."""
    lr_from_trained: float = 1e-3
    """Peak of the learning rate from trained weights (any other --pipeline.warm-start)."""

    def of_start(self, trained: bool) -> AdamOptimizerConfig:
        """nerfstudio's own settings, with the right learning rate.

        Args:
            trained: whether training starts from trained weights.
        """
        chosen = self.lr_from_trained if trained else self.lr_from_random
        rate = chosen if self.lr is None else self.lr
        return AdamOptimizerConfig(lr=rate, eps=self.eps, max_norm=self.max_norm, weight_decay=self.weight_decay)
