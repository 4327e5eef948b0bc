"""The parts of a GNT in their form for inference. Each reads panels of its weights and calls one op.

Importing this module registers them with `freeze_`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from shiftadd3d._errors import UserError, kind_of
from shiftadd3d.kernels.ops.gnt.color_blend import color_blend
from shiftadd3d.kernels.ops.gnt.gather import point_samples
from shiftadd3d.kernels.ops.gnt.plane_sweep import plane_sweep
from shiftadd3d.kernels.ops.gnt.position_layer import position_layer
from shiftadd3d.kernels.ops.gnt.ray_block import ray_block
from shiftadd3d.kernels.ops.gnt.view_attention import view_attention
from shiftadd3d.kernels.ops.gnt.view_embedding import view_embedding
from shiftadd3d.kernels.pack.gnt import color_blend as pack_color_blend
from shiftadd3d.kernels.pack.gnt import plane_sweep as pack_plane_sweep
from shiftadd3d.kernels.pack.gnt import position_layer as pack_position_layer
from shiftadd3d.kernels.pack.gnt import ray_block as pack_ray_block
from shiftadd3d.kernels.pack.gnt import view_attention as pack_view_attention
from shiftadd3d.kernels.pack.gnt import view_embedding as pack_view_embedding
from shiftadd3d.kernels.pack.panel import lanes_on
from shiftadd3d.kernels.pack.shift import panel_forms, panels_of_forms
from shiftadd3d.kernels.reference.gnt.plane_sweep import Network
from shiftadd3d.kernels.reference.gnt.ray_block import Attention
from shiftadd3d.kernels.runtime.targets import current
from shiftadd3d.models.gnt.color_head import ImageColorHead
from shiftadd3d.models.gnt.projection import PointLookUp, PointSamples, SourceViews, scene_of
from shiftadd3d.models.gnt.proposal import PlaneSweepProposal
from shiftadd3d.models.gnt.transformer import (
    GNT,
    FeedForward,
    PositionLayer,
    RayAttention,
    RayTransformer,
    ViewAttention,
)
from shiftadd3d.nn import AddAttention, FrozenMlp, FrozenModule, SignBinarizer, TokenConv, register_frozen
from shiftadd3d.nn.frozen import two_layers, weights_and_biases, whole_layers


class FrozenViewAttention(FrozenModule, ViewAttention):
    """`ViewAttention`, with products of its weights computed beforehand."""

    def derive(self) -> Mapping[str, Tensor]:
        layers: dict[str, nn.Module] = {"q_fc": self.q_fc, "k_fc": self.k_fc, "v_fc": self.v_fc}
        layers |= two_layers("pos_fc", self.pos_fc) | two_layers("attn_fc", self.attn_fc) | {"out_fc": self.out_fc}
        weights, biases = weights_and_biases(layers)
        if any(bias is not None for bias in biases[:3]):
            raise UserError("its queries, keys or values have a bias, and it runs as it is written")
        lanes = lanes_on(weights[0].device)
        panels = pack_view_attention.panels(weights, _given(biases[3:]), lanes)._asdict()
        shifts = whole_layers(layers[name] for name in ("k_fc", "v_fc", "attn_fc.0", "out_fc"))
        if shifts is not None:
            whole = pack_view_attention.shift_layers(*shifts, lanes=lanes)
            panels |= panels_of_forms(whole, pack_view_attention.shift_forms(current()))
        return panels

    def forward(self, query: Tensor, views: Tensor, ray_diff: Tensor, mask: Tensor) -> Tensor:
        if not self.runs("view_attention", query, views):
            return super().forward(query, views, ray_diff, mask)
        return view_attention(query, views, ray_diff, mask[..., 0], self.panels())


class FrozenRayTransformer(FrozenModule, RayTransformer):
    """`RayTransformer` as one op. The feed-forward network runs separately unless it is two plain layers."""

    attention: Attention
    has_perceptron: bool

    def derive(self) -> Mapping[str, Tensor]:
        attn, ff = self.attn, self.ff
        self.attention, conv = ("softmax", None) if type(attn) is RayAttention else _codes_and_convolution(attn)
        layers: dict[str, nn.Module] = {"attn_norm": self.attn_norm}
        layers |= {f"attn.{name}": attn.get_submodule(name) for name in ("q_fc", "k_fc", "v_fc", "out_fc")}
        weights, biases = weights_and_biases(layers)
        self.has_perceptron = False
        is_known = type(ff) is FeedForward or type(ff) is FrozenMlp
        if is_known and type(ff.act) is nn.ReLU and self.ff_norm.eps == self.attn_norm.eps:
            with contextlib.suppress(UserError):  # layers of other kinds run apart
                perceptron = weights_and_biases({"ff_norm": self.ff_norm, "ff.fc1": ff.fc1, "ff.fc2": ff.fc2})
                weights, biases = weights + perceptron[0], biases + perceptron[1]
                self.has_perceptron = True
        if self.has_perceptron:
            layers |= {"ff_norm": self.ff_norm, "ff.fc1": ff.fc1, "ff.fc2": ff.fc2}
        lanes = lanes_on(weights[0].device)
        panels = pack_ray_block.panels(weights, biases, conv, attn.num_heads, lanes)._asdict()
        shifts = whole_layers(layer for name, layer in layers.items() if not name.endswith("norm"))
        found = None if shifts is None else pack_ray_block.shift_layers(weights[0::5], shifts, attn.num_heads, lanes)
        of_forms = {} if found is None else panels_of_forms(found[1], panel_forms(current()))
        if found is not None and of_forms:
            panels |= {"norms": found[0], **of_forms}
        return panels

    def forward(self, x: Tensor, return_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        if not self.runs("ray_block", x):
            return super().forward(x, return_weights)
        eps, heads = self.attn_norm.eps, self.attn.num_heads
        x, first = ray_block(x, self.panels(), heads, self.attention, eps, return_weights)
        if not self.has_perceptron:
            x = x + self.ff(self.ff_norm(x))
        return x, first if return_weights else None


def _codes_and_convolution(attention: nn.Module) -> tuple[Attention, Tensor | None]:
    """Kind of the codes, and kernels [heads, taps] of the convolution on the values if there is one.

    Raises:
        UserError: if the attention takes other codes than signs, or convolves otherwise than along the sequence.
    """
    if type(attention) is not AddAttention:
        raise UserError(f"its attn is {kind_of(attention)}, which runs as it is written")
    conv, query_code, key_code = attention.dwconv, attention.q_code, attention.k_code
    if type(query_code) is not SignBinarizer or not (key_code is None or type(key_code) is SignBinarizer):
        raise UserError("its attention takes other codes than signs")
    if key_code is not None and key_code.codes != query_code.codes:
        raise UserError("its attention takes different codes for queries and keys")
    if attention.log_contrast is not None:
        raise UserError("its attention has a contrast")
    if not (conv is None or type(conv) is TokenConv):
        raise UserError(f"its attention has {kind_of(conv)}, which runs as it is written")
    return query_code.codes, None if conv is None else conv.weight.flatten(1)


class FrozenPositionLayer(FrozenModule, PositionLayer):
    """`PositionLayer`, embedding and layers as one op."""

    def derive(self) -> Mapping[str, Tensor]:
        weights, biases = weights_and_biases(two_layers("layers", self))
        self.outputs = weights[1].shape[0]
        return pack_position_layer.panels(weights, _given(biases), lanes_on(weights[0].device))._asdict()

    def forward(self, x: Tensor, points: Tensor, directions: Tensor) -> Tensor:
        if not self.runs("position_layer", x, points):
            return super().forward(x, points, directions)
        return position_layer(x, points, directions, self.panels(), self.outputs)


class FrozenGNT(FrozenModule, GNT):
    """`GNT` that embeds what views show as one op."""

    def embedding_layers(self) -> dict[str, nn.Module]:
        """The linear layers that embed."""
        layers = two_layers("rgbfeat_fc", self.rgbfeat_fc)
        if self.color_head is not None:
            layers["color_head.consistency_fc"] = self.color_head.consistency_fc
        return layers

    def derive(self) -> Mapping[str, Tensor]:
        weights, biases = weights_and_biases(self.embedding_layers())
        self.width = weights[1].shape[0]
        return pack_view_embedding.panels(weights, _given(biases), lanes_on(weights[0].device))._asdict()

    def parts(self) -> Iterable[nn.Module]:
        yield from self.rgbfeat_fc.modules()
        if self.color_head is not None:
            yield self.color_head.consistency_fc

    def embed(self, samples: PointSamples) -> tuple[Tensor, Tensor]:
        if not self.runs("view_embedding", samples.values):
            return super().embed(samples)
        return view_embedding(samples.values, samples.mask[..., 0], self.panels(), self.width)


class FrozenImageColorHead(FrozenModule, ImageColorHead):
    """`ImageColorHead` that blends colours as one op."""

    def blend_layers(self) -> dict[str, nn.Module]:
        """The linear layers that blend."""
        names = ("point_fc", "view_fc", "view_logit_fc", "sample_logit_fc")
        return {name: self.get_submodule(name) for name in names}

    def derive(self) -> Mapping[str, Tensor]:
        weights, biases = weights_and_biases(self.blend_layers())
        self.hidden = weights[0].shape[0]
        lanes = lanes_on(weights[0].device)
        return pack_color_blend.panels(weights, _given(biases), self.scales(), lanes)._asdict()

    def blend(self, x: Tensor, samples: PointSamples) -> tuple[Tensor, Tensor]:
        if not self.runs("color_blend", x, samples.values):
            return super().blend(x, samples)
        return color_blend(x, samples.values, samples.ray_diff, samples.mask[..., 0], self.panels(), self.hidden)


class FrozenPlaneSweepProposal(FrozenModule, PlaneSweepProposal):
    """`PlaneSweepProposal`, look-up and network as one op."""

    def derive(self) -> Mapping[str, Tensor]:
        weights, biases = weights_and_biases(two_layers("score", self.score))
        (hidden, last), (hidden_bias, last_bias) = weights, _given(biases)
        self.hidden = hidden.shape[0]
        scales = self.log_angle_scale.exp(), self.log_agreement_scale.exp()
        network = Network(hidden, hidden_bias, last, last_bias, *scales)
        return pack_plane_sweep.panels(network, lanes_on(hidden.device))._asdict()

    def sweep(self, points: Tensor, origins: Tensor, sources: SourceViews) -> tuple[Tensor, Tensor, Tensor]:
        feature_maps = sources.features[0]
        if not self.runs("plane_sweep", points, feature_maps):
            return super().sweep(points, origins, sources)
        return plane_sweep(*scene_of(points, origins, sources, feature_maps), self.panels(), self.hidden)


class FrozenPointLookUp(FrozenModule, PointLookUp):
    """`PointLookUp` as one op."""

    def derive(self) -> Mapping[str, Tensor]:
        return {}

    def forward(self, points: Tensor, target_center: Tensor, sources: SourceViews, maps: Tensor) -> PointSamples:
        if not self.runs("point_samples", points, maps):
            return super().forward(points, target_center, sources, maps)
        values, ray_diff, mask = point_samples(*scene_of(points, target_center, sources, maps))
        return PointSamples(values, ray_diff, mask.unsqueeze(-1))


def _given(biases: list[Tensor | None]) -> list[Tensor]:
    """The biases, of layers that all have one.

    Raises:
        UserError: if one of them has none.
    """
    given = [bias for bias in biases if bias is not None]
    if len(given) < len(biases):
        raise UserError("one of its layers has no bias, and it runs as it is written")
    return given


register_frozen(FeedForward, FrozenMlp)
register_frozen(ViewAttention, FrozenViewAttention)
register_frozen(RayTransformer, FrozenRayTransformer)
register_frozen(PositionLayer, FrozenPositionLayer)
register_frozen(GNT, FrozenGNT)
register_frozen(ImageColorHead, FrozenImageColorHead)
register_frozen(PlaneSweepProposal, FrozenPlaneSweepProposal)
register_frozen(PointLookUp, FrozenPointLookUp)
