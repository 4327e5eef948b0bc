"""What is seen of a running model: against counts by hand and against torch's own counter."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shiftadd3d.kernels.ops.conv_mlp import shift_conv_mlp
from shiftadd3d.kernels.ops.matadd import add_attention
from shiftadd3d.kernels.ops.matshift import matshift
from shiftadd3d.kernels.ops.mlp import shift_mlp
from shiftadd3d.kernels.ops.moe import moe_mlp
from shiftadd3d.nn import (
    AddAttention,
    MoELinear,
    OperationReport,
    PackedShiftLinear,
    ShiftConv2d,
    ShiftLinear,
    count_operations,
    freeze_,
    reparameterize_,
)


class Run(nn.Module):
    """A module that does what a function does."""

    def __init__(self, function, *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, *args):
        return self.function(*args)


def elementwise(function, *batch: torch.Tensor) -> dict[str, dict[str, int]]:
    return count_operations(Run(function), batch).elementwise


def counts(mult: int = 0, add: int = 0, compare: int = 0, special: int = 0) -> dict[str, int]:
    return {"mult": mult, "add": add, "compare": compare, "special": special}


@pytest.mark.parametrize(
    ("function", "one"),
    [
        (F.relu, counts(compare=1)),
        (lambda x: x + x, counts(add=1)),
        (lambda x: x * 3, counts(mult=1)),
        (lambda x: x.clamp(0, 1), counts(compare=2)),
        (lambda x: x.exp(), counts(special=1)),
        (lambda x: x / x, counts(special=1)),
        (lambda x: x.square(), counts(mult=1)),
        (lambda x: F.softmax(x, -1), counts(add=2, compare=1, special=2)),
        (F.gelu, counts(mult=3, add=1, special=1)),
        (lambda x: x.transpose(0, 1).contiguous().abs(), None),
        (lambda x: torch.where(x > 0, x, 0.0), counts(compare=1)),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_elementwise_operators_count_what_they_do_to_each_element(function, one, inference: bool) -> None:
    with torch.inference_mode(inference):
        found = elementwise(function, torch.randn(4, 6))
    assert found == ({"float32": {name: 24 * number for name, number in one.items()}} if one else {})


def test_norms_and_sums_count_by_hand() -> None:
    x = torch.randn(4, 6)
    report = count_operations(nn.Sequential(nn.LayerNorm(6)), x)
    # Mean and variance take three additions and a square each, the scale a product; weight and bias one more each.
    assert report.elementwise == {"float32": counts(mult=3 * 24, add=4 * 24)} and report.products == 0
    assert elementwise(lambda x: x.sum(-1), x) == {"float32": counts(add=4 * 5)}
    assert elementwise(lambda x: x.mean(-1), x) == {"float32": counts(add=4 * 5, mult=4)}
    assert elementwise(lambda x: x.amax(-1), x) == {"float32": counts(compare=4 * 5)}


def test_softmax_of_attention_counts_apart_from_its_products() -> None:
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    report = count_operations(Run(F.scaled_dot_product_attention), (q, k, v))
    assert report.products == 2 * 3 * 5 * 7 * 8 * 2
    assert report.elementwise == {"float32": counts(add=2 * 210, compare=210, special=2 * 210)}
    assert report.moved_bytes["weight_bytes"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_linear_layer_and_a_convolution(dtype: torch.dtype) -> None:
    size = torch.finfo(dtype).bits // 8
    report = count_operations(nn.Linear(6, 4, dtype=dtype), torch.randn(2, 5, 6, dtype=dtype))
    assert report.moved_bytes == {
        "weight_bytes": 24 * size,
        "input_bytes": 60 * size,
        "output_bytes": 40 * size,
        "elementwise_bytes": 0,
    }
    assert report.formats == {str(dtype)[6:]: {"mult": 240, "add": 240, "shift": 0}}
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, dtype=dtype)
    (layer,) = count_operations(conv, torch.randn(2, 6, 9, 8, dtype=dtype)).layers
    assert (layer.weight_bytes, layer.input_bytes) == (8 * 3 * 9 * size, 2 * 6 * 72 * size)
    assert layer.output_bytes == 2 * 8 * 5 * 4 * size
    ((product, times),) = layer.loops
    assert (product.groups, product.batch, product.outputs, product.inputs) == (2, 2, 4, 3) and times == 1
    assert (product.size, product.kernel, product.stride, product.input_size) == ((5, 4), (3, 3), (2, 2), (9, 8))


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("terms", [1, 2])
def test_shift_weights_have_the_bytes_of_their_codes(bits: int, terms: int) -> None:
    x = torch.randn(3, 37)
    layer = ShiftLinear(37, 12, bits=bits, terms=terms)
    stored = layer.freeze()
    size = sum(tensor.numel() * tensor.element_size() for tensor in (stored.codes, stored.offset))
    for each in (layer, stored):
        report = count_operations(nn.Sequential(each), x)
        assert report.moved_bytes["weight_bytes"] == size and report.shift == 3 * 37 * 12 * terms
        assert report.elementwise == {}  # quantising weights is no work on inputs
    conv = ShiftConv2d(3, 8, 4, bits=bits)
    assert count_operations(nn.Sequential(conv), torch.randn(2, 3, 8, 8)).elementwise == {}


def test_codes_take_one_bit_and_their_products_no_multiplication() -> None:
    model = nn.Sequential(AddAttention(8, 2, order="linear"))
    report = count_operations(model, torch.randn(1, 10, 8))
    products = [product for layer in report.layers for product, _ in layer.loops if layer.name == "0"]
    assert {product.primitive for product in products} == {"add"}
    assert all(1 in (product.weight_bits, product.input_bits) for product in products)
    assert all(32 in (product.weight_bits, product.input_bits) for product in products)
    assert not any(product.is_weight for product in products)


def test_a_weight_that_comes_first_or_is_cast_is_a_weight() -> None:
    fc = nn.Linear(6, 4, bias=False)
    first = count_operations(Run(lambda x: fc.weight @ x, fc), torch.randn(6, 5), inputs=5)
    ((product, _),) = first.layers[0].loops
    assert product.is_weight and product.weight_elements == 24 and product.outputs == 4
    cast = count_operations(Run(lambda x: x @ (2 * fc.weight).T.bfloat16(), fc), torch.randn(5, 6).bfloat16())
    assert cast.moved_bytes["weight_bytes"] == 24 * 2 and cast.elementwise == {}


def test_what_is_written_into_a_constant_makes_it_none() -> None:
    def into_zeros(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(4, 6)
        out[1:3] = x
        return out * 2

    assert elementwise(into_zeros, torch.randn(2, 6)) == {"float32": counts(mult=24)}


def codes_of(inputs: int, outputs: int, terms: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    packed = ShiftLinear(inputs, outputs, terms=terms).freeze()
    return packed.codes, packed.offset, packed.bias


def test_the_ops_of_kernels_count_as_the_layers_that_they_stand_for() -> None:
    first, second, plain = codes_of(6, 8), codes_of(8, 4), (torch.randn(8, 6), None, torch.randn(8))
    x = torch.randn(5, 6)

    def found(function, *batch: torch.Tensor) -> tuple[int, int, int, dict]:
        report = count_operations(Run(function), batch)
        return report.mult, report.shift, report.add, report.elementwise

    relu = {"float32": counts(compare=40)}
    assert found(lambda x: matshift(x, *first, activation="relu"), x) == (0, 240, 240, relu)
    two = codes_of(6, 8, terms=2)
    assert found(lambda x: matshift(x, *two), x) == (0, 480, 480, {})
    assert found(lambda x: shift_mlp(x, *first, *second, 4, "relu"), x) == (0, 400, 400, relu)
    conv = torch.randn(8, 1, 3, 3)
    image = torch.randn(1, 12, 6)
    kernel = (conv, None)
    chain = found(lambda x: shift_conv_mlp(x, *first, *kernel, *second[:2], None, 3, 4, 4, "relu"), image)
    assert chain == (12 * 8 * 9, 12 * 80, 12 * 8 * 9 + 12 * 80, {"float32": counts(compare=96)})
    # Three tokens to the expert that multiplies, two to the one that shifts.
    logits = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 2)
    mixture = found(lambda x, logits: moe_mlp(x, logits, [*plain, *first], 1, 4, "none")[0], x, logits)
    assert mixture[:3] == (3 * 48, 2 * 48, 5 * 48)
    q, k, v = (torch.randn(1, 2, n, 8) for n in (5, 7, 7))
    report = count_operations(Run(add_attention), (q, k, v))
    # The sums of rows are products of the queries with the sum of the keys.
    assert report.mult == 0 and report.add == 2 * (7 + 5) * 8 * 8 + 2 * 5 * 8


@pytest.mark.parametrize("recipe", ["add+shift", "add+shift-attn+moe", "moe"])
def test_a_frozen_model_does_what_it_did_before(recipe: str) -> None:
    timm = pytest.importorskip("timm")
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **size)
    reparameterize_(model, recipe, verbose=False)
    x = torch.randn(2, 3, 32, 32)
    before = count_operations(model, x)
    freeze_(model, verbose=False)
    after = count_operations(model, x)
    assert (before.mult, before.shift, before.add) == (after.mult, after.shift, after.add)
    assert before.moved_bytes["weight_bytes"] == after.moved_bytes["weight_bytes"]
    assert before.elementwise == after.elementwise


def test_bytes_of_a_mixture_are_those_of_the_experts_that_ran() -> None:
    model = nn.Sequential(MoELinear(6, 4))
    with torch.no_grad():
        model[0].router.weight.zero_()
        model[0].router.bias.copy_(torch.tensor([0.0, 1.0]))
    report = count_operations(model, torch.randn(8, 6))
    packed = PackedShiftLinear(6, 4)
    codes = packed.codes.numel() + packed.offset.numel()
    assert report.moved_bytes["weight_bytes"] == codes + 6 * 2 * 4  # and the router's


def products_by_torch(model: nn.Module, call) -> int:
    # Not every torch counts the fused attention of CPUs. It counts the products of its plain form.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call(model)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "pvt_v2_b0"])
def test_products_of_classifiers_are_those_that_torch_counts(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False).eval()
    x = torch.randn(1, 3, 224, 224)
    report = count_operations(model, x)
    assert report.products == report.mult == products_by_torch(model, lambda model: model(x))
    assert report.moved_bytes["weight_bytes"] < sum(p.numel() for p in model.parameters()) * 4  # norms and biases


def test_a_bilinear_layer_counts_the_outer_product_of_its_inputs_and_that_with_its_weight() -> None:
    layer = nn.Bilinear(4, 5, 3)
    report = count_operations(layer, (torch.randn(2, 7, 4), torch.randn(2, 7, 5)), inputs=1)
    rows = 2 * 7
    assert report.products == report.mult == rows * 4 * 5 * 3
    assert report.elementwise == {"float32": counts(mult=rows * 4 * 5, add=rows * 3)}  # added: the bias
    assert report.moved_bytes["weight_bytes"] == 4 * 4 * 5 * 3
    codes = (torch.randn(2, 7, 4), torch.randn(2, 7, 5).sign())
    assert count_operations(layer, codes, inputs=1).mult == report.mult  # the outer product is none of codes


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True, "bias": False}])
def test_a_recurrent_layer_counts_by_hand_and_as_its_steps(options: dict) -> None:
    layer = nn.LSTM(16, 32, batch_first=True, **options).eval()
    layers, directions = options.get("num_layers", 1), 1 + options.get("bidirectional", False)
    batch = (torch.randn(3, 10, 16), *torch.randn(2, layers * directions, 3, 32))

    def count() -> OperationReport:
        return count_operations(layer, batch, forward=lambda model, given: model(given[0], given[1:]), inputs=1)

    fused = count()
    with torch.backends.mkldnn.flags(enabled=False):  # step by step
        steps = count()
    widths = [16] + (layers - 1) * [32]
    assert fused.products == steps.products == sum(directions * 30 * 4 * 32 * (width + 32) for width in widths)
    done, expected = fused.elementwise["float32"], steps.elementwise["float32"]
    cells = layers * directions * 30 * 32
    assert done["mult"] == 3 * cells <= expected["mult"] and done["special"] == expected["special"] == 8 * cells
    assert 8 * cells <= done["add"] <= expected["add"]
    assert fused.moved_bytes["weight_bytes"] == steps.moved_bytes["weight_bytes"]
