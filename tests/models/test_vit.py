"""Additive attention in timm's models: what it computes, what carries over, and that the models train and save."""

# Wrong arguments on purpose, and attributes of submodules, to which torch gives no types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers import GluMlp
from timm.layers.mlp import SwiGLU
from timm.models.pvt_v2 import Attention as SpatialReductionAttention
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn
from warm import WORK, OpsOnWeights, work_inside

from shiftadd3d import UserError
from shiftadd3d.kernels import numerics
from shiftadd3d.nn import (
    MoELinear,
    MoEMlp,
    PackedShiftLinear,
    ShiftLinear,
    TokenConv,
    TokenConv2d,
    collect_moe_losses,
    fit_binarizers_,
    freeze_,
    recipe,
    reparameterize_,
)
from shiftadd3d.nn.shift import JointLayers


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def vit(**options) -> VisionTransformer:
    """A small one, on a grid of 4 x 4 patches unless told otherwise."""
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5} | options
    return VisionTransformer(**options)


def pvt(**options) -> nn.Module:
    options = {
        "embed_dims": (8, 16),
        "depths": (1, 1),
        "num_heads": (1, 2),
        "sr_ratios": (4, 1),
        "num_classes": 5,
    } | options
    return timm.models.pvt_v2.PyramidVisionTransformerV2(mlp_ratios=(2, 2), **options)


def additive(module: nn.Module, **changes) -> nn.Module:
    """The twin of an attention module that stands alone."""
    holder = nn.ModuleDict({"attn": copy.deepcopy(module)})
    reparameterize_(holder, recipe("add", **changes), verbose=False)
    return holder["attn"]


def linear_angular(q, k, v, mask=None, bias=None):
    """Attention of the signs of q and k in float64, from the definition, in the contrast that recipes give it."""
    q, k, v = ((q >= 0) * 2.0 - 1).double(), ((k >= 0) * 2.0 - 1).double(), v.double()

    def rows(cosine):
        similarity = 0.5 + cosine / math.pi
        similarity = similarity if bias is None else (similarity + bias).clamp(min=0)
        similarity = similarity if mask is None else similarity * mask
        return similarity / similarity.sum(-1, keepdim=True)

    cosine = q @ k.transpose(-2, -1) / q.shape[-1]
    flat = rows(0 * cosine)
    return (flat + recipe("add").contrast * (rows(cosine) - flat)) @ v


def by_hand(attention: Attention, x, mask=None, bias=None):
    """timm's own forward pass in float64, but for the attention map."""
    attention, x = copy.deepcopy(attention).double(), x.double()
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = linear_angular(attention.q_norm(q), attention.k_norm(k), v, mask, bias)
    out = attention.norm(out.transpose(1, 2).flatten(2))
    if attention.gate is not None:
        out = out * attention.gate(x).sigmoid()
    return attention.proj(out).float()


def test_the_classes_are_known_without_importing_anything_but_timm() -> None:
    assert "shiftadd3d.models.vit" in sys.modules
    report = reparameterize_(vit(), "add", verbose=False)
    assert [(layer.name, layer.after) for layer in report.layers] == [
        ("blocks.0.attn", "ViTAddAttention"),
        ("blocks.1.attn", "ViTAddAttention"),
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": True},
        {"qk_norm": True, "norm_layer": nn.LayerNorm},
        {"scale_norm": True, "norm_layer": nn.LayerNorm, "proj_bias": False},
        {"gated": True},
        {"attn_head_dim": 12, "dim_out": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["linear", "quadratic"])
def test_vit_attention_differs_from_timms_in_the_map_alone(options: dict, order: str) -> None:
    attention = Attention(48, num_heads=3, **options).eval()
    x = torch.randn(2, 17, 48)
    torch.testing.assert_close(additive(attention, order=order)(x), by_hand(attention, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 7), (2, 1, 7, 7), (2, 3, 7, 7), (1, 1, 1, 7)])
def test_masks_and_biases_are_those_of_scaled_dot_product_attention(shape: tuple) -> None:
    attention = Attention(48, num_heads=3).eval()
    twin, x = additive(attention), torch.randn(2, 7, 48)
    mask = torch.rand(shape) < 0.7
    mask[..., 0] = True
    torch.testing.assert_close(twin(x, attn_mask=mask), by_hand(attention, x, mask), rtol=1e-4, atol=1e-5)
    shut_out = torch.zeros(shape).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(twin(x, attn_mask=shut_out), twin(x, attn_mask=mask))
    bias = torch.randn(shape) * 0.2
    torch.testing.assert_close(twin(x, attn_mask=bias), by_hand(attention, x, bias=bias), rtol=1e-4, atol=1e-5)


