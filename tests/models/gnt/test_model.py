"""Rendering rays with the whole model."""

import copy
import dataclasses

import pytest
import torch

from shiftadd3d import UserError
from shiftadd3d.models.gnt import Cameras, GNTModel, load_official_checkpoint, render_rays
from shiftadd3d.models.gnt.projection import Silhouettes, empty_views, sample_sources
from shiftadd3d.nn import RECIPES, reparameterize_

NEAR, FAR, SAMPLES = 2.0, 6.0, 6
PIXELS = torch.tensor([[5.0, 7.0], [20.0, 18.0], [33.0, 30.0]])
EXTRAS = {"color_head": True, "proposal_samples": 12, "proposal_features": 4}


def middle(cameras) -> Cameras:
    """A target between the source cameras."""
    batch = cameras(1)
    return Cameras(batch.intrinsics[0], batch.camera_to_world[0])


def render(model, views, cameras, **options):
    origins, directions = middle(cameras).rays(PIXELS)
    return model(views, origins, directions, NEAR, FAR, SAMPLES, **options)


def assert_well_formed(out, samples: int) -> None:
    assert out["rgb"].shape == (3, 3)
    assert out["depth"].shape == out["accumulation"].shape == (3,)
    assert out["weights"].shape == out["sample_depths"].shape == (3, samples)
    assert all(bool(torch.isfinite(out[name]).all()) for name in ("rgb", "depth", "accumulation", "weights"))
    torch.testing.assert_close(out["weights"].sum(dim=-1), torch.ones(3))
    assert bool((out["depth"] >= NEAR).all()) and bool((out["depth"] <= FAR).all())
    assert bool((out["sample_depths"].diff(dim=-1) >= 0).all())


@pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["plain", "colour head"])
@pytest.mark.parametrize("count", range(1, 11))
def test_any_number_of_views_renders(config, cameras, views, count, extras):
    model = GNTModel(config(**extras)).eval()
    with torch.no_grad():
        out = render(model, views(model, count), cameras)
    assert_well_formed(out, SAMPLES)


@pytest.mark.parametrize("single_net", [True, False], ids=["one network", "two networks"])
@pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["plain", "colour head"])
@pytest.mark.parametrize("inverse_depth", [False, True])
def test_a_second_pass_looks_where_the_first_put_its_weight(config, cameras, views, single_net, extras, inverse_depth):
    model = GNTModel(config(single_net=single_net, **extras)).eval()
    with torch.no_grad():
        sources = views(model)
        out = render(model, sources, cameras, num_importance=5, inverse_depth=inverse_depth)
        alone = render(model, sources, cameras, inverse_depth=inverse_depth)
    assert_well_formed(out, SAMPLES + 5)
    assert_well_formed(out["coarse"], SAMPLES)
    torch.testing.assert_close(out["coarse"]["rgb"], alone["rgb"])
    assert bool(torch.isin(out["coarse"]["sample_depths"], out["sample_depths"]).all())


def test_the_fine_network_and_its_own_features_render_the_second_pass(config, cameras, views):
    model = GNTModel(config(single_net=False)).eval()
    with torch.no_grad():
        before = render(model, views(model, images=torch.ones(3, 36, 40, 3) * 0.5), cameras, num_importance=4)
        model.net_fine.rgb_fc.bias += 1.0
        after = render(model, views(model, images=torch.ones(3, 36, 40, 3) * 0.5), cameras, num_importance=4)
    torch.testing.assert_close(after["rgb"], before["rgb"] + 1.0)
    torch.testing.assert_close(after["coarse"]["rgb"], before["coarse"]["rgb"])


@pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["plain", "colour head"])
def test_a_ray_that_no_view_sees_is_finite_and_has_no_accumulation(config, cameras, views, extras):
    model = GNTModel(config(**extras))
    sources = views(model)
    origins, directions = middle(cameras).rays(PIXELS)
    out = model(sources, origins, -directions, NEAR, FAR, SAMPLES)  # away from the scene, behind every camera
    assert_well_formed(out, SAMPLES)
    assert bool((out["accumulation"] == 0).all())
    out["rgb"].sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        assert bool((render(model, sources, cameras)["accumulation"] > 0).all())


# A constant added to all logits of a softmax changes nothing: such biases have no gradient.
UNMOVED = ("attn.attn_fc.2.bias", "view_logit_fc.bias", "sample_logit_fc.bias", "proposal.score.2.bias")


