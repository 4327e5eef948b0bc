"""`FrozenMlp` and `FrozenConvMlp`: what becomes one, and that their kernels compute what their layers do."""

from __future__ import annotations

import pytest
import timm.layers
import torch
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn

from shiftadd3d import UserError, kernels
from shiftadd3d.models.gnt.transformer import FeedForward
from shiftadd3d.nn import (
    FrozenConvMlp,
    FrozenMlp,
    FrozenMoE,
    MoELinear,
    MoEMlp,
    PackedShiftLinear,
    freeze_,
    register_frozen,
    shift_twin,
)
from shiftadd3d.nn.mlp import is_conv_mlp, is_plain_mlp


class Custom(nn.Module):
    """A perceptron of a user's own; subclasses compute something else."""

    def __init__(self, act: nn.Module | None = None, hidden: int = 12) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(6, 12), act or nn.GELU(), nn.Linear(hidden, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


register_frozen(Custom, FrozenMlp)


class Renamed(Custom):
    """Whatever it is called, it computes the same."""


class Residual(Custom):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class OnImages(Custom):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Masked(Custom):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x if mask is None else x * mask)


class Limited(Custom):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)).clamp(max=20))


class Scaled(Custom):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))


def frozen(mlp: nn.Module) -> nn.Module:
    model = nn.Sequential(shift_twin(mlp))
    freeze_(model, verbose=False)
    return model[0]


@pytest.mark.parametrize(
    "mlp", [Custom(), Renamed(nn.ReLU()), timm.layers.Mlp(6, 12, drop=0.5), FeedForward(6, 12, 0.1)], ids=repr
)
def test_perceptrons_become_frozen_and_keep_their_state_dict(mlp: nn.Module) -> None:
    twin = shift_twin(mlp).eval()
    x = torch.randn(2, 5, 6)
    expected = twin(x)
    layer = frozen(mlp)
    assert type(layer) is FrozenMlp and torch.equal(layer(x), expected)
    assert list(layer.state_dict()) == [f"fc{i}.{name}" for i in (1, 2) for name in ("codes", "offset", "bias")]


@pytest.mark.parametrize(
    "mlp",
    [
        Residual(),
        OnImages(),
        Masked(),
        Limited(),
        Scaled(),
        Custom(nn.SiLU()),
        Custom(nn.GELU(approximate="tanh")),
        timm.layers.GluMlp(6, 12),
        timm.layers.Mlp(6, 12, norm_layer=nn.LayerNorm),
    ],
    ids=lambda mlp: type(mlp).__name__,
)
def test_what_computes_something_else_stays_what_it_is(mlp: nn.Module) -> None:
    assert not is_plain_mlp(mlp)
    assert type(frozen(mlp)) is type(mlp)


def test_a_class_that_nobody_registered_stays_and_is_never_run() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            pytest.fail("it was run")

    layer = frozen(Strange())
    assert type(layer) is Strange and type(layer.fc1) is PackedShiftLinear
    register_frozen(Strange, FrozenMlp)
    assert type(frozen(Strange())) is FrozenMlp


def test_layers_that_do_not_fit_together_are_none() -> None:
    assert not is_plain_mlp(Custom(hidden=11))


def test_perceptrons_without_storage_freeze_to_such() -> None:
    with torch.device("meta"):
        model = nn.Sequential(shift_twin(Custom()))
        freeze_(model, verbose=False)
    other = nn.Sequential(shift_twin(Custom())).eval()
    x = torch.randn(2, 5, 6)
    expected = other(x)
    freeze_(other, verbose=False)
    model.load_state_dict(other.state_dict(), assign=True)
    assert type(model[0]) is FrozenMlp and torch.equal(model(x), expected)


def test_multiplying_perceptrons_stay_but_in_mixtures() -> None:
    model = nn.Sequential(Custom(), MoEMlp(6, 12), shift_twin(Custom()))
    report = freeze_(model, verbose=False)
    assert report.perceptrons == 3 and "3 perceptrons ready" in str(report)
    assert type(model[0]) is Custom and type(model[2]) is FrozenMlp and type(model[1]) is FrozenMoE
    assert [type(expert) for expert in model[1].experts] == [FrozenMlp, FrozenMlp]
    assert type(model[1].experts[0].fc1) is nn.Linear
    assert freeze_(model, verbose=False).perceptrons == 0


def test_a_perceptron_in_two_places_stays_one() -> None:
    mlp = shift_twin(Custom())
    model = nn.ModuleDict({"a": mlp, "b": nn.Sequential(mlp)})
    assert freeze_(model, verbose=False).perceptrons == 1
    assert model["b"][0] is model["a"] and type(model["a"]) is FrozenMlp


def test_on_a_cpu_one_kernel_computes_it_unless_gradients_or_hooks_want_the_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = frozen(Custom())
    x = torch.randn(2, 5, 6)
    expected = layer(x)
    calls = []
    fused = kernels.shift_mlp
    monkeypatch.setattr("shiftadd3d.nn.mlp.shift_mlp", lambda *args: (calls.append(args), fused(*args))[1])
    with kernels.numerics("exact"):
        layer(x)
        assert not calls
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected)
            assert len(calls) == 1
            seen = []
            layer.act.register_forward_hook(lambda module, args, output: seen.append(output))
            torch.testing.assert_close(layer(x), expected)
            assert len(calls) == 1 and len(seen) == 1


def test_inputs_of_another_width_are_refused_as_by_the_layer() -> None:
    layer = frozen(Custom())
    with torch.no_grad(), kernels.numerics("exact"), pytest.raises(UserError, match=r"takes \[..., 6\], not \[2, 7\]"):
        layer(torch.randn(2, 7))


