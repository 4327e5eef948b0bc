"""Vision transformers of timm: additive attention for ViT and DeiT, and for PVT v2.

Importing timm loads this module, so `reparameterize_` knows these classes. Weights carry over. The additive modules are
called like timm's own.

A trained softmax and the linear-angular map that replaces it both average values, row by row. So the inputs of the
output projection keep their size, and no scale must be set. But contrast is lost: the map weighs no key more than 4.5
times as much as another one, and the information from a token's neighbours is hidden by the mean over the image. Two
things restore it. A learned factor for each head multiplies the difference of outputs from that mean
(`Recipe.contrast`). And there is a convolution on the values, over the grid of patches if it is known. It starts at
zero, so that a new layer does what its attention does. Before fine-tuning, codes that agree where the softmax was high
also help: with ``binarizer="hash"``, `fit_binarizers_` makes such codes.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2 and table 3. The attention that is replaced is that of
Dosovitskiy et al., ViT (ICLR 2021), Touvron et al., DeiT (ICML 2021), and Wang et al., PVT v2 (2022), section 3.2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import HybridEmbed, Mlp, PatchEmbed
from timm.layers.mlp import SwiGLU
from timm.models import (
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    is_model,
    list_models,
    model_entrypoint,
    pvt_v2,
    register_model,
)
from timm.models._pretrained import DefaultCfg
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.fx import Proxy

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.whole import grids, tokens
from shiftadd3d.kernels.whole.parts import NormWeights
from shiftadd3d.kernels.whole.program import Value
from shiftadd3d.nn import (
    AddAttention,
    FrozenConvMlp,
    FrozenMlp,
    Recipe,
    TokenConv2d,
    register_attention,
    register_frozen,
    register_mlp,
    reparameterize_,
)
from shiftadd3d.nn.compiled import Emission, grid_convolution, register_emitter, register_harmless_hook
from shiftadd3d.nn.tracing import one_node


class ViTAddAttention(AddAttention):
    """Replaces timm's `Attention`, in ViT, DeiT and other models that use it.

    Norms of queries and keys, and gate and norm of the output, are kept. An additive float mask becomes an attention
    bias (see `linear_add_attention`): minus infinity leaves a key out, as before a softmax.
    """

    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Module | None

    @classmethod
    def from_attention(cls, attention: Attention, **options) -> ViTAddAttention:
        """The additive twin of `attention`.

        It shares modules with it where possible. `options` go to `AddAttention`.
        """
        q, k, v = _split(attention.qkv, 3)
        layer = cls.from_projections(
            q,
            k,
            v,
            attention.proj,
            attention.num_heads,
            dropout=attention.proj_drop.p,
            attn_dropout=attention.attn_drop.p,
            **options,
        )
        layer.q_norm, layer.k_norm, layer.norm = attention.q_norm, attention.k_norm, attention.norm
        layer.gate = attention.gate
        return layer

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend within each image.

        Args:
            x: [B, N, C].
            attn_mask: bool, True where a key counts, or float, added to the similarities; broadcasts to [B, H, N, N].
            is_causal: tokens attend to those before them only.

        Returns:
            [B, N, C'].
        """
        if isinstance(x, Proxy):
            return one_node(self, x, attn_mask, is_causal)
        q, k, v = self.project(x, x)
        mask, bias = _mask_and_bias(attn_mask, is_causal, x)
        out, _ = self.attend(self.q_norm(q), self.k_norm(k), v, mask, bias)
        out = self.norm(self.add_convolution(out, v).transpose(1, 2).flatten(-2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return F.dropout(self.out_fc(out), self.dropout, self.training)


def _mask_and_bias(attn_mask: Tensor | None, is_causal: bool, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A mask as `F.scaled_dot_product_attention` takes it, as a bool mask or a bias of 4 dimensions."""
    if is_causal:
        if attn_mask is not None:
            raise UserError("attn_mask and is_causal exclude each other: put both into one mask")
        attn_mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    if attn_mask is None:
        return None, None
    attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    return (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)


class SpatialReductionAddAttention(AddAttention):
    """Replaces PVT v2's `Attention`, in which every token attends to a reduced grid of tokens.

    The reduction (a strided convolution, or pooling in the linear variant) is kept. The convolution on the values works
    on the reduced grid. Each query takes its outcome at the place of the query.
    """

    sr: nn.Module | None
    norm: nn.Module | None
    pool: nn.Module | None
    act: nn.Module | None

    @classmethod
    def from_attention(cls, attention: pvt_v2.Attention, **options) -> SpatialReductionAddAttention:
        """The additive twin of `attention`.

        It shares modules with it where possible. `options` go to `AddAttention`.
        """
        k, v = _split(attention.kv, 2)
        layer = cls.from_projections(
            attention.q,
            k,
            v,
            attention.proj,
            attention.num_heads,
            dropout=attention.proj_drop.p,
            attn_dropout=attention.attn_drop.p,
            **options,
        )
        layer.sr, layer.norm, layer.pool, layer.act = attention.sr, attention.norm, attention.pool, attention.act
        return layer

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        """Attend from each token of an image to the reduced ones.

        Args:
            x: [B, N, C], the grid row by row.
            feat_size: height and width of the grid, N = height * width.

        Returns:
            [B, N, C].
        """
        if isinstance(x, Proxy):
            return one_node(self, x, feat_size)
        reduced, grid = self.reduce(x, feat_size)
        q, k, v = self.project(x, reduced)
        out, _ = self.attend(q, k, v)
        out = out.transpose(1, 2).flatten(-2)
        if isinstance(self.dwconv, TokenConv2d):
            out = out + self._at_queries(self.dwconv(v, grid).transpose(1, 2).flatten(-2), grid, feat_size)
        return F.dropout(self.out_fc(out), self.dropout, self.training)

    def _at_queries(self, local: Tensor, grid: tuple[int, int], feat_size: tuple[int, int]) -> Tensor:
        """Of reduced tokens [B, M, C], the one where each query lies, [B, N, C]."""
        if grid == tuple(feat_size):
            return local
        image = local.transpose(1, 2).unflatten(-1, grid)
        return F.interpolate(image, feat_size).flatten(2).transpose(1, 2)

    def reduce(self, x: Tensor, feat_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """The tokens attended to, [B, M, C], and their grid."""
        if self.sr is None or self.norm is None:
            return x, feat_size
        image = x.transpose(1, 2).unflatten(-1, tuple(feat_size))
        if self.pool is not None:
            image = self.pool(image)
        image = self.sr(image)
        reduced = self.norm(image.flatten(2).transpose(1, 2))
        return reduced if self.act is None else self.act(reduced), (image.shape[-2], image.shape[-1])


def _split(linear: nn.Module, parts: int) -> list[nn.Linear]:
    """A linear layer as `parts` ones, each with its share of the outputs."""
    if type(linear) is not nn.Linear:
        raise UserError(
            f"its projections are one {type(linear).__name__}, which cannot be split; only an nn.Linear can: make "
            "attention additive before, or together with, its linear layers"
        )
    size = linear.out_features // parts
    layers = []
    for i in range(parts):
        layer = nn.utils.skip_init(
            nn.Linear,
            linear.in_features,
            size,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        for own, whole in zip(layer.parameters(), linear.parameters(), strict=True):
            own.data.copy_(whole.data[i * size : (i + 1) * size])
            own.requires_grad_(whole.requires_grad)
        layers.append(layer.train(linear.training))
    return layers


class _TellGrid:
    """Pre-hook of a model's patch embedding. It tells a convolution on the values the grid of an image's patches.

    Blocks get tokens only. But images may have any size in a model with `dynamic_img_size`, and another size after
    `set_input_size`. It is an object, not a closure, so that it is copied and pickled with the model.
    """

    def __init__(self, conv: TokenConv2d) -> None:
        self.conv = conv

    def __call__(self, patch_embed: PatchEmbed | HybridEmbed, images: tuple[Tensor]) -> None:
        if isinstance(images[0], torch.fx.Proxy):  # it has no size
            if not patch_embed.strict_img_size:
                raise UserError("torch.fx cannot follow images of any size: make the model without dynamic_img_size")
            return
        height, width = images[0].shape[-2:]
        grid = patch_embed.dynamic_feat_size((height, width))
        # Where all images are of one size nothing is assigned: exporting strictly, torch would complain.
        if not patch_embed.strict_img_size or grid != self.conv.grid:
            self.conv.grid = grid


def _additive_attention(attention: Attention, recipe: Recipe, model: VisionTransformer | None) -> ViTAddAttention:
    options = recipe.add_options()
    # Where the patches lie only the model knows. Without one, or where it drops patches in training, tokens are the
    # sequence that they are in the paper's released code.
    if model is not None and isinstance(model.patch_drop, nn.Identity):
        grid = model.patch_embed.grid_size
        conv = _grid_conv(
            attention.attn_dim,
            recipe,
            num_prefix_tokens=model.num_prefix_tokens,
            grid=None if model.dynamic_img_size or grid is None else tuple(grid),
        )
        if isinstance(conv, TokenConv2d) and isinstance(model.patch_embed, (PatchEmbed, HybridEmbed)):
            model.patch_embed.register_forward_pre_hook(_TellGrid(conv))
        options["dwconv"] = conv
    return ViTAddAttention.from_attention(attention, **options)


def _additive_spatial_reduction(attention: pvt_v2.Attention, recipe: Recipe) -> SpatialReductionAddAttention:
    options = recipe.add_options() | {"dwconv": _grid_conv(attention.dim, recipe)}
    return SpatialReductionAddAttention.from_attention(attention, **options)


def _grid_conv(channels: int, recipe: Recipe, **layout) -> TokenConv2d | int:
    return TokenConv2d(channels, recipe.dwconv2d, **layout) if recipe.dwconv2d else 0


register_attention(Attention, _additive_attention, within=VisionTransformer)
register_attention(pvt_v2.Attention, _additive_spatial_reduction)
# A depthwise convolution between its linear layers looks at neighbours: an expert of its own could not.
register_mlp(pvt_v2.MlpWithDepthwiseConv, token_wise=False)
register_mlp(SwiGLU)
register_frozen(Mlp, FrozenMlp)
register_frozen(pvt_v2.MlpWithDepthwiseConv, FrozenConvMlp)


# --------------------------------------------------------------------------------------------------------------------
# As one executable
# --------------------------------------------------------------------------------------------------------------------


def _emit_vit(e: Emission, model: VisionTransformer, images: Value) -> Value:
    grid = _check_patches(e, model, images)
    added = torch.zeros(grid[0] * grid[1], model.embed_dim)
    given = [token[0] for token in (model.cls_token, model.reg_token) if token is not None]
    prefix = torch.cat([*given, added[:0]])
    if model.pos_embed is not None:
        of_prefix = 0 if model.no_embed_class else len(prefix)
        prefix = prefix + model.pos_embed[0, :of_prefix] if of_prefix else prefix
        added = model.pos_embed[0, of_prefix:].contiguous()
    patch = model.patch_embed.patch_size
    x = tokens.patches(e.program, images, e.weights(model.patch_embed.proj), patch, prefix.contiguous(), added)
    for block in model.blocks:
        x = e.emit(block, x, grid=grid)
    if model.attn_pool is not None or model.global_pool not in ("token", "avg"):
        raise e.refusal(model, f"with {model.global_pool or 'no'} pooling")
    is_mean = model.global_pool == "avg"
    first = model.num_prefix_tokens if is_mean and not model.pool_include_prefix else 0
    x = tokens.pool(e.program, x, mean=is_mean, first=first, norm=e.norm(model.norm))
    if type(model.head) is nn.Identity:
        norm = e.norm(model.fc_norm)
        x = x if norm is None else tokens.pool(e.program, x, mean=False, norm=norm)
    else:
        x = e.linear(model.head, x, e.norm(model.fc_norm))
    return e.program.reshape(x, (x.shape[0], x.shape[2]))


def _check_patches(e: Emission, model: VisionTransformer, images: Value) -> tuple[int, int]:
    """The grid that the patches of images lie on."""
    embed = model.patch_embed
    if type(embed) is not PatchEmbed or type(embed.norm) is not nn.Identity or not embed.flatten:
        raise e.refusal(embed, "which is not registered")
    if type(model.norm_pre) is not nn.Identity or model.grad_checkpointing:
        raise e.refusal(model, "with a norm before its blocks, or checkpoints")
    size = (embed.proj.in_channels, *cast(tuple[int, int], embed.img_size))
    if images.shape[1:] != size:
        raise UserError(f"the model takes pictures [batch, {', '.join(map(str, size))}], not {list(images.shape)}")
    return cast(tuple[int, int], embed.grid_size)


def _emit_block(e: Emission, block: Block, x: Value, *, grid: tuple[int, int]) -> Value:
    for scale in (block.ls1, block.ls2):
        if type(scale) is not nn.Identity:
            raise e.refusal(scale, "which is not registered")
    x = e.emit(block.attn, x, norm=e.norm(block.norm1), residual=x, grid=grid)
    return e.emit(block.mlp, x, norm=e.norm(block.norm2), residual=x)


def _check_attention(e: Emission, layer: ViTAddAttention | Attention) -> None:
    for part in (layer.q_norm, layer.k_norm, layer.norm):
        if type(part) is not nn.Identity:
            raise e.refusal(part, "which is not registered")
    if layer.gate is not None:
        raise e.refusal(layer.gate, "which is not registered")


def _emit_attention(
    e: Emission, layer: ViTAddAttention, x: Value, *, norm: NormWeights | None, residual: Value, grid: tuple[int, int]
) -> Value:
    _check_attention(e, layer)
    qkv = e.queries_keys_values(layer, x, norm)
    out = e.attention(layer, qkv)
    if layer.dwconv is not None:
        out = grid_convolution(e, layer.dwconv, qkv[-1], grid, out)
    return e.linear(layer.out_fc, out, None, residual)


def _emit_softmax(
    e: Emission, layer: Attention, x: Value, *, norm: NormWeights | None, residual: Value, grid: tuple[int, int]
) -> Value:
    _check_attention(e, layer)
    out = e.softmax_attention(layer, [e.linear(layer.qkv, x, norm)], layer.num_heads)
    return e.linear(layer.proj, out, None, residual)


def _emit_mlp(e: Emission, mlp: Mlp, x: Value, *, norm: NormWeights | None, residual: Value) -> Value:
    if type(mlp.norm) is not nn.Identity or type(mlp.fc1) is nn.Conv2d:
        raise e.refusal(mlp, "with a norm in it, or convolutions")
    return e.perceptron(mlp.fc1, mlp.act, mlp.fc2, x, norm, residual)


def _emit_pvt(e: Emission, model: pvt_v2.PyramidVisionTransformerV2, images: Value) -> Value:
    channels = model.patch_embed.proj.in_channels
    if len(images.shape) != 4 or images.shape[1] != channels:
        raise UserError(f"the model takes pictures [batch, {channels}, height, width], not {list(images.shape)}")
    x, grid = _emit_overlapping(e, model.patch_embed, images, cast(tuple[int, int], images.shape[2:]), None, True)
    norm = None  # that of the stage before, which the next one's first convolution does
    for stage in model.stages:
        if type(stage) is not pvt_v2.PyramidVisionTransformerStage or stage.grad_checkpointing:
            raise e.refusal(stage, "which is not registered")
        if stage.downsample is not None:
            x, grid = _emit_overlapping(e, stage.downsample, x, grid, norm, False)
        for block in stage.blocks:
            x = e.emit(block, x, grid=grid)
        norm = e.norm(stage.norm)
    if model.global_pool != "avg":
        raise e.refusal(model, "without pooling")
    x = tokens.pool(e.program, x, mean=True, norm=norm)
    x = x if type(model.head) is nn.Identity else e.linear(model.head, x)
    return e.program.reshape(x, (x.shape[0], x.shape[2]))


def _emit_overlapping(
    e: Emission, embed: nn.Module, x: Value, grid: tuple[int, int], norm: NormWeights | None, of_pictures: bool
) -> tuple[Value, tuple[int, int]]:
    if type(embed) is not pvt_v2.OverlapPatchEmbed:
        raise e.refusal(embed, "which is not registered")
    return e.convolution(embed.proj, x, grid, of_pictures, norm, e.norm(embed.norm))


def _emit_pvt_block(e: Emission, block: pvt_v2.Block, x: Value, *, grid: tuple[int, int]) -> Value:
    x = e.emit(block.attn, x, norm=e.norm(block.norm1), residual=x, grid=grid)
    return e.emit(block.mlp, x, norm=e.norm(block.norm2), residual=x, grid=grid)


def _emit_spatial_reduction(
    e: Emission,
    layer: SpatialReductionAddAttention,
    x: Value,
    *,
    norm: NormWeights | None,
    residual: Value,
    grid: tuple[int, int],
) -> Value:
    if layer.pool is not None or layer.act is not None:
        raise e.refusal(layer, "with pooling")
    if layer.sr is None or layer.norm is None:
        qkv = e.queries_keys_values(layer, x, norm)
        out = e.attention(layer, qkv)
        if layer.dwconv is not None:
            out = grid_convolution(e, layer.dwconv, qkv[-1], grid, out)
        return e.linear(layer.out_fc, out, None, residual)
    reduced, coarse = e.convolution(layer.sr, x, grid, False, norm, e.norm(layer.norm))
    qkv = e.queries_keys_values(layer, x, norm, reduced)
    out = e.attention(layer, qkv)
    if layer.dwconv is not None:
        local = grid_convolution(e, layer.dwconv, qkv[-1], coarse)
        out = grids.spread(e.program, out, local, coarse, grid)
    return e.linear(layer.out_fc, out, None, residual)


def _emit_softmax_reduction(
    e: Emission, layer: pvt_v2.Attention, x: Value, *, norm: NormWeights | None, residual: Value, grid: tuple[int, int]
) -> Value:
    if layer.pool is not None or layer.act is not None:
        raise e.refusal(layer, "with pooling")
    q = e.linear(layer.q, x, norm)
    if layer.sr is None or layer.norm is None:
        kv = e.linear(layer.kv, x, norm)
    else:
        reduced, _ = e.convolution(layer.sr, x, grid, False, norm, e.norm(layer.norm))
        kv = e.linear(layer.kv, reduced)
    return e.linear(layer.proj, e.softmax_attention(layer, [q, kv], layer.num_heads), None, residual)


def _emit_conv_mlp(
    e: Emission,
    mlp: pvt_v2.MlpWithDepthwiseConv,
    x: Value,
    *,
    norm: NormWeights | None,
    residual: Value,
    grid: tuple[int, int],
) -> Value:
    if type(mlp.relu) is not nn.Identity:
        raise e.refusal(mlp, "with a ReLU before its convolution")
    return e.conv_perceptron(mlp.fc1, mlp.dwconv, mlp.act, mlp.fc2, x, norm, residual, grid)


register_emitter(Mlp, _emit_mlp)
register_emitter(pvt_v2.PyramidVisionTransformerV2, _emit_pvt)
register_emitter(pvt_v2.Block, _emit_pvt_block)
register_emitter(SpatialReductionAddAttention, _emit_spatial_reduction)
register_emitter(pvt_v2.MlpWithDepthwiseConv, _emit_conv_mlp)
register_emitter(VisionTransformer, _emit_vit)
register_emitter(Block, _emit_block)
register_emitter(ViTAddAttention, _emit_attention)
register_emitter(Attention, _emit_softmax)
register_emitter(pvt_v2.Attention, _emit_softmax_reduction)
register_harmless_hook(_TellGrid)


# --------------------------------------------------------------------------------------------------------------------
# timm's registry
# --------------------------------------------------------------------------------------------------------------------

_LISTED = 4  # names in an error message


def check_known(name: str, others: tuple[str, ...] = ()) -> None:
    """Raise `UserError` unless timm has a model of this name. `others` are other names that are allowed."""
    if is_model(name):
        return
    close = [*others, *list_models(f"*{name.split('.')[0][:8]}*")[:_LISTED]]
    raise UserError(
        f"timm knows no model {name!r}; expected one of timm.list_models()"
        + (f", such as {', '.join(close)}" if close and not others else "")
        + (f", or {', '.join(close)}" if others else "")
    )


def input_size(name: str, others: tuple[str, ...] = ()) -> tuple[int, ...]:
    """Channels, rows and columns of the pictures for one of timm's models.

    Raises:
        UserError: there is no such model, or timm does not give the size; `others`: see `check_known`.
    """
    check_known(name, others)
    described = get_pretrained_cfg(name)
    if described is None:
        raise UserError(f"timm does not say what pictures {name} takes; expected a model that it describes")
    return tuple(described.input_size)


def create_model(name: str) -> nn.Module:
    """One of timm's models, with random weights and its own number of classes.

    Raises:
        UserError: there is no such model.
    """
    check_known(name)
    return model_entrypoint(name)(pretrained=False)


_PREFIX = "shiftadd_"
_DEFAULT_RECIPE = "add+shift-attn+moe"
_ARCHITECTURES = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "vit_tiny_patch16_224",
    *(f"pvt_v2_b{size}" for size in range(6)),
)


def _described(architecture: str) -> dict[str, DefaultCfg]:
    """timm's descriptions of an architecture's pretrained weights under our name; it is the same weights."""
    described = {}
    for name, config in get_arch_pretrained_cfgs(architecture).items():
        if config.hf_hub_id == "timm/":  # timm would append our name
            config = replace(config, hf_hub_id=f"timm/{name}")
        described[_PREFIX + name] = config
    return generate_default_cfgs(described)


# Where `register_model` looks.
default_cfgs = {name: config for architecture in _ARCHITECTURES for name, config in _described(architecture).items()}


def _register(architecture: str) -> None:
    """Let ``timm.create_model`` make `architecture` reparameterized, under its name with ``shiftadd_`` before it."""
    create_dense = model_entrypoint(architecture)

    def create(pretrained: bool = False, recipe: Recipe | str = _DEFAULT_RECIPE, **kwargs) -> nn.Module:
        model = create_dense(pretrained=pretrained, **kwargs)
        reparameterize_(model, recipe, verbose=False)
        return model

    create.__name__ = create.__qualname__ = _PREFIX + architecture
    create.__doc__ = (
        f"timm's {architecture}, with its arguments and its pretrained weights, made of shifts, adds and mixtures of "
        "experts.\n\n`recipe`: what `reparameterize_` makes of it, a `Recipe` or the name of a preset."
    )
    register_model(create)


for _architecture in _ARCHITECTURES:
    _register(_architecture)
