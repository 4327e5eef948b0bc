"""Shift layers: values, gradients, storage, and what a module has to survive."""

# Wrong arguments on purpose, and attributes of submodules, to which torch gives no types.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from shiftadd3d import UserError
from shiftadd3d.nn import PackedShiftConv2d, PackedShiftLinear, ShiftConv2d, ShiftLinear, power_of_two

FORMATS = [(bits, terms) for bits in range(2, 7) for terms in (1, 2)]
quick = settings(max_examples=40, deadline=None)


@pytest.mark.parametrize("mode", ["Q", "PS"])
@pytest.mark.parametrize(("bits", "terms"), FORMATS)
def test_from_linear_computes_with_the_nearest_powers_of_two(mode: str, bits: int, terms: int) -> None:
    linear = nn.Linear(33, 17)
    shift = ShiftLinear.from_linear(linear, bits=bits, mode=mode, terms=terms)
    weight = power_of_two.quantize(linear.weight, bits, terms)
    x = torch.randn(2, 5, 33)
    assert torch.equal(shift(x), F.linear(x, weight, linear.bias))


@pytest.mark.parametrize("mode", ["Q", "PS"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_from_linear_keeps_dtype_training_flag_bias_and_what_is_trainable(mode: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(8, 4, bias=False).to(dtype).eval()
    linear.weight.requires_grad_(False)
    before = linear.weight.clone()
    shift = ShiftLinear.from_linear(linear, mode=mode)
    assert shift.bias is None and not shift.training
    assert {p.dtype for p in shift.parameters()} == {dtype}
    assert not any(p.requires_grad for p in shift.parameters())
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("mode", ["Q", "PS"])
@pytest.mark.parametrize(("bits", "terms"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_reproduce_the_layer_bit_for_bit(mode: str, bits: int, terms: int, dtype: torch.dtype) -> None:
    layer = ShiftLinear(37, 12, bits=bits, mode=mode, terms=terms).to(dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(6, 37, dtype=dtype)).square().mean().backward()
        optimizer.step()
    packed = layer.eval().freeze()
    x = torch.randn(6, 37, dtype=dtype)
    assert torch.equal(packed(x), layer(x))
    assert torch.equal(layer.to_linear()(x), layer(x))


def test_a_packed_layer_stores_four_bits_a_weight() -> None:
    packed = ShiftLinear(64, 256).freeze()
    assert not list(packed.parameters())
    stored = {name: buffer.numel() * buffer.element_size() for name, buffer in packed.named_buffers()}
    assert stored == {"codes": 64 * 256 // 2, "offset": 256, "bias": 256 * 4}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_packed_layer_computes_in_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    layer = ShiftLinear(20, 10).eval()
    x = torch.randn(3, 20, dtype=dtype)
    y = layer.freeze()(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, layer.to_linear().to(dtype)(x))  # powers of two are exact in all of them


def test_a_packed_layer_goes_through_a_state_dict() -> None:
    packed = ShiftLinear(20, 10, bits=5, terms=2).freeze()
    other = PackedShiftLinear(20, 10, bits=5, terms=2)
    other.load_state_dict(packed.state_dict())
    x = torch.randn(3, 20)
    assert torch.equal(other(x), packed(x))


def test_the_gradient_goes_straight_through_the_rounding() -> None:
    layer = ShiftLinear(16, 8)
    x = torch.randn(5, 16, requires_grad=True)
    layer(x).square().sum().backward()
    weight = power_of_two.quantize(layer.weight).requires_grad_()
    y = F.linear(x.detach(), weight, layer.bias)
    y.square().sum().backward()
    # By definition: the gradient of the quantised weight, given to the float weight as it is.
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    torch.testing.assert_close(x.grad, 2 * y @ weight.detach())


@pytest.mark.parametrize("terms", [1, 2])
def test_shift_and_sign_have_deepshift_gradients(terms: int) -> None:
    layer = ShiftLinear(6, 3, mode="PS", terms=terms)
    with torch.no_grad():
        layer.shift.add_(torch.rand_like(layer.shift) * 0.4)
        layer.sign.mul_(torch.rand_like(layer.sign) * 0.9)  # some round to zero
    upstream = torch.randn(3, 6)
    (layer.quantized_weight() * upstream).sum().backward()
    levels = power_of_two.num_exponents(4)
    shift, sign = layer.shift.detach().round(), layer.sign.detach().round().sign()
    top = shift.masked_fill(sign == 0, -math.inf).amax(-1, keepdim=True)
    value = sign * torch.exp2(torch.clamp(shift, top - levels + 1, top))
    value = torch.where(sign == 0, 0.0, value)
    torch.testing.assert_close(layer.quantized_weight(), value.sum(0))
    torch.testing.assert_close(layer.shift.grad, upstream * value * math.log(2))
    torch.testing.assert_close(layer.sign.grad, upstream.expand_as(layer.sign))


@pytest.mark.parametrize(("mode", "rate"), [("Q", 0.02), ("PS", 0.02)])
def test_a_shift_layer_learns_a_shift_layer(mode: str, rate: float) -> None:
    teacher = ShiftLinear(16, 8, bias=False).eval()
    student = ShiftLinear(16, 8, bias=False, mode=mode)
    optimizer = torch.optim.Adam(student.parameters(), lr=rate)
    losses = []
    for _ in range(300):
        x = torch.randn(64, 16)
        loss = F.mse_loss(student(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.15 * sum(losses[:10])


def test_the_kept_weight_follows_every_change_of_the_float_weight() -> None:
    layer = ShiftLinear(8, 8, bias=False).eval()
    x = torch.randn(2, 8)

    def assert_fresh() -> None:
        assert torch.equal(layer(x), F.linear(x, power_of_two.quantize(layer.weight)))

    with torch.no_grad():
        assert_fresh()
        assert layer.quantized_weight() is layer.quantized_weight()
        layer.weight.mul_(-3)
        assert_fresh()
        layer.load_state_dict(ShiftLinear(8, 8, bias=False).state_dict())
        assert_fresh()
        layer.weight = nn.Parameter(torch.randn(8, 8))
        assert_fresh()
        layer.double().float()
        assert_fresh()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    layer(x).sum().backward()
    torch.optim.Adam(layer.parameters(), lr=1.0).step()
    assert_fresh()
    layer.weight.data.zero_()  # torch does not count this one; changing the mode does
    layer.eval()
    assert_fresh()


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_the_kept_weight_follows_optimizers_in_evaluation(optimizer, options: dict) -> None:
    """Fused ones do not count their steps as changes of the weight."""
    layer = ShiftLinear(5, 3).eval()
    steps = optimizer(layer.parameters(), lr=1.0, **options)
    x = torch.randn(4, 5)
    for _ in range(3):
        steps.zero_grad()
        with torch.no_grad():
            layer(x)
        layer(x).sum().backward()
        steps.step()
        with torch.no_grad():
            wanted = power_of_two.quantize(layer.weight, layer.bits, layer.terms)
            assert torch.equal(layer.quantized_weight(), wanted)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mode", ["Q", "PS"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_gradients_are_those_of_backward(mode: str, train: bool) -> None:
    model, x = nn.Sequential(ShiftLinear(5, 3, mode=mode)).train(train), torch.randn(4, 5)
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    model(x).square().sum().backward()
    whole = torch.func.grad(loss)(values, x)
    single = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole[name], parameter.grad)
        torch.testing.assert_close(single[name].sum(0), parameter.grad)


def test_a_weight_kept_in_inference_mode_can_be_trained_later() -> None:
    layer = ShiftLinear(8, 8).eval()
    with torch.inference_mode():
        layer(torch.randn(1, 8))
    layer(torch.randn(1, 8)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("mode", ["Q", "PS"])
def test_deepcopy_and_state_dict_round_trip(mode: str) -> None:
    layer = ShiftLinear(8, 4, mode=mode, terms=2).eval()
    x = torch.randn(3, 8)
    expected = layer(x)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), expected)
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert torch.equal(layer(x), expected)
    other = ShiftLinear(8, 4, mode=mode, terms=2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x), expected)


def test_a_linear_checkpoint_loads_into_a_shift_layer() -> None:
    linear = nn.Linear(8, 4)
    layer = ShiftLinear(8, 4)
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight)


@pytest.mark.parametrize("mode", ["Q", "PS"])
def test_compiled_and_eager_agree(mode: str) -> None:
    layer = ShiftLinear(16, 8, mode=mode)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 16)
    gradients = []
    for run in (layer, compiled):
        layer.zero_grad()
        out = run(x)
        out.square().sum().backward()
        gradients.append([out.detach(), *(p.grad.clone() for p in layer.parameters())])
    for eager, other in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, other)


@pytest.mark.parametrize("mode", ["Q", "PS"])
def test_under_bf16_autocast_weights_stay_exact(mode: str) -> None:
    layer = ShiftLinear(16, 8, mode=mode)
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.float().sum().backward()
        assert torch.equal(layer.eval().freeze()(x), y)
    assert y.dtype == torch.bfloat16
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    weight = layer.quantized_weight()
    assert torch.equal(weight.bfloat16().float(), weight)


def test_stochastic_rounding_stops_in_evaluation() -> None:
    layer = ShiftLinear(32, 32, stochastic=True)
    assert not torch.equal(layer.quantized_weight(), layer.quantized_weight())
    layer.eval()
    assert torch.equal(layer.quantized_weight(), power_of_two.quantize(layer.weight))


def test_broken_weights_are_refused_by_name() -> None:
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"the weight of head\.fc holds 1 of 16"):
        ShiftLinear.from_linear(linear, name="head.fc")
    layer = ShiftLinear(4, 4)
    layer.load_state_dict(linear.state_dict())
    assert torch.isnan(layer(torch.ones(1, 4))).any()
    with pytest.raises(UserError, match=r"^head\.fc: .*NaN or infinite"):
        layer.freeze(name="head.fc")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShiftLinear(4, 4, bits=7), "bits must be an integer from 2 to 6, not 7"),
        (lambda: ShiftLinear(4, 4, terms=3), "terms must be 1 or 2, not 3"),
        (lambda: ShiftLinear(4, 4, mode="q"), "mode must be one of Q, PS, not 'q'"),
        (lambda: ShiftLinear(4, 4, mode="PS", stochastic=True), "needs mode 'Q'"),
        (lambda: ShiftConv2d(4, 4, 3, stride=1), r"\(3, 3\) must tile the image.* not \(1, 1\)"),
        (lambda: PackedShiftConv2d(4, 4, (2, 3), stride=2), r"\(2, 3\) must tile the image"),
        (lambda: PackedShiftLinear(4, 4, bits=1), "bits"),
    ],
)
def test_options_that_do_not_exist_are_refused(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@quick
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),  # of pointwise kernels; others move by their own size
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(4, 11), st.integers(4, 11)),
    batch=st.sampled_from([(), (2,), (0,)]),
    mode=st.sampled_from(["Q", "PS"]),
    terms=st.integers(1, 2),
)
def test_a_shift_convolution_is_the_convolution_with_the_nearest_powers_of_two(
    kernel, stride, channels, size, batch, mode, terms
) -> None:
    conv = nn.Conv2d(*channels, kernel, stride if kernel == (1, 1) else kernel)
    shift = ShiftConv2d.from_conv(conv, mode=mode, terms=terms).eval()
    x = torch.randn(*batch, channels[0], *size)
    weight = power_of_two.quantize(conv.weight.flatten(1), terms=terms)
    assert torch.equal(shift.quantized_weight(), weight)
    expected = F.conv2d(x, weight.view_as(conv.weight), conv.bias, conv.stride)
    torch.testing.assert_close(shift(x), expected)
    torch.testing.assert_close(shift.to_conv()(x), expected)
    packed = shift.freeze()
    assert type(packed) is PackedShiftConv2d and not list(packed.parameters())
    assert torch.equal(packed(x), shift(x))


