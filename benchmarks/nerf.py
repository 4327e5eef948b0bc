"""The tables of docs/results/nerf.md: quality after minutes of training, speed of rendering, and memory.

    python benchmarks/nerf.py train --scene still_life --method gnt-tiny --minutes 15
    python benchmarks/nerf.py trivial --scene still_life
    python benchmarks/nerf.py speed
    python benchmarks/nerf.py memory
    python benchmarks/film.py run --scene PATH/TO/fern
    python benchmarks/nerf.py report

All but the last write JSON files into docs/results/data/. The last one makes docs/results/nerf.md from these alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reporting import (
    DATA,
    NOT_MEASURED,
    OUTPUTS,
    PICTURES,
    code_digest,
    command_block,
    git_commit,
    machine_facts,
    machine_list,
    markdown_table,
    refuse_old,
    run_command,
    start_again_keeping_memory,
    write_page,
    write_result,
)

if TYPE_CHECKING:  # these take seconds to import, and `report` needs none of them
    from nerfstudio.engine.trainer import Trainer, TrainerConfig
    from nerfstudio.pipelines.base_pipeline import VanillaPipeline
    from torch import Tensor

SCENES_VARIABLE = "SHIFTADD3D_SCENES"

TrainedMethod = Literal["gnt-tiny", "shiftadd-gnt-tiny", "gnt", "shiftadd-gnt", "nerfacto"]


# --------------------------------------------------------------------------------------------------------------------
# Scenes
# --------------------------------------------------------------------------------------------------------------------


def find_scene_folder(scene: str) -> tuple[str, Path, bool]:
    """(name, folder, whether it is embedded) of a scene given by name or by path.

    Raises:
        UserError: there is no such embedded scene, folder, or folder under $SHIFTADD3D_SCENES.
    """
    from shiftadd3d._errors import UserError
    from shiftadd3d.scenes import scene_names, scene_path

    if scene in scene_names():
        return scene, scene_path(scene), True
    candidates = [Path(scene)]
    if os.environ.get(SCENES_VARIABLE):
        candidates.append(Path(os.environ[SCENES_VARIABLE]) / scene)
    for folder in candidates:
        if folder.is_dir():
            return folder.resolve().name, folder.resolve(), False
    raise UserError(
        f"--scene {scene}: expected one of {', '.join(scene_names())}, a folder, "
        f"or the name of a folder under ${SCENES_VARIABLE}"
    )


# --------------------------------------------------------------------------------------------------------------------
# Training against the clock
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class _OnScene:
    scene: str
    """An embedded scene's name, a scene folder, or the name of a folder under $SHIFTADD3D_SCENES."""
    threads: int = 1
    """CPU threads to compute with."""
    downscale_factor: int | None = None
    """Which images_N of the scene to read. If not set, the largest images of at most 1600 px that are there."""
    max_side: int | None = None
    """Shrink the images by the smallest whole number that makes their longer side this many pixels or fewer."""
    eval_interval: int | None = None
    """Hold out every n-th view. If not set, the scene's own test views, or as ns-train does."""
    out: Path = DATA
    """Folder for the JSON file."""
    name: str | None = None
    """Name of the JSON file. If not set, made from the command's, the scene's and the method's."""

    def _command(self, verb: str, scene_name: str, embedded: bool, *words: str) -> str:
        """The command that repeats this run, without this machine's paths."""
        parts = ["python", "benchmarks/nerf.py", verb, "--scene", scene_name if embedded else f"PATH/TO/{scene_name}"]
        parts += [*words, "--threads", str(self.threads)]
        for option in ("downscale_factor", "max_side", "eval_interval"):
            value = getattr(self, option)
            if value is not None:
                parts += [f"--{option.replace('_', '-')}", str(value)]
        return shlex.join(parts)

    def _use_threads(self) -> None:
        os.environ.setdefault("TVM_NUM_THREADS", str(self.threads))
        import torch

        torch.set_num_threads(self.threads)

    def _config(self, method: str, folder: Path) -> TrainerConfig:
        """A method's own settings, on this scene: the same images, split and poses whichever method it is."""
        from nerfstudio.configs.base_config import LocalWriterConfig, LoggingConfig
        from nerfstudio.configs.method_configs import all_methods

        from shiftadd3d.nerf.dataparsers import AutoDataParserConfig, find_scene

        parser = AutoDataParserConfig(data=folder, downscale_factor=self.downscale_factor)
        if self.eval_interval is not None:
            parser.eval_mode, parser.eval_interval = "interval", self.eval_interval
        config: TrainerConfig = all_methods[method]
        if method == "nerfacto":
            scale = None
            if find_scene(folder)[0] == "blender":
                scale = parser.setup().get_dataparser_outputs(split="train").dataparser_scale
            suit_nerfacto(config, scale)
        datamanager: Any = config.pipeline.datamanager
        datamanager.data = None
        datamanager.dataparser = parser
        datamanager.camera_res_scale_factor = 1.0 / shrink_factor(parser, self.max_side)
        config.data = folder
        config.output_dir = OUTPUTS
        config.experiment_name = folder.name
        config.vis = "tensorboard"
        config.logging = LoggingConfig(local_writer=LocalWriterConfig(enable=False))
        never = sys.maxsize
        config.max_num_iterations = never  # the clock stops it
        config.steps_per_save = config.steps_per_eval_batch = config.steps_per_eval_image = never
        config.steps_per_eval_all_images = never
        return config

    def _scene_facts(self, name: str, embedded: bool, pipeline: VanillaPipeline) -> dict[str, Any]:
        datamanager: Any = pipeline.datamanager
        cameras = datamanager.eval_dataset.cameras
        return {
            "scene": name,
            "embedded": embedded,
            "image_size": [int(cameras.width.max()), int(cameras.height.max())],
            "train_views": len(datamanager.train_dataset),
            "test_views": len(datamanager.eval_dataset),
        }


