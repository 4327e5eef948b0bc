"""The fused ray-transformer block: the kernel against its twin, and the twin against the layers."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftadd3d import UserError, kernels
from shiftadd3d import nn as sa
from shiftadd3d.kernels.cpu.gnt.ray_block import KERNEL
from shiftadd3d.kernels.cpu.gnt.shift_problems import ShiftRayBlock, random_ray_block
from shiftadd3d.kernels.pack.gnt.ray_block import panels, ray_block_of_panels
from shiftadd3d.kernels.pack.panel import lanes_on
from shiftadd3d.kernels.pack.shift import panel_form, panel_forms, panels_of_forms
from shiftadd3d.kernels.reference.gnt.ray_block import (
    Attention,
    random_block,
    ray_block_twin,
    samples_of_certain_codes,
)
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.models.gnt.transformer import RayTransformer
from shiftadd3d.nn import AddAttention

ATTENTIONS = get_args(Attention)
SIZES = {"rays": 4, "samples": 9, "width": 16, "heads": 2, "hidden": 0, "kernel": 0}


def op(x, weights, biases, conv, heads, *rest) -> tuple[torch.Tensor, torch.Tensor]:
    """The op, given the arguments of its twin."""
    packed = panels(weights, biases, conv, heads, lanes_on(torch.device("cpu")))
    return torch.ops.shiftadd3d.ray_block(x, packed, heads, *rest)


def block(seed: int = 0, attention: str = "softmax", return_weights: bool = False, **changes) -> tuple:
    return *random_block(seed, **{**SIZES, **changes}), attention, 1e-6, return_weights


def assert_same(arguments: tuple) -> None:
    """The kernel gives what the twin does, but where a query or key is so near zero that rounding decides its code."""
    (out, first), (twin, twins_first) = op(*arguments), ray_block_twin(*arguments)
    certain = torch.ones(out.shape[:2], dtype=torch.bool)
    if arguments[5] != "softmax":
        certain = samples_of_certain_codes(*arguments[:3], arguments[6])
    torch.testing.assert_close(out[certain], twin[certain], rtol=1e-3, atol=1e-4)
    if len(first):
        torch.testing.assert_close(first[certain[:, 0]], twins_first[certain[:, 0]], rtol=1e-3, atol=1e-5)


def test_the_twin_computes_what_the_softmax_layers_do():
    torch.manual_seed(0)
    layer = RayTransformer(16, num_heads=2, dropout=0.0).eval()
    x = torch.randn(3, 7, 16)
    linears = (layer.attn.q_fc, layer.attn.k_fc, layer.attn.v_fc, layer.attn.out_fc)
    modules = (layer.attn_norm, *linears, layer.ff_norm, layer.ff.fc1, layer.ff.fc2)
    arguments = ([m.weight for m in modules], [m.bias for m in modules], None, 2, "softmax", 1e-6, True)
    out, weights = layer(x, return_weights=True)
    twin, twins_weights = ray_block_twin(x, *arguments)
    torch.testing.assert_close(twin, out)
    torch.testing.assert_close(twins_weights, weights)


@pytest.mark.parametrize("codes", ["pm1", "01"])
def test_the_twin_computes_what_the_additive_layer_does(codes):
    torch.manual_seed(0)
    norm, layer = torch.nn.LayerNorm(16, eps=1e-6), AddAttention(16, num_heads=2, codes=codes, dwconv=3).eval()
    torch.nn.init.normal_(layer.dwconv.weight)
    x = torch.randn(3, 7, 16)
    modules = (norm, layer.q_fc, layer.k_fc, layer.v_fc, layer.out_fc)
    conv = layer.dwconv.weight.view(2, 3)
    arguments = ([m.weight for m in modules], [m.bias for m in modules], conv, 2, codes, 1e-6, True)
    out, weights = layer(norm(x), return_weights=True)
    twin, twins_weights = ray_block_twin(x, *arguments)
    torch.testing.assert_close(twin, x + out)
    torch.testing.assert_close(twins_weights, weights)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(ATTENTIONS), st.integers(0, 99))
def test_rays_and_samples_in_any_number(rays, samples, attention, seed):
    assert_same(block(seed, attention, rays=rays, samples=samples, kernel=0 if attention == "softmax" else 3))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(("width", "heads", "hidden"), [(6, 1, 5), (15, 3, 0), (20, 5, 40), (64, 4, 256)])
def test_widths_and_heads_need_not_be_whole_vectors(attention, width, heads, hidden):
    assert_same(block(1, attention, width=width, heads=heads, hidden=hidden, kernel=5, return_weights=True))


def test_a_convolution_longer_than_the_ray_sees_all_of_it():
    assert_same(block(2, "pm1", samples=2, kernel=9))


def test_weights_of_the_first_sample_sum_to_one():
    for attention in ATTENTIONS:
        _, weights = op(*block(3, attention, return_weights=True))
        torch.testing.assert_close(weights.sum(-1), torch.ones(4))
        assert op(*block(3, attention))[1].shape == (0,)


def test_scores_far_apart_do_not_overflow():
    x, weights, *rest = block(4, "softmax")
    weights = [weights[0], weights[1] * 300.0, *weights[2:]]
    torch.testing.assert_close(op(x, weights, *rest)[0], ray_block_twin(x, weights, *rest)[0], rtol=1e-3, atol=1e-3)


def test_strides_and_odd_addresses():
    x, *rest = block(5, hidden=24)
    expected = ray_block_twin(x, *rest)[0]
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    shifted = torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape)
    for one in (turned, shifted):
        torch.testing.assert_close(op(one, *rest)[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_no_samples_give_no_outcome(shape):
    _, *rest = block(6)
    assert op(torch.zeros(*shape, 16), *rest)[0].shape == (*shape, 16)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_ray(attention, bad):
    arguments = block(7, attention, hidden=24)
    arguments[0][2, 3, 5] = bad
    out, twin = op(*arguments)[0], ray_block_twin(*arguments)[0]
    others = [0, 1, 3]
    torch.testing.assert_close(out[others], twin[others], rtol=1e-3, atol=1e-4)
    assert bool(out[2, 3].isnan().all()) and bool(twin[2, 3].isnan().all())


def test_bfloat16_is_computed_in_float32():
    x, *rest = block(8, hidden=24)
    out, _ = op(x.bfloat16(), *rest)
    assert out.dtype == torch.bfloat16
    expected, _ = ray_block_twin(x.bfloat16().float(), *rest)
    torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=1e-4)


def test_threads_change_nothing(torch_threads):
    assert_same(block(9, "pm1", rays=200, kernel=3))


def test_compiled_models_see_through_it():
    x, weights, biases, conv, heads, *rest = block(10, return_weights=True)
    packed = panels(weights, biases, conv, heads, lanes_on(x.device))

    def model(x):
        out, weights = torch.ops.shiftadd3d.ray_block(x, packed, heads, *rest)
        return out.sum(-1) * weights

    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "cosine"}, "attention must be one of softmax, pm1, 01"),
        ({"num_heads": 3}, "num_heads must divide the 16 channels, and 3 does not"),
        ({"x": torch.zeros(3, 16)}, r"x must be \[rays, samples, channels\]"),
        ({"x": torch.zeros(2, 3, 20)}, "ray_block takes float32 panels"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    x, weights, biases, conv, heads, *rest = block(11)
    packed = panels(weights, biases, conv, heads, lanes_on(x.device))
    names = ("x", "panels", "num_heads", "attention", "eps", "return_weights")
    with pytest.raises(UserError, match=message):
        torch.ops.shiftadd3d.ray_block(
            *{**dict(zip(names, (x, packed, heads, *rest), strict=True)), **changes}.values()
        )


def test_a_convolution_of_an_even_length_is_refused():
    _, weights, biases, _, heads, *_ = block(11)
    with pytest.raises(UserError, match="an odd number"):
        panels(weights, biases, torch.zeros(2, 4), heads, 8)


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
@pytest.mark.parametrize(("width", "heads", "hidden", "kernel"), [(15, 3, 0, 0), (20, 5, 7, 3)])
def test_panels_for_any_vectors_hold_the_weights(width, heads, hidden, kernel, lanes):
    x, weights, biases, conv, *rest = block(12, "pm1", True, width=width, heads=heads, hidden=hidden, kernel=kernel)
    found = ray_block_of_panels(x, panels(weights, biases, conv, heads, lanes), *rest)
    for one, other in zip(found, ray_block_twin(x, weights, biases, conv, *rest), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("place", [-3, -2])
def test_a_single_wrong_number_fails_the_trial(attention, place):
    spec = {"width": 16, "heads": 2, "hidden": 8, "attention": attention, "kernel": 3, "return_weights": True}
    spec["form"] = "float32"
    function = KERNEL.function(**spec)
    assert function is not None
    KERNEL.trial(function, **spec)

    def wrong(*arguments) -> None:
        function(*arguments)
        arguments[place].view(-1)[-1] *= 1.01

    with pytest.raises(AssertionError, match="1 / "):
        KERNEL.trial(wrong, **spec)


def with_shifts(problem: ShiftRayBlock, numerics: str, x: torch.Tensor | None = None) -> tuple:
    packed = [*problem.panels, problem.norms, *panels_of_forms(problem.shifts, panel_forms(targets.current())).values()]
    rest = problem.heads, problem.attention, problem.eps, True
    with kernels.numerics(numerics):
        return torch.ops.shiftadd3d.ray_block(problem.x if x is None else x, packed, *rest)


def random_problem(seed: int, attention: str, **changes: int) -> ShiftRayBlock:
    kernel = 0 if attention == "softmax" else 3
    sizes = {"rays": 4, "samples": 9, "width": 32, "heads": 2, "hidden": 64, "kernel": kernel}
    return random_ray_block(seed, attention, **(sizes | changes))


@pytest.mark.parametrize("numerics", ["fast", "int8"])
@pytest.mark.parametrize(("width", "heads", "hidden"), [(32, 4, 0), (64, 4, 256)])
@settings(max_examples=6, deadline=None)
@given(st.integers(20, 60), st.integers(1, 40), st.sampled_from(ATTENTIONS), st.integers(0, 99))
def test_shift_weights_meet_activations_that_are_rounded_as_stated(
    numerics, width, heads, hidden, rays, samples, attention, seed
):
    form = panel_form(targets.current(), numerics)
    sizes = {"width": width, "heads": heads, "hidden": hidden}
    problem = random_problem(seed, attention, rays=rays, samples=samples, **sizes)
    out, first = with_shifts(problem, numerics)
    exact = with_shifts(problem, "exact")[0]
    assert torch.equal(out, exact) == (form is None)
    if form is not None:
        problem.check(out, first, form)


@pytest.mark.parametrize("numerics", ["fast", "int8"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_a_form_cannot_express_is_computed_exactly(numerics, bad):
    problem = random_problem(0, "pm1")
    x = problem.x.clone()
    x[2, 3, 5] = bad
    for found, expected in zip(with_shifts(problem, numerics, x), with_shifts(problem, "exact", x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("numerics", ["fast", "int8"])
@pytest.mark.parametrize("recipe", ["add+shift", "add+shift-attn", "add", None])
@pytest.mark.parametrize("width", [32, 24])
def test_frozen_blocks_give_their_kernel_what_it_takes(numerics, recipe, width):
    torch.manual_seed(0)
    layer = torch.nn.Sequential(RayTransformer(width, num_heads=4, dropout=0.0)).eval()
    if recipe:
        sa.reparameterize_(layer, recipe, verbose=False)
    sa.freeze_(layer, verbose=False)
    x = torch.randn(40, 9, width)
    with torch.inference_mode():
        exact = layer[0](x)[0]
        with kernels.numerics(numerics):
            out = layer[0](x)[0]
    whole = all(isinstance(part, sa.PackedShiftLinear) for name, part in layer.named_modules() if "fc" in name[-3:])
    rounds = whole and width == 32 and panel_form(targets.current(), numerics) is not None
    assert torch.equal(out, exact) != rounds
    assert (out - exact).norm() <= 0.1 * (exact - x).norm()


def test_samples_whose_codes_rounding_decides_are_told():
    x, weights, biases, *_ = random_block(1, rays=3, samples=5, width=16, heads=2, hidden=0, kernel=0)
    assert samples_of_certain_codes(x, weights, biases, 1e-6).all()

    def with_zero(number: int) -> torch.Tensor:
        """A projection whose last outcome is zero for the fourth sample of the second ray."""
        normed = torch.nn.functional.layer_norm(x[1, 3], (16,), weights[0], biases[0], 1e-6).double()
        row = weights[number][-1].double()
        row = row - normed * (normed @ row) / (normed @ normed)
        changed = [*weights]
        changed[number] = torch.cat((weights[number][:-1], row.float()[None]))
        return samples_of_certain_codes(x, changed, biases, 1e-6)

    of_query, of_key = with_zero(1), with_zero(2)
    assert not of_query[1, 3] and of_query.sum() == 14
    assert not of_key[1].any() and of_key.sum() == 10


def test_other_processors_get_their_own_instructions():
    spec = {"width": 16, "heads": 2, "hidden": 8, "attention": "pm1", "kernel": 3, "return_weights": False}
    spec["form"] = "float32"
    assert "zmm" in KERNEL.assembly(targets.find("avx512"), **spec)
    assert "ymm" not in KERNEL.assembly(targets.find("generic"), **spec)
