"""Round the weights of a trained model to powers of two with a few pictures and no labels, and see what that costs."""

import copy

import timm
import torch
from sklearn.datasets import load_digits

from shiftadd3d.nn import Recipe, calibrate_, reparameterize_

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # [1797, 1, 8, 8]
labels = torch.tensor(digits.target)
train, test = slice(0, 1400), slice(1400, None)

torch.manual_seed(0)
model = timm.create_model(
    "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=2, num_heads=2, num_classes=10
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(8):
    for batch in torch.randperm(1400).split(100):
        loss = torch.nn.functional.cross_entropy(model(images[train][batch]), labels[train][batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def accuracy(model: torch.nn.Module) -> float:
    """Top-1 on the pictures that were not trained on."""
    return (model.eval()(images[test]).argmax(1) == labels[test]).float().mean().item()


shifts = Recipe("shifts", attention_linear="shift", mlp="shift", other_linear="shift")
nearest, calibrated = copy.deepcopy(model), copy.deepcopy(model)
reparameterize_(nearest, shifts, verbose=False)
report = calibrate_(calibrated, [images[train][:256]], shifts, verbose=False)  # 256 pictures, no labels

print(f"trained: {accuracy(model):.1%}")
print(f"weights rounded to the nearest power of two: {accuracy(nearest):.1%}")
print(f"calibrated: {accuracy(calibrated):.1%}")
worst = max(report.layers, key=lambda layer: layer.error)
print(f"worst layer: {worst.name}, output error {worst.error:.1%} instead of {worst.nearest_error:.1%}")
