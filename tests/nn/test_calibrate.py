"""Calibration: rounding by what layers compute, from the single weight to the whole model."""

# Wrong arguments on purpose, and attributes of submodules, to which torch gives no types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shiftadd3d import UserError
from shiftadd3d.nn import (
    AddAttention,
    MoEMlp,
    Recipe,
    Rule,
    ShiftConv2d,
    ShiftLinear,
    calibrate_,
    power_of_two,
    recipe,
    register_attention,
    reparameterize_,
)
from shiftadd3d.nn.calibrate import CalibrationReport, round_with_compensation

FORMATS = [(bits, terms) for bits in range(2, 7) for terms in (1, 2)]
ALL_SHIFT = Recipe("all shift", attention_linear="shift", mlp="shift", other_linear="shift")


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_fc, self.k_fc, self.v_fc = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out_fc = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (fc(x).unflatten(-1, (2, -1)).transpose(1, 2) for fc in (self.q_fc, self.k_fc, self.v_fc))
        return self.out_fc(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(dim), Attention(dim), Mlp(dim)

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Net(nn.Module):
    """A small transformer; `spare` is never called."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(6, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))
        self.drop = nn.Dropout(0.5)
        self.head, self.spare = nn.Linear(dim, 3), nn.Linear(dim, 3)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(x))


@pytest.fixture(autouse=True)
def known_classes(monkeypatch: pytest.MonkeyPatch):
    from shiftadd3d.nn import reparam

    monkeypatch.setattr(reparam, "_attention_converters", dict(reparam._attention_converters))
    register_attention(
        Attention,
        lambda module, recipe: AddAttention.from_projections(
            module.q_fc, module.k_fc, module.v_fc, module.out_fc, 2, **recipe.add_options()
        ),
    )


def correlated(rows: int, features: int, rank: int) -> torch.Tensor:
    """Inputs as layers see them: a few directions carry most of it, and means are not zero."""
    mixing = torch.randn(rank, features) * torch.rand(features)
    return torch.randn(rows, rank) @ mixing + 0.2 * torch.randn(rows, features) + torch.randn(features)


def batches(count: int = 4) -> list[torch.Tensor]:
    """Sequences [8, 12, 6] from the same distribution in every call of a test."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(3, 6, generator=generator)
    return [torch.randn(8, 12, 3, generator=generator) @ mixing for _ in range(count)]


def output_error(model: nn.Module, reference: nn.Module, inputs: list[torch.Tensor]) -> float:
    with torch.no_grad():
        wanted = torch.cat([reference.eval()(x) for x in inputs])
        got = torch.cat([model.eval()(x) for x in inputs])
    return float((got - wanted).norm() / wanted.norm())


# ----------------------------------------------------------------------------------------------------------------------
# One weight
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "terms"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_layer_computes_with_the_very_codes_that_were_chosen(bits: int, terms: int, dtype: torch.dtype) -> None:
    weight = (torch.randn(24, 40) * 0.1).to(dtype)
    x = correlated(500, 40, 8).double()
    moments = x.T @ x / len(x)
    stored = round_with_compensation(weight, moments, bits, terms)
    quantized = power_of_two.quantize(stored, bits, terms)
    assert stored.dtype == dtype
    chosen = (stored != weight).any(1)
    assert chosen.float().mean() > 0.9 and torch.equal(quantized[chosen], stored[chosen])
    layer = ShiftLinear(40, 24, bits=bits, terms=terms).to(dtype).eval()
    with torch.no_grad():
        layer.weight.copy_(stored)
    assert torch.equal(layer.freeze().quantized_weight(dtype), quantized)
    trained = ShiftLinear.from_linear(layer.to_linear(), bits=bits, mode="PS", terms=terms)
    assert torch.equal(trained.quantized_weight(), quantized)


@pytest.mark.parametrize(("bits", "terms"), FORMATS)
def test_no_channel_is_worse_than_with_nearest_rounding(bits: int, terms: int) -> None:
    weight = torch.randn(64, 30) * torch.logspace(-4, 4, 64).unsqueeze(1)
    x = correlated(200, 30, 5).double()
    moments = x.T @ x / len(x) + 0.01 * x.square().mean() * torch.eye(30)  # as damped: that is what it minimises

    def error(rounded: torch.Tensor) -> torch.Tensor:
        difference = (weight - power_of_two.quantize(rounded, bits, terms)).double()
        return ((difference @ moments) * difference).sum(1)

    nearest, calibrated = error(weight), error(round_with_compensation(weight, x.T @ x / len(x), bits, terms))
    assert (calibrated <= nearest * (1 + 1e-5)).all()
    assert calibrated.div(nearest).log().mean().exp() < 0.5


def test_the_result_is_close_to_the_best_that_there_is() -> None:
    """All weights of a small format, tried one by one."""
    weight = torch.randn(16, 4)
    x = correlated(200, 4, 2).double()
    moments = x.T @ x / len(x)
    levels = [0.0, *(sign * 2.0**e for e in range(-4, 3) for sign in (-1, 1))]
    grid = torch.tensor(list(itertools.product(levels, repeat=4)))
    grid = grid[(power_of_two.quantize(grid, 3) == grid).all(1)]  # 3 bits: three exponents a row

    def error(difference: torch.Tensor) -> torch.Tensor:
        return ((difference.double() @ moments) * difference).sum(-1)

    best = error(weight.unsqueeze(1) - grid).amin(1)
    found = error(weight - power_of_two.quantize(round_with_compensation(weight, moments, 3, 1), 3))
    nearest = error(weight - power_of_two.quantize(weight, 3))
    assert (found - best).sum() < 0.35 * (nearest - best).sum()


def test_inputs_that_do_not_correlate_leave_nothing_to_make_up_for() -> None:
    weight = torch.randn(16, 20)
    stored = round_with_compensation(weight, torch.eye(20, dtype=torch.float64), 4, 1)
    difference = (weight - power_of_two.quantize(stored)).abs()
    # Each weight is at the nearest level of its row's window; only the window may be another one.
    assert (difference <= (weight - power_of_two.quantize(weight)).abs().amax(1, keepdim=True) + 1e-6).all()
    assert difference.square().sum() <= (weight - power_of_two.quantize(weight)).square().sum() * (1 + 1e-6)


@pytest.mark.parametrize("moments", [torch.zeros(6, 6), torch.ones(6, 6), -1e-9 * torch.eye(6)])
def test_moments_without_full_rank_work(moments: torch.Tensor) -> None:
    weight = torch.randn(5, 6)
    weight[2] = 0
    stored = round_with_compensation(weight, moments.double(), 4, 1)
    assert torch.isfinite(stored).all() and not stored[2].any()


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_inputs_far_from_zero_are_no_worse_than_with_nearest_rounding(offset: float) -> None:
    linear, x = nn.Linear(48, 32), torch.randn(400, 48)
    model = nn.Sequential(copy.deepcopy(linear))
    report = calibrate_(model, [x + offset], ALL_SHIFT, verbose=False)

    def error(weight: torch.Tensor) -> torch.Tensor:  # per channel, its mean left out
        change = (x - x.mean(0)).double() @ (weight - linear.weight).double().T
        return change.square().mean(0)

    nearest = error(power_of_two.quantize(linear.weight, 4, 1))
    assert (error(model[0].quantized_weight()) <= nearest * 1.01).all()
    assert report.layers[0].error > 0


def test_inputs_of_any_size_work() -> None:
    model = nn.Sequential(nn.Linear(12, 4))
    calibrate_(model, [torch.randn(40, 12) * 1e30], ALL_SHIFT, verbose=False)
    assert torch.isfinite(model[0].weight).all() and torch.isfinite(model[0].bias).all()
    with pytest.raises(UserError, match="too large"):
        round_with_compensation(torch.randn(5, 6), torch.full((6, 6), torch.inf).double(), 4, 1)


def test_empty_weights_work() -> None:
    assert round_with_compensation(torch.empty(0, 4), torch.eye(4).double(), 4, 1).shape == (0, 4)


# ----------------------------------------------------------------------------------------------------------------------
# A model
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [1, 2])
def test_a_calibrated_model_is_much_closer_to_the_float_one_than_a_nearest_rounded_one(terms: int) -> None:
    model, recipe = Net(), Recipe("all", "keep", "shift", "shift", "shift", terms=terms)
    nearest, calibrated = copy.deepcopy(model), copy.deepcopy(model)
    reparameterize_(nearest, recipe, verbose=False)
    report = calibrate_(calibrated, batches(), recipe, verbose=False)
    unseen = batches(8)[4:]
    assert output_error(calibrated, model, unseen) < 0.5 * output_error(nearest, model, unseen)
    assert [layer.name for layer in report.layers][:3] == ["embed", "blocks.0.attn.q_fc", "blocks.0.attn.k_fc"]
    assert all(layer.error < layer.nearest_error and layer.inputs == 4 * 8 * 12 for layer in report.layers)


