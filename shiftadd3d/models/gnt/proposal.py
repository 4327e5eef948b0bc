"""Where the surfaces may be: a plane sweep over the source views proposes the few samples the transformers look at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shiftadd3d.models.gnt.projection import MASKED_LOGIT, PointSamples


class PlaneSweepProposal(nn.Module):
    """A cheap first pass: many depths a ray, scored by how well the source views agree there.

    Transformers over every sample of a ray spend nearly all their work on empty space. A plane sweep (Collins 1996)
    needs a few operations a sample: project, compare colours and a few feature channels across views. A small network
    learns what to add to the plain colour deviation; it trains by the colour error of its own blend, as NeRF's coarse
    network does (Mildenhall et al. 2020, sec. 5.2).

    Args:
        feature_dim: feature channels it compares (the first ones of the feature map).
        hidden_dim: width of the scoring network.
    """

    def __init__(self, feature_dim: int, hidden_dim: int = 16) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        # A sample is judged beside its two neighbours: agreement means little on a flat stretch, much at a dip.
        last = nn.Linear(hidden_dim, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.score = nn.Sequential(nn.Linear(3 * (3 + feature_dim + 1), hidden_dim), nn.ReLU(), last)
        self.angle_scale = nn.Parameter(torch.tensor(20.0))
        self.agreement_scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, samples: PointSamples) -> tuple[Tensor, Tensor]:
        """Colours and weights of rays.

        Args:
            samples: what the source views show at P depths of R rays, with `feature_dim` channels.

        Returns:
            rgb [R, 3] and weights [R, P], which sum to one.
        """
        logits = (self.angle_scale * (samples.ray_diff[..., 3:] - 1.0)).masked_fill(~samples.mask, MASKED_LOGIT)
        view_weights = torch.softmax(logits, dim=2)
        values = torch.cat([samples.rgb, samples.features], dim=-1)
        mean = (view_weights * values).sum(dim=2)
        deviation = (view_weights * (values - mean[:, :, None]).abs()).sum(dim=2)  # [R, P, 3 + C]
        seen = samples.mask[..., 0].sum(dim=2)
        evidence = torch.cat([deviation, (seen[..., None] / samples.mask.shape[2])], dim=-1)
        before = torch.cat([evidence[:, :1], evidence[:, :-1]], dim=1)
        after = torch.cat([evidence[:, 1:], evidence[:, -1:]], dim=1)
        scores = self.score(torch.cat([before, evidence, after], dim=-1))[..., 0]
        scores = scores - self.agreement_scale * deviation[..., :3].mean(dim=-1)
        # One view alone always agrees with itself: that says nothing about the depth.
        weights = torch.softmax(scores.masked_fill(seen < 2, MASKED_LOGIT), dim=-1)
        return (weights[..., None] * mean[..., :3]).sum(dim=1), weights
