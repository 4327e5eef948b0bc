"""Where along a ray the network looks."""

import numpy as np
import pytest
import torch

from bounds import sum_bound
from shiftadd3d import UserError
from shiftadd3d.kernels.reference.gnt.sampling import between_fields, chessboard
from shiftadd3d.models.gnt.sampling import sample_around, sample_depths, sample_importance, sample_pdf

NEAR, FAR = torch.tensor([1.0, 0.5]), torch.tensor([3.0, 100.0])


def increasing(depths: torch.Tensor) -> bool:
    return bool((depths[:, 1:] >= depths[:, :-1]).all())


def test_without_randomness_depths_are_a_grid_from_near_to_far():
    depths = sample_depths(NEAR, FAR, 5)
    torch.testing.assert_close(depths[0], torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0]))
    torch.testing.assert_close(depths[1, [0, -1]], torch.tensor([0.5, 100.0]))


def test_inverse_depths_are_even_in_one_over_z():
    inverse = 1.0 / sample_depths(NEAR, FAR, 9, inverse_depth=True)
    steps = inverse[:, 1:] - inverse[:, :-1]
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps))
    torch.testing.assert_close(inverse[:, 0], 1 / NEAR)
    torch.testing.assert_close(inverse[:, -1], 1 / FAR)


@pytest.mark.parametrize("inverse_depth", [False, True])
def test_stratified_depths_stay_in_their_strata(inverse_depth):
    near, far = NEAR.repeat(500), FAR.repeat(500)
    grid = sample_depths(near, far, 6, inverse_depth=inverse_depth)
    depths = sample_depths(near, far, 6, inverse_depth=inverse_depth, stratified=True)
    middles = 0.5 * (grid[:, 1:] + grid[:, :-1])
    lower, upper = torch.cat([grid[:, :1], middles], 1), torch.cat([middles, grid[:, -1:]], 1)
    assert bool(((depths >= lower) & (depths <= upper)).all())
    assert increasing(depths)
    # They fill the strata: near both ends of each, and on average in its middle.
    position = ((depths - lower) / (upper - lower))[::2]
    assert float(position.min(dim=0).values.max()) < 0.05
    assert float(position.max(dim=0).values.min()) > 0.95
    torch.testing.assert_close(position.mean(dim=0), torch.full((6,), 0.5), atol=0.06, rtol=0)


@pytest.mark.parametrize(
    ("near", "far"),
    [(2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (1.0, float("nan")), (1.0, float("inf"))],
)
def test_near_and_far_out_of_order_are_refused(near, far):
    with pytest.raises(UserError, match="0 < near < far"):
        sample_depths(torch.tensor([1.0, near]), torch.tensor([2.0, far]), 4)


@pytest.mark.parametrize("count", [-1, 0, 1])
def test_fewer_than_two_samples_are_refused(count):
    with pytest.raises(UserError, match="at least 2"):
        sample_depths(NEAR, FAR, count)
    planes = sample_depths(NEAR, FAR, 8)
    with pytest.raises(UserError, match="at least 2"):
        sample_around(planes, torch.ones_like(planes), count)


def inverse_cdf(edges: np.ndarray, weights: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """Bin by bin, in float64."""
    mass = (weights + 1e-5) / (weights + 1e-5).sum()
    values = []
    for u in quantiles:
        below = 0.0
        for i, m in enumerate(mass):
            if u < below + m or i == len(mass) - 1:
                values.append(edges[i] + (u - below) / m * (edges[i + 1] - edges[i]))
                break
            below += m
    return np.array(values)


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 2.0])
def test_samples_of_a_density_are_its_inverse_cumulative_sum(sharpness):
    rng = np.random.default_rng(1)
    edges = np.sort(rng.uniform(1, 5, (8, 13)), axis=1)
    weights = np.exp(sharpness * rng.standard_normal((8, 12)))
    weights /= weights.sum(axis=1, keepdims=True)
    samples = sample_pdf(torch.from_numpy(edges), torch.from_numpy(weights), 33).numpy()
    for row in range(8):
        expected = inverse_cdf(edges[row], weights[row], np.linspace(0, 1, 33))
        np.testing.assert_allclose(samples[row], expected, atol=1e-9, rtol=0)
    assert bool((np.diff(samples) >= -1e-12).all())


