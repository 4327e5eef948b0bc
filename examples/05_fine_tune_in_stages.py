"""Fine-tune a classifier in the paper's stages from Python: dense, then additions, then shifts and mixtures of experts.

Usage: python examples/05_fine_tune_in_stages.py [epochs of each stage]
"""

import sys
from dataclasses import replace

from rich.console import Console

from shiftadd3d import load
from shiftadd3d.configs.classification import PRESETS
from shiftadd3d.nn import freeze_
from shiftadd3d.vision.finetune import finetune

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
preset = PRESETS["digits"]  # scikit-learn's hand-written digits: nothing to download
stages = {f"stage{i}": replace(getattr(preset, f"stage{i}"), epochs=epochs) for i in range(3)}

# data=Path("pictures") trains on class folders of your own; PRESETS["laptop"] starts from timm's pretrained weights.
result = finetune(replace(preset, recipe="add+shift-attn+moe", name="digits-example", **stages), console=Console())

for stage in result.stages:
    print(f"{stage.name}: top-1 {stage.metrics.top1:.1%}, saved in {stage.best}")

model = load(result.stages[-1].best)
print(freeze_(model, verbose=False))
