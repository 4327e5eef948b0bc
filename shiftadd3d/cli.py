"""Transformer NeRFs and vision transformers whose multiplications become shifts, adds and a mixture of experts.

Exit codes: 0 done, 1 failed, 2 unknown or missing arguments, 130 interrupted.
"""

# A verb is a dataclass: its docstring and its fields' docstrings are the help, `run` does the work. Nothing heavy is
# imported up here (torch, nerfstudio and TVM load inside `run`), so that `--help` answers at once.

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import shlex
import signal
import sys
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal, cast

import tyro

from shiftadd3d._errors import UserError
from shiftadd3d._extras import need
from shiftadd3d._wrong_arguments import one_line_for_wrong_arguments
from shiftadd3d.configs.classification import PRESETS
from shiftadd3d.scenes.photo_options import FromPhotosOptions
from shiftadd3d.vision.settings import DataSettings, FinetuneSettings, read_settings

if TYPE_CHECKING:
    from shiftadd3d.profile.subjects import Subject

__all__ = [
    "VERBS",
    "Demo",
    "EvalScenes",
    "Evaluate",
    "Export",
    "Finetune",
    "ImportGnt",
    "Info",
    "Movie",
    "Predict",
    "Profile",
    "Render",
    "Verb",
    "main",
]

JsonFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


class Verb(ABC):
    """What the command line turns into: parsed arguments that can be run."""

    @abstractmethod
    def run(self) -> None:
        """Do the work. Raises `UserError` for whatever the user can mend; anything else is a bug of this project."""


@dataclass(frozen=True)
class Info(Verb):
    """Show versions, processors, compilers, nerfstudio methods and embedded scenes.

    A bug report or a benchmark needs these facts about its machine.
    """

    json: JsonFile = None
    """Also write the same facts to this JSON file."""

    def run(self) -> None:
        """Print the facts as a table."""
        from shiftadd3d import _info
        from shiftadd3d._report import write_json

        facts = _info.collect()
        _info.show(facts)
        if self.json is not None:
            write_json(self.json, facts)