@dataclass
class Train(_OnScene):
    """Train one method on one scene for some minutes, and measure it on all test views."""

    method: TrainedMethod = "shiftadd-gnt-tiny"
    """What to train."""
    minutes: float = 15.0
    """Minutes of training. Imports, reading images and the evaluation come on top."""
    warm_start: Literal["pretrained", "none"] = "pretrained"
    """Start from the weights that come with the package, or from random ones. Only -tiny methods have the former."""
    at: tuple[float, ...] = ()
    """Minutes after which the test views are measured, too, off the clock. 0: before the first step."""
    rays: int | None = None
    """Rays a training step. If not set, the method's own number."""
    samples: tuple[int, int] | None = None
    """Depths of the proposal (0: none), and samples of a ray that transformers see. If not set, the method's own."""
    judged_views: int | None = None
    """As --pipeline.datamanager.judged-views. If not set, the method's own number."""
    spare_source_views: int | None = None
    """As --pipeline.datamanager.spare-source-views. If not set, the method's own number."""
    average_weights: float | None = None
    """As --average-weights. If not set, the method's own."""

    def __call__(self) -> None:
        commit = git_commit()  # now: it may move on while this runs
        self._use_threads()
        name, folder, embedded = find_scene_folder(self.scene)
        config: Any = self._config(self.method, folder)
        against = {key: getattr(self, key) for key in AGAINST_OVERFITTING if getattr(self, key) is not None}
        for key, value in against.items():
            setattr(config if key == "average_weights" else config.pipeline.datamanager, key, value)
        if self.samples is not None:
            model: Any = config.pipeline.model
            model.gnt = dataclasses.replace(model.gnt, proposal_samples=self.samples[0])
            model.num_samples = self.samples[1]
        if self.rays is not None:
            config.pipeline.datamanager.train_num_rays_per_batch = self.rays
        warm_start = self.warm_start if has_weights(self.method) else "none"
        if has_weights(self.method):
            config.pipeline.warm_start = Path(warm_start)
        config.set_timestamp()
        measured: list[dict[str, Any]] = []

        def measure(minutes: float) -> None:
            pictures = OUTPUTS / "pictures" / f"{name}-{self.method}-{warm_start}-{minutes:g}.png"
            with kept_weights(trainer):
                quality = evaluate(pipeline, pictures)
                pipeline.train()
            measured.append({"minutes": minutes, "psnr": quality["psnr"], "ssim": quality["ssim"]})
            print(f"after {minutes:g} min: PSNR {quality['psnr']:.2f}, SSIM {quality['ssim']:.3f}", flush=True)

        trainer = make_clocked_trainer(config, 60.0 * self.minutes, self.threads, self.at, measure)
        seed_everything(config.machine.seed)
        with without_lpips():
            trainer.setup()
        pipeline: VanillaPipeline = trainer.pipeline
        use_test_split(pipeline)
        pipeline.datamanager.next_train(0)  # reads what is read on first use, off the clock

        began, began_cpu = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
        save_loadable_config(config, trainer.steps)

        # The photos of other scenes are not ours to publish.
        pictures = PICTURES if embedded and self.out.resolve() == DATA else OUTPUTS / "pictures"
        method = self.method + "-random" * from_random_weights(self.method, warm_start)
        pictures = pictures / f"{name}-{method}.png"
        with kept_weights(trainer):
            quality = evaluate(pipeline, pictures)
        words = ["--method", self.method, "--minutes", f"{self.minutes:g}"]
        words += ["--warm-start", warm_start] if has_weights(self.method) else []
        words += ["--at", *(f"{minutes:g}" for minutes in self.at)] if self.at else []
        words += ["--rays", str(self.rays)] if self.rays is not None else []
        for key, value in against.items():
            words += [f"--{key.replace('_', '-')}", f"{value:g}"]
        if self.samples is not None:
            method += f"-{self.samples[0]}-{self.samples[1]}"
            words += ["--samples", *map(str, self.samples)]
        facts = {
            "kind": "train" if self.samples is None else "samples",
            "method": self.method,
            **self._scene_facts(name, embedded, pipeline),
            "minutes": self.minutes,
            "warm_start": warm_start,
            "at": measured,
            "against_overfitting": against,
            "seconds_trained": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),
            "steps": trainer.steps,
            "rays_per_step": pipeline.datamanager.get_train_rays_per_batch(),
            "parameters": sum(parameter.numel() for parameter in pipeline.model.parameters()),
            **({} if self.samples is None else {"samples": list(self.samples)}),
            "threads": self.threads,
            **quality,
            "machine": machine_facts(),
            "commit": commit,
            "command": self._command("train", name, embedded, *words),
        }
        write_result(self.out / (self.name or f"nerf-train-{name}-{method}.json"), facts)
        print(
            f"{self.method} on {name}: {trainer.steps} steps in {trainer.seconds / 60:.1f} min, "
            f"PSNR {facts['psnr']:.2f}, SSIM {facts['ssim']:.3f}; pictures in {pictures}"
        )


@dataclass
class Trivial(_OnScene):
    """Measure the two renderers that learn nothing: the nearest source view, and the mean of the projected colours."""

    def __call__(self) -> None:
        from shiftadd3d.nerf.trivial import trivial_metrics

        commit = git_commit()  # now: it may move on while this runs
        self._use_threads()
        name, folder, embedded = find_scene_folder(self.scene)
        config = self._config("gnt-tiny", folder)
        pipeline = config.pipeline.setup(device=config.machine.device_type, test_mode="val")
        use_test_split(pipeline)
        pipeline.eval()
        facts = {
            "kind": "trivial",
            **self._scene_facts(name, embedded, pipeline),
            "renderers": trivial_metrics(pipeline),
            "machine": machine_facts(),
            "commit": commit,
            "command": self._command("trivial", name, embedded),
        }
        write_result(self.out / (self.name or f"nerf-trivial-{name}.json"), facts)


