"""`reparameterize_` on a small network with the parts of a transformer, and on parts it does not know."""

# Wrong arguments on purpose, and attributes of submodules, to which torch gives no types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shiftadd3d import UserError
from shiftadd3d.nn import (
    RECIPES,
    AddAttention,
    MoELinear,
    MoEMlp,
    Recipe,
    Rule,
    ShiftConv2d,
    ShiftLinear,
    collect_moe_losses,
    freeze_,
    power_of_two,
    recipe,
    register_attention,
    register_mlp,
    reparameterize_,
)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_fc, self.k_fc, self.v_fc = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out_fc = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (
            fc(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for fc in (self.q_fc, self.k_fc, self.v_fc)
        )
        return self.out_fc(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class SubtractionAttention(nn.Module):
    """No product of queries and keys; a small perceptron inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_fc = nn.Linear(dim, dim, bias=False)
        self.pos_fc = nn.Sequential(nn.Linear(dim, 4), nn.ReLU(), nn.Linear(4, dim))

    def forward(self, x):
        return self.pos_fc(x - self.q_fc(x))


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(2 * dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = Attention(dim, 2)
        self.sub = SubtractionAttention(dim)
        self.ff = FeedForward(dim)

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        x = x + self.sub(x)
        return x + self.ff(x)


class Net(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(3, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))
        self.mix = nn.Conv1d(dim, dim, 1)
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.mix(x.transpose(1, 2)).transpose(1, 2))


def to_add(module: Attention, recipe: Recipe) -> AddAttention:
    return AddAttention.from_projections(
        module.q_fc, module.k_fc, module.v_fc, module.out_fc, module.num_heads, **recipe.add_options()
    )


@pytest.fixture(autouse=True)
def known_classes(monkeypatch: pytest.MonkeyPatch):
    from shiftadd3d.nn import reparam

    monkeypatch.setattr(reparam, "_attention_converters", dict(reparam._attention_converters))
    monkeypatch.setattr(reparam, "_mlp_classes", dict(reparam._mlp_classes))
    register_attention(Attention, to_add)
    register_attention(SubtractionAttention)


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules()}


@pytest.mark.parametrize(
    ("name", "attention", "attention_linear", "mlp"),
    [
        ("mult", "Attention", "Linear", "FeedForward"),
        ("add", "AddAttention", "Linear", "FeedForward"),
        ("add+shift-attn", "AddAttention", "ShiftLinear", "FeedForward"),
        ("add+shift", "AddAttention", "ShiftLinear", "FeedForward"),
        ("add+shift-attn+moe", "AddAttention", "ShiftLinear", "MoEMlp"),
        ("moe", "AddAttention", "MoELinear", "MoEMlp"),
    ],
)
def test_the_presets_are_the_papers_rows(name: str, attention: str, attention_linear: str, mlp: str) -> None:
    model = Net()
    reparameterize_(model, name, verbose=False)
    found = kinds(model)
    for block in ("blocks.0", "blocks.1"):
        assert found[f"{block}.attn"] == attention
        assert found[f"{block}.sub"] == "SubtractionAttention"
        for linear in ("attn.q_fc", "attn.out_fc", "sub.q_fc", "sub.pos_fc.0", "sub.pos_fc.2"):
            assert found[f"{block}.{linear}"] == attention_linear
        assert found[f"{block}.ff"] == mlp
        if mlp == "FeedForward":
            assert found[f"{block}.ff.fc1"] == ("ShiftLinear" if name == "add+shift" else "Linear")
    assert found["embed"] == found["head"] == "Linear" and found["mix"] == "Conv1d"
    out = model(torch.randn(2, 5, 3))
    (out.square().sum() + collect_moe_losses(model)).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", RECIPES)
def test_doing_it_twice_changes_nothing(name: str) -> None:
    model = Net()
    reparameterize_(model, name, verbose=False)
    modules = dict(model.named_modules())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    report = reparameterize_(model, name, verbose=False)
    assert report.layers == ()
    again = dict(model.named_modules())
    assert modules.keys() == again.keys() and all(modules[key] is again[key] for key in modules)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_weights_carry_over_to_the_very_parameters() -> None:
    model = Net().eval()
    before = dict(model.named_parameters())
    reparameterize_(model, recipe("add+shift", dwconv=0, contrast=1), verbose=False)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[key] is after[key] for key in before)
    assert not any(module.training for module in model.modules())
    fc1 = model.blocks[0].ff.fc1
    x = torch.randn(4, 8)
    assert torch.equal(fc1(x), F.linear(x, power_of_two.quantize(fc1.weight), fc1.bias))


def test_options_reach_the_layers() -> None:
    model = Net()
    wanted = recipe(
        "moe", bits=5, terms=2, mode="PS", codes="01", dwconv=3, order="linear", gate="probability", latencies=(3, 1)
    )
    reparameterize_(model, dataclasses.replace(wanted, router_noise=0.25, router_temperature=2.0), verbose=False)
    shift = model.blocks[0].ff.experts[1].fc1
    assert (shift.bits, shift.terms, shift.mode) == (5, 2, "PS")
    attention = model.blocks[0].attn
    assert attention.q_code.codes == "01" and attention.dwconv.kernel_size == 3 and attention.order == "linear"
    mixture = model.blocks[1].ff
    assert (mixture.gate, mixture.noise, mixture.temperature) == ("probability", 0.25, 2.0)
    assert mixture.latencies == (3.0, 1.0)


def test_state_dict_round_trip() -> None:
    for name in ("add+shift", "moe"):
        model, other = Net(), Net()
        reparameterize_(model, name, verbose=False)
        reparameterize_(other, name, verbose=False)
        other.load_state_dict(model.state_dict())
        x = torch.randn(2, 5, 3)
        assert torch.equal(model.eval()(x), other.eval()(x))
        assert torch.equal(copy.deepcopy(model)(x), other(x))


def test_the_report_tells_what_became_what_and_what_was_left_alone(capsys: pytest.CaptureFixture) -> None:
    model = Net()
    report = reparameterize_(model, "add+shift-attn+moe")
    rows = {layer.name: layer for layer in report.layers}
    assert rows["blocks.0.attn.q_fc"].before == "Linear" and rows["blocks.0.attn.q_fc"].after == "ShiftLinear"
    assert rows["blocks.0.attn.q_fc"].parameters == 64 and rows["blocks.0.attn.q_fc"].bits == "4"
    assert rows["blocks.1.ff"].after == "MoEMlp" and rows["blocks.1.ff"].bits == "32/4"
    untouched = {layer.name: (layer.kind, layer.reason) for layer in report.untouched}
    assert untouched["mix"] == ("Conv1d", "no rule for it")
    assert untouched["head"] == ("Linear", "other_linear: mult")
    printed = capsys.readouterr().out
    assert "blocks.0.attn.q_fc" in printed and "Conv1d" in printed
    assert "blocks.1.ff" in str(report)
    assert json.loads(json.dumps(report.as_dict()))["recipe"]["name"] == "add+shift-attn+moe"
    reparameterize_(model, "add+shift-attn+moe", verbose=False)
    assert capsys.readouterr().out == ""


def test_parts_of_the_addition_are_not_left_alone() -> None:
    model = Net()
    own = {type(module).__name__ for module in model.modules()}
    report = reparameterize_(model, "add", verbose=False)
    assert "TokenConv2d" not in own and any(layer.after == "AddAttention" for layer in report.layers)
    assert {layer.kind for layer in report.untouched} <= own


def test_every_parameter_is_in_the_report_once() -> None:
    model = Net()
    parameters = sum(p.numel() for p in model.parameters())  # the addition adds its own, such as scales of codes
    report = reparameterize_(model, recipe("add+shift", dwconv=0), verbose=False)
    linears = [layer for layer in report.layers if layer.after != "AddAttention"]
    assert sum(layer.parameters for layer in (*linears, *report.untouched)) == parameters


def test_filter_and_exclude_leave_layers_alone() -> None:
    model = Net()
    report = reparameterize_(
        model, "add+shift", filter_fn=lambda module, name: not name.endswith("q_fc"), verbose=False
    )
    assert type(model.blocks[0].attn.q_fc) is nn.Linear and type(model.blocks[0].attn.k_fc) is ShiftLinear
    assert ("blocks.0.attn.q_fc", "filtered out") in {(layer.name, layer.reason) for layer in report.untouched}

    model = Net()
    reparameterize_(model, recipe("add+shift", exclude=("blocks.0", "*.ff")), verbose=False)
    assert type(model.blocks[0].attn) is Attention and type(model.blocks[0].attn.q_fc) is nn.Linear
    assert type(model.blocks[1].attn) is AddAttention and type(model.blocks[1].ff.fc1) is nn.Linear


def test_rules_override_the_place_and_the_last_one_counts() -> None:
    model = Net()
    rules = (
        Rule("blocks.*", "shift"),
        Rule("blocks.0.attn", "moe"),
        Rule("*.out_fc", "shift", bits=6),
        Rule("blocks.1.ff", "moe", bits=5, terms=2),
        Rule("blocks.1.sub", "keep"),
        Rule("blocks.1.sub.q_fc", "shift"),
        Rule("blocks.1.attn", "add"),
        Rule("head", "moe"),
    )
    report = reparameterize_(model, Recipe(rules=rules, bits=3), verbose=False)
    first, second = model.blocks
    assert type(first.attn) is Attention and type(first.attn.q_fc) is MoELinear
    assert type(first.attn.out_fc) is ShiftLinear and first.attn.out_fc.bits == 6
    assert type(first.ff.fc1) is ShiftLinear and (first.ff.fc1.bits, first.ff.fc1.terms) == (3, 1)
    assert type(first.sub.pos_fc[0]) is ShiftLinear
    assert type(second.attn) is AddAttention and type(second.attn.q_fc) is ShiftLinear
    assert type(second.ff) is MoEMlp and second.ff.experts[1].fc1.bits == 5 and second.ff.experts[1].fc1.terms == 2
    assert type(second.sub.q_fc) is ShiftLinear and type(second.sub.pos_fc[0]) is nn.Linear
    assert type(model.embed) is nn.Linear and type(model.head) is MoELinear
    assert {layer.name: layer.bits for layer in report.layers}["blocks.1.ff"] == "32/10"
    reasons = {layer.name: layer.reason for layer in report.untouched}
    assert reasons["blocks.1.sub.pos_fc.0"] == "rule blocks.1.sub: keep" and reasons["embed"] == "other_linear: mult"
    assert reparameterize_(model, report.recipe, verbose=False).layers == ()


def test_a_rule_keeps_attention_a_softmax_or_its_layers_multiplications() -> None:
    model = Net()
    changes = {"rules": (Rule("blocks.0.attn", "keep"), Rule("blocks.0.attn", "shift"), Rule("blocks.1.attn", "mult"))}
    reparameterize_(model, recipe("add+shift-attn", **changes), verbose=False)
    assert type(model.blocks[0].attn) is Attention and type(model.blocks[0].attn.q_fc) is ShiftLinear
    assert type(model.blocks[1].attn) is AddAttention and type(model.blocks[1].attn.q_fc) is nn.Linear
    # What comes last in a recipe is `exclude`.
    model = Net()
    reparameterize_(model, Recipe(rules=(Rule("*", "shift"),), exclude=("blocks", "embed")), verbose=False)
    assert type(model.head) is ShiftLinear and "ShiftLinear" not in kinds(model.blocks).values()
    assert type(model.embed) is nn.Linear


def test_a_perceptron_whose_layers_differ_becomes_mixtures_layer_by_layer() -> None:
    model = Net()
    rules = (Rule("blocks.0.ff.fc2", "shift", bits=5), Rule("blocks.1.ff.fc1", "moe"))
    chosen = recipe("add+shift-attn+moe", rules=rules)
    reparameterize_(model, chosen, verbose=False)
    assert type(model.blocks[0].ff.fc1) is MoELinear and model.blocks[0].ff.fc2.bits == 5
    assert type(model.blocks[1].ff) is MoEMlp  # the rule says of its layer what the recipe says of the whole
    assert reparameterize_(model, chosen, verbose=False).layers == ()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("blocks.2.ff", "shift"), r"'blocks\.2\.ff' matches no module; there are blocks\.\d\.ff, "),
        (Rule("*.fc3", "keep"), r"'\*\.fc3' matches no module"),
        (Rule("blocks.0.ff.fc1", "add"), r"blocks\.0\.ff\.fc1 \(Linear\): the rule 'blocks\.0\.ff\.fc1' says add"),
        (Rule("blocks.0.ff", "add"), r"blocks\.0\.ff \(FeedForward\): the rule 'blocks\.0\.ff' says add"),
        (Rule("*.sub", "add"), r"blocks\.1\.sub \(SubtractionAttention\): the rule '\*\.sub' says add"),
        (Rule("*.norm", "shift"), r"'\*\.norm': nothing .* can become shift: blocks\.0\.norm \(LayerNorm\), blocks"),
        (Rule("mix", "moe"), r"'mix': nothing of what it matches can become moe: mix \(Conv1d\)"),
    ],
)
def test_rules_that_match_nothing_or_do_not_fit_are_refused(rule: Rule, message: str) -> None:
    model = Net()
    before = kinds(model)
    with pytest.raises(UserError, match=message):
        reparameterize_(model, Recipe(rules=(rule,), mlp="shift"), verbose=False)
    assert kinds(model) == before


def test_a_rule_for_a_layer_that_additive_attention_does_not_have_is_told_which_it_has() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def split(module: Fused, recipe: Recipe) -> AddAttention:
        return AddAttention(8, 2, **recipe.add_options())

    register_attention(Fused, split)
    rules = (Rule("attn.qkv", "shift"),)
    with pytest.raises(UserError, match=r"'attn\.qkv': nothing .* attn has q_fc, k_fc, v_fc, out_fc"):
        reparameterize_(nn.ModuleDict({"attn": Fused()}), recipe("add", rules=rules), verbose=False)
    model = nn.ModuleDict({"attn": Fused()})
    reparameterize_(model, recipe("mult", rules=rules), verbose=False)
    assert type(model["attn"].qkv) is ShiftLinear


def test_exclusions_that_match_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"'heads' matches no module; there are head, "):
        reparameterize_(Net(), recipe("add+shift", exclude=("heads",)), verbose=False)
    reparameterize_(Net(), recipe("add+shift", exclude=("*.norm",)), verbose=False)


def test_a_recipe_goes_through_json() -> None:
    rules = (Rule("*.fc1", "shift", bits=5), Rule("head", "keep"))
    for wanted in (Recipe(), recipe("moe", rules=rules, exclude=("embed",), latencies=(2.0, 1.0))):
        assert Recipe.from_dict(json.loads(json.dumps(wanted.as_dict()))) == wanted


def test_other_linears_follow_when_asked() -> None:
    model = Net()
    reparameterize_(model, Recipe(other_linear="shift"), verbose=False)
    assert type(model.head) is ShiftLinear and type(model.embed) is ShiftLinear
    assert type(model.blocks[0].ff.fc1) is nn.Linear


def test_perceptrons_that_look_around_become_mixtures_layer_by_layer() -> None:
    class ConvMlp(FeedForward):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            self.dwconv = nn.Conv1d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim)

        def forward(self, x, size):
            return x

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    register_mlp(Told)
    model = nn.ModuleDict({"conv": ConvMlp(4), "told": Told(), "plain": FeedForward(4)})
    reparameterize_(model, "moe", verbose=False)
    assert type(model["conv"]) is ConvMlp and type(model["conv"].fc1) is MoELinear
    assert type(model["told"]) is MoEMlp and type(model["plain"]) is MoEMlp


class ConvNet(nn.Module):
    """Convolutions over patches, of single pixels, and one that is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.attn = Attention(8, 2)
        self.attn.reduce = nn.Conv2d(8, 8, 2, 2)
        self.attn.point = nn.Conv2d(8, 8, 1)
        self.mlp = nn.ModuleDict({"fc1": nn.Conv2d(8, 16, 1), "act": nn.GELU(), "fc2": nn.Conv2d(16, 8, 1)})
        self.conv = nn.Conv2d(8, 8, 3, padding=1)


def test_convolutions_that_are_linear_layers_follow_their_place() -> None:
    convs = ("patch", "attn.reduce", "attn.point", "mlp.fc1", "mlp.fc2", "conv")

    def found(recipe: Recipe) -> dict[str, bool]:
        model = ConvNet()
        reparameterize_(model, recipe, verbose=False)
        assert {type(model.get_submodule(name)) for name in convs} <= {ShiftConv2d, nn.Conv2d}
        return [name for name in convs if type(model.get_submodule(name)) is ShiftConv2d]

    assert found(Recipe(attention_linear="shift")) == ["attn.point"]
    assert found(Recipe(mlp="shift")) == ["mlp.fc1", "mlp.fc2"]
    assert found(Recipe(other_linear="shift")) == ["patch", "attn.reduce"]
    assert found(Recipe(rules=(Rule("attn", "shift"),))) == ["attn.reduce", "attn.point"]
    assert found(Recipe(mlp="moe", attention_linear="moe", rules=(Rule("attn.reduce", "shift"),))) == ["attn.reduce"]


def test_convolutions_become_no_mixtures() -> None:
    report = reparameterize_(ConvNet(), "moe", verbose=False)
    reasons = {layer.name: layer.reason for layer in report.untouched}
    assert reasons["mlp.fc1"] == "mlp: moe, which no convolution becomes" and reasons["patch"] == "other_linear: mult"
    with pytest.raises(UserError, match=r"mlp\.fc1 \(Conv2d\): the rule .* says moe, which this layer cannot become"):
        reparameterize_(ConvNet(), Recipe(rules=(Rule("mlp.*", "moe"),)), verbose=False)
    with pytest.raises(UserError, match=r"'conv': nothing of what it matches can become shift: conv \(Conv2d\)"):
        reparameterize_(ConvNet(), Recipe(rules=(Rule("conv", "shift"),)), verbose=False)


def test_subclasses_of_linear_are_not_touched() -> None:
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 2)})
    report = reparameterize_(model, Recipe(other_linear="shift"), verbose=False)
    # MultiheadAttention reads out_proj.weight past its forward pass: a shift layer there would be ignored.
    assert type(model["mha"].out_proj) is not ShiftLinear and type(model["head"]) is ShiftLinear
    assert "mha.out_proj" in {layer.name for layer in report.untouched}


