"""Subtraction attention over source views: the kernel against its twin, and the twin against the layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftadd3d import UserError, kernels
from shiftadd3d import nn as sa
from shiftadd3d.kernels.cpu.gnt.shift_problems import ShiftAttention, random_shift_attention
from shiftadd3d.kernels.cpu.gnt.view_attention import KERNEL, error_bound
from shiftadd3d.kernels.pack.gnt.view_attention import panels, shift_form, shift_forms, view_attention_of_panels
from shiftadd3d.kernels.pack.panel import lanes_on
from shiftadd3d.kernels.pack.shift import in_int16, panels_of_forms
from shiftadd3d.kernels.reference.gnt.view_attention import MAX_VIEWS, blend_views, view_attention_twin
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.models.gnt.transformer import ViewAttention

CPU = torch.device("cpu")


def op(query, views, ray_diff, mask, weights, biases) -> torch.Tensor:
    """The op, given the arguments of its twin."""
    packed = panels(weights, biases, lanes_on(CPU))
    return torch.ops.shiftadd3d.view_attention(query, views, ray_diff, mask, packed)


def problem(points: int, views: int, width: int, hidden: int | None = None, seed: int = 0) -> tuple:
    """Arguments of `view_attention`: what the layers would pass on."""
    generator = torch.Generator().manual_seed(seed)
    hidden = hidden or max(1, width // 8)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    square, up, down = (width, width), (width, hidden), (hidden, width)
    sizes = (square, square, square, (hidden, 4), up, down, up, square)
    weights = [draw(*size) / size[1] ** 0.5 for size in sizes]
    biases = [draw(sizes[i][0]) for i in (3, 4, 5, 6, 7)]
    mask = torch.rand(points, views, generator=generator) > 0.3
    return draw(points, width), draw(points, views, width), draw(points, views, 4), mask, weights, biases


def in_float64(arguments: tuple) -> tuple:
    def double(x):
        if isinstance(x, list):
            return [double(one) for one in x]
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return tuple(double(x) for x in arguments)


def test_the_twin_computes_what_the_layer_does():
    torch.manual_seed(0)
    layer = ViewAttention(24, dropout=0.0).eval()
    query, views, ray_diff, mask, _, _ = problem(6, 5, 24)
    linears = (layer.q_fc, layer.k_fc, layer.v_fc, layer.pos_fc[0], layer.pos_fc[2], layer.attn_fc[0])
    linears = (*linears, layer.attn_fc[2], layer.out_fc)
    weights, biases = [fc.weight for fc in linears], [fc.bias for fc in linears if fc.bias is not None]
    expected = layer(query[None], views[None], ray_diff[None], mask[None, ..., None])[0]
    torch.testing.assert_close(view_attention_twin(query, views, ray_diff, mask, weights, biases), expected)


@settings(max_examples=12, deadline=None)
@given(
    points=st.integers(1, 70),
    views=st.integers(1, MAX_VIEWS),
    width=st.sampled_from([8, 13, 32]),
    seed=st.integers(0, 99),
)
def test_the_kernel_is_as_exact_as_torch_for_any_number_of_points_and_views(points, views, width, seed):
    arguments = problem(points, views, width, seed=seed)
    exact = view_attention_twin(*in_float64(arguments))
    error = (op(*arguments) - exact).abs().max()
    twins_error = (view_attention_twin(*arguments) - exact).abs().max()
    assert error <= 2.0 * twins_error + 1e-6 * exact.abs().max()


@pytest.mark.parametrize(("width", "hidden"), [(1, 1), (7, 2), (64, 8), (70, 9)])
def test_widths_need_not_be_whole_vectors(width, hidden):
    arguments = problem(19, 3, width, hidden)
    torch.testing.assert_close(op(*arguments), view_attention_twin(*arguments), rtol=1e-4, atol=1e-5)


def test_a_point_that_no_view_sees_weighs_all_views_the_same():
    query, views, ray_diff, _, weights, biases = problem(9, 4, 16)
    none = torch.zeros(9, 4, dtype=torch.bool)
    # All the same is what a score that ignores its inputs gives, too.
    flat = [*weights[:6], torch.zeros_like(weights[6]), weights[7]]
    torch.testing.assert_close(
        op(query, views, ray_diff, none, weights, biases),
        op(query, views, ray_diff, ~none, flat, biases),
    )


def test_a_masked_view_might_as_well_not_be_there():
    query, views, ray_diff, mask, weights, biases = problem(9, 4, 16)
    mask[:] = torch.tensor([True, False, True, True])
    left = [0, 2, 3]
    torch.testing.assert_close(
        op(query, views, ray_diff, mask, weights, biases),
        op(query, views[:, left], ray_diff[:, left], mask[:, left], weights, biases),
        rtol=1e-4,
        atol=1e-5,
    )


def test_leading_dimensions_strides_and_odd_addresses():
    query, views, ray_diff, mask, weights, biases = problem(24, 5, 16)
    expected = view_attention_twin(query, views, ray_diff, mask, weights, biases)
    turned = (query.view(4, 6, 16).transpose(0, 1), views.view(4, 6, 5, 16).transpose(0, 1))
    turned = (*turned, ray_diff.view(4, 6, 5, 4).transpose(0, 1), mask.view(4, 6, 5).transpose(0, 1))
    out = op(*turned, weights, biases)
    torch.testing.assert_close(out.transpose(0, 1).reshape(24, 16), expected, rtol=1e-4, atol=1e-5)

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    out = op(*(shifted(x) for x in (query, views, ray_diff, mask)), weights, biases)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (0, 7), (3, 0)])
def test_no_points_give_no_outcome(shape):
    _, _, _, _, weights, biases = problem(1, 2, 16)
    arguments = (torch.zeros(*shape, 16), torch.zeros(*shape, 2, 16), torch.zeros(*shape, 2, 4))
    out = op(*arguments, torch.zeros(*shape, 2, dtype=torch.bool), weights, biases)
    assert out.shape == (*shape, 16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_stays_with_its_point(bad, place):
    arguments = problem(12, 3, 16)
    arguments[3][:] = True
    arguments[place][5].view(-1)[3] = bad
    out, twin = op(*arguments), view_attention_twin(*arguments)
    others = torch.arange(12) != 5
    torch.testing.assert_close(out[others], twin[others], rtol=1e-4, atol=1e-5)
    if bad != bad:
        assert bool(twin[5].isnan().all()) and bool(out[5].isnan().all())
    elif twin[5].isfinite().all():  # a ReLU has cut off the infinity
        torch.testing.assert_close(out[5], twin[5], rtol=1e-4, atol=1e-5)


def test_bfloat16_is_computed_in_float32():
    query, views, ray_diff, mask, weights, biases = problem(40, 6, 32)
    narrow = [x.bfloat16() for x in (query, views, ray_diff)]
    out = op(*narrow, mask, weights, biases)
    assert out.dtype == torch.bfloat16
    expected = view_attention_twin(*(x.float() for x in narrow), mask, weights, biases)
    torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=1e-5)


def test_the_twin_takes_float16():
    scores, values = torch.randn(2, 9, 3, 16)
    mask = torch.rand(9, 3) > 0.3
    mask[0] = False
    found = blend_views(scores.half(), values.half(), mask)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), blend_views(scores, values, mask), rtol=1e-2, atol=1e-2)


def test_threads_change_nothing(torch_threads):
    arguments = problem(3000, 4, 16)
    torch.testing.assert_close(op(*arguments), view_attention_twin(*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
@pytest.mark.parametrize(("width", "hidden"), [(13, 3), (32, 4)])
def test_panels_for_any_vectors_hold_the_weights(width, hidden, lanes):
    *inputs, weights, biases = in_float64(problem(11, 4, width, hidden))
    found = view_attention_of_panels(*inputs, panels(weights, biases, lanes))
    torch.testing.assert_close(found, view_attention_twin(*inputs, weights, biases), rtol=1e-4, atol=1e-6)


@pytest.mark.twin_may_stand_in
def test_panels_of_another_cpu_go_through_plain_torch():
    *inputs, weights, biases = problem(11, 4, 24, 3)
    other = panels(weights, biases, 4 if lanes_on(CPU) != 4 else 8)
    with pytest.warns(RuntimeWarning, match="those of another CPU: freeze the model here"):
        found = torch.ops.shiftadd3d.view_attention(*inputs, other)
    torch.testing.assert_close(found, view_attention_twin(*inputs, weights, biases), rtol=1e-4, atol=1e-5)


def test_compiled_models_see_through_it():
    *inputs, weights, biases = problem(10, 3, 16)
    packed = panels(weights, biases, lanes_on(CPU))

    def model(query, views, ray_diff, mask):
        return torch.ops.shiftadd3d.view_attention(query * 2.0, views, ray_diff, mask, packed).sum(-1)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs))
    torch.library.opcheck(
        torch.ops.shiftadd3d.view_attention.default, (*inputs, packed), test_utils=("test_schema", "test_faketensor")
    )


def test_arguments_that_do_not_fit_are_refused():
    query, views, ray_diff, mask, weights, biases = problem(4, 3, 16)
    with pytest.raises(UserError, match=r"views must be \[4, 3, 16\]"):
        op(query, views[:2], ray_diff, mask, weights, biases)
    with pytest.raises(UserError, match="mask must be bool"):
        op(query, views, ray_diff, mask.float(), weights, biases)
    packed = panels(weights, biases, lanes_on(CPU))
    for wrong in (packed[:7], [*packed[:7], packed[0]], [panel.double() for panel in packed]):
        with pytest.raises(UserError, match="view_attention takes float32 panels"):
            torch.ops.shiftadd3d.view_attention(query, views, ray_diff, mask, wrong)


def test_more_views_than_fit_go_through_plain_torch():
    arguments = problem(5, 33, 16)
    torch.testing.assert_close(op(*arguments), view_attention_twin(*arguments), rtol=1e-4, atol=1e-5)


def form_of(numerics: str) -> str | None:
    """What computes with such numerics here, but float32."""
    return shift_form(targets.current(), numerics)


def with_shifts(problem: ShiftAttention, numerics: str, *inputs: torch.Tensor) -> torch.Tensor:
    packed = [*problem.panels, *panels_of_forms(problem.shifts, shift_forms(targets.current())).values()]
    with kernels.numerics(numerics):
        return torch.ops.shiftadd3d.view_attention(*(inputs or problem.inputs), packed)


@pytest.mark.parametrize("numerics", ["fast", "int8"])
@settings(max_examples=10, deadline=None)
@given(
    points=st.integers(4, 70), views=st.integers(1, MAX_VIEWS), width=st.sampled_from([32, 64]), seed=st.integers(0, 99)
)
def test_shift_weights_meet_activations_that_are_rounded_as_stated(numerics, points, views, width, seed):
    form = form_of(numerics)
    problem = random_shift_attention(seed, points=points, views=views, width=width, hidden=width // 8)
    out = with_shifts(problem, numerics)
    if form is None:
        assert torch.equal(out, with_shifts(problem, "exact"))
        return
    expected = problem.rounded(form)
    bound = 4 * error_bound(form, width) * expected.abs().max() + 1e-4
    assert (out - expected).abs().max() <= bound
    # And these are the roundings that make the difference.
    assert not torch.equal(out, with_shifts(problem, "exact"))


def test_products_of_weights_in_16_bits_sum_up_within_32():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 64, generator=draw, dtype=torch.float64)
    weight[1], weight[2], weight[3, 1:] = 0.0, 1e-9, 0.0
    layer = in_int16(weight)
    assert layer.integers.abs().max() <= 32767 and (layer.integers.abs().sum(1) * 32767 < 2**31).all()
    off = (layer.integers * layer.unit[:, None] - weight).abs().sum(1)
    assert (off <= 64 / 65534 * weight.abs().sum(1) * 1.00001).all()


@pytest.mark.parametrize("numerics", ["fast", "int8"])
@pytest.mark.parametrize("bad", [1e25, float("inf"), float("nan")])
def test_what_a_form_cannot_express_is_computed_exactly(numerics, bad):
    problem = random_shift_attention(0, points=40, views=5, width=32, hidden=4)
    query, views, ray_diff, mask = problem.inputs
    views = views.clone()
    views[30, 2, 7] = bad
    inputs = query, views, ray_diff, mask
    expected = with_shifts(problem, "exact", *inputs)
    assert torch.equal(with_shifts(problem, numerics, *inputs).nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("numerics", ["fast", "int8"])
def test_weights_without_integers_are_computed_exactly(numerics):
    problem = random_shift_attention(0, points=20, views=5, width=32, hidden=4)
    with kernels.numerics(numerics):
        out = torch.ops.shiftadd3d.view_attention(*problem.inputs, list(problem.panels))
    assert torch.equal(out, with_shifts(problem, "exact"))


@pytest.mark.parametrize("numerics", ["fast", "int8"])
@pytest.mark.parametrize(("width", "recipe"), [(32, "add+shift"), (24, "add+shift"), (32, None)])
def test_frozen_attention_gives_its_kernel_what_it_takes(numerics, width, recipe):
    torch.manual_seed(0)
    layer = torch.nn.Sequential(ViewAttention(width, dropout=0.0)).eval()
    if recipe:
        sa.reparameterize_(layer, recipe, verbose=False)
    sa.freeze_(layer, verbose=False)
    query, views, ray_diff, mask, _, _ = problem(40, 5, width)
    inputs = query[None], views[None], ray_diff[None], mask[None, ..., None]
    with torch.inference_mode():
        exact = layer[0](*inputs)
        with kernels.numerics(numerics):
            out = layer[0](*inputs)
    rounds = recipe is not None and width % 32 == 0 and form_of(numerics) is not None
    assert torch.equal(out, exact) != rounds
    torch.testing.assert_close(out, exact, rtol=0.0, atol=0.03 * exact.abs().max().item())


@pytest.mark.parametrize("name", ["avx512", "generic"])
def test_other_processors_get_their_own_instructions(name):
    assembly = KERNEL.assembly(targets.find(name), width=16, hidden=2, form="float32")
    assert ("zmm" in assembly) == (name == "avx512")
    assert ("ymm" in assembly) or name == "generic"
