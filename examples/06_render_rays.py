"""Render a view of a scene from its nearest photos, with the weights that come with the package and no nerfstudio.

Usage: python examples/06_render_rays.py [view.png]
"""

import json
import sys

import numpy as np
import torch
from PIL import Image

from shiftadd3d.models.gnt import Cameras, render_rays
from shiftadd3d.nerf.weights import load_network
from shiftadd3d.scenes import scene_path

scene = scene_path("still_life")
facts = json.loads((scene / "transforms.json").read_text())
poses = {frame["file_path"]: torch.tensor(frame["transform_matrix"]) for frame in facts["frames"]}


def picture(name: str) -> torch.Tensor:
    """[H, W, 3], 0..1."""
    return torch.from_numpy(np.asarray(Image.open(scene / name).convert("RGB")) / np.float32(255))


# The file follows OpenGL (y up, z backward) and puts the top left pixel's centre at (0.5, 0.5); render_rays follows
# OpenCV (y down, z forward) and puts it at (0, 0).
intrinsics = torch.tensor(
    [[facts["fl_x"], 0, facts["cx"] - 0.5], [0, facts["fl_y"], facts["cy"] - 0.5], [0, 0, 1]], dtype=torch.float32
)


def camera(names: list[str]) -> Cameras:
    """The cameras of these pictures."""
    opencv = torch.stack([poses[name] for name in names]) * torch.tensor([1.0, -1.0, -1.0, 1.0])
    return Cameras(intrinsics.expand(len(names), 3, 3), opencv)


target = facts["test_filenames"][0]
nearest = sorted(facts["train_filenames"], key=lambda name: float((poses[name] - poses[target])[:3, 3].norm()))[:6]
width, height = facts["w"], facts["h"]
pixels = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(1)  # (x, y), row by row

network = load_network("shiftadd-gnt-tiny")
near, far = facts["shiftadd3d"]["near"], facts["shiftadd3d"]["far"]
with torch.inference_mode():
    sources = torch.stack([picture(name) for name in nearest])
    out = render_rays(network, sources, camera(nearest), camera([target]), pixels, near, far, 8, inverse_depth=True)
rgb = out["rgb"].clamp(0, 1).reshape(height, width, 3)

path = sys.argv[1] if len(sys.argv) > 1 else "view.png"
Image.fromarray((rgb * 255).round().byte().numpy()).save(path)
error = (rgb - picture(target)).square().mean()
print(f"{path}: {width} x {height} pixels, PSNR {-10 * error.log10():.2f} dB")
print("This is one held-out view; the table in the README has the mean of all of them.")
