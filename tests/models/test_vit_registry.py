"""timm's registry as the front door: `timm.create_model("shiftadd_...")`."""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg

import shiftadd3d  # noqa: F401 what registers the models
from shiftadd3d import UserError
from shiftadd3d.nn import MoEMlp, ShiftLinear, recipe

NAMES = (
    "shiftadd_deit_tiny_patch16_224",
    "shiftadd_deit_small_patch16_224",
    "shiftadd_vit_tiny_patch16_224",
    *(f"shiftadd_pvt_v2_b{size}" for size in range(6)),
)
SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SMALL_PVT = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 2, 4)}


def small(name: str) -> dict:
    """Arguments that make a model of that name small."""
    return SMALL_PVT if "pvt" in name else SMALL_VIT


def test_timm_lists_the_models_and_where_their_weights_are():
    assert set(timm.list_models("shiftadd_*")) == set(NAMES)
    for name in NAMES:
        base = name.removeprefix("shiftadd_")
        ours, theirs = get_pretrained_cfg(name), get_pretrained_cfg(base)
        assert ours.has_weights and ours.input_size == theirs.input_size == (3, 224, 224)
        for tagged in timm.list_pretrained(f"{base}.*"):
            ours, theirs = get_pretrained_cfg(f"shiftadd_{tagged}"), get_pretrained_cfg(tagged)
            assert (ours.url, ours.tag, ours.mean) == (theirs.url, theirs.tag, theirs.mean)
            # timm makes the full address of its own lazily.
            assert ours.hf_hub_id in (theirs.hf_hub_id, f"timm/{tagged}")


@pytest.mark.parametrize("name", NAMES)
def test_each_model_is_made_and_trains_a_step(name: str):
    model = timm.create_model(name, num_classes=7, **small(name))
    kinds = {type(module).__name__ for module in model.modules()}
    assert "ShiftLinear" in kinds and ("ViTAddAttention" in kinds or "SpatialReductionAddAttention" in kinds)
    size = 64 if "pvt" in name else 32
    logits = model.train()(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    logits.square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "router" not in n and "experts" not in n)


def test_the_recipe_is_an_argument():
    name = "shiftadd_vit_tiny_patch16_224"
    additive = timm.create_model(name, recipe="add", **SMALL_VIT)
    assert not any(isinstance(module, (ShiftLinear, MoEMlp)) for module in additive.modules())
    finer = timm.create_model(name, recipe=recipe("add+shift", bits=5), **SMALL_VIT)
    assert {module.bits for module in finer.modules() if isinstance(module, ShiftLinear)} == {5}
    with pytest.raises(UserError, match="there is no recipe 'nonsense'"):
        timm.create_model(name, recipe="nonsense", **SMALL_VIT)


@pytest.mark.parametrize("name", ["shiftadd_deit_tiny_patch16_224", "shiftadd_pvt_v2_b0"])
def test_features_only(name: str):
    arguments = small(name) if "pvt" in name else {**SMALL_VIT, "depth": 3}  # timm takes the last three blocks
    backbone = timm.create_model(name, features_only=True, recipe="add+shift", **arguments)
    dense = timm.create_model(name.removeprefix("shiftadd_"), features_only=True, **arguments)
    images = torch.randn(2, 3, 64, 64) if "pvt" in name else torch.randn(2, 3, 32, 32)
    ours, theirs = backbone.eval()(images), dense.eval()(images)
    assert [feature.shape for feature in ours] == [feature.shape for feature in theirs]
    assert any(isinstance(module, ShiftLinear) for module in backbone.modules())


def test_pretrained_weights_are_the_dense_ones_reparameterized(monkeypatch: pytest.MonkeyPatch):
    dense = timm.create_model("deit_tiny_patch16_224", **SMALL_VIT)
    from timm.models import _builder

    def load(model, **options):
        model.load_state_dict(dense.state_dict())

    monkeypatch.setattr(_builder, "load_pretrained", load)
    model = timm.create_model("shiftadd_deit_tiny_patch16_224.fb_in1k", pretrained=True, recipe="add", **SMALL_VIT)
    q, _, v = dense.blocks[1].attn.qkv.weight.chunk(3)
    attention = model.blocks[1].attn
    assert torch.equal(attention.q_fc.weight, q) and torch.equal(attention.v_fc.weight, v)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, dense.blocks[1].mlp.fc1.weight)


def test_a_checkpoint_loads_as_timms_scripts_load_theirs(tmp_path):
    name = "shiftadd_deit_tiny_patch16_224"
    model = timm.create_model(name, num_classes=3, **SMALL_VIT).eval()
    torch.save({"state_dict": model.state_dict(), "arch": name}, tmp_path / "last.pth.tar")
    loaded = timm.create_model(name, num_classes=3, checkpoint_path=str(tmp_path / "last.pth.tar"), **SMALL_VIT).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
