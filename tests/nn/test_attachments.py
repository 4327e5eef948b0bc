"""What is attached to a layer is kept, or refused by the layer's name with what to do about it."""

# Attributes of submodules, to which torch gives no types.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from shiftadd3d import UserError
from shiftadd3d.nn import (
    AddAttention,
    MoE,
    PackedShiftLinear,
    Recipe,
    ShiftLinear,
    calibrate_,
    freeze_,
    recipe,
    register_attention,
    reparameterize_,
)

SHIFT = Recipe("shift", attention_linear="shift", mlp="shift", other_linear="shift")


def patch_forward(layer: nn.Module) -> None:
    layer.forward = lambda x, plain=layer.forward: plain(x) + 7


def patch_like_accelerate(layer: nn.Module) -> None:
    layer._old_forward = layer.forward
    layer._hf_hook = SimpleNamespace(offload=False)

    def new_forward(module: nn.Module, *args: Tensor) -> Tensor:
        return module._old_forward(*args) + 7

    layer.forward = functools.update_wrapper(functools.partial(new_forward, layer), layer._old_forward)


def unpatch_like_accelerate(layer: nn.Module) -> None:
    layer.forward = layer._old_forward
    del layer._old_forward, layer._hf_hook


def old_norm(norm: Callable) -> Callable[[nn.Module], None]:
    def attach(layer: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            norm(layer)

    return attach


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


ATTACHED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "a forward pass": (patch_forward, "it has a forward of its own"),
    "accelerate's hook": (patch_like_accelerate, "it has a hook of accelerate"),
    "a train method": (lambda layer: setattr(layer, "train", lambda mode=True: layer), "it has a train of its own"),
    "a forward hook": (lambda layer: layer.register_forward_hook(print), "it has hooks"),
    "a forward pre-hook": (lambda layer: layer.register_forward_pre_hook(print), "it has hooks"),
    "a backward hook": (lambda layer: layer.register_full_backward_hook(print), "it has hooks"),
    "a backward pre-hook": (lambda layer: layer.register_full_backward_pre_hook(print), "it has hooks"),
    "a saving hook": (lambda layer: layer.register_state_dict_post_hook(lambda *_: None), "hooks on its state dict"),
    "a saving pre-hook": (lambda layer: layer.register_state_dict_pre_hook(print), "hooks on its state dict"),
    "a loading hook": (
        lambda layer: layer.register_load_state_dict_post_hook(lambda *_: None),
        "hooks on its state dict",
    ),
    "a loading pre-hook": (lambda layer: layer.register_load_state_dict_pre_hook(print), "hooks on its state dict"),
    "the old weight norm": (old_norm(nn.utils.weight_norm), "remove_weight_norm takes it off"),
    "the old spectral norm": (old_norm(nn.utils.spectral_norm), "remove_spectral_norm takes it off"),
    "pruning": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove makes it so"),
}
ON_FLOATS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "a parameter": (lambda layer: layer.register_parameter("scale", nn.Parameter(torch.ones(1))), "it has scale"),
    "a buffer": (lambda layer: layer.register_buffer("mask", torch.ones(8, 8)), "it has mask"),
    "a part": (lambda layer: layer.add_module("adapter", nn.Linear(8, 8)), "it has adapter"),
    "LoRA": (lambda layer: layer.register_parameter("lora_A", nn.Parameter(torch.ones(2, 8))), "merge them first"),
}


def model_with(attach: Callable[[nn.Module], object], layer: type[nn.Module] = nn.Linear) -> nn.Sequential:
    model = nn.Sequential(layer(8, 8), nn.ReLU(), layer(8, 8))
    attach(model[0])
    return model


def refused(act: Callable[[nn.Module], object], model: nn.Module, words: str) -> None:
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(UserError) as caught:
        act(model)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and lines[1].startswith("  0 (") and words in lines[1], lines
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("what", [*ATTACHED, *ON_FLOATS])
@pytest.mark.parametrize("mode", ["Q", "PS"])
def test_reparameterize_refuses_what_would_be_lost(what: str, mode) -> None:
    attach, words = (ATTACHED | ON_FLOATS)[what]
    chosen = Recipe(other_linear="shift", mode=mode)
    refused(lambda model: reparameterize_(model, chosen, verbose=False), model_with(attach), words)