def test_mode_ps_computes_the_same() -> None:
    model = Net()
    q, ps = copy.deepcopy(model), copy.deepcopy(model)
    calibrate_(q, batches(), ALL_SHIFT, verbose=False)
    report = calibrate_(ps, batches(), Recipe("ps", "keep", "shift", "shift", "shift", mode="PS"), verbose=False)
    assert ps.embed.mode == "PS" and report.reparameterization.recipe.mode == "PS"
    assert torch.equal(ps.eval()(batches()[0]), q.eval()(batches()[0]))
    assert isinstance(ps.embed, ShiftLinear) and ps.embed.sign.requires_grad


@pytest.mark.parametrize("mode", ["Q", "PS"])
def test_convolutions_over_patches_are_calibrated_like_linear_layers(mode: str) -> None:
    def net() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.GELU(), nn.Conv2d(16, 8, 1, bias=False))

    smooth = [F.interpolate(torch.randn(6, 3, 4, 4), scale_factor=4, mode="bilinear") for _ in range(3)]
    reference, nearest, calibrated = net(), net(), net()
    recipe = Recipe(other_linear="shift", mode=mode)
    reparameterize_(nearest, recipe, verbose=False)
    report = calibrate_(calibrated, smooth[:2], recipe, verbose=False)
    assert type(calibrated[0]) is ShiftConv2d and [layer.inputs for layer in report.layers] == [2 * 6 * 16] * 2
    assert output_error(calibrated, reference, smooth[2:]) < 0.5 * output_error(nearest, reference, smooth[2:])


