"""Render with a checkpoint of the original GNT code, then turn it into shifts and additions without training.

Usage: python examples/07_official_gnt.py model_720000.pth
"""

import sys

import torch

from shiftadd3d.models.gnt import Cameras, load_official_checkpoint, render_rays
from shiftadd3d.models.gnt.presets import gnt_recipe, may_change
from shiftadd3d.nn import freeze_, reparameterize_

if len(sys.argv) != 2:
    sys.exit("usage: python examples/07_official_gnt.py CHECKPOINT.pth")
model = load_official_checkpoint(sys.argv[1]).eval()  # only tensors are read from the file, no code is run
print(model.config)

# Four cameras in a row look along z at a wall of stripes, 3 units away. Put your photos and cameras here.
size, views = 32, 4
intrinsics = torch.tensor([[40.0, 0, 15.5], [0, 40, 15.5], [0, 0, 1]]).expand(views, 3, 3)
poses = torch.eye(4).repeat(views, 1, 1)
poses[:, 0, 3] = torch.linspace(-0.3, 0.3, views)
columns = (torch.arange(size) - 15.5) / 40 * 3
images = (torch.sin(8 * (columns + poses[:, :1, 3]))[:, None, :, None] * 0.5 + 0.5).expand(views, size, size, 3)

target = Cameras(intrinsics[:1], torch.eye(4)[None])
pixels = torch.cartesian_prod(torch.arange(12, 20), torch.arange(12, 20)).flip(1)


@torch.inference_mode()
def render() -> torch.Tensor:
    """[64, 3]."""
    cameras = Cameras(intrinsics, poses)
    return render_rays(model, images, cameras, target, pixels, near=2.0, far=4.0, num_samples=16)["rgb"]


dense = render()
reparameterize_(model, gnt_recipe("add+shift"), filter_fn=may_change, verbose=False)
freeze_(model, verbose=False)
# Round weights with `calibrate_` instead, or train: `shiftadd3d import-gnt` makes a run of the checkpoint.
print(f"mean change of colour by rounding alone: {(render() - dense).abs().mean():.4f}")
