"""The fused colour head: the kernel against its twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftadd3d import UserError
from shiftadd3d.kernels.cpu.gnt.color_blend import KERNEL
from shiftadd3d.kernels.ops.gnt import color_blend as ops_color_blend
from shiftadd3d.kernels.pack.gnt.color_blend import color_blend_of_panels, panels
from shiftadd3d.kernels.pack.panel import lanes_on
from shiftadd3d.kernels.reference.gnt.color_blend import Scales, angle_prior, color_blend_twin, random_blend
from shiftadd3d.kernels.runtime import targets

SIZES = {"rays": 5, "samples": 7, "views": 4, "width": 16, "inputs": 11, "hidden": 8}


def op(x, values, ray_diff, mask, weights, *rest) -> tuple[torch.Tensor, torch.Tensor]:
    """The op, given the arguments of its twin."""
    packed = panels(weights, *rest, lanes_on(torch.device("cpu")))
    return ops_color_blend.color_blend(x, values, ray_diff, mask, packed, weights[0].shape[0])


def problem(seed: int = 0, **changes) -> list:
    return list(random_blend(seed, **{**SIZES, **changes}))


def assert_same(arguments: list) -> None:
    for out, expected in zip(op(*arguments), color_blend_twin(*arguments), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(rays=st.integers(1, 9), samples=st.integers(1, 70), views=st.integers(1, 32), seed=st.integers(0, 99))
def test_the_kernel_computes_what_the_twin_does(rays, samples, views, seed):
    assert_same(problem(seed, rays=rays, samples=samples, views=views))


@pytest.mark.parametrize(("width", "inputs", "hidden"), [(1, 4, 1), (33, 35, 16), (64, 35, 31)])
def test_widths_need_not_be_whole_vectors(width, inputs, hidden):
    assert_same(problem(1, width=width, inputs=inputs, hidden=hidden))


def test_a_colour_is_a_mixture_of_what_views_show():
    arguments = problem(2, rays=30)
    arguments[1][..., :3] = torch.rand(30, 7, 4, 3)
    rgb, weights = op(*arguments)
    torch.testing.assert_close(weights.sum(-1), torch.ones(30))
    lowest, highest = arguments[1][..., :3].amin(dim=(1, 2)), arguments[1][..., :3].amax(dim=(1, 2))
    assert bool(((rgb >= lowest - 1e-6) & (rgb <= highest + 1e-6)).all())


def test_without_a_spread_views_weigh_by_their_angle_alone():
    cosine, mask = torch.tensor([[0.9, 0.99, 0.5]]), torch.tensor([[True, True, False]])
    prior = angle_prior(cosine, mask, Scales(*torch.tensor([20.0, 1.0, 0.0])))
    torch.testing.assert_close(prior, 20.0 * (cosine - 1.0))


def test_with_a_spread_the_nearest_view_counts_more_however_close_together_views_lie():
    off = torch.tensor([[0.01, 0.03, 0.05]])
    scales = Scales(*torch.tensor([50.0, 1.0, 0.03]))
    shares = [
        torch.softmax(angle_prior(1.0 - off / closer, torch.ones(1, 3, dtype=torch.bool), scales), dim=-1)[0, 0]
        for closer in (1.0, 10.0, 100.0)
    ]
    assert min(shares) > 0.55  # by the angle alone: 0.34 where views lie a hundred times as close
    # At the mean that the spread names, twice the scale.
    prior = angle_prior(1.0 - off, torch.ones(1, 3, dtype=torch.bool), scales)
    torch.testing.assert_close(prior, -100.0 * off)


def test_views_that_do_not_see_a_sample_say_nothing_of_the_spread():
    arguments = problem(11)
    arguments[3][..., 2] = False
    expected = op(*arguments)
    arguments[2][..., 2, 3] = -1.0
    arguments[4][1][:, 11 + 3] = 0.0  # the hidden layer's look at cosines
    again = op(*arguments)
    arguments[2][..., 2, 3] = 0.5
    assert all(map(torch.equal, again, op(*arguments))) and expected[0].shape == again[0].shape


def test_views_in_the_target_s_own_place_are_finite():
    arguments = problem(12)
    arguments[2][..., 3] = 1.0
    assert_same(arguments)
    assert all(bool(out.isfinite().all()) for out in op(*arguments))


def test_rays_that_nothing_sees_weigh_everything_the_same():
    arguments = problem(3)
    arguments[3][2] = False
    rgb, weights = op(*arguments)
    torch.testing.assert_close(weights[2], torch.full((7,), 1 / 7))
    torch.testing.assert_close(rgb[2], arguments[1][2, ..., :3].mean(dim=(0, 1)))


def test_more_views_than_fit_go_through_the_twin():
    arguments = problem(4, views=33)
    assert_same(arguments)


def test_a_ray_that_is_not_finite_harms_no_other():
    arguments = problem(5)
    arguments[3][:] = True
    arguments[1][2, 3, 1, 7] = float("nan")
    out, twin = op(*arguments), color_blend_twin(*arguments)
    assert bool(out[0][2].isnan().all()) and bool(twin[0][2].isnan().all())
    others = [0, 1, 3, 4]
    for one, other in zip(out, twin, strict=True):
        torch.testing.assert_close(one[others], other[others], rtol=1e-4, atol=1e-5)


def test_strides_and_no_rays():
    arguments = problem(6)
    expected = op(*arguments)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments[:4]]
    assert all(map(torch.equal, op(*turned, *arguments[4:]), expected))
    rgb, weights = op(*(x[:0] for x in arguments[:4]), *arguments[4:])
    assert rgb.shape == (0, 3) and weights.shape == (0, 7)


def test_threads_change_nothing(torch_threads):
    assert_same(problem(7, rays=200))


def test_compiled_models_see_through_it():
    x, values, ray_diff, mask, weights, *rest = problem(8)
    packed = panels(weights, *rest, lanes_on(x.device))

    def model(x):
        rgb, weights = ops_color_blend.color_blend(x * 2.0, values, ray_diff, mask, packed, 8)
        return rgb.sum(-1) * weights.amax(-1)

    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_arguments_that_do_not_fit_are_refused():
    x, values, ray_diff, mask, weights, *rest = problem(9)
    with pytest.raises(UserError, match="C at least 1"):
        op(x, values[..., :3], ray_diff, mask, weights, *rest)
    with pytest.raises(UserError, match="mask bool"):
        op(x, values, ray_diff, mask.float(), weights, *rest)
    packed = panels(weights, *rest, lanes_on(x.device))
    with pytest.raises(UserError, match="color_blend takes float32 panels"):
        ops_color_blend.color_blend(x, values, ray_diff, mask, packed[:4], 8)


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
def test_panels_for_any_vectors_hold_the_weights(lanes):
    arguments = problem(10, width=13, hidden=6)
    found = color_blend_of_panels(*arguments[:4], panels(*arguments[4:], lanes), 6)
    for one, other in zip(found, color_blend_twin(*arguments), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_other_processors_get_their_own_instructions():
    spec = {"width": 16, "inputs": 11, "hidden": 8}
    assert "zmm" in KERNEL.assembly(targets.find("avx512"), **spec)
    assert "ymm" not in KERNEL.assembly(targets.find("generic"), **spec)