@dataclass(frozen=True)
class Render(Verb):
    """Render a trained run to a video or to frames.

    Open only a config.yml that you trust: nerfstudio's configurations name Python objects, and reading one can run
    code. Ctrl-C keeps the frames rendered so far.
    """

    load_config: Annotated[Path, tyro.conf.arg(metavar="CONFIG.yml")]
    """The config.yml of a gnt or shiftadd-gnt run, in the folder that ns-train made for it."""
    out: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """Output: a .mp4 or .gif file, or a folder (no suffix) for numbered PNG frames."""
    path: Literal["interpolate", "spiral", "test", "train"] = "interpolate"
    """From view to view, around the first view, or the test or training views themselves."""
    views: Literal["test", "train"] | None = None
    """Views that interpolate passes and that spiral starts from.
    If not set: test, or train if there is only one test view."""
    camera_path: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """A camera path exported from nerfstudio's viewer, instead of --path."""
    frames: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of frames, 2 or more. If not set: 120, or all test or training views."""
    fps: Annotated[float | None, tyro.conf.arg(metavar="F")] = None
    """Frames per second. If not set: 24, or the rate of the camera path."""
    scale: float = 1.0
    """Size of a frame, as a multiple of the size of the photos."""
    outputs: tuple[str, ...] = ("rgb",)
    """What to show, side by side: rgb, depth, accumulation, and for a run with mixtures of experts, routing.
    Routing shows how many samples of a pixel went to the multiplying expert (red) and to the shift expert (blue)."""
    compile: bool = True
    """Compile the network into one executable if it is on a CPU and can be compiled."""

    def run(self) -> None:
        """Load the run, render, write."""
        from shiftadd3d.nerf.render_options import check_config_file, check_frames, check_out

        # Also checked by `render`, after imports that take seconds.
        check_config_file(self.load_config)
        check_frames(self.frames, self.fps, self.scale, self.outputs)
        check_out(self.out)
        _need_nerfstudio()
        from shiftadd3d.nerf.render import render

        render(
            self.load_config,
            self.out,
            path=self.path,
            camera_path=self.camera_path,
            views=self.views,
            frames=self.frames,
            fps=self.fps,
            scale=self.scale,
            outputs=self.outputs,
            compile=self.compile,
        )


@dataclass(frozen=True)
class EvalScenes(Verb):
    """Render the held-out views of many scenes with one network that is not trained on them, and make a table.

    The network is the one that comes with the package, or that of a run, such as one trained across other scenes.
    """

    scenes: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH")]
    """Scene folders, folders of scene folders (a factory, say), and .txt files with one path a line."""
    load_config: Annotated[Path | None, tyro.conf.arg(metavar="CONFIG.yml")] = None
    """The config.yml of a run. If not set: the weights of --method that come with the package."""
    method: Literal["gnt-tiny", "shiftadd-gnt-tiny"] = "shiftadd-gnt-tiny"
    """The network of the package to use if --load-config is not set."""
    max_side: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = 252
    """Shrink pictures until their longer side has at most this many pixels. None leaves them as they are."""
    json: JsonFile = None
    """Also write the same facts to this JSON file."""

    def run(self) -> None:
        """Print the table."""
        from shiftadd3d.nerf.render_options import check_config_file

        if self.load_config is not None:
            check_config_file(self.load_config)
        if self.max_side is not None and self.max_side < 1:
            raise UserError(f"--max-side {self.max_side}: expected 1 or more")
        _check_there("scene folders, folders of such, or .txt files", *self.scenes, option="--scenes")
        _need_nerfstudio()
        from rich.console import Console

        from shiftadd3d._report import write_json
        from shiftadd3d.configs import methods
        from shiftadd3d.nerf.eval_scenes import evaluate_scenes

        config = {"gnt-tiny": methods.gnt_tiny, "shiftadd-gnt-tiny": methods.shiftadd_gnt_tiny}[self.method].config
        report = evaluate_scenes(
            config,  # type: ignore[arg-type]
            self.scenes,
            load_config=self.load_config,
            max_side=self.max_side,
        )
        Console().print(report)
        if self.json is not None:
            write_json(self.json, report.as_dict())


@dataclass(frozen=True)
class Demo(Verb):
    """Render the embedded scene without training, train on it, render it again, compare, and make a video.

    The first pictures show shiftadd-gnt-tiny with the weights that come with the package. Training takes some minutes
    on a laptop CPU. The command writes video.mp4, comparison.png and metrics.json to the folder demo inside
    --output-dir. It needs no download.
    """

    output_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("outputs")
    """Folder for the results."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Training steps. If not set: 600."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Another scene instead of the embedded one, in any format that ns-train reads."""
    frames: Annotated[int, tyro.conf.arg(metavar="N")] = 60
    """Number of frames of the video, 2 or more."""

    def run(self) -> None:
        """Do it all."""
        from shiftadd3d.nerf.render_options import check_frames

        check_frames(self.frames)
        if self.steps is not None and self.steps < 1:
            raise UserError(f"--steps {self.steps}: expected 1 or more")
        _check_there("a scene", self.data, option="--data")
        _need_nerfstudio()
        from shiftadd3d.configs.methods import shiftadd_gnt_tiny
        from shiftadd3d.nerf.demo import demo

        demo(shiftadd_gnt_tiny.config, self.output_dir, steps=self.steps, data=self.data, frames=self.frames)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Movie(Verb):
    """Turn photos or a video into a camera flight, with a network that comes with the package.

    The command finds the poses of the photos, renders a smooth path past them without any training, and says where
    everything is. Finding poses needs the extra `poses`: `pip install 'shiftadd3d[poses]'`. A scene that already has
    cameras is used as it is. Ctrl-C loses nothing: the same command continues.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")]
    """A folder of photos, a video file, or a scene in any format that ns-train reads."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Output: a .mp4 or .gif file, or a folder (no suffix) for numbered PNG frames.
    If not set: INPUT-movie.mp4 in the current folder."""
    scene: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the scene made from photos or a video. An existing one is used again.
    If not set: NAME-scene beside NAME.mp4."""
    minutes: Annotated[float, tyro.conf.arg(metavar="N")] = 0.0
    """First train on the scene for this many minutes, from the same network."""
    size: Annotated[int, tyro.conf.arg(metavar="PIXELS")] = 252
    """Longer side of a frame, and of the photos that it is made from. It is at most that of the given photos."""
    path: Literal["interpolate", "spiral", "views"] = "interpolate"
    """A smooth path past the views, a spiral around the first view, or the views themselves in their order."""
    frames: Annotated[int, tyro.conf.arg(metavar="N")] = 60
    """Number of frames, 2 or more. With more frames, the path passes more views."""
    fps: Annotated[float, tyro.conf.arg(metavar="F")] = 24.0
    """Frames per second."""
    outputs: tuple[Literal["rgb", "depth", "accumulation"], ...] = ("rgb",)
    """What to show, side by side."""
    preview: bool = False
    """Write the first frame, small, to NAME.preview.png as soon as poses are known."""
    numerics: Literal["exact", "fast", "int8"] = "int8"
    """Precision of the kernels: float32, or 16 or 8 bits where that is faster."""
    compile: bool = True
    """Compile the network into one executable if it is on a CPU and can be compiled."""
    json: JsonFile = None
    """Also write where everything is, and how long each step took, to this JSON file."""

    def run(self) -> None:
        """Make the movie."""
        from shiftadd3d.nerf.movie_options import MovieOptions, check_movie, default_out

        options = MovieOptions(**{option.name: getattr(self, option.name) for option in fields(MovieOptions)})
        out = default_out(self.source) if self.out is None else self.out
        check_movie(self.source, out, options)  # also checked by `movie`, after imports that take seconds
        _need_nerfstudio()
        import psutil

        from shiftadd3d._report import write_json
        from shiftadd3d.configs.pretrained import shiftadd_gnt_tiny
        from shiftadd3d.nerf.movie import movie

        facts = movie(shiftadd_gnt_tiny, self.source, out, options, psutil.Process().create_time())
        if self.json is not None:
            write_json(self.json, facts)


@dataclass(frozen=True)
class ImportGnt(Verb):
    """Turn a checkpoint of the original GNT code into a run that ns-eval, ns-render, ns-viewer and render open.

    Only tensors are read from the checkpoint; no code in it is run. The checkpoint decides the depth, the widths and
    the number of networks.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT.pth")]
    """model_NNNNNN.pth, as the original code writes it."""
    data: Annotated[Path, tyro.conf.arg(metavar="SCENE")]
    """The scene to render, in any format that ns-train reads."""
    out: Annotated[Path, tyro.conf.arg(metavar="RUN")]
    """Folder for the run, new or empty."""
    recipe: Annotated[str, tyro.conf.arg(metavar="RECIPE")] = "mult"
    """What its layers become: mult (no change), add, add+shift-attn, add+shift, add+shift-attn+moe or moe.
    They are calibrated on the views of the scene, without training."""

    def run(self) -> None:
        """Write the run, say where it is and what comes next."""
        _check_there("a checkpoint of the original code, such as model_720000.pth", self.checkpoint)
        _check_there("a scene", self.data, option="--data")
        _need_nerfstudio()
        from shiftadd3d.configs import methods
        from shiftadd3d.nerf.import_gnt import import_gnt

        names = ("gnt", "gnt_big") if self.recipe == "mult" else ("shiftadd_gnt", "shiftadd_gnt_big")
        base, big = (getattr(methods, name).config for name in names)
        import_gnt((base, big), self.checkpoint, self.data, self.out, self.recipe)