def test_a_module_in_two_places_stays_one_module_and_tied_weights_stay_tied() -> None:
    shared = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = shared.weight
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": tied})
    reparameterize_(model, Recipe(other_linear="shift"), verbose=False)
    assert type(model["a"]) is ShiftLinear and model["b"][0] is model["a"]
    assert model["c"] is not model["a"] and model["c"].weight is model["a"].weight


def test_rules_about_any_name_of_a_module_count_and_have_to_agree() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    for changes in ({"exclude": ("b",)}, {"rules": (Rule("b.0", "shift", bits=5),)}):
        with pytest.raises(UserError, match=r"a \(Linear\): .*it is the same module as 'b.0'"):
            reparameterize_(model, Recipe(other_linear="shift", **changes), verbose=False)
    reparameterize_(model, Recipe(rules=(Rule("a", "shift"), Rule("b.*", "shift"))), verbose=False)
    assert type(model["a"]) is ShiftLinear and model["b"][0] is model["a"]
    reparameterize_(model, Recipe(rules=(Rule("b.*", "shift"),)), verbose=False)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_torchs_encoder_computes_with_the_new_layers_in_evaluation_too(activation: str) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation=activation)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    reparameterize_(model, Recipe(other_linear="shift"), verbose=False)
    x = torch.randn(2, 5, 16)
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        freeze_(model, verbose=False)
        torch.testing.assert_close(model(x), expected)