def test_shift_convolutions_have_the_gradients_of_the_convolution() -> None:
    layer = ShiftConv2d(3, 8, 4)
    x = torch.randn(2, 3, 8, 12, requires_grad=True)
    layer(x).square().sum().backward()
    weight = power_of_two.quantize(layer.weight.flatten(1)).view_as(layer.weight).requires_grad_()
    other = x.detach().requires_grad_()
    F.conv2d(other, weight, layer.bias, 4).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    torch.testing.assert_close(x.grad, other.grad)


def test_a_convolutions_checkpoint_loads_into_a_shift_convolution() -> None:
    conv = nn.Conv2d(3, 4, 2, 2)
    layer = ShiftConv2d(3, 4, 2)
    layer.load_state_dict(conv.state_dict())
    assert torch.equal(layer.weight, conv.weight)


@pytest.mark.parametrize(
    ("conv", "given_"),
    [
        (nn.Conv2d(4, 4, 3), r"kernel_size=\(3, 3\), stride=\(1, 1\)"),
        (nn.Conv2d(4, 4, 2, 2, padding=1), r"padding=\(1, 1\)"),
        (nn.Conv2d(4, 4, 2, 2, dilation=2), r"dilation=\(2, 2\)"),
        (nn.Conv2d(4, 4, 1, groups=2), "groups=2"),
    ],
)
def test_convolutions_that_are_no_linear_layers_are_refused(conv: nn.Conv2d, given_: str) -> None:
    with pytest.raises(UserError, match=r"stem\.conv is no linear layer over patches.*" + given_):
        ShiftConv2d.from_conv(conv, name="stem.conv")


