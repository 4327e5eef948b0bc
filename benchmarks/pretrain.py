"""The weights that come with the package, and the page docs/results/pretraining.md.

    shiftadd3d scenes make-factory FACTORY --count 134 --seed 1
    python benchmarks/pretrain.py train --factory FACTORY      # hours; goes on where it stopped
    python benchmarks/pretrain.py pack --factory FACTORY       # into shiftadd3d/nerf/weights
    python benchmarks/pretrain.py sharpen                      # once, on top
    python benchmarks/pretrain.py evaluate --scene fern --method shiftadd-gnt-tiny
    python benchmarks/pretrain.py held-out --factory HELD_OUT --method shiftadd-gnt-tiny
    python benchmarks/pretrain.py report

Nothing but scenes that this project makes itself goes into the weights.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from nerf import SCENES_VARIABLE, Trivial, evaluate, find_scene_folder, seed_everything
from reporting import (
    DATA,
    OUTPUTS,
    PICTURES,
    REPOSITORY,
    command_block,
    git_commit,
    machine_facts,
    machine_list,
    markdown_table,
    run_command,
    write_page,
    write_result,
)

if TYPE_CHECKING:
    from shiftadd3d.models.gnt import GNTModel
    from shiftadd3d.nerf.pipeline import GNTPipeline

WEIGHTS = REPOSITORY / "shiftadd3d" / "nerf" / "weights"
RUN = OUTPUTS / "pretraining"
BATCHES = 48
"""Steps that packed weights are calibrated on."""
ATTENTION_STEPS = 600
"""Steps of training for each additive attention, on what it sees in these."""

Method = Literal["gnt-tiny", "shiftadd-gnt-tiny"]
Weights = Literal["shipped", "random"]


def checkpoint_folder(run: Path) -> Path:
    """Where ns-train leaves the run's checkpoints."""
    return run / "still_life" / "gnt-tiny" / "run" / "nerfstudio_models"


