"""Counting operations: against what one works out by hand."""

# Wrong arguments on purpose, and attributes of submodules, to which torch gives no types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shiftadd3d import UserError
from shiftadd3d.nn import (
    AddAttention,
    MoELinear,
    PackedShiftLinear,
    Recipe,
    ShiftConv2d,
    ShiftLinear,
    reparameterize_,
)
from shiftadd3d.nn.cost import ENERGY_COSTS, OperationCosts, count_operations, frozen_bytes


def totals(model: nn.Module, batch, **kwargs) -> dict[str, int]:
    report = count_operations(model, batch, **kwargs)
    return {"mult": report.mult, "add": report.add, "shift": report.shift}


class Attend(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class MatrixVector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return torch.dot(self.fc(x), torch.mv(self.fc.weight, x))


@pytest.mark.parametrize(
    ("model", "batch", "products"),
    [
        (nn.Linear(6, 4), torch.randn(2, 5, 6), 2 * 5 * 6 * 4),
        (nn.Linear(6, 4, bias=False), torch.randn(3, 6), 3 * 6 * 4),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.randn(2, 3, 8, 8), 2 * 8 * 16 * 3 * 9),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.randn(1, 8, 5, 5), 8 * 25 * 9),
        (nn.ConvTranspose2d(3, 4, 2, stride=2), torch.randn(1, 3, 5, 5), 3 * 25 * 4 * 4),
        (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9), 2 * 6 * 7 * 4 * 3),
        (Attend(), tuple(torch.randn(2, 3, n, 8) for n in (5, 7, 7)), 2 * 3 * 5 * 7 * 8 * 2),
        (nn.MultiheadAttention(8, 2), tuple(torch.randn(5, 8) for _ in range(3)), 5 * 8 * 8 * 4 + 2 * 5 * 5 * 8),
        (MatrixVector(), torch.randn(6), 6 * 4 + 6 * 4 + 4),
    ],
)
def test_products_of_ordinary_modules(model: nn.Module, batch, products: int) -> None:
    assert totals(model, batch, inputs=1) == {"mult": products, "add": products, "shift": 0}
    with torch.inference_mode():
        assert totals(model, batch, inputs=1)["mult"] == products


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("mode", ["Q", "PS", "packed"])
def test_shift_layers_shift_and_add_and_do_not_multiply(mode: str, terms: int) -> None:
    x, image = torch.randn(2, 5, 6), torch.randn(2, 3, 8, 8)
    for layer, batch, products in (
        (ShiftLinear(6, 4, mode=mode.replace("packed", "Q"), terms=terms), x, 2 * 5 * 6 * 4),
        (ShiftConv2d(3, 8, 4, mode=mode.replace("packed", "Q"), terms=terms), image, 2 * 4 * 8 * 48),
    ):
        model = nn.Sequential(layer.freeze() if mode == "packed" else layer)
        report = count_operations(model, batch)
        assert (report.mult, report.add, report.shift) == (0, products * terms, products * terms)
        assert report.products == products and report.inputs == 2
        assert [(found.name, found.kind) for found in report.layers] == [("0", type(model[0]).__name__)]


@pytest.mark.parametrize("codes", ["pm1", "01"])
def test_products_with_codes_are_additions(codes: str) -> None:
    attention = AddAttention(8, 2, codes=codes, order="linear", dwconv=0)
    x = torch.randn(3, 10, 8)
    report = count_operations(nn.Sequential(attention), x)
    own = {layer.name: layer for layer in report.layers}["0"]
    accumulations = 3 * 2 * (2 * 10 * 4 * 4 + 10 * 4)  # q (k^T v) in two heads of four features, and the row sums
    assert (own.mult, own.add, own.products) == (0, accumulations, accumulations)
    assert report.mult == 4 * 3 * 10 * 8 * 8  # the projections


def test_in_quadratic_order_only_the_similarity_is_additions() -> None:
    attention = AddAttention(8, 2, order="quadratic", dwconv=0)
    own = count_operations(nn.Sequential(attention), torch.randn(3, 10, 8)).layers
    own = {layer.name: layer for layer in own}["0"]
    assert own.add - own.mult == 3 * 2 * 10 * 10 * 4 and own.mult == 3 * 2 * 10 * 10 * 4


def test_a_zero_input_is_no_code() -> None:
    assert totals(nn.Linear(6, 4), torch.zeros(2, 6))["mult"] == 2 * 6 * 4


