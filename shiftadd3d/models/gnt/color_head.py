"""An image-based colour head: it blends colours from the source views.

GNT's own head regresses a colour from the mean of a ray's features, and must learn to copy colours in that way. In
image-based rendering (IBRNet, Wang et al. 2021, sec. 3.3), the colour is a mixture of observed ones. Wherever the
geometry is right, so is the colour, from the first steps on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shiftadd3d.kernels.reference.gnt.color_blend import Scales, color_blend
from shiftadd3d.models.gnt.projection import PointSamples


class ImageColorHead(nn.Module):
    """Two softmaxes and a correction: over the views at a sample, over the samples of a ray, plus the original head.

    Both softmaxes start from priors that need no learning. A view counts more if its direction is closer to the
    target's. A sample counts more if the views agree better on its colour (as in a plane sweep). The network learns
    what to add to these logits. The original, regressing head is added with a scale that starts at zero. It can produce
    what no mixture of source colours can show: highlights that move, and regions that no view has seen.

    Args:
        width: channels of the ray transformer's output.
        feature_dim: channels of the source feature maps.
        angle_spread: see `GNTConfig`.
    """

    def __init__(self, width: int, feature_dim: int, angle_spread: float = 0.0) -> None:
        super().__init__()
        self.angle_spread = angle_spread
        channels = feature_dim + 3
        hidden = width // 2
        # How well the views agree at each sample, as a feature added to the first query.
        self.consistency_fc = nn.Linear(2 * channels + 1, width)
        self.point_fc = nn.Linear(width, hidden)
        self.view_fc = nn.Linear(2 * channels + 4, hidden)
        self.view_logit_fc = nn.Linear(hidden, 1)
        self.sample_logit_fc = nn.Linear(width, 1)
        # Logarithms of logits per unit of (1 - cosine) and per unit of colour deviation; see the class docstring. The
        # numbers themselves are so large that an optimizer's small steps would hardly change them.
        self.log_angle_scale = nn.Parameter(torch.tensor(20.0).log())
        self.log_agreement_scale = nn.Parameter(torch.tensor(40.0).log())
        self.regressed_scale = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.view_logit_fc.bias)
        nn.init.zeros_(self.sample_logit_fc.weight)
        nn.init.zeros_(self.sample_logit_fc.bias)

    def forward(self, x: Tensor, samples: PointSamples, regressed: Tensor) -> tuple[Tensor, Tensor]:
        """Colours and sample weights of rays.

        Args:
            x: [R, S, width], the normalised output of the last ray transformer.
            samples: what the source views show.
            regressed: [R, 3], the original head's colour.

        Returns:
            rgb [R, 3] and weights [R, S], which sum to one.
        """
        rgb, weights = self.blend(x, samples)
        return rgb + self.regressed_scale * regressed, weights

    def scales(self) -> Scales:
        """The weights of the priors: scalars."""
        spread = self.log_angle_scale.new_tensor(self.angle_spread)
        return Scales(self.log_angle_scale.exp(), self.log_agreement_scale.exp(), spread)

    def blend(self, x: Tensor, samples: PointSamples) -> tuple[Tensor, Tensor]:
        """Colours [R, 3], mixed of what the views show, and sample weights [R, S], for features x [R, S, width]."""
        return color_blend(
            x,
            samples.values,
            samples.ray_diff,
            samples.mask[..., 0],
            self.scales(),
            point=self.point_fc,
            view=self.view_fc,
            view_logit=self.view_logit_fc,
            sample_logit=self.sample_logit_fc,
        )
