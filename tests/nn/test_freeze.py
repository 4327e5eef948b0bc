"""`freeze_`: the same outputs bit for bit, from a fraction of the bytes."""

# Attributes of submodules, to which torch gives no types.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import copy
import json
import math

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shiftadd3d import UserError
from shiftadd3d.models.gnt.projection import PointSamples
from shiftadd3d.models.gnt.transformer import GNT
from shiftadd3d.nn import (
    RECIPES,
    AddAttention,
    FrozenMoE,
    MoE,
    MoELinear,
    MoEMlp,
    PackedShiftConv2d,
    PackedShiftLinear,
    Recipe,
    ShiftConv2d,
    ShiftLayer,
    ShiftLinear,
    collect_moe_losses,
    freeze_,
    recipe,
    reparameterize_,
)


class Net(nn.Module):
    """One of each, in every format."""

    def __init__(self, binarizer: str = "sign") -> None:
        super().__init__()
        self.patch = ShiftConv2d(3, 8, 2, bits=5)
        self.attn = AddAttention(8, 2, binarizer=binarizer, dwconv=3)
        self.attn.q_fc = ShiftLinear(8, 8, bits=3, mode="PS")
        self.attn.out_fc = MoELinear(8, 8, gate="probability", temperature=2.0)
        self.norm = nn.BatchNorm1d(8)
        self.mlp = MoEMlp(8, 16, shift={"mode": "PS", "terms": 2})
        self.drop = nn.Dropout(0.5)
        self.head = ShiftLinear(8, 3, terms=2)

    def forward(self, x):  # [B, 3, 8, 8] -> [B, 3]
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.attn(x)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.drop(x + self.mlp(x)).mean(1))


def trained(binarizer: str = "sign") -> Net:
    """After two steps on random numbers: weights that are no powers of two, statistics of a norm, a decided router."""
    torch.manual_seed(3)
    model = Net(binarizer)
    for _ in range(2):
        (model(torch.randn(4, 3, 8, 8)).square().mean() + collect_moe_losses(model)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return model


@pytest.mark.parametrize("binarizer", ["sign", "random", "hash"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_frozen_model_computes_what_it_did_in_evaluation_bit_for_bit(binarizer: str, grad: bool) -> None:
    model = trained(binarizer)
    x = torch.randn(5, 3, 8, 8)
    with torch.set_grad_enabled(grad):
        expected = copy.deepcopy(model).eval()(x)
        freeze_(model, verbose=False)
        assert torch.equal(model(x), expected)


def test_every_layer_becomes_its_packed_form() -> None:
    model = trained()
    freeze_(model, verbose=False)
    assert type(model.patch) is PackedShiftConv2d and type(model.head) is PackedShiftLinear
    assert type(model.attn.q_fc) is PackedShiftLinear and type(model.attn.k_fc) is nn.Linear
    assert type(model.mlp) is FrozenMoE and type(model.attn.out_fc) is FrozenMoE
    assert type(model.mlp.experts[0].fc1) is nn.Linear and type(model.mlp.experts[1].fc2) is PackedShiftLinear
    assert not any(isinstance(module, (ShiftLayer, MoE)) or module.training for module in model.modules())
    # No float copy of a weight is kept, not even after it was used.
    model(torch.randn(1, 3, 8, 8))
    held = [value for value in vars(model.head).values() if isinstance(value, torch.Tensor)]
    assert not held and {buffer.dtype for buffer in model.head.buffers()} == {torch.uint8, torch.int8, torch.float32}


def test_frozen_codes_have_no_gradient() -> None:
    model = trained("hash")
    codes = model.attn.q_code(torch.randn(1, 2, 3, 4, requires_grad=True))
    assert codes.requires_grad
    freeze_(model, verbose=False)
    assert not model.attn.q_code(torch.randn(1, 2, 3, 4, requires_grad=True)).requires_grad


def test_doing_it_twice_changes_nothing() -> None:
    model = trained()
    freeze_(model, verbose=False)
    modules = dict(model.named_modules())
    report = freeze_(model, verbose=False)
    assert report.layers == () and report.binarizers == 0 and report.bytes_before == report.bytes_after
    assert all(modules[name] is module for name, module in model.named_modules())
    assert freeze_(nn.Linear(2, 2), verbose=False).layers == ()


def test_the_report_counts_bytes(capsys: pytest.CaptureFixture) -> None:
    model = trained()
    report = freeze_(model)
    rows = {layer.name: layer for layer in report.layers}
    assert set(rows) == {
        "patch",
        "attn.q_fc",
        "attn.out_fc",
        "attn.out_fc.experts.1",
        "mlp",
        "mlp.experts.1.fc1",
        "mlp.experts.1.fc2",
        "head",
    }
    # 8 channels of 12 weights: float32, or 5 bits and an offset each; the bias stays.
    assert (rows["patch"].bytes_before, rows["patch"].bytes_after) == (8 * 12 * 4 + 32, 8 * (8 + 1) + 32)
    assert rows["mlp"].before == "MoEMlp" and rows["mlp"].after == "FrozenMoE"
    stored = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert report.bytes_after == stored < report.bytes_before and report.binarizers == 2
    assert f"{stored:,} after" in capsys.readouterr().out and "mlp.experts.1.fc1" in str(report)
    assert json.loads(json.dumps(report.as_dict()))["layers"][0]["name"] == "patch"


def test_a_module_in_two_places_stays_one_module() -> None:
    shared = ShiftLinear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, MoE([shared, nn.Identity()], 4))})
    report = freeze_(model, verbose=False)
    assert type(model["a"]) is PackedShiftLinear
    assert model["b"][0] is model["a"] and model["b"][1].experts[0] is model["a"]
    assert [layer.name for layer in report.layers] == ["a", "b.1"]


