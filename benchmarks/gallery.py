"""The pictures of docs/results/gallery.md: test views that the networks of the package have never seen.

    python -m shiftadd3d.scenes.make --out STILL_LIFE --size 320 240 --spp 100 --rows 3 --columns 9 --tests 2
    python benchmarks/gallery.py draw --scene STILL_LIFE --view 0 --name table
    python benchmarks/gallery.py report

Only scenes that this project makes itself are drawn: photos belong to others.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from nerf import Trivial, find_scene_folder
from pretrain import untrained_pipeline
from reporting import (
    DATA,
    PICTURES,
    command_block,
    git_commit,
    machine_facts,
    machine_list,
    run_command,
    write_page,
    write_result,
)

if TYPE_CHECKING:
    from torch import Tensor

DIFFERENCE_TIMES = 4


@dataclass
class Draw:
    """Render one test view of a scene with both networks, and draw what there is to see."""

    scene: Annotated[str, tyro.conf.arg(metavar="SCENE")]
    """The embedded scene, or a folder."""
    name: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """What the picture is called."""
    view: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Which of its test views."""
    made_by: Annotated[str, tyro.conf.arg(metavar="COMMAND")] = ""
    """The command that made the scene, for the page."""

    def __call__(self) -> None:
        """Write the picture and its JSON file."""
        import torch

        from shiftadd3d._errors import UserError
        from shiftadd3d.nerf.model import image_metrics

        scene, folder, embedded = find_scene_folder(self.scene)
        psnr, rendered = {}, {}
        target = None
        for method in ("gnt-tiny", "shiftadd-gnt-tiny"):
            pipeline = untrained_pipeline(Trivial(scene=self.scene), folder, method)
            pipeline.eval()
            views: list[Any] = list(pipeline.datamanager.fixed_indices_eval_dataloader)
            if not 0 <= self.view < len(views):
                raise UserError(
                    f"--view {self.view}: {self.scene} has {len(views)} test views; expected 0 or more, less than that"
                )
            camera, batch = views[self.view]
            with torch.no_grad():
                outputs = pipeline.model.get_outputs_for_camera(camera=camera)
            target = batch["image"][..., :3].cpu()
            rendered[method] = outputs
            psnr[method] = round(image_metrics(outputs["rgb"].clamp(0.0, 1.0), target)["psnr"], 2)
        assert target is not None
        draw(target, rendered, PICTURES / f"gallery-{self.name}.jpg")
        words = ["--scene", scene if embedded else f"PATH/TO/{scene}", "--name", self.name, "--view", str(self.view)]
        write_result(
            DATA / f"gallery-{self.name}.json",
            {
                "name": self.name,
                "made_by": self.made_by,
                "size": [target.shape[1], target.shape[0]],
                "psnr": psnr,
                "command": f"python benchmarks/gallery.py draw {shlex.join(words)}",
                "commit": git_commit(),
                "machine": machine_facts(),
            },
        )


def draw(target: Tensor, rendered: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Two rows: target, dense and ShiftAdd; difference of the latter from the target, depth and routing."""
    import numpy as np
    from PIL import Image

    from shiftadd3d.nerf.render import picture

    ours = rendered["shiftadd-gnt-tiny"]
    shown = {
        "target": target,
        "gnt": rendered["gnt-tiny"]["rgb"],
        "rgb": ours["rgb"],
        "difference": (DIFFERENCE_TIMES * (ours["rgb"] - target).abs()).clamp(0.0, 1.0),
        "depth": ours["depth"],
        "routing": ours["routing"],
    }
    nearest, farthest = ours["depth"].flatten().quantile(ours["depth"].new_tensor([0.02, 0.98])).tolist()
    rows = [
        picture(shown, names, (nearest, farthest))
        for names in (("target", "gnt", "rgb"), ("difference", "depth", "routing"))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path, quality=90, optimize=True)
    print(f"wrote {path}, {path.stat().st_size / 1e3:.0f} kB")


@dataclass
class Report:
    """Make docs/results/gallery.md from the results."""

    def __call__(self) -> None:
        """Write the page."""
        write_page("gallery", lambda template: render_report(read_results(DATA), template))


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All drawings, the most faithful one first."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("gallery-*.json"))]
    return sorted(results, key=lambda facts: -facts["psnr"]["shiftadd-gnt-tiny"])


def render_report(results: list[dict[str, Any]], template: str) -> str:
    """The page: its template with pictures, commands and machines filled in."""
    parts = []
    for result in results:
        width, height = result["size"]
        dense, ours = result["psnr"]["gnt-tiny"], result["psnr"]["shiftadd-gnt-tiny"]
        name = result["name"]
        parts.append(
            f"## {name.replace('_', ' ').capitalize()}\n\n"
            f"{width} x {height} pixels. `gnt-tiny` {dense:.1f} dB, `shiftadd-gnt-tiny` {ours:.1f} dB.\n\n"
            f"[![{name}](pictures/gallery-{name}.jpg)](pictures/gallery-{name}.jpg)"
        )
    commands = [{"command": result["made_by"]} for result in results if result["made_by"]]
    filled = {
        "GALLERY": "\n\n".join(parts),
        "TIMES": str(DIFFERENCE_TIMES),
        "COMMANDS": command_block("gallery", [*commands, *results]),
        "MACHINES": machine_list(results),
    }
    for name, text in filled.items():
        template = template.replace("{{" + name + "}}", text)
    return template


def main() -> None:
    run_command({"draw": Draw, "report": Report}, __doc__)


if __name__ == "__main__":
    main()