def test_tokens_of_a_mixture_count_for_the_expert_they_went_to() -> None:
    model = nn.Sequential(MoELinear(6, 4))
    with torch.no_grad():
        model[0].router.weight.zero_()
        model[0].router.weight[0, 0] = 0.5  # positive first feature: to the multiplying expert
    x = torch.randn(8, 6)
    x[:, 0] = torch.tensor([1.0, -1.0, -1.0, -1.0] * 2)
    by_name = {layer.name: layer for layer in count_operations(model, x).layers}
    assert by_name["0.experts.0"].mult == 2 * 24 and by_name["0.experts.1"].shift == 6 * 24
    assert by_name["0"].mult == 8 * 6 * 2  # the router


def test_energy_is_that_of_the_table() -> None:
    report = count_operations(nn.Linear(6, 4), torch.randn(5, 6))
    assert report.cost() == pytest.approx(24 * (3.7 + 0.9))
    assert report.cost(ENERGY_COSTS["int8"]) == pytest.approx(24 * (0.2 + 0.03))
    assert report.cost(OperationCosts("seconds", 1e-9, 0, 0, unit="s")) == pytest.approx(24e-9)
    shift = count_operations(nn.Sequential(ShiftLinear(6, 4)), torch.randn(5, 6))
    assert shift.cost() == pytest.approx(24 * (0.13 + 0.9))
    assert shift.multiplications_removed(report) == 1.0 and report.multiplications_removed(report) == 0.0


def test_a_vision_transformer_has_the_known_number_of_multiplications() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("deit_tiny_patch16_224", pretrained=False)
    report = count_operations(model, torch.zeros(1, 3, 224, 224))
    assert report.mult == pytest.approx(1.26e9, rel=0.01)  # as papers have it, attention products included
    assert report.bytes == sum(p.numel() for p in model.parameters()) * 4


def test_what_a_transformer_loses_and_keeps() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3
    )
    x = torch.randn(2, 3, 32, 32)
    before = count_operations(model, x)
    layers = 2 * 17 * (3 + 1 + 4 + 4) * 48 * 48

    reparameterize_(model, Recipe(attention_linear="shift", mlp="shift"), verbose=False)
    after = count_operations(model, x)
    assert after.shift == 2 * layers and after.mult == before.mult - 2 * layers
    assert after.products == before.products
    assert after.multiplications_removed(before) == pytest.approx(2 * layers / before.mult)


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("mode", ["Q", "PS"])
def test_bytes_are_those_of_the_frozen_state_dict(bits: int, mode: str) -> None:
    layer = ShiftLinear(37, 12, bits=bits, mode=mode, terms=2)
    model = nn.Sequential(layer, nn.BatchNorm1d(12), nn.Linear(12, 12))
    frozen = nn.Sequential(layer.freeze(), *model[1:])
    stored = sum(tensor.numel() * tensor.element_size() for tensor in frozen.state_dict().values())
    assert frozen_bytes(model) == frozen_bytes(frozen) == stored
    tied = nn.Sequential(model[2], model[2], nn.Linear(12, 12, bias=False))
    tied[2].weight = model[2].weight
    assert frozen_bytes(tied) == 4 * (12 * 12 + 12)
    assert type(frozen[0]) is PackedShiftLinear


def test_counting_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    count_operations(model, torch.randn(2, 4))
    with pytest.raises(RuntimeError):
        count_operations(model, torch.randn(2, 5))
    assert model.training and model[1].training and not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


def test_the_report_is_a_table_and_plain_types() -> None:
    report = count_operations(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), torch.randn(5, 6))
    assert "24" in str(report) and "total" in str(report) and "Linear" in str(report)
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["mult"] == 120 and plain["inputs"] == 5 and plain["layers"][0]["name"] == "0"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: count_operations(nn.Linear(2, 2), {"x": 3}), "holds no tensor that would tell how many inputs"),
        (lambda: count_operations(nn.Linear(2, 2), torch.randn(3, 2), inputs=0), "inputs must be at least 1, not 0"),
        (lambda: count_operations(nn.Linear(2, 2), (torch.randn(3, 2), 1)), "cannot be called with this batch"),
        (lambda: OperationCosts("mine", mult=-1, add=0, shift=0), "the cost of one mult .* not -1"),
        (lambda: OperationCosts("mine", mult=1, add=0, shift=math.nan), "the cost of one shift .* not nan"),
    ],
)
def test_bad_input_is_refused(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