def test_pointwise_convolutions_may_be_padded_by_name_only() -> None:
    x = torch.randn(1, 4, 5, 5)
    for conv in (nn.Conv2d(4, 2, 1, padding="same"), nn.Conv2d(4, 2, 3, 3, padding="valid")):
        shift = ShiftConv2d.from_conv(conv)
        torch.testing.assert_close(shift(x), shift.to_conv()(x))


@pytest.mark.parametrize("grad", [False, True])
def test_integers_are_refused_by_packed_layers(grad: bool) -> None:
    layer = ShiftLinear(5, 3).freeze()
    with torch.set_grad_enabled(grad), pytest.raises(UserError, match="floating"):
        layer(torch.ones(2, 5, dtype=torch.long))


@pytest.mark.parametrize("packed", [False, True])
def test_inputs_of_another_shape_are_refused(packed: bool) -> None:
    linear, conv = ShiftLinear(8, 4), ShiftConv2d(3, 4, 2)
    if packed:
        linear, conv = linear.freeze(), conv.freeze()
    with pytest.raises(UserError, match=r"ShiftLinear takes \[..., 8\], not \[2, 7\]"):
        linear(torch.ones(2, 7))
    for shape in ((1, 4, 4, 4), (3, 1, 4), (3, 4)):
        with pytest.raises(UserError, match=r"ShiftConv2d takes images \[..., 3, H, W\] of at least 2 x 2 pixels"):
            conv(torch.ones(shape))