def test_all_that_cannot_be_done_is_listed_and_nothing_is_changed() -> None:
    model = Net()
    with torch.no_grad():
        model.blocks[0].ff.fc2.weight[0, 0] = math.inf
    model.blocks[1].ff.fc1.register_forward_hook(lambda *_: None)
    model.blocks[0].ff.fc1.register_full_backward_hook(lambda *_: None)
    before = kinds(model)
    with pytest.raises(UserError) as caught:
        reparameterize_(model, "add+shift", verbose=False)
    assert "blocks.0.ff.fc2 (Linear)" in str(caught.value) and "1 of 128 values" in str(caught.value)
    assert "blocks.1.ff.fc1 (Linear)" in str(caught.value) and "hooks" in str(caught.value)
    assert "blocks.0.ff.fc1 (Linear)" in str(caught.value)
    assert kinds(model) == before
    with pytest.raises(UserError, match="the model itself is a Linear"):
        reparameterize_(nn.Linear(2, 2), Recipe(other_linear="shift"), verbose=False)


def test_a_model_of_which_nothing_is_known_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    report = reparameterize_(model, "moe", verbose=False)
    assert report.layers == () and [layer.name for layer in report.untouched] == ["0", "1"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipe("shift"), r"there is no recipe 'shift'; the recipes are mult, add, add\+shift-attn"),
        (lambda: recipe("add", bitz=3), "a recipe has no bitz; it has name, attention"),
        (lambda: reparameterize_(nn.ReLU(), "nope"), "the recipes are"),
        (lambda: Recipe(attention="binary"), "attention must be one of keep, add"),
        (lambda: Recipe(mlp="Shift"), "mlp must be one of mult, shift, moe"),
        (lambda: Recipe(other_linear="moe"), "other_linear must be one of mult, shift"),
        (lambda: Recipe(bits=8), "bits"),
        (lambda: Recipe(dwconv=2), "odd"),
        (lambda: Recipe(contrast=0.0), "contrast must be a positive number"),
        (lambda: Recipe(binarizer="xor"), "binarizer must be one of sign"),
        (lambda: Recipe(latencies=(1.0,)), "two numbers"),
        (lambda: Recipe(router_noise=-1.0), "noise"),
        (lambda: Recipe(router_temperature=math.inf), "temperature must be positive and finite"),
        (lambda: Recipe(latencies=(1.0, -1.0)), "positive"),
        (lambda: Recipe(exclude="head"), "tuple of patterns"),
        (lambda: Recipe(rules=("head",)), "tuple of Rule"),
        (lambda: Rule("head", "linear"), "'head' must say one of keep, mult, shift, moe, add, not 'linear'"),
        (lambda: Rule("", "shift"), "pattern"),
        (lambda: Rule("head", "shift", bits=7), "bits"),
        (lambda: Rule("head", "moe", terms=3), "terms"),
        (lambda: Rule("head", "keep", bits=4), "'head' gives bits or terms, but 'keep' has no codes"),
        (lambda: Recipe.from_dict({"bitz": 4}), "a recipe has no bitz; it has name, attention"),
        (lambda: Recipe.from_dict({"rules": [{"name": "head"}]}), "a rule has no name; it has pattern, primitive"),
    ],
)
def test_wrong_recipes_name_what_would_be_right(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
