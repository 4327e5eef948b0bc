"""The GNT network: view transformers gather features across source views, ray transformers along the ray.

Varma T. et al., "Is Attention All That NeRF Needs?", ICLR 2023. Parameter names are those of the released code (which
calls the view transformer `view_crosstrans` and the ray transformer `view_selftrans`), so that its checkpoints load by
name.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from shiftadd3d.kernels.reference.gnt.position_layer import EMBEDDING_DIM, position_layer
from shiftadd3d.kernels.reference.gnt.ray_block import ray_attention
from shiftadd3d.kernels.reference.gnt.view_attention import view_attention
from shiftadd3d.kernels.reference.gnt.view_embedding import view_embedding
from shiftadd3d.models.gnt.color_head import ImageColorHead
from shiftadd3d.models.gnt.projection import PointSamples
from shiftadd3d.nn import AddAttention, Recipe, register_attention


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.act(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


class ViewAttention(nn.Module):
    """Subtraction attention of a point's query over the source views (GNT, sec. 3.2, "view transformer").

    The score is a small MLP of key minus query plus an embedding of the ray difference, one weight a channel; no
    product of queries and keys is taken.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.q_fc = nn.Linear(dim, dim, bias=False)
        self.k_fc = nn.Linear(dim, dim, bias=False)
        self.v_fc = nn.Linear(dim, dim, bias=False)
        self.pos_fc = nn.Sequential(nn.Linear(4, dim // 8), nn.ReLU(), nn.Linear(dim // 8, dim))
        self.attn_fc = nn.Sequential(nn.Linear(dim, dim // 8), nn.ReLU(), nn.Linear(dim // 8, dim))
        self.out_fc = nn.Linear(dim, dim)
        self.dropout = dropout

    def forward(self, query: Tensor, views: Tensor, ray_diff: Tensor, mask: Tensor) -> Tensor:
        """Attend from points to views.

        Args:
            query: [R, S, C].
            views: [R, S, V, C].
            ray_diff: [R, S, V, 4].
            mask: [R, S, V, 1] bool; where no view is left, all weigh the same.

        Returns:
            [R, S, C].
        """
        out = view_attention(
            query,
            views,
            ray_diff,
            mask[..., 0],
            q=self.q_fc,
            k=self.k_fc,
            v=self.v_fc,
            position=self.pos_fc,
            score=self.attn_fc,
            out=self.out_fc,
            dropout=self.dropout if self.training else 0.0,
        )
        return F.dropout(out, self.dropout, self.training)


class RayAttention(nn.Module):
    """Multi-head self-attention over the samples of a ray (GNT, sec. 3.3, "ray transformer")."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.q_fc = nn.Linear(dim, dim, bias=False)
        self.k_fc = nn.Linear(dim, dim, bias=False)
        self.v_fc = nn.Linear(dim, dim, bias=False)
        self.out_fc = nn.Linear(dim, dim)
        self.num_heads = num_heads
        self.dropout = dropout

    def forward(self, x: Tensor, return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Attend along rays.

        Args:
            x: [R, S, C].
            return_weights: also return how the first sample attends, the mean over the heads, [R, S]: what GNT reads as
                the weights of volume rendering.
        """
        dropout = self.dropout if self.training else 0.0
        projections = (self.q_fc, self.k_fc, self.v_fc, self.out_fc)
        out, weights = ray_attention(x, *projections, self.num_heads, return_weights=return_weights, dropout=dropout)
        out = F.dropout(out, self.dropout, self.training)
        return out if weights is None else (out, weights)


class ViewTransformer(nn.Module):
    """Pre-norm block: attention over views, then a feed-forward network; both residual."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ff_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ff = FeedForward(dim, 4 * dim, dropout)
        self.attn = ViewAttention(dim, dropout)

    def forward(self, x: Tensor, views: Tensor, ray_diff: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), views, ray_diff, mask)
        return x + self.ff(self.ff_norm(x))


class RayTransformer(nn.Module):
    """Pre-norm block: attention along the ray, then a feed-forward network; both residual."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ff_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ff = FeedForward(dim, 4 * dim, dropout)
        self.attn = RayAttention(dim, num_heads, dropout)

    def forward(self, x: Tensor, return_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        weights = None
        if return_weights:
            attended, weights = self.attn(self.attn_norm(x), return_weights=True)
        else:
            attended = self.attn(self.attn_norm(x))
        x = x + attended
        return x + self.ff(self.ff_norm(x)), weights


class PositionLayer(nn.Sequential):
    """A perceptron that gives samples their position and the direction of their ray."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width + 2 * EMBEDDING_DIM, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, points: Tensor, directions: Tensor) -> Tensor:
        """The new features [R, S, width], for features x [R, S, width] at points [R, S, 3] of rays along unit vectors
        [R, 3].
        """
        return position_layer(x, points, directions, super().forward)


class GNT(nn.Module):
    """From what the source views show at the samples of a ray to the ray's colour.

    Args:
        depth: number of (view transformer, ray transformer) pairs.
        width: channels.
        feature_dim: channels of the source feature maps.
        num_heads: heads of the ray transformers.
        dropout: rate in attention and feed-forward networks while training.
        color_head: blend the projected source colours (`ImageColorHead`) instead of regressing the colour alone.
        angle_spread: of the colour head, see `GNTConfig`.
    """

    def __init__(
        self,
        depth: int = 4,
        width: int = 64,
        feature_dim: int = 32,
        num_heads: int = 4,
        dropout: float = 0.1,
        color_head: bool = False,
        angle_spread: float = 0.0,
    ) -> None:
        super().__init__()
        self.rgbfeat_fc = nn.Sequential(nn.Linear(feature_dim + 3, width), nn.ReLU(), nn.Linear(width, width))
        self.view_crosstrans = nn.ModuleList(ViewTransformer(width, dropout) for _ in range(depth))
        self.view_selftrans = nn.ModuleList(RayTransformer(width, num_heads, dropout) for _ in range(depth))
        # Every second block is told again where its samples are and where the ray points.
        self.q_fcs = nn.ModuleList(PositionLayer(width) if i % 2 == 0 else nn.Identity() for i in range(depth))
        self.norm = nn.LayerNorm(width)
        self.rgb_fc = nn.Linear(width, 3)
        self.color_head = ImageColorHead(width, feature_dim, angle_spread) if color_head else None

    def forward(self, samples: PointSamples, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Colours and weights of rays.

        Args:
            samples: what the source views show at the points.
            points: [R, S, 3], world.
            directions: [R, 3], world, any length.

        Returns:
            rgb [R, 3], not clamped, and weights [R, S], which sum to one: the attention of the last ray transformer's
            first sample, or the colour head's own weights where there is one.
        """
        views, x = self.embed(samples)
        directions = F.normalize(directions, dim=-1)
        attention = None
        last = len(self.view_selftrans) - 1
        for i, (view_transformer, q_fc, ray_transformer) in enumerate(
            zip(self.view_crosstrans, self.q_fcs, self.view_selftrans, strict=True)
        ):
            x = view_transformer(x, views, samples.ray_diff, samples.mask)
            if i % 2 == 0:
                x = q_fc(x, points, directions)
            x, attention = ray_transformer(x, return_weights=i == last and self.color_head is None)
        x = self.norm(x)
        regressed = self.rgb_fc(x.mean(dim=1))
        if self.color_head is None:
            assert attention is not None
            return regressed, attention
        return self.color_head(x, samples, regressed)

    def embed(self, samples: PointSamples) -> tuple[Tensor, Tensor]:
        """The embedded values of the views, [R, S, V, width], and the first queries [R, S, width]."""
        consistency = None if self.color_head is None else self.color_head.consistency_fc
        return view_embedding(samples.values, samples.mask[..., 0], self.rgbfeat_fc, consistency)


def _add_attention(attention: RayAttention, recipe: Recipe) -> AddAttention:
    # Without contrast: the first row of the map is read as the weights of a ray's samples, none of them negative.
    options = recipe.add_options() | {"contrast": None}
    return AddAttention.from_projections(
        attention.q_fc,
        attention.k_fc,
        attention.v_fc,
        attention.out_fc,
        attention.num_heads,
        dropout=attention.dropout,
        **options,
    )


# The view transformer subtracts queries from keys: there is no product to turn into additions, only linear layers.
register_attention(ViewAttention)
register_attention(RayAttention, _add_attention)
