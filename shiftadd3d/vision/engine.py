"""Training and evaluating one classifier.

`train` runs one stage: any model, any recipe, starting from the present weights. timm provides optimizers, schedule,
mixing, smoothing and the moving average. The balance losses of mixtures of experts are added here. Results depend on
the settings only: not on the number of processes, and not on interruptions.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from shiftadd3d._errors import UserError
from shiftadd3d._progress import Steps, progress
from shiftadd3d.nn import MoE, ShiftLinear, collect_moe_losses, reset_router_statistics, router_statistics
from shiftadd3d.vision.checkpoint import (
    WEIGHTS_FILE,
    ClassifierConfig,
    load,
    read_weights,
    save_classifier,
    write_atomically,
    write_json_atomically,
)
from shiftadd3d.vision.data import (
    InputConfig,
    PictureData,
    PictureSet,
    TrainBatches,
    eval_loader,
    seed_everything,
    train_loader,
)
from shiftadd3d.vision.distributed import (
    add_up,
    choose_device,
    from_first_process,
    is_sharded,
    load_whole_model_state,
    load_whole_optimizer_state,
    shard_,
    this_process,
    whole_model_state,
    whole_optimizer_state,
)
from shiftadd3d.vision.metrics import ClassificationMetrics, MetricSums
from shiftadd3d.vision.settings import StageSettings, TrainSettings

BEST_FOLDER, STATE_FILE, HISTORY_FILE = "best", "state.pt", "history.json"
_STATE_VERSION = 2
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class TrainResult:
    """The result of a stage."""

    model: nn.Module
    """The model with the best weights, in evaluation mode."""
    metrics: ClassificationMetrics
    """Metrics of the best weights on the validation pictures."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry an epoch: epoch (from 1), lr, train_loss, moe_loss, val_loss, top1, top5, seconds, mult_shares (of the
    tokens that the routers sent to the multiplying expert in validation, by layer)."""


def train(
    model: nn.Module,
    data: PictureData,
    config: ClassifierConfig,
    stage: StageSettings,
    settings: TrainSettings,
    *,
    folder: Path | None = None,
    teacher: nn.Module | None = None,
    before_training: Callable[[], None] | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train a classifier in one stage, and keep the weights with the best validation result.

    Args:
        model: maps [B, 3, size, size] to logits [B, classes]. It is trained in place.
        data: the pictures.
        config: the description of the model, for checkpoints and for turning pictures into inputs.
        stage: epochs and learning rate.
        settings: everything else.
        folder: for checkpoints, history and tensorboard. An unfinished training in it continues. None keeps the best
            weights in memory only.
        teacher: a model whose predictions are compared if `settings.distill_weight` is not 0.
        before_training: called in every process before the first step, after everything has been checked, including a
            state in `folder`. Not called for a training that is finished.
        console: shows progress; None is silent.

    Raises:
        UserError: a batch is larger than the set, the loss is not finite, or memory or disk are full. Nothing saved is
            lost.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the state has been saved.
    """
    stage.validate()
    settings.validate()
    training = _Training(model, data, config, stage, settings, folder, teacher, console)
    return training.run(before_training)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    pictures: PictureSet,
    input_config: InputConfig,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> ClassificationMetrics:
    """Measure a classifier. With several processes, each measures its share of the pictures.

    Args:
        model: maps [B, 3, size, size] to logits [B, classes]. Its mode is left as it was.
        pictures: numbered as the outputs of the model.
        input_config: how pictures become inputs.
        batch_size: pictures in a batch of one process.
        workers: processes that read pictures.
        on_batch: called with the number of pictures of each batch.

    Raises:
        UserError: a picture that cannot be read.
    """
    process = this_process()
    device = _device_of(model)
    loader = eval_loader(pictures, input_config, batch_size, workers, device, *process)
    sums = MetricSums(len(pictures.classes))
    was_training = model.training
    model.eval()
    try:
        for images, targets in loader:
            sums.add(model(images.to(device, non_blocking=True)), targets)
            if on_batch is not None:
                on_batch(len(targets))
        if is_sharded(model) and len(loader) < _most_batches(len(pictures), batch_size, process.world_size):
            # The others have one more batch, and cannot gather the model without this process.
            size = input_config.size
            model(torch.zeros(1, 3, size, size, device=device))
    finally:
        model.train(was_training)
    add_up(*sums.sums(), device=device)
    return sums.result(pictures.classes)


def _most_batches(pictures: int, batch_size: int, world_size: int) -> int:
    """Batches of the process that has the most."""
    return math.ceil(math.ceil(pictures / world_size) / batch_size)


