"""Make one executable of a frozen model, and call it like the model.

TVM compiles every layer, and what lies between them, into one program, which the cache of kernels keeps.
"""

import timm
import torch

import shiftadd3d
from shiftadd3d.nn import freeze_

torch.manual_seed(0)
# A small DeiT of shifts and additions; `shiftadd3d.load` gives a trained one.
model = timm.create_model(
    "shiftadd_deit_tiny_patch16_224", recipe="add+shift", img_size=32, patch_size=8, depth=2, num_classes=10
).eval()
freeze_(model, verbose=False)

pictures = torch.randn(4, 3, 32, 32)
compiled = shiftadd3d.compile(model, pictures[:1], numerics="exact")  # batches may be of any size
with torch.inference_mode():
    difference = (compiled(pictures) - model(pictures)).abs().max()
print(f"compiled: {compiled.reason is None}, largest difference {difference:.1e}")
