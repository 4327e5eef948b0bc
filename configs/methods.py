"""The nerfstudio methods: `ns-train gnt`, `ns-train shiftadd-gnt`, and a -tiny and a -big one of each."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
from nerfstudio.configs.base_config import LocalWriterConfig, LoggingConfig, MachineConfig, ViewerConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.plugins.types import MethodSpecification

from shiftadd3d.configs import pretrained
from shiftadd3d.configs.pretrained import SECOND_STAGE_AT
from shiftadd3d.models.gnt.presets import BASE, BIG, SHIFTADD_RECIPE
from shiftadd3d.nerf.datamanager import GNTDataManagerConfig
from shiftadd3d.nerf.error_hook import (
    name_similar_methods,
    print_expected_errors_as_one_line,
    warn_of_shared_names,
)
from shiftadd3d.nerf.model import GNTNerfModelConfig
from shiftadd3d.nerf.optimizers import StartAdamConfig
from shiftadd3d.nerf.pipeline import GNTPipelineConfig
from shiftadd3d.nerf.pretrained import PretrainedMethod
from shiftadd3d.nerf.schedulers import WarmupCosineSchedulerConfig
from shiftadd3d.nerf.trainer import GNTTrainerConfig
from shiftadd3d.nerf.warm_start import PRETRAINED

# nerfstudio imports this module in every ns-* command: bad input and Ctrl-C then read the same as in our own.
print_expected_errors_as_one_line()
warn_of_shared_names()
name_similar_methods()
# nerfstudio 1.1.5 meets a newer torch than it was written for, which says so in the middle of training.
for _category in (FutureWarning, UserWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"nerfstudio\.")


def _device_type() -> str:
    """What this machine trains on. Not Apple's MPS: nerfstudio's rays need operations it lacks."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _trainer(
    name: str,
    model: GNTNerfModelConfig,
    *,
    num_source_views: int,
    rays: int,
    steps: int,
    adam: AdamOptimizerConfig,
    feature_adam: AdamOptimizerConfig,
    eval_every: int,
    warm_start: Path | None = None,
    against_overfitting: bool = False,
) -> GNTTrainerConfig:
    spare, judged, average = (4, 2, 0.99) if against_overfitting else (0, 0, 0.0)

    def optimizer(adam: AdamOptimizerConfig) -> dict:
        return {"optimizer": adam, "scheduler": WarmupCosineSchedulerConfig()}

    return GNTTrainerConfig(
        method_name=name,
        max_num_iterations=steps,
        average_weights=average,
        steps_per_save=eval_every,
        steps_per_eval_batch=eval_every,
        steps_per_eval_image=eval_every,
        steps_per_eval_all_images=10 * steps,
        mixed_precision=False,
        # Its table writes over itself; the trainer shows a bar instead, or a line a minute.
        logging=LoggingConfig(local_writer=LocalWriterConfig(enable=False)),
        machine=MachineConfig(device_type=_device_type()),  # type: ignore[arg-type]
        pipeline=GNTPipelineConfig(
            datamanager=GNTDataManagerConfig(
                num_source_views=num_source_views,
                spare_source_views=spare,
                judged_views=judged,
                train_num_rays_per_batch=rays,
                eval_num_rays_per_batch=rays,
            ),
            model=model,
            warm_start=warm_start,
        ),
        optimizers={"transformers": optimizer(adam), "feature_net": optimizer(feature_adam)},
        viewer=ViewerConfig(num_rays_per_chunk=1 << 12),
        vis="viewer+tensorboard",
    )


def _tiny(method: PretrainedMethod) -> GNTTrainerConfig:
    return _trainer(
        method.name,
        copy.deepcopy(method.model),
        num_source_views=method.num_source_views,
        rays=512,
        steps=800,
        adam=StartAdamConfig(),
        feature_adam=StartAdamConfig(),
        eval_every=500,
        warm_start=PRETRAINED,
        # Trained weights soon render a scene of few views, far apart, worse than before.
        against_overfitting=True,
    )


def _base(name: str, recipe: str) -> GNTTrainerConfig:
    return _trainer(
        name,
        GNTNerfModelConfig(gnt=BASE, recipe=recipe, second_stage_at=SECOND_STAGE_AT, num_samples=16),
        num_source_views=10,
        rays=1024,
        steps=50_000,
        adam=AdamOptimizerConfig(lr=5e-4),
        feature_adam=AdamOptimizerConfig(lr=1e-3),
        eval_every=1000,
    )


def _big(name: str, recipe: str) -> GNTTrainerConfig:
    return _trainer(
        name,
        GNTNerfModelConfig(gnt=BIG, recipe=recipe, second_stage_at=SECOND_STAGE_AT, num_samples=192),
        num_source_views=10,
        rays=512,
        steps=250_000,
        adam=AdamOptimizerConfig(lr=5e-4),
        feature_adam=AdamOptimizerConfig(lr=1e-3),
        eval_every=5000,
    )


gnt = MethodSpecification(
    _base("gnt", "mult"), description="GNT: a NeRF transformer over the nearest source views, with multiplications."
)
gnt_tiny = MethodSpecification(_tiny(pretrained.gnt_tiny), description="GNT for a laptop CPU: minutes on small images.")
gnt_big = MethodSpecification(_big("gnt-big", "mult"), description="GNT as in its paper: 8 blocks, 192 samples a ray.")
shiftadd_gnt = MethodSpecification(
    _base("shiftadd-gnt", SHIFTADD_RECIPE),
    description="GNT of shifts, adds and a mixture of experts (ShiftAddViT).",
)
shiftadd_gnt_tiny = MethodSpecification(
    _tiny(pretrained.shiftadd_gnt_tiny),
    description="ShiftAdd GNT for a laptop CPU: minutes on small images.",
)
shiftadd_gnt_big = MethodSpecification(
    _big("shiftadd-gnt-big", SHIFTADD_RECIPE),
    description="ShiftAdd GNT with the paper's 8 blocks, 192 samples a ray.",
)
