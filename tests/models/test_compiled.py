"""Whole models as one executable: what they compute, and what is refused."""

# Attributes of submodules, to which torch gives no types, and wrong arguments on purpose.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import copy
import pickle
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import shiftadd3d
from bounds import assert_within, network_bound
from shiftadd3d import UserError
from shiftadd3d.kernels import numerics
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.whole import background, executable
from shiftadd3d.kernels.whole.tokens import AttentionSpec
from shiftadd3d.nn import CompiledModel, MoE, Recipe, freeze_, recipe, register_emitter, reparameterize_

pytest.importorskip("tvm")


@pytest.fixture(autouse=True)
def one_seed_two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def frozen_vit(given: Recipe | str = "add+shift", **options) -> nn.Module:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5} | options
    model = VisionTransformer(**options).eval()
    reparameterize_(model, given, verbose=False)
    spread_(model)
    freeze_(model, verbose=False)
    return model


def frozen_pvt(given: Recipe | str = "add+shift", **options) -> nn.Module:
    options = {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2), "sr_ratios": (4, 1)} | options
    model = PyramidVisionTransformerV2(mlp_ratios=(2, 2), num_classes=5, **options).eval()
    reparameterize_(model, given, verbose=False)
    spread_(model)
    freeze_(model, verbose=False)
    return model