def shrink_factor(parser: Any, max_side: int | None) -> int:
    """The smallest whole number to divide the images of a data parser by, so that they fit into `max_side` pixels.

    Not images_2 and the like, which some scenes lack, but nerfstudio's `camera_res_scale_factor`, which shrinks images
    as they are read.
    """
    if max_side is None:
        return 1
    cameras = parser.setup().get_dataparser_outputs(split="train").cameras
    return math.ceil(max(int(cameras.width.max()), int(cameras.height.max())) / max_side)


def suit_nerfacto(config: TrainerConfig, blender_scale: float | None) -> None:
    """nerfacto as it does best on a CPU in minutes, and comparable: on the poses as given.

    Args:
        config: nerfacto's own, changed in place.
        blender_scale: by how much a scene of Blender's is scaled; None for other scenes.
    """
    import torch
    from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
    from nerfstudio.configs.base_config import MachineConfig
    from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig

    config.machine = MachineConfig(device_type="cuda" if torch.cuda.is_available() else "cpu")
    # Its own data manager, ParallelDataManager, reads rays in further processes: more CPU than `threads` says.
    config.pipeline.datamanager = VanillaDataManagerConfig(
        train_num_rays_per_batch=NERFACTO_RAYS, eval_num_rays_per_batch=NERFACTO_RAYS
    )
    model: Any = config.pipeline.model
    model.implementation = "torch"
    model.camera_optimizer = CameraOptimizerConfig(mode="off")
    model.eval_num_rays_per_chunk = 1 << 10  # its 1 << 15 takes twice the time on a CPU
    del config.optimizers["camera_opt"]
    if blender_scale is not None:  # as nerfstudio's own benchmark on Blender scenes does
        model.background_color = "white"
        model.proposal_initial_sampler = "uniform"
        model.near_plane, model.far_plane = 2.0 * blender_scale, 6.0 * blender_scale
        model.use_average_appearance_embedding = False
        model.distortion_loss_mult = 0.0
        model.disable_scene_contraction = True


#: Rays a step for nerfacto. Its default, 4096, leaves a CPU few steps in minutes.
NERFACTO_RAYS = 1024


@contextmanager
def without_lpips() -> Iterator[None]:
    """nerfacto builds LPIPS, which downloads a network, with the model; nothing here reads it."""
    import torch
    import torchmetrics.image.lpip as lpip

    class NoLPIPS(torch.nn.Module):
        def __init__(self, **settings: Any) -> None:
            super().__init__()

    real = lpip.LearnedPerceptualImagePatchSimilarity
    lpip.LearnedPerceptualImagePatchSimilarity = NoLPIPS  # type: ignore[misc]
    try:
        yield
    finally:
        lpip.LearnedPerceptualImagePatchSimilarity = real  # type: ignore[misc]


def seed_everything(seed: int) -> None:
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def make_clocked_trainer(
    config: TrainerConfig,
    budget: float,
    threads: int,
    at: Sequence[float] = (),
    measure: Callable[[float], None] = lambda minutes: None,
) -> Any:
    """The config's own trainer, which stops after `budget` seconds, and whose learning rates end where the clock does.

    `measure` is called with each of the minutes `at`, when they have passed; the clock stands still meanwhile.

    The clock counts the processor time of each of `threads` threads: what else the machine does takes no steps away.

    The rates of our methods fall with the share of the time that has gone, not of a number of steps: how many steps a
    budget holds is not known beforehand on a machine that also does other things. nerfacto's keep falling by steps, as
    it has them, or, see `NERFACTO_SPANS_THE_RUN`, by time as well.
    """
    from nerfstudio.engine.schedulers import ExponentialDecaySchedulerConfig

    from shiftadd3d._progress import progress
    from shiftadd3d.nerf.schedulers import WarmupCosineSchedulerConfig

    base: type[Trainer] = config._target

    class ClockedTrainer(base):  # type: ignore[misc, valid-type]
        steps = 0
        seconds = 0.0
        _began: float | None = None
        _shown = 0.0
        _to_measure = sorted(minutes for minutes in at if 60.0 * minutes <= budget)

        def setup_optimizers(self) -> Any:
            optimizers = super().setup_optimizers()
            for name, scheduler in optimizers.schedulers.items():
                settings = self.config.optimizers[name]["scheduler"]
                if isinstance(settings, WarmupCosineSchedulerConfig):
                    scheduler.lr_lambdas = [self._cosine(settings)]
                elif NERFACTO_SPANS_THE_RUN and isinstance(settings, ExponentialDecaySchedulerConfig):
                    rate = self.config.optimizers[name]["optimizer"].lr
                    scheduler.lr_lambdas = [self._exponential((settings.lr_final or rate) / rate)]
            return optimizers

        def _cosine(self, settings: WarmupCosineSchedulerConfig) -> Callable[[int], float]:
            def factor(step: int) -> float:
                decay = 0.5 * (1.0 + math.cos(math.pi * min(1.0, self.seconds / budget)))
                warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
                return warmup * (settings.final_fraction + (1.0 - settings.final_fraction) * decay)

            return factor

        def _exponential(self, final_fraction: float) -> Callable[[int], float]:
            return lambda step: final_fraction ** min(1.0, self.seconds / budget)

        def share_done(self, step: int) -> float:
            return self.seconds / budget

        def _show_progress(self) -> Any:
            return progress("steps", 0, disable=True)  # nobody knows how many there will be

        def _measure(self) -> None:
            while self._to_measure and self.seconds >= 60.0 * self._to_measure[0]:
                began = time.process_time()
                measure(self._to_measure.pop(0))
                self._began = None if self._began is None else self._began + time.process_time() - began

        def train_iteration(self, step: int) -> Any:
            if self._began is None:
                self._measure()
                self._began = time.process_time()
            result = super().train_iteration(step)
            self.steps = step + 1
            self.seconds = (time.process_time() - self._began) / threads
            self._measure()
            if self.seconds >= budget:
                self.stop_training = True
            if self.seconds - self._shown >= 30.0:
                self._shown = self.seconds
                print(f"{self.seconds / 60:.1f} min, step {self.steps}, loss {float(result[0]):.5f}", flush=True)
            return result

    config._target = ClockedTrainer  # the config has to know that it trains
    trainer = config.setup(local_rank=0, world_size=1)
    config._target = base
    return trainer


