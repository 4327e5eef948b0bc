"""Turn a timm model into shifts, additions and mixtures of experts; train a step; pack it for inference.

Usage: python examples/01_timm_model.py [name of a timm model]
"""

import sys

import timm
import torch

from shiftadd3d.nn import collect_moe_losses, count_operations, freeze_, reparameterize_

name = sys.argv[1] if len(sys.argv) > 1 else "deit_tiny_patch16_224"
model = timm.create_model(name, num_classes=10)  # pretrained=True downloads timm's weights
images = torch.randn(2, *model.pretrained_cfg["input_size"])
labels = torch.tensor([3, 7])
dense = count_operations(model.eval(), images)

# In place. Prints a table of what became what; what is left alone is listed, with the reason.
reparameterize_(model, "add+shift-attn+moe")

# It trains like any model. Mixtures add the loss that balances their experts.
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
loss = torch.nn.functional.cross_entropy(model(images), labels) + 0.01 * collect_moe_losses(model)
loss.backward()
optimizer.step()

# For inference: four bits a weight, and kernels.
freeze_(model.eval(), verbose=False)
with torch.inference_mode():
    logits = model(images)
cheap = count_operations(model, images)
print(f"{cheap.multiplications_removed(dense):.0%} of the multiplications are gone")
print(f"{cheap.bytes / dense.bytes:.0%} of the bytes are left; logits {tuple(logits.shape)}")
