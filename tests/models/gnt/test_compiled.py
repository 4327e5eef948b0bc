"""A frozen GNT as programs: the same pictures, and what is refused."""

# Attributes of submodules, to which torch gives no types.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import shiftadd3d
from shiftadd3d import UserError
from shiftadd3d.kernels import numerics
from shiftadd3d.kernels.pack.shift import panel_form
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.kernel import KERNELS
from shiftadd3d.kernels.runtime.targets import current
from shiftadd3d.kernels.whole import background, executable
from shiftadd3d.kernels.whole.gnt.blocks import ViewBlockSpec
from shiftadd3d.kernels.whole.gnt.perceptrons import PerceptronsSpec
from shiftadd3d.kernels.whole.gnt.rays import ViewsSpec
from shiftadd3d.models.gnt import GNTModel, SourceViews
from shiftadd3d.models.gnt.compiled import programs_of
from shiftadd3d.models.gnt.projection import Silhouettes
from shiftadd3d.nn import FrozenMoE, freeze_, recipe, reparameterize_

pytest.importorskip("tvm")

RAYS = 40


def render(model: GNTModel, sources: SourceViews, rays: int = RAYS, **options) -> dict:
    origins = torch.tensor([0.0, 0.0, -4.0]).expand(rays, 3)
    aside = 0.3 * torch.rand(rays, 2, generator=torch.Generator().manual_seed(1)) - 0.15
    directions = torch.cat([aside, torch.ones(rays, 1)], dim=-1)
    with torch.no_grad():
        return model(sources, origins, directions, 2.0, 6.0, 6, **options)


def make(config, name: str, other_linear: str = "mult", **changes) -> GNTModel:
    model = GNTModel(
        config(
            **{"color_head": True, "angle_spread": 0.03, "proposal_samples": 12, "canonical": True, "width": 32}
            | changes
        )
    )
    for parameter in model.parameters():
        if not parameter.any():  # heads that start at zero would hide mistakes
            nn.init.normal_(parameter, std=0.1)
    reparameterize_(model, recipe(name, dwconv=3, other_linear=other_linear, latencies=(1.0, 1.0)), verbose=False)
    for module in model.modules():
        if hasattr(module, "router"):  # so that both experts get something to do
            nn.init.normal_(module.router.weight)
            nn.init.zeros_(module.router.bias)
    model.eval()
    freeze_(model, verbose=False)
    return model


def compiled_quietly(model: GNTModel, exactness: str | None = None):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = shiftadd3d.compile(model, numerics=exactness)
    assert compiled.is_compiled and compiled.reason is None
    return compiled