def test_looking_at_rounded_layers_beats_looking_at_float_ones() -> None:
    torch.manual_seed(5)
    reference = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(24, 24), nn.ReLU())))
    inputs = [correlated(300, 24, 6) for _ in range(2)]
    recipe = Recipe(other_linear="shift", bits=2)
    one_pass, sequential = copy.deepcopy(reference), copy.deepcopy(reference)
    calibrate_(one_pass, inputs, recipe, sequential=False, verbose=False)
    calibrate_(sequential, inputs, recipe, verbose=False)
    assert output_error(sequential, reference, inputs) < output_error(one_pass, reference, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bias_takes_the_mean_of_the_error_away(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 4, bias=False)).to(dtype)
    reference, x = copy.deepcopy(model), correlated(400, 20, 5).to(dtype) + 3
    report = calibrate_(model, [x], ALL_SHIFT, verbose=False)
    drift = (model[0](x) - reference[0](x)).mean(0).abs().max()
    assert drift < 1e-4 and model[1].bias is None
    assert report.layers[0].error > 0
    assert not torch.equal(model[0].bias, reference[0].bias)


def test_the_shift_expert_is_calibrated_on_all_tokens_and_routers_split_by_latency() -> None:
    model = Net()
    recipe = Recipe("moe", mlp="moe", latencies=(3.0, 1.0))
    report = calibrate_(model, batches(), recipe, verbose=False)
    assert type(model.blocks[0].mlp) is MoEMlp
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["blocks.1.mlp.experts.1.fc2"].inputs == 4 * 8 * 12
    assert [router.name for router in report.routers] == ["blocks.0.mlp", "blocks.1.mlp"] and report.untuned == ()
    for router in report.routers:
        assert router.mult_share == pytest.approx(0.25, abs=0.02)  # 1 / latency
        assert router.caught_error > router.mult_share + 0.05  # better than sending a quarter at random
    shares = []
    for batch in batches():
        model.eval()(batch)
        shares.append(model.blocks[0].mlp.last_shares[0])
    assert torch.stack(shares).mean().item() == pytest.approx(0.25, abs=0.05)


