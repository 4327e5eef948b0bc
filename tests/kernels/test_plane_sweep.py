"""The fused plane sweep: the kernel against its twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftadd3d import UserError
from shiftadd3d.kernels.cpu.gnt.plane_sweep import KERNEL
from shiftadd3d.kernels.ops.gnt import plane_sweep as ops_plane_sweep
from shiftadd3d.kernels.pack.gnt.plane_sweep import panels, plane_sweep_of_panels
from shiftadd3d.kernels.pack.panel import lanes_on
from shiftadd3d.kernels.reference.gnt.gather import Scene
from shiftadd3d.kernels.reference.gnt.plane_sweep import Network, plane_sweep_twin, random_sweep
from shiftadd3d.kernels.runtime import targets

SIZES = {"rays": 5, "samples": 11, "views": 3, "channels": 8, "hidden": 16, "with_valid": False}


def packed(scene: Scene, network: Network, lanes: int | None = None) -> tuple:
    """The arguments of the op, given those of its twin."""
    packed = panels(network, lanes_on(torch.device("cpu")) if lanes is None else lanes)
    return *scene, packed, network.hidden_weight.shape[0]


def op(scene: Scene, network: Network) -> tuple[torch.Tensor, ...]:
    """The op, given the arguments of its twin."""
    return ops_plane_sweep.plane_sweep(*packed(scene, network))


def sweep(seed: int = 0, **changes) -> tuple[Scene, Network]:
    return random_sweep(seed, **{**SIZES, **changes})


def assert_same(out: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(out, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@settings(max_examples=10, deadline=None)
@given(rays=st.integers(1, 6), samples=st.integers(1, 30), views=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_kernel_computes_what_the_twin_does(rays, samples, views, seed):
    arguments = sweep(seed, rays=rays, samples=samples, views=views, with_valid=seed % 2 == 1)
    assert_same(op(*arguments), plane_sweep_twin(*arguments))


@pytest.mark.parametrize(("channels", "hidden"), [(0, 3), (1, 16), (7, 5), (21, 9)])
def test_channels_and_hidden_units_in_any_number(channels, hidden):
    arguments = sweep(channels=channels, hidden=hidden)
    assert_same(op(*arguments), plane_sweep_twin(*arguments))


def test_weights_of_a_ray_sum_to_one_and_its_colour_is_a_mean_of_what_views_show():
    weights = op(*sweep(rays=20, views=6))[1]
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(20))
    scene, network = sweep(rays=20, views=6)
    grey = scene._replace(images=torch.full_like(scene.images, 0.25))
    assert float(op(grey, network)[0].max()) <= 0.25 + 1e-6


def test_points_that_fewer_than_two_views_see_count_only_where_there_are_no_others():
    arguments = sweep(rays=8, samples=12, views=2)
    _, weights, _ = op(*arguments)
    expected = plane_sweep_twin(*arguments)
    torch.testing.assert_close(weights, expected[1], rtol=1e-3, atol=1e-5)
    arguments[0].points[3] = -10.0  # behind both cameras
    _, weights, seen = op(*arguments)
    assert not seen[3].any()
    torch.testing.assert_close(weights[3], torch.full((12,), 1 / 12))


def test_a_ray_that_is_not_finite_harms_no_other():
    arguments = sweep(views=4)
    arguments[0].points[2, 3] = float("nan")
    others = [0, 1, 3, 4]
    for out, expected in zip(op(*arguments), plane_sweep_twin(*arguments), strict=True):
        torch.testing.assert_close(out[others], expected[others], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_points_give_no_outcome(shape):
    scene, network = sweep()
    nothing = scene._replace(points=torch.zeros(*shape, 3), origins=torch.zeros(shape[0], 3))
    rgb, weights, seen = op(nothing, network)
    assert rgb.shape == (shape[0], 3) and weights.shape == shape and seen.shape == shape


def test_threads_change_nothing(torch_threads):
    arguments = sweep(rays=60, with_valid=True)
    assert_same(op(*arguments), plane_sweep_twin(*arguments))


def test_compiled_models_see_through_it():
    arguments = packed(*sweep())

    def model(*arguments):
        rgb, weights, seen = ops_plane_sweep.plane_sweep(*arguments)
        return rgb.sum() + (weights * seen).sum()

    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(*arguments), model(*arguments))


def test_a_network_for_other_channels_is_refused():
    scene, network = sweep()
    with pytest.raises(UserError, match=r"must have 3 .* inputs"):
        op(scene, network._replace(hidden_weight=torch.zeros(16, 37)))
    with pytest.raises(UserError, match="plane_sweep takes float32 panels"):
        ops_plane_sweep.plane_sweep(*packed(*sweep())[:8], 40)


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
def test_panels_for_any_vectors_hold_the_network(lanes):
    arguments = sweep(hidden=13)
    assert_same(plane_sweep_of_panels(*packed(*arguments, lanes=lanes)), plane_sweep_twin(*arguments))


def test_other_processors_get_their_own_instructions():
    spec = {"channels": 8, "hidden": 16, "with_valid": False}
    assert "zmm" in KERNEL.assembly(targets.find("avx512"), **spec)
    assert "ymm" not in KERNEL.assembly(targets.find("generic"), **spec)
