"""An image-based colour head: blend the colours the source views show, instead of inventing them.

GNT's own head regresses a colour from the mean of the ray's features and has to learn, through it, to copy. In image
based rendering (IBRNet, Wang et al. 2021, sec. 3.3) the colour is a mixture of observed ones, which is right wherever
geometry is, from the first steps on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftadd3d.kernels.plane_sweep import MASKED_LOGIT
from shiftadd3d.models.gnt.projection import PointSamples


class ImageColorHead(nn.Module):
    """Two softmaxes and a correction: over the views at a sample, over the samples of a ray, plus the original head.

    Both softmaxes start from what plane sweeping knows without learning: a view counts more the closer its direction is
    to the target's, a sample counts more the better the views agree on its colour. The network learns what to add to
    these logits. The original, regressing head enters through a scale that starts at zero: it repairs what no mixture
    of source colours can show (highlights that move, regions nobody saw).

    Args:
        width: channels of the ray transformer's output.
        feature_dim: channels of the source feature maps.
    """

    def __init__(self, width: int, feature_dim: int) -> None:
        super().__init__()
        channels = feature_dim + 3
        hidden = width // 2
        self.consistency_fc = nn.Linear(2 * channels + 1, width)
        self.point_fc = nn.Linear(width, hidden)
        self.view_fc = nn.Linear(channels + 4, hidden)
        self.view_logit_fc = nn.Linear(hidden, 1)
        self.sample_logit_fc = nn.Linear(width, 1)
        # Logits per unit of (1 - cosine) and per unit of colour deviation; see the class docstring.
        self.angle_scale = nn.Parameter(torch.tensor(20.0))
        self.agreement_scale = nn.Parameter(torch.tensor(20.0))
        self.regressed_scale = nn.Parameter(torch.zeros(()))
        for fc in (self.view_logit_fc, self.sample_logit_fc):
            nn.init.zeros_(fc.weight)
            nn.init.zeros_(fc.bias)

    @staticmethod
    def _moments(samples: PointSamples) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the seeing views of colour and features, each [R, S, 3 + C]."""
        values = samples.values
        seen = samples.mask.to(values.dtype)
        count = seen.sum(dim=2).clamp(min=1.0)
        mean = (values * seen).sum(dim=2) / count
        variance = ((values - mean[:, :, None]).square() * seen).sum(dim=2) / count
        return mean, (variance + 1e-6).sqrt()

    def consistency(self, samples: PointSamples) -> Tensor:
        """How well the views agree at each sample, as a feature added to the initial query, [R, S, width]."""
        mean, deviation = self._moments(samples)
        visible = samples.mask.to(mean.dtype).mean(dim=2)
        return self.consistency_fc(torch.cat([mean, deviation, visible], dim=-1))

    def forward(self, x: Tensor, samples: PointSamples, regressed: Tensor) -> tuple[Tensor, Tensor]:
        """Colours and sample weights of rays.

        Args:
            x: [R, S, width], the normalised output of the last ray transformer.
            samples: what the source views show.
            regressed: [R, 3], the original head's colour.

        Returns:
            rgb [R, 3] and weights [R, S], which sum to one.
        """
        view_input = torch.cat([samples.values, samples.ray_diff], dim=-1)
        view_logits = self.view_logit_fc(F.relu(self.point_fc(x)[:, :, None] + self.view_fc(view_input)))
        view_logits = view_logits + self.angle_scale * (samples.ray_diff[..., 3:] - 1.0)
        view_weights = torch.softmax(view_logits.masked_fill(~samples.mask, MASKED_LOGIT), dim=2)
        colors = (view_weights * samples.rgb).sum(dim=2)  # [R, S, 3]

        # Weighted by the same view weights: a distant view that sees past an edge must not veto a sample.
        deviation = (view_weights * (samples.rgb - colors[:, :, None]).abs()).sum(dim=2).mean(dim=-1)
        seen = samples.mask[..., 0].sum(dim=2)
        sample_logits = self.sample_logit_fc(x)[..., 0] - self.agreement_scale * deviation
        # One view alone always agrees with itself: that says nothing about the depth.
        sample_logits = sample_logits.masked_fill(seen < 2, MASKED_LOGIT)
        weights = torch.softmax(sample_logits, dim=-1)
        rgb = (weights[..., None] * colors).sum(dim=1)
        return rgb + self.regressed_scale * regressed, weights
