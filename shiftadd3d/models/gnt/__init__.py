"""GNT: a NeRF transformer that renders a ray from the nearest source views.

Varma T. et al., "Is Attention All That NeRF Needs?", ICLR 2023.
"""

import shiftadd3d.models.gnt.compiled
import shiftadd3d.models.gnt.frozen  # noqa: F401 (tells `freeze_` of the network's modules)
from shiftadd3d.models.gnt.checkpoint import load_official_checkpoint
from shiftadd3d.models.gnt.model import GNTConfig, GNTModel, render_rays
from shiftadd3d.models.gnt.projection import Cameras, SourceViews

__all__ = ["Cameras", "GNTConfig", "GNTModel", "SourceViews", "load_official_checkpoint", "render_rays"]
