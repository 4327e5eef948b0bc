"""A plane sweep over the source views finds likely surfaces, and proposes the few samples for the transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shiftadd3d.kernels.reference.gnt.plane_sweep import plane_sweep
from shiftadd3d.models.gnt.projection import PointSamples, SourceViews, sample_sources


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

    def __init__(self, feature_dim: int, hidden_dim: int = 32) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        # A sample is judged beside its two neighbours: agreement means little on a flat stretch, much at a dip.
        last = nn.Linear(hidden_dim, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.score = nn.Sequential(nn.Linear(3 * (3 + feature_dim + 1), hidden_dim), nn.ReLU(), last)
        # Logarithms, for the reason that the colour head has.
        self.log_angle_scale = nn.Parameter(torch.tensor(20.0).log())
        self.log_agreement_scale = nn.Parameter(torch.tensor(60.0).log())

    def forward(self, samples: PointSamples) -> tuple[Tensor, Tensor]:
        """Colours and weights of rays.

        Args:
            samples: what the source views show at P depths of R rays, with `feature_dim` channels.

        Returns:
            rgb [R, 3] and weights [R, P], which sum to one.
        """
        scales = self.log_angle_scale.exp(), self.log_agreement_scale.exp()
        return plane_sweep(samples.values, samples.ray_diff[..., 3], samples.mask[..., 0], *scales, self.score)

    def sweep(self, points: Tensor, origins: Tensor, sources: SourceViews) -> tuple[Tensor, Tensor, Tensor]:
        """Look up points in the source views, and score them.

        Args:
            points: [R, P, 3], world.
            origins: [R, 3], where each ray starts.
            sources: V views.

        Returns:
            rgb [R, 3] and weights [R, P], as from `forward`, and whether any view sees a point, [R, P] bool.
        """
        feature_maps = sources.features[0]
        samples = sample_sources(points, origins, sources, feature_maps[:, : self.feature_dim])
        return *self(samples), samples.mask[..., 0].any(dim=-1)