def test_layers_of_two_formats_run_one_by_one() -> None:
    layer = frozen(Custom())
    layer.fc2 = PackedShiftLinear(12, 6, bits=5)
    with torch.no_grad():
        x = torch.randn(3, 6)
        expected = layer(x)
        with kernels.numerics("exact"):
            torch.testing.assert_close(layer(x), expected)


# --------------------------------------------------------------------------------------------------------------------
# With a depthwise convolution
# --------------------------------------------------------------------------------------------------------------------


class ResidualConvMlp(MlpWithDepthwiseConv):
    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        return x + super().forward(x, feat_size)


def conv_mlp(**options) -> MlpWithDepthwiseConv:
    return MlpWithDepthwiseConv(6, 20, **options)


def test_a_perceptron_with_a_convolution_becomes_frozen_and_keeps_its_state_dict() -> None:
    mlp = shift_twin(conv_mlp(drop=0.5))
    x = torch.randn(2, 15, 6)
    expected = mlp.eval()(x, (3, 5))
    model = nn.Sequential(mlp)
    assert freeze_(model, verbose=False).perceptrons == 1
    ready = model[0]
    assert type(ready) is FrozenConvMlp and not ready.training
    assert torch.equal(ready(x, (3, 5)), expected)
    other = frozen(conv_mlp())
    assert isinstance(other, FrozenConvMlp)
    other.load_state_dict(ready.state_dict(), strict=True)
    assert torch.equal(other(x, (3, 5)), expected)


@pytest.mark.parametrize(
    "mlp",
    [
        conv_mlp(extra_relu=True),
        conv_mlp(act_layer=nn.SiLU),
        ResidualConvMlp(6, 20),
        Custom(),
    ],
    ids=["another activation before", "an activation no kernel has", "a sum", "no convolution"],
)
def test_what_computes_something_else_is_no_perceptron_with_a_convolution(mlp: nn.Module) -> None:
    assert is_conv_mlp(conv_mlp()) and not is_conv_mlp(mlp)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(20, 20, 3, 1, 1),
        nn.Conv2d(20, 20, 3, 1, 0, groups=20),
        nn.Conv2d(20, 20, 3, 2, 1, groups=20),
        nn.Conv2d(20, 20, 3, 1, 1, groups=20, padding_mode="circular"),
        nn.Conv2d(20, 20, (1, 3), 1, (0, 1), groups=20),
    ],
    ids=["not depthwise", "unpadded", "strided", "circular", "oblong"],
)
def test_convolutions_of_other_kinds_stay(conv: nn.Conv2d) -> None:
    mlp = conv_mlp()
    mlp.dwconv = conv
    assert not is_conv_mlp(mlp)


def test_on_a_cpu_one_op_convolves_tokens_unless_hooks_want_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from shiftadd3d.nn import mlp as module

    model = nn.Sequential(shift_twin(conv_mlp()))
    freeze_(model, verbose=False)
    ready, x = model[0], torch.randn(2, 15, 6)
    expected = ready(x, (3, 5))
    calls = []
    fused = module.shift_conv_mlp
    monkeypatch.setattr(module, "shift_conv_mlp", lambda *args: calls.append(args) or fused(*args))
    with kernels.numerics("exact"):
        assert ready(x, (3, 5)).requires_grad and not calls
        with torch.no_grad():
            torch.testing.assert_close(ready(x, (3, 5)), expected, rtol=1e-4, atol=1e-5)
            assert len(calls) == 1
            seen = []
            ready.act.register_forward_hook(lambda *args: seen.append(args))
            torch.testing.assert_close(ready(x, (3, 5)), expected, rtol=1e-4, atol=1e-5)
            assert len(calls) == 1 and len(seen) == 1


def mixed_conv_mlp() -> MlpWithDepthwiseConv:
    mlp = conv_mlp()
    mlp.fc1, mlp.fc2 = MoELinear.from_linear(mlp.fc1), MoELinear.from_linear(mlp.fc2)
    return mlp.eval()


def test_between_mixtures_an_op_convolves_tokens_and_activates(monkeypatch: pytest.MonkeyPatch) -> None:
    from shiftadd3d.nn import mlp as module

    model, x = nn.Sequential(mixed_conv_mlp()), torch.randn(2, 15, 6)
    expected = model[0](x, (3, 5))
    assert freeze_(model, verbose=False).perceptrons == 1
    ready = model[0]
    assert type(ready) is FrozenConvMlp and type(ready.fc1) is type(ready.fc2) is FrozenMoE
    calls = []
    convolve = module.depthwise_conv
    monkeypatch.setattr(module, "depthwise_conv", lambda *args: calls.append(args) or convolve(*args))
    with torch.no_grad(), kernels.numerics("twin"):
        assert torch.equal(ready(x, (3, 5)), expected) and not calls
    with torch.no_grad(), kernels.numerics("exact"):
        torch.testing.assert_close(ready(x, (3, 5)), expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == 1
        ready.dwconv.register_forward_hook(lambda *args: None)
        torch.testing.assert_close(ready(x, (3, 5)), expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == 1


def test_a_mixture_of_perceptrons_is_no_layer_of_one() -> None:
    mlp = mixed_conv_mlp()
    mlp.fc1 = MoEMlp(6, 20)
    model = nn.Sequential(mlp)
    assert freeze_(model, verbose=False).perceptrons == 2  # its experts
    assert type(model[0]) is MlpWithDepthwiseConv