def test_causal_tokens_see_none_after_them() -> None:
    attention = Attention(48, num_heads=3).eval()
    twin, x = additive(attention), torch.randn(2, 7, 48)
    out = twin(x, is_causal=True)
    for n in (1, 4):
        torch.testing.assert_close(twin(x[:, :n], is_causal=True), out[:, :n])
    with pytest.raises(UserError, match="exclude each other"):
        twin(x, attn_mask=torch.ones(7, 7, dtype=torch.bool), is_causal=True)


def test_masks_reach_the_attention_through_a_whole_model() -> None:
    model = vit(class_token=False, global_pool="avg").eval()
    reparameterize_(model, recipe("add", dwconv2d=0), verbose=False)
    model, x = model.double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    mask = torch.ones(2, 1, 1, 16, dtype=torch.bool)
    torch.testing.assert_close(model.forward_features(x, attn_mask=mask), model.forward_features(x))
    mask[..., 9:] = False
    assert not torch.allclose(model.forward_features(x, attn_mask=mask), model.forward_features(x))


@pytest.mark.parametrize(
    ("options", "prefix", "grid"),
    [
        ({}, 1, (4, 4)),
        ({"class_token": False, "global_pool": "avg"}, 0, (4, 4)),
        ({"reg_tokens": 4}, 5, (4, 4)),
        ({"img_size": (32, 64)}, 1, (4, 8)),
        ({"dynamic_img_size": True}, 1, None),
    ],
)
def test_the_convolution_is_over_the_patches_and_knows_the_tokens_before_them(options, prefix, grid) -> None:
    model = vit(**options)
    reparameterize_(model, recipe("add", dwconv2d=5), verbose=False)
    conv = model.blocks[0].attn.dwconv
    assert isinstance(conv, TokenConv2d) and conv.weight.shape == (48, 1, 5, 5) and not conv.weight.any()
    assert (conv.num_prefix_tokens, conv.grid) == (prefix, grid)
    size = options.get("img_size", 32)
    assert model(torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size)))).shape == (2, 5)


def test_distilled_models_have_two_tokens_before_the_patches() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1)
    reparameterize_(model, "add", verbose=False)
    assert model.blocks[0].attn.dwconv.num_prefix_tokens == 2
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def additive_vit(img_size: int | tuple[int, int], **options) -> nn.Module:
    """One whose convolutions on the values count, with the same weights for any size of images."""
    torch.manual_seed(0)
    model = vit(img_size=img_size, pos_embed="none", **options)
    reparameterize_(model, "add", verbose=False)
    for block in model.blocks:
        nn.init.normal_(block.attn.dwconv.weight, std=0.3)
    return model.eval()


SIZES = ((32, 64), (64, 32), (48, 48), (32, 64))


def test_the_convolution_follows_images_of_changing_sizes() -> None:
    model = additive_vit(32, dynamic_img_size=True)
    with torch.no_grad():
        for size in SIZES:
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(model(x), additive_vit(size)(x))


