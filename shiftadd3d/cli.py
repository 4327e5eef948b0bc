"""Transformer NeRFs and vision transformers whose multiplications become shifts, adds and a mixture of experts.

Exit codes: 0 done, 1 failed, 2 wrong arguments.
"""

# A verb is a dataclass: its docstring and its fields' docstrings are the help, `run` does the work. Nothing heavy is
# imported up here (torch, nerfstudio and TVM load inside `run`), so that `--help` answers at once.

from __future__ import annotations

import contextlib
import inspect
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
    """Show what this installation and this machine offer.

    Versions, processors and their instruction sets, compilers, nerfstudio methods and embedded scenes: what a bug
    report or a benchmark needs to say about its machine.
    """

    json: JsonFile = None
    """Write the same facts to this JSON file, too."""

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

    Open only a config.yml of your own: nerfstudio's configurations name Python objects, and reading one can run code.
    Ctrl-C keeps the frames rendered so far.
    """

    load_config: Annotated[Path, tyro.conf.arg(metavar="CONFIG.yml")]
    """The config.yml of a gnt or shiftadd-gnt run, in the folder that ns-train made for it."""
    out: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """Where to: a .mp4 or .gif file, or a folder (no suffix) for numbered PNG frames."""
    path: Literal["interpolate", "spiral", "test", "train"] = "interpolate"
    """From view to view, around the first view, or the test or training views themselves."""
    views: Literal["test", "train"] | None = None
    """Which views interpolate passes through, and spiral starts from. If not set, test, or train where there is only
    one test view."""
    camera_path: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """A camera path exported from nerfstudio's viewer, instead of --path."""
    frames: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """How many frames, 2 or more. If not set, 120, or all test or training views."""
    fps: Annotated[float | None, tyro.conf.arg(metavar="F")] = None
    """Frames per second. If not set, 24, or what the camera path says."""
    scale: float = 1.0
    """Pixels on a side, as a multiple of the photographs'."""
    outputs: tuple[str, ...] = ("rgb",)
    """What to show, side by side: rgb, depth, accumulation and, of a run with mixtures of experts, routing: how many of
    a pixel's samples went to the multiplying expert (red) and to the shifting one (blue)."""
    compile: bool = True
    """Make one executable of the network on a CPU, where that can be."""

    def run(self) -> None:
        """Load the run, render, write."""
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

    The network is the one that comes with the package, or a run's, such as one trained across other scenes.
    """

    scenes: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH")]
    """Scene folders, folders of such (a factory, say), and .txt files with a path a line."""
    load_config: Annotated[Path | None, tyro.conf.arg(metavar="CONFIG.yml")] = None
    """The config.yml of a run. If not set, the weights of --method that come with the package."""
    method: Literal["gnt-tiny", "shiftadd-gnt-tiny"] = "shiftadd-gnt-tiny"
    """Whose weights, where no run is named."""
    max_side: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = 252
    """Longest side that pictures are shrunk to; None leaves them as they are."""
    json: JsonFile = None
    """Write the same facts to this JSON file, too."""

    def run(self) -> None:
        """Print the table."""
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

    The first pictures are of shiftadd-gnt-tiny with the weights that come with the package. It is then trained for some
    minutes on a laptop CPU. Leaves video.mp4, comparison.png and metrics.json in the folder demo of the output folder.
    Needs no download.
    """

    output_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("outputs")
    """Where to."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Training steps. If not set, 600."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Another scene than the embedded one, in any format that ns-train reads."""
    frames: Annotated[int, tyro.conf.arg(metavar="N")] = 60
    """Frames of the video, 2 or more."""

    def run(self) -> None:
        """Do it all."""
        _need_nerfstudio()
        from shiftadd3d.configs.methods import shiftadd_gnt_tiny
        from shiftadd3d.nerf.demo import demo

        demo(shiftadd_gnt_tiny.config, self.output_dir, steps=self.steps, data=self.data, frames=self.frames)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Movie(Verb):
    """Turn photos or a video into a camera flight, with a network that comes with the package.

    Finds out where the photos were taken (which needs the extra `poses`: `pip install 'shiftadd3d[poses]'`), renders a
    smooth path past the views without any training, and says where everything is. A scene that has cameras already is
    taken as it is. Ctrl-C loses nothing: the same command goes on.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")]
    """A folder of photos, a video file, or a scene in any format that ns-train reads."""
    out: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """Where to: a .mp4 or .gif file, or a folder (no suffix) for numbered PNG frames."""
    scene: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the scene that is made of photos or a video; one that is there already is used again. If not
    set, NAME-scene beside NAME.mp4."""
    minutes: Annotated[float, tyro.conf.arg(metavar="N")] = 0.0
    """Train on the scene for so long first, from the same network."""
    size: Annotated[int, tyro.conf.arg(metavar="PIXELS")] = 252
    """Longer side of a frame, and of the photos that it is made from; never more than the photos have."""
    path: Literal["interpolate", "spiral", "views"] = "interpolate"
    """A smooth way past views, a spiral around the first view, or the views themselves in their order."""
    frames: Annotated[int, tyro.conf.arg(metavar="N")] = 60
    """How many frames, 2 or more. The more there are, the more views the way passes."""
    fps: Annotated[float, tyro.conf.arg(metavar="F")] = 24.0
    """Frames per second."""
    outputs: tuple[Literal["rgb", "depth", "accumulation"], ...] = ("rgb",)
    """What to show, side by side."""
    preview: bool = False
    """Write the first frame, small, as NAME.preview.png as soon as there are poses."""
    numerics: Literal["exact", "fast", "int8"] = "int8"
    """What kernels compute in: float32 throughout, or numbers of 16 or 8 bits where that is faster."""
    compile: bool = True
    """Make one executable of the network on a CPU, where that can be."""
    json: JsonFile = None
    """Write where everything is, and how long each step took, to this JSON file, too."""

    def run(self) -> None:
        """Make the movie."""
        _need_nerfstudio()
        import psutil

        from shiftadd3d._report import write_json
        from shiftadd3d.configs.pretrained import shiftadd_gnt_tiny
        from shiftadd3d.nerf.movie import MovieOptions, movie

        options = MovieOptions(**{option.name: getattr(self, option.name) for option in fields(MovieOptions)})
        facts = movie(shiftadd_gnt_tiny, self.source, self.out, options, psutil.Process().create_time())
        if self.json is not None:
            write_json(self.json, facts)


