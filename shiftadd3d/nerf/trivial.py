"""Two renderers without training. A model that does not beat both has not learnt anything useful."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from shiftadd3d._progress import progress
from shiftadd3d.models.gnt import Cameras as PinholeCameras
from shiftadd3d.models.gnt import SourceViews
from shiftadd3d.models.gnt.frozen import FrozenPointLookUp
from shiftadd3d.models.gnt.projection import PointLookUp
from shiftadd3d.models.gnt.sampling import sample_depths
from shiftadd3d.nerf.datamanager import GNTDataManager
from shiftadd3d.nerf.model import image_metrics
from shiftadd3d.nerf.pipeline import GNTPipeline
from shiftadd3d.nerf.source_bank import SourceBank, load_image, mend_fisheye_rays, opencv_cameras


def nearest_image(datamanager: GNTDataManager, camera: Cameras) -> Float[Tensor, "h w 3"]:
    """The image of the nearest training camera: 0..1, on the CPU, resized if the target has another size.

    As for the model, a view at the camera's own pose is left out.

    Args:
        datamanager: holds the training views.
        camera: one nerfstudio camera, batch shape [1].
    """
    pose = opencv_cameras(camera)[1][0]
    nearest = int(datamanager.source_bank.nearest(pose, 1, exclude_same_pose=True))
    # From the dataset, not the bank: that one is undistorted and padded, and the target is neither.
    image = torch.from_numpy(load_image(datamanager.train_dataset, nearest)[0]).float() / 255.0
    size = (int(camera.height), int(camera.width))
    if image.shape[:2] != size:
        image = F.interpolate(image.permute(2, 0, 1)[None], size=size, mode="bilinear", antialias=True)[0]
        image = image.permute(1, 2, 0)
    return image


def mean_of_projections(
    bank: SourceBank,
    camera: Cameras,
    *,
    num_source_views: int,
    near_far: tuple[float, float],
    num_samples: int,
    inverse_depth: bool = True,
    rays_per_chunk: int = 4096,
) -> Float[Tensor, "h w 3"]:
    """The mean colour over the nearest views and all depths of a ray: projection without knowledge of the geometry.

    Args:
        bank: the source views.
        camera: one nerfstudio camera, batch shape [1]. The result, 0..1, is on its device.
        num_source_views: K. A view at the camera's own pose is left out.
        near_far: z depths in units of the scaled scene.
        num_samples: S depths on each ray, at least 2.
        inverse_depth: space them evenly in inverse depth instead of depth.
        rays_per_chunk: number of rays in a chunk.

    Raises:
        UserError: fewer than K views, or near and far out of order.
    """
    device = camera.device
    ids = bank.nearest(opencv_cameras(camera)[1][0], num_source_views, exclude_same_pose=True)
    views = bank.gather(ids, device)
    maps = views.images.permute(0, 3, 1, 2)
    sources = SourceViews(
        views.images, PinholeCameras(views.intrinsics, views.camera_to_world), (maps, maps), views.valid
    )
    # Where no view sees anything of a ray, the colour that errs least without knowing more.
    blank = (views.images if views.valid is None else views.images[views.valid]).reshape(-1, 3).mean(dim=0)
    blank = blank.nan_to_num()  # all masked
    rays = camera.generate_rays(camera_indices=0, keep_shape=True).flatten()
    mend_fisheye_rays(rays, camera)
    near, far = (torch.tensor(value, device=device) for value in near_far)
    look_up = FrozenPointLookUp(PointLookUp()).eval()
    colours = []
    for start in range(0, len(rays), rays_per_chunk):
        chunk = rays[start : start + rays_per_chunk]
        depths = sample_depths(
            near.expand(len(chunk)), far.expand(len(chunk)), num_samples, inverse_depth=inverse_depth
        )
        directions = chunk.directions * chunk.metadata["directions_norm"]  # as long as one unit of z depth
        points = chunk.origins[:, None] + depths[..., None] * directions[:, None]
        samples = look_up(points, chunk.origins, sources, maps)
        seen = samples.mask.to(samples.rgb.dtype)
        count = seen.sum(dim=(1, 2))
        mean = (samples.rgb * seen).sum(dim=(1, 2)) / count.clamp(min=1.0)
        colours.append(torch.where(count > 0, mean, blank))
    return torch.cat(colours).view(int(camera.height), int(camera.width), 3)


@torch.no_grad()
def trivial_metrics(pipeline: GNTPipeline) -> dict[str, dict[str, float]]:
    """Both renderers over the pipeline's evaluation views, with the model's own metrics and its own K, S, near and far.

    Returns:
        `{"nearest": {"psnr", "ssim"}, "mean": {"psnr", "ssim"}}`, averages over the views.

    Raises:
        UserError: see `mean_of_projections`.
    """
    datamanager, config = pipeline.datamanager, pipeline.model.config
    near, far = pipeline.model.near_far.tolist()
    found: dict[str, list[dict[str, float]]] = {"nearest": [], "mean": []}
    count = len(datamanager.eval_dataset)
    with progress("Trivial renderers", count, unit="views", console=CONSOLE) as shown:
        for camera, batch in datamanager.fixed_indices_eval_dataloader:
            image, mask = batch["image"].to(camera.device), batch.get("mask")
            mean = mean_of_projections(
                datamanager.source_bank,
                camera,
                num_source_views=datamanager.config.num_source_views,
                near_far=(near, far),
                num_samples=config.gnt.proposal_samples or config.num_samples,
                inverse_depth=config.inverse_depth,
                rays_per_chunk=config.eval_num_rays_per_chunk,
            )
            found["nearest"].append(image_metrics(nearest_image(datamanager, camera).to(image), image, mask))
            found["mean"].append(image_metrics(mean, image, mask))
            shown.advance()
    return {name: average_metrics(metrics) for name, metrics in found.items()}


def average_metrics(metrics: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the views."""
    return {key: sum(view[key] for view in metrics) / len(metrics) for key in metrics[0]}