@dataclass(frozen=True)
class _Origin:
    """Where the defaults of all other options of `finetune` come from."""

    preset: Literal[tuple(PRESETS)] | None = None  # type: ignore[valid-type]
    """A model with settings that suit it. Other options override these settings.
    All presets but digits and small start from timm's pretrained weights: laptop at 112 px, the others at 224.
    If not set: digits without --data; with --data, deit-tiny on a GPU and laptop on a CPU.
    Without pretrained weights, it is small, from random weights."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Continue an earlier run in its folder, with its settings. Options override what can still be changed."""


@dataclass(frozen=True)
class Finetune(FinetuneSettings, _Origin, Verb):
    """Train an image classifier and turn it into shifts, adds and a mixture of experts, in the paper's stages.

    Stage 0 trains the dense model, or loads it. Stage 1 turns attention's products into additions. Stage 2 turns linear
    layers into shifts and mixtures. Without any option, it trains on scikit-learn's digits, in under two minutes on two
    cores. Ctrl-C saves the state, and --resume continues. For several processes, use
    torchrun -m shiftadd3d.cli finetune ...
    """

    fallback: Annotated[FinetuneSettings | None, tyro.conf.Suppress] = None
    """The same from random weights, where nobody has said that it must not be."""

    def run(self) -> None:
        """Run the stages that are left."""
        self.validate()
        _check_there("the folder of an earlier run", self.resume, option="--resume")
        _check_there("a folder of pictures", None if self.dataset else self.data, option="--data")
        _check_there("a file of weights", self.weights, option="--weights")
        _check_there("a saved classifier, or a file of weights", self.start_from, option="--start-from")
        _need_vision()
        from rich.console import Console

        from shiftadd3d.vision.finetune import finetune, run_folder

        # A folder that has been moved or is named from elsewhere is still that run.
        settings = replace(self, output_dir=self.resume.parent, name=self.resume.name) if self.resume else self
        try:
            finetune(settings, resume=self.resume is not None, fallback=self.fallback, console=Console())
        except KeyboardInterrupt:
            print(f"go on with: shiftadd3d finetune --resume {run_folder(settings)}", file=sys.stderr)
            raise

    @staticmethod
    def with_defaults(args: Sequence[str]) -> Finetune:
        """The verb as it is without further options, given the preset, the run to resume and the data in `args`."""

        @dataclass(frozen=True)
        class Given:
            preset: str | None = None
            resume: str | None = None
            data: str | None = None
            device: str | None = None
            model: str | None = None

        try:
            given, rest = tyro.cli(Given, args=args, return_unknown_args=True, add_help=False, console_outputs=False)
        except SystemExit:  # the whole command line is wrong, and the real parser will say how
            given, rest = Given(), []
        fallback = None
        settings = PRESETS.get(given.preset or "digits", FinetuneSettings())
        if given.resume is not None:
            # Whatever is wrong with the folder is told when the verb runs.
            with contextlib.suppress(UserError):
                settings = read_settings(Path(given.resume))
        elif given.preset is None and given.data is not None:
            options = {word.partition("=")[0].replace("_", "-") for word in rest}
            # What changes the network leaves no pretrained weights that fit.
            if options & {"--no-pretrained", "--start-from", "--model-args"} and not options & {
                "--pretrained",
                "--weights",
            }:
                settings = PRESETS["small"]
            else:
                there = Path(given.data).exists()  # if not, `run` says so, and nobody waits for torch
                settings = PRESETS["deit-tiny" if there and _has_gpu(given.device, rest) else "laptop"]
                if not options & {"--pretrained", "--weights"}:
                    fallback = _from_random_weights(args, settings, given.model)
        values = {option.name: getattr(settings, option.name) for option in fields(FinetuneSettings)}
        return Finetune(**values, fallback=fallback)


def _has_gpu(device: str | None, args: Sequence[str]) -> bool:
    if device is not None or {"-h", "--help"} & set(args):  # help has to come at once, and shows what a CPU gets
        return device is not None and device != "cpu"
    import torch

    return torch.cuda.is_available()


def _from_random_weights(
    args: Sequence[str], pretrained: FinetuneSettings, model: str | None
) -> FinetuneSettings | None:
    """What `args` say from random weights: with the preset for that, or of another model with what else it has."""
    default = PRESETS["small"]
    if model is not None and model != default.model:
        stage0 = replace(PRESETS["small"].stage0, freeze_backbone=False)
        default = replace(pretrained, pretrained=False, stage0=stage0)
    try:
        parsed, _ = tyro.cli(
            FinetuneSettings,
            args=args,
            default=default,
            return_unknown_args=True,
            add_help=False,
            console_outputs=False,
        )
    except SystemExit:
        return None
    return parsed