@dataclass(frozen=True)
class ImportGnt(Verb):
    """Turn a checkpoint of the original GNT code into a run that ns-eval, ns-render, ns-viewer and render open.

    Only tensors are read from it, no code is run. Depth, widths and the number of networks are the checkpoint's.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT.pth")]
    """model_NNNNNN.pth, as the original code writes it."""
    data: Annotated[Path, tyro.conf.arg(metavar="SCENE")]
    """The scene to render, in any format that ns-train reads."""
    out: Annotated[Path, tyro.conf.arg(metavar="RUN")]
    """Folder for the run: new or empty."""
    recipe: Annotated[str, tyro.conf.arg(metavar="RECIPE")] = "mult"
    """What its layers become, calibrated on the scene's views without training: mult (nothing), add, add+shift-attn,
    add+shift, add+shift-attn+moe or moe."""

    def run(self) -> None:
        """Write the run, say where it is and what comes next."""
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
    """A model with settings that suit it, which further options change. All but digits and small start from timm's
    pretrained weights, laptop at 112 px, the others at 224. If not set, digits without --data; with it deit-tiny on a
    GPU and laptop on a CPU, or small, from random weights, where no pretrained ones can be had or are asked for."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Go on with an earlier run, in its folder, with its settings; options change what can still be changed."""


