"""Frozen networks: the same pictures as before, from kernels whose weights have been packed once."""

# Attributes of submodules, to which torch gives no types.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from warm import WORK, OpsOnWeights, work_inside

from shiftadd3d.kernels import numerics
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.kernel import KERNELS
from shiftadd3d.models.gnt import GNTModel
from shiftadd3d.models.gnt.frozen import FrozenRayTransformer, FrozenViewAttention
from shiftadd3d.models.gnt.transformer import FeedForward, RayTransformer, ViewAttention
from shiftadd3d.nn import FrozenModule, MoE, PackedShiftLinear, freeze_, recipe, reparameterize_

RAYS = 40
ALL = {
    "point_samples",
    "plane_sweep",
    "view_embedding",
    "color_blend",
    "view_attention",
    "ray_block",
    "position_layer",
}


def render(model: GNTModel, sources, num_samples: int = 6) -> dict[str, torch.Tensor]:
    origins = torch.tensor([0.0, 0.0, -4.0]).expand(RAYS, 3)
    directions = torch.cat(
        [0.3 * torch.rand(RAYS, 2, generator=torch.Generator().manual_seed(1)) - 0.15, torch.ones(RAYS, 1)], dim=-1
    )
    with torch.no_grad():
        return model(sources, origins, directions, 2.0, 6.0, num_samples)


def make(config, name: str, **changes) -> GNTModel:
    model = GNTModel(config(color_head=True, angle_spread=0.03, proposal_samples=12, **changes))
    for parameter in model.parameters():
        if not parameter.any():  # heads that start at zero would hide mistakes
            nn.init.normal_(parameter, std=0.1)
    reparameterize_(model, recipe(name, dwconv=3, latencies=(1.0, 1.0)), verbose=False)
    return model.eval()


def frozen(model: GNTModel) -> GNTModel:
    freeze_(model, verbose=False)
    return model


def assert_same_picture(found: dict, expected: dict, share: float = 0.9999) -> None:
    """As many pixels are the same: a code or a router on the brink may fall the other way on one ray in a while."""
    for key in ("rgb", "depth", "weights", "accumulation"):
        assert torch.isclose(found[key], expected[key], rtol=1e-3, atol=1e-3).double().mean() > share


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the kernels that have been asked for, in order."""
    asked: list[str] = []
    for kernel in KERNELS.values():
        original = kernel.function
        monkeypatch.setattr(kernel, "function", lambda o=original, n=kernel.name, **spec: asked.append(n) or o(**spec))
    return asked


@pytest.mark.parametrize("name", ["mult", "add", "add+shift", "add+shift-attn+moe", "moe"])
def test_a_frozen_network_renders_the_same_bits_in_plain_torch_and_the_same_pictures_with_kernels(
    config, views, name, calls
):
    model = make(config, name)
    sources = views(model)
    before = render(model, sources)
    report = freeze_(model, verbose=False)
    with numerics("twin"):
        assert torch.equal(render(model, sources)["rgb"], before["rgb"])
    assert not calls, "a network that is not frozen, or under twin, is plain torch"
    assert_same_picture(render(model, sources), before, share=0.9999 if name == "mult" else 0.95)
    # A mixture of linear layers cannot be fused; everything else is.
    inner = {"view_attention", "ray_block"} if name == "moe" else set()
    expected = ALL - inner | ({"position_layer"} if targets.current().has_fma else set())
    assert set(calls) & (ALL | {"position_layer"}) == expected
    assert len(report.left) == (4 if name == "moe" else 0)
    assert all("FrozenMoE, which runs as it is written" in reason for reason in report.left.values())


def test_every_part_becomes_its_frozen_form_and_the_state_dict_keeps_its_names(config):
    model = make(config, "add+shift")
    names = {name.removesuffix(".weight") for name in model.state_dict()}
    report = freeze_(model, verbose=False)
    kinds = [type(module).__name__ for module in model.modules() if isinstance(module, FrozenModule)]
    assert sorted(kinds) == sorted(
        ["FrozenViewAttention", "FrozenRayTransformer"] * 2
        + ["FrozenGNT", "FrozenPositionLayer", "FrozenImageColorHead", "FrozenPlaneSweepProposal", "FrozenPointLookUp"]
    )
    assert report.blocks == len(kinds) == 9 and "9 other blocks" in str(report)
    after = {name.removesuffix(".codes").removesuffix(".weight") for name in model.state_dict()}
    assert {name for name in after if not name.endswith(".offset")} == names
    assert not any("panel" in name for name in after)
    modules = dict(model.named_modules())
    assert freeze_(model, verbose=False).blocks == 0
    assert all(modules[name] is module for name, module in model.named_modules())


def packed_again(model: nn.Module) -> bool:
    """Whether all panels are those of the weights as they are."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "panel_" in name}
    for module in model.modules():
        if isinstance(module, FrozenModule):
            module.repack()
    return bool(before) and all(
        torch.equal(before[name], buffer) for name, buffer in model.named_buffers() if name in before
    )