Checkpoint = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CLASSIFIER")]


@dataclass(frozen=True)
class Evaluate(DataSettings, Verb):
    """Measure a classifier: top-1, top-5, per class, calibration, throughput.

    Without --data it takes the pictures of the run that contains the classifier, with the same split unless
    --val-fraction or --split-seed is set.
    """

    classifier: Checkpoint = field(kw_only=True)
    """A folder that finetune or export wrote, such as outputs/RUN/stage2-shift/best."""
    split: Literal["val", "test", "train"] = "val"
    """Which pictures to use.
    Without a folder val, val is the held-out part of the training pictures, and train the rest."""
    batch_size: int = 64
    """Pictures in a batch."""
    workers: int | None = None
    """Processes that read pictures. If not set: 0 on a CPU, up to 8 with a GPU."""
    device: str | None = None
    """Where to compute: cpu, cuda, cuda:1. If not set: a GPU if there is one."""
    numerics: Literal["exact", "fast", "int8", "twin"] | None = None
    """Precision of packed layers: exact (as float32), fast (activations of 16 bits), int8 (of 8 bits), or twin.
    With twin, plain torch runs instead of kernels. If not set: $SHIFTADD3D_NUMERICS, or else exact."""
    compile: bool = True
    """Compile a packed classifier into one executable if it is on a CPU and can be compiled."""
    json: JsonFile = None
    """Also write the same facts, and the confusion matrix, to this JSON file."""

    def run(self) -> None:
        """Print the metrics as a table."""
        _check_classifier(self.classifier)
        _need_vision()
        from rich.console import Console

        from shiftadd3d._report import write_json
        from shiftadd3d.vision.evaluate import evaluate_classifier

        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: expected 1 or more")
        facts = evaluate_classifier(
            self.classifier,
            _data_of_run(self, self.classifier),
            split=self.split,
            batch_size=self.batch_size,
            workers=self.workers,
            device=self.device,
            numerics=self.numerics,
            compile=self.compile,
            console=Console(),
        )
        if self.json is not None:
            write_json(self.json, facts)


@dataclass(frozen=True)
class Predict(Verb):
    """Classify pictures, and show which patches went to which expert.

    Pictures that cannot be read are skipped, counted and listed.
    """

    classifier: Checkpoint
    """A folder that finetune or export wrote, such as outputs/RUN/stage2-shift/best."""
    pictures: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE")]
    """Picture files, folders of pictures, or camera:0 for a frame of the first camera."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write each picture with its labels to this folder, as NAME.label.png."""
    show_routing: bool = False
    """Also write NAME.routing.png for each picture, to --out or else to the folder predictions.
    It shows which patches each mixture of experts sent to the multiplying expert, and which to the shift expert."""
    device: str | None = None
    """Where to compute: cpu, cuda, cuda:1. If not set: a GPU if there is one."""
    compile: bool = True
    """Compile a packed classifier into one executable if it is on a CPU and can be compiled.
    This takes some seconds the first time. With --show-routing, nothing is compiled."""
    json: JsonFile = None
    """Also write labels, probabilities and routing to this JSON file."""

    def run(self) -> None:
        """Print the labels."""
        _check_classifier(self.classifier)
        _need_vision()
        from rich.console import Console

        from shiftadd3d._claim import claimed
        from shiftadd3d._report import write_json
        from shiftadd3d.vision.predict import predict_pictures

        if not self.pictures:
            raise UserError("no pictures named; expected files, folders of them, or camera:0")
        out = Path("predictions") if self.out is None and self.show_routing else self.out
        with contextlib.nullcontext() if out is None else claimed(out, "--out"):
            facts = predict_pictures(
                self.classifier,
                self.pictures,
                out=out,
                show_routing=self.show_routing,
                device=self.device,
                compile=self.compile,
                console=Console(),
            )
        if self.json is not None:
            write_json(self.json, facts)