@dataclass
class Train:
    """Train gnt-tiny across the scenes of a factory, by ns-train, which keeps a checkpoint every 250 steps."""

    factory: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Made by `shiftadd3d scenes make-factory`."""
    steps: Annotated[int, tyro.conf.arg(metavar="N")] = 5000
    """Steps of one scene and 512 rays each; the optimizer moves at every second one."""
    start: Literal["none", "pretrained"] = "none"
    """`pretrained`: go on from the weights that are in the package now."""
    rate: Annotated[float, tyro.conf.arg(metavar="RATE")] = 2e-3
    """Peak of the learning rate."""
    run: Annotated[Path, tyro.conf.arg(metavar="DIR")] = RUN
    """Where checkpoints go."""

    def __call__(self) -> None:
        """Become ns-train."""
        from shiftadd3d.scenes import scene_path

        checkpoints = checkpoint_folder(self.run)
        go_on = ["--load-dir", str(checkpoints)] if any(checkpoints.glob("step-*.ckpt")) else []
        adam = [
            word
            for group in ("transformers", "feature-net")
            for option, value in (("max-norm", "1.0"), ("lr", str(self.rate)))
            for word in (f"--optimizers.{group}.optimizer.{option}", value)
        ]
        words = [
            *("ns-train", "gnt-tiny", "--vis", "tensorboard", "--max-num-iterations", str(self.steps)),
            *("--average-weights", "0.998", "--pipeline.model.color-error", "rmse"),
            *("--pipeline.model.depth-loss-mult", "0.02", "--pipeline.model.lpips", "False"),
            *("--gradient-accumulation-steps", "transformers", "2", "feature_net", "2", *adam),
            *("--steps-per-save", "250", "--steps-per-eval-image", "1000"),
            *("--pipeline.datamanager.train-scenes", str(self.factory), "--pipeline.warm-start", self.start),
            *("--output-dir", str(self.run), "--experiment-name", "still_life", "--timestamp", "run"),
            *(*go_on, "--data", str(scene_path())),
        ]
        print(shlex.join(words))
        os.execvp(Path(sys.executable).with_name("ns-train"), words)


@dataclass
class Pack:
    """Write the newest checkpoint as weights that come with the package: dense in bfloat16, and packed to shifts."""

    factory: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Scenes to calibrate the shifts on."""
    run: Annotated[Path, tyro.conf.arg(metavar="DIR")] = RUN
    """Where `train` left its checkpoints."""
    again: bool = False
    """Pack the dense weights that are in the package now, instead of a checkpoint. They stay as they are."""

    def __call__(self) -> None:
        """Write both files."""
        import torch
        from safetensors.torch import save_file

        from shiftadd3d.configs.methods import gnt_tiny, shiftadd_gnt_tiny
        from shiftadd3d.models.gnt import GNTModel
        from shiftadd3d.models.gnt.presets import may_change
        from shiftadd3d.nerf.checkpoint import latest_checkpoint, network_of, read_checkpoint
        from shiftadd3d.nerf.model import method_recipe
        from shiftadd3d.nerf.weights import pretrained_file, read_weights
        from shiftadd3d.nn import calibrate_, freeze_

        seed_everything(0)
        if self.again:
            dense, facts = read_weights(pretrained_file("gnt-tiny"))
        else:
            state = read_checkpoint(latest_checkpoint(checkpoint_folder(self.run)))
            dense = network_of(state["pipeline"])
            facts = {"steps": str(state["step"] + 1), "license": "Apache-2.0"}
            WEIGHTS.mkdir(exist_ok=True)
            halves = {name: value.to(torch.bfloat16).contiguous() for name, value in dense.items()}
            save_file(halves, WEIGHTS / "gnt-tiny.safetensors", {**facts, "method": "gnt-tiny"})

        config: Any = shiftadd_gnt_tiny.config
        gnt = GNTModel(gnt_tiny.config.pipeline.model.gnt).eval()  # type: ignore[attr-defined]
        gnt.load_state_dict(dense)
        settings = config.pipeline.model
        chosen = method_recipe(settings, latencies=(1.0, 1.0))
        report = calibrate_(
            gnt,
            calibration_batches(self.factory, gnt),
            chosen,
            forward=render_batch,
            filter_fn=may_change,
            attention_steps=ATTENTION_STEPS,
            verbose=False,
        )
        freeze_(gnt, verbose=False)
        # What is left of float weights are the feature network's convolutions.
        packed = {
            name: (value.to(torch.bfloat16) if name.startswith("feature_net.") else value).contiguous()
            for name, value in gnt.state_dict().items()
        }
        facts = {**facts, "method": "shiftadd-gnt-tiny", "packed": "true"}
        save_file(packed, WEIGHTS / "shiftadd-gnt-tiny.safetensors", facts)
        for file in sorted(WEIGHTS.glob("*.safetensors")):
            print(f"{file.relative_to(REPOSITORY)}: {file.stat().st_size / 1e6:.2f} MB")
        print(f"{len(report.layers)} layers of shifts, calibrated on {BATCHES} steps")


@dataclass
class Sharpen:
    """Have both files' colour heads prefer the views nearest to the target more strongly."""

    by: float = 1.5
    """What the scale of angles is multiplied by."""

    def __call__(self) -> None:
        """Write both files again."""
        from safetensors.torch import save_file

        from shiftadd3d.nerf.weights import pretrained_file, pretrained_methods, read_weights

        for method in pretrained_methods():
            tensors, facts = read_weights(pretrained_file(method))
            tensors["net_coarse.color_head.log_angle_scale"] += math.log(self.by)
            save_file(tensors, pretrained_file(method), facts)


def calibration_batches(factory: Path, gnt: GNTModel) -> list[tuple[Any, ...]]:
    """Steps of training across scenes: what `render_batch` needs of each. The feature network stays as it is: its maps
    are computed once."""
    import torch

    from shiftadd3d.configs.methods import gnt_tiny
    from shiftadd3d.models.gnt import Cameras
    from shiftadd3d.scenes import scene_path

    config: Any = copy.deepcopy(gnt_tiny.config.pipeline.datamanager)  # type: ignore[attr-defined]
    config.data, config.train_scenes, config.train_num_rays_per_batch = scene_path(), (factory,), 256
    manager = config.setup(device="cpu", test_mode="val")
    batches = []
    for step in range(BATCHES):
        rays, _ = manager.next_train(step)
        views, near, far = manager.drawn.views, manager.drawn.near, manager.drawn.far
        with torch.no_grad():
            cameras = Cameras(views.intrinsics, views.camera_to_world)
            sources = gnt.encode(views.images, cameras, views.valid, views.empty)
        batches.append((sources, rays.origins, rays.directions * rays.metadata["directions_norm"], near, far))
    return batches