@pytest.mark.parametrize("name", ["mult", "add+shift"])
def test_panels_follow_what_is_loaded_cast_copied_and_trained(config, views, name):
    torch.manual_seed(1)
    other = frozen(make(config, name))
    torch.manual_seed(2)
    model = frozen(make(config, name))
    sources = views(model)
    model.load_state_dict(other.state_dict())
    assert packed_again(model)
    assert torch.equal(render(model, sources)["rgb"], render(other, sources)["rgb"])
    assert packed_again(copy.deepcopy(model))

    attention = model.net_coarse.view_crosstrans[0].attn
    assert packed_again(model.bfloat16()) and attention.panel_row.dtype == torch.float32
    assert packed_again(model.double()) and attention.panel_row.dtype == torch.float32
    assert packed_again(model.float())

    model.train()
    with torch.no_grad():
        attention.out_fc.bias += 1.0
    model.eval()
    assert packed_again(model) and not torch.equal(
        attention.panel_out_bias, other.net_coarse.view_crosstrans[0].attn.panel_out_bias
    )


def test_a_network_without_values_gets_them_from_a_state_dict(config, views):
    trained = frozen(make(config, "add+shift"))
    with torch.device("meta"):
        model = make_empty(config)
    frozen(model).to_empty(device="cpu").load_state_dict(trained.state_dict())
    sources = views(trained)
    assert torch.equal(render(model, sources)["rgb"], render(trained, sources)["rgb"])


def make_empty(config) -> GNTModel:
    model = GNTModel(config(color_head=True, angle_spread=0.03, proposal_samples=12))
    reparameterize_(model, recipe("add+shift", dwconv=3), verbose=False)
    return model.eval()


def test_numbers_of_64_bits_are_computed_as_such(config, calls):
    model = frozen(make(config, "mult")).double()
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        out, _ = model.net_coarse.view_selftrans[0](x)
    assert out.dtype == torch.float64 and not calls


def test_training_and_gradients_run_through_the_layers(config, views, calls):
    model = make(config, "mult")
    rays = (torch.zeros(3, 3), torch.tensor([0.0, 0.0, 1.0]).expand(3, 3))
    for form in (model, frozen(copy.deepcopy(model))):
        form(views(form), *rays, 2.0, 6.0, 4)["rgb"].sum().backward()
        assert not calls
        assert all(p.grad is not None for p in form.net_coarse.view_crosstrans.parameters())


@pytest.mark.parametrize("freeze_first", [False, True])
def test_who_watches_a_layer_sees_what_goes_in(config, views, calls, freeze_first):
    model = make(config, "mult")
    sources = views(model)
    seen = []
    if freeze_first:
        freeze_(model, verbose=False)
    for block in (*model.net_coarse.view_crosstrans, *model.net_coarse.view_selftrans):
        block.attn.v_fc.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    if not freeze_first:
        report = freeze_(model)
        assert len(report.left) == 4 and "net_coarse.view_selftrans.1 stays as it is: a Linear in it has hooks" in str(
            report
        )
    render(model, sources)
    assert len(seen) == 4
    assert "view_attention" not in calls and "ray_block" not in calls and "color_blend" in calls


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
    before = render(model, sources)
    report = freeze_(model, verbose=False)
    assert len(report.left) == 2 and all("v_fc is a Doubled" in reason for reason in report.left.values())
    torch.testing.assert_close(render(model, sources)["rgb"], before["rgb"], rtol=1e-3, atol=1e-4)
    assert ("view_attention" if block is ViewAttention else "ray_block") not in calls