def test_additive_attention_is_named_as_in_need_of_training() -> None:
    model = Net()
    report = calibrate_(model, batches(), "add+shift", verbose=False)
    assert type(model.blocks[0].attn) is AddAttention and type(model.blocks[0].attn.q_fc) is ShiftLinear
    assert [what.split(":")[0] for what in report.untuned] == ["blocks.0.attn", "blocks.1.attn"]
    assert "blocks.0.attn.q_fc" in {layer.name for layer in report.layers}


def test_hash_functions_are_fitted_to_what_the_float_model_attends_to() -> None:
    from shiftadd3d.nn import fit_binarizers_

    model = Net()
    wanted = copy.deepcopy(model)
    hashed = recipe("add+shift", binarizer="hash", dwconv=0)
    torch.manual_seed(7)
    report = calibrate_(model, batches(), hashed, verbose=False)
    torch.manual_seed(7)
    reparameterize_(wanted, recipe("add", binarizer="hash", dwconv=0), verbose=False)  # all linear layers float
    fit_binarizers_(wanted, batches(), verbose=False)
    assert [fitted.name for fitted in report.binarizers] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(fitted.after > fitted.before for fitted in report.binarizers)
    for block, reference in zip(model.blocks, wanted.blocks, strict=True):
        for name, tensor in reference.attn.q_code.state_dict().items():
            torch.testing.assert_close(block.attn.q_code.state_dict()[name], tensor)
    assert "blocks.0.attn: agreement" in str(report)


def test_contrast_is_fitted_to_what_the_float_model_attends_to() -> None:
    from shiftadd3d.nn import fit_contrast_

    model = Net()
    wanted = copy.deepcopy(model)
    report = calibrate_(model, batches(), recipe("add+shift", dwconv=0), verbose=False)
    reparameterize_(wanted, recipe("add", dwconv=0), verbose=False)  # all linear layers float
    fit_contrast_(wanted, batches(), verbose=False)
    assert [fitted.name for fitted in report.contrasts] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(fitted.error_after < fitted.error_before for fitted in report.contrasts)
    for block, reference in zip(model.blocks, wanted.blocks, strict=True):
        torch.testing.assert_close(block.attn.log_contrast, reference.attn.log_contrast)
    assert "contrast of blocks.0.attn: 16.0 before" in " ".join(str(report).split())
    report = calibrate_(Net(), batches(), recipe("add+shift", contrast=1), verbose=False)
    assert report.contrasts == ()


def test_attention_is_trained_in_floats_before_weights_are_rounded() -> None:
    def error(steps: int) -> tuple[float, CalibrationReport]:
        torch.manual_seed(0)
        model = Net().eval()
        wanted = torch.cat([model(batch) for batch in batches()])
        report = calibrate_(model, batches(), "add+shift", attention_steps=steps, verbose=False)
        return float((torch.cat([model(batch) for batch in batches()]) - wanted).square().mean()), report

    with torch.no_grad():
        (before, _), (after, report) = error(0), error(100)
    assert after < before
    assert [fitted.name for fitted in report.attentions] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(fitted.error_after < fitted.error_before for fitted in report.attentions)
    assert report.untuned == () and "outputs of blocks.0.attn" in " ".join(str(report).split())


def test_rules_decide_layer_by_layer() -> None:
    model = Net()
    rules = (Rule("blocks.*.mlp.fc1", "shift", bits=5, terms=2), Rule("head", "shift"))
    report = calibrate_(model, batches(), Recipe(rules=rules), verbose=False)
    assert {layer.name: (layer.bits, layer.terms) for layer in report.layers} == {
        "blocks.0.mlp.fc1": (5, 2),
        "blocks.1.mlp.fc1": (5, 2),
        "head": (4, 1),
    }


def test_layers_that_no_batch_reaches_are_rounded_to_the_nearest_and_listed() -> None:
    model = Net()
    before = model.spare.weight.detach().clone()
    report = calibrate_(model, batches(), ALL_SHIFT, verbose=False)
    assert report.unreached == ("spare",) and "spare" in str(report)
    assert torch.equal(model.spare.quantized_weight(), power_of_two.quantize(before))


