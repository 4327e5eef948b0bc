"""The methods that render without training, apart from how they are trained.

`methods` takes its models from here. It imports nerfstudio's trainer, which takes several times as long as all that
rendering needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from shiftadd3d.models.gnt.presets import SHIFTADD_RECIPE, TINY
from shiftadd3d.nerf.model import GNTNerfModelConfig
from shiftadd3d.nerf.pretrained import PretrainedMethod

if TYPE_CHECKING:
    from shiftadd3d.nerf.trainer import GNTTrainerConfig

#: Dense networks have no second stage and take no notice.
SECOND_STAGE_AT = 0.5


def _tiny(name: str, recipe: str) -> PretrainedMethod:
    def training() -> GNTTrainerConfig:
        from shiftadd3d.configs import methods

        method = {"gnt-tiny": methods.gnt_tiny, "shiftadd-gnt-tiny": methods.shiftadd_gnt_tiny}[name]
        return cast("GNTTrainerConfig", method.config)

    return PretrainedMethod(
        name,
        GNTNerfModelConfig(
            gnt=TINY, recipe=recipe, second_stage_at=SECOND_STAGE_AT, num_samples=8, eval_num_rays_per_chunk=4096
        ),
        num_source_views=6,
        training=training,
    )


gnt_tiny = _tiny("gnt-tiny", "mult")
shiftadd_gnt_tiny = _tiny("shiftadd-gnt-tiny", SHIFTADD_RECIPE)