@pytest.mark.parametrize("what", ["a forward pass", "accelerate's hook"])
def test_calibrate_refuses_what_would_be_lost(what: str) -> None:
    attach, words = ATTACHED[what]
    refused(lambda model: calibrate_(model, [torch.randn(4, 8)], SHIFT, verbose=False), model_with(attach), words)


@pytest.mark.parametrize("what", ATTACHED)
def test_freeze_refuses_what_would_be_lost(what: str) -> None:
    attach, words = ATTACHED[what]
    refused(lambda model: freeze_(model, verbose=False), model_with(attach, ShiftLinear), words)


def test_what_the_error_says_helps() -> None:
    model = model_with(patch_like_accelerate)
    unpatch_like_accelerate(model[0])  # leaves the class's own forward on the instance
    old_norm(nn.utils.weight_norm)(model[2])
    nn.utils.remove_weight_norm(model[2])
    reparameterize_(model, SHIFT, verbose=False)
    assert type(model[0]) is ShiftLinear and type(model[2]) is ShiftLinear


def test_tags_are_kept() -> None:
    model = model_with(lambda layer: setattr(layer, "is_head", {"yes"}))
    reparameterize_(model, SHIFT, verbose=False)
    assert model[0].is_head == {"yes"} and not hasattr(model[2], "is_head")
    freeze_(model, verbose=False)
    assert type(model[0]) is PackedShiftLinear and model[0].is_head == {"yes"}
    assert "mode" not in vars(model[0]) and "_cache" not in vars(model[0])


class Tripled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class Adapted(nn.Module):  # as peft's layers are built
    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, 8)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})
        self.in_features = self.out_features = 8

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_what_is_left_alone_computes_what_it_did() -> None:
    x = torch.randn(4, 8)
    parametrized = nn.Linear(8, 8)
    parametrize.register_parametrization(parametrized, "weight", Doubled())
    weight_normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    for layer in (Tripled(8, 8), parametrized, weight_normed):
        model = nn.Sequential(layer)
        expected = model(x)
        report = reparameterize_(model, SHIFT, verbose=False)
        freeze_(model, verbose=False)
        assert model[0] is layer and torch.equal(model(x), expected)
        assert report.layers == () and report.untouched[0].name.startswith("0")


def test_adapters_are_kept_as_a_whole_or_refused() -> None:
    model = nn.Sequential(Adapted())
    refused(lambda model: reparameterize_(model, SHIFT, verbose=False), model, "merge them first")
    report = reparameterize_(model, Recipe("none", exclude=("0",), other_linear="shift"), verbose=False)
    assert report.layers == () and type(model[0].base_layer) is nn.Linear


@pytest.mark.parametrize(
    "hook", [SimpleNamespace(offload=True), SimpleNamespace(hooks=[SimpleNamespace(offload=True)])]
)
def test_offloaded_weights_are_refused(hook: SimpleNamespace) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)))
    model[0]._hf_hook = hook
    with pytest.raises(UserError, match="0: accelerate offloads its weights"):
        reparameterize_(model, SHIFT, verbose=False)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(8, 8) for _ in range(4))
        self.num_heads, self.head_dim, self.layer_idx = 2, 4, 3

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.v(x))


class ScaledAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


def _additive(attention: Attention, chosen: Recipe) -> AddAttention:
    layers = attention.q, attention.k, attention.v, attention.proj
    return AddAttention.from_projections(*layers, 2, **chosen.add_options())


def test_attention_that_derives_from_a_known_class_keeps_its_own_forward_pass_or_is_refused() -> None:
    register_attention(Attention, _additive)
    model = nn.Sequential(Attention(), ScaledAttention())
    with pytest.raises(UserError, match=r"1 \(ScaledAttention\): it derives from Attention but has a forward of its"):
        reparameterize_(model, "add", verbose=False)
    assert type(model[0]) is Attention
    reparameterize_(model, recipe("add", exclude=("1",)), verbose=False)
    assert type(model[0]) is AddAttention and type(model[1]) is ScaledAttention
    assert (model[0].head_dim, model[0].layer_idx) == (4, 3)


