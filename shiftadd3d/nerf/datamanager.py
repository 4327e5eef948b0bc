"""Rays of one target view in each step, and its source views."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float, Int, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.configs.dataparser_configs import AnnotatedDataParserUnion
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager, VanillaDataManagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.pixel_samplers import PixelSamplerConfig
from nerfstudio.data.utils.dataloaders import FixedIndicesEvalDataloader, RandIndicesEvalDataloader
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.dataparsers import AutoDataParser, AutoDataParserConfig, LLFFDataParser, check_outputs
from shiftadd3d.nerf.photos import is_cut_out, scale_crop_radius, unlit_border
from shiftadd3d.nerf.scene_mixture import (
    Photometric,
    SceneMixture,
    TrainScene,
    jittered,
    list_scenes,
    read_depths,
)
from shiftadd3d.nerf.scene_views import all_photos, near_and_far, photos, say_whether_cut_out, scale_to
from shiftadd3d.nerf.source_bank import DrawnSources, SourceBank, mend_fisheye_rays, opencv_cameras
from shiftadd3d.nerf.target_pixels import TargetPixels

#: Rays of each judged view. They are rendered without gradients: two such views cost about as much as a step.
_JUDGED_RAYS = 1024


@dataclass
class GNTDataManagerConfig(VanillaDataManagerConfig):
    """Each step has one target view, which is rendered from its nearest source views."""

    _target: type = field(default_factory=lambda: GNTDataManager)
    """Target class to instantiate."""
    dataparser: AnnotatedDataParserUnion = field(default_factory=AutoDataParserConfig)
    """Specifies the dataparser used to unpack the data."""
    train_num_rays_per_batch: int = 512
    """Number of rays per training step, all of one target view."""
    eval_num_rays_per_batch: int = 512
    """Number of rays per evaluation step, all of one held-out view."""
    num_source_views: int = 10
    """Number of source views that a target is rendered from."""
    spare_source_views: int = 0
    """In training, choose source views at random from the nearest ones and this many more."""
    judged_views: int = 0
    """In training on one scene, this many training views (evenly spread, at most an eighth of all) are not targets.
    Their quality decides which weights are kept (--steps-per-judgement). They are still source views.
    0: all views are targets, and the last weights are kept."""
    near: float | None = None
    """Nearest depth to sample, in units of the scaled scene. If not set, it is found from the scene."""
    far: float | None = None
    """Farthest depth to sample, in units of the scaled scene. If not set, it is found from the scene."""

    train_scenes: tuple[Path, ...] = ()
    """Train across these scenes: scene folders, folders of scene folders, and .txt files with a path (and a weight) a
    line. --data is then the held-out scene, which evaluation renders."""
    train_scene_max_side: int = 400
    """Training scenes are shrunk to at most this many pixels on the longer side."""
    train_source_views: tuple[int, int] = (3, 10)
    """In training across scenes, the fewest and the most source views of a step."""
    train_scenes_memory: float = 4.0
    """Memory in GB for pictures of training scenes. Beyond it, scenes used longest ago are removed and read again."""

    # Settings of the base class that mean nothing when every step draws its rays from one view kept in memory.
    train_num_images_to_sample_from: tyro.conf.Suppress[int] = -1
    train_num_times_to_repeat_images: tyro.conf.Suppress[int] = -1
    eval_num_images_to_sample_from: tyro.conf.Suppress[int] = -1
    eval_num_times_to_repeat_images: tyro.conf.Suppress[int] = -1
    eval_image_indices: tyro.conf.Suppress[tuple[int, ...] | None] = (0,)
    patch_size: tyro.conf.Suppress[int] = 1
    pixel_sampler: tyro.conf.Suppress[PixelSamplerConfig] = field(default_factory=PixelSamplerConfig)
    masks_on_gpu: tyro.conf.Suppress[bool] = False
    images_on_gpu: tyro.conf.Suppress[bool] = False


class GNTDataManager(VanillaDataManager[InputDataset]):
    """Draws the rays of one target view per step and chooses that view's sources.

    `next_train` and `next_eval` return a ray bundle [rays] and a batch:

    - `ray_bundle.metadata["source_ids"]`: [rays, num_source_views] long, the same row for every ray: ids into
      `source_bank`, nearest first, without the target itself;
    - `batch["image"]`: [rays, 3] float32 RGB in 0..1, `batch["indices"]`: [rays, 3] long (view, row, column).

    Rays follow the lens of their own view; the source views are undistorted. Only pixels inside masks, and inside the
    circle of a fisheye lens (`fisheye_crop_radius`), are drawn.

    Args:
        config: the settings.
        device: where rays and batches go. Images stay on the CPU.
        test_mode: "val" in training; "test" and "inference" hold the test split in `eval_dataset`. Nothing is read from
            disk but headers before the first batch or the first use of `source_bank`.

    Raises:
        UserError: see `check_outputs`; also settings that leave no ray, source view or pixel, and fewer training views
            than `num_source_views` + 1.
    """

    config: GNTDataManagerConfig

    def __init__(
        self,
        config: GNTDataManagerConfig,
        device: torch.device | str = "cpu",
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        **kwargs,
    ):
        for name in ("num_source_views", "train_num_rays_per_batch", "eval_num_rays_per_batch"):
            if getattr(config, name) < 1:
                option = f"--pipeline.datamanager.{name.replace('_', '-')}"
                raise UserError(f"{option} {getattr(config, name)}: expected 1 or more")
        if config.judged_views < 0:
            raise UserError(f"--pipeline.datamanager.judged-views {config.judged_views}: expected 0 or more")
        if not 0.0 < config.camera_res_scale_factor < float("inf"):
            raise UserError(
                f"--pipeline.datamanager.camera-res-scale-factor {config.camera_res_scale_factor:g}: expected a "
                "positive number"
            )
        self.drawn: DrawnSources | None = None
        self._near_far_of: dict[Path, tuple[float, float]] = {}
        # In "inference" mode the base class would read images at full size, whatever they were trained at, and leave
        # out the loaders that rendering needs. The set-up here reads no image, so there is nothing to save.
        super().__init__(
            config=config,
            device=device,
            test_mode="test" if test_mode == "inference" else test_mode,
            world_size=world_size,
            local_rank=local_rank,
            **kwargs,
        )
        _ = self.train_mixture  # what is wrong with it is found before anything is read
        views, needed = len(self.train_dataset), config.num_source_views + 1
        if views < needed:
            raise UserError(
                f"{self.get_datapath()} has {views} training views; {config.num_source_views} source views and a "
                f"target need {needed}: expected --pipeline.datamanager.num-source-views {max(views - 1, 1)} or fewer"
            )

    @cached_property
    def source_bank(self) -> SourceBank:
        """The training views as source views, read on first use."""
        return SourceBank.from_dataset(self.train_dataset)

    @cached_property
    def near_far(self) -> tuple[float, float]:
        """Nearest and farthest z-depth to sample; see `near_and_far`."""
        return near_and_far(self.train_dataset, self.source_bank, self.config.near, self.config.far)

    @cached_property
    def train_mixture(self) -> SceneMixture | None:
        """The scenes to train across; None for training on one scene.

        Raises:
            UserError: none of the named paths is a scene, or the held-out scene is among them.
        """
        config = self.config
        if not config.train_scenes:
            return None
        fewest, most = config.train_source_views
        if not 2 <= fewest <= most:
            raise UserError(f"--pipeline.datamanager.train-source-views {fewest} {most}: expected 2 <= fewest <= most")
        if not config.train_scenes_memory > 0:
            raise UserError(
                f"--pipeline.datamanager.train-scenes-memory {config.train_scenes_memory:g}: expected a positive "
                "number of GB"
            )
        scenes = list_scenes(config.train_scenes)
        held_out = self.get_datapath().resolve()
        if any(scene.path.resolve() == held_out for scene in scenes):
            raise UserError(
                f"{held_out} is held out for evaluation and among the training scenes: take it from "
                "--pipeline.datamanager.train-scenes, or name another --data"
            )
        return SceneMixture(scenes, self._load_train_scene, int(config.train_scenes_memory * 2**30))

    def _load_train_scene(self, path: Path) -> TrainScene:
        """All views of a scene, shrunk to `train_scene_max_side`.

        Raises:
            UserError: it cannot be read, or has too few views.
        """
        outputs = AutoDataParserConfig(data=path, eval_mode="all").setup().get_dataparser_outputs(split="train")
        needed = self.config.train_source_views[0] + 1
        if len(outputs.image_filenames) < needed:
            raise UserError(
                f"{path} has {len(outputs.image_filenames)} views; expected at least {needed} to train across"
            )
        dataset = all_photos(
            outputs, scale_to(outputs, self.config.train_scene_max_side), is_cut_out(outputs.image_filenames)
        )
        bank = SourceBank.from_dataset(dataset)
        if path not in self._near_far_of:  # found by matching, maybe, which takes seconds
            self._near_far_of[path] = near_and_far(dataset, bank)
        return TrainScene(dataset, bank, TargetPixels(dataset, bank), *self._near_far_of[path], read_depths(dataset))

    def create_train_dataset(self) -> InputDataset:
        return self._create_dataset(self.train_dataparser_outputs, "train")

    def create_eval_dataset(self) -> InputDataset:
        return self._create_dataset(self.dataparser.get_dataparser_outputs(split=self.test_split), self.test_split)

    def _create_dataset(self, outputs: DataparserOutputs, split: str) -> InputDataset:
        if not isinstance(self.dataparser, (AutoDataParser, LLFFDataParser)):  # these two have checked
            check_outputs(outputs, split)
            scale_crop_radius(outputs.cameras, 1.0 / (getattr(self.dataparser, "downscale_factor", None) or 1))
        return photos(outputs, self.config.camera_res_scale_factor, self._cut_out, self._unlit)

    @cached_property
    def _cut_out(self) -> bool:
        """Whether alpha is the scene's (`is_cut_out`); the training views say so for all."""
        return say_whether_cut_out(self.train_dataparser_outputs.image_filenames)

    @cached_property
    def _unlit(self) -> np.ndarray | None:
        """What a fisheye lens leaves black (`unlit_border`); the training views say so for all."""
        outputs = self.train_dataparser_outputs
        return unlit_border(outputs.cameras, outputs.image_filenames, self.config.camera_res_scale_factor)

    def setup_train(self) -> None:
        # The base class caches every image as float32 here. Only the sampler's number of rays is read, and ns-export
        # sets it.
        self.train_pixel_sampler = self._get_pixel_sampler(self.train_dataset, self.config.train_num_rays_per_batch)

    def setup_eval(self) -> None:
        self.eval_pixel_sampler = self._get_pixel_sampler(self.eval_dataset, self.config.eval_num_rays_per_batch)
        self.fixed_indices_eval_dataloader = FixedIndicesEvalDataloader(self.eval_dataset, device=self.device)
        self.eval_dataloader = RandIndicesEvalDataloader(self.eval_dataset, device=self.device)

    def next_train(self, step: int) -> tuple[RayBundle, dict[str, Tensor]]:
        """Rays of one training view, drawn at random, with that view's nearest others as sources."""
        self.train_count += 1
        if self.train_mixture is not None:
            return self._next_of(self.train_mixture.draw(_generator_of(step)))
        view, rows, columns, colours = self._train_pixels.draw(self.get_train_rays_per_batch())
        sources = self.source_bank.nearest(
            self.source_bank.camera_to_world[view],
            self.config.num_source_views,
            exclude=view,
            exclude_same_pose=True,  # a frame that is listed twice would show the target itself
            spare=self.config.spare_source_views,
        )
        return self._batch(self.train_dataset.cameras, view, rows, columns, colours, sources)

    def _next_of(self, scene: TrainScene) -> tuple[RayBundle, dict[str, Tensor]]:
        """Rays of one view of a scene to train across. Its sources, with their colours changed, are then `drawn`."""
        view, rows, columns, colours = scene.pixels.draw(self.get_train_rays_per_batch())
        fewest, most = self.config.train_source_views
        spare = int(torch.randint(0, 3, ())) ** 2  # 0, 1 or 4: sparser views, too
        count = min(int(torch.randint(fewest, most + 1, ())), len(scene.bank) - 1)
        sources = scene.bank.nearest(
            scene.bank.camera_to_world[view], count, exclude=view, exclude_same_pose=True, spare=spare
        )
        ray_bundle, batch = self._batch(scene.dataset.cameras, view, rows, columns, colours, sources)
        change, views = Photometric.draw(), scene.bank.gather(sources, self.device)
        self.drawn = DrawnSources(views._replace(images=change(views.images)), *jittered(scene.near, scene.far))
        batch["image"] = change(batch["image"])
        depths = scene.depths[view]
        if depths is not None:
            batch["depth"] = depths[rows, columns].to(self.device)
        return ray_bundle, batch

    def next_eval(self, step: int) -> tuple[RayBundle, dict[str, Tensor]]:
        """Rays of one held-out view, drawn at random, with its nearest training views as sources."""
        self.eval_count += 1
        view, rows, columns, colours = self._eval_pixels.draw(self.get_eval_rays_per_batch())
        sources = self.source_bank.nearest(self._eval_poses[view], self.config.num_source_views, exclude_same_pose=True)
        return self._batch(self.eval_dataset.cameras, view, rows, columns, colours, sources)

    def _batch(
        self,
        cameras: Cameras,
        view: int,
        rows: Int[Tensor, " rays"],
        columns: Int[Tensor, " rays"],
        colours: UInt8[Tensor, "rays 3"],
        sources: Int[Tensor, " views"],
    ) -> tuple[RayBundle, dict[str, Tensor]]:
        indices = torch.stack([torch.full_like(rows, view), rows, columns], dim=-1)
        ray_bundle = cameras.generate_rays(camera_indices=indices[:, :1], coords=indices[:, 1:] + 0.5)
        mend_fisheye_rays(ray_bundle, cameras[view])
        ray_bundle.metadata["source_ids"] = sources.expand(len(rows), -1)
        batch = {"image": colours.float() / 255.0, "indices": indices}
        return ray_bundle.to(self.device), {key: value.to(self.device) for key, value in batch.items()}

    @cached_property
    def judged(self) -> list[int]:
        """Training views that are never targets; see `GNTDataManagerConfig.judged_views`."""
        if not self.config.judged_views or self.train_mixture is not None:
            return []
        views = self._all_train_pixels.views
        count = min(self.config.judged_views, max(1, len(views) // 8), len(views) - 1)
        return [views[(2 * index + 1) * len(views) // (2 * count)] for index in range(count)]

    def judged_batches(self) -> list[tuple[RayBundle, dict[str, Tensor]]]:
        """Rays of each judged view, with the sources that a held-out view would have.

        Every call gives the same rays.
        """
        generator = torch.Generator().manual_seed(0)
        batches = []
        for view in self.judged:
            pixels = self._all_train_pixels.draw_of(view, _JUDGED_RAYS, generator)
            sources = self.source_bank.nearest(
                self.source_bank.camera_to_world[view],
                self.config.num_source_views,
                exclude=view,
                exclude_same_pose=True,
            )
            batches.append(self._batch(self.train_dataset.cameras, view, *pixels, sources))
        return batches

    @cached_property
    def _all_train_pixels(self) -> TargetPixels:
        return TargetPixels(self.train_dataset, self.source_bank)

    @cached_property
    def _train_pixels(self) -> TargetPixels:
        pixels, judged = self._all_train_pixels, set(self.judged)
        pixels.views = [view for view in pixels.views if view not in judged]
        return pixels

    @cached_property
    def _eval_pixels(self) -> TargetPixels:
        return TargetPixels(self.eval_dataset)

    @cached_property
    def _eval_poses(self) -> Float[Tensor, "n 4 4"]:
        return opencv_cameras(self.eval_dataset.cameras)[1]


def _generator_of(step: int) -> torch.Generator:
    """Of a step and the process's seed alone, so that a run goes on with the scenes that it would have had."""
    # Seeds of processes that train together are consecutive: far apart, they share no sequence.
    return torch.Generator().manual_seed((1_000_003 * torch.initial_seed() + step) % 2**32)