def _device_of(model: nn.Module) -> torch.device:
    tensor = next(model.parameters(), None)
    if tensor is None:
        tensor = next(model.buffers(), torch.empty(0))
    return tensor.device


class _Training:
    """One stage under way."""

    def __init__(
        self,
        model: nn.Module,
        data: PictureData,
        config: ClassifierConfig,
        stage: StageSettings,
        settings: TrainSettings,
        folder: Path | None,
        teacher: nn.Module | None,
        console: Console | None,
    ) -> None:
        self.process = this_process()
        self.device = choose_device(settings.device)
        if settings.amp == "float16" and self.device.type == "cpu":
            raise UserError("--amp float16: a CPU computes in float32 or bfloat16")
        self.data, self.config, self.stage, self.settings = data, config, stage, settings
        self.folder = folder
        self.console = console if self.process.is_first else None
        self.model = model.to(self.device)
        self.sharded = settings.parallel == "fsdp" and self.process.world_size > 1
        if self.sharded and folder is None:
            raise UserError("a sharded training needs a folder for its checkpoints")
        self.teacher = None
        if teacher is not None and settings.distill_weight > 0:
            self.teacher = teacher.to(self.device).eval()
        self.batches = TrainBatches(len(data.train), settings.batch_size, settings.seed, *self.process)
        self.loader = train_loader(data.train, self.batches, config.input, settings, self.device)
        self.steps = len(self.batches)
        self._set_trainable()
        if self.sharded:
            shard_(self.model, self.device)
        seed_everything(settings.seed, self.process.rank)
        self.optimizer = make_optimizer(self.model, stage, settings)
        self.scheduler = self._make_scheduler()
        self.mix = _make_mixup(settings, len(config.classes))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "float16")
        self.ema = None
        if settings.ema is not None:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(self.model, decay=settings.ema, use_warmup=True)
        self.epoch, self.batch = 0, 0
        self.sums: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.best_weights: dict[str, Tensor] = {}
        self.interrupted = False
        self.stop = False  # what all processes have agreed on

    # ----------------------------------------------------------------------------------------------------------------
    # Preparation
    # ----------------------------------------------------------------------------------------------------------------

    def _set_trainable(self) -> None:
        if not self.stage.freeze_backbone:
            return
        head = _classifier_of(self.model)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in head.parameters():
            parameter.requires_grad_(True)

    def _make_scheduler(self):
        from timm.scheduler import CosineLRScheduler

        total = self.stage.epochs * self.steps
        warmup = min(round(self.stage.warmup_epochs * self.steps), total // 2)
        return CosineLRScheduler(
            self.optimizer,
            t_initial=max(1, total - warmup),
            lr_min=self.stage.lr / 100,
            warmup_t=warmup,
            warmup_lr_init=self.stage.lr / 100,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    # ----------------------------------------------------------------------------------------------------------------
    # The loop
    # ----------------------------------------------------------------------------------------------------------------

    def run(self, before_training: Callable[[], None] | None = None) -> TrainResult:
        self._restore()
        if self.epoch < self.stage.epochs:
            if before_training is not None:
                before_training()
            if self.console is not None and (self.epoch or self.batch):
                where = f"epoch {self.epoch + 1}" + (f", step {self.batch + 1}" if self.batch else "")
                self.console.print(f"going on at {where} of {self.stage.epochs} epochs", highlight=False)
            self._train()
        model = self.model
        if self.folder is None:
            model.load_state_dict(self.best_weights)
        elif self.sharded:
            model = load(self.folder / BEST_FOLDER, self.device)
        else:
            model.load_state_dict(read_weights(self.folder / BEST_FOLDER / WEIGHTS_FILE))
        model.requires_grad_(True)
        return TrainResult(model.eval(), ClassificationMetrics.from_dict(self.best["metrics"]), self.history)

    def _train(self) -> None:
        wrapped = self.model
        if self.process.world_size > 1 and not self.sharded:
            wrapped = nn.parallel.DistributedDataParallel(
                self.model, device_ids=[self.device] if self.device.type == "cuda" else None
            )
        explained = explain_memory_errors(self.device, self.settings.batch_size, self.config.input.size, self._kept)
        with self._interruptible(), explained, self._tensorboard() as board, self._progress() as steps:
            while self.epoch < self.stage.epochs:
                began = time.perf_counter()
                self._train_epoch(wrapped, steps)
                with steps.aside():
                    self._finish_epoch(board, time.perf_counter() - began)

    def _train_epoch(self, wrapped: nn.Module, steps: Steps) -> None:
        self.batches.start_at(self.epoch, self.batch)
        if self.batch == 0:
            self.sums = {"loss": 0.0, "moe": 0.0, "steps": 0.0}
        self._set_modes()
        for images, targets in self.loader:
            self.scheduler.step_update(self.epoch * self.steps + self.batch)
            # What is random in a step depends on the step alone, so that a resumed training is the same training.
            seed_everything(self.settings.seed, 1 + self.epoch, self.batch, self.process.rank)
            loss, moe = self._step(wrapped, images, targets)
            self.batch += 1
            self.sums["loss"] += loss
            self.sums["moe"] += moe
            self.sums["steps"] += 1
            steps.advance(status=f"epoch {self.epoch + 1}/{self.stage.epochs}, loss {loss:.3f}")
            if self.stop:
                self._save_and_interrupt()

    def _set_modes(self) -> None:
        self.model.train()
        if self.stage.freeze_backbone:
            self.model.eval()
            _classifier_of(self.model).train()

    def _step(self, wrapped: nn.Module, images: Tensor, targets: Tensor) -> tuple[float, float]:
        settings = self.settings
        images, targets = images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        if self.mix is not None:
            images, targets = self.mix(images, targets)
        with torch.autocast(self.device.type, _DTYPES[settings.amp], enabled=settings.amp != "float32"):
            logits = wrapped(images)
            loss = classification_loss(logits.float(), targets, settings.label_smoothing)
            if self.teacher is not None:
                with torch.no_grad():
                    wanted = self.teacher(images)
                distilled = distillation_loss(logits.float(), wanted.float(), settings.distill_temperature)
                loss = torch.lerp(loss, distilled, settings.distill_weight)
            moe = collect_moe_losses(self.model)
            total = loss + settings.moe_weight * moe
        finite = bool(torch.isfinite(total.detach()))
        facts = torch.tensor([float(loss.detach()), float(moe.detach()), float(not finite), float(self.interrupted)])
        add_up(facts, device=self.device)
        facts[:2] /= self.process.world_size
        self.stop = bool(facts[3])
        if facts[2]:
            raise self._not_finite(f"the loss is {float(facts[0] + settings.moe_weight * facts[1])}")
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        self.scaler.unscale_(self.optimizer)
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, settings.clip_grad or math.inf)
        if self.sharded:
            norm = cast(Any, norm).full_tensor()
        # The scaler leaves out such steps itself, and lowers its scale.
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            raise self._not_finite(f"the gradient's norm is {float(norm)}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, step=self.epoch * self.steps + self.batch + 1)
        return float(facts[0]), float(facts[1])

    def _not_finite(self, what: str) -> UserError:
        where = f"{what} in epoch {self.epoch + 1}, step {self.batch + 1} (learning rate {self._lr():.2g})"
        return UserError(f"{where}; expected a lower learning rate, --clip-grad 1, or --amp float32{self._kept()}")

    def _kept(self) -> str:
        if self.folder is None or not (self.folder / STATE_FILE).exists():
            return ""
        return f"; the state of the last whole epoch is kept in {self.folder}"

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _finish_epoch(self, board: Any, seconds: float) -> None:
        evaluated = self.ema.module if self.ema is not None else self.model
        reset_router_statistics(evaluated)
        metrics = evaluate(
            evaluated,
            self.data.val,
            self.config.input,
            batch_size=self.settings.batch_size,
            workers=self.settings.workers,
            on_batch=lambda count: self._stop_between_batches(),
        )
        if not math.isfinite(metrics.loss):
            raise self._not_finite(f"the validation loss is {metrics.loss}")
        steps = self.sums["steps"]
        record = {
            "epoch": self.epoch + 1,
            "lr": self._lr(),
            "train_loss": self.sums["loss"] / steps,
            "moe_loss": self.sums["moe"] / steps,
            "val_loss": metrics.loss,
            "top1": metrics.top1,
            "top5": metrics.top5,
            "seconds": round(seconds, 2),
            "mult_shares": {name: facts["shares"][0] for name, facts in router_statistics(evaluated).items()},
        }
        self.history.append(record)
        self.epoch, self.batch = self.epoch + 1, 0
        better = not self.best or (metrics.top1, -metrics.loss) > (self.best["top1"], -self.best["val_loss"])
        if better:
            self.best = {**record, "metrics": metrics.as_dict()}
        if self.folder is not None:
            self._save(evaluated if better else None)
        elif better:
            self.best_weights = {name: tensor.detach().clone() for name, tensor in evaluated.state_dict().items()}
        if board is not None:
            for key in ("lr", "train_loss", "moe_loss", "val_loss", "top1", "top5"):
                board.add_scalar(key, record[key], self.epoch)
            for name, share in record["mult_shares"].items():
                board.add_scalar(f"mult_share/{name}", share, self.epoch)
        if self.console is not None:
            shares = record["mult_shares"].values()
            routed = f"  mult {sum(shares) / len(shares):.0%}" if shares else ""
            self.console.print(
                f"epoch {self.epoch:>3}/{self.stage.epochs}  loss {record['train_loss']:.4f}  "
                f"val loss {metrics.loss:.4f}  top-1 {metrics.top1:.2%}{routed}  {seconds:.0f} s"
                + ("  best so far" if better else ""),
                highlight=False,
                soft_wrap=True,
            )

    # ----------------------------------------------------------------------------------------------------------------
    # State
    # ----------------------------------------------------------------------------------------------------------------

    def _save(self, best: nn.Module | None = None) -> None:
        """Save the state, and the weights of `best` if there is one."""
        best_weights = None if best is None else whole_model_state(best)
        state = {
            "version": _STATE_VERSION,
            "epoch": self.epoch,
            "batch": self.batch,
            "batch_size": self.settings.batch_size,
            "fixed": self._fixed(),
            "sums": self.sums,
            "history": self.history,
            "best": self.best,
            "model": whole_model_state(self.model),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": whole_optimizer_state(self.model, self.optimizer),
            "scaler": self.scaler.state_dict(),
            "latencies": {
                name: module.latencies for name, module in self.model.named_modules() if isinstance(module, MoE)
            },
        }
        from_first_process(lambda: self._write(state, best_weights))

    def _write(self, state: dict[str, Any], best_weights: dict[str, Tensor] | None) -> None:
        folder = self.folder
        assert folder is not None
        if best_weights is not None:
            save_classifier(folder / BEST_FOLDER, best_weights, self.config)
        write_atomically(folder / STATE_FILE, lambda file: torch.save(state, file))
        facts = {
            "finished": self.epoch >= self.stage.epochs,
            "best_epoch": self.best.get("epoch"),
            "epochs": self.history,
            "validation": self.best.get("metrics"),
        }
        write_json_atomically(folder / HISTORY_FILE, facts)

    def _restore(self) -> None:
        file = None if self.folder is None else self.folder / STATE_FILE
        if file is None or not from_first_process(file.is_file):
            return
        state = read_state(file)
        finished = state["epoch"] >= self.stage.epochs
        if not finished:
            self._check_same_training(file, state)
        try:
            load_whole_model_state(self.model, state["model"])
            if self.ema is not None:
                # An average that begins late begins with the weights of then, not with those of the very start.
                self.ema.module.load_state_dict(state["model"] if state["ema"] is None else state["ema"])
            if not finished:
                # Where there are gradients, torch takes the optimizer's state for complete.
                self.model.zero_grad(set_to_none=True)
                decays = [group["weight_decay"] for group in self.optimizer.param_groups]
                load_whole_optimizer_state(self.model, self.optimizer, state["optimizer"])
                for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
                    group["weight_decay"] = decay  # as it is asked for now, like the learning rate
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{file}: the state of another training than this one ({reason})") from None
        self.scaler.load_state_dict(state["scaler"])
        for name, module in self.model.named_modules():
            if isinstance(module, MoE) and name in state["latencies"]:
                module.set_latencies(state["latencies"][name])
                module.measure_pending = False
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.sums, self.history, self.best = state["sums"], state["history"], state["best"]
        if state["batch_size"] != self.settings.batch_size and self.batch:
            # Another batch size cuts the epoch elsewhere: begin it again.
            self.batch = 0

    def _check_same_training(self, file: Path, state: Mapping[str, Any]) -> None:
        """What the optimizer's state hangs on must be as it was."""
        for option, now in self._fixed().items():
            begun = state.get("fixed", {}).get(option, now)
            if begun != now:
                raise UserError(f"{file}: this stage was begun with {option} {begun}, not {now}; expected the same")

    def _fixed(self) -> dict[str, Any]:
        return {
            "--opt": self.settings.opt,
            "freeze-backbone": self.stage.freeze_backbone,
            "layer-decay": self.stage.layer_decay,
        }

    def _stop_between_batches(self) -> None:
        # Alone, a validation may stop anywhere; together, all processes stop in the next step of training.
        if self.interrupted and self.process.world_size == 1:
            self._save_and_interrupt()

    def _save_and_interrupt(self) -> None:
        self._save()
        if self.console is not None:
            self.console.print(f"Interrupted; nothing is lost. The state is in {self.folder}", soft_wrap=True)
        raise KeyboardInterrupt

    # ----------------------------------------------------------------------------------------------------------------
    # Around the loop
    # ----------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM take effect between two steps, when the state is whole; a second Ctrl-C at once."""
        if self.folder is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            if self.interrupted and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.interrupted = True

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _tensorboard(self) -> Iterator[Any]:
        if self.folder is None or not self.process.is_first:
            yield None
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        # Entries of epochs that are now trained again would be drawn over the new ones.
        writer = SummaryWriter(str(self.folder), purge_step=self.epoch + 1 if self.epoch else None)
        try:
            yield writer
        finally:
            writer.close()

    def _progress(self) -> contextlib.AbstractContextManager[Steps]:
        # A validation computes forwards only, and so does nearly all of a step with a frozen backbone.
        batches = _most_batches(len(self.data.val), self.settings.batch_size, self.process.world_size)
        overhead = batches / self.steps * (1 if self.stage.freeze_backbone else 1 / 3)
        return progress(
            "training" if self.folder is None else self.folder.name,
            self.stage.epochs * self.steps,
            done=self.epoch * self.steps + self.batch,
            overhead=overhead,
            announce=True,
            console=self.console,
            disable=self.console is None,
        )


def read_state(file: Path) -> Mapping[str, Any]:
    """The state of a training. Only tensors and plain containers are unpickled.

    Raises:
        UserError: it is damaged, or not such a state.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets foreign bytes with whatever its own code raises
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(
            f"{file}: damaged, or not a state that can be read safely ({reason}); remove it to train this stage anew"
        ) from None
    if not isinstance(state, dict) or state.get("version") != _STATE_VERSION:
        raise UserError(f"{file}: not the state of a training of this version; remove it to train this stage anew")
    return state


def classification_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with class numbers [B], smoothed, or with the mixed targets [B, classes] of mixup. A scalar."""
    if targets.dim() == 2:
        from timm.loss import SoftTargetCrossEntropy

        return SoftTargetCrossEntropy()(logits, targets)
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, the mean over the batch (Hinton et al., 2015)."""
    student = (logits / temperature).log_softmax(-1)
    teacher = (teacher_logits / temperature).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def make_optimizer(model: nn.Module, stage: StageSettings, settings: TrainSettings) -> torch.optim.Optimizer:
    """timm's optimizer, with layer decay, and weight decay only where it makes sense.

    Raises:
        UserError: no such optimizer.
    """
    from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay

    keep = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, ShiftLinear) and module.mode == "PS":
            # Decay would pull magnitudes to 2^0 and signs to zero.
            keep |= {f"{name}.shift", f"{name}.sign"}
    if stage.layer_decay is None:
        groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=keep)
    else:
        groups = param_groups_layer_decay(
            model, settings.weight_decay, no_weight_decay_list=keep, layer_decay=stage.layer_decay
        )
    groups = [{**group, "params": list(group["params"])} for group in groups]
    groups = [group for group in groups if group["params"]]
    try:
        return create_optimizer_v2(groups, opt=settings.opt, lr=stage.lr, weight_decay=0.0)
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--opt {settings.opt}: {error}; expected one of timm.optim.list_optimizers()") from None


def _make_mixup(settings: TrainSettings, num_classes: int):
    if settings.mixup <= 0 and settings.cutmix <= 0:
        return None
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.label_smoothing,
        num_classes=num_classes,
    )


def _classifier_of(model: nn.Module) -> nn.Module:
    return cast(nn.Module, cast(Any, model).get_classifier())


@contextlib.contextmanager
def explain_memory_errors(
    device: torch.device, batch_size: int, size: int, kept: Callable[[], str] = lambda: ""
) -> Iterator[None]:
    """Say what to do if torch or Python runs out of memory. All other errors are passed on.

    Args:
        device: the device of the work.
        batch_size, size: size of a batch, and width of its pictures.
        kept: says what is not lost.

    Raises:
        UserError: out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = ("can't allocate memory", "not enough memory", "out of memory")
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(w in str(error) for w in words):
            raise
        raise UserError(
            f"out of memory on {device} with batches of {batch_size} pictures of {size} px; "
            f"expected a smaller --batch-size or --image-size{kept()}"
        ) from None