@pytest.mark.parametrize("recipe", ["mult", "add+shift-attn+moe"])
def test_a_step_of_training_moves_every_parameter(config, cameras, views, recipe):
    torch.manual_seed(1)  # some layers have two hidden units: other seeds may begin with both of them dead
    model = GNTModel(config(single_net=False, **EXTRAS))
    with torch.no_grad():  # what starts at zero hides the gradients of what comes before it
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    reparameterize_(model, recipe, verbose=False)
    # Enough rays that every expert is asked.
    origins, directions = middle(cameras).rays(torch.rand(64, 2) * 35)
    total = torch.zeros(())
    for _ in range(2):  # a mixture's router may leave an expert without tokens once
        out = model(
            views(model), origins, directions, NEAR, FAR, SAMPLES, num_importance=4, stratified=True, inverse_depth=True
        )
        total = total + sum((x["rgb"] * torch.rand(64, 3)).sum() for x in (out, out["coarse"], out["proposal"]))
    total.backward()
    still = [
        name
        for name, parameter in model.named_parameters()
        if not name.endswith(UNMOVED) and (parameter.grad is None or not bool(parameter.grad.abs().sum() > 0))
    ]
    assert not still


def test_where_all_views_show_one_colour_the_colour_head_returns_it(config, cameras, views):
    model = GNTModel(config(**EXTRAS)).eval()
    color = torch.tensor([0.25, 0.5, 0.75])
    with torch.no_grad():
        out = render(model, views(model, images=color.expand(4, 36, 40, 3)), cameras)
    torch.testing.assert_close(out["rgb"], color.expand(3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(out["proposal"]["rgb"], color.expand(3, 3), atol=1e-6, rtol=0)


def test_the_plane_sweep_finds_a_textured_plane_untrained(config, cameras):
    model = GNTModel(config(**{**EXTRAS, "proposal_samples": 33})).eval()
    batch, plane = cameras(4), 4.0
    axis = torch.arange(40.0)
    images = []
    for view in range(4):
        origins, directions = Cameras(batch.intrinsics[view], batch.camera_to_world[view]).rays(
            torch.cartesian_prod(axis[:36], axis).flip(-1)
        )
        points = origins + (-origins[:, 2:] / directions[:, 2:]) * directions  # on z = 0
        images.append((0.5 + 0.5 * torch.sin(4.0 * points + torch.tensor([0.0, 1.0, 2.0]))).reshape(36, 40, 3))
        images[-1][..., 2] = (0.5 + 0.5 * torch.sin(3.0 * points[:, 0] + 5.0 * points[:, 1])).reshape(36, 40)
    with torch.no_grad():
        proposed = render(model, model.encode(torch.stack(images), batch), cameras)["proposal"]
    torch.testing.assert_close(proposed["depth"], torch.full((3,), plane), atol=0.35, rtol=0)


def test_samples_of_masked_pixels_do_not_count(config, cameras, views):
    model = GNTModel(config(**EXTRAS)).eval()
    color = torch.tensor([0.25, 0.5, 0.75])
    images = color.repeat(4, 36, 40, 1)
    valid = torch.ones(4, 36, 40, dtype=torch.bool)
    images[:, 10:16, 12:28] = 1.0
    valid[:, 10:16, 12:28] = False
    with torch.no_grad():
        out = render(model, model.encode(images, cameras(4), valid), cameras)
    torch.testing.assert_close(out["rgb"], color.expand(3, 3), atol=1e-6, rtol=0)


def test_dropout_acts_in_training_only(config, cameras, views):
    model = GNTModel(config(dropout=0.5))
    with torch.no_grad():
        sources = views(model)
        assert not torch.equal(render(model, sources, cameras)["rgb"], render(model, sources, cameras)["rgb"])
        model.eval()
        assert torch.equal(render(model, sources, cameras)["rgb"], render(model, sources, cameras)["rgb"])


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_keeps_the_model_running(config, cameras, views, recipe):
    model = GNTModel(config(single_net=False, **EXTRAS))
    with torch.no_grad():
        before = render(copy.deepcopy(model), views(model, images=torch.full((4, 36, 40, 3), 0.5)), cameras)
    report = reparameterize_(model, recipe, verbose=False)
    out = render(model, views(model, images=torch.full((4, 36, 40, 3), 0.5)), cameras, num_importance=4)
    assert_well_formed(out, SAMPLES + 4)
    (out["rgb"].sum() + out["coarse"]["rgb"].sum()).backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.net_fine.parameters())
    if recipe == "mult":
        assert not report.layers
        torch.testing.assert_close(out["coarse"]["rgb"], before["rgb"])
    else:
        names = {layer.name for layer in report.layers}
        for stage in ("net_coarse", "net_fine"):
            assert f"{stage}.view_selftrans.0.attn" in names
        assert not any(name.startswith("feature_net") for name in names)  # convolutions, not linear layers


def test_an_official_checkpoint_can_be_reparameterized(config, cameras, views, tmp_path):
    model = GNTModel(config()).eval()
    parts = ("net_coarse", "feature_net")
    torch.save({part: getattr(model, part).state_dict() for part in parts}, tmp_path / "model.pth")
    loaded = load_official_checkpoint(tmp_path / "model.pth")
    reparameterize_(loaded, "add+shift-attn+moe", verbose=False)
    with torch.no_grad():
        assert_well_formed(render(loaded, views(loaded), cameras), SAMPLES)


def test_more_rays_at_once_change_nothing(config, cameras, views):
    model = GNTModel(config(**EXTRAS)).eval()
    origins, directions = middle(cameras).rays(PIXELS)
    with torch.no_grad():
        sources = views(model)
        together = model(sources, origins, directions, NEAR, FAR, SAMPLES)["rgb"]
        alone = [model(sources, origins[i : i + 1], directions[i : i + 1], NEAR, FAR, SAMPLES)["rgb"] for i in range(3)]
        nothing = model(sources, origins[:0], directions[:0], NEAR, FAR, SAMPLES)["rgb"]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert nothing.shape == (0, 3)


def test_render_rays_takes_images_and_mappings(config, cameras):
    model = GNTModel(config()).eval()
    batch, target = cameras(3), middle(cameras)
    sources = {"intrinsics": batch.intrinsics[0].numpy(), "camera_to_world": batch.camera_to_world.numpy()}
    one = {"intrinsics": target.intrinsics.tolist(), "camera_to_world": target.camera_to_world[None].tolist()}
    images = torch.rand(3, 36, 40, 3)
    with torch.no_grad():
        out = render_rays(model, images.numpy(), sources, one, PIXELS.tolist(), NEAR, FAR, SAMPLES)
        encoded = model.encode(images, batch)
        expected = model(encoded, *target.rays(PIXELS), NEAR, FAR, SAMPLES)
    assert_well_formed(out, SAMPLES)
    torch.testing.assert_close(out["rgb"], expected["rgb"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"source_images": torch.rand(3, 3, 36, 40)}, "source_images"),
        ({"source_images": torch.rand(36, 40, 3)}, "source_images"),
        ({"source_images": torch.rand(2, 36, 40, 3)}, "source_cameras"),
        ({"source_images": torch.rand(3, 20, 40, 3)}, "40x20"),
        ({"pixels": torch.rand(4, 3)}, "pixels"),
        ({"pixels": torch.rand(2)}, "pixels"),
        ({"target_camera": {"intrinsics": torch.eye(3)}}, "target_camera"),
        ({"near": 6.0, "far": 2.0}, "near"),
        ({"near": 0.0}, "near"),
        ({"far": float("nan")}, "far"),
        ({"num_samples": 1}, "num_samples"),
        ({"num_samples": 3, "num_importance": 4}, "at least 4"),
    ],
)
def test_what_does_not_fit_is_refused(config, cameras, changes, complaint):
    arguments = {
        "source_images": torch.rand(3, 36, 40, 3),
        "source_cameras": cameras(3),
        "target_camera": middle(cameras),
        "pixels": PIXELS,
        "near": NEAR,
        "far": FAR,
        "num_samples": SAMPLES,
    }
    with pytest.raises(UserError, match=complaint):
        render_rays(GNTModel(config()), **{**arguments, **changes})