@dataclass(frozen=True)
class Export(DataSettings, Verb):
    """Write a classifier for use elsewhere: packed, as ONNX, as a torch.export program, or as an executable.

    Every file is read back, and its outputs are compared with those of the classifier. Packed weights take 4 bits each.
    An executable (so) is native code for CPUs like this one. It runs without torch and without this package.
    """

    classifier: Checkpoint = field(kw_only=True)
    """A folder that finetune wrote, such as outputs/RUN/stage2-shift/best."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = field(kw_only=True)
    """Folder for packed/ (which shiftadd3d.load restores), model.onnx, model.pt2 and so/ (which predict runs)."""
    formats: tuple[Literal["packed", "onnx", "program", "so"], ...] = ("packed", "onnx", "program")
    """What to write. ONNX files and programs hold the dense equivalent: the same outputs from ordinary layers.
    An executable (so) can also be made from a packed classifier."""
    numerics: Literal["exact", "fast", "int8"] | None = None
    """Precision of the executable: exact (as float32), fast (activations of 16 bits) or int8 (of 8 bits).
    If not set: $SHIFTADD3D_NUMERICS, or else exact."""
    recipe: str | None = None
    """First convert a dense classifier to this recipe, without training.
    Weights are rounded so that outputs on some training pictures change least.
    Without --data, the pictures are those of the run that contains the classifier."""
    json: JsonFile = None
    """Also write the files, their sizes and how far their outputs differ to this JSON file."""

    def run(self) -> None:
        """Write the files."""
        _check_classifier(self.classifier)
        _need_vision()
        from rich.console import Console

        from shiftadd3d._claim import claimed
        from shiftadd3d._report import write_json
        from shiftadd3d.vision.export import export_classifier

        with claimed(self.out, "--out"):
            facts = export_classifier(
                self.classifier,
                self.out,
                formats=self.formats,
                recipe_name=self.recipe,
                data=_data_of_run(self, self.classifier),
                numerics=self.numerics,
                console=Console(),
            )
        if self.json is not None:
            write_json(self.json, facts)


def _data_of_run(given: DataSettings, classifier: Path) -> DataSettings:
    """The pictures that the options name, or those of the run that a classifier lies in: RUN/stage2-shift/best.

    Of these the options change what they say differently than by default.
    """
    if given.data is None and not given.dataset:
        with contextlib.suppress(UserError, IndexError):
            best = classifier.resolve()
            settings = read_settings((best.parent if best.is_file() else best).parents[1])
            changed = {
                option.name: getattr(given, option.name)
                for option in fields(DataSettings)
                if getattr(given, option.name) != option.default
            }
            return replace(settings, **changed)
    return given


_KernelNames = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[KERNEL ...]")]


@dataclass(frozen=True)
class ListKernels(Verb):
    """Show the kernels and their variants, and which of these the cache holds for this machine."""

    names: _KernelNames = ()
    """Kernels to show. If not set: all."""
    target: str | None = None
    """What they are compiled for: a generation of GPUs, such as cuda-sm_90. If not set: this CPU."""
    json: JsonFile = None
    """Also write the same facts to this JSON file."""

    def run(self) -> None:
        """Print the table."""
        from shiftadd3d.kernels import manage

        manage.list_kernels(self.names, self.json, self.target)


@dataclass(frozen=True)
class BuildKernels(Verb):
    """Compile kernels now, so that no later command has to wait. Kernels for GPUs compile without a GPU, too.

    With --model, compile packed classifiers instead, each as one executable, as predict and evaluate would.
    """

    names: _KernelNames = ()
    """Kernels to compile. If not set: all, unless --model is set."""
    target: str | None = None
    """What to compile for: a generation of GPUs, such as cuda-sm_90. If not set: this CPU."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Also write a bundle to this folder, for machines without TVM and compiler: set SHIFTADD3D_BUNDLE to it there.
    These machines need torch, this package and (for CPUs) apache-tvm-ffi."""
    model: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PACKED ...")] = ()
    """Folders of packed classifiers, which export wrote."""
    numerics: tuple[Literal["exact", "fast", "int8"], ...] = ()
    """Precision of the executables. If not set: $SHIFTADD3D_NUMERICS, or else exact."""
    json: JsonFile = None
    """Also write the same facts to this JSON file."""

    def run(self) -> None:
        """Compile what the cache does not hold."""
        if self.model:
            self._build_models()
            return
        if self.numerics:
            raise UserError("--numerics: expected --model as well; kernels are compiled for all numerics")
        from shiftadd3d.kernels import manage

        manage.build_kernels(self.names, self.json, self.target, self.out)

    def _build_models(self) -> None:
        if self.names or self.target or self.out:
            raise UserError("--model: expected no other option but --numerics and --json; models are for this CPU")
        _check_there("a folder that export packed", *self.model, option="--model")
        _need_vision()
        from rich.console import Console

        from shiftadd3d._report import write_json
        from shiftadd3d.vision.compiled import build_ahead

        rows = build_ahead(self.model, self.numerics, Console())
        if self.json is not None:
            write_json(self.json, {"models": rows})


@dataclass(frozen=True)
class CheckKernels(Verb):
    """Compare every kernel with its torch twin on this machine. The exit code is 1 if one differs."""

    names: _KernelNames = ()
    """Kernels to check. If not set: all."""
    target: str | None = None
    """What they are compiled for: a generation of GPUs, such as cuda-sm_90. If not set: this CPU."""
    json: JsonFile = None
    """Also write the same facts to this JSON file."""

    def run(self) -> None:
        """Build what the cache does not hold, run everything on small problems."""
        from shiftadd3d.kernels import manage
        from shiftadd3d.kernels.runtime import bundle

        bundle.runtime()  # which refuses a bundle that cannot be used, though the cache may have all kernels
        manage.check_kernels(self.names, self.json, self.target)


@dataclass(frozen=True)
class Kernels(Verb):
    """List compiled kernels, build them ahead, or check them.

    Kernels are compiled on first use and kept in a cache for each user. SHIFTADD3D_CACHE names its folder. The default
    is in the cache folder of the platform. SHIFTADD3D_TARGET sets the instruction set; the default is the best of this
    CPU.
    """

    action: Annotated[
        Annotated[ListKernels, tyro.conf.subcommand("list")]
        | Annotated[BuildKernels, tyro.conf.subcommand("build")]
        | Annotated[CheckKernels, tyro.conf.subcommand("check")],
        tyro.conf.arg(name=""),
    ]
    """What to do with the kernels."""

    def run(self) -> None:
        """Do it."""
        self.action.run()


@dataclass(frozen=True)
class Bench(Verb):
    """Measure the speed of kernels on this machine.

    The kernels are compared with torch in float32, bfloat16 and int8, compiled and not. All solutions of a problem take
    turns. Tables show speedups, times with quartiles, shares of the machine's peak, and goals. This takes a quarter of
    an hour for each number of threads, and longer on CPUs without instructions for bfloat16. Solutions of torch whose
    calls take more than 20 s are left out.
    """

    what: Annotated[Literal["kernels"], tyro.conf.Positional]
    """What to measure."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    threads: str = "1"
    """Numbers of CPU threads to measure with, separated by commas: 1,2."""
    groups: Annotated[tuple[str, ...], tyro.conf.arg(metavar="GROUP ...")] = ()
    """Groups: matshift, matadd, mlp, moe, view-attention, ray-block, gather, gnt. If not set: all."""
    json: JsonFile = None
    """Also write all measurements to this JSON file, after each problem. Ctrl-C keeps those of finished problems."""

    def run(self) -> None:
        """Measure, print tables."""
        from shiftadd3d._report import write_json
        from shiftadd3d.profile.kernel_benchmark import measure, parse_threads, tables

        def keep(facts: dict[str, object]) -> None:
            if self.json is not None:
                write_json(self.json, facts)

        facts = measure(
            self.device, parse_threads(self.threads), self.groups, lambda line: print(line, flush=True), keep
        )
        for threads in dict.fromkeys(row["threads"] for row in facts["rows"]):
            for table in tables(facts, threads):
                print(f"\n{table}")


