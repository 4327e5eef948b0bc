"""The whole model: feature network and one or two GNTs, and rendering rays with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.reference.gnt.sampling import chessboard
from shiftadd3d.models.gnt.feature_net import ResUNet
from shiftadd3d.models.gnt.projection import Cameras, PointLookUp, SourceViews, empty_views
from shiftadd3d.models.gnt.proposal import PlaneSweepProposal
from shiftadd3d.models.gnt.sampling import sample_around, sample_depths, sample_importance
from shiftadd3d.models.gnt.transformer import GNT

#: What each view that sees background alone through a depth takes from the depth's logit in the proposal. On the
#: synthetic chair, a half and 1 are as good as each other, 4 is worse than 0.
_LOGIT_OF_EMPTY = 1.0


@dataclass(frozen=True)
class GNTConfig:
    """Sizes of a `GNTModel`. The defaults are the released GNT's; its paper uses `depth=8`."""

    depth: int = 4
    """Pairs of view and ray transformers."""
    width: int = 64
    """Channels of the transformers."""
    num_heads: int = 4
    """Heads of the ray transformers."""
    dropout: float = 0.1
    """Dropout rate while training."""
    feature_dim: int = 32
    """Channels of the source feature maps."""
    feature_widths: tuple[int, int, int] = (64, 128, 256)
    """Channels of the feature network's encoder stages."""
    feature_blocks: tuple[int, int, int] = (3, 4, 6)
    """Residual blocks of the feature network's encoder stages."""
    single_net: bool = True
    """One network for coarse and fine samples; otherwise two."""
    color_head: bool = False
    """Blend source colours instead of regressing the colour alone."""
    angle_spread: float = 0.0
    """The spread of views at which the blend prefers the nearest one twice as strongly: the mean of 1 - cosine of their
    angles to the target. With 0, the preference depends on the angle only, not on the spread."""
    proposal_samples: int = 0
    """Depths on each ray for a plane sweep, which proposes the samples for the transformers; 0 for no proposal."""
    proposal_features: int = 8
    """Feature channels that the plane sweep compares."""
    canonical: bool = False
    """Give the network positions relative to the start of the ray, in the axes of the nearest source view and in units
    of the scene's depth, not in the world. So its weights fit scenes of any origin, orientation and scale."""