@dataclass(frozen=True)
class Finetune(FinetuneSettings, _Origin, Verb):
    """Train an image classifier and turn it into shifts, adds and a mixture of experts, in the paper's stages.

    Stage 0 trains the dense model (or loads it), stage 1 turns attention's products into additions, stage 2 linear
    layers into shifts and mixtures. Without any option it trains on scikit-learn's digits, in under two minutes on two
    cores. Ctrl-C saves the state, --resume goes on. Several processes: torchrun -m shiftadd3d.cli finetune ...
    """

    fallback: Annotated[FinetuneSettings | None, tyro.conf.Suppress] = None
    """The same from random weights, where nobody has said that it must not be."""

    def run(self) -> None:
        """Run the stages that are left."""
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
                settings = PRESETS["deit-tiny" if _has_gpu(given.device, rest) else "laptop"]
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

    Without --data it takes the pictures of the run that the classifier lies in, split as they were, unless
    --val-fraction or --split-seed says otherwise.
    """

    classifier: Checkpoint = field(kw_only=True)
    """A folder that finetune or export wrote, such as outputs/RUN/stage2-shift/best."""
    split: Literal["val", "test", "train"] = "val"
    """Which pictures; val is the held-out part where there is no such folder, and train the rest."""
    batch_size: int = 64
    """Pictures at once."""
    workers: int | None = None
    """Processes that read pictures. If not set, 0 on a CPU, up to 8 with a GPU."""
    device: str | None = None
    """Where to compute: cpu, cuda, cuda:1. If not set, a GPU if there is one."""
    numerics: Literal["exact", "fast", "int8", "twin"] | None = None
    """How exactly packed layers compute: as float32 does; with activations rounded to 16 bits, or to 8; or as plain
    torch, without kernels. If not set, what $SHIFTADD3D_NUMERICS says, or exact."""
    compile: bool = True
    """Make one executable of a packed classifier on a CPU, where that can be."""
    json: JsonFile = None
    """Write the same facts, and the confusion matrix, to this JSON file, too."""

    def run(self) -> None:
        """Print the metrics as a table."""
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
    """Say what is on pictures, and show which patches went to which expert.

    Pictures that cannot be read are skipped, counted and listed.
    """

    classifier: Checkpoint
    """A folder that finetune or export wrote, such as outputs/RUN/stage2-shift/best."""
    pictures: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE")]
    """Files, folders of them, or camera:0 for a frame of the first camera."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write each picture with its labels into this folder, as NAME.label.png."""
    show_routing: bool = False
    """Also write, for each picture, which patches each mixture of experts sent to the multiplying expert and which
    went to the shifting one, as NAME.routing.png. If --out is not set, into the folder predictions."""
    device: str | None = None
    """Where to compute: cpu, cuda, cuda:1. If not set, a GPU if there is one."""
    compile: bool = True
    """Make one executable of a packed classifier on a CPU, where that can be. It takes some seconds the first time.
    With --show-routing it stays as it is."""
    json: JsonFile = None
    """Write labels, probabilities and routing to this JSON file, too."""

    def run(self) -> None:
        """Print the labels."""
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

    Every file is read back, and its outputs are compared with the classifier's. Packed weights take 4 bits each. An
    executable (so) is native code for CPUs like this one. It runs without torch and without this package.
    """

    classifier: Checkpoint = field(kw_only=True)
    """A folder that finetune wrote, such as outputs/RUN/stage2-shift/best."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = field(kw_only=True)
    """Folder for packed/ (which shiftadd3d.load restores), model.onnx, model.pt2 and so/ (which predict runs)."""
    formats: tuple[Literal["packed", "onnx", "program", "so"], ...] = ("packed", "onnx", "program")
    """Which of them. ONNX files and programs hold the dense equivalent: the same outputs from ordinary layers. An
    executable (so) can also be made of what has been packed already."""
    numerics: Literal["exact", "fast", "int8"] | None = None
    """What the executable computes in: as float32 does, or with activations rounded to 16 bits, or to 8. If not set,
    what $SHIFTADD3D_NUMERICS says, or exact."""
    recipe: str | None = None
    """Turn a dense classifier into this recipe first, without training: weights are rounded so that outputs on some
    training pictures change least. Without --data these are those of the run that the classifier lies in."""
    json: JsonFile = None
    """Write the files, their sizes and how far their outputs differ to this JSON file, too."""

    def run(self) -> None:
        """Write the files."""
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
    """Which kernels; all if none is named."""
    target: str | None = None
    """What they are for: a GPU's generation, such as cuda-sm_90. By default, this CPU."""
    json: JsonFile = None
    """Write the same facts to this JSON file, too."""

    def run(self) -> None:
        """Print the table."""
        from shiftadd3d.kernels import manage

        manage.list_kernels(self.names, self.json, self.target)