@dataclass(frozen=True)
class MakeFactory(Verb):
    """Make up scenes to train across: varied objects, textures, lights and cameras, with true depths.

    This needs the extra `scenes` (`pip install 'shiftadd3d[scenes]'`). A scene depends only on the seed, its number and
    --size. Existing scenes are kept. So the same command continues after Ctrl-C, and a larger --count adds scenes. Each
    scene is a folder in nerfstudio's format. factory.json lists the scenes, and pictures in contact-sheets show them.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write to: new, empty, or a factory with the same seed and size."""
    count: Annotated[int, tyro.conf.arg(metavar="N")]
    """Total number of scenes in OUT."""
    seed: int = 0
    """Random seed. The same seed gives the same scenes."""
    workers: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Processes that make scenes. Each takes one core and about 300 MB."""
    size: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="W H")] = None
    """Width and height of all pictures, in pixels.
    If not set: each scene draws its own, 96 to 252 pixels on the longer side, upright, square or wide."""

    def run(self) -> None:
        """Make what is missing."""
        from rich.console import Console

        from shiftadd3d.scenes.factory import Factory, make_factory

        make_factory(Factory(self.out, self.seed, self.size), self.count, workers=self.workers, console=Console())


@dataclass(frozen=True)
class ContactSheets(Verb):
    """Draw the contact sheets of a factory again, also while it is being made."""

    factory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FACTORY")]
    """A folder that make-factory writes."""

    def run(self) -> None:
        """Draw them."""
        from rich.console import Console

        from shiftadd3d.scenes.factory import draw_contact_sheets, open_factory

        draw_contact_sheets(open_factory(self.factory), Console())


@dataclass(frozen=True)
class FromPhotos(FromPhotosOptions, Verb):
    """Find the camera poses of photos, or of frames of a video, and write a scene to train on.

    This needs the extra `poses` (`pip install 'shiftadd3d[poses]'`). It does not need COLMAP or ffmpeg. The photos are
    not changed. After Ctrl-C the same command continues. Every nerfstudio method can train on the scene.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PHOTOS")] = field(kw_only=True)
    """A folder of 10 to 300 photos of one scene from different places, or a video file."""
    out: Annotated[Path, tyro.conf.arg(metavar="SCENE")] = field(kw_only=True)
    """Folder for the scene, new or empty."""
    json: JsonFile = None
    """Also write to this JSON file which photos were placed, and which were not."""

    def run(self) -> None:
        """Make the scene, say what became of the photos."""
        from rich.console import Console

        from shiftadd3d._report import write_json
        from shiftadd3d.scenes.from_photos import scene_from_photos

        options = FromPhotosOptions(**{option.name: getattr(self, option.name) for option in fields(FromPhotosOptions)})
        console = Console()
        report = scene_from_photos(self.source, self.out, options, console)
        console.print(report, soft_wrap=True)
        command = shlex.join(["ns-train", "shiftadd-gnt-tiny", "--data", str(self.out)])
        console.print(f"train on it: {command}", soft_wrap=True, highlight=False, markup=False)
        if self.json is not None:
            write_json(self.json, report.as_dict())


@dataclass(frozen=True)
class Scenes(Verb):
    """Make scenes to train on and to try things with."""

    action: Annotated[
        Annotated[FromPhotos, tyro.conf.subcommand("from-photos")]
        | Annotated[MakeFactory, tyro.conf.subcommand("make-factory")]
        | Annotated[ContactSheets, tyro.conf.subcommand("contact-sheets")],
        tyro.conf.arg(name=""),
    ]
    """What to do."""

    def run(self) -> None:
        """Do it."""
        self.action.run()