def render_batch(gnt: GNTModel, batch: tuple[Any, ...]) -> Any:
    """Render the rays of a step."""
    sources, origins, directions, near, far = batch
    return gnt(sources, origins, directions, near, far, 8, inverse_depth=True)["rgb"]


def untrained_pipeline(on: Trivial, folder: Path, method: Method, weights: Weights = "shipped") -> GNTPipeline:
    """A method's pipeline on a scene, with weights that have not seen it."""
    import torch

    from shiftadd3d.nerf.pretrained import load_pretrained
    from shiftadd3d.nerf.weights import pretrained_file

    config: Any = on._config(method, folder)
    config.pipeline.model.lpips, config.pipeline.warm_start = False, None
    seed_everything(0)
    pipeline = config.pipeline.setup(device="cpu", test_mode="test")
    pipeline.model.near_far.copy_(torch.tensor(pipeline.datamanager.near_far))
    if weights == "shipped":
        load_pretrained(pipeline.model, pretrained_file(method))
    return pipeline


@dataclass
class Evaluate:
    """How well the weights render a scene that they have not seen, without any training on it."""

    scene: Annotated[str, tyro.conf.arg(metavar="SCENE")]
    """The embedded scene, a folder, or a folder under $SHIFTADD3D_SCENES."""
    method: Method = "shiftadd-gnt-tiny"
    """Whose weights."""
    weights: Weights = "shipped"
    """`random`: the network as it is initialised."""
    max_side: Annotated[int, tyro.conf.arg(metavar="PIXELS")] = 252
    """Longest side that pictures are shrunk to."""

    def __call__(self) -> None:
        """Render the test views, as `benchmarks/nerf.py` does after training."""
        name, folder, embedded = find_scene_folder(self.scene)
        on = Trivial(scene=self.scene, max_side=None if embedded else self.max_side)
        pipeline = untrained_pipeline(on, folder, self.method, self.weights)
        shown = PICTURES if self.weights == "shipped" else OUTPUTS  # the page has no pictures of random weights
        quality = evaluate(pipeline, shown / f"untrained-{name}-{self.method}.png")
        words = ["--scene", name, "--method", self.method, "--weights", self.weights]
        prefix = "" if embedded else f"{SCENES_VARIABLE}=... "
        write_result(
            DATA / f"untrained-{name}-{self.method}-{self.weights}.json",
            {
                "kind": "untrained",
                "scene": name,
                "method": self.method,
                "weights": self.weights,
                "command": f"{prefix}python benchmarks/pretrain.py evaluate {shlex.join(words)}",
                "commit": git_commit(),
                "machine": machine_facts(),
                **quality,
            },
        )


