"""The GNT network: view transformers gather features across source views, ray transformers along the ray.

Varma T. et al., "Is Attention All That NeRF Needs?", ICLR 2023. Parameter names are those of the released code (which
calls the view transformer `view_crosstrans` and the ray transformer `view_selftrans`), so that its checkpoints load by
name.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftadd3d.kernels.ops.gnt.position_layer import position_layer
from shiftadd3d.kernels.ops.gnt.ray_block import ray_block
from shiftadd3d.kernels.ops.gnt.view_attention import view_attention
from shiftadd3d.kernels.ops.gnt.view_embedding import view_embedding
from shiftadd3d.kernels.reference.gnt.position_layer import EMBEDDING_DIM, sinusoidal_embedding
from shiftadd3d.kernels.reference.gnt.view_attention import MAX_VIEWS
from shiftadd3d.kernels.runtime.numerics import uses_kernels
from shiftadd3d.models.gnt.color_head import ImageColorHead
from shiftadd3d.models.gnt.fused import codes_and_convolution, is_free, weights_and_biases
from shiftadd3d.models.gnt.projection import PointSamples
from shiftadd3d.nn import AddAttention, FrozenMlp, Recipe, register_attention, register_frozen


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
        if uses_kernels("view_attention", query, views) and views.shape[2] <= MAX_VIEWS and is_free(self.children()):
            (pos_1, _, pos_2), (attn_1, _, attn_2) = self.pos_fc, self.attn_fc
            layers = (self.q_fc, self.k_fc, self.v_fc, pos_1, pos_2, attn_1, attn_2, self.out_fc)
            plain = weights_and_biases(layers)
            if plain is not None:
                return view_attention(query, views, ray_diff, mask[..., 0], plain[0], plain[1][3:])
        q = self.q_fc(query)
        k = self.k_fc(views)
        v = self.v_fc(k)  # of the keys, not of the views: so it is in the released network
        position = self.pos_fc(ray_diff)
        scores = self.attn_fc(k - q[:, :, None] + position).masked_fill(~mask, -1e9)
        weights = F.dropout(torch.softmax(scores, dim=-2), self.dropout, self.training)
        return F.dropout(self.out_fc(((v + position) * weights).sum(dim=-2)), self.dropout, self.training)


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
        q, k, v = (
            fc(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for fc in (self.q_fc, self.k_fc, self.v_fc)
        )  # [R, heads, S, C / heads]
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        out = F.dropout(self.out_fc(out.transpose(1, 2).flatten(-2)), self.dropout, self.training)
        if not return_weights:
            return out
        first = torch.einsum("rhc,rhsc->rhs", q[:, :, 0], k) / math.sqrt(q.shape[-1])
        return out, torch.softmax(first, dim=-1).mean(dim=1)


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
        if uses_kernels("ray_block", x) and is_free(self.children()):
            outcome = self._fused(x, return_weights)
            if outcome is not None:
                return outcome
        weights = None
        if return_weights:
            attended, weights = self.attn(self.attn_norm(x), return_weights=True)
        else:
            attended = self.attn(self.attn_norm(x))
        x = x + attended
        return x + self.ff(self.ff_norm(x)), weights

    def _fused(self, x: Tensor, return_weights: bool) -> tuple[Tensor, Tensor | None] | None:
        """The block as one kernel; the feed-forward network apart from it if that is not two plain layers."""
        attn, ff = self.attn, self.ff
        kind = ("softmax", None) if type(attn) is RayAttention else None
        if type(attn) is AddAttention:
            kind = codes_and_convolution(attn)
        if kind is None:
            return None
        plain = weights_and_biases((self.attn_norm, attn.q_fc, attn.k_fc, attn.v_fc, attn.out_fc))
        if plain is None:
            return None
        weights, biases = plain
        perceptron = None
        if type(ff) is FeedForward or (type(ff) is FrozenMlp and type(ff.act) is nn.ReLU):
            perceptron = weights_and_biases((self.ff_norm, ff.fc1, ff.fc2))
        if perceptron is not None:
            weights, biases = weights + perceptron[0], biases + perceptron[1]
        x, first = ray_block(x, weights, biases, kind[1], attn.num_heads, kind[0], self.attn_norm.eps, return_weights)
        if perceptron is None:
            x = x + ff(self.ff_norm(x))
        return x, first if return_weights else None


class GNT(nn.Module):
    """From what the source views show at the samples of a ray to the ray's colour.

    Args:
        depth: number of (view transformer, ray transformer) pairs.
        width: channels.
        feature_dim: channels of the source feature maps.
        num_heads: heads of the ray transformers.
        dropout: rate in attention and feed-forward networks while training.
        color_head: blend the projected source colours (`ImageColorHead`) instead of regressing the colour alone.
    """

    def __init__(
        self,
        depth: int = 4,
        width: int = 64,
        feature_dim: int = 32,
        num_heads: int = 4,
        dropout: float = 0.1,
        color_head: bool = False,
    ) -> None:
        super().__init__()
        self.rgbfeat_fc = nn.Sequential(nn.Linear(feature_dim + 3, width), nn.ReLU(), nn.Linear(width, width))
        self.view_crosstrans = nn.ModuleList(ViewTransformer(width, dropout) for _ in range(depth))
        self.view_selftrans = nn.ModuleList(RayTransformer(width, num_heads, dropout) for _ in range(depth))
        # Every second block is told again where its samples are and where the ray points.
        self.q_fcs = nn.ModuleList(
            nn.Sequential(nn.Linear(width + 2 * EMBEDDING_DIM, width), nn.ReLU(), nn.Linear(width, width))
            if i % 2 == 0
            else nn.Identity()
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.rgb_fc = nn.Linear(width, 3)
        self.color_head = ImageColorHead(width, feature_dim) if color_head else None

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
        views, x = self._embed(samples)
        directions = F.normalize(directions, dim=-1)
        attention = embedding = None
        last = len(self.view_selftrans) - 1
        for i, (view_transformer, q_fc, ray_transformer) in enumerate(
            zip(self.view_crosstrans, self.q_fcs, self.view_selftrans, strict=True)
        ):
            x = view_transformer(x, views, samples.ray_diff, samples.mask)
            if i % 2 == 0:
                plain = None
                if uses_kernels("position_layer", x, points) and is_free([q_fc]):
                    first, _, second = q_fc.children()
                    plain = weights_and_biases((first, second))
                if plain is not None:
                    x = position_layer(x, points, directions, *plain)
                else:
                    embedding = _position_embedding(points, directions) if embedding is None else embedding
                    x = q_fc(torch.cat([x, embedding], dim=-1))
            x, attention = ray_transformer(x, return_weights=i == last and self.color_head is None)
        x = self.norm(x)
        regressed = self.rgb_fc(x.mean(dim=1))
        if self.color_head is None:
            assert attention is not None
            return regressed, attention
        return self.color_head(x, samples, regressed)

    def _embed(self, samples: PointSamples) -> tuple[Tensor, Tensor]:
        """What the views show, embedded, [R, S, V, width], and the first queries [R, S, width]."""
        head = [] if self.color_head is None else [self.color_head.consistency_fc]
        if uses_kernels("view_embedding", samples.values) and is_free((self.rgbfeat_fc, *head)):
            plain = weights_and_biases((self.rgbfeat_fc[0], self.rgbfeat_fc[2], *head))
            if plain is not None:
                return view_embedding(samples.values, samples.mask[..., 0], *plain)
        views = self.rgbfeat_fc(samples.values)
        x = views.amax(dim=2)
        return views, x if self.color_head is None else x + self.color_head.consistency(samples)


def _position_embedding(points: Tensor, directions: Tensor) -> Tensor:
    """[R, S, 126] of points [R, S, 3] and of the unit vectors [R, 3] along their rays."""
    along = sinusoidal_embedding(directions)[:, None].expand(-1, points.shape[1], -1)
    return torch.cat([sinusoidal_embedding(points), along], dim=-1)


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
register_frozen(FeedForward, FrozenMlp)
