"""Turn a transformer of one's own into shifts and additions, layer by layer as one likes."""

import torch
from torch import Tensor, nn

from shiftadd3d.nn import AddAttention, Rule, recipe, register_attention, reparameterize_


class Attention(nn.Module):
    """Nothing but torch."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


def additive(attention: Attention, recipe) -> nn.Module:
    """What an attention becomes where the recipe says "add"."""
    projections = attention.to_q, attention.to_k, attention.to_v, attention.to_out
    return AddAttention.from_projections(*projections, attention.heads, **recipe.add_options())


register_attention(Attention, additive)

model = nn.Sequential(nn.Linear(8, 32), Attention(32, 4), nn.LayerNorm(32), Attention(32, 4), nn.Linear(32, 2))
mine = recipe(
    "add+shift",
    rules=(
        Rule("3", "keep"),  # the second attention stays as it is,
        Rule("3.to_out", "shift", bits=6),  # but for its last layer, which gets finer weights
        Rule("0", "shift", terms=2),  # the embedding becomes a sum of two powers of two
    ),
)
print(reparameterize_(model, mine, verbose=False))
print(model(torch.randn(1, 5, 8)).shape)