@dataclass(frozen=True)
class BuildKernels(Verb):
    """Compile kernels now, so that nothing has to wait for it later; those for GPUs without a GPU, too.

    With --model, compile packed classifiers instead, each as one executable, as predict and evaluate would.
    """

    names: _KernelNames = ()
    """Which kernels; all if neither one is named nor a model."""
    target: str | None = None
    """What they are for: a GPU's generation, such as cuda-sm_90. By default, this CPU."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Also put them into this folder, with all they need but torch, this package and apache-tvm-ffi. Where
    SHIFTADD3D_BUNDLE names the folder, neither TVM nor a compiler has to be installed."""
    model: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PACKED ...")] = ()
    """Folders that export packed."""
    numerics: tuple[Literal["exact", "fast", "int8"], ...] = ()
    """What models compute in. If not set, what $SHIFTADD3D_NUMERICS says, or exact."""
    json: JsonFile = None
    """Write the same facts to this JSON file, too."""

    def run(self) -> None:
        """Compile what the cache does not hold."""
        if self.model:
            self._build_models()
            return
        if self.numerics:
            raise UserError("--numerics goes with --model: kernels are compiled for all of them")
        from shiftadd3d.kernels import manage

        manage.build_kernels(self.names, self.json, self.target, self.out)

    def _build_models(self) -> None:
        if self.names or self.target or self.out:
            raise UserError("--model goes with --numerics and --json only: models are compiled whole, for this CPU")
        _need_vision()
        from rich.console import Console

        from shiftadd3d._report import write_json
        from shiftadd3d.vision.compiled import build_ahead

        rows = build_ahead(self.model, self.numerics, Console())
        if self.json is not None:
            write_json(self.json, {"models": rows})


@dataclass(frozen=True)
class CheckKernels(Verb):
    """Compare every kernel with its torch twin on this machine; exit code 1 if one differs."""

    names: _KernelNames = ()
    """Which kernels; all if none is named."""
    target: str | None = None
    """What they are for: a GPU's generation, such as cuda-sm_90. By default, this CPU."""
    json: JsonFile = None
    """Write the same facts to this JSON file, too."""

    def run(self) -> None:
        """Build what the cache does not hold, run everything on small problems."""
        from shiftadd3d.kernels import manage

        manage.check_kernels(self.names, self.json, self.target)


@dataclass(frozen=True)
class Kernels(Verb):
    """Look after the compiled kernels: list them, build them ahead, check them.

    They are built on first use and kept for each user, in the folder that SHIFTADD3D_CACHE names or in the platform's
    cache folder. SHIFTADD3D_TARGET chooses another instruction set than the best this CPU has.
    """

    action: Annotated[
        Annotated[ListKernels, tyro.conf.subcommand("list")]
        | Annotated[BuildKernels, tyro.conf.subcommand("build")]
        | Annotated[CheckKernels, tyro.conf.subcommand("check")],
        tyro.conf.arg(name=""),
    ]
    """What to do with them."""

    def run(self) -> None:
        """Do it."""
        self.action.run()


