"""The fused embedding of what views show: the kernel against its twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftadd3d import UserError
from shiftadd3d.kernels.cpu.gnt.view_embedding import KERNEL
from shiftadd3d.kernels.ops.gnt import view_embedding as ops_view_embedding
from shiftadd3d.kernels.pack.gnt.view_embedding import panels, view_embedding_of_panels
from shiftadd3d.kernels.pack.panel import lanes_on
from shiftadd3d.kernels.reference.gnt.view_embedding import random_views, view_embedding_twin, view_moments
from shiftadd3d.kernels.runtime import targets

SIZES = {"points": 17, "views": 4, "inputs": 11, "hidden": 16, "width": 16, "with_moments": True}


def op(values, mask, weights, biases) -> tuple[torch.Tensor, torch.Tensor]:
    """The op, given the arguments of its twin."""
    packed = panels(weights, biases, lanes_on(torch.device("cpu")))
    return ops_view_embedding.view_embedding(values, mask, packed, weights[1].shape[0])


def problem(seed: int = 0, **changes) -> tuple:
    return random_views(seed, **{**SIZES, **changes})


def assert_same(arguments: tuple) -> None:
    for out, expected in zip(op(*arguments), view_embedding_twin(*arguments), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_moments_are_those_of_the_views_that_see():
    values, mask, _, _ = problem()
    mask[5] = torch.tensor([True, False, True, True])
    mean, deviation, share = view_moments(values, mask)[5].split([11, 11, 1])
    seen = values[5, [0, 2, 3]]
    torch.testing.assert_close(mean, seen.mean(0))
    torch.testing.assert_close(deviation, seen.std(0, correction=0), rtol=1e-3, atol=1e-3)
    assert share == 0.75


@settings(max_examples=10, deadline=None)
@given(points=st.integers(1, 90), views=st.integers(1, 32), seed=st.integers(0, 99))
def test_the_kernel_computes_what_the_twin_does(points, views, seed):
    assert_same(problem(seed, points=points, views=views))


@pytest.mark.parametrize(("inputs", "hidden", "width"), [(1, 3, 5), (8, 8, 8), (35, 24, 33)])
@pytest.mark.parametrize("with_moments", [False, True])
def test_widths_need_not_be_whole_vectors(inputs, hidden, width, with_moments):
    assert_same(problem(1, inputs=inputs, hidden=hidden, width=width, with_moments=with_moments))


def test_more_views_than_fit_go_through_the_twin():
    assert_same(problem(2, views=33))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_point(bad):
    arguments = problem(3)
    arguments[1][:] = True
    arguments[0][6, 2, 4] = bad
    others = torch.arange(17) != 6
    for out, twin in zip(op(*arguments), view_embedding_twin(*arguments), strict=True):
        torch.testing.assert_close(out[others], twin[others], rtol=1e-4, atol=1e-4)
        assert torch.equal(out[6].isnan(), twin[6].isnan())


def test_leading_dimensions_strides_and_no_points():
    values, mask, weights, biases = problem(4, points=12)
    embedding, query = op(values.view(3, 4, 4, 11), mask.view(3, 4, 4), weights, biases)
    assert embedding.shape == (3, 4, 4, 16) and query.shape == (3, 4, 16)
    turned = values.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(op(turned, mask, weights, biases)[1], query.flatten(0, 1))
    embedding, query = op(values[:0], mask[:0], weights, biases)
    assert embedding.shape == (0, 4, 16) and query.shape == (0, 16)


def test_threads_change_nothing(torch_threads):
    assert_same(problem(5, points=3000))


def test_compiled_models_see_through_it():
    values, mask, weights, biases = problem(6)
    packed = panels(weights, biases, lanes_on(values.device))

    def model(values):
        embedding, query = ops_view_embedding.view_embedding(values, mask, packed, 16)
        return embedding.sum(-2) * query

    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(values), model(values))


def test_arguments_that_do_not_fit_are_refused():
    values, mask, weights, biases = problem(7)
    with pytest.raises(UserError, match="mask must be bool"):
        op(values, mask.float(), weights, biases)
    packed = panels(weights, biases, lanes_on(values.device))
    with pytest.raises(UserError, match="view_embedding takes float32 panels"):
        ops_view_embedding.view_embedding(values[..., 1:], mask, packed, 16)


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
@pytest.mark.parametrize("with_moments", [False, True])
def test_panels_for_any_vectors_hold_the_weights(with_moments, lanes):
    values, mask, weights, biases = problem(8, hidden=13, width=9, with_moments=with_moments)
    found = view_embedding_of_panels(values, mask, panels(weights, biases, lanes), 9)
    for one, other in zip(found, view_embedding_twin(values, mask, weights, biases), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_other_processors_get_their_own_instructions():
    spec = {"inputs": 11, "hidden": 16, "width": 16, "with_moments": True}
    assert "zmm" in KERNEL.assembly(targets.find("avx512"), **spec)
    assert "ymm" not in KERNEL.assembly(targets.find("generic"), **spec)