class GNTModel(nn.Module):
    """`feature_net`, `net_coarse` and, unless `single_net`, `net_fine`: the parts of an official checkpoint."""

    def __init__(self, config: GNTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GNTConfig()

        def net() -> GNT:
            sizes = config.depth, config.width, config.feature_dim, config.num_heads
            return GNT(*sizes, config.dropout, config.color_head, config.angle_spread)

        self.net_coarse = net()
        self.net_fine = None if config.single_net else net()
        self.look_up = PointLookUp()
        self.proposal = PlaneSweepProposal(config.proposal_features) if config.proposal_samples else None
        self.feature_net = ResUNet(
            coarse_dim=config.feature_dim,
            fine_dim=0 if config.single_net else config.feature_dim,
            widths=config.feature_widths,
            blocks=config.feature_blocks,
        )

    def encode(
        self, images: Tensor, cameras: Cameras, valid: Tensor | None = None, empty: Tensor | None = None
    ) -> SourceViews:
        """Run the feature network over source images.

        Args:
            images: [V, H, W, 3], 0..1.
            cameras: V of them.
            valid: [V, H, W] bool, or None.
            empty: [V, H, W] bool, or None.
        """
        return SourceViews(images, cameras, self.features(images), valid, empty)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Feature maps of source images [V, H, W, 3] for the coarse and the fine network, each [V, C, H/4, W/4].

        Every image is normalised by itself: its maps do not depend on the others.
        """
        coarse, fine = self.feature_net(images.permute(0, 3, 1, 2))
        if torch.is_grad_enabled():
            return coarse, fine
        # Every chunk of rays looks up points in them, and kernels want a pixel's channels side by side.
        coarse = coarse.contiguous(memory_format=torch.channels_last)
        return coarse, coarse if self.config.single_net else fine.contiguous(memory_format=torch.channels_last)

    def forward(
        self,
        sources: SourceViews,
        origins: Tensor,
        directions: Tensor,
        near: Tensor | float,
        far: Tensor | float,
        num_samples: int,
        *,
        inverse_depth: bool = False,
        num_importance: int = 0,
        stratified: bool = False,
        columns: int = 0,
    ) -> dict[str, Any]:
        """Render rays.

        Args:
            sources: encoded source views.
            origins, directions: [R, 3] each. `near`, `far` and depths are in units of the length of `directions`.
            near, far: [R] or numbers.
            num_samples: S samples for the coarse pass.
            inverse_depth: space them evenly in 1 / depth.
            num_importance: N more samples for a second pass; 0 for none.
            stratified: draw samples at random within their strata (training).
            columns: width of the picture if the rays are its rows, one after the other. The plane sweep then looks
                along every second ray, as on a chessboard, and the rays between get the mean of their neighbours. 0: it
                looks along all rays.

        Returns:
            `rgb` [R, 3], `depth` [R], `accumulation` [R] (the weight on samples that some source view can see),
            `weights` [R, S] and `sample_depths` [R, S]. With importance sampling, these are of the second pass (S + N
            samples), and those of the first pass are under `coarse`. Those of the plane sweep are under `proposal`, if
            it looks along all rays.

        Raises:
            UserError: the number of rays is no multiple of `columns`.
        """
        if columns and len(origins) % columns:
            raise UserError(f"{len(origins)} rays do not fill rows of {columns}; expected a multiple, or columns=0")
        near, far = (torch.as_tensor(x).to(origins).expand(origins.shape[0]) for x in (near, far))
        unit = torch.ones((), dtype=origins.dtype, device=origins.device)
        if self.config.canonical and len(origins):
            # The median, as all are the same as a rule: their mean would depend on how many rays there are.
            unit = (0.5 / near + 0.5 / far).median().reciprocal()
            sources, origins, directions = canonical_frame(sources, origins, directions, unit)
            near, far = near / unit, far / unit
        rays = (sources, origins, directions)
        proposed: dict[str, Any] = {}
        if self.proposal is None:
            depths = sample_depths(near, far, num_samples, inverse_depth=inverse_depth, stratified=stratified)
        else:
            board = (len(origins), columns) if columns else None
            swept = slice(None) if board is None else chessboard(*board).to(origins.device)
            planes = sample_depths(
                near[swept],
                far[swept],
                self.config.proposal_samples,
                inverse_depth=inverse_depth,
                stratified=stratified,
            )
            seen = self._propose(self.proposal, sources, origins[swept], directions[swept], planes)
            proposed = _outputs(*seen, planes, unit) if board is None else {}
            depths = self._samples_around(planes, seen[1], num_samples, stratified=stratified, board=board)
        coarse = self._render(self.net_coarse, *rays, depths, sources.features[0])
        outputs = _outputs(*coarse, depths, unit)
        if num_importance == 0:
            return {**outputs, "proposal": proposed}
        depths = sample_importance(
            depths, outputs["weights"], num_importance, inverse_depth=inverse_depth, stratified=stratified
        )
        net = self.net_coarse if self.net_fine is None else self.net_fine
        fine = self._render(net, *rays, depths, sources.features[1])
        return {**_outputs(*fine, depths, unit), "coarse": outputs, "proposal": proposed}

    def _render(
        self, net: GNT, sources: SourceViews, origins: Tensor, directions: Tensor, depths: Tensor, feature_maps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        along = depths[..., None] * directions[:, None]
        samples = self.look_up(origins[:, None] + along, origins, sources, feature_maps)
        # Where a sample is: from where its ray starts, or in the world, as the released code has it.
        shown = along if self.config.canonical else origins[:, None] + along
        return *net(samples, shown, directions), samples.mask[..., 0].any(dim=-1)

    def _propose(
        self,
        proposal: PlaneSweepProposal,
        sources: SourceViews,
        origins: Tensor,
        directions: Tensor,
        planes: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rgb, weights, seen = self._sweep(proposal, sources, origins, directions, planes)
        if sources.empty is not None or sources.silhouettes is not None:
            # Views agree on a plain background wherever they look past an object, better than on the object itself.
            # Softly: a ray that misses it inside the hull of few views needs samples beside, which show the background.
            points = origins[:, None] + planes[..., None] * directions[:, None]
            weights = weights * torch.exp(-_LOGIT_OF_EMPTY * empty_views(points, sources))
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        return rgb, weights, seen

    def _sweep(
        self,
        proposal: PlaneSweepProposal,
        sources: SourceViews,
        origins: Tensor,
        directions: Tensor,
        planes: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return proposal.sweep(origins[:, None] + planes[..., None] * directions[:, None], origins, sources)

    def _samples_around(
        self, planes: Tensor, weights: Tensor, num_samples: int, *, stratified: bool, board: tuple[int, int] | None
    ) -> Tensor:
        return sample_around(planes, weights, num_samples, stratified=stratified, board=board)


def canonical_frame(
    sources: SourceViews, origins: Tensor, directions: Tensor, unit: Tensor
) -> tuple[SourceViews, Tensor, Tensor]:
    """Sources and rays in a frame with the same meaning in every scene.

    Its origin and axes are those of the first source view (the nearest, because the source bank sorts them). Its unit
    of length is `unit`.

    Args:
        sources: V views.
        origins, directions: [R, 3] each.
        unit: scalar, in the world's units. This depth becomes 1.

    Returns:
        The same views, origins [R, 3], and directions [R, 3] with unchanged length.
    """
    axes, centre = sources.cameras.camera_to_world[0, :3, :3], sources.cameras.camera_to_world[0, :3, 3]

    def moved(cameras: Cameras) -> Cameras:
        poses = cameras.camera_to_world.clone()
        poses[:, :3, :3] = axes.T @ poses[:, :3, :3]
        poses[:, :3, 3] = (poses[:, :3, 3] - centre) @ axes / unit
        return Cameras(cameras.intrinsics, poses)

    silhouettes = sources.silhouettes
    if silhouettes is not None:
        silhouettes = dataclasses.replace(silhouettes, cameras=moved(silhouettes.cameras))
    sources = dataclasses.replace(sources, cameras=moved(sources.cameras), silhouettes=silhouettes)
    return sources, (origins - centre) @ axes / unit, directions @ axes


def _outputs(rgb: Tensor, weights: Tensor, seen: Tensor, depths: Tensor, unit: Tensor) -> dict[str, Any]:
    depths = depths * unit
    return {
        "rgb": rgb,
        "depth": (weights * depths).sum(dim=-1),
        "accumulation": (weights * seen).sum(dim=-1),
        "weights": weights,
        "sample_depths": depths,
    }


def render_rays(
    model: GNTModel,
    source_images: Tensor,
    source_cameras: Cameras | Mapping[str, Any],
    target_camera: Cameras | Mapping[str, Any],
    pixels: Tensor,
    near: float,
    far: float,
    num_samples: int,
    inverse_depth: bool = False,
    num_importance: int = 0,
) -> dict[str, Any]:
    """Render pixels of a target camera from source images.

    Cameras follow OpenCV (x right, y down, z forward; pixel centres at integers): a `Cameras`, or a mapping with
    `intrinsics` ([..., 3, 3] or [..., 4, 4]) and `camera_to_world` ([..., 4, 4]). Dropout follows `model.training`; the
    samples lie on a fixed grid.

    Args:
        model: from `load_official_checkpoint`, or your own.
        source_images: [V, H, W, 3], 0..1.
        source_cameras: V of them.
        target_camera: one.
        pixels: [R, 2], (x, y).
        near, far: z depths in the target camera, in the units of the poses, 0 < near < far.
        num_samples: samples a ray.
        inverse_depth: space them evenly in 1 / depth.
        num_importance: further samples a ray, drawn where the first pass put its weight; outputs are then the second
            pass's.

    Returns:
        `rgb` [R, 3], `depth` [R] (z depth), `weights` [R, S], `sample_depths` [R, S]; with importance sampling the
        first pass's under `coarse`.

    Raises:
        UserError: shapes that do not fit, or near and far out of order.
    """
    parameter = next(model.parameters())
    images = torch.as_tensor(source_images).to(parameter)
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"source_images must be [V, H, W, 3], not {list(images.shape)}")
    sources = Cameras.of(source_cameras, "source_cameras").to(parameter)
    if sources.intrinsics.shape not in ((3, 3), (1, 3, 3), (len(images), 3, 3)):
        raise UserError(
            f"source_cameras: {len(images)} images need intrinsics [{len(images)}, 3, 3] or one for all, "
            f"not {list(sources.intrinsics.shape)}"
        )
    intrinsics = sources.intrinsics.expand(len(images), 3, 3)
    if sources.camera_to_world.shape != (len(images), 4, 4):
        raise UserError(
            f"source_cameras: {len(images)} images need camera_to_world [{len(images)}, 4, 4], "
            f"not {list(sources.camera_to_world.shape)}"
        )
    target = Cameras.of(target_camera, "target_camera").to(parameter)
    if target.intrinsics.numel() != 9 or target.camera_to_world.numel() != 16:
        raise UserError(f"target_camera must be one camera, not {list(target.camera_to_world.shape[:-2])}")
    target = Cameras(target.intrinsics.reshape(-1, 3, 3)[0], target.camera_to_world.reshape(-1, 4, 4)[0])
    pixels = torch.as_tensor(pixels).to(parameter)
    if pixels.ndim != 2 or pixels.shape[-1] != 2:
        raise UserError(f"pixels must be [R, 2], not {list(pixels.shape)}")
    origins, directions = target.rays(pixels)
    views = model.encode(images, Cameras(intrinsics, sources.camera_to_world))
    return model(
        views, origins, directions, near, far, num_samples, inverse_depth=inverse_depth, num_importance=num_importance
    )
