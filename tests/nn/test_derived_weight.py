"""What a replaced layer answers to code that knows the layer it stands in for."""

# Attributes of submodules, to which torch gives no types.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from shiftadd3d import UserError
from shiftadd3d.nn import (
    MoELinear,
    PackedShiftConv2d,
    PackedShiftLinear,
    Recipe,
    ShiftConv2d,
    ShiftLinear,
    freeze_,
    reparameterize_,
)

LINEAR, CONV = {"in_features": 6, "out_features": 4}, {"in_channels": 3, "out_channels": 4, "kernel_size": (2, 2)}


def frozen(layer: nn.Module) -> nn.Module:
    model = nn.Sequential(layer)
    freeze_(model, verbose=False)
    return model[0]


LAYERS: dict[str, tuple[Callable[[], nn.Module], nn.Module]] = {
    "ShiftLinear Q": (lambda: ShiftLinear(6, 4), nn.Linear(6, 4)),
    "ShiftLinear PS": (lambda: ShiftLinear(6, 4, mode="PS"), nn.Linear(6, 4)),
    "ShiftConv2d Q": (lambda: ShiftConv2d(3, 4, 2), nn.Conv2d(3, 4, 2, 2)),
    "ShiftConv2d PS": (lambda: ShiftConv2d(3, 4, 2, mode="PS", terms=2), nn.Conv2d(3, 4, 2, 2)),
    "PackedShiftLinear": (lambda: ShiftLinear(6, 4, bits=5).freeze(), nn.Linear(6, 4)),
    "PackedShiftLinear, no bias": (lambda: ShiftLinear(6, 4, bias=False).freeze(), nn.Linear(6, 4, bias=False)),
    "PackedShiftConv2d": (lambda: ShiftConv2d(3, 4, 2).freeze(), nn.Conv2d(3, 4, 2, 2)),
    "MoELinear": (lambda: MoELinear(6, 4), nn.Linear(6, 4)),
    "FrozenMoE": (lambda: frozen(MoELinear(6, 4)), nn.Linear(6, 4)),
}
READ_ONLY = [name for name in LAYERS if not name.endswith(" Q")]
QUESTIONS = (
    *("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
    *("groups", "padding_mode", "transposed", "output_padding"),
)


@pytest.mark.parametrize("name", LAYERS)
def test_it_has_the_attributes_of_the_ordinary_layer(name: str) -> None:
    make, ordinary = LAYERS[name]
    layer = make()
    assert layer.weight.shape == ordinary.weight.shape and isinstance(layer.weight, Tensor)
    assert (layer.bias is None) == (ordinary.bias is None)
    for question in QUESTIONS:
        if hasattr(ordinary, question):
            assert getattr(layer, question) == getattr(ordinary, question), question
    assert layer.extra_repr()


@pytest.mark.parametrize("name", LAYERS)
def test_its_weight_follows_the_layer_wherever_it_goes(name: str) -> None:
    for change, dtype in (
        (lambda layer: layer.half(), torch.float16),
        (lambda layer: layer.bfloat16(), torch.bfloat16),
        (lambda layer: layer.to(torch.float64), torch.float64),
        (lambda layer: copy.deepcopy(layer), torch.float32),
        (lambda layer: pickle.loads(pickle.dumps(layer)), torch.float32),
    ):
        layer = LAYERS[name][0]()
        names, before = set(layer.state_dict()), layer.weight.detach().clone()
        changed = change(layer)
        assert changed.weight.dtype == dtype and set(changed.state_dict()) == names
        torch.testing.assert_close(changed.weight.float().detach().clone(), before, rtol=1e-2, atol=1e-6)
    assert LAYERS[name][0]().to("meta").weight.is_meta


@pytest.mark.parametrize("name", ["ShiftLinear PS", "PackedShiftLinear", "PackedShiftConv2d", "ShiftConv2d PS"])
def test_its_values_are_those_that_it_computes_with(name: str) -> None:
    layer = LAYERS[name][0]().eval()
    x = torch.randn(2, 6) if isinstance(layer, (ShiftLinear, PackedShiftLinear)) else torch.randn(2, 3, 4, 4)
    product = nn.functional.linear if x.dim() == 2 else lambda *args: nn.functional.conv2d(*args, stride=2)
    torch.testing.assert_close(product(x, layer.weight, layer.bias), layer(x))
    values = layer.weight.detach().cpu().numpy()
    assert values.tolist() == layer.weight.tolist() and type(layer.weight * 1) is Tensor


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "through data": lambda layer: layer.weight.data.zero_(),
    "through a view": lambda layer: layer.weight.detach()[0].fill_(1.0),
    "an element": lambda layer: layer.weight.__setitem__(0, 1.0),
    "augmented": lambda layer: layer.weight.__iadd__(1.0),
    "an initialisation": lambda layer: nn.init.normal_(layer.weight),
    "as an outcome": lambda layer: torch.add(torch.zeros(()), 1.0, out=layer.weight),
    "a parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(4, 6))),
    "a tensor": lambda layer: setattr(layer, "weight", torch.zeros(4, 6)),
}