def test_a_batch_of_targets_is_refused(config, cameras):
    with pytest.raises(UserError, match="target_camera must be one camera"):
        render_rays(GNTModel(config()), torch.rand(3, 36, 40, 3), cameras(3), cameras(2), PIXELS, NEAR, FAR, SAMPLES)


def test_colours_come_from_the_side_the_view_looks_from(config, cameras, views):
    # A point in front of two cameras falls on different pixels of each: both are looked up.
    model = GNTModel(config()).eval()
    batch = cameras(2)
    ramp = torch.linspace(0, 1, 40).expand(2, 36, 40).unsqueeze(-1).expand(-1, -1, -1, 3).contiguous()
    with torch.no_grad():
        sources = model.encode(ramp, batch)
        samples = sample_sources(torch.tensor([[[0.0, 0.0, -1.0]]]), torch.zeros(1, 3), sources, sources.features[0])
    left, right = samples.rgb[0, 0, :, 0].tolist()
    assert left + right == pytest.approx(1.0, abs=1e-4)
    assert abs(left - right) > 0.02


@pytest.mark.parametrize("training", [True, False])
def test_depths_that_views_see_background_through_are_proposed_less(config, cameras, views, training):
    model = GNTModel(config(**EXTRAS)).train(training)
    sources = views(model)
    empty = torch.zeros(4, 36, 40, dtype=torch.bool)
    empty[0, :, :30] = empty[1, :, :7] = True
    with torch.set_grad_enabled(training):
        plain = render(model, sources, cameras)["proposal"]
        sources.empty = empty & False
        torch.testing.assert_close(render(model, sources, cameras)["proposal"]["weights"], plain["weights"])
        sources.empty = empty
        hull = render(model, sources, cameras)["proposal"]
    origins, directions = middle(cameras).rays(PIXELS)
    counts = empty_views(origins[:, None] + plain["sample_depths"][..., None] * directions[:, None], sources)
    assert counts.unique().tolist() == [0, 1, 2]
    torch.testing.assert_close(hull["sample_depths"], plain["sample_depths"])
    expected = plain["weights"] * torch.exp(-1.0 * counts)
    torch.testing.assert_close(hull["weights"], expected / expected.sum(dim=-1, keepdim=True))