@torch.no_grad()
def spread_(model: nn.Module) -> None:
    """Let all weights count, and have queries and keys far from zero, so that rounding does not turn their signs."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "token" in name or "dwconv" in name:
            parameter.add_(0.1 * torch.randn(parameter.shape))
    for module in model.modules():
        for name in ("q_fc", "k_fc"):
            layer = getattr(module, name, None)
            if layer is not None:
                for one in getattr(layer, "experts", [layer]):
                    one.bias.copy_(torch.randn(one.bias.shape).sign() * 8)
        if isinstance(module, MoE):
            module.router.weight.mul_(10)


def compiled_quietly(model: nn.Module, x: Tensor, exactness: str | None = None) -> CompiledModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = shiftadd3d.compile(model, x, exactness)
    assert compiled.is_compiled
    return compiled


def exactly(model: nn.Module, x: Tensor) -> Tensor:
    with numerics("twin"), torch.no_grad():
        return copy.deepcopy(model).double()(x.double())


VARIANTS = {
    "deit": {},
    "mean of patches, registers": {"global_pool": "avg", "reg_tokens": 2, "no_embed_class": True},
    "no class token, no head": {"class_token": False, "global_pool": "avg", "num_classes": 0, "pos_embed": "none"},
    "norm before pooling": {"global_pool": "avg", "fc_norm": False, "pool_include_prefix": True, "qkv_bias": True},
}
RECIPES = [
    recipe("mult"),
    recipe("add"),
    recipe("add+shift"),
    recipe("add+shift-attn"),
    recipe("add+shift", other_linear="shift", codes="01", contrast=1.0, dwconv2d=0),
    recipe("add+shift", bits=5),
    recipe("add+shift", terms=2),
    recipe("add+shift-attn+moe"),
    recipe("moe", gate="probability", router_temperature=2.0),
]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_variants_of_vit_compute_what_they_did(options: dict) -> None:
    model, x = frozen_vit(**({"qkv_bias": True} | options)), torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        y = compiled_quietly(model, x, "exact")(x)
    reference = exactly(model, x)
    assert_within(y, reference, 4 * network_bound(model, float(reference.abs().max()) + 1))


@pytest.mark.parametrize("given", RECIPES, ids=lambda given: f"{given.name}-{given.bits}-{given.terms}-{given.codes}")
def test_recipes_compute_what_they_did(given: Recipe) -> None:
    model, x = frozen_vit(given, qkv_bias=True), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        y = compiled_quietly(model, x, "exact")(x)
    reference = exactly(model, x)
    assert_within(y, reference, 4 * network_bound(model, float(reference.abs().max()) + 1))


PVT_RECIPES = [
    recipe("mult"),
    recipe("add"),
    recipe("add+shift"),
    recipe("add+shift", other_linear="shift", dwconv2d=0),
    recipe("add+shift-attn+moe"),
    recipe("moe"),
]


@pytest.mark.parametrize("given", PVT_RECIPES, ids=lambda given: f"{given.name}-{given.other_linear}")
def test_pyramids_compute_what_they_did(given: Recipe) -> None:
    model, x = frozen_pvt(given), torch.randn(3, 3, 64, 48)
    with torch.inference_mode():
        y = compiled_quietly(model, x[:1], "exact")(x)
    reference = exactly(model, x)
    assert_within(y, reference, 4 * network_bound(model, float(reference.abs().max()) + 1))


def attentions_of(compiled: CompiledModel) -> list[tuple[str, str]]:
    return [
        (call.asked.codes, call.asked.parts)
        for call in compiled._program.calls
        if isinstance(call.asked, AttentionSpec)
    ]


def test_of_queries_and_keys_no_more_than_signs_are_kept() -> None:
    if "avx2" not in targets.current().flags:
        pytest.skip("signs are kept with the help of AVX2")
    x = torch.randn(2, 3, 32, 32)
    vit, pyramid = frozen_vit(embed_dim=64, num_heads=2, qkv_bias=True), frozen_pvt(embed_dims=(32, 64))
    assert attentions_of(compiled_quietly(vit, x)) == [("uint8", "qk v")] * 2
    assert attentions_of(compiled_quietly(pyramid, x)) == [("uint8", "q k v"), ("uint8", "qk v")]
    reference = exactly(pyramid, x)
    with torch.inference_mode():
        y = compiled_quietly(pyramid, x, "exact")(x)
    assert_within(y, reference, 4 * network_bound(pyramid, float(reference.abs().max()) + 1))


def test_heads_that_are_no_whole_bytes_of_signs_keep_numbers() -> None:
    model = frozen_vit(embed_dim=64, num_heads=16, qkv_bias=True)
    assert attentions_of(compiled_quietly(model, torch.randn(2, 3, 32, 32))) == [("float32", "qkv")] * 2


@pytest.mark.parametrize("exactness", ["fast", "int8"])
def test_rounding_is_no_more_than_that_of_the_frozen_model(exactness: str) -> None:
    model, x = frozen_vit(qkv_bias=True), torch.randn(16, 3, 32, 32)
    with torch.inference_mode(), numerics(exactness):
        frozen, y = model(x), compiled_quietly(model, x, exactness)(x)
    reference = exactly(model, x)
    off, allowed = ((found.double() - reference).square().mean().sqrt() for found in (y, frozen))
    assert off <= 1.5 * allowed + network_bound(model, float(reference.abs().max()))


def test_one_executable_serves_all_batches_and_numbers_of_threads() -> None:
    model, x = frozen_vit(qkv_bias=True), torch.randn(9, 3, 32, 32)
    compiled = compiled_quietly(model, x[:1], "exact")
    with torch.inference_mode():
        whole = compiled(x)
        parts = torch.cat([compiled(some) for some in x.split([1, 3, 5])])
        torch.set_num_threads(1)
        alone = compiled(x.flip(-1).flip(-1))
    bound = network_bound(model, float(whole.abs().max()) + 1)
    assert_within(parts, whole.double(), bound)
    assert_within(alone, whole.double(), bound)


def test_an_outcome_is_not_overwritten_by_the_next_call() -> None:
    model, x = frozen_vit(), torch.randn(2, 3, 32, 32)
    compiled = compiled_quietly(model, x)
    with torch.inference_mode():
        first = compiled(x)
        kept = first.clone()
        compiled(-x)
    assert torch.equal(first, kept)


def test_activations_that_a_form_cannot_express_are_done_again_and_counted() -> None:
    model, x = frozen_vit(qkv_bias=True), torch.randn(2, 3, 32, 32)
    model.blocks[1].mlp.fc1.bias[3] = 2.0**70
    compiled = compiled_quietly(model, x, "fast")
    with torch.inference_mode():
        y = compiled(x)
        with numerics("twin"):
            expected = model(x)
    assert compiled.overflows == 1
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    assert compiled(x[:1]).isfinite().all()
    assert compiled.overflows == 2


def test_other_weights_are_another_models_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, x = frozen_vit(qkv_bias=True), frozen_vit(qkv_bias=True), torch.randn(2, 3, 32, 32)
    compiled_quietly(model, x, "exact")
    monkeypatch.setattr(executable, "compile_programs", lambda *_: pytest.fail("compiled again"))
    with torch.inference_mode():
        y = compiled_quietly(other, x, "exact")(x)
    reference = exactly(other, x)
    assert_within(y, reference, 4 * network_bound(other, float(reference.abs().max()) + 1))


def test_copies_and_pickles_compute_the_same() -> None:
    model, x = frozen_vit(), torch.randn(2, 3, 32, 32)
    compiled = compiled_quietly(model, x)
    with torch.inference_mode():
        y = compiled(x)
        assert torch.equal(copy.deepcopy(compiled)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(compiled))(x), y)


def test_gradients_and_exports_go_through_the_model() -> None:
    model, x = frozen_vit(), torch.randn(2, 3, 32, 32)
    compiled = compiled_quietly(model, x, "exact")
    asked = x.clone().requires_grad_()
    compiled(asked).sum().backward()
    assert asked.grad is not None and asked.grad.abs().sum() > 0
    program = torch.export.export(compiled, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


# What cannot be


def test_a_module_that_nobody_registered_is_named_and_runs_as_before() -> None:
    model, x = frozen_vit(recipe("add+shift", binarizer="hash")), torch.randn(2, 3, 32, 32)
    with pytest.warns(RuntimeWarning, match=r"runs as before: blocks\.0\.attn\.q_code is a HashBinarizer") as said:
        compiled = shiftadd3d.compile(model, x)
    assert len(said) == 1 and not compiled.is_compiled and "HashBinarizer" in str(compiled.reason)
    with torch.inference_mode():
        assert torch.equal(compiled(x), model(x))


def test_a_part_that_has_to_be_told_more_than_values_runs_as_before() -> None:
    block, x = frozen_vit().get_submodule("blocks.0"), torch.randn(1, 17, 48)
    with pytest.warns(RuntimeWarning, match="the model is a Block, which is compiled as part of a model only"):
        found = shiftadd3d.compile(block, x)
    assert not found.is_compiled and torch.equal(found(x), block(x))


@pytest.mark.filterwarnings("ignore:not compiled")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"init_values": 0.1}, "blocks.0.ls1"),
        ({"qk_norm": True}, "blocks.0.attn.q_norm"),
        ({"given": "mult", "qk_norm": True}, "blocks.0.attn.q_norm"),
        ({"given": "mult", "embed_dim": 36}, "blocks.0.attn"),
        ({"pre_norm": True}, "the model"),
        ({"global_pool": "max"}, "the model"),
        ({"dynamic_img_size": True}, "patch_embed"),
    ],
)
def test_other_variants_run_as_before(options: dict, named: str) -> None:
    model, x = frozen_vit(**options), torch.randn(1, 3, 32, 32)
    compiled = shiftadd3d.compile(model, x)
    assert str(compiled.reason).startswith((f"{named} is a ", f"{named} is an Attention,"))
    with torch.inference_mode():
        assert torch.equal(compiled(x), model(x))


def test_batches_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = frozen_vit(), torch.randn(7, 3, 32, 32)
    compiled = shiftadd3d.compile(model, images[:1], "exact")
    with torch.inference_mode():
        whole = compiled(images)
        monkeypatch.setattr("shiftadd3d.nn.compiled._BYTES_AT_A_TIME", images[:1].nbytes)  # two pictures, two threads
        torch.testing.assert_close(compiled(images), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:not compiled")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"linear": True}, "stages.0.blocks.0.attn"),
        ({"given": "mult", "linear": True}, "stages.0.blocks.0.attn"),
        ({"embed_dims": (4, 8)}, "stages.0.blocks.0.attn.dwconv"),
    ],
)
def test_other_pyramids_run_as_before(options: dict, named: str) -> None:
    model, x = frozen_pvt(**options), torch.randn(1, 3, 64, 64)
    compiled = shiftadd3d.compile(model, x)
    assert str(compiled.reason).startswith((f"{named} is a ", f"{named} is an Attention,"))
    with torch.inference_mode():
        assert torch.equal(compiled(x), model(x))


def test_mixtures_whose_routing_is_read_run_as_before() -> None:
    model, x = frozen_vit("add+shift-attn+moe"), torch.randn(1, 3, 32, 32)
    model.blocks[0].mlp.keep_assignment = True
    with pytest.warns(RuntimeWarning, match=r"blocks\.0\.mlp is a FrozenMoE, which keeps where tokens go"):
        shiftadd3d.compile(model, x)(x)
    assert model.blocks[0].mlp.last_assignment.shape == (1, 17)


def test_a_hook_is_not_passed_over() -> None:
    model, x = frozen_vit(), torch.randn(1, 3, 32, 32)
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning, match=r"blocks\.0\.mlp\.fc1 is a PackedShiftLinear, which has hooks"):
        assert not shiftadd3d.compile(model, x).is_compiled


def test_a_class_of_ones_own_can_be_registered() -> None:
    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model, x = frozen_vit(qkv_bias=True), torch.randn(1, 3, 32, 32)
    register_emitter(Twice, lambda e, module, x: e.emit(module.inner, x))
    with torch.inference_mode():
        torch.testing.assert_close(compiled_quietly(Twice(model).eval(), x)(x), compiled_quietly(model, x)(x))


def test_without_a_compiler_the_model_runs_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_) -> None:
        raise ImportError("No module named 'tvm'")

    model, x = frozen_vit(), torch.randn(1, 3, 32, 32)
    monkeypatch.setattr(executable, "load", missing)
    with pytest.warns(RuntimeWarning, match="not compiled, so it runs as before: No module named 'tvm'"):
        compiled = shiftadd3d.compile(model, x)
    with torch.inference_mode():
        assert torch.equal(compiled(x), model(x))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHIFTADD3D_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def frozen_layer() -> nn.Module:
    model = OneLayer().eval()
    reparameterize_(model, recipe("add+shift", other_linear="shift"), verbose=False)
    freeze_(model, verbose=False)
    register_emitter(OneLayer, lambda e, module, x: e.linear(module.layer, x))
    return model


def test_in_the_background_the_frozen_model_runs_until_the_executable_is_there(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = frozen_layer(), torch.randn(2, 3, 24)
    monkeypatch.setattr(executable, "compile_programs", lambda *_: pytest.fail("compiled in the foreground"))
    compiled = shiftadd3d.compile(model, x, "exact", background=True)
    with torch.inference_mode():
        frozen = model(x)
        assert not compiled.is_compiled and compiled.reason is None
        assert torch.equal(compiled(x), frozen)
        assert compiled.wait() and compiled.is_compiled
        monkeypatch.setattr(OneLayer, "forward", lambda *_: pytest.fail("the frozen model ran"))
        torch.testing.assert_close(compiled(x), frozen)
        assert shiftadd3d.compile(model, x, "exact", background=True).is_compiled  # from the cache, at once
        torch.testing.assert_close(copy.deepcopy(compiled)(x), frozen)


def test_in_the_background_an_overflow_runs_the_frozen_model_until_there_is_another_executable() -> None:
    model, x = frozen_layer(), torch.full((1, 1, 24), 2.0**70)
    compiled = shiftadd3d.compile(model, x, "fast", background=True)
    assert compiled.wait()
    with torch.inference_mode():
        frozen = compiled(x)
        assert compiled.wait()
        torch.testing.assert_close(compiled(x), frozen)
        torch.testing.assert_close(frozen, model(x))
    assert compiled.overflows == 2


def test_what_fails_in_the_background_leaves_the_frozen_model(empty_cache: Path, monkeypatch) -> None:
    model, x = frozen_layer(), torch.randn(1, 3, 24)
    monkeypatch.setattr(background, "_SERVE", "import sys; sys.exit('no luck')")
    compiled = shiftadd3d.compile(model, x, background=True)
    with pytest.warns(RuntimeWarning, match="not compiled, so it runs as before: no luck"):
        assert not compiled.wait()
    with torch.inference_mode():
        assert torch.equal(compiled(x), model(x))
    assert compiled.reason == "no luck"


HALF_LINKED = """
import pickle, sys, time
sys.path[:] = pickle.load(sys.stdin.buffer)
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.whole import background, executable
from shiftadd3d.kernels.whole.tokens import AttentionSpec