#: Whether nerfacto's learning rate falls over the run's minutes instead of its 200,000 steps.
NERFACTO_SPANS_THE_RUN = False


def kept_weights(trainer: Any) -> AbstractContextManager[None]:
    """While this lasts, the network has the weights that the run would keep if it ended now."""
    return trainer.kept_weights(trainer.steps) if hasattr(trainer, "kept_weights") else nullcontext()


def use_test_split(pipeline: VanillaPipeline) -> None:
    """Measure on the test views: training pipelines hold the validation views."""
    datamanager: Any = pipeline.datamanager
    datamanager.test_split = "test"
    datamanager.eval_dataset = datamanager.create_eval_dataset()
    datamanager.setup_eval()


def save_loadable_config(config: TrainerConfig, steps: int) -> None:
    """The run's config.yml, for ns-render and ns-eval."""
    config.max_num_iterations = steps
    for name, optimizer in config.optimizers.items():
        scheduler = optimizer["scheduler"]
        if hasattr(scheduler, "warmup_steps"):
            config.optimizers[name] = {**optimizer, "scheduler": dataclasses.replace(scheduler, max_steps=steps)}
    config.save_config()


# --------------------------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------------------------


def evaluate(pipeline: VanillaPipeline, pictures: Path, shown: int = 2, views: int | None = None) -> dict[str, Any]:
    """Render every test view; also draw some of them, evenly spread: target, render and depth beside each other.

    Args:
        views: look at so many of them only, evenly spread.
    """
    import torch
    from nerfstudio.utils import colormaps

    from shiftadd3d.nerf.model import image_metrics

    pipeline.eval()
    datamanager: Any = pipeline.datamanager
    count = len(datamanager.eval_dataset)

    def spread(number: int) -> set[int]:
        return {round((index + 0.5) * count / min(number, count) - 0.5) for index in range(min(number, count))}

    chosen = spread(count if views is None else views)
    drawn = spread(shown) & chosen or chosen
    psnrs, ssims, seconds, rows = [], [], [], []
    with torch.no_grad():
        for index, (camera, batch) in enumerate(datamanager.fixed_indices_eval_dataloader):
            if index not in chosen:
                continue
            began = time.perf_counter()
            outputs = pipeline.model.get_outputs_for_camera(camera=camera)
            seconds.append(time.perf_counter() - began)
            target = batch["image"][..., :3].cpu()
            rgb = outputs["rgb"].cpu().clamp(0.0, 1.0)
            assert rgb.shape == target.shape, f"render {tuple(rgb.shape)}, target {tuple(target.shape)}"
            metrics = image_metrics(rgb, target, batch["mask"].cpu().bool() if "mask" in batch else None)
            psnrs.append(metrics["psnr"])
            ssims.append(metrics["ssim"])
            if index in drawn:
                depth = colormaps.apply_depth_colormap(outputs["depth"].cpu())
                rows.append(torch.cat([target, rgb, depth], dim=1))
    save_picture(torch.cat(rows), pictures)
    return {
        "psnr": round(statistics.fmean(psnrs), 3),
        "ssim": round(statistics.fmean(ssims), 4),
        "psnr_per_view": [round(value, 3) for value in psnrs],
        "ssim_per_view": [round(value, 4) for value in ssims],
        "seconds_per_frame": round(statistics.median(seconds), 3),
    }


