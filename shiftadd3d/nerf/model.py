"""The nerfstudio model: GNT, dense or reparameterized, over the nearest source views of every target.

Metrics and colour maps are imported where they are used: rendering has to start within seconds.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.model_components import renderers
from nerfstudio.models.base_model import Model, ModelConfig
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor, nn
from torch.nn import Parameter

from shiftadd3d._errors import UserError
from shiftadd3d.kernels import Numerics, get_numerics
from shiftadd3d.models.gnt import Cameras as PinholeCameras
from shiftadd3d.models.gnt import GNTConfig, GNTModel, SourceViews
from shiftadd3d.models.gnt.compiled import CompiledGNT
from shiftadd3d.models.gnt.presets import SHIFTADD_RECIPE, gnt_recipe, may_change
from shiftadd3d.models.gnt.projection import Silhouettes, sample_sources
from shiftadd3d.nerf import exposure
from shiftadd3d.nerf.compiled import compiled_where_it_can_be
from shiftadd3d.nerf.feature_cache import FeatureCache
from shiftadd3d.nerf.foreign_rays import group_rays
from shiftadd3d.nerf.source_bank import PROJECTIONS, DrawnSources, SourceBank, camera_rays, opencv_cameras
from shiftadd3d.nerf.source_bank import SourceViews as BankViews
from shiftadd3d.nerf.warm_start import PRETRAINED, load_dense_weights, take_calibrated_weights
from shiftadd3d.nn import (
    FrozenModule,
    FrozenMoE,
    MoE,
    Recipe,
    collect_moe_losses,
    freeze_,
    reparameterize_,
    router_statistics,
)
from shiftadd3d.nn.routing import keep_routing, ray_shares

if TYPE_CHECKING:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity


@dataclass
class GNTNerfModelConfig(ModelConfig):
    """Settings of GNT, and what its layers become."""

    _target: type = field(default_factory=lambda: GNTNerfModel)
    """Target class to instantiate."""
    enable_collider: bool = False
    """Off, because near and far belong to the scene, not to single rays."""
    gnt: GNTConfig = field(default_factory=GNTConfig)
    """Sizes of the network."""
    recipe: str = "mult"
    """What the layers become: mult (no change), add, add+shift-attn, add+shift, add+shift-attn+moe or moe."""
    shift_bits: int = 4
    """Bits of a shift weight."""
    shift_terms: int = 1
    """Powers of two in a shift weight."""
    second_stage_at: float = 0.0
    """Share of the run after which linear layers become shifts and mixtures of experts, as in the paper's two stages.
    Before that, the recipe only changes attention. 0: it changes all layers from the start."""
    expert_latencies: tuple[float, float] | None = None
    """Latencies of the Mult and the Shift expert in any unit, for the load-balancing loss. If not set: measured."""
    balance_loss_mult: float = 0.001
    """Weight of the mixture's latency-aware load-balancing loss."""
    proposal_loss_mult: float = 0.5
    """Weight of the colour error of the plane sweep's own blend."""
    depth_loss_mult: float = 0.002
    """Weight of the plane sweep's cross entropy to true depths, for training scenes that have depth maps."""
    color_error: Literal["mse", "rmse"] = "mse"
    """Colour losses: the mean squared error, or its root, with which hard scenes weigh no more than easy ones."""
    num_samples: int = 64
    """Samples a ray for the transformers."""
    num_importance: int = 0
    """More samples on each ray, drawn where the first pass has most weight."""
    inverse_depth: bool = True
    """Space samples evenly in inverse depth instead of depth."""
    eval_num_rays_per_chunk: int = 1024
    """Number of rays that are rendered at once."""
    chessboard: bool = True
    """In evaluation of whole pictures, the plane sweep looks along every second ray, as on a chessboard.
    Rays between them get the mean of their neighbours."""
    match_exposure: bool = True
    """In evaluation with a colour head, bring the source views of a frame to one brightness.
    Photos may differ in exposure and white balance."""
    compile: bool = True
    """On a CPU, render with the frozen network as one executable, if it can be compiled."""
    lpips: bool = True
    """Also evaluate LPIPS. Its network is downloaded on first use."""