def test_the_convolution_follows_the_size_that_a_model_is_set_to() -> None:
    model = additive_vit(32)
    with torch.no_grad():
        for size in SIZES:
            model.set_input_size(size)
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(model(x), additive_vit(size)(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_know_the_grids_of_their_own_images(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = additive_vit(32, dynamic_img_size=True)
    wide, high = torch.randn(2, 3, 32, 64), torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        expected = model(wide)
        twin = copied(model)
        model(high)
        assert twin.blocks[0].attn.dwconv.grid == (4, 8)
        freeze_(twin, verbose=False)
        torch.testing.assert_close(twin(wide), expected, rtol=1e-3, atol=1e-4)
    assert model.blocks[0].attn.dwconv.grid == (8, 4)


def test_models_of_changing_sizes_compile_and_export() -> None:
    model = additive_vit(32, depth=1, dynamic_img_size=True)
    with torch.no_grad():
        images = [torch.randn(2, 3, *size) for size in SIZES[:2]]
        expected = [model(x) for x in images]
        compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
        auto = torch.export.Dim.AUTO
        program = torch.export.export(copy.deepcopy(model), (images[0],), dynamic_shapes=({2: auto, 3: auto},)).module()
        for x, logits in zip(images, expected, strict=True):
            torch.testing.assert_close(compiled(x), logits)
            torch.testing.assert_close(program(x), logits)


@pytest.mark.parametrize("surroundings", ["none", "patch dropout"])
def test_where_no_grid_is_known_the_convolution_is_along_the_sequence(surroundings: str) -> None:
    model = vit(patch_drop_rate=0.5) if surroundings == "patch dropout" else nn.Sequential(Block(48, 3))
    reparameterize_(model, recipe("add", dwconv=7), verbose=False)
    attn = model.blocks[0].attn if surroundings == "patch dropout" else model[0].attn
    assert isinstance(attn.dwconv, TokenConv) and attn.dwconv.kernel_size == 7
    x = torch.randn(2, 3, 32, 32) if surroundings == "patch dropout" else torch.randn(2, 10, 48)
    assert torch.isfinite(model.train()(x)).all()


@pytest.mark.parametrize("inner", ["blocks.0.attn", "vit.blocks.0.attn"])
def test_the_model_is_found_around_its_attention_wherever_it_stands(inner: str) -> None:
    model = vit(reg_tokens=2) if inner.startswith("blocks") else nn.ModuleDict({"vit": vit(reg_tokens=2)})
    reparameterize_(model, "add", verbose=False)
    assert model.get_submodule(inner).dwconv.num_prefix_tokens == 3


@pytest.mark.parametrize("options", [{"sr_ratio": 1}, {"sr_ratio": 2}, {"sr_ratio": 4}, {"linear_attn": True}], ids=str)
def test_pvt_attention_differs_from_timms_in_the_map_alone(options: dict) -> None:
    attention = SpatialReductionAttention(32, num_heads=2, **options).eval()
    x, size = torch.randn(2, 8 * 12, 32), (8, 12)
    twin = additive(attention)
    reference = copy.deepcopy(attention).double()
    reference.fused_attn = True
    calls = []

    def attend(q, k, v, dropout_p):
        calls.append(k.shape)
        return linear_angular(q, k, v)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        expected = reference(x.double(), size)
    torch.testing.assert_close(twin(x, size).double(), expected, rtol=1e-4, atol=1e-5)
    assert calls == [(2, 2, 49 if "linear_attn" in options else 96 // options["sr_ratio"] ** 2, 16)]


def test_the_pvt_convolution_brings_each_query_what_is_near_it() -> None:
    """With the middle tap alone, a query gets the value of the cell of the reduced grid that it lies in."""
    attention = SpatialReductionAttention(32, num_heads=2, sr_ratio=4).eval()
    twin, x = additive(attention), torch.randn(2, 8 * 12, 32)
    plain = twin(x, (8, 12))
    nn.init.zeros_(twin.dwconv.weight)
    twin.dwconv.weight.data[:, 0, 1, 1] = 1
    reduced, grid = twin.reduce(x, (8, 12))
    assert grid == (2, 3)
    near = twin.v_fc(reduced).unflatten(1, grid).repeat_interleave(4, 1).repeat_interleave(4, 2).flatten(1, 2)
    torch.testing.assert_close(twin(x, (8, 12)) - plain, F.linear(near, twin.out_fc.weight), rtol=1e-4, atol=1e-5)


def test_weights_carry_over_and_what_can_be_is_shared() -> None:
    model = vit(qkv_bias=True, qk_norm=True)
    model.blocks[0].attn.qkv.weight.requires_grad = False
    model.eval()
    before = model.blocks[0].attn
    reparameterize_(model, "add", verbose=False)
    after = model.blocks[0].attn
    fcs = (after.q_fc, after.k_fc, after.v_fc)
    assert torch.equal(torch.cat([fc.weight for fc in fcs]), before.qkv.weight)
    assert torch.equal(torch.cat([fc.bias for fc in fcs]), before.qkv.bias)
    assert not any(fc.weight.requires_grad or fc.training for fc in fcs) and after.q_fc.bias.requires_grad
    assert after.out_fc is before.proj and after.q_norm is before.q_norm and after.k_norm is before.k_norm


def test_rates_of_dropout_carry_over() -> None:
    model = vit(attn_drop_rate=0.2, proj_drop_rate=0.3)
    reparameterize_(model, "add", verbose=False)
    attn = model.blocks[0].attn
    assert (attn.attn_dropout, attn.dropout) == (0.2, 0.3)
    x = torch.randn(2, 17, 48)
    assert not torch.equal(attn(x), attn(x))
    attn.eval()
    assert torch.equal(attn(x), attn(x))
    with pytest.raises(UserError, match=r"blocks\.0\.attn .*quadratic"):
        reparameterize_(vit(attn_drop_rate=0.2), recipe("add", order="linear"), verbose=False)


def test_projections_that_cannot_be_split_are_named() -> None:
    model = vit()
    reparameterize_(
        model, "add+shift-attn", filter_fn=lambda module, name: isinstance(module, nn.Linear), verbose=False
    )
    assert isinstance(model.blocks[0].attn.qkv, ShiftLinear)
    with pytest.raises(UserError, match=r"blocks\.0\.attn \(Attention\): .*ShiftLinear, which cannot be split"):
        reparameterize_(model, "add", verbose=False)


def test_perceptrons_that_look_around_become_mixtures_layer_by_layer() -> None:
    model = pvt()
    reparameterize_(model, "moe", verbose=False)
    mlp = model.stages[0].blocks[0].mlp
    assert isinstance(mlp.fc1, MoELinear) and isinstance(mlp.fc2, MoELinear) and type(mlp.dwconv) is nn.Conv2d


@pytest.mark.parametrize("mlp_layer", [SwiGLU, GluMlp])
def test_gated_perceptrons_are_perceptrons(mlp_layer: type) -> None:
    model = vit(mlp_layer=mlp_layer)
    reparameterize_(model, "add+shift-attn+moe", verbose=False)
    assert isinstance(model.blocks[0].mlp, MoEMlp)
    assert torch.isfinite(model(torch.randn(2, 3, 32, 32))).all()


@pytest.mark.parametrize(("name", "layers"), [("deit_tiny_patch16_224", 72), ("pvt_v2_b0", 56)])
def test_models_of_timm_train_a_step_and_come_back_from_a_file(name: str, layers: int, tmp_path) -> None:
    def make() -> nn.Module:
        model = timm.create_model(name, num_classes=5, **({"img_size": 64} if name.startswith("deit") else {}))
        report = reparameterize_(model, "add+shift-attn+moe", verbose=False)
        assert len(report.layers) == layers
        return model

    model, images = make(), torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = F.cross_entropy(model(images), torch.tensor([0, 3])) + 0.01 * collect_moe_losses(model)
    loss.backward()
    without = [n for n, parameter in model.named_parameters() if parameter.grad is None]
    assert not without and torch.isfinite(loss)
    optimizer.step()
    model.eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = make().eval()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
        assert torch.equal(copy.deepcopy(model)(images), model(images))


@pytest.mark.parametrize("binarizer", ["random", "hash"])
@pytest.mark.parametrize("make", [vit, pvt])
def test_other_codes_reach_the_models(make, binarizer: str) -> None:
    model = make()
    reparameterize_(model, recipe("add", binarizer=binarizer, code_dim=6, share_codes=True), verbose=False)
    attn = (model.blocks if make is vit else model.stages[0].blocks)[0].attn
    assert attn.q_code.code_dim == 6 and attn.k_code is None
    model(torch.randn(2, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize("make", [vit, pvt])
def test_hash_functions_are_fitted_on_labelled_images(make) -> None:
    model = make()
    reparameterize_(model, recipe("add", binarizer="hash", code_dim=8), verbose=False)
    loader = [(torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.long))]
    report = fit_binarizers_(model, loader, forward=lambda model, batch: model(batch[0]), verbose=False)
    assert len(report.layers) == 2 and all(layer.after > layer.before for layer in report.layers)


@pytest.mark.parametrize("make", [vit, pvt])
def test_models_compile_and_export(make) -> None:
    model = make(depth=1) if make is vit else make()
    reparameterize_(model, recipe("add", binarizer="hash"), verbose=False)
    model.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


def test_attention_of_other_families_is_left_alone_and_listed() -> None:
    model = timm.create_model("vit_relpos_small_patch16_224", img_size=32, depth=1)
    report = reparameterize_(model, "add+shift-attn", verbose=False)
    assert not report.layers
    assert any(layer.name == "blocks.0.attn.qkv" for layer in report.untouched)


# --------------------------------------------------------------------------------------------------------------------
# Frozen, on kernels
# --------------------------------------------------------------------------------------------------------------------


def frozen(make, binarizer: str = "sign") -> nn.Module:
    """A frozen model whose convolutions on the values, which start at zero, count."""
    model = make()
    reparameterize_(model, recipe("add+shift", binarizer=binarizer), verbose=False)
    for module in model.modules():
        if isinstance(module, TokenConv2d):
            nn.init.normal_(module.weight, std=0.3)
    freeze_(model.eval(), verbose=False)
    return model


def operations(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """How often a model calls each op of ours."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model(x)
    events = profiler.key_averages()
    return {e.key.removeprefix("shiftadd3d::"): e.count for e in events if e.key.startswith("shiftadd3d::")}


@pytest.mark.parametrize("binarizer", ["sign", "hash"])
@pytest.mark.parametrize(("make", "side"), [(vit, 32), (pvt, 64)])
def test_frozen_models_compute_on_kernels_what_plain_torch_does(make, side: int, binarizer: str):
    model, x = frozen(make, binarizer), torch.randn(2, 3, side, side)
    with torch.no_grad():
        with numerics("twin"):
            expected = model(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


def test_a_block_of_a_frozen_vit_is_five_ops():
    with torch.no_grad():
        found = operations(frozen(vit), torch.randn(2, 3, 32, 32))
    # Queries, keys and values are one product, as the output is, and the perceptron another op.
    assert found == {"matshift": 2 * 2, "add_attention": 2, "depthwise_conv": 2, "shift_mlp": 2}


@pytest.mark.parametrize(("make", "side"), [(vit, 32), (pvt, 64)])
def test_a_warm_forward_pass_only_reads_its_weights(make, side: int):
    model, x = frozen(make), torch.randn(2, 3, side, side)
    with torch.no_grad():
        model(x)
        packed = [module for module in model.modules() if isinstance(module, PackedShiftLinear | JointLayers)]
        with OpsOnWeights(nn.ModuleList(packed)) as ops:
            model(x)
        inside = work_inside({"matshift", "add_attention", "shift_mlp"}, lambda: model(x))
    assert {op for op in ops.on_weights if not op.startswith("shiftadd3d::")} <= {"aten::slice", "aten::alias"}
    assert not ops.of_double
    assert not WORK & {event.name for event in inside}


@pytest.mark.parametrize("change", ["load", "move", "copy", "train", "hook", "replace"])
def test_joint_projections_are_those_of_the_layers(change: str):
    model, other = frozen(vit), frozen(vit)
    attention, x = model.blocks[0].attn, torch.randn(2, 5, 48)
    if change == "load":
        model.load_state_dict(other.state_dict())
    elif change == "move":
        attention = attention.to(torch.bfloat16).float()
    elif change == "copy":
        attention = copy.deepcopy(attention)
    elif change == "train":
        attention.train().eval()
    elif change == "hook":
        attention.k_fc.register_forward_hook(lambda module, given, out: 2 * out)
    elif change == "replace":
        attention.v_fc = nn.Linear(48, 48)
    with torch.no_grad():
        found = attention.project(x, x)
        alone = (attention.split_heads(layer(x)) for layer in (attention.q_fc, attention.k_fc, attention.v_fc))
        for one, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(one, expected)


def test_a_frozen_pvt_convolves_tokens():
    with torch.no_grad():
        found = operations(frozen(pvt), torch.randn(2, 3, 64, 64))
    # On values and within perceptrons. The first block reads its keys and values from fewer tokens than its queries.
    assert (found["add_attention"], found["shift_conv_mlp"], found["depthwise_conv"]) == (2, 2, 4)
    first, second = (3 + 2, 2 + 2)  # products: attention's and the perceptron's
    assert found["matshift"] == first + second


@pytest.mark.parametrize(("make", "side"), [(vit, 32), (pvt, 64)])
def test_frozen_models_on_kernels_compile_and_export(make, side: int):
    model, x = frozen(make), torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
        batch = torch.export.Dim("batch")
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
        torch.testing.assert_close(program(x), expected)
        assert program(torch.cat((x, x))).shape == (4, 5)


def test_a_frozen_attention_with_what_kernels_do_not_have_runs_in_plain_torch():
    model = frozen(vit)
    attention, x = model.blocks[0].attn, torch.randn(2, 17, 48)
    attention.dwconv = None  # it looks ahead
    with torch.no_grad():
        expected = attention(x)
        everything = torch.ones(17, 17, dtype=torch.bool)
        torch.testing.assert_close(attention(x, attn_mask=everything), expected, rtol=1e-4, atol=1e-5)
        causal = attention(x, is_causal=True)
        x[:, 9:] = 0
        torch.testing.assert_close(attention(x, is_causal=True)[:, :8], causal[:, :8], rtol=1e-4, atol=1e-5)