def test_all_that_cannot_be_frozen_is_listed_and_nothing_is_changed() -> None:
    model = trained()
    with torch.no_grad():
        model.mlp.experts[1].fc2.shift[0, 0, 0] = math.nan
        model.patch.weight[0] = math.inf
    model.head.register_forward_hook(lambda *_: None)
    before = dict(model.named_modules())
    with pytest.raises(UserError) as caught:
        freeze_(model, verbose=False)
    for complaint in (
        r"patch (ShiftConv2d): patch: the weight holds 12 of 96 values",
        r"mlp.experts.1.fc2 (ShiftLinear): mlp.experts.1.fc2: the weight holds",
        r"head (ShiftLinear): it has hooks",
    ):
        assert complaint in str(caught.value)
    assert all(before[name] is module for name, module in model.named_modules()) and model.training
    with pytest.raises(UserError, match="the model itself is a ShiftLinear"):
        freeze_(ShiftLinear(2, 2), verbose=False)


def gnt() -> tuple[nn.Module, tuple]:
    torch.manual_seed(0)
    rays, samples, views = 3, 5, 4
    projected = PointSamples(
        torch.randn(rays, samples, views, 3 + 8),
        torch.randn(rays, samples, views, 4),
        torch.ones(rays, samples, views, 1, dtype=torch.bool),
    )
    model = GNT(depth=2, width=16, feature_dim=8, num_heads=2)
    return model, (projected, torch.randn(rays, samples, 3), torch.randn(rays, 3))


def vit() -> tuple[nn.Module, tuple]:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_classes=5)
    return model, (torch.randn(2, 3, 32, 32),)


def pvt() -> tuple[nn.Module, tuple]:
    torch.manual_seed(0)
    model = timm.create_model("pvt_v2_b0", num_classes=5, depths=(1, 1, 1, 1))
    return model, (torch.randn(2, 3, 64, 64),)


def flat(out) -> torch.Tensor:
    return torch.cat([part.flatten() for part in out]) if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("make", [gnt, vit, pvt])
def test_models_of_every_recipe_freeze_and_load_from_a_file(make, name: str, tmp_path) -> None:
    chosen = recipe(name, other_linear="mult" if name == "mult" else "shift", dwconv=3)
    model, inputs = make()
    reparameterize_(model, chosen, verbose=False)
    with torch.no_grad():
        expected = flat(copy.deepcopy(model).eval()(*inputs))
        freeze_(model, verbose=False)
        assert torch.equal(flat(model(*inputs)), expected)
        save_file(model.state_dict(), tmp_path / "model.safetensors")

        fresh, _ = make()
        for parameter in fresh.parameters():
            parameter.add_(1.0)
        reparameterize_(fresh, chosen, verbose=False)
        freeze_(fresh, verbose=False)
        fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
        assert torch.equal(flat(fresh(*inputs)), expected)


def test_the_linear_layers_of_a_deit_tiny_take_less_than_3_2_megabytes_on_disk(tmp_path) -> None:
    model = timm.create_model("deit_tiny_patch16_224")
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    assert weights > 5.6e6
    shift = Recipe(attention_linear="shift", mlp="shift", other_linear="shift")
    reparameterize_(model, shift, verbose=False)
    report = freeze_(model, verbose=False)
    state = {name: tensor for name, tensor in model.state_dict().items() if "codes" in name or "offset" in name}
    biases = {f"{layer.name}.bias": model.get_submodule(layer.name).bias for layer in report.layers}
    save_file({**state, **biases}, tmp_path / "linear.safetensors")
    assert len(report.layers) == 4 * 12 + 2
    assert weights / 2 < (tmp_path / "linear.safetensors").stat().st_size < 3.2e6
