"""Turn a vision transformer of Hugging Face's transformers into shifts and additions.

Its attention returns a pair, so a small adapter stands between it and ours. Nothing is downloaded: weights are random.
With the network, `ViTForImageClassification.from_pretrained(...)` works just as well.
"""

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.modeling_vit import ViTAttention, ViTMLP

from shiftadd3d.nn import AddAttention, freeze_, register_attention, register_mlp, reparameterize_


class AdditiveViTAttention(nn.Module):
    """AddAttention with the arguments and results of transformers' attention."""

    def __init__(self, attention: AddAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_) -> tuple[Tensor, None]:
        assert attention_mask is None, "images have no padding"
        return self.attention(hidden_states), None


def additive(attention: ViTAttention, recipe) -> nn.Module:
    """Same projections, other products."""
    projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    layer = AddAttention.from_projections(*projections, attention.num_attention_heads, **recipe.add_options())
    return AdditiveViTAttention(layer)


register_attention(ViTAttention, additive)
register_mlp(ViTMLP)

config = ViTConfig(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8
)
model = ViTForImageClassification(config).eval()
report = reparameterize_(model, "add+shift")
print(f"{len(report.layers)} layers replaced")

freeze_(model, verbose=False)
with torch.inference_mode():
    print(model(pixel_values=torch.randn(2, 3, 32, 32)).logits)
