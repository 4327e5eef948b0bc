"""nerfstudio's trainer, made safe against being interrupted, killed or out of disk."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import inspect
import itertools
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils.decorators import check_main_thread
from nerfstudio.utils.rich_utils import CONSOLE

from shiftadd3d._claim import release, try_claim
from shiftadd3d._errors import UserError
from shiftadd3d._progress import Steps, progress
from shiftadd3d.nerf.averaging import BestWeights, WeightAverage
from shiftadd3d.nerf.checkpoint import RunScene, latest_checkpoint, read_checkpoint, scene_of, stage_of, step_of
from shiftadd3d.nerf.datamanager import GNTDataManagerConfig
from shiftadd3d.nerf.dataparsers import find_scene
from shiftadd3d.nerf.distributed import check_processes, from_first_process, is_first_process, join_processes
from shiftadd3d.nerf.optimizers import StartAdamConfig
from shiftadd3d.nerf.pipeline import GNTPipeline, GNTPipelineConfig
from shiftadd3d.nerf.schedulers import WarmupCosineSchedulerConfig


@dataclass
class GNTTrainerConfig(TrainerConfig):
    """Training settings."""

    _target: type = field(default_factory=lambda: GNTTrainer)
    """Target class to instantiate."""
    data: Path | None = None
    """Scene folder, as --pipeline.datamanager.data. If not set, the embedded scene still_life."""
    max_num_iterations: int = 1_000_000
    """Steps of the whole run. Learning rates reach their end with the last step. The steps of a checkpoint count, so an
    interrupted run does the rest. A run that has done this many steps already does as many more."""

    average_weights: float = 0.0
    """Evaluate and keep a moving average of the weights. This is the share of it that each step keeps, such as 0.995.
    The average is better than the weights if steps are noisy. 0: no average."""

    steps_per_judgement: int = 50
    """Steps between renderings of the judged views (--pipeline.datamanager.judged-views). The best weights or averages
    are evaluated and kept. These are the initial ones if training only makes things worse."""

    # No fields: they are about this process, not about the run.
    _trains = False
    _folder = cast("Path | None", None)

    def setup(self, **kwargs: Any) -> Any:
        """The trainer, connected with the others if torchrun started this process."""
        self._trains = True
        joined = join_processes(self.machine)
        self.timestamp = from_first_process(self.timestamp)  # clocks differ, and a folder may have got a number
        return super().setup(**{**kwargs, **joined})

    def set_timestamp(self) -> None:
        """Choose the run's folder. From then on, no other process writes to it.

        An automatic timestamp gets a number if another run began in the same second. This is the first thing that
        ns-train does. So wrong options are refused here, before it prints the configuration and makes the folder.

        Raises:
            UserError: there is no scene or no checkpoint where the options say; a named folder holds another run,
                another process writes to it, or it cannot be made; or nerfstudio cannot start the processes in the
                options.
        """
        check_processes(self.machine)
        self._check_inputs()
        named = self.timestamp != "{timestamp}"
        super().set_timestamp()
        if not is_first_process():
            return
        if named:
            folder = self.get_base_dir()
            if self._holds_another_run(folder):
                raise UserError(
                    f"{folder} holds a run: choose another --timestamp or --experiment-name, go on with it with "
                    f"--load-dir {folder / self.relative_model_dir}, or remove it"
                )
            if not self._claim(folder):
                raise UserError(f"another process is training in {folder}: choose another --timestamp, or wait")
            return
        first = self.timestamp
        for number in itertools.count(2):
            folder = self.get_base_dir()
            if self._claim(folder):
                if not (folder / "config.yml").exists():
                    return
                release(folder)
            self.timestamp = f"{first}-{number}"

    def scene(self) -> RunScene:
        """The scene to train on."""
        datamanager = cast(GNTDataManagerConfig, self.pipeline.datamanager)
        parser = datamanager.dataparser
        return RunScene(parser.data if datamanager.data is None else datamanager.data, _class_name(parser))

    def _check_inputs(self) -> None:
        scene = self.scene()
        if scene.parser == _class_name(GNTDataManagerConfig().dataparser):
            find_scene(scene.data)
        elif not scene.data.exists():
            raise UserError(f"--data {scene.data}: no such file or folder; expected a scene")
        if self.load_checkpoint is not None and not self.load_checkpoint.is_file():
            raise UserError(f"--load-checkpoint {self.load_checkpoint}: no such file; expected step-*.ckpt of a run")
        if self.load_dir is not None:
            latest_checkpoint(self.load_dir)

    def _claim(self, folder: Path) -> bool:
        try:
            return try_claim(folder)
        except OSError as error:
            raise UserError(self._cannot_write(error)) from None

    def _holds_another_run(self, folder: Path) -> bool:
        """Whether there are checkpoints that this command does not go on from."""
        models = folder / self.relative_model_dir
        source = self.load_dir if self.load_checkpoint is None else self.load_checkpoint.parent
        goes_on = source is not None and source.resolve() == models.resolve()
        return not goes_on and any(models.glob("step-*.ckpt"))

    def _cannot_write(self, error: OSError) -> str:
        return f"cannot write {self.get_base_dir()}: {error.strerror or error}; name a writable --output-dir"

    def save_config(self) -> None:
        """Write the run's config.yml, which is the last thing that ns-train does before it starts processes.

        Raises:
            UserError: its folder cannot be written to.
        """
        if not is_first_process():
            return
        try:
            super().save_config()
        except OSError as error:
            raise UserError(self._cannot_write(error)) from None

    def lie_at(self, config_file: Path) -> None:
        """Set the run's folder to that of its config.yml, wherever the run was trained.

        If there are no checkpoints beside the file, those of the folder in it are used, and a message says so.
        """
        folder = config_file.absolute().parent
        if (folder / self.relative_model_dir).is_dir():
            self._folder = folder
        elif folder != self.get_base_dir().absolute():
            CONSOLE.print(
                f"{folder} has no {self.relative_model_dir}: taking what lies in {self.get_base_dir()}, where this run "
                "was trained",
                soft_wrap=True,
            )

    def get_base_dir(self) -> Path:
        """The run's folder; see `lie_at`."""
        return super().get_base_dir() if self._folder is None else self._folder

    def get_checkpoint_dir(self) -> Path:
        """The folder of the run's checkpoints.

        ns-eval, ns-render and ns-viewer call this, then unpickle the file in it with the highest number (before torch
        2.6, this can run any code in the file). Between reading the configuration and that, they call nothing else of
        ours. So this function checks the newest checkpoint beside their config.yml, and chooses it for them.

        Raises:
            UserError: the run has no checkpoint, or none that can be read.
        """
        config_file = None if self._trains else _config_being_loaded()
        if config_file is not None:
            self.lie_at(config_file)
        folder = super().get_checkpoint_dir()
        if not self._trains:
            newest = latest_checkpoint(folder)
            read_checkpoint(newest)
            # nerfstudio would take the step that this run itself went on from, or one that it reads from the name of
            # whatever else lies in the folder.
            self.load_step = step_of(newest)
        return folder