def test_random_samples_of_a_density_fall_into_bins_as_often_as_their_weight_says():
    edges = torch.tensor([[0.0, 1.0, 3.0, 4.0]])
    weights = torch.tensor([[0.2, 0.7, 0.1]])
    samples = sample_pdf(edges, weights, 20_000, stratified=True)[0]
    shares = torch.histc(samples, 4, 0, 4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.35, 0.35, 0.1]), atol=0.02, rtol=0)


def test_a_ray_without_weight_is_sampled_evenly():
    samples = sample_pdf(torch.linspace(1, 3, 5)[None], torch.zeros(1, 4), 5)
    torch.testing.assert_close(samples[0], torch.linspace(1, 3, 5))


@pytest.mark.parametrize("inverse_depth", [False, True])
@pytest.mark.parametrize("stratified", [False, True])
def test_importance_samples_are_merged_with_the_first_ones_and_gather_at_the_weight(inverse_depth, stratified):
    depths = sample_depths(NEAR, FAR, 16, inverse_depth=inverse_depth)
    weights = torch.full((2, 16), 1e-4)
    weights[:, 7] = 1.0
    weights.requires_grad_()
    merged = sample_importance(depths, weights, 24, inverse_depth=inverse_depth, stratified=stratified)
    assert merged.shape == (2, 40)
    assert not merged.requires_grad
    assert increasing(merged)
    for row in range(2):
        assert bool(torch.isin(depths[row], merged[row]).all())
        near_the_weight = (merged[row] >= depths[row, 6]) & (merged[row] <= depths[row, 8])
        assert int(near_the_weight.sum()) >= 3 + 20


def test_importance_sampling_needs_four_samples():
    with pytest.raises(UserError, match="at least 4"):
        sample_importance(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3), 4)


@pytest.mark.parametrize("stratified", [False, True])
def test_proposed_samples_gather_at_the_weight_and_leave_a_tenth_everywhere(stratified):
    planes = sample_depths(NEAR, FAR, 32).repeat(200, 1)
    weights = torch.zeros_like(planes)
    weights[:, 20] = 1.0
    depths = sample_around(planes, weights, 10, stratified=stratified)
    assert depths.shape == (400, 10)
    assert increasing(depths)
    rounding = sum_bound(planes.shape[1], planes[:, -1:])  # of the sums of weights that depths are read from
    assert bool((depths >= planes[:, :1] - rounding).all()) and bool((depths <= planes[:, -1:] + rounding).all())
    middles = 0.5 * (planes[:, 1:] + planes[:, :-1])
    at_the_weight = (depths >= middles[:, 19:20]) & (depths <= middles[:, 20:21])
    share = float(at_the_weight.float().mean())
    # At the grid's ten quantiles two lie on the ends.
    assert share == pytest.approx(0.8 if not stratified else 0.9 + 0.1 / 32, abs=0.03)


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (5, 7), (1, 4), (3, 1), (1, 1)])
def test_rays_beside_a_chessboards_fields_get_the_mean_of_their_neighbours(rows, columns):
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    is_field = (row + column) % 2 == 0
    assert torch.equal(chessboard(rows * columns, columns), is_field.flatten())
    picture = torch.rand(rows, columns, 3)
    spread = between_fields(picture[is_field], rows * columns, columns).view(rows, columns, 3)
    assert torch.equal(spread[is_field], picture[is_field])
    for i, j in (~is_field).nonzero().tolist():
        around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
        neighbours = [picture[at] for at in around if 0 <= at[0] < rows and 0 <= at[1] < columns]
        assert torch.allclose(spread[i, j], torch.stack(neighbours).mean(0))


def test_samples_on_a_chessboard_are_those_of_the_fields_and_between_them():
    planes = sample_depths(NEAR[:1], FAR[:1], 16).repeat(6, 1)
    weights = torch.rand(6, 16)
    depths = sample_around(planes, weights, 8, board=(12, 4))
    fields = chessboard(12, 4)
    assert depths.shape == (12, 8) and increasing(depths)
    assert torch.equal(depths[fields], sample_around(planes, weights, 8))
    corner = (weights[0] + weights[3]) / 2  # the last of the first row: beside its third, above the second row's last
    assert torch.allclose(depths[3:4], sample_around(planes[:1], ((weights[1] + weights[3]) / 2)[None], 8), atol=1e-5)
    assert not torch.allclose(depths[3:4], sample_around(planes[:1], corner[None], 8), atol=1e-5)


def test_no_gradient_flows_through_proposed_samples():
    weights = torch.full((2, 8), 0.125, requires_grad=True)
    assert not sample_around(sample_depths(NEAR, FAR, 8), weights, 4).requires_grad