#: How many views from all around say where an object is not, beside a ray's sources, in rendering. Each costs one
#: look-up of a single channel at every depth of the proposal.
_FURTHER_SILHOUETTES = 18
#: How many chunks of rays an executable is given at once. It works through them some hundreds at a time itself, so this
#: costs little memory. Between two calls of it, Python computes on one thread.
_CHUNKS_OF_AN_EXECUTABLE = 4


def method_recipe(config: GNTNerfModelConfig, latencies: tuple[float, float] | None) -> Recipe:
    """What the layers become.

    Args:
        latencies: of the Mult and the Shift expert; measured if None.
    """
    changes: dict[str, Any] = {"bits": config.shift_bits, "terms": config.shift_terms}
    if latencies is not None:
        changes["latencies"] = latencies
    return gnt_recipe(config.recipe, **changes)


class GNTNerfModel(Model):
    """Renders a camera from the nearest views in its source bank.

    The pipeline sets the bank and, in training, near and far depths. A checkpoint restores near and far.
    """

    config: GNTNerfModelConfig
    near_far: Tensor
    stage: int
    """The present stage of the layers, of the paper's two."""
    use_own_view = False
    """Whether a camera that stands where a view does is rendered from that one, too. Not where it is to be judged how
    well the view is predicted; in a film, whose frames would be worse at views than between them."""

    def populate_modules(self) -> None:
        super().populate_modules()
        start = self.config.second_stage_at
        if not 0.0 <= start < 1.0:
            raise UserError(f"--pipeline.model.second-stage-at {start:g}: expected a share of the run, 0 <= share < 1")
        self._recipe = method_recipe(self.config, self.config.expert_latencies)
        self.stage = 1 if start > 0.0 and all(self._recipe.stages()) else 2
        self.gnt = self._reparameterized(GNTModel(self.config.gnt))
        # Scaled scene units, z depth. A buffer, so that a model is evaluated over the range it was trained on.
        self.register_buffer("near_far", torch.tensor([float("nan"), float("nan")]))
        self._bank: SourceBank | None = None
        self._num_source_views = 0
        self._drawn: Callable[[], DrawnSources | None] = lambda: None
        self._encoded: tuple[tuple[int, ...], SourceViews] | None = None
        self._features = FeatureCache()
        self._gains: dict[tuple[int, ...], Tensor] = {}
        self._is_frozen, self._shows_routing = False, True
        # In a tuple, so that torch takes it for no part of this model.
        self._frozen_copy: tuple[GNTModel, ...] = ()
        self._compiled: tuple[Numerics, GNTModel, GNTModel] | None = None
        self.register_load_state_dict_post_hook(_forget_what_was_made)
        self._lpips: LearnedPerceptualImagePatchSimilarity | None = None
        self._lpips_missing = False

    def _reparameterized(self, gnt: GNTModel) -> GNTModel:
        first, _ = self._recipe.stages()
        recipe = first if self.stage == 1 and first is not None else self._recipe
        reparameterize_(gnt, recipe, filter_fn=may_change, verbose=False)
        return gnt

    def get_extra_state(self) -> dict[str, Any]:
        """State for checkpoints in addition to the weights."""
        return {"stage": self.stage, "recipe": self.config.recipe}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load the state from a checkpoint. Layers are not changed: the pipeline has done that before."""
        if state["stage"] != self.stage:
            raise RuntimeError(f"the weights are of stage {state['stage']}, the layers of stage {self.stage}")

    def enter_second_stage(self) -> dict[Parameter, Parameter]:
        """Turn linear layers into the recipe's shifts and mixtures of experts, in place.

        Returns:
            The parameters of experts that begin as copies of others, each with the parameter that it copies.
        """
        self.stage = 2
        self._reparameterized(self.gnt)
        self._forget_what_was_made()
        mixtures = (module for module in self.gnt.modules() if isinstance(module, MoE))
        return {
            copied: original
            for mixture in mixtures
            for expert in mixture.experts[1:]
            for original, copied in zip(mixture.experts[0].parameters(), expert.parameters(), strict=True)
        }

    def pack(self) -> None:
        """Go to the form for inference at the end of the recipe: second stage, packed weights."""
        if self.stage == 1:
            self.enter_second_stage()
        self.freeze()

    def freeze(self) -> None:
        """Go to the form for inference of the present stage (`freeze_`). This cannot be undone."""
        freeze_(self.gnt, verbose=False)
        keep_routing(self.gnt)
        self._is_frozen = True
        self._forget_what_was_made()

    def _network(self) -> GNTModel:
        """What renders now. A network that is being trained does not evaluate itself: a frozen copy does that, made
        anew for each evaluation.
        """
        if self.training or torch.is_grad_enabled():
            return self.gnt
        if self._is_frozen:
            return self._executable(self.gnt)
        if not self._frozen_copy:
            network = copy.deepcopy(self.gnt)
            with contextlib.suppress(UserError):  # what cannot be frozen can be evaluated as it is
                freeze_(network, verbose=False)
            keep_routing(network)
            self._frozen_copy = (network,)
        return self._executable(self._frozen_copy[0])

    def _executable(self, network: GNTModel) -> GNTModel:
        """A frozen network as an executable, in the numerics of the process, where that can be."""
        chosen = get_numerics()
        on_cpu = self.device.type == "cpu"
        if (
            not self.config.compile
            or not on_cpu
            or chosen == "twin"
            or not isinstance(network.net_coarse, FrozenModule)
        ):
            return network
        if self._compiled is None or self._compiled[0] != chosen or self._compiled[1] is not network:
            self._compiled = chosen, network, compiled_where_it_can_be(network, CONSOLE)
        return self._compiled[2]

    @contextlib.contextmanager
    def without_routing(self) -> Iterator[None]:
        """Inside this context, outputs have no `routing`, which takes time and is seldom needed for videos."""
        mixtures = [module for module in self.gnt.modules() if isinstance(module, FrozenMoE) and module.keep_assignment]
        for mixture in mixtures:
            keep_routing(mixture, keep=False)
        before, self._shows_routing = self._shows_routing, False
        try:
            yield
        finally:
            self._shows_routing = before
            for mixture in mixtures:
                keep_routing(mixture)

    def warm_start(self, path: Path) -> None:
        """Start from a trained dense GNT, reparameterized: of a `gnt` run, or an official checkpoint.

        Raises:
            UserError: unreadable, or of other sizes than this model.
        """
        gnt = GNTModel(self.config.gnt)
        load_dense_weights(gnt, path)
        self._reparameterized(gnt)
        if path == PRETRAINED and self.config.recipe == SHIFTADD_RECIPE:
            take_calibrated_weights(gnt)
        # In place: under DDP the parameters are already being watched.
        self.gnt.load_state_dict(gnt.state_dict())

    def set_sources(
        self,
        bank: SourceBank,
        num_source_views: int,
        drawn: Callable[[], DrawnSources | None] = lambda: None,
    ) -> None:
        """Set the source views. They are data, not weights, and not in the state dict.

        Args:
            bank: the views that cameras are rendered from.
            num_source_views: number of views for each camera.
            drawn: in training across scenes, the source views of the rays drawn last.
        """
        self._bank, self._num_source_views, self._drawn = bank, num_source_views, drawn
        self._forget_what_was_made()

    def _forget_what_was_made(self) -> None:
        self._encoded, self._frozen_copy, self._compiled = None, (), None
        self._features.clear()
        self._gains.clear()

    def train(self, mode: bool = True) -> GNTNerfModel:
        compiled = self._compiled
        self._forget_what_was_made()  # of weights that are about to change
        if self._is_frozen:  # which those of a network for inference are not
            self._compiled = compiled
        return super().train(mode)

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        groups: dict[str, list[Parameter]] = {"feature_net": [], "transformers": []}
        for name, parameter in self.gnt.named_parameters():
            groups["feature_net" if name.startswith("feature_net.") else "transformers"].append(parameter)
        return groups

    def _get_bank(self) -> SourceBank:
        if self._bank is None:
            raise RuntimeError("the model has no source views: the pipeline hands them over by set_sources")
        return self._bank

    def _sources(self, ids: Tensor) -> SourceViews:
        key = tuple(ids.tolist())
        if not torch.is_grad_enabled() and self._encoded is not None and self._encoded[0] == key:
            return self._encoded[1]
        views = self._get_bank().gather(ids, self.device)
        if self.training or torch.is_grad_enabled():
            return self._encode(views)

        def compute(missing: list[int]) -> tuple[Tensor, Tensor]:
            return self.gnt.features(views.images[[key.index(view) for view in missing]])

        cameras = PinholeCameras(views.intrinsics, views.camera_to_world)
        sources = SourceViews(views.images, cameras, self._features.maps(key, compute), views.valid, views.empty)
        if self.config.match_exposure and self.config.gnt.color_head and len(key) > 2:
            gains = self._gains.get(key)
            if gains is None:
                gains = self._gains[key] = self._exposure_gains(sources)
            sources = replace(sources, images=(sources.images * torch.exp(-gains)[:, None, None]).clamp(max=1.0))
        self._encoded = (key, sources)
        return sources

    @torch.no_grad()
    def _exposure_gains(self, sources: SourceViews) -> Float[Tensor, "views 3"]:
        """See `exposure_gains`; of the surfaces that the first view shows, whose depths the others tell."""
        cameras, (height, width) = sources.cameras, sources.images.shape[1:3]
        y, x = (
            torch.linspace(0.0, size - 1.0, count, device=self.device)
            for size, count in zip((height, width), exposure.GRID, strict=True)
        )
        pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(-1, 2)
        origins, directions = PinholeCameras(cameras.intrinsics[0], cameras.camera_to_world[0]).rays(pixels)
        others = SourceViews(
            sources.images[1:],
            PinholeCameras(cameras.intrinsics[1:], cameras.camera_to_world[1:]),
            (sources.features[0][1:], sources.features[1][1:]),
            None if sources.valid is None else sources.valid[1:],
        )
        near, far = self.near_far.expand(len(origins), 2).unbind(dim=1)
        settings = {"inverse_depth": self.config.inverse_depth, "num_importance": self.config.num_importance}
        depth = self._network()(others, origins, directions, near, far, self.config.num_samples, **settings)["depth"]
        points = (origins + depth[:, None] * directions)[:, None]
        shown = sample_sources(points, origins, sources, sources.features[0][:, :1])
        return exposure.exposure_gains(shown.values[:, 0, :, :3], shown.mask[:, 0, :, 0])

    def _carved(self, ids: Tensor, origin: Tensor) -> SourceViews:
        """The source views of these ids with silhouettes from all around, of no view that stands at `origin` [3].

        In rendering only: a view to learn from would give its own silhouette away.
        """
        sources, bank = self._sources(ids), self._get_bank()
        if bank.empty is None or self.training:
            return sources
        around = torch.linspace(0, len(bank) - 1, min(len(bank), _FURTHER_SILHOUETTES)).round().long()
        around = around[~bank.stand_at(around, origin.cpu())]
        chosen = torch.cat([ids.cpu(), around]).unique()
        cameras = PinholeCameras(bank.intrinsics[chosen].to(self.device), bank.camera_to_world[chosen].to(self.device))
        return replace(sources, silhouettes=Silhouettes(cameras, bank.empty[chosen].to(self.device)))

    def _encode(self, views: BankViews) -> SourceViews:
        cameras = PinholeCameras(views.intrinsics, views.camera_to_world)
        return self.gnt.encode(views.images, cameras, views.valid, views.empty)

    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Any]:
        """Render rays.

        Args:
            ray_bundle: [rays]. `metadata["source_ids"]` [rays, views], the same for every ray, names the source views.
                Where it is missing, in rays that others made, views are chosen by where rays start and look
                (`group_rays`).

        Returns:
            `rgb` [rays, 3], `depth` [rays, 1] along the ray, `accumulation` [rays, 1]; in training what the losses
            need, and in evaluation, where there are mixtures, `routing` [rays, 1]: the share of a ray's samples that
            these sent to the multiplying expert, the mean over them.
        """
        if "source_ids" not in ray_bundle.metadata:
            return self._get_outputs_by_group(ray_bundle)
        drawn = self._drawn() if self.training else None
        if drawn is None:
            sources, near_far = self._carved(ray_bundle.metadata["source_ids"][0], ray_bundle.origins[0]), self.near_far
        else:
            sources, near_far = self._encode(drawn.views), self.near_far.new_tensor([drawn.near, drawn.far])
        return self._render(
            sources,
            ray_bundle.origins,
            ray_bundle.directions,
            # Rays whose length counts z depth: near and far are planes.
            ray_bundle.metadata["directions_norm"],
            *near_far.expand(len(ray_bundle), 2).unbind(dim=1),
        )

    @torch.no_grad()
    def _get_outputs_by_group(self, ray_bundle: RayBundle) -> dict[str, Tensor]:
        near, far = self.near_far.tolist()
        parts: list[dict[str, Tensor]] = []
        rows: list[Tensor] = []
        for group in group_rays(ray_bundle, self._get_bank(), self._num_source_views, (near, far)):
            rays = (group.origins, group.directions, group.length, group.near, group.far)
            sources = self._carved(group.source_ids, group.origins[0])
            parts.append(self._render(sources, *(value.to(self.device) for value in rays)))
            rows.append(group.rows)
        shape, place = ray_bundle.shape, torch.cat(rows).argsort().to(self.device)
        return {name: torch.cat([part[name] for part in parts])[place].view(*shape, -1) for name in parts[0]}

    def _get_outputs_by_rows(self, ray_bundle: RayBundle) -> dict[str, Tensor]:
        """Outputs [h, w, *] of a picture that is rendered from the same views throughout, some whole rows at a time."""
        height, width = ray_bundle.shape
        sources = self._carved(ray_bundle.metadata["source_ids"][0, 0], ray_bundle.origins[0, 0])
        near, far = self.near_far.expand(height, width, 2).unbind(dim=-1)
        length = ray_bundle.metadata["directions_norm"]
        rays = (ray_bundle.origins, ray_bundle.directions, length, near[..., None], far[..., None])
        chunks = _CHUNKS_OF_AN_EXECUTABLE if isinstance(self._network(), CompiledGNT) else 1
        rows = max(1, chunks * self.config.eval_num_rays_per_chunk // width)
        parts = [
            self._render(sources, *(x.flatten(0, 1) for x in some[:3]), *(x.flatten() for x in some[3:]), columns=width)
            for some in zip(*(x.to(self.device).split(rows) for x in rays), strict=True)
        ]
        return {name: torch.cat([part[name] for part in parts]).view(height, width, -1) for name in parts[0]}

    def _render(
        self,
        sources: SourceViews,
        origins: Tensor,
        directions: Tensor,
        length: Tensor,
        near: Tensor,
        far: Tensor,
        *,
        columns: int = 0,
    ) -> dict[str, Tensor]:
        at_once = self.config.eval_num_rays_per_chunk
        if not self.training and len(origins) > at_once and not columns:  # exporters ask for as many as others bear
            rays = (origins, directions, length, near, far)
            parts = [self._render(sources, *chunk) for chunk in zip(*(ray.split(at_once) for ray in rays), strict=True)]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        network = self._network()
        out = network(
            sources,
            origins,
            directions * length,
            near,
            far,
            self.config.num_samples,
            inverse_depth=self.config.inverse_depth,
            num_importance=self.config.num_importance,
            stratified=self.training,
            columns=columns,
        )
        outputs = {
            "rgb": out["rgb"] if self.training else out["rgb"].clamp(0.0, 1.0),
            "depth": out["depth"][:, None] * length,
            "accumulation": out["accumulation"][:, None],
        }
        shown = self._shows_routing and not self.training
        if shown and (shares := ray_shares(network, len(origins))):
            outputs["routing"] = torch.stack(list(shares.values())).mean(dim=0)[:, None]
        if self.training:
            for name in ("coarse", "proposal"):
                if out.get(name):
                    outputs[f"rgb_{name}"] = out[name]["rgb"]
            if out["proposal"]:
                outputs["proposal"] = out["proposal"]
        return outputs

    def get_loss_dict(
        self, outputs: dict[str, Any], batch: dict[str, Any], metrics_dict: dict[str, Any] | None = None
    ) -> dict[str, Tensor]:
        image = batch["image"].to(self.device)
        loss_dict = {"rgb_loss": self._color_error(outputs["rgb"], image)}
        if "rgb_coarse" in outputs:
            loss_dict["coarse_loss"] = self._color_error(outputs["rgb_coarse"], image)
        if "rgb_proposal" in outputs:
            loss_dict["proposal_loss"] = self.config.proposal_loss_mult * self._color_error(
                outputs["rgb_proposal"], image
            )
        if "depth" in batch and "proposal" in outputs:
            proposal = outputs["proposal"]
            loss_dict["depth_loss"] = self.config.depth_loss_mult * depth_cross_entropy(
                proposal["weights"], proposal["sample_depths"], batch["depth"].to(self.device)
            )
        if self.training:
            if self._has_mixtures:
                loss_dict["balance_loss"] = self.config.balance_loss_mult * collect_moe_losses(self.gnt)
            _check_finite(loss_dict)
        return loss_dict

    def _color_error(self, rgb: Tensor, image: Tensor) -> Tensor:
        error = F.mse_loss(rgb, image)
        return error if self.config.color_error == "mse" else (error + 1e-5).sqrt()

    @property
    def _has_mixtures(self) -> bool:
        return self._recipe.has_mixtures and self.stage == 2

    def get_metrics_dict(self, outputs: dict[str, Any], batch: dict[str, Any]) -> dict[str, Tensor]:
        metrics = {"psnr": _psnr(outputs["rgb"].detach(), batch["image"].to(self.device))}
        if self._has_mixtures and self.training:  # an evaluation leaves the statistics alone
            for layer, statistics in router_statistics(self.gnt).items():
                for expert, share in zip(statistics["experts"], statistics["last_shares"], strict=False):
                    metrics[f"router/{layer}/{expert}"] = torch.as_tensor(share)
        return metrics

    @torch.no_grad()
    def network_inputs(self, camera: Cameras, size: tuple[int, int]) -> dict[str, Any]:
        """What `gnt` is called with to render a camera, as keyword arguments; in evaluation.

        Args:
            camera: one, perspective or fisheye.
            size: rows and columns of rays, evenly over the picture.
        """
        rays = camera_rays(camera)
        rows, columns = (
            torch.linspace(0, length - 1, count).round().long() for length, count in zip(rays.shape, size, strict=True)
        )
        rays = rays[rows[:, None], columns].flatten()
        ids = self._get_bank().nearest(
            opencv_cameras(camera)[1][0], self._num_source_views, exclude_same_pose=not self.use_own_view
        )
        near, far = self.near_far.expand(len(rays), 2).unbind(dim=1)
        return {
            "sources": self._carved(ids.to(rays.origins.device), rays.origins[0]),
            "origins": rays.origins,
            "directions": rays.directions * rays.metadata["directions_norm"],
            "near": near,
            "far": far,
            "num_samples": self.config.num_samples,
            "inverse_depth": self.config.inverse_depth,
            "num_importance": self.config.num_importance,
        }

    @torch.no_grad()
    def get_outputs_for_camera(self, camera: Cameras, obb_box: OrientedBox | None = None) -> dict[str, Tensor]:
        """Render a camera from the source views nearest to it; a view at the camera's own pose is left out, unless
        `use_own_view` is set.

        Args:
            camera: one, of any type. Panoramas look everywhere: each ray of theirs has the views nearest to it.
            obb_box: a crop. Pixels whose surface lies outside become background: what it hides stays hidden.
        """
        rays = camera_rays(camera)
        if int(camera.camera_type) in PROJECTIONS:
            ids = self._get_bank().nearest(
                opencv_cameras(camera)[1][0], self._num_source_views, exclude_same_pose=not self.use_own_view
            )
            rays.metadata["source_ids"] = ids.to(rays.origins.device).expand(*rays.shape, -1)
        else:
            rays.camera_indices = None  # 0 is no training view's
        outputs = self.get_outputs_for_camera_ray_bundle(rays)
        if obb_box is not None:
            points = rays.origins + rays.directions * outputs["depth"].to(rays.origins)
            inside = obb_box.within(points.view(-1, 3)).view(outputs["depth"].shape).to(outputs["rgb"].device)
            background = renderers.BACKGROUND_COLOR_OVERRIDE
            background = torch.zeros(3) if background is None else background
            outputs["rgb"] = torch.where(inside, outputs["rgb"], background.to(outputs["rgb"]))
            outputs["accumulation"] = outputs["accumulation"] * inside
        return outputs

    @torch.no_grad()
    def get_outputs_for_camera_ray_bundle(self, camera_ray_bundle: RayBundle) -> dict[str, Tensor]:
        """Render a picture's rays, [h, w]; those of others are put together by their source views first."""
        if "source_ids" in camera_ray_bundle.metadata:
            if self.training or not self.config.chessboard:
                return super().get_outputs_for_camera_ray_bundle(camera_ray_bundle)
            outputs = self._get_outputs_by_rows(camera_ray_bundle)
        else:
            outputs = self._get_outputs_by_group(camera_ray_bundle)
        return {name: value.to(camera_ray_bundle.origins.device) for name, value in outputs.items()}

    def get_rgba_image(self, outputs: dict[str, Tensor], output_name: str = "rgb") -> Tensor:
        """Colour and, as alpha, how much of the ray some source view has seen."""
        return torch.cat([outputs[output_name], outputs[output_name.replace("rgb", "accumulation")]], dim=-1)

    def get_image_metrics_and_images(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """PSNR, SSIM and (when its weights are there) LPIPS, inside the mask if there is one; and pictures."""
        from nerfstudio.utils import colormaps

        image = batch["image"].to(outputs["rgb"])
        rgb = outputs["rgb"]
        depth = colormaps.apply_depth_colormap(outputs["depth"])
        images = {
            "img": torch.cat([image, rgb, depth], dim=1),
            "accumulation": colormaps.apply_colormap(outputs["accumulation"]),
            "depth": depth,
        }
        mask = batch.get("mask")
        metrics = image_metrics(rgb, image, mask)
        lpips = self._get_lpips() if self.config.lpips else None
        if lpips is not None:
            rgb, image = _channels_first(rgb, mask), _channels_first(image, mask)
            metrics["lpips"] = float(lpips.to(rgb.device)(rgb.clamp(0, 1), image))
        return metrics, images

    def _get_lpips(self) -> LearnedPerceptualImagePatchSimilarity | None:
        """LPIPS, built when first wanted: its network is downloaded, and a machine without it still evaluates."""
        if self._lpips is None and not self._lpips_missing:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            try:
                lpips = LearnedPerceptualImagePatchSimilarity(normalize=True)
            except (OSError, RuntimeError) as error:
                self._lpips_missing = True
                CONSOLE.print(f"LPIPS is left out: its network's weights could not be loaded ({error})")
                return None
            # Not a submodule: its weights belong in no checkpoint.
            object.__setattr__(self, "_lpips", lpips.eval().requires_grad_(False))
        return self._lpips


def _forget_what_was_made(model: nn.Module, _: Any) -> None:
    assert isinstance(model, GNTNerfModel)
    model._forget_what_was_made()


def depth_cross_entropy(
    weights: Float[Tensor, "rays planes"], depths: Float[Tensor, "rays planes"], truth: Float[Tensor, " rays"]
) -> Tensor:
    """Cross entropy of a plane sweep's weights to the planes around the true surface; a scalar.

    The truth is spread over the planes next to it by a Gaussian in inverse depth, as wide as the planes are apart, so
    that a surface between two of them belongs to both.

    Args:
        weights: of the planes, which sum to one.
        depths: z depths of the planes, increasing.
        truth: z depth of the surface; rays where it is 0, or beyond the planes, do not count.
    """
    inside = (truth >= depths[:, 0]) & (truth <= depths[:, -1])
    inverse = 1.0 / depths
    spacing = (inverse[:, :1] - inverse[:, -1:]) / (depths.shape[1] - 1)
    offset = (inverse - 1.0 / truth.clamp(min=1e-6)[:, None]) / spacing
    target = torch.softmax(-0.5 * offset.square(), dim=-1)
    entropy = -(target * weights.clamp(min=1e-5).log()).sum(dim=-1)
    return (entropy * inside).sum() / inside.sum().clamp(min=1)


def _check_finite(loss_dict: dict[str, Tensor]) -> None:
    """Stop training before a loss that is no number reaches the weights.

    Raises:
        UserError: a term, which is named, is not finite.
    """
    terms = torch.stack([term.detach() for term in loss_dict.values()])
    if terms.isfinite().all():  # one look while all is well: on a GPU, each waits for it
        return
    bad = [
        f"{name} is {term:g}" for name, term in zip(loss_dict, terms.tolist(), strict=True) if not math.isfinite(term)
    ]
    raise UserError(
        f"the loss is not finite any more ({', '.join(bad)}): lower "
        "--optimizers.transformers.optimizer.lr and --optimizers.feature-net.optimizer.lr, and go on from the last "
        "checkpoint with --load-dir and the same --data"
    )


def image_metrics(
    rgb: Float[Tensor, "h w 3"], image: Float[Tensor, "h w 3"], mask: Bool[Tensor, "h w 1"] | None = None
) -> dict[str, float]:
    """How near a picture is to the photograph: `psnr` in dB and `ssim`, the higher the better.

    Args:
        rgb: what was rendered, 0..1.
        image: what was photographed, 0..1, on the same device.
        mask: True where the pixel counts; the others are left out of the PSNR and black in both for the SSIM.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if mask is None:
        psnr = _psnr(rgb, image)
    else:
        inside = mask.to(rgb.device)[..., 0].bool()
        psnr = _psnr(rgb[inside], image[inside])
    ssim = structural_similarity_index_measure(_channels_first(rgb, mask), _channels_first(image, mask), data_range=1.0)
    return {"psnr": float(psnr), "ssim": float(ssim)}  # type: ignore[arg-type]


def _channels_first(image: Tensor, mask: Tensor | None) -> Tensor:
    """[h, w, 3] to [1, 3, h, w], black outside the mask."""
    if mask is not None:
        image = image * mask.to(image.device)
    return image.permute(2, 0, 1)[None]


def _psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, for values in 0..1."""
    return -10.0 * torch.log10(F.mse_loss(prediction, target).clamp(min=1e-10))
