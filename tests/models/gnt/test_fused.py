"""Rendering with fused kernels: the same pictures as without, and layers that want to run themselves do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shiftadd3d.kernels import numerics
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.kernel import KERNELS
from shiftadd3d.models.gnt import GNTModel
from shiftadd3d.models.gnt.transformer import RayTransformer, ViewAttention
from shiftadd3d.nn import MoE, freeze_, recipe, reparameterize_

RAYS = 40


def render(model: GNTModel, sources, num_samples: int = 6) -> dict[str, torch.Tensor]:
    origins = torch.tensor([0.0, 0.0, -4.0]).expand(RAYS, 3)
    directions = torch.cat(
        [0.3 * torch.rand(RAYS, 2, generator=torch.Generator().manual_seed(1)) - 0.15, torch.ones(RAYS, 1)], dim=-1
    )
    with torch.no_grad():
        return model(sources, origins, directions, 2.0, 6.0, num_samples)


def make(config, name: str, **changes) -> GNTModel:
    model = GNTModel(config(color_head=True, proposal_samples=12, **changes))
    for parameter in model.parameters():
        if not parameter.any():  # heads that start at zero would hide mistakes
            nn.init.normal_(parameter, std=0.1)
    reparameterize_(model, recipe(name, dwconv=3, latencies=(1.0, 1.0)), verbose=False)
    return model.eval()


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the kernels that have been asked for, in order."""
    asked: list[str] = []
    for kernel in KERNELS.values():
        original = kernel.function
        monkeypatch.setattr(kernel, "function", lambda o=original, n=kernel.name, **spec: asked.append(n) or o(**spec))
    return asked


@pytest.mark.parametrize("name", ["mult", "add", "add+shift", "add+shift-attn+moe", "moe"])
def test_pictures_are_the_same_with_and_without_kernels(config, views, name, calls):
    model = make(config, name)
    sources = views(model)
    with numerics("twin"):
        expected = render(model, sources)
    assert not calls
    out = render(model, sources)
    # A mixture of linear layers cannot be fused; everything else is.
    inner = set() if name == "moe" else {"view_attention", "ray_block"}
    always = {"point_samples", "plane_sweep", "view_embedding", "color_blend"}
    if targets.current().has_fma:
        always.add("position_layer")
    assert set(calls) == inner | always
    for key in ("rgb", "depth", "weights", "accumulation"):
        # A code or a router on the brink may fall the other way on one ray in a while.
        close = torch.isclose(out[key], expected[key], rtol=1e-3, atol=1e-3).double().mean()
        assert close > (0.9999 if name == "mult" else 0.95)


def test_frozen_models_render_the_same_bits_in_plain_torch_and_the_same_pictures_with_kernels(config, views):
    model = make(config, "add+shift")
    sources = views(model)
    with numerics("twin"):
        before = render(model, sources)["rgb"]
        freeze_(model, verbose=False)
        assert torch.equal(render(model, sources)["rgb"], before)
    # Packed perceptrons become a kernel, which sums in an order of its own. A code on the brink may fall the other way.
    close = torch.isclose(render(model, sources)["rgb"], before, rtol=1e-3, atol=1e-3).double().mean()
    assert close > 0.95


def test_training_and_gradients_run_through_the_layers(config, views, calls):
    model = make(config, "mult")
    sources = views(model)
    rays = (torch.zeros(3, 3), torch.tensor([0.0, 0.0, 1.0]).expand(3, 3))
    model(sources, *rays, 2.0, 6.0, 4)["rgb"].sum().backward()
    assert not calls
    assert all(p.grad is not None for p in model.net_coarse.view_crosstrans.parameters())


def test_who_watches_a_layer_sees_what_goes_in(config, views, calls):
    model = make(config, "mult")
    sources = views(model)
    seen = []
    for block in (*model.net_coarse.view_crosstrans, *model.net_coarse.view_selftrans):
        block.attn.v_fc.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    render(model, sources)
    assert len(seen) == 4
    assert "view_attention" not in calls and "ray_block" not in calls


@pytest.mark.parametrize("block", [ViewAttention, RayTransformer])
def test_a_layer_of_another_kind_runs_as_it_is_written(block, config, views, calls):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2.0 * super().forward(x)

    model = make(config, "mult")
    for module in model.modules():
        if isinstance(module, block):
            attention = module if block is ViewAttention else module.attn
            other = Doubled(16, 16, bias=False).eval()
            other.load_state_dict(attention.v_fc.state_dict())
            attention.v_fc = other
    sources = views(model)
    out = render(model, sources)
    with numerics("twin"):
        torch.testing.assert_close(out["rgb"], render(model, sources)["rgb"], rtol=1e-3, atol=1e-4)
    assert ("view_attention" if block is ViewAttention else "ray_block") not in calls


def test_mixtures_still_route_and_count_their_tokens(config, views):
    model = make(config, "add+shift-attn+moe")
    render(model, views(model))
    mixtures = [module for module in model.modules() if isinstance(module, MoE)]
    assert mixtures and all(sum(mixture.token_counts) == RAYS * 6 for mixture in mixtures)


def test_more_views_than_a_kernel_takes_go_through_torch(config, views, calls):
    model = make(config, "mult")
    render(model, views(model, count=33), num_samples=2)
    assert "view_attention" not in calls and "ray_block" in calls
