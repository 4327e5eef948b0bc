"""Looking up points in source views: the kernel against its twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftadd3d import UserError
from shiftadd3d.kernels.cpu.gnt.gather import KERNEL
from shiftadd3d.kernels.ops.gnt.gather import point_samples
from shiftadd3d.kernels.reference.gnt.gather import point_samples_twin, random_scene
from shiftadd3d.kernels.runtime import targets

ARGUMENTS = ("points", "origins", "projection", "centers", "images", "maps", "valid")


def assert_same(out: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Colours and features to what a rounded pixel position leaves, everything else closely."""
    for one, other in zip(out, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def looking_ahead(height: int = 5, width: int = 7, channels: int = 9) -> dict[str, torch.Tensor | None]:
    """One view from the origin along z: red is a pixel's x, green its y; the map is a fourth of the size."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    images = torch.stack([x, y, torch.zeros_like(x)], dim=-1)[None].float()
    projection = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]])
    return {
        "points": torch.empty(0),
        "origins": torch.tensor([[0.0, 0.0, -1.0]]),
        "projection": projection,
        "centers": torch.zeros(1, 3),
        "images": images,
        "maps": torch.rand(1, 2, 3, channels),
        "valid": None,
    }


def look(scene: dict, points: list[list[float]]) -> tuple[torch.Tensor, ...]:
    return point_samples(*{**scene, "points": torch.tensor([points])}.values())


@settings(max_examples=15, deadline=None)
@given(
    rays=st.integers(1, 9),
    samples=st.integers(1, 20),
    views=st.integers(1, 12),
    channels=st.integers(1, 40),
    with_valid=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_kernel_computes_what_the_twin_does(rays, samples, views, channels, with_valid, seed):
    scene = random_scene(seed, rays=rays, samples=samples, views=views, channels=channels, with_valid=with_valid)
    assert_same(point_samples(*scene), point_samples_twin(*scene))


def test_a_pixel_shows_its_own_colour_and_one_between_two_pixels_their_mean():
    values, _, mask = look(looking_ahead(), [[3.0, 2.0, 1.0], [2.5, 1.25, 1.0], [12.0, 8.0, 4.0]])
    torch.testing.assert_close(values[0, :, 0, :2], torch.tensor([[3.0, 2.0], [2.5, 1.25], [3.0, 2.0]]))
    assert bool(mask.all())


def test_a_view_sees_what_is_ahead_and_inside_the_picture_border_included():
    points = [[0.0, 0.0, 1.0], [6.0, 4.0, 1.0], [6.1, 4.0, 1.0], [6.0, -0.1, 1.0], [0.0, 0.0, -1.0]]
    assert look(looking_ahead(), points)[2].flatten().tolist() == [True, True, False, False, False]


def test_beyond_the_border_there_is_nothing():
    values, _, _ = look(looking_ahead(), [[9.0, 2.0, 1.0], [1e9, -1e9, 1.0]])
    assert not values.any()


def test_a_pixel_that_is_not_valid_hides_all_that_it_is_mixed_into():
    scene = looking_ahead()
    scene["valid"] = torch.ones(1, 5, 7, dtype=torch.bool)
    scene["valid"][0, 2, 3] = False
    points = [[3.0, 2.0, 1.0], [3.5, 2.0, 1.0], [4.0, 2.0, 1.0], [3.0, 3.0, 1.0], [2.1, 1.1, 1.0]]
    assert look(scene, points)[2].flatten().tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_point_that_is_not_finite_is_seen_by_no_view_and_harms_no_other(bad):
    scene = random_scene(3, rays=2, samples=9, views=4, channels=8, with_valid=True)
    scene[0][1, 4, 0] = bad
    out, expected = point_samples(*scene), point_samples_twin(*scene)
    assert not out[2][1, 4].any()
    assert bool(out[1][1, 4].isnan().any())
    for one, other in zip(out, expected, strict=True):
        one[1, 4], other[1, 4] = 0, 0
    assert_same(out, expected)


def test_maps_may_lie_in_memory_as_they_like():
    scene = dict(zip(ARGUMENTS, random_scene(4, rays=3, samples=5, views=2, channels=12, with_valid=True), strict=True))
    expected = point_samples_twin(*scene.values())
    scene["maps"] = scene["maps"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    scene["images"] = scene["images"].transpose(1, 2).contiguous().transpose(1, 2)
    scene["points"] = scene["points"].transpose(0, 1).contiguous().transpose(0, 1)
    scene["centers"] = torch.cat([torch.zeros(1), scene["centers"].flatten()])[1:].view(2, 3)
    assert_same(point_samples(*scene.values()), expected)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_points_give_no_samples(shape):
    scene = random_scene(5, rays=1, samples=1, views=2, channels=8, with_valid=False)
    values, ray_diff, mask = point_samples(torch.zeros(*shape, 3), torch.zeros(shape[0], 3), *scene[2:])
    assert values.shape == (*shape, 2, 11) and ray_diff.shape == (*shape, 2, 4) and mask.shape == (*shape, 2)


def test_threads_change_nothing(torch_threads):
    scene = random_scene(6, rays=50, samples=9, views=3, channels=8, with_valid=True)
    assert_same(point_samples(*scene), point_samples_twin(*scene))


def test_compiled_models_see_through_it():
    scene = random_scene(7, rays=4, samples=3, views=2, channels=8, with_valid=True)

    def model(*scene):
        values, ray_diff, mask = point_samples(*scene)
        return (values.sum(-1) + ray_diff.sum(-1)) * mask

    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(*scene), model(*scene))
    torch.library.opcheck(point_samples, scene, test_utils=("test_schema", "test_faketensor"))


def test_the_twin_has_gradients_for_training():
    scene = random_scene(8, rays=4, samples=3, views=2, channels=8, with_valid=False)
    maps = scene[5].requires_grad_()
    point_samples_twin(*scene)[0].sum().backward()
    assert bool(maps.grad.isfinite().all()) and bool(maps.grad.any())


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("origins", torch.zeros(2, 3), r"origins must be \[4, 3\]"),
        ("projection", torch.zeros(2, 4, 4), r"projection must be \[2, 3, 4\]"),
        ("valid", torch.zeros(2, 37, 50), "valid must be bool"),
        ("maps", torch.zeros(2, 1, 5, 8), "2 x 2 pixels or more"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name, wrong, message):
    scene = dict(zip(ARGUMENTS, random_scene(9, rays=4, samples=3, views=2, channels=8, with_valid=True), strict=True))
    with pytest.raises(UserError, match=message):
        point_samples(*{**scene, name: wrong}.values())


def test_other_processors_get_their_own_instructions():
    assert "zmm" in KERNEL.assembly(targets.find("avx512"), with_valid=True)
    assert "ymm" not in KERNEL.assembly(targets.find("generic"), with_valid=True)