def test_a_weight_in_two_layers_is_rounded_once_and_a_layer_in_two_places_on_all_it_sees() -> None:
    shared, tied = nn.Linear(8, 8), nn.Linear(8, 8)
    tied.weight = shared.weight
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), tied)
    report = calibrate_(model, [torch.randn(10, 8)], ALL_SHIFT, verbose=False)
    assert model[0] is model[2] and model[4].weight is model[0].weight
    assert [(layer.name, layer.inputs) for layer in report.layers] == [("0", 20)]
    assert torch.equal(power_of_two.quantize(model[0].weight), model[0].weight)


def test_a_weight_that_an_embedding_looks_up_as_well_stays_the_embeddings() -> None:
    embedding = nn.Embedding(9, 6)
    model = nn.Sequential(embedding, nn.Linear(6, 9, bias=False), nn.Linear(9, 6), nn.Linear(6, 9, bias=False))
    model[1].weight = model[3].weight = embedding.weight
    before = embedding.weight.detach().clone()
    calibrate_(model, [torch.arange(9)], ALL_SHIFT, verbose=False)
    assert torch.equal(embedding.weight, before) and model[1].weight is model[3].weight
    assert model[1].weight is not embedding.weight and not torch.equal(model[1].weight, before)


def test_the_model_comes_back_in_its_modes_and_new_layers_in_those_of_the_old() -> None:
    model = Net().train()
    model.blocks[1].eval()
    calibrate_(model, batches(), ALL_SHIFT, verbose=False)
    assert model.embed.training and not model.blocks[1].mlp.fc1.training and model.drop.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    model.train()(batches()[0]).sum().backward()
    assert model.embed.weight.grad is not None


def test_labelled_batches_need_a_forward_and_get_one() -> None:
    labelled = [(x, torch.zeros(8)) for x in batches()]
    model = Net()
    other = copy.deepcopy(model)
    with pytest.raises(UserError, match="say how by forward="):
        calibrate_(model, labelled, ALL_SHIFT, verbose=False)
    assert type(model.embed) is nn.Linear
    calibrate_(model, labelled, ALL_SHIFT, forward=lambda model, batch: model(batch[0]), verbose=False)
    calibrate_(other, ({"x": x} for x in batches()), ALL_SHIFT, verbose=False)
    assert torch.equal(model.embed.weight, other.embed.weight)


def test_the_report_is_a_table_and_plain_types(capsys: pytest.CaptureFixture) -> None:
    report = calibrate_(Net(), batches(1), "add+shift-attn+moe")
    assert "blocks.1.attn.out_fc" in capsys.readouterr().out
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["layers"][0]["name"] == "blocks.0.attn.q_fc" and plain["reparameterization"]["recipe"]["mlp"] == "moe"
    calibrate_(Net(), batches(1), "add+shift-attn+moe", verbose=False)
    assert capsys.readouterr().out == ""


def test_what_cannot_be_done_is_refused_before_anything_has_changed() -> None:
    model = Net()
    for wrong, message in (([], "there are no batches"), (batches()[0], "not one Tensor")):
        with pytest.raises(UserError, match=message):
            calibrate_(model, wrong, ALL_SHIFT, verbose=False)
    with pytest.raises(UserError, match=r"the inputs of embed are not all finite: 576 of 576 values in batch 0"):
        calibrate_(model, [batches()[0] * math.nan], ALL_SHIFT, verbose=False)
    with pytest.raises(UserError, match=r"'no\.such\.layer' matches no module"):
        calibrate_(model, batches(), Recipe(rules=(Rule("no.such.layer", "shift"),)), verbose=False)
    with pytest.raises(UserError, match="the recipes are"):
        calibrate_(model, batches(), "shift", verbose=False)
    assert type(model.embed) is nn.Linear
    calibrate_(model, batches(), ALL_SHIFT, verbose=False)
    with pytest.raises(UserError, match="'all shift' replaces nothing in this Net"):
        calibrate_(model, batches(), ALL_SHIFT, verbose=False)