def assert_same_picture(found: dict, expected: dict, share: float, tolerance: float = 1e-3) -> None:
    """As many pixels are the same: a code or a router on the brink may fall the other way on one ray in a while."""
    assert found["rgb"].isfinite().all()
    for key in ("rgb", "depth", "weights", "accumulation"):
        same = torch.isclose(found[key], expected[key], rtol=tolerance, atol=tolerance).double().mean()
        assert same >= share, f"{key}: {same:.3f} are the same"


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a kernel is called alone."""
    for kernel in KERNELS.values():
        monkeypatch.setattr(kernel, "function", lambda n=kernel.name, **_: pytest.fail(f"{n} was called alone"))


NETWORKS = {
    "gnt-tiny": ("mult", {}),
    "add+shift": ("add+shift", {}),
    "shiftadd-gnt-tiny": ("add+shift-attn+moe", {}),
    "in the world, no proposal": ("add", {"canonical": False, "proposal_samples": 0}),
    "a vector wide": ("add+shift-attn+moe", {"width": 16}),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_render_what_plain_torch_does(config, views, network: str, no_kernels: None) -> None:
    name, changes = NETWORKS[network]
    model = make(config, name, **changes)
    sources = views(model)
    compiled = compiled_quietly(model, "exact")
    found = render(compiled, sources)
    with numerics("twin"):
        expected = render(model, sources)
    assert_same_picture(found, expected, share=0.999 if name == "mult" else 0.9)
    if expected["proposal"]:
        assert_same_picture(found["proposal"], expected["proposal"], share=0.999)


@pytest.mark.parametrize("exactness", ["fast", "int8"])
@pytest.mark.parametrize(("name", "other"), [("mult", "mult"), ("add+shift-attn+moe", "mult"), ("add+shift", "shift")])
def test_numerics_round_as_kernels_one_by_one_do(config, views, name: str, other: str, exactness: str) -> None:
    model = make(config, name, other, feature_dim=32)
    sources = views(model)
    found = render(compiled_quietly(model, exactness), sources)
    with numerics(exactness):
        expected = render(model, sources)
    # Rounded activations turn codes and routers that are on the brink.
    assert_same_picture(found, expected, share=0.7, tolerance=2e-2)
    assert (found["rgb"] - expected["rgb"]).abs().mean() < 2e-2


@pytest.mark.parametrize("columns", [8, 5])
def test_a_picture_is_swept_along_every_other_ray(config, views, columns: int, no_kernels: None) -> None:
    model = make(config, "mult")
    sources = views(model)
    found = render(compiled_quietly(model, "exact"), sources, columns=columns)
    assert not found["proposal"]
    with numerics("twin"):
        assert_same_picture(found, render(model, sources, columns=columns), share=0.999)
        everywhere = render(model, sources)
    number = torch.arange(RAYS)
    fields = (number // columns + number % columns) % 2 == 0
    depths = found["sample_depths"], everywhere["sample_depths"]
    assert torch.allclose(*(x[fields] for x in depths), atol=1e-3)
    assert not torch.allclose(*(x[~fields] for x in depths), atol=1e-3)


def test_experts_whose_weights_are_bfloat16_are_multiplied_so(config) -> None:
    if panel_form(current(), "fast") != "bfloat16":
        pytest.skip("products of bfloat16 take AMX")
    model = make(config, "add+shift-attn+moe")
    mixtures = [module for module in model.modules() if isinstance(module, FrozenMoE)]

    def forms() -> set[str]:
        calls = programs_of(model, "fast")["coarse"].calls
        return {form for call in calls if isinstance(call.asked, PerceptronsSpec) for form, _ in call.asked.experts}

    assert forms() == {"bfloat16", "float32"}, "weights would be rounded"
    for mixture in mixtures:
        for layer in (mixture.experts[0].fc1, mixture.experts[0].fc2):
            layer.weight.data = layer.weight.data.bfloat16().float()
    assert forms() == {"bfloat16"}


def test_views_are_embedded_in_tiles_where_no_weight_is_rounded(config) -> None:
    if panel_form(current(), "fast") != "bfloat16":
        pytest.skip("products of bfloat16 take AMX")

    def in_tiles(exactness: str, other_linear: str = "shift") -> bool:
        calls = programs_of(make(config, "add+shift", other_linear, feature_dim=32), exactness)["coarse"].calls
        [found] = {call.asked.form for call in calls if isinstance(call.asked, ViewsSpec)}
        return found == "bfloat16"

    assert in_tiles("fast") and in_tiles("int8")
    assert not in_tiles("exact") and not in_tiles("safe")
    assert not in_tiles("fast", "mult"), "weights would be rounded"


def test_view_attention_takes_the_integers_that_kernels_take_without_vnni(
    config, views, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not targets.runs_here(targets.find("avx2")):
        pytest.skip("this CPU cannot run avx2")
    monkeypatch.setenv(targets.ENVIRONMENT_VARIABLE, "avx2")
    current.cache_clear()
    try:
        model = make(config, "add+shift-attn+moe")

        def forms(exactness: str) -> set[str]:
            calls = programs_of(model, exactness)["coarse"].calls
            return {call.asked.form for call in calls if isinstance(call.asked, ViewBlockSpec)}

        assert forms("int8") == {"int16"}
        assert forms("fast") == forms("exact") == forms("safe") == {"float32"}, "weights are too coarse"
        sources = views(model)
        found = render(compiled_quietly(model, "int8"), sources)
        with numerics("int8"):
            assert_same_picture(found, render(model, sources), share=0.7, tolerance=2e-2)
    finally:
        current.cache_clear()


def test_several_calls_make_one_picture_and_threads_make_no_difference(config, views, monkeypatch) -> None:
    model = make(config, "add+shift-attn+moe")
    sources = views(model)
    compiled = compiled_quietly(model)
    whole = render(compiled, sources)
    for limit, value in {"_BYTES_OF_VIEWS": 0, "_FEWEST_RAYS": 7, "_RAYS_OF_A_SWEEP": 7}.items():
        monkeypatch.setattr(f"shiftadd3d.models.gnt.compiled.{limit}", value)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert_same_picture(render(compiled, sources), whole, share=0.99, tolerance=1e-5)
    finally:
        torch.set_num_threads(threads)


def test_mixtures_note_where_tokens_go(config, views) -> None:
    model = make(config, "add+shift-attn+moe")
    sources = views(model)
    compiled = compiled_quietly(model)
    mixtures = {name: module for name, module in model.named_modules() if isinstance(module, FrozenMoE)}
    assert len(mixtures) == 4
    render(compiled, sources)
    assert all(module.last_assignment is None for module in mixtures.values()), "nobody asked for it"
    for module in mixtures.values():
        module.keep_assignment = True
    with numerics("twin"):
        render(model, sources)
    expected = {name: module.last_assignment for name, module in mixtures.items()}
    render(compiled, sources)
    for name, module in mixtures.items():
        assert module.last_assignment.shape == (RAYS, 6) and module.last_assignment.dtype == torch.int64
        assert (module.last_assignment == expected[name]).double().mean() > 0.95
    shares = [float(module.last_assignment.double().mean()) for module in mixtures.values()]
    assert 0 < sum(shares) < 4, "all tokens have gone to one expert"


def test_masked_pixels_and_silhouettes_count(config, views, cameras) -> None:
    model = make(config, "mult")
    given = views(model)
    shape = given.images.shape[:3]
    valid, empty = torch.rand(shape) > 0.1, torch.zeros(shape, dtype=torch.bool)
    empty[:, :, :12] = True
    compiled = compiled_quietly(model)
    pictures = []
    for sources in (
        given,
        replace(given, valid=valid),
        replace(given, empty=empty),
        replace(given, silhouettes=Silhouettes(cameras(4), empty)),
    ):
        found = render(compiled, sources)
        with numerics("twin"):
            assert_same_picture(found, render(model, sources), share=0.999)
        pictures.append(found["rgb"])
    assert not torch.allclose(pictures[0], pictures[1]) and not torch.allclose(pictures[0], pictures[2])


def test_both_networks_of_a_second_pass_are_compiled(config, views, no_kernels: None) -> None:
    model = make(config, "mult", single_net=False)
    sources = views(model)
    found = render(compiled_quietly(model), sources, num_importance=5)
    with numerics("twin"):
        expected = render(model, sources, num_importance=5)
    assert found["weights"].shape == (RAYS, 11)
    assert_same_picture(found, expected, share=0.99)
    assert_same_picture(found["coarse"], expected["coarse"], share=0.999)


def test_what_one_form_cannot_express_is_rendered_in_float32(config, views) -> None:
    model = make(config, "add+shift")
    with torch.no_grad():
        model.net_coarse.view_crosstrans[0].ff_norm.weight.fill_(1e30)
        model.net_coarse.view_crosstrans[0].ff_norm.bias.fill_(1e30)
    sources = views(model)
    compiled = compiled_quietly(model, "int8")
    render(compiled, sources)
    assert compiled.overflows == 1
    ordinary = compiled_quietly(make(config, "add+shift"), "int8")
    render(ordinary, sources)
    assert ordinary.overflows == 0


def test_no_rays_gradients_and_numerics_of_plain_torch_run_as_before(config, views, monkeypatch) -> None:
    model = make(config, "mult")
    sources = views(model)
    compiled = compiled_quietly(model)
    monkeypatch.setattr(compiled, "_run", lambda *_: pytest.fail("an executable was called"))
    assert render(compiled, sources, rays=0)["rgb"].shape == (0, 3)
    with numerics("twin"):
        render(compiled, sources)
    origins, directions = torch.zeros(2, 3), torch.ones(2, 3, requires_grad=True)
    compiled(sources, origins, directions, 2.0, 6.0, 6)["rgb"].sum().backward()
    assert directions.grad is not None


def test_in_the_background_the_frozen_network_renders_until_there_are_executables(
    config, views, tmp_path, monkeypatch
) -> None:
    model = make(config, "mult")
    sources = views(model)
    frozen, compiled_now = render(model, sources), compiled_quietly(model, "exact")
    monkeypatch.setattr(background, "is_cached", lambda *_: False)
    waits = f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.01)"
    monkeypatch.setattr(background, "_SERVE", waits)
    compiled = shiftadd3d.compile(model, numerics="exact", background=True)
    assert not compiled.is_compiled and compiled.reason is None
    assert torch.equal(render(compiled, sources)["rgb"], frozen["rgb"])
    (tmp_path / "go").touch()
    assert compiled.wait()
    monkeypatch.setattr(GNTModel, "_render", lambda *_: pytest.fail("the frozen network rendered"))
    assert torch.equal(render(compiled, sources)["rgb"], render(compiled_now, sources)["rgb"])


def test_hooks_see_what_they_saw(config, views) -> None:
    model = make(config, "mult")
    sources = views(model)
    compiled = compiled_quietly(model)
    seen: list[str] = []
    handle = model.net_coarse.norm.register_forward_hook(lambda *_: seen.append("norm"))
    render(compiled, sources)
    assert seen == ["norm"]
    with pytest.warns(RuntimeWarning, match=r"net_coarse.norm is a LayerNorm, which has hooks"):
        assert not shiftadd3d.compile(model).is_compiled
    handle.remove()
    render(compiled, sources)
    assert seen == ["norm"]


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("moe", {}, r"net_coarse.view_crosstrans.0.attn is a ViewAttention, which is not registered"),
        ("mult", {"color_head": False}, r"net_coarse is a FrozenGNT, without a colour head"),
        ("mult", {"width": 36}, r"net_coarse is a FrozenGNT, of 36 channels, which are no whole vectors"),
    ],
)
def test_a_network_with_something_unregistered_runs_as_before_and_a_line_says_why(
    config, views, name: str, changes: dict, reason: str
) -> None:
    model = make(config, name, **changes)
    with pytest.warns(RuntimeWarning, match=f"not compiled, so it runs as before: {reason}"):
        compiled = shiftadd3d.compile(model)
    assert not compiled.is_compiled and "\n" not in compiled.reason
    sources = views(model)
    assert torch.equal(render(compiled, sources)["rgb"], render(model, sources)["rgb"])


def test_wrong_models_and_devices_are_refused_in_one_line(config, views) -> None:
    dense = GNTModel(config()).eval()
    with pytest.raises(UserError, match=r"^net_coarse is a GNT, not frozen; call freeze_ first$"):
        shiftadd3d.compile(dense)
    model = make(config, "add+shift-attn+moe")
    with pytest.raises(UserError, match=r"^models are compiled|twin"):
        shiftadd3d.compile(model, numerics="twin")
    with pytest.raises(UserError, match=r"^the model is in training mode"):
        shiftadd3d.compile(copy.deepcopy(model).train())
    with pytest.raises(UserError, match=r"models are compiled in float32"):
        shiftadd3d.compile(copy.deepcopy(model).bfloat16())
    compiled = compiled_quietly(model)
    elsewhere = torch.zeros(2, 3, device="meta")
    with torch.no_grad(), pytest.raises(UserError, match=r"takes rays on the CPU, not on meta$"):
        compiled._sweep(model.proposal, views(model), elsewhere, elsewhere, elsewhere)


def test_networks_that_differ_in_weights_share_their_code(config, views, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SHIFTADD3D_CACHE", str(tmp_path / "cache"))
    first = make(config, "mult")
    sources = views(first)
    render(compiled_quietly(first), sources)
    monkeypatch.setattr(executable, "compile_programs", lambda *_: pytest.fail("compiled again"))
    torch.manual_seed(5)
    second = make(config, "mult")
    found = render(compiled_quietly(second), sources)
    with numerics("twin"):
        assert_same_picture(found, render(second, sources), share=0.999)


def test_a_compiled_network_can_be_copied_and_pickled(config, views) -> None:
    model = make(config, "add+shift-attn+moe")
    sources = views(model)
    compiled = compiled_quietly(model)
    expected = render(compiled, sources)["rgb"]
    for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert torch.equal(render(other, sources)["rgb"], expected)