@dataclass(frozen=True)
class Profile(Verb):
    """Count the operations and data traffic of models, and estimate their energy by three accounts, recipe by recipe.

    Named models have random weights. The weights only decide to which expert of a mixture a token goes. All recipes are
    compared with the first.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Named models: gnt-tiny, gnt, gnt-big, or timm's names, such as deit_tiny_patch16_224 or pvt_v2_b0.
    Saved models: folders of classifiers that `finetune` wrote, and folders or config.yml of nerfstudio runs.
    Open only runs that you trust: reading a config.yml can run code.
    Saved models keep their own recipe and routers, and are compared with mult."""
    recipes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RECIPE")] = (
        "mult",
        "add",
        "add+shift",
        "add+shift-attn+moe",
    )
    """What layers become: mult (no change), add, add+shift-attn, add+shift, add+shift-attn+moe or moe."""
    accelerator: Annotated[Path | None, tyro.conf.arg(metavar="FILE.toml")] = None
    """Elements, buffer and energies of another accelerator.
    Start from a copy of shiftadd3d/profile/accelerator.toml."""
    rays: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Rays in a batch of a GNT. If not set: those of a training step, or about 800 of a run's first test view."""
    latency: Annotated[tuple[Literal["eager", "frozen", "compiled"], ...] | None, tyro.conf.arg(metavar="FORM ...")] = (
        None
    )
    """Also time models on this machine, as a whole and part by part.
    Forms: as they are (eager), frozen by `freeze_` (frozen), and as one executable if possible (compiled).
    If not set: eager and frozen with --html, else none."""
    quality: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE.json ...")] = ()
    """JSON files from `evaluate`, `eval-scenes` or ns-eval, to compare quality with energy and latency.
    Write RECIPE=FILE.json or MODEL:RECIPE=FILE.json if a file does not name its model."""
    modules: bool = False
    """Also show every module of every model."""
    html: Annotated[Path | None, tyro.conf.arg(metavar="FILE.html")] = None
    """Write a page with tables and charts to this file. It needs no network."""
    json: JsonFile = None
    """Also write the same facts, module by module, to this JSON file."""

    def run(self) -> None:
        """Print the tables, write the files."""
        from shiftadd3d._claim import claimed

        if self.html is not None:
            need("--html", "matplotlib", extra="vision")

        _check_there("a TOML file of an accelerator", self.accelerator, option="--accelerator")
        if self.html is not None and self.json is not None and self.html.resolve() == self.json.resolve():
            raise UserError(f"--html and --json both name {self.html}; expected two different files")
        with contextlib.ExitStack() as places:  # what cannot be written is said before anything is counted
            for option in ("html", "json"):
                file: Path | None = getattr(self, option)
                if file is not None and file.is_dir():
                    raise UserError(f"--{option} {file}: a folder is in the way; expected a file name")
                if file is not None and (file.is_file() or not file.exists()):  # a pipe is nobody's alone
                    places.enter_context(claimed(file, f"--{option}", file=True))
            self._profile()

    def _profile(self) -> None:
        from rich.console import Console

        from shiftadd3d._report import write_json, write_text
        from shiftadd3d.profile.accelerator import load_accelerator
        from shiftadd3d.profile.model_report import profile
        from shiftadd3d.profile.quality import read_evaluation
        from shiftadd3d.profile.subjects import subject

        accelerator = load_accelerator(self.accelerator)
        evaluations = [read_evaluation(word) for word in self.quality]
        forms = self.latency if self.latency is not None else ("eager", "frozen") if self.html is not None else ()
        subjects = [_saved(Path(name), self.rays) or subject(name, self.rays) for name in self.models]
        if self.rays is not None and (other := next((each for each in subjects if each.unit != "ray"), None)):
            raise UserError(f"--rays {self.rays}: {other.name} takes a {other.unit}, not rays; leave out --rays")
        report = profile(subjects, self.recipes, accelerator=accelerator, forms=forms, evaluations=evaluations)
        console = Console()
        if self.modules:
            for each in report.profiles:
                console.rule(f"{each.model}, {each.recipe}")
                console.print(each.operations)
        console.print(report)
        facts = report.as_dict()
        if self.html is not None:
            from shiftadd3d.profile.page import render_page

            write_text(self.html, render_page(facts))
        if self.json is not None:
            write_json(self.json, facts)


def _saved(place: Path, rays: int | None) -> Subject | None:
    """A classifier's folder, or a nerfstudio run's folder or config.yml; None where nothing lies at `place`."""
    config = place / "config.yml" if place.is_dir() else place
    if config.suffix in (".yml", ".yaml") and config.is_file():
        return _saved_run(config, rays, str(place))
    if place.is_dir():
        return _saved_classifier(place)
    expected = "expected a folder of a classifier, or a folder or config.yml of a run"
    if place.is_file():
        raise UserError(f"{place}: not a file of a model; {expected}")
    if place.suffix in (".yml", ".yaml") or (len(place.parts) > 1 and ":" not in str(place)):  # timm has hf-hub:a/b
        raise UserError(f"{place}: no such file or folder; {expected}")
    return None


def _saved_classifier(folder: Path) -> Subject:
    """A classifier in a folder, and the same with multiplications."""
    _need_vision()
    from torch import nn

    from shiftadd3d.profile.subjects import Subject, picture_setting, random_picture
    from shiftadd3d.vision.checkpoint import create_dense, load, read_config

    config = read_config(folder)
    saved = load(folder)
    own = "mult" if config.recipe is None else config.recipe.name or "saved"
    size = (3, config.input.size, config.input.size)

    def make(recipe: str) -> nn.Module:
        return saved if recipe == own else create_dense(replace(config, recipe=None, frozen=False)).eval()

    return Subject(
        str(folder),
        make,
        lambda model: random_picture(size),
        1,
        "picture",
        picture_setting(size),
        recipes=tuple(dict.fromkeys(("mult", own))),
        weights="saved ones" if own == "mult" else "saved ones; those of mult are random",
    )


