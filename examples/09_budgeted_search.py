"""Find a recipe that keeps to a budget: which layers of a model can afford shifts, and of how many bits.

The budget is energy here, as a share of the model's; costs="latency" makes it time on this machine.
"""

import copy

import timm
import torch

from shiftadd3d.nn import Recipe, Rule, calibrate_, count_operations, sensitivity

torch.manual_seed(0)
model = timm.create_model(
    "deit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10
).eval()
batches = [torch.randn(8, 3, 32, 32)]  # in earnest: a few hundred inputs of the training set

# Every layer is changed alone and calibrated; how much do the outputs change, and how much is saved?
candidates = (Rule("*", "shift", bits=4), Rule("*", "shift", bits=4, terms=2))
measured = sensitivity(model, batches, candidates, base=Recipe(exclude=("head",)), verbose=False)

for budget in (0.8, 0.5, 0.3):
    choice = measured.best_recipe(budget)
    cheaper = copy.deepcopy(model)
    calibrate_(cheaper, batches, choice.recipe, verbose=False)
    share = count_operations(cheaper, batches[0]).cost() / measured.float_cost
    print(f"budget {budget:.0%}: {len(choice.recipe.rules)} layers change, estimated error {choice.error:.1%}")
    print(f"   counted afterwards: {share:.0%} of the energy")