def save_picture(image: Tensor, path: Path, limit: int = 150_000) -> None:
    """Write [h, w, 3] in 0..1 as PNG of at most `limit` bytes, with fewer colours and then pixels where it must be."""
    import torch
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray((image * 255.0).round().to(torch.uint8).numpy())
    picture.save(path, optimize=True)
    while path.stat().st_size > limit:
        picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        picture = picture.resize((picture.width * 3 // 4, picture.height * 3 // 4), Image.Resampling.LANCZOS)


# --------------------------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------------------------

FRAME = (504, 378)
"""Width and height of the frame whose memory is measured, and of its source views."""

MEMORY_METHODS = ("gnt-tiny", "shiftadd-gnt-tiny", "shiftadd-gnt")
TRAIN_RAYS = (128, 256, 512, 1024, 2048)
RENDER_RAYS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclass
class Memory:
    """Measure the peak memory of training steps and of rendering a frame, each in a process of its own."""

    methods: tuple[str, ...] = MEMORY_METHODS
    """Methods to measure."""
    train_rays: tuple[int, ...] = TRAIN_RAYS
    """Rays a training step."""
    render_rays: tuple[int, ...] = RENDER_RAYS
    """Rays rendered at once."""
    whole_frames: tuple[str, ...] = ("gnt-tiny", "shiftadd-gnt-tiny")
    """Methods that render a whole frame at their own number of rays a chunk. Else the first chunks stand for it."""
    chunks: int = 3
    """How many chunks stand for a whole frame."""
    threads: int = 1
    """CPU threads to compute with."""
    out: Path = DATA
    """Folder for nerf-memory.json."""

    def command(self) -> str:
        """The command that repeats this measurement."""
        words = ["python", "benchmarks/nerf.py", "memory"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "out" and value != field.default:
                words += [f"--{field.name.replace('_', '-')}"]
                words += [str(item) for item in value] if isinstance(value, tuple) else [str(value)]
        return shlex.join(words)

    def __call__(self) -> None:
        commit = git_commit()
        points = []
        for method in self.methods:
            jobs = [("train", rays, 0) for rays in self.train_rays]
            jobs += [("render", rays, self.chunks) for rays in self.render_rays]
            if method in self.whole_frames:
                jobs.append(("render", 0, 0))
            if self.render_rays or method in self.whole_frames:
                self._point(method, "render", min(RENDER_RAYS), 1)  # compiles, which takes memory of its own
            for job in jobs:
                points.append(self._point(method, *job))
                print(points[-1], flush=True)
        facts = {
            "kind": "memory",
            "frame": list(FRAME),
            "threads": self.threads,
            "points": points,
            "machine": machine_facts(),
            "commit": commit,
            "code": code_digest(),
            "command": self.command(),
        }
        write_result(self.out / "nerf-memory.json", facts)

    def _point(self, method: str, what: str, rays: int, chunks: int) -> dict[str, Any]:
        """What `MemoryPoint` prints, in a process of its own."""
        words = ["memory-point", "--method", method, "--what", what, "--rays", str(rays)]
        words += ["--chunks", str(chunks), "--threads", str(self.threads)]
        done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"{shlex.join(words)} ended with {done.returncode}")
        return json.loads(done.stdout.splitlines()[-1])


@dataclass
class MemoryPoint:
    """One measurement of `memory`, in this process; prints one line of JSON."""

    method: str
    """The method."""
    what: Literal["train", "render"]
    """Training steps, or rendering."""
    rays: int
    """Rays at once; 0 for the method's own number."""
    chunks: int = 0
    """Render this many chunks only; 0 for the whole frame."""
    threads: int = 1
    """CPU threads to compute with."""

    def __call__(self) -> None:
        os.environ.setdefault("TVM_NUM_THREADS", str(self.threads))
        import torch
        from nerfstudio.configs.method_configs import all_methods

        torch.set_num_threads(self.threads)
        seed_everything(0)
        config = all_methods[self.method]
        width, height = FRAME
        model, cameras = noise_scene(config, width, height)
        imported = peak_memory()
        rays = self.rays
        if self.what == "train":
            rays = rays or config.pipeline.datamanager.train_num_rays_per_batch  # type: ignore[attr-defined]
        else:
            rays = rays or model.config.eval_num_rays_per_chunk
        whole = False
        if self.what == "train":
            model.train()
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
            views = config.pipeline.datamanager.num_source_views  # type: ignore[attr-defined]
            for _ in range(2):  # Adam makes its state in the first
                pixels = torch.stack([torch.randint(height, (rays,)), torch.randint(width, (rays,))], dim=-1)
                bundle = cameras.generate_rays(torch.zeros(rays, 1, dtype=torch.long), coords=pixels + 0.5)
                bundle.metadata["source_ids"] = torch.arange(1, views + 1).expand(rays, -1)
                outputs = model.get_outputs(bundle)
                losses = model.get_loss_dict(outputs, {"image": torch.rand(rays, 3)})
                optimizer.zero_grad()
                torch.stack(list(losses.values())).sum().backward()
                optimizer.step()
        else:
            model.eval()
            model.config.eval_num_rays_per_chunk = rays
            rows = height if self.chunks == 0 else min(height, math.ceil(self.chunks * rays / width))
            whole = rows == height
            with torch.no_grad():
                bundle = cameras.generate_rays(camera_indices=0, keep_shape=True)[:rows]
                views = config.pipeline.datamanager.num_source_views  # type: ignore[attr-defined]
                bundle.metadata["source_ids"] = torch.arange(1, views + 1).expand(*bundle.shape, -1)
                model.get_outputs_for_camera_ray_bundle(bundle)
        facts = {
            "method": self.method,
            "what": self.what,
            "rays": rays,
            "own_setting": self.rays == 0,
            "whole_frame": whole,
            "peak_bytes": peak_memory(),
            "peak_bytes_before": imported,
        }
        print(json.dumps(facts))


def noise_scene(config: TrainerConfig, width: int, height: int) -> Any:
    """(model, cameras): cameras on an arc with pictures of noise, since time and memory do not mind."""
    import torch
    from nerfstudio.cameras.cameras import Cameras
    from nerfstudio.data.scene_box import SceneBox

    from shiftadd3d.nerf.source_bank import SourceBank, opencv_cameras

    count = config.pipeline.datamanager.num_source_views + 2  # type: ignore[attr-defined]
    angles = torch.linspace(-0.4, 0.4, count)
    poses = torch.zeros(count, 3, 4)
    poses[:, 0, 0] = poses[:, 2, 2] = angles.cos()
    poses[:, 0, 2], poses[:, 2, 0] = angles.sin(), -angles.sin()
    poses[:, 1, 1] = 1.0
    poses[:, :, 3] = poses[:, :, 2]  # one unit behind the origin, looking at it
    cameras = Cameras(poses, fx=float(width), fy=float(width), cx=width / 2, cy=height / 2, width=width, height=height)
    intrinsics, camera_to_world = opencv_cameras(cameras)
    images = torch.randint(256, (count, height, width, 3), dtype=torch.uint8)
    bank = SourceBank(images, None, intrinsics, camera_to_world)
    box = SceneBox(torch.tensor([[-1.0] * 3, [1.0] * 3]))
    model: Any = config.pipeline.model.setup(scene_box=box, num_train_data=count)
    model.set_sources(bank, config.pipeline.datamanager.num_source_views)  # type: ignore[attr-defined]
    model.near_far.copy_(torch.tensor([0.5, 2.0]))
    return model, cameras


def peak_memory() -> int:
    """The most resident memory this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent had when it started us
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found.group(1)) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --------------------------------------------------------------------------------------------------------------------
# Speed
# --------------------------------------------------------------------------------------------------------------------

FORMS = {
    "torch": "plain torch",
    "compile": "plain torch, torch.compile",
    "exact": "kernels, exact",
    "fast": "kernels, fast",
    "int8": "kernels, int8",
    "executable-exact": "one executable, exact",
    "executable-fast": "one executable, fast",
    "executable-int8": "one executable, int8",
}
Form = Literal["torch", "compile", "exact", "fast", "int8", "executable-exact", "executable-fast", "executable-int8"]


@dataclass
class Speed:
    """Measure how long a frame takes, the features of its source views included.

    Weights are random: they cost what others do.
    """

    presets: tuple[str, ...] = ("gnt-tiny",)
    """Methods with multiplications; each is compared with the shiftadd- one, frozen."""
    forms: tuple[Form, ...] = ("torch", "compile", "exact", "fast")
    """What to compute with. Only the methods with multiplications are put through torch.compile."""
    frame: tuple[int, int] = (252, 189)
    """Width and height, also of the source views."""
    seconds: float = 120.0
    """How long to measure each preset for, at least five frames of each form."""
    threads: int = 1
    """CPU threads to compute with."""
    keep_memory: bool = False
    """Let the C library (glibc) keep memory for large tensors, as other allocators do."""
    out: Path = DATA
    """Folder for the JSON file."""

    def command(self) -> str:
        """The command that repeats this measurement."""
        options = {
            "--presets": self.presets,
            "--forms": self.forms,
            "--frame": self.frame,
            "--seconds": (self.seconds,),
            "--threads": (self.threads,),
        }
        words = [word for name, values in options.items() for word in (name, *map(str, values))]
        words += ["--keep-memory"] if self.keep_memory else []
        return shlex.join(["python", "benchmarks/nerf.py", "speed", *words])

    def __call__(self) -> None:
        if self.keep_memory:
            start_again_keeping_memory()
        os.environ.setdefault("TVM_NUM_THREADS", str(self.threads))
        import torch

        from shiftadd3d.profile.timing import interleaved

        commit = git_commit()
        torch.set_num_threads(self.threads)
        rows = []
        for preset in self.presets:
            renderers = {
                (method, form): frame_renderer(method, form, *self.frame)
                for method in (preset, f"shiftadd-{preset}")
                for form in self.forms
                if form != "compile" or method == preset
            }
            for (method, form), render in renderers.items():
                render()
                print(f"{method}, {FORMS[form]}: ready", flush=True)
            named = {f"{method} {form}": render for (method, form), render in renderers.items()}
            times = interleaved(named, seconds=self.seconds)
            for method, form in renderers:
                spread = times[f"{method} {form}"]
                seconds = [float(f"{value:.4g}") for value in (spread.median, spread.lower, spread.upper)]
                rows.append({"preset": preset, "method": method, "form": form, "seconds": seconds})
                print(f"{method}, {FORMS[form]}: {spread.median:.3f} s", flush=True)
        facts = {
            "kind": "speed",
            "frame": list(self.frame),
            "threads": self.threads,
            "keep_memory": self.keep_memory,
            "rows": rows,
            "machine": machine_facts(),
            "commit": commit,
            "code": code_digest(),
            "command": self.command(),
        }
        threads, kept = f"-{self.threads}-threads" * (self.threads > 1), "-kept-memory" * self.keep_memory
        write_result(self.out / f"nerf-speed{threads}{kept}.json", facts)


def frame_renderer(method: str, form: Form, width: int, height: int) -> Callable[[], Any]:
    """A function that renders a frame with the layers that the end of training leaves, frozen.

    Raises:
        RuntimeError: it shall be an executable, and cannot be.
    """
    import torch
    from nerfstudio.configs.method_configs import all_methods

    import shiftadd3d
    from shiftadd3d.kernels import numerics
    from shiftadd3d.kernels.runtime.numerics import check_numerics
    from shiftadd3d.nn import freeze_

    seed_everything(0)
    config = all_methods[method]
    model, cameras = noise_scene(config, width, height)
    if model.stage == 1:
        model.enter_second_stage()
    model.eval()
    exactness = "twin" if form in ("torch", "compile") else check_numerics(form.removeprefix("executable-"))
    model.config.compile = form.startswith("executable-")
    model.config.match_exposure = False  # noise has none, and a film finds it once for many frames
    if form == "compile":
        freeze_(model.gnt, verbose=False)
        model.gnt.compile()
        model.gnt.encode = torch.compile(model.gnt.encode)
    else:
        model.freeze()
    if model.config.compile:
        reason = shiftadd3d.compile(model.gnt, numerics=exactness).reason
        if reason is not None:
            raise RuntimeError(f"{method} is not compiled: {reason}")

    def render() -> Any:
        model.eval()  # forgets the features of the frame before
        with torch.no_grad(), numerics(exactness):
            return model.get_outputs_for_camera(cameras[0:1])

    return render


# --------------------------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """Make docs/results/nerf.md, and the plot in it, from the JSON files."""

    old: bool = False
    """Show speeds and memory of code that has changed since, too."""

    def __call__(self) -> None:
        if not self.old:
            refuse_old(path for kind in ("memory", "speed", "film") for path in DATA.glob(f"nerf-{kind}*.json"))
        results = read_results(DATA)
        if results["memory"]:
            plot_memory(results["memory"][0], PICTURES / "nerf-memory.png")
        write_page("nerf", lambda template: render_report(results, template))


def read_results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The results in a folder by kind, each sorted by file name."""
    kinds = ("train", "samples", "trivial", "speed", "memory", "film")
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for path in sorted(folder.glob("nerf-*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        results[facts["kind"]].append(facts)
    return results


def render_report(results: dict[str, list[dict[str, Any]]], template: str) -> str:
    """Fill a template's `{{name}}` fields in from the results.

    Raises:
        KeyError: the template has a field that there is no table for.
    """
    trained, trivial = results["train"], results["trivial"]
    memory = results["memory"][0] if results["memory"] else None
    speeds = sorted(results["speed"], key=lambda facts: facts.get("keep_memory", False))
    measured = [*trained, *results["samples"], *trivial, *speeds, *results["film"], *results["memory"]]
    fields = {
        "embedded": quality_table([f for f in trained if f["embedded"]], [f for f in trivial if f["embedded"]]),
        "photos": quality_table([f for f in trained if not f["embedded"]], [f for f in trivial if not f["embedded"]]),
        "embedded_pictures": picture_list([f for f in trained if f["embedded"]]),
        "progress": progress_table(trained),
        "samples": samples_table(results["samples"]),
        "scenes": scene_table(trained),
        "runs": run_table(trained),
        "speed": speed_table(speeds),
        "film": film_table(results["film"]),
        "memory_train": memory_table(memory, "train"),
        "memory_render": memory_table(memory, "render"),
        "memory_verdict": memory_verdict(memory),
        "memory_plot": "![Peak memory over rays at once](pictures/nerf-memory.png)" if memory else NOT_MEASURED,
        "commands": command_block("nerf", measured),
        "machines": machine_list(measured),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match.group(1)], template)


METHOD_ORDER = ("gnt-tiny", "shiftadd-gnt-tiny", "gnt", "shiftadd-gnt", "nerfacto")


#: Settings of training against overfitting, what -tiny methods have, and how a table names something else.
AGAINST_OVERFITTING = {
    "judged_views": (2, "{} judged views"),
    "spare_source_views": (4, "{} spare source views"),
    "average_weights": (0.99, "averaged ({:g})"),
}


def has_weights(method: str) -> bool:
    """Whether weights for the method come with the package."""
    return method.endswith("-tiny")


def from_random_weights(method: str, warm_start: str) -> bool:
    """Whether a method that has weights to start from did without."""
    return has_weights(method) and warm_start == "none"


def run_label(facts: dict[str, Any]) -> str:
    """The method, and what it started from where there is a choice. Older results say nothing of that: random."""
    random_weights = from_random_weights(facts["method"], facts.get("warm_start", "none"))
    against = facts.get("against_overfitting", {})
    changed = ((AGAINST_OVERFITTING[key], value) for key, value in against.items())
    measures = "".join(f", {text.format(value)}" for (own, text), value in changed if value != own)
    return f"`{facts['method']}`" + ", from random weights" * random_weights + measures


def run_order(facts: dict[str, Any]) -> tuple[int, str]:
    """What to sort runs by."""
    return METHOD_ORDER.index(facts["method"]), run_label(facts)


def progress_table(trained: list[dict[str, Any]]) -> str:
    """Rows: runs that were measured on the way; columns: after so many minutes. The last of each run is its result."""
    runs = [facts for facts in sorted(trained, key=lambda f: (f["scene"], *run_order(f))) if facts.get("at")]
    if not runs:
        return NOT_MEASURED
    cells = [{point["minutes"]: point for point in [*facts["at"], facts]} for facts in runs]
    minutes = sorted({minute for points in cells for minute in points})
    rows = [
        [f"{facts['scene']}, {run_label(facts)}"]
        + [f"{points[m]['psnr']:.2f} / {points[m]['ssim']:.3f}" if m in points else "" for m in minutes]
        for facts, points in zip(runs, cells, strict=True)
    ]
    return markdown_table(["PSNR in dB / SSIM after minutes", *(f"{minute:g}" for minute in minutes)], rows)


def samples_table(runs: list[dict[str, Any]]) -> str:
    """Rows: how the rays of a method are sampled; columns: what the same minutes reach."""
    if not runs:
        return NOT_MEASURED
    rows = [
        [
            facts["scene"],
            f"`{facts['method']}`",
            str(facts["samples"][0] or "none"),
            str(facts["samples"][1]),
            f"{facts['minutes']:g}",
            str(facts["steps"]),
            f"{facts['psnr']:.2f} / {facts['ssim']:.3f}",
        ]
        for facts in sorted(runs, key=lambda f: (f["scene"], f["method"], *f["samples"]))
    ]
    header = ["scene", "method", "depths of the proposal", "samples", "CPU minutes", "steps", "PSNR in dB / SSIM"]
    return markdown_table(header, rows)


def quality_table(trained: list[dict[str, Any]], trivial: list[dict[str, Any]]) -> str:
    """Rows: methods; columns: PSNR / SSIM per scene."""
    scenes = list(dict.fromkeys(facts["scene"] for facts in [*trained, *trivial]))
    labels = list(dict.fromkeys(run_label(facts) for facts in sorted(trained, key=run_order)))
    size = {facts["scene"]: facts["image_size"] for facts in trained}

    def cell(quality: dict[str, Any] | None) -> str:
        return "" if quality is None else f"{quality['psnr']:.2f} / {quality['ssim']:.3f}"

    rows = []
    for label in labels:
        runs = {facts["scene"]: facts for facts in trained if run_label(facts) == label}
        rows.append([label, *(cell(runs.get(scene)) for scene in scenes)])
    for key, label in (("nearest", "nearest source view"), ("mean", "mean of projected colours")):
        values = {}
        for facts in trivial:
            if facts["image_size"] != size.get(facts["scene"], facts["image_size"]):
                raise ValueError(f"{facts['scene']}: the trivial renderers were measured at another image size")
            values[facts["scene"]] = facts["renderers"][key]
        if values:
            rows.append([label, *(cell(values.get(scene)) for scene in scenes)])
    return markdown_table(["PSNR in dB / SSIM", *scenes], rows)


def scene_table(trained: list[dict[str, Any]]) -> str:
    rows = {}
    for facts in trained:
        width, height = facts["image_size"]
        rows[facts["scene"]] = [
            facts["scene"],
            f"{width} x {height}",
            str(facts["train_views"]),
            str(facts["test_views"]),
        ]
    return markdown_table(["scene", "pixels", "training views", "test views"], list(rows.values()))


def run_table(trained: list[dict[str, Any]]) -> str:
    """What each run did with its time."""
    rows = [
        [
            f"{facts['scene']}, {run_label(facts)}",
            f"{facts['seconds_trained'] / 60:.1f}",
            f"{facts['cpu_seconds'] / 60:.1f}",
            str(facts["threads"]),
            f"{facts['steps']:,}",
            f"{facts['rays_per_step']:,}",
            f"{facts['parameters']:,}",
        ]
        for facts in sorted(trained, key=lambda f: (f["scene"], *run_order(f)))
    ]
    header = ["run", "minutes", "CPU minutes", "threads", "steps", "rays a step", "parameters"]
    return markdown_table(header, rows)


def picture_list(trained: list[dict[str, Any]]) -> str:
    blocks = []
    for facts in sorted(trained, key=run_order):
        scene, method = facts["scene"], facts["method"]
        file = f"{scene}-{method}" + "-random" * from_random_weights(method, facts.get("warm_start", "none"))
        blocks.append(f"{run_label(facts)}:\n\n![{scene} by {method}](pictures/{file}.png)")
    return "\n\n".join(blocks) or NOT_MEASURED


def speed_table(results: list[dict[str, Any]]) -> str:
    """Rows: methods in each form; columns: seconds, and how many times faster than the preset in plain torch.

    Where there are executables, also how many times faster they are than the same kernels one by one.
    """
    tables = []
    for facts in results:
        rows = []
        known = {(row["method"], row["form"]): row["seconds"][0] for row in facts["rows"]}
        has_executables = any(form.startswith("executable-") for _, form in known)
        for row in facts["rows"]:
            seconds, lower, upper = row["seconds"]
            dense = {r["form"]: r["seconds"][0] for r in facts["rows"] if r["method"] == row["preset"]}
            ratios = [f"{dense[form] / seconds:.2f}" if form in dense else "" for form in ("torch", "compile")]
            if has_executables:
                name, form = row["form"].rpartition("-")[::2]
                one_by_one = known.get((row["method"], form)) if name else None
                ratios.append("" if one_by_one is None else f"{one_by_one / seconds:.2f}")
            rows.append(
                [f"`{row['method']}`, {FORMS[row['form']]}", f"{seconds:.2f} ({lower:.2f} to {upper:.2f})", *ratios]
            )
        width, height = facts["frame"]
        kept = ", memory kept" * facts.get("keep_memory", False)
        place = f"{facts['threads']} thread{'s' * (facts['threads'] > 1)}{kept}, {facts['machine']['cpu']}"
        header = [
            f"{width} x {height}, {place}",
            "seconds a frame",
            "times faster than plain torch",
            "than torch.compile",
            *(["than kernels one by one"] if has_executables else []),
        ]
        tables.append(markdown_table(header, rows))
    return "\n\n".join(tables) or NOT_MEASURED


def film_table(films: list[dict[str, Any]]) -> str:
    """Rows: films; columns: seconds from the command to the file, and those of each step."""
    steps = ("start", "poses", "opening", "rendering")
    rows = [
        [
            f"{facts['film']}, {facts['frames']} frames of {' x '.join(map(str, facts['size']))}",
            f"{facts['first']:.0f}",
            f"{statistics.median(facts['later']):.0f}",
            *(f"{facts['steps'][step]:.0f}" for step in steps),
        ]
        for facts in films
    ]
    header = ["film, seconds", "the first", "a later one", *steps]
    return markdown_table(header, rows) if rows else NOT_MEASURED


def memory_table(memory: dict[str, Any] | None, what: str) -> str:
    """Rows: methods; columns: rays at once; in GB."""
    points = [p for p in memory["points"] if p["what"] == what and not p["own_setting"]] if memory else []
    rays = sorted({point["rays"] for point in points})
    rows = []
    for method in dict.fromkeys(point["method"] for point in points):
        peaks = {point["rays"]: point["peak_bytes"] for point in points if point["method"] == method}
        rows.append([f"`{method}`", *(f"{peaks[n] / 1e9:.2f}" if n in peaks else "" for n in rays)])
    return markdown_table(
        [f"peak GB, rays a {'step' if what == 'train' else 'chunk'}:", *(f"{n:,}" for n in rays)], rows
    )


def memory_verdict(memory: dict[str, Any] | None) -> str:
    """Which frames were rendered whole, and the most memory that took."""
    whole = (
        [point for point in memory["points"] if point["what"] == "render" and point["whole_frame"]] if memory else []
    )
    rows = [[f"`{p['method']}`", f"{p['rays']:,}", f"{p['peak_bytes'] / 1e9:.2f}"] for p in whole if p["own_setting"]]
    return markdown_table(["whole frame", "rays a chunk", "peak GB"], rows)


def plot_memory(memory: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    titles = {"train": "training step", "render": f"rendering {memory['frame'][0]} x {memory['frame'][1]}"}
    for axis, (what, title) in zip(axes, titles.items(), strict=True):
        points = [p for p in memory["points"] if p["what"] == what and not p["own_setting"]]
        for method in dict.fromkeys(p["method"] for p in points):
            line = sorted((p["rays"], p["peak_bytes"] / 1e9) for p in points if p["method"] == method)
            axis.plot(*zip(*line, strict=True), marker="o", label=method)
        axis.set(title=title, xlabel="rays at once", xscale="log", yscale="log")
        axis.set_xticks(sorted({p["rays"] for p in points}), [f"{n:,}" for n in sorted({p["rays"] for p in points})])
        axis.minorticks_off()
        axis.axhline(4.0, color="grey", linestyle=":")
        axis.grid(alpha=0.3)
    ticks = (0.5, 1, 2, 4, 8, 16)
    axes[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0].set_ylabel("peak memory, GB")
    axes[1].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    run_command(
        {
            "train": Train,
            "trivial": Trivial,
            "speed": Speed,
            "memory": Memory,
            "memory-point": MemoryPoint,
            "report": Report,
        },
        __doc__,
    )


if __name__ == "__main__":
    main()