class GNTTrainer(Trainer):
    """nerfstudio's trainer, with checkpoints that are whole or absent.

    Ctrl-C saves one, and schedules end with the run.
    """

    config: GNTTrainerConfig
    pipeline: GNTPipeline
    _stage_of_checkpoint = 1
    _training_state: dict[str, Any] | None = None
    _saved_step: int | None = None
    _steps: Steps | None = None
    _average: WeightAverage | None = None
    _best: BestWeights | None = None
    _judged_after: int | None = None

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        # Whatever is wrong is found before minutes go into reading images.
        if self.config.steps_per_judgement < 1:
            raise UserError(f"--steps-per-judgement {self.config.steps_per_judgement}: expected at least 1")
        self._start_step = self._steps_done()
        self._steps_of_run = self.config.max_num_iterations
        pipeline = cast(GNTPipelineConfig, self.config.pipeline)
        self._starts_trained = pipeline.starts_trained
        if self._start_step:  # the checkpoint's weights count, whatever sizes they are of
            self.config.pipeline = dataclasses.replace(pipeline, warm_start=None)
        try:
            super().setup(test_mode)
        except KeyboardInterrupt:
            CONSOLE.print("Interrupted before the first step.")
            raise SystemExit(130) from None
        if self._starts_trained and not self._start_step and self.local_rank == 0 and is_first_process():
            CONSOLE.print(
                f"Starting from trained weights ({pipeline.warm_start}); --pipeline.warm-start none takes random ones",
                soft_wrap=True,
            )
        if self.viewer_state is not None and not self.config.logging.local_writer.enable:
            # Otherwise it stands below nerfstudio's table.
            for line in getattr(self.viewer_state, "viewer_info", ()):
                CONSOLE.print(line, soft_wrap=True)

    def _steps_done(self) -> int:
        """Steps of the checkpoint to go on from; 0 without one.

        Raises:
            UserError: a checkpoint that cannot be read, or of another scene than this command's; or no steps to do.
        """
        config, path = self.config, self.config.load_checkpoint
        if config.load_dir is not None:
            step, folder = config.load_step, config.load_dir
            path = latest_checkpoint(folder) if step is None else folder / f"step-{step:09d}.ckpt"
            # nerfstudio would read a step from the name of whatever else lies in the folder.
            config.load_step = step_of(path)
        state = None if path is None else read_checkpoint(path)
        if path is not None:
            self._check_scene(path)
        self._training_state = None if state is None else state.get("training")
        self._stage_of_checkpoint = 1 if state is None else stage_of(state["pipeline"])
        done = 0 if state is None else state["step"] + 1
        if config.max_num_iterations < 1:
            raise UserError(f"--max-num-iterations {config.max_num_iterations}: expected at least 1")
        if done >= config.max_num_iterations:
            # Nobody starts a command to train nothing: nerfstudio's own reading, so many steps more.
            CONSOLE.print(f"The run has {done} steps already: training {config.max_num_iterations} more")
            config.max_num_iterations += done
        return done

    def _check_scene(self, checkpoint: Path) -> None:
        """Compare this command's scene with the one that its checkpoint was trained on.

        Raises:
            UserError: another one, or read in another way, though nobody asked for that.
        """
        run = scene_of(checkpoint.parent.parent / "config.yml")
        if run is None:
            return
        config, own = self.config, self.config.scene()
        datamanager = cast(GNTDataManagerConfig, config.pipeline.datamanager)
        asked = datamanager.data is not None or own.data != type(datamanager.dataparser)().data
        same = own.data.resolve() == run.data.resolve()
        if (same and own.parser != run.parser) or not (same or asked):
            options = {"--load-checkpoint": config.load_checkpoint, "--load-dir": config.load_dir}
            option, path = next((name, path) for name, path in options.items() if path is not None)
            raise UserError(
                f"{path} was trained on {_described(run)}; this command would go on with {_described(own)}: expected "
                + self._command(option, path, run)
            )
        if not same:
            CONSOLE.print(
                f"Going on with {own.data}; so far it was {run.data}, whose near and far stay if none are given",
                soft_wrap=True,
            )

    def _command(self, option: str, path: Path, scene: RunScene) -> str:
        """An ns-train of this method that goes on from a path with a scene, as one types it."""
        words = ["ns-train", self.config.method_name, option, str(path), "--data", str(scene.data)]
        if scene.parser != _class_name(GNTDataManagerConfig().dataparser):
            words += [name for name, parser in all_dataparsers.items() if _class_name(parser) == scene.parser]
        return shlex.join(words)

    def _load_checkpoint(self) -> None:
        if self._stage_of_checkpoint > self.pipeline.model.stage:
            self._enter_second_stage()  # the optimizers' state is that of its parameters
        try:
            super()._load_checkpoint()
        except (KeyError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{self.config.load_dir or self.config.load_checkpoint}: the optimizers' state is not this method's "
                f"({reason}); expected a checkpoint of an earlier run of the same method"
            ) from None
        self._restart_keeping()
        if self._training_state is not None:
            self._go_on_keeping(self._training_state)
        self._training_state = None

    def _restart_keeping(self) -> None:
        decay, gnt = self.config.average_weights, self.pipeline.model.gnt
        self._average = WeightAverage(gnt, decay) if decay else None
        self._best = BestWeights(gnt) if self.pipeline.datamanager.judged else None
        self._judged_after = None

    def _go_on_keeping(self, state: dict[str, Any]) -> None:
        """Go on with what `_keeping_state` told; the network has the weights that were kept."""
        gnt = self.pipeline.model.gnt
        if "best" in state:
            if self._best is not None:
                self._best.offer(state["best"])
            gnt.load_state_dict(
                state["averaged"] if self._average is not None and "averaged" in state else state["weights"]
            )
        if self._average is not None and "weights" in state:
            self._average.go_on({"updates": 0, **state})

    def _keeping_state(self) -> dict[str, Any]:
        """What going on takes beside the weights that are kept."""
        state = {} if self._average is None else self._average.training_state()
        if self._best is not None:
            state |= {"weights": self.pipeline.model.gnt.state_dict(), "best": self._best.quality}
            if self._average is not None:
                state["averaged"] = self._average.weights()
        return state

    def _averaged(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self._average is None else self._average.in_place()

    def _judge(self, step: int) -> None:
        """Keep the weights as they are before a step, if they do better than all before."""
        if self._best is not None and self._judged_after != step:
            with self._averaged():
                self._best.offer(self.pipeline.judge())
            self._judged_after = step

    def _kept(self) -> AbstractContextManager[None]:
        return self._averaged() if self._best is None else self._best.in_place()

    def kept_weights(self, step: int) -> AbstractContextManager[None]:
        """Inside this context, the network has the weights that would be kept if training ended now."""
        self._judge(step)
        return self._kept()

    def setup_optimizers(self) -> Optimizers:
        config = self.config
        # A schedule that is not loaded counts from this process's first step.
        steps = config.max_num_iterations - (0 if config.load_scheduler else self._start_step)
        for name, optimizer in config.optimizers.items():
            adam = optimizer["optimizer"]
            if isinstance(adam, StartAdamConfig):
                optimizer = config.optimizers[name] = {**optimizer, "optimizer": adam.of_start(self._starts_trained)}
            scheduler = optimizer["scheduler"]
            if isinstance(scheduler, WarmupCosineSchedulerConfig) and scheduler.max_steps is None:
                scheduler = dataclasses.replace(scheduler, max_steps=steps)
                config.optimizers[name] = {**optimizer, "scheduler": scheduler}
        return super().setup_optimizers()

    def train(self) -> None:
        # nerfstudio's loop takes it for the number of steps to come, its progress display for the last one.
        self.config = copy.copy(self.config)
        self.config.max_num_iterations -= self._start_step
        try:
            with self._show_progress() as self._steps:
                super().train()
        except KeyboardInterrupt:
            saved = self._saved_step == self.step
            if saved and self.training_state == "completed":
                return  # with the viewer on, nerfstudio asks for Ctrl-C when training has ended
            if not saved:
                self.save_checkpoint(self.step)
            CONSOLE.print(
                f"Interrupted at step {self.step}. Nothing is lost: go on with "
                + self._command("--load-dir", self.checkpoint_dir, self.config.scene()),
                soft_wrap=True,
            )
            # nerfstudio would print its timings after the notice; and a KeyboardInterrupt's traceback, and exit with 0.
            self.config.logging.profiler = "none"
            raise SystemExit(130) from None
        except OSError as error:  # a curve, or what nerfstudio notes down about the scene
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(f"{self.base_dir}: {error.strerror}: {self._where_to_go_on()}") from None
        finally:
            release(self.base_dir)

    def _show_progress(self) -> contextlib.AbstractContextManager[Steps]:
        return progress(
            self.config.method_name or "training",
            self._steps_of_run,
            done=self._start_step,
            announce=True,
            console=CONSOLE,
            # nerfstudio's own table, if someone wants it, moves the cursor about.
            disable=self.config.logging.local_writer.enable or self.local_rank != 0 or not is_first_process(),
        )

    def _where_to_go_on(self) -> str:
        kept = sorted(self.checkpoint_dir.glob("step-*.ckpt"))
        return f"mend that, and go on from {kept[-1]}" if kept else "there is no checkpoint to go on from yet"

    def share_done(self, step: int) -> float:
        """The share of the run that is done when a step begins, 0 to 1."""
        return step / self._steps_of_run

    def train_iteration(self, step: int) -> Any:
        model = self.pipeline.model
        if self._judged_after is None or step % self.config.steps_per_judgement == 0:
            self._judge(step)
        if model.stage == 1 and self.share_done(step) >= model.config.second_stage_at:
            self._judge(step)
            if self._best is not None:
                self._best.restore()
            self._enter_second_stage()
            self._judge(step)
            CONSOLE.print(f"Second stage from step {step}: linear layers become what {model.config.recipe} says")
        result = super().train_iteration(step)
        if self._average is not None:
            self._average.update()
        if self._steps is not None:
            shown = step % self.config.logging.steps_per_log == 0  # a GPU is waited for
            self._steps.advance(status=f"loss {result[0].item():.4f}" if shown else None)
        return result

    def eval_iteration(self, step: int) -> None:
        with contextlib.nullcontext() if self._steps is None else self._steps.aside(), self._kept():
            super().eval_iteration(step)

    def _enter_second_stage(self) -> None:
        """Let the model change its layers, and the optimizers follow."""
        # Ctrl-C saves what it finds: half of the switch would be a checkpoint that nothing loads.
        with _ctrl_c_held_back():
            copies = self.pipeline.enter_second_stage()
            for name, parameters in self.pipeline.get_param_groups().items():
                optimizer = self.optimizers.optimizers[name]
                (group,) = optimizer.param_groups
                group["params"] = self.optimizers.parameters[name] = list(parameters)
                # Copies go on as what they are copies of would, with its moments and its count of steps.
                for copied, original in copies.items():
                    if original in optimizer.state:
                        optimizer.state[copied] = copy.deepcopy(optimizer.state[original])
            self._restart_keeping()  # of layers that are not known yet

    @check_main_thread
    def save_checkpoint(self, step: int) -> None:
        """Save model and optimizers to `step-*.ckpt`, whole or not at all."""
        path = self.checkpoint_dir / f"step-{step:09d}.ckpt"
        # Beside the folder, not in it: nerfstudio reads a step from every name in there.
        unfinished = self.base_dir / f"{path.name}.unfinished"
        pipeline = self.pipeline
        with self.kept_weights(step + 1):
            weights = getattr(pipeline, "module", pipeline).state_dict()
            weights = {name: value.clone() if torch.is_tensor(value) else value for name, value in weights.items()}
        state = {
            "step": step,
            "pipeline": weights,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.optimizers.items()},
            "schedulers": {name: scheduler.state_dict() for name, scheduler in self.optimizers.schedulers.items()},
            "scalers": self.grad_scaler.state_dict(),
        }
        if keeping := self._keeping_state():
            state["training"] = keeping
        try:
            self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except (OSError, RuntimeError) as error:
            # torch raises an error of its own over what the file said.
            told = error.__context__ if isinstance(error.__context__, OSError) else error
            reason = getattr(told, "strerror", None) or str(told).splitlines()[0]
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self.checkpoint_dir} ({reason}): "
                + self._where_to_go_on()
            ) from None
        finally:
            unfinished.unlink(missing_ok=True)
        self._saved_step = step
        if self.config.save_only_latest_checkpoint:
            for other in self.checkpoint_dir.glob("*.ckpt"):
                if other != path:
                    other.unlink()


def _config_being_loaded() -> Path | None:
    """The config.yml that nerfstudio is about to load a run from. It reads the file, and tells nobody where it lay."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "eval_setup" and frame.f_globals.get("__name__") == "nerfstudio.utils.eval_utils":
            return frame.f_locals.get("config_path")
        frame = frame.f_back
    return None


def _described(scene: RunScene) -> str:
    return f"{scene.data} (read by {scene.parser.rpartition('.')[2]})"


def _class_name(parser: DataParserConfig) -> str:
    return f"{parser._target.__module__}.{parser._target.__qualname__}"


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """What is done in here is done whole: Ctrl-C comes afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread, which alone may say what becomes of them
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)
