"""Photos of different exposures are brought to one."""

from __future__ import annotations

import torch

from shiftadd3d.nerf.exposure import exposure_gains


def shown(gains: torch.Tensor, points: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """Colours that views with such gains show of random points, and a mask of what each sees."""
    generator = torch.Generator().manual_seed(0)
    colors = 0.1 + 0.4 * torch.rand(points, 1, 3, generator=generator)
    mask = torch.rand(points, len(gains), generator=generator) > 0.3
    return colors * gains.exp(), mask


def test_gains_are_found_whatever_views_see():
    gains = torch.tensor([[0.2, 0.1, 0.0], [-0.3, -0.3, -0.3], [0.1, 0.2, 0.3], [0.0, 0.0, 0.0]])
    gains = gains - gains.mean(dim=0)
    torch.testing.assert_close(exposure_gains(*shown(gains)), gains, atol=5e-3, rtol=0.0)


def test_highlights_and_what_is_hidden_do_not_count():
    colors, mask = shown(torch.zeros(4, 3))
    colors[:150, 1] = 1.0
    assert float(exposure_gains(colors, mask).abs().max()) < 0.02


def test_views_that_share_no_points_stay_as_they_are():
    colors, mask = shown(torch.tensor([[0.3], [-0.3], [0.0]]).expand(3, 3))
    mask[:] = False
    assert not exposure_gains(colors, mask).any()
    mask[:, 0] = True  # one view alone
    assert not exposure_gains(colors, mask).any()


def test_a_view_that_shares_too_few_points_stays_as_it_is():
    colors, mask = shown(torch.tensor([[0.3], [-0.3], [0.4]]).expand(3, 3))
    mask[20:, 2] = False
    gains = exposure_gains(colors, mask)
    assert float(gains[0, 0] - gains[1, 0]) > 0.5
    torch.testing.assert_close(gains[2], -(gains[0] + gains[1]), atol=1e-6, rtol=0.0)


def test_what_is_more_than_an_exposure_is_bounded_and_black_is_finite():
    colors, mask = shown(torch.tensor([[2.0], [-2.0]]).expand(2, 3))
    assert float(exposure_gains(colors, mask).abs().max()) == 0.5
    assert not exposure_gains(torch.zeros_like(colors), mask).any()