@pytest.mark.parametrize("canonical", [False, True])
def test_silhouettes_of_further_views_count_in_the_proposal(config, cameras, views, canonical):
    model = GNTModel(config(**EXTRAS, canonical=canonical)).eval()
    with torch.no_grad():
        sources = views(model)
        plain = render(model, sources, cameras)["proposal"]
        empty = torch.zeros(4, 36, 40, dtype=torch.bool)
        empty[1, :, :7] = True
        sources.empty = empty
        own = render(model, sources, cameras)["proposal"]
        both = Cameras(twice(sources.cameras.intrinsics), twice(sources.cameras.camera_to_world))
        sources.empty, sources.silhouettes = None, Silhouettes(both, twice(empty))
        further = render(model, sources, cameras)["proposal"]
    assert not torch.allclose(own["weights"], plain["weights"])
    expected = own["weights"].square() / plain["weights"]
    torch.testing.assert_close(further["weights"], expected / expected.sum(dim=-1, keepdim=True))


def twice(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor])


def test_rays_through_nothing_but_background_render_it(config, cameras):
    model = GNTModel(config(**EXTRAS)).eval()
    color = torch.tensor([0.25, 0.5, 0.75])
    with torch.no_grad():
        empty = torch.ones(4, 36, 40, dtype=torch.bool)
        out = render(model, model.encode(color.repeat(4, 36, 40, 1), cameras(4), empty=empty), cameras)
    assert_well_formed(out, SAMPLES)
    torch.testing.assert_close(out["rgb"], color.expand(3, 3), atol=1e-6, rtol=0)


def turned_and_scaled(cameras_, scale: float, shift: torch.Tensor) -> Cameras:
    """The same cameras in a world that is turned, `scale` times as large and elsewhere."""
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3)))[0]
    turn = turn * torch.linalg.det(turn).sign()
    moved = cameras_.camera_to_world.clone()
    moved[..., :3, :3] = turn @ moved[..., :3, :3]
    moved[..., :3, 3] = scale * cameras_.camera_to_world[..., :3, 3] @ turn.T + shift
    return Cameras(cameras_.intrinsics, moved)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_a_canonical_network_renders_the_same_wherever_a_scene_lies_and_however_large_it_is(
    config, cameras, views, scale
):
    model = GNTModel(config(canonical=True, **EXTRAS)).eval()
    shift = scale * torch.tensor([5.0, -3.0, 2.0])
    sources = views(model)
    moved = dataclasses.replace(sources, cameras=turned_and_scaled(sources.cameras, scale, shift))
    target = middle(cameras)
    with torch.no_grad():
        out = model(sources, *target.rays(PIXELS), NEAR, FAR, SAMPLES)
        rays = turned_and_scaled(target, scale, shift).rays(PIXELS)
        again = model(moved, *rays, scale * NEAR, scale * FAR, SAMPLES)
    torch.testing.assert_close(again["rgb"], out["rgb"], rtol=0, atol=2e-3)
    torch.testing.assert_close(again["depth"], scale * out["depth"], rtol=2e-3, atol=0)
    assert_well_formed(out, SAMPLES)


def test_a_network_that_is_not_canonical_sees_the_world(config, cameras, views):
    model = GNTModel(config()).eval()
    sources = views(model)
    moved = dataclasses.replace(sources, cameras=turned_and_scaled(sources.cameras, 1.0, torch.zeros(3)))
    target = middle(cameras)
    with torch.no_grad():
        out = model(sources, *target.rays(PIXELS), NEAR, FAR, SAMPLES)
        again = model(moved, *turned_and_scaled(target, 1.0, torch.zeros(3)).rays(PIXELS), NEAR, FAR, SAMPLES)
    assert not torch.allclose(again["weights"], out["weights"], atol=1e-4)


def test_rays_that_are_no_rows_of_a_picture_are_refused(config, views):
    model = GNTModel(config(proposal_samples=8)).eval()
    origins, directions = torch.zeros(7, 3), torch.ones(7, 3)
    with pytest.raises(UserError, match=r"^7 rays do not fill rows of 3; expected a multiple, or columns=0$"):
        model(views(model), origins, directions, 2.0, 6.0, 4, columns=3)