def _saved_run(config: Path, rays: int | None, name: str) -> Subject:
    """The network of a nerfstudio run with rays of its first test view, and the same with multiplications."""
    _need_nerfstudio()
    from torch import nn

    from shiftadd3d.models.gnt import GNTModel
    from shiftadd3d.nerf.runs import load_run
    from shiftadd3d.profile.subjects import Subject, ray_grid

    pipeline = load_run(config).pipeline
    model, views = pipeline.model, pipeline.datamanager
    own = model.config.recipe
    camera = views.eval_dataset.cameras[0:1]
    grid = ray_grid(int(camera.height), int(camera.width), rays)
    inputs = model.network_inputs(camera.to(pipeline.device), grid)

    def make(recipe: str) -> nn.Module:
        return model.gnt if recipe == own else GNTModel(model.config.gnt).to(pipeline.device).eval()

    samples, sources = inputs["num_samples"], len(inputs["sources"].images)
    return Subject(
        name,
        make,
        lambda network: inputs,
        grid[0] * grid[1],
        "ray",
        f"{grid[0]} x {grid[1]} rays of a view, {samples} samples a ray, {sources} source views, features of these "
        "encoded beforehand",
        recipes=tuple(dict.fromkeys(("mult", own))),
        weights="saved ones" if own == "mult" else "saved ones; those of mult are random",
        grid=grid,
    )


def _check_there(expected: str, *places: Path | None, option: str = "") -> None:
    """Whether there is anything at some places, told before imports that take seconds. What there is, is told later."""
    for place in places:
        if place is not None and not place.exists():
            raise UserError(f"{option} {place}: no such file or folder; expected {expected}".lstrip())


def _check_classifier(place: Path) -> None:
    _check_there("a folder that finetune or export wrote", place)


def _need_nerfstudio() -> None:
    # It meets newer libraries than it was written for, and each of them says so.
    warnings.filterwarnings("ignore", module=r"nerfstudio|torch\.jit|torch\.functional|viser|websockets")
    need("this", "nerfstudio", extra="nerf")


def _need_vision() -> None:
    need("this", "timm", "sklearn", "matplotlib", extra="vision")


VERBS: dict[str, type[Verb]] = {
    "demo": Demo,
    "movie": Movie,
    "render": Render,
    "eval-scenes": EvalScenes,
    "import-gnt": ImportGnt,
    "finetune": Finetune,
    "evaluate": Evaluate,
    "predict": Predict,
    "export": Export,
    "profile": Profile,
    "kernels": Kernels,
    "bench": Bench,
    "scenes": Scenes,
    "info": Info,
}


def _let_presets_speak(app: tyro.extras.SubcommandApp, args: Sequence[str]) -> None:
    """Let `finetune --help` show, and its options change, the defaults of the preset or run that `args` name."""

    def finetune(
        verb: Annotated[Finetune, tyro.conf.arg(name="")] = Finetune.with_defaults(args),  # noqa: B008 that is the point
    ) -> Finetune:
        return verb

    app.command(name="finetune", help=inspect.getdoc(Finetune))(finetune)


@contextlib.contextmanager
def _never_ended_without_a_word() -> Iterator[None]:
    """Let signals that ask a process to end, which would end it at once and without a word, do what Ctrl-C does.

    A shutdown sends SIGTERM, a terminal that closes SIGHUP. The second one of a kind ends the process at once.
    """
    ours: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            print(f"{signal.Signals(number).name} came: ending as after Ctrl-C", file=sys.stderr, flush=True)
        if callable(signal.getsignal(signal.SIGINT)):  # also what holds Ctrl-C back while something is done whole
            signal.raise_signal(signal.SIGINT)
        else:  # ignored, as in a script's background
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # Whoever has it ignored (nohup) or handled has a reason.
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, interrupt)
                ours.append(number)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _command(args: Sequence[str]) -> str:
    """The command that `args` name, as its help is called: `shiftadd3d render`, `shiftadd3d scenes make-factory`."""
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), args))
    verb = VERBS.get(words[0]) if words else None
    length = 0 if verb is None else 2 if "action" in verb.__annotations__ else 1
    return " ".join(["shiftadd3d", *words[:length]])


_CLOSED_PIPE = 128 + 13  # as of a process that SIGPIPE has ended


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        args: The arguments after the program's name; `sys.argv` by default.

    Raises:
        SystemExit: With 0 after printing help, with 2 for wrong arguments.
    """
    try:
        code = _run(sys.argv[1:] if args is None else list(args))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has closed it, as `head` does. What is left of it must not fail at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    return code


def _run(args: list[str]) -> int:
    """`main`, for output that somebody reads."""
    app = tyro.extras.SubcommandApp()
    for name, verb_class in VERBS.items():
        app.command(name=name)(verb_class)
    if args[:1] == ["finetune"]:
        _let_presets_speak(app, args[1:])
    with one_line_for_wrong_arguments(_command(args), args):
        verb = cast(Verb, app.cli(prog="shiftadd3d", description=__doc__, args=args))
    try:
        with _never_ended_without_a_word():
            verb.run()
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
