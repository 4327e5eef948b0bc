"""The trivial renderers: what they must show where the answer is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shiftadd3d.nerf.model import image_metrics
from shiftadd3d.nerf.runs import Run, load_run
from shiftadd3d.nerf.source_bank import SourceBank, opencv_cameras
from shiftadd3d.nerf.trivial import average_metrics, mean_of_projections, nearest_image, trivial_metrics


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Run:
    return load_run(tiny_run)


def painted(bank: SourceBank, colours: torch.Tensor) -> SourceBank:
    """The same cameras, each of whose images has one colour ([n, 3] uint8)."""
    images = colours[:, None, None].expand(-1, bank.height, bank.width, 3).contiguous()
    return SourceBank(images, None, bank.intrinsics, bank.camera_to_world)


def test_nearest_is_a_pixel_for_pixel_copy_of_the_nearest_training_image(run: Run):
    datamanager = run.pipeline.datamanager
    camera = datamanager.eval_dataset.cameras[0:1]
    index = int(datamanager.source_bank.nearest(opencv_cameras(camera)[1][0], 1))
    copy = nearest_image(datamanager, camera)
    assert torch.equal((copy * 255).round().to(torch.uint8), datamanager.source_bank.images[index])


def test_a_training_view_is_not_copied_onto_itself(run: Run):
    datamanager = run.pipeline.datamanager
    copy = nearest_image(datamanager, datamanager.train_dataset.cameras[0:1])
    assert not torch.equal((copy * 255).round().to(torch.uint8), datamanager.source_bank.images[0])


def test_nearest_takes_the_size_of_the_target(run: Run):
    from shiftadd3d.nerf.render import scale_cameras

    datamanager = run.pipeline.datamanager
    assert nearest_image(datamanager, scale_cameras(datamanager.eval_dataset.cameras[0:1], 0.5)).shape == (24, 32, 3)


def test_mean_over_views_of_one_colour_is_that_colour_whatever_the_geometry(run: Run):
    datamanager = run.pipeline.datamanager
    colours = torch.tensor([[255, 51, 102]], dtype=torch.uint8).repeat(len(datamanager.source_bank), 1)
    bank = painted(datamanager.source_bank, colours)
    rgb = mean_of_projections(
        bank, datamanager.eval_dataset.cameras[0:1], num_source_views=3, near_far=(0.1, 2.0), num_samples=5
    )
    assert rgb.shape == (48, 64, 3)
    assert torch.allclose(rgb, torch.tensor([1.0, 0.2, 0.4]).expand_as(rgb), atol=1e-5)


def test_mean_leaves_out_pixels_that_hold_nothing_and_does_not_depend_on_chunks(run: Run):
    datamanager = run.pipeline.datamanager
    bank, camera = datamanager.source_bank, datamanager.eval_dataset.cameras[0:1]
    near_far = tuple(run.pipeline.model.near_far.tolist())
    nearest = bank.nearest(opencv_cameras(camera)[1][0], 2)
    colours = torch.zeros(len(bank), 3, dtype=torch.uint8)
    colours[nearest[1]] = 255
    bank = painted(bank, colours)
    bank.valid = torch.ones(bank.images.shape[:3], dtype=torch.bool)
    bank.valid[nearest[0]] = False

    def mean(rays_per_chunk: int) -> torch.Tensor:
        return mean_of_projections(
            bank, camera, num_source_views=2, near_far=near_far, num_samples=4, rays_per_chunk=rays_per_chunk
        )

    rgb = mean(10_000)
    # White where the second view is seen, and the mean of both pictures where nothing is.
    white, grey = (rgb - 1.0).abs() < 1e-4, (rgb - 0.5).abs() < 1e-4
    assert (white | grey).all()
    assert white.any()
    assert torch.allclose(rgb, mean(777), atol=1e-5)


def test_trivial_metrics_are_averages_over_the_evaluation_views(run: Run):
    datamanager = run.pipeline.datamanager
    metrics = trivial_metrics(run.pipeline)
    assert metrics.keys() == {"nearest", "mean"}
    views = [
        image_metrics(nearest_image(datamanager, camera), batch["image"])
        for camera, batch in datamanager.fixed_indices_eval_dataloader
    ]
    assert metrics["nearest"] == pytest.approx(average_metrics(views))
    # Noise: the mean of several pictures errs less than any one of them.
    assert metrics["mean"]["psnr"] > metrics["nearest"]["psnr"] + 1


def test_masked_metrics_count_what_is_inside_only():
    image = torch.rand(24, 24, 3)
    rgb = image.clone()
    rgb[:8] = 1 - rgb[:8]
    mask = torch.ones(24, 24, 1, dtype=torch.bool)
    mask[:8] = False
    assert image_metrics(rgb, image)["psnr"] < 15
    assert image_metrics(rgb, image, mask) == pytest.approx({"psnr": 100.0, "ssim": 1.0}, abs=1e-3)