@dataclass
class HeldOut:
    """How well the weights render made-up scenes that are not among those trained on, the mean over all."""

    factory: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Made by `shiftadd3d scenes make-factory`, with another seed than the training scenes."""
    method: Method = "shiftadd-gnt-tiny"
    """Whose weights."""
    weights: Weights = "shipped"
    """`random`: the network as it is initialised."""

    def __call__(self) -> None:
        """Render the test views of each scene."""
        import statistics

        from nerfstudio.configs.method_configs import all_methods

        from shiftadd3d.nerf.dataparsers import AutoDataParserConfig
        from shiftadd3d.nerf.eval_scenes import scene_quality
        from shiftadd3d.nerf.pretrained import load_pretrained, scene_pipeline
        from shiftadd3d.nerf.scene_mixture import list_scenes
        from shiftadd3d.nerf.weights import pretrained_file
        from shiftadd3d.scenes.factory import open_factory

        commit, factory = git_commit(), open_factory(self.factory)
        rows = []
        for scene in list_scenes([self.factory], "--factory"):
            seed_everything(0)
            pipeline = scene_pipeline(all_methods[self.method], AutoDataParserConfig(data=scene.path))
            if self.weights == "shipped":
                load_pretrained(pipeline.model, pretrained_file(self.method))
            rows.append(scene_quality(scene.path.name, pipeline))
            print(f"{rows[-1].scene}: {rows[-1].psnr:.2f} dB", flush=True)
        words = ["--factory", "HELD_OUT", "--method", self.method, "--weights", self.weights]
        write_result(
            DATA / f"held-out-{self.method}-{self.weights}.json",
            {
                "kind": "held-out",
                "seed": factory.seed,
                "method": self.method,
                "weights": self.weights,
                "scenes": {
                    row.scene: {"psnr": row.psnr, "ssim": row.ssim, "nearest": row.nearest_psnr} for row in rows
                },
                "psnr": statistics.fmean(row.psnr for row in rows),
                "ssim": statistics.fmean(row.ssim for row in rows),
                "nearest_psnr": statistics.fmean(row.nearest_psnr for row in rows),
                "command": f"python benchmarks/pretrain.py held-out {shlex.join(words)}",
                "commit": commit,
                "machine": machine_facts(),
            },
        )


@dataclass
class Report:
    """Make docs/results/pretraining.md from the results."""

    def __call__(self) -> None:
        """Write the page."""
        paths = [*sorted(DATA.glob("untrained-*.json")), *sorted(DATA.glob("held-out-*.json"))]
        results = [json.loads(path.read_text()) for path in paths]
        write_page("pretraining", lambda template: render_report(results, template))


def render_report(results: list[dict[str, Any]], template: str) -> str:
    """The page: its template with the tables filled in."""
    measured, held_out = results, [result for result in results if result["kind"] == "held-out"]
    results = [result for result in results if result["kind"] == "untrained"]
    columns = [("gnt-tiny", "random"), ("gnt-tiny", "shipped"), ("shiftadd-gnt-tiny", "shipped")]
    scenes = sorted({result["scene"] for result in results})
    rows = []
    for scene in scenes:
        row = [scene]
        for method, weights in columns:
            found = [r for r in results if (r["scene"], r["method"], r["weights"]) == (scene, method, weights)]
            row.append(f"{found[0]['psnr']:.2f} / {found[0]['ssim']:.3f}" if found else "")
        rows.append(row)
    header = ["scene", "gnt-tiny as initialised", "gnt-tiny", "shiftadd-gnt-tiny, packed"]
    pictures = sorted({f"untrained-{r['scene']}-{r['method']}.png" for r in results if r["weights"] == "shipped"})
    shown = "\n\n".join(f"![{name}](pictures/{name})" for name in pictures if (PICTURES / name).is_file())
    filled = {
        "QUALITY": markdown_table(header, rows),
        "HELD_OUT": held_out_table(held_out),
        "PICTURES": shown,
        "COMMANDS": command_block("pretrain", measured),
        "MACHINES": machine_list(measured),
    }
    for name, text in filled.items():
        template = template.replace("{{" + name + "}}", text)
    return template


def held_out_table(results: list[dict[str, Any]]) -> str:
    """Rows: networks, the one with random weights first."""
    rows = [
        [
            f"`{result['method']}`" + ", as initialised" * (result["weights"] == "random"),
            str(len(result["scenes"])),
            f"{result['psnr']:.2f} / {result['ssim']:.3f}",
        ]
        for result in sorted(results, key=lambda result: (result["weights"] != "random", result["method"]))
    ]
    if results:
        nearest = sum(scene["nearest"] for scene in results[0]["scenes"].values()) / len(results[0]["scenes"])
        rows.insert(0, ["nearest source view", str(len(results[0]["scenes"])), f"{nearest:.2f}"])
    return markdown_table(["network", "scenes", "PSNR in dB / SSIM, mean over scenes"], rows)


def main() -> None:
    run_command(
        {"train": Train, "pack": Pack, "sharpen": Sharpen, "evaluate": Evaluate, "held-out": HeldOut, "report": Report},
        __doc__,
    )


if __name__ == "__main__":
    main()