def link(_, library):
    library.write_bytes(b"half")
    time.sleep(600)

executable._link = link
background.serve()
"""


def test_when_the_model_is_gone_nothing_half_compiled_is_left(empty_cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(background, "_SERVE", HALF_LINKED)
    compiled = shiftadd3d.compile(frozen_layer(), torch.randn(1, 3, 24), background=True)
    process = compiled._supply._begun["exact"]._process
    while not any(file.stat().st_size == 4 for file in empty_cache.glob("building*.so")):
        assert process.poll() is None
        time.sleep(0.05)
    del compiled
    assert process.wait() == 1
    assert not [*empty_cache.glob("building*"), *empty_cache.glob("*.trial")]


def test_models_that_are_not_ready_are_refused_in_one_line() -> None:
    x = torch.randn(1, 3, 32, 32)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=5).eval()
    reparameterize_(model, "add+shift", verbose=False)
    refused = [
        (model, r"blocks\.0\.attn\.\w+ is a \w+, not frozen; call freeze_ first"),
        (frozen_vit().train(), "in training mode"),
        (frozen_vit().double(), "torch.float64; models are compiled in float32"),
        (frozen_vit().to("meta"), "the model is on meta"),
    ]
    for one, line in refused:
        with pytest.raises(UserError, match=line) as error:
            shiftadd3d.compile(one, x)
        assert "\n" not in str(error.value)


def test_examples_and_inputs_that_do_not_fit_are_refused_in_one_line() -> None:
    model, x = frozen_vit(), torch.randn(1, 3, 32, 32)
    for wrong in (x[0, 0, 0], x[:0], x.double(), x.to("meta"), "a picture", x[:, :, :16], x[0]):
        with pytest.raises(UserError) as error:
            shiftadd3d.compile(model, wrong)
        assert "\n" not in str(error.value)
    compiled = compiled_quietly(model, x)
    for wrong in (x[:0], x[0], x[..., :16], x.double(), x.to("meta")):
        with pytest.raises(
            UserError, match=r"the compiled model takes \[batch, 3, 32, 32\] float32 on the CPU, not \["
        ):
            compiled(wrong)
    with pytest.raises(UserError, match="takes 1 inputs, not 2"):
        compiled(x, x)
    with pytest.raises(UserError, match="numerics 'twin' are plain torch"):
        shiftadd3d.compile(model, x, "twin")
    with pytest.raises(UserError, match="numerics must be one of"):
        shiftadd3d.compile(model, x, "wrong")
    for change in (compiled.train, compiled.double):
        with pytest.raises(UserError, match="a compiled model"):
            change()
