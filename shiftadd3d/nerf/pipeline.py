"""Connects data and model: the model gets its source views here."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from nerfstudio.models.base_model import Model
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from torch.cuda.amp.grad_scaler import GradScaler
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from shiftadd3d._errors import UserError
from shiftadd3d.models.gnt import GNTModel
from shiftadd3d.nerf.checkpoint import extra_of, list_misfits, misfits, network_of, stage_of
from shiftadd3d.nerf.datamanager import GNTDataManager, GNTDataManagerConfig
from shiftadd3d.nerf.distributed import take_from_first_process
from shiftadd3d.nerf.model import GNTNerfModel, GNTNerfModelConfig
from shiftadd3d.nerf.near_far import check_near_far


@dataclass
class GNTPipelineConfig(VanillaPipelineConfig):
    """Settings of data and model, and the weights to start from."""

    _target: type = field(default_factory=lambda: GNTPipeline)
    """Target class to instantiate."""
    datamanager: GNTDataManagerConfig = field(default_factory=GNTDataManagerConfig)
    """Settings of the data."""
    model: GNTNerfModelConfig = field(default_factory=GNTNerfModelConfig)
    """Settings of the model."""
    warm_start: Path | None = None
    """Start from a trained dense network, which is then reparameterized: `pretrained` for the weights that come with
    the package (for shiftadd-gnt-tiny, those of its packed network), a gnt run's nerfstudio_models folder or
    step-*.ckpt, or an official GNT checkpoint (.pth). `none`: random weights. This has no effect when training
    continues from a checkpoint."""

    @property
    def starts_trained(self) -> bool:
        """Whether training starts from trained weights."""
        return self.warm_start is not None and self.warm_start != Path("none")


class GNTPipeline(VanillaPipeline):
    """nerfstudio's pipeline, with source views."""

    config: GNTPipelineConfig
    datamanager: GNTDataManager
    model: GNTNerfModel

    def __init__(
        self,
        config: GNTPipelineConfig,
        device: str,
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        grad_scaler: GradScaler | None = None,
    ) -> None:
        # On CPUs, nerfstudio would ask the wrapper for devices that it has none of.
        on_cpus = world_size > 1 and torch.device(device).type == "cpu"
        super().__init__(config, device, test_mode, 1 if on_cpus else world_size, local_rank, grad_scaler)
        if on_cpus:
            self.world_size = world_size
            self._model = cast(Model, DistributedDataParallel(self._model, find_unused_parameters=True))
        self.model.set_sources(
            self.datamanager.source_bank, config.datamanager.num_source_views, lambda: self.datamanager.drawn
        )
        if test_mode == "val":  # training; otherwise a checkpoint brings the range and the weights
            if config.warm_start is not None and config.starts_trained:
                self.model.warm_start(config.warm_start)
                take_from_first_process(self.model.gnt)  # routers are drawn at random
            self.model.near_far.copy_(torch.tensor(self.datamanager.near_far))

    @torch.no_grad()
    def judge(self) -> float:
        """The quality of the judged views now: PSNR in dB of some of their pixels, averaged over the views."""
        self.eval()
        try:
            errors = [
                F.mse_loss(self.model.get_outputs(rays)["rgb"], batch["image"])
                for rays, batch in self.datamanager.judged_batches()
            ]
        finally:
            self.train()
        return float(-10.0 * torch.stack(errors).clamp(min=1e-10).log10().mean())

    def enter_second_stage(self) -> dict[Parameter, Parameter]:
        """See `GNTNerfModel.enter_second_stage`. Other processes get the same weights."""
        wrapped = self._model
        if not isinstance(wrapped, DistributedDataParallel):
            return self.model.enter_second_stage()
        # It watches the parameters that there were when it was made.
        devices, model = wrapped.device_ids, self.model
        self._model = model
        del wrapped
        gc.collect()
        copies = model.enter_second_stage()
        # nerfstudio, too, calls that a model.
        self._model = cast(Model, DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True))
        return copies

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool | None = None) -> None:
        # nerfstudio's default is to load what fits and say nothing of the rest: a dense network's checkpoint would
        # leave most of a reparameterized one untrained.
        super().load_state_dict(state_dict, strict=strict is None or strict)

    def load_pipeline(self, loaded_state: Mapping[str, Any], step: int) -> None:
        """Load a checkpoint of the same method. Except for further training, the network is frozen (`freeze_`).

        Near and far are those of the training, unless `--pipeline.datamanager.near` and `.far` are set.

        Raises:
            UserError: it holds another network, or near is beyond far.
        """
        if stage_of(loaded_state) > self.model.stage:
            self.enter_second_stage()
        try:
            super().load_pipeline(dict(loaded_state), step)
        except RuntimeError:
            raise UserError(self._misfit(loaded_state)) from None
        if self.test_mode == "val":
            found, given = self.model.near_far.tolist(), (self.config.datamanager.near, self.config.datamanager.far)
            near, far = (old if new is None else new for old, new in zip(found, given, strict=True))
            check_near_far(near, far)
            self.model.near_far.copy_(torch.tensor([near, far]))
        else:
            self.model.freeze()

    def _misfit(self, state: Mapping[str, Any]) -> str:
        """Why a checkpoint's weights cannot be loaded, and what to do about it."""
        config, weights = self.model.config, network_of(state)
        missing, strange = misfits(weights, self.model.gnt.state_dict())
        recipe = extra_of(state).get("recipe")
        if not any(misfits(weights, GNTModel(config.gnt).state_dict())):
            remedy = "to start from a trained gnt run, pass it as --pipeline.warm-start"
        elif recipe not in (None, config.recipe):
            remedy = f"expected --pipeline.model.recipe {recipe}, with which it was trained"
        else:
            remedy = "expected the method, recipe and --pipeline.model.gnt sizes that it was trained with"
        return (
            f"the checkpoint (recipe {recipe or 'not known'}, stage {stage_of(state)}) is of another network than this "
            f"command's (recipe {config.recipe}, stage {self.model.stage}): {list_misfits(missing, strange)}; {remedy}"
        )