@pytest.mark.parametrize("name", READ_ONLY)
@pytest.mark.parametrize("write", WRITES)
def test_writing_is_refused_in_one_line(name: str, write: str) -> None:
    layer = LAYERS[name][0]()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(UserError, match="read-only") as caught:
        WRITES[write](layer)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_questions_about_shape_and_dtype_decode_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ShiftLinear(6, 4).freeze()
    monkeypatch.setattr(PackedShiftLinear, "quantized_weight", lambda *_: pytest.fail("decoded"))
    weight = layer.weight
    assert (weight.dtype, weight.device.type, weight.shape, weight.requires_grad) == (
        torch.float32,
        "cpu",
        (4, 6),
        False,
    )
    assert (weight.numel(), weight.size(1), weight.dim(), weight.is_cuda, len(weight)) == (24, 6, 2, False, 4)


def test_a_penalty_on_a_weight_reaches_shift_and_sign() -> None:
    layer = ShiftLinear(6, 4, mode="PS")
    assert layer.weight.requires_grad
    layer.weight.square().sum().backward()
    assert layer.shift.grad.abs().sum() > 0 and layer.sign.grad.abs().sum() > 0


def test_utilities_that_keep_another_parameter_work_on_float_weights() -> None:
    layer, x = ShiftLinear(6, 4), torch.randn(2, 6)
    prune.l1_unstructured(layer, "weight", 0.5)
    assert (layer.eval().quantized_weight() == 0).sum() >= 12 and layer(x).shape == (2, 4)
    prune.remove(layer, "weight")
    nn.utils.parametrizations.spectral_norm(layer)
    layer(x)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert set(layer.state_dict()) == {"weight", "bias"}


class Patches(nn.Module):  # as ViTPatchEmbeddings, CLIPVisionEmbeddings and Dinov2PatchEmbeddings have it
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, 16, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        target = self.projection.weight.dtype
        return self.projection(x.to(dtype=target, device=self.projection.weight.device)).flatten(2).mT


class FeedForward(nn.Module):  # as T5DenseActDense has it
    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wi(x).relu()
        if (
            isinstance(self.wo.weight, Tensor)
            and x.dtype != self.wo.weight.dtype
            and self.wo.weight.dtype != torch.int8
        ):
            x = x.to(self.wo.weight.dtype)
        return self.wo(x)


class Perceptron(nn.Module):  # read from outside, as open_clip reads mlp.c_fc.weight
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.ff, self.mlp = Patches(), FeedForward(), Perceptron()

    def forward(self, x: Tensor) -> Tensor:
        x = self.ff(self.patches(x))
        return self.mlp(x.to(self.mlp.fc1.weight.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("mode", ["Q", "PS"])
@pytest.mark.parametrize("mlp", ["shift", "moe"])
def test_models_that_read_weights_in_their_forward_pass_run(mlp, mode, freeze: bool, dtype: torch.dtype) -> None:
    model = Model()
    reparameterize_(model, Recipe(mlp=mlp, other_linear="shift", mode=mode), verbose=False)
    assert isinstance(model.patches.projection, ShiftConv2d)
    model.to(dtype).eval()
    x = torch.randn(2, 3, 16, 16)  # float32, for the model to take to its dtype
    with torch.no_grad():
        expected = model(x)
        if freeze:
            freeze_(model, verbose=False)
            assert isinstance(model.patches.projection, PackedShiftConv2d)
        assert model(x).dtype == dtype
        torch.testing.assert_close(model(x), expected)