MAKERS = {
    "linear Q": lambda: ShiftLinear(9, 5, bits=5),
    "linear PS": lambda: ShiftLinear(9, 5, mode="PS", terms=2),
    "conv Q": lambda: ShiftConv2d(3, 5, 2, terms=2),
    "conv PS": lambda: ShiftConv2d(3, 5, 2, mode="PS", bits=3),
    "packed linear": lambda: ShiftLinear(9, 5, bits=5, terms=2).freeze(),
    "packed conv": lambda: ShiftConv2d(3, 5, 2, bits=3).freeze(),
}


def example_for(layer: nn.Module) -> torch.Tensor:
    return torch.randn(2, 3, 5, 6) if "Conv" in type(layer).__name__ else torch.randn(4, 9)


@pytest.mark.parametrize("kind", MAKERS)
def test_every_layer_goes_through_safetensors_and_deepcopy(kind: str, tmp_path) -> None:
    layer, other = MAKERS[kind]().eval(), MAKERS[kind]().eval()
    x = example_for(layer)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("kind", MAKERS)
def test_every_layer_compiles_without_breaks_and_exports(kind: str) -> None:
    layer = MAKERS[kind]().eval()
    x = example_for(layer)
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        torch.testing.assert_close(exported.module()(torch.cat([x, x])), torch.cat([expected, expected]))


@pytest.mark.parametrize("kind", ["linear Q", "linear PS", "conv Q", "conv PS"])
def test_a_step_of_training_through_the_compiler_equals_an_eager_one(kind: str) -> None:
    layer = MAKERS[kind]()
    x = example_for(layer)
    weights = []
    for compile_it in (False, True):
        trained = copy.deepcopy(layer)
        run = torch.compile(trained, backend="aot_eager", fullgraph=True) if compile_it else trained
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
        weights.append([parameter.detach() for parameter in trained.parameters()])
    for eager, compiled in zip(*weights, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("kind", ["linear Q", "conv PS"])
def test_layers_without_storage_freeze_to_layers_without_storage(kind: str) -> None:
    with torch.device("meta"):
        frozen = MAKERS[kind]().freeze()
    layer = MAKERS[kind]().eval()
    frozen.load_state_dict(layer.freeze().state_dict(), assign=True)
    x = example_for(layer)
    assert torch.equal(frozen(x), layer(x))


def test_any_leading_shape() -> None:
    layer = ShiftLinear(8, 4)
    for shape in ((8,), (0, 8), (2, 3, 8), (2, 3, 5, 8)):
        x = torch.randn(shape)
        assert layer(x).shape == (*shape[:-1], 4)
        assert layer.freeze()(x).shape == (*shape[:-1], 4)
