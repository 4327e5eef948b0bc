"""Source images to feature maps."""

import pytest
import torch

from shiftadd3d import UserError
from shiftadd3d.models.gnt.feature_net import MIN_IMAGE_SIDE, ResUNet

SIZES = {"coarse_dim": 8, "widths": (8, 12, 16), "blocks": (1, 1, 1)}


@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (33, 47), (35, 34), (36, 40), (37, 63), (50, 41), (61, 59), (32, 100)]
)
def test_any_image_size_gives_a_map_of_about_a_quarter(height, width):
    maps, same = ResUNet(**SIZES)(torch.rand(2, 3, height, width))
    assert same is maps
    assert maps.shape[:2] == (2, 8)
    assert abs(maps.shape[2] - height / 4) < 4
    assert abs(maps.shape[3] - width / 4) < 4
    assert bool(torch.isfinite(maps).all())


def test_two_networks_get_a_map_each():
    net = ResUNet(fine_dim=5, **SIZES)
    coarse, fine = net(torch.rand(1, 3, 32, 48))
    assert coarse.shape[1] == 8
    assert fine.shape[1] == 5
    assert coarse.shape[2:] == fine.shape[2:] == (8, 12)


@pytest.mark.parametrize(("height", "width"), [(MIN_IMAGE_SIDE - 1, 64), (64, MIN_IMAGE_SIDE - 1), (1, 1)])
def test_an_image_too_small_is_refused_by_its_size(height, width):
    with pytest.raises(UserError, match=f"{width}x{height}.*{MIN_IMAGE_SIDE}"):
        ResUNet(**SIZES)(torch.rand(1, 3, height, width))


def test_views_do_not_see_each_other():
    net = ResUNet(**SIZES).eval()
    images = torch.rand(3, 3, 36, 40)
    with torch.no_grad():
        torch.testing.assert_close(net(images)[0][1:2], net(images[1:2])[0], atol=1e-5, rtol=1e-5)


def test_a_bright_spot_shows_up_where_it_is():
    net = ResUNet(**SIZES).eval()
    dark, bright = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    bright[:, :, 8:12, 48:52] = 1.0
    with torch.no_grad():
        change = (net(bright)[0] - net(dark)[0]).abs().sum(dim=1)[0]
    row, column = divmod(int(change.argmax()), change.shape[1])
    assert row < 6 and column > 9