def test_a_block_of_a_class_derived_from_ours_keeps_what_it_does(config):
    class Other(ViewAttention):
        def forward(self, query, views, ray_diff, mask):
            return 2.0 * super().forward(query, views, ray_diff, mask)

    model = make(config, "mult")
    model.net_coarse.view_crosstrans[0].attn = Other(16, 0.0)
    freeze_(model, verbose=False)
    assert type(model.net_coarse.view_crosstrans[0].attn) is Other
    assert type(model.net_coarse.view_crosstrans[1].attn) is FrozenViewAttention


@pytest.mark.parametrize("inner", [False, True])
def test_a_feed_forward_network_of_another_kind_runs_apart_from_the_attention(config, views, calls, inner):
    class Other(FeedForward):
        def forward(self, x):
            return 2.0 * super().forward(x)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2.0 * super().forward(x)

    model = make(config, "mult")
    block = model.net_coarse.view_selftrans[0]
    if inner:
        block.ff.fc1 = Doubled(16, 64)
    else:
        block.ff = Other(16, 64, 0.0)
    model.eval()
    sources = views(model)
    before = render(model, sources)
    freeze_(model, verbose=False)
    frozen_block = model.net_coarse.view_selftrans[0]
    assert type(frozen_block) is FrozenRayTransformer and not frozen_block.has_perceptron
    assert_same_picture(render(model, sources), before)
    assert calls.count("ray_block") == 2


def test_mixtures_still_route_and_count_their_tokens(config, views):
    model = make(config, "add+shift-attn+moe")
    render(model, views(model))
    mixtures = [module for module in model.modules() if isinstance(module, MoE)]
    assert mixtures and all(sum(mixture.token_counts) == RAYS * 6 for mixture in mixtures)


def test_more_views_than_a_kernel_takes_go_through_torch(config, views, calls):
    model = frozen(make(config, "mult"))
    render(model, views(model, count=33), num_samples=2)
    assert "view_attention" not in calls and "ray_block" in calls


@pytest.mark.parametrize("name", ["mult", "add+shift", "add+shift-attn+moe"])
def test_a_warm_forward_pass_only_reads_its_weights(config, views, name, monkeypatch):
    # As gnt-tiny and shiftadd-gnt-tiny are, but for their feature network.
    model = frozen(make(config, name, width=32, canonical=True))
    with torch.no_grad():
        sources = views(model)
    render(model, sources)
    monkeypatch.setattr(PackedShiftLinear, "quantized_weight", lambda *_: pytest.fail("codes are decoded"))
    monkeypatch.setattr(FrozenModule, "repack", lambda *_: pytest.fail("weights are packed"))
    with OpsOnWeights(model) as ops:
        render(model, sources)
    # Norms and products; and a mixture's router.
    products = {"aten::native_layer_norm", "aten::t", "aten::addmm", "aten::mul", "aten::view"}
    assert {op for op in ops.on_weights if not op.startswith("shiftadd3d::")} <= products
    assert not ops.of_double

    # Inside the ops: they make room for what comes out, and copy no more than the places of the cameras.
    inside = work_inside(ALL, lambda: render(model, sources))
    assert any(event.name == "aten::empty" for event in inside)
    assert not WORK & {event.name for event in inside}
    copied = [event.input_shapes[0] for event in inside if event.name == "aten::copy_"]
    assert all(shape == [4, 3] for shape in copied)


@pytest.mark.parametrize("name", ["mult", "add+shift"])
def test_compilers_and_exports_see_through_it(config, views, name):
    net = frozen(make(config, name)).net_coarse
    attention, block = net.view_crosstrans[0].attn, net.view_selftrans[1]
    assert type(attention) is FrozenViewAttention and type(block) is FrozenRayTransformer
    inputs = torch.randn(5, 6, 16), torch.randn(5, 6, 4, 16), torch.randn(5, 6, 4, 4), torch.rand(5, 6, 4, 1) > 0.3
    with torch.no_grad():
        for module, arguments in (
            (attention, inputs),
            (block, inputs[:1]),
            (net.q_fcs[0], (inputs[0], torch.randn(5, 6, 3), torch.randn(5, 3))),
        ):
            expected = module(*arguments)
            torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments), expected)
            program = torch.export.export(module, arguments)
            assert any("shiftadd3d" in str(node.target) for node in program.graph.nodes)
            torch.testing.assert_close(program.module()(*arguments), expected)