@dataclass(frozen=True)
class Bench(Verb):
    """Measure how fast parts of this project are on the machine at hand.

    kernels: time them against torch in float32, bfloat16 and int8, compiled and not.

    Everything that solves a problem takes turns; tables show speedups, times with quartiles, shares of what the machine
    does at best, and targets. Takes a quarter of an hour for each number of threads.
    """

    what: Annotated[Literal["kernels"], tyro.conf.Positional]
    """Which part."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    threads: str = "1"
    """Numbers of CPU threads to measure with, with commas between: 1,2."""
    groups: Annotated[tuple[str, ...], tyro.conf.arg(metavar="GROUP ...")] = ()
    """What to measure: matshift, matadd, mlp, moe, view-attention, ray-block, gather, gnt. If not set, everything."""
    json: JsonFile = None
    """Write everything measured to this JSON file, too."""

    def run(self) -> None:
        """Measure, print tables."""
        from shiftadd3d._report import write_json
        from shiftadd3d.profile.kernel_benchmark import measure, parse_threads, tables

        facts = measure(
            self.device, parse_threads(self.threads), self.groups, report=lambda line: print(line, flush=True)
        )
        for threads in dict.fromkeys(row["threads"] for row in facts["rows"]):
            for table in tables(facts, threads):
                print(f"\n{table}")
        if self.json is not None:
            write_json(self.json, facts)


@dataclass(frozen=True)
class MakeFactory(Verb):
    """Make up scenes to train across: varied objects, textures, lights and cameras, with true depths.

    Needs the extra `scenes` (`pip install 'shiftadd3d[scenes]'`). A scene depends on the seed, its number and --size
    alone. Scenes that are there stay, so that the same command goes on after Ctrl-C and a larger --count adds scenes.
    Each scene is a folder in nerfstudio's format; factory.json lists them, and pictures in contact-sheets show them.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write to: new, empty, or a factory with the same seed and size."""
    count: Annotated[int, tyro.conf.arg(metavar="N")]
    """How many scenes OUT shall hold."""
    seed: int = 0
    """Decides what the scenes show; the same seed gives the same scenes."""
    workers: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Processes that make scenes, one core and about 300 MB each."""
    size: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="W H")] = None
    """Width and height of all pictures. If not set, each scene draws its own: 96 to 252 pixels on the longer side,
    upright, square or wide."""

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
    """Find out where photos, or frames of a video, were taken, and write a scene to train on.

    Needs the extra `poses` (`pip install 'shiftadd3d[poses]'`), and neither COLMAP nor ffmpeg. The photos themselves
    stay as they are. After Ctrl-C the same command goes on. Every nerfstudio method trains on the scene.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PHOTOS")] = field(kw_only=True)
    """A folder of photos, 10 to 300 of one scene from different places, or a video file."""
    out: Annotated[Path, tyro.conf.arg(metavar="SCENE")] = field(kw_only=True)
    """Folder to write: new or empty."""
    json: JsonFile = None
    """Write what became of the photos to this JSON file, too."""

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
    """Count what models do and move, and what that takes in energy by three accounts, recipe by recipe.

    Named models have random weights. These change nothing but the expert of a mixture that a token goes to. All
    recipes are compared with the first.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """gnt-tiny, gnt, gnt-big, timm's names, such as deit_tiny_patch16_224 or pvt_v2_b0; or what was saved: folders of
    classifiers that `finetune` wrote, and folders or config.yml of nerfstudio runs (open only your own: reading one can
    run code). These are in their own recipe, beside mult, with the routers that they have."""
    recipes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RECIPE")] = (
        "mult",
        "add",
        "add+shift",
        "add+shift-attn+moe",
    )
    """What becomes of their layers: mult (nothing), add, add+shift-attn, add+shift, add+shift-attn+moe or moe."""
    accelerator: Annotated[Path | None, tyro.conf.arg(metavar="FILE.toml")] = None
    """Elements, buffer and energies of another accelerator; shiftadd3d/profile/accelerator.toml is the one to start
    from."""
    rays: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Rays in a batch of a GNT. If not set, those of a training step, or some 800 of a run's first test view."""
    latency: Annotated[tuple[Literal["eager", "frozen", "compiled"], ...] | None, tyro.conf.arg(metavar="FORM ...")] = (
        None
    )
    """Also time them here, as a whole and part by part: as they are (eager), as `freeze_` leaves them (frozen), and
    that as one executable (compiled), where it can be. If not set, the first two with --html, and nothing without."""
    quality: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE.json ...")] = ()
    """JSON files of evaluations (of `evaluate`, `eval-scenes` or ns-eval), to set quality against energy and latency;
    RECIPE=FILE.json or MODEL:RECIPE=FILE.json where a file does not say what it is of."""
    modules: bool = False
    """Show every module of every model, too."""
    html: Annotated[Path | None, tyro.conf.arg(metavar="FILE.html")] = None
    """Write a page with tables and charts to this file; it needs no network."""
    json: JsonFile = None
    """Write the same facts, module by module, to this JSON file, too."""

    def run(self) -> None:
        """Print the tables, write the files."""
        from shiftadd3d._claim import claimed

        if self.html is not None:
            need("--html", "matplotlib", extra="vision")

        if self.html is not None and self.json is not None and self.html.resolve() == self.json.resolve():
            raise UserError(f"--html and --json both name {self.html}: name two files")
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
            raise UserError(f"--rays is for GNTs and runs; {other.name} sees {other.setting}")
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
    if place.suffix in (".yml", ".yaml") or (len(place.parts) > 1 and ":" not in str(place)):  # timm has hf-hub:a/b
        raise UserError(f"{place}: no such file or folder; expected a config.yml, or a folder of a classifier or run")
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


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        args: The arguments after the program's name; `sys.argv` by default.

    Raises:
        SystemExit: With 0 after printing help, with 2 for wrong arguments.
    """
    args = sys.argv[1:] if args is None else list(args)
    app = tyro.extras.SubcommandApp()
    for name, verb_class in VERBS.items():
        app.command(name=name)(verb_class)
    if args[:1] == ["finetune"]:
        _let_presets_speak(app, args[1:])
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
