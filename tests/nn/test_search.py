"""Sensitivity and the search for a recipe, on a small transformer."""

# Wrong arguments on purpose, and attributes of submodules, to which torch gives no types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shiftadd3d import UserError
from shiftadd3d.kernels import numerics
from shiftadd3d.nn import (
    AddAttention,
    LayerSensitivity,
    OperationCosts,
    Recipe,
    Rule,
    SensitivityReport,
    calibrate_,
    count_operations,
    register_attention,
    register_emitter,
    reparameterize_,
    search_recipe,
    sensitivity,
)
from shiftadd3d.nn import compiled as compiled_models

SHIFTS = (Rule("*", "shift", 4, 1), Rule("*", "shift", 4, 2))


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_fc, self.k_fc, self.v_fc, self.out_fc = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        q, k, v = (fc(x).unflatten(-1, (2, -1)).transpose(1, 2) for fc in (self.q_fc, self.k_fc, self.v_fc))
        return self.out_fc(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Net(nn.Module):
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Attention(dim), Mlp(dim)
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attn(self.norm(x))
        return self.head(x + self.mlp(x))


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


@pytest.fixture
def batches() -> list[torch.Tensor]:
    mixing = torch.randn(3, 6)
    return [torch.randn(4, 12, 3) @ mixing for _ in range(2)]


def output_error(model: nn.Module, reference: nn.Module, inputs: list[torch.Tensor]) -> float:
    with torch.no_grad():
        wanted, got = (torch.cat([net.eval()(x) for x in inputs]) for net in (reference, model))
    return float((got - wanted).norm() / wanted.norm())


def rules(report: SensitivityReport) -> dict[tuple[str, str], LayerSensitivity]:
    return {(layer.name, layer.label): layer for layer in report.layers}


def test_every_layer_is_tried_with_everything_that_fits_it(batches) -> None:
    report = sensitivity(Net(), batches, verbose=False)
    found: dict[str, set[str]] = {}
    for layer in report.layers:
        found.setdefault(layer.name, set()).add(layer.label)
    assert found == {
        **{name: {"shift 4", "shift 2 x 4"} for name in ("embed", "mlp.fc1", "mlp.fc2", "head")},
        **{f"attn.{name}_fc": {"shift 4", "shift 2 x 4", "moe 4"} for name in ("q", "k", "v", "out")},
        "mlp": {"moe 4"},
        "attn": {"add", "add + shift 4", "add + shift 2 x 4"},
    }


def test_the_model_is_as_it_was(batches) -> None:
    model = Net().train()
    modules, state = list(model.modules()), {key: value.clone() for key, value in model.state_dict().items()}
    sensitivity(model, batches, verbose=False)
    assert list(model.modules()) == modules and all(module.training for module in modules)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_error_and_cost_are_those_of_the_model_with_that_one_layer_changed(batches) -> None:
    model = Net()
    report = sensitivity(model, batches, verbose=False)
    assert report.float_cost == pytest.approx(count_operations(model, torch.cat(batches)).cost())
    for layer in report.layers:
        changed = copy.deepcopy(model)
        torch.manual_seed(0)
        calibrate_(changed, batches, Recipe(rules=layer.rules), verbose=False)
        cost = count_operations(changed, torch.cat(batches)).cost()
        assert layer.cost == pytest.approx(cost - report.float_cost, rel=1e-6), layer.label
        assert layer.error == pytest.approx(output_error(changed, model, batches), rel=1e-3), layer.label
        assert 0 < layer.error < 1


def test_two_terms_cost_more_and_err_less(batches) -> None:
    found = rules(sensitivity(Net(), batches, SHIFTS, verbose=False))
    ones, twos = ([found[name, label] for name, _ in found] for label in ("shift 4", "shift 2 x 4"))
    for one, two in zip(ones, twos, strict=True):
        assert two.error < one.error and one.cost < two.cost < 0
    assert sum(two.error for two in twos) < sum(one.error for one in ones) / 2


def test_patterns_and_excluded_layers_say_where(batches) -> None:
    candidates = (Rule("mlp*", "shift", 3, 1), Rule("attn.q_fc", "moe", 5, 1))
    report = sensitivity(Net(), batches, candidates, base=Recipe(exclude=("mlp.fc2",)), verbose=False)
    assert [(layer.name, layer.label) for layer in report.layers] == [("mlp.fc1", "shift 3"), ("attn.q_fc", "moe 5")]


def test_a_searched_recipe_costs_what_was_promised_and_keeps_to_the_budget(batches) -> None:
    model = Net()
    report = sensitivity(model, batches, SHIFTS, verbose=False)
    for budget in (0.9, 0.6, 0.35):
        choice = report.best_recipe(budget)
        changed = copy.deepcopy(model)
        reparameterize_(changed, choice.recipe, verbose=False)
        cost = count_operations(changed, torch.cat(batches)).cost()
        assert cost == pytest.approx(choice.cost, rel=1e-9) and cost <= budget * report.float_cost * (1 + 1e-9)
        assert cost > 0.75 * budget * report.float_cost  # it is made use of


def test_a_larger_budget_never_promises_a_worse_model(batches) -> None:
    report = sensitivity(Net(), batches, verbose=False)
    budgets = [percent / 100 for percent in range(30, 101)]
    choices = [report.best_recipe(budget) for budget in budgets]
    errors = [choice.error for choice in choices]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0 and errors[-1] == 0
    assert all(
        choice.cost <= budget / 100 * report.float_cost for choice, budget in zip(choices, range(30, 101), strict=True)
    )


def test_the_estimate_ranks_recipes_as_they_turn_out(batches) -> None:
    model = Net(32)
    report = sensitivity(model, batches, SHIFTS, verbose=False)
    measured = []
    for budget in (0.8, 0.5, 0.3):
        choice, changed = report.best_recipe(budget), copy.deepcopy(model)
        calibrate_(changed, batches, choice.recipe, verbose=False)
        measured.append(output_error(changed, model, batches))
        assert measured[-1] == pytest.approx(choice.error, rel=0.5)
    assert measured == sorted(measured)


def test_the_search_finds_the_best_of_all_combinations() -> None:
    torch.manual_seed(3)
    names = [f"layer{i}" for i in range(6)]
    layers = [
        LayerSensitivity(name, (Rule(name, "shift", 4, terms),), float(torch.rand(())) / terms, -float(gain))
        for name in names
        for terms, gain in ((1, torch.randint(20, 40, ())), (2, torch.randint(1, 20, ())))
    ]
    report = SensitivityReport(Recipe(), 500.0, "pJ", tuple(layers))
    options = [[None, *(layer for layer in layers if layer.name == name)] for name in names]
    for budget in (0.95, 0.85, 0.7):
        best = min(
            sum(layer.error**2 for layer in picked if layer)
            for picked in itertools.product(*options)
            if 500 + sum(layer.cost for layer in picked if layer) <= 500 * budget
        )
        assert report.best_recipe(budget).error ** 2 == pytest.approx(best)


def test_a_perceptron_changes_as_a_whole_or_layer_by_layer_but_not_both() -> None:
    def layer(name: str, primitive: str, error: float, cost: float) -> LayerSensitivity:
        return LayerSensitivity(name, (Rule(name, primitive),), error, cost)

    report = SensitivityReport(
        Recipe(),
        100.0,
        "pJ",
        (
            layer("mlp", "moe", 0.1, -30.0),
            layer("mlp.fc1", "shift", 0.2, -25.0),
            layer("mlp.fc2", "shift", 0.01, -10.0),
        ),
    )
    assert [rule.pattern for rule in report.best_recipe(0.9).recipe.rules] == ["mlp.fc2"]
    assert [rule.pattern for rule in report.best_recipe(0.7).recipe.rules] == ["mlp"]
    assert [rule.pattern for rule in report.best_recipe(0.65).recipe.rules] == ["mlp.fc1", "mlp.fc2"]


def test_search_recipe_is_the_same_in_one_call(batches, capsys: pytest.CaptureFixture) -> None:
    model = Net()
    base = Recipe(exclude=("head",), bits=5)
    found = search_recipe(model, batches, 0.5, candidates=SHIFTS, base=base)
    assert "estimated error" in capsys.readouterr().out
    assert found.exclude == ("head",) and found.bits == 5 and found.name == "searched-0.5"
    assert found == sensitivity(model, batches, SHIFTS, base=base, verbose=False).best_recipe(0.5).recipe
    assert capsys.readouterr().out == ""
    assert Recipe.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    calibrate_(model, batches, found, verbose=False)


def test_budgets_in_the_unit_of_the_costs(batches) -> None:
    multiplications = OperationCosts("multiplications", mult=1, add=0, shift=0, unit="mult")
    model = Net()
    before = count_operations(model, batches[0])
    found = search_recipe(
        model, batches, 5000.0, absolute=True, candidates=SHIFTS, costs=multiplications, verbose=False
    )
    reparameterize_(model, found, verbose=False)
    after = count_operations(model, batches[0])
    assert after.mult / after.inputs <= 5000 < before.mult / before.inputs


def test_latencies_are_those_of_the_frozen_layer_on_what_it_really_sees(batches, monkeypatch) -> None:
    """A clock that takes 1 ms for a packed code, 2 ms for a float weight, and 5 s for the whole model."""
    asked: list[tuple[str, ...]] = []

    def measure(replays, example) -> tuple[float, ...]:
        modules = [replay.module for replay in replays]
        asked.append(tuple(type(module).__name__ for module in modules))
        for replay in replays:
            replay(example)  # the recorded calls fit
        if len(modules) == 1:
            return (5.0,)
        return tuple(
            1e-3 * m.in_features * m.out_features * (1 if "Packed" in type(m).__name__ else 2) for m in modules
        )

    monkeypatch.setattr("shiftadd3d.nn.search.measure_latencies", measure)
    report = sensitivity(Net(), batches, SHIFTS[:1], costs="latency", verbose=False)
    assert asked[0] == ("Net",) and set(asked[1:]) == {("Linear", "PackedShiftLinear")}
    assert report.unit == "s" and report.float_cost == pytest.approx(5.0 / 4)  # seconds of one input
    saved = {layer.name: layer.cost for layer in report.layers}
    assert saved["mlp.fc1"] == pytest.approx(-1e-3 * 16 * 32 / 4)
    assert report.best_recipe(0.7).cost <= 0.7 * 5.0 / 4


def test_compiled_latencies_are_those_of_the_smallest_part_that_compiles(batches, monkeypatch) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setattr(compiled_models, "_emitters", dict(compiled_models._emitters))
    register_emitter(Mlp, lambda e, mlp, x: e.perceptron(mlp.fc1, mlp.act, mlp.fc2, x, None))
    asked: dict[str, int] = {}

    def measure(replays, example) -> tuple[float, ...]:
        for replay in replays:
            replay(example)  # the recorded calls fit
        kinds = " ".join(type(replay.module).__name__ for replay in replays)
        asked[kinds] = asked.get(kinds, 0) + 1
        return (5.0,) if len(replays) == 1 else (2e-3, 1e-3)

    monkeypatch.setattr("shiftadd3d.nn.search.measure_latencies", measure)
    with numerics("exact"), pytest.warns(RuntimeWarning, match="^6 of 8 changes, such as .* timed as frozen layers$"):
        report = sensitivity(Net(), batches, SHIFTS[:1], costs="compiled latency", verbose=False)
    assert asked == {"Net": 1, "CompiledModel CompiledModel": 2, "Linear PackedShiftLinear": 6}
    assert report.unit == "s" and [layer.cost for layer in report.layers] == pytest.approx([-1e-3 / 4] * 8)


def test_latencies_can_be_measured_here(batches) -> None:
    report = sensitivity(Net(), batches, (Rule("*", "shift"), Rule("*", "add")), costs="latency", verbose=False)
    assert report.float_cost > 0 and all(abs(layer.cost) < 10 for layer in report.layers)
    assert report.best_recipe(1.0).cost <= report.float_cost


def test_outputs_of_any_structure_count_each_tensor_alike(batches) -> None:
    class Two(Net):
        def forward(self, x):
            out = super().forward(x)
            return {"small": out * 1e-6, "large": (out * 1e6, torch.arange(3)), "name": "x"}

    torch.manual_seed(1)
    one = Net()
    two = Two()
    two.load_state_dict(one.state_dict())
    a, b = (sensitivity(model, batches, SHIFTS[:1], verbose=False).layers for model in (one, two))
    assert [layer.error for layer in a] == pytest.approx([layer.error for layer in b], rel=1e-4)


def test_the_report_is_a_table_and_plain_types(batches) -> None:
    report = sensitivity(Net(), batches, SHIFTS, verbose=False)
    assert "mlp.fc1" in str(report) and "shift 2 x 4" in str(report)
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["layers"][0]["rules"][0]["primitive"] == "shift" and plain["unit"] == "pJ"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.01}, "a budget of .* pJ is out of reach: the cheapest recipe costs"),
        ({"budget": 0.0}, "the budget must be a share of the model's cost, above 0 and at most 1, not 0.0"),
        ({"budget": 2.0}, "above 0 and at most 1, not 2.0"),
        ({"budget": -1.0, "absolute": True}, "the budget must be a positive cost, not -1.0"),
        ({"candidates": ()}, "there are no candidates"),
        ({"candidates": (Rule("*", "keep"),)}, "a candidate must say one of shift, moe, add, not keep"),
        ({"candidates": (Rule("nowhere", "shift"),)}, "no candidate fits any layer of this model"),
        ({"base": Recipe(mlp="shift")}, "'custom' changes mlp.fc1 itself"),
        ({"forward": lambda model, batch: None}, "holds no floats to compare"),
    ],
)
def test_bad_input_is_refused(batches, arguments: dict, message: str) -> None:
    arguments = {"budget": 0.5, "candidates": SHIFTS, "verbose": False, **arguments}
    with pytest.raises(UserError, match=message):
        search_recipe(Net(), batches, **arguments)
    with pytest.raises(UserError, match="there are no batches"):
        search_recipe(Net(), [], **arguments)