def test_layers_of_derived_classes_are_not_frozen_past_their_own_forward_pass() -> None:
    class Shifted(ShiftLinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    class Routed(MoE):
        def route(self, tokens: Tensor):
            return super().route(tokens)

    for layer, words in ((Shifted(8, 8), "a forward of its own"), (Routed([nn.Linear(8, 8)], 8), "a route of its own")):
        with pytest.raises(UserError, match=words):
            freeze_(nn.Sequential(layer), verbose=False)


def test_fused_forms_give_way_to_what_is_attached_later() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(x)))

    from shiftadd3d.kernels import numerics

    model, x = nn.Sequential(Mlp()), torch.randn(4, 8)
    reparameterize_(model, SHIFT, verbose=False)
    freeze_(model, verbose=False)
    with torch.no_grad(), numerics("exact"):
        before = model(x)
        patch_forward(model[0].fc2)
        torch.testing.assert_close(model(x), before + 7)


def test_torchs_encoder_makes_no_nested_tensors_for_a_fast_path_that_is_off() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    reparameterize_(model, SHIFT, verbose=False)
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model(x, src_key_padding_mask=padding)
    for freeze in (False, True):
        if freeze:
            freeze_(model, verbose=False)
        with torch.no_grad():
            found = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(found[~padding], expected[~padding])


class ReadsWeight(nn.Module):
    """As in timm's BEiT and torchvision's Swin: the weight is computed with, the layer is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(OrderedDict(inner=nn.Linear(8, 8)))
        self.qkv, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(self.project(x).to(self.called.weight.dtype))

    def project(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qkv.weight, self.qkv.bias) @ self.part.inner.weight.T


class KeepsList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.called = nn.Linear(8, 8), nn.Linear(8, 8)
        self.steps = [self.qkv]

    def forward(self, x: Tensor) -> Tensor:
        return self.called(self.steps[0](x))


class KeepsMethod(KeepsList):
    def __init__(self) -> None:
        super().__init__()
        self.steps = {0: self.qkv.forward}


@pytest.mark.parametrize("mode", ["Q", "PS"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ReadsWeight, "ReadsWeight.project computes with its weight, past the layer"),
        (KeepsList, "KeepsList.steps holds it past its place in the model"),
        (KeepsMethod, "KeepsMethod.steps holds it past its place in the model"),
    ],
)
def test_layers_that_a_model_uses_past_their_place_are_left_alone_and_freezing_changes_nothing(
    kind: type[nn.Module], reason: str, mode
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(kind()), torch.randn(3, 8)
    report = reparameterize_(model, replace(SHIFT, mode=mode), verbose=False)
    assert (model[0].qkv.__class__, model[0].called.__class__) == (nn.Linear, ShiftLinear)
    assert ("0.qkv", reason) in [(layer.name, layer.reason) for layer in report.untouched]
    expected = model(x)
    freeze_(model, verbose=False)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "swinv2_tiny_window8_256"])
def test_timms_layers_whose_weights_are_computed_with_are_left_alone(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    report = reparameterize_(model, SHIFT, verbose=False)
    assert not any(layer.name.endswith("attn.qkv") for layer in report.layers)
    assert sum("computes with its weight" in layer.reason for layer in report.untouched) == 12


def test_what_torch_script_compiled_is_left_alone_or_refused() -> None:
    compiled = torch.jit.trace(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8))
    report = reparameterize_(nn.Sequential(compiled, nn.Linear(8, 8)), SHIFT, verbose=False)
    assert [layer.name for layer in report.layers] == ["1"]
    with pytest.raises(UserError, match="jit compiled it; reparameterize the model before"):
        reparameterize_(compiled, SHIFT, verbose=False)


def test_replacing_layers_draws_as_much_at_random_the_first_time_as_later():
    code = """
import torch
from shiftadd3d.nn import reparameterize_

def state():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 1))
    reparameterize_(model, "add+shift", verbose=False)
    return torch.get_rng_state()

print(torch.equal(state(), state()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
