"""The fused perceptron over features, position and direction: the kernel against its twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftadd3d import UserError
from shiftadd3d.kernels.cpu.gnt.position_layer import KERNEL
from shiftadd3d.kernels.ops.gnt import position_layer as ops_position_layer
from shiftadd3d.kernels.pack.gnt.position_layer import panels, position_layer_of_panels
from shiftadd3d.kernels.pack.panel import lanes_on
from shiftadd3d.kernels.reference.gnt.position_layer import (
    EMBEDDING_DIM,
    position_layer_twin,
    random_samples,
    sinusoidal_embedding,
)
from shiftadd3d.kernels.runtime import targets

SIZES = {"rays": 5, "samples": 7, "width": 16, "hidden": 16, "outputs": 16}


def op(x, points, directions, weights, biases) -> torch.Tensor:
    """The op, given the arguments of its twin."""
    packed = panels(weights, biases, lanes_on(torch.device("cpu")))
    return ops_position_layer.position_layer(x, points, directions, packed, weights[1].shape[0])


def problem(seed: int = 0, **changes) -> tuple:
    return random_samples(seed, **{**SIZES, **changes})


def assert_same(arguments: tuple, tolerance: float = 1e-4) -> None:
    out, expected = op(*arguments), position_layer_twin(*arguments)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_an_embedding_holds_sines_and_cosines_of_ten_octaves():
    x = torch.tensor([0.3, -1.0, 2.0])
    embedded = sinusoidal_embedding(x)
    assert embedded.shape == (EMBEDDING_DIM,) == (63,)
    torch.testing.assert_close(embedded[:9], torch.cat([x, x.sin(), x.cos()]))
    torch.testing.assert_close(embedded[-6:], torch.cat([(512 * x).sin(), (512 * x).cos()]))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0, 2000.0])
def test_sines_and_cosines_are_as_exact_as_torchs(scale):
    # With hidden units that pass single components on, the outcome is the embedding itself.
    points = scale * torch.randn(3, 40, 3)
    embedded = sinusoidal_embedding(points.double())
    both = torch.cat([torch.eye(63), -torch.eye(63)])
    weights = [torch.cat([torch.zeros(126, 1), both, torch.zeros(126, 63)], dim=1), both.mT.contiguous()]
    biases = [torch.zeros(126), torch.zeros(63)]
    out = op(torch.zeros(3, 40, 1), points, torch.zeros(3, 3), weights, biases)
    torch.testing.assert_close(out[..., 3:].double(), embedded[..., 3:], rtol=0, atol=3e-7)


@settings(max_examples=10, deadline=None)
@given(rays=st.integers(1, 30), samples=st.integers(1, 30), seed=st.integers(0, 99))
def test_the_kernel_computes_what_the_twin_does(rays, samples, seed):
    assert_same(problem(seed, rays=rays, samples=samples))


@pytest.mark.parametrize(("width", "hidden", "outputs"), [(1, 3, 5), (33, 20, 9)])
def test_widths_need_not_be_whole_vectors(width, hidden, outputs):
    assert_same(problem(1, width=width, hidden=hidden, outputs=outputs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_sample(bad):
    arguments = problem(2)
    arguments[1][3, 2, 1] = bad
    out, twin = op(*arguments), position_layer_twin(*arguments)
    assert bool(out[3, 2].isnan().all()) and bool(twin[3, 2].isnan().all())
    out[3, 2], twin[3, 2] = 0, 0
    torch.testing.assert_close(out, twin, rtol=1e-4, atol=1e-4)


def test_strides_and_no_samples():
    x, points, directions, weights, biases = problem(3)
    turned = (x.transpose(0, 1).contiguous().transpose(0, 1), points.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(
        op(*turned, directions, weights, biases),
        op(x, points, directions, weights, biases),
    )
    assert op(x[:, :0], points[:, :0], directions, weights, biases).shape == (5, 0, 16)


def test_threads_change_nothing(torch_threads):
    assert_same(problem(4, rays=300))


def test_compiled_models_see_through_it():
    x, points, directions, weights, biases = problem(5)
    packed = panels(weights, biases, lanes_on(x.device))

    def model(x):
        return ops_position_layer.position_layer(x * 2.0, points, directions, packed, 16).sum(-1)

    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_arguments_that_do_not_fit_are_refused():
    x, points, directions, weights, biases = problem(6)
    with pytest.raises(UserError, match=r"must be \[R, S, C\]"):
        op(x, points[:, 1:], directions, weights, biases)
    with pytest.raises(UserError, match="position_layer takes float32 panels"):
        op(x[..., 1:], points, directions, weights, biases)


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
def test_panels_for_any_vectors_hold_the_weights(lanes):
    *inputs, weights, biases = problem(7, hidden=13, outputs=9)
    found = position_layer_of_panels(*inputs, panels(weights, biases, lanes), 9)
    torch.testing.assert_close(found, position_layer_twin(*inputs, weights, biases), rtol=1e-4, atol=1e-4)


def test_processors_without_fused_multiply_adds_use_the_twin():
    spec = {"width": 16, "hidden": 16, "outputs": 16}
    assert "zmm" in KERNEL.assembly(targets.find("avx512"), **spec)
    assert not list(KERNEL.variants(targets.find("generic")))
