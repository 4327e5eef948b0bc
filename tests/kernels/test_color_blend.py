"""The fused colour head: the kernel against its twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftadd3d import UserError
from shiftadd3d.kernels.cpu.gnt.color_blend import KERNEL
from shiftadd3d.kernels.reference.gnt.color_blend import color_blend_twin, random_blend
from shiftadd3d.kernels.runtime import targets

OPS = torch.ops.shiftadd3d
SIZES = {"rays": 5, "samples": 7, "views": 4, "width": 16, "inputs": 11, "hidden": 8}


def problem(seed: int = 0, **changes) -> list:
    return list(random_blend(seed, **{**SIZES, **changes}))


def assert_same(arguments: list) -> None:
    for out, expected in zip(OPS.color_blend(*arguments), color_blend_twin(*arguments), strict=True):
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
    rgb, weights = OPS.color_blend(*arguments)
    torch.testing.assert_close(weights.sum(-1), torch.ones(30))
    lowest, highest = arguments[1][..., :3].amin(dim=(1, 2)), arguments[1][..., :3].amax(dim=(1, 2))
    assert bool(((rgb >= lowest - 1e-6) & (rgb <= highest + 1e-6)).all())


def test_rays_that_nothing_sees_weigh_everything_the_same():
    arguments = problem(3)
    arguments[3][2] = False
    rgb, weights = OPS.color_blend(*arguments)
    torch.testing.assert_close(weights[2], torch.full((7,), 1 / 7))
    torch.testing.assert_close(rgb[2], arguments[1][2, ..., :3].mean(dim=(0, 1)))


def test_more_views_than_fit_go_through_the_twin():
    arguments = problem(4, views=33)
    assert all(map(torch.equal, OPS.color_blend(*arguments), color_blend_twin(*arguments)))


def test_a_ray_that_is_not_finite_harms_no_other():
    arguments = problem(5)
    arguments[3][:] = True
    arguments[1][2, 3, 1, 7] = float("nan")
    out, twin = OPS.color_blend(*arguments), color_blend_twin(*arguments)
    assert bool(out[0][2].isnan().all()) and bool(twin[0][2].isnan().all())
    others = [0, 1, 3, 4]
    for one, other in zip(out, twin, strict=True):
        torch.testing.assert_close(one[others], other[others], rtol=1e-4, atol=1e-5)


def test_strides_and_no_rays():
    arguments = problem(6)
    expected = OPS.color_blend(*arguments)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments[:4]]
    assert all(map(torch.equal, OPS.color_blend(*turned, *arguments[4:]), expected))
    rgb, weights = OPS.color_blend(*(x[:0] for x in arguments[:4]), *arguments[4:])
    assert rgb.shape == (0, 3) and weights.shape == (0, 7)


def test_threads_change_nothing(torch_threads):
    assert_same(problem(7, rays=200))


def test_compiled_models_see_through_it():
    x, *rest = problem(8)

    def model(x):
        rgb, weights = OPS.color_blend(x * 2.0, *rest)
        return rgb.sum(-1) * weights.amax(-1)

    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_arguments_that_do_not_fit_are_refused():
    x, values, ray_diff, mask, weights, *rest = problem(9)
    with pytest.raises(UserError, match="C at least 1"):
        OPS.color_blend(x, values[..., :3], ray_diff, mask, weights, *rest)
    with pytest.raises(UserError, match="mask bool"):
        OPS.color_blend(x, values, ray_diff, mask.float(), weights, *rest)
    with pytest.raises(UserError, match="weight and bias of view must be"):
        OPS.color_blend(x, values, ray_diff, mask, [weights[0], *weights[:3]], *rest)


def test_other_processors_get_their_own_instructions():
    spec = {"width": 16, "inputs": 11, "hidden": 8}
    assert "zmm" in KERNEL.assembly(targets.find("avx512"), **spec)
    assert "ymm" not in KERNEL.assembly(targets.find("generic"), **spec)
