"""The fused MLP of shift layers: the kernel against its twin, and against two calls of MatShift."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shiftadd3d import UserError, kernels
from shiftadd3d.kernels.cpu.forms import error_bound, forms
from shiftadd3d.kernels.cpu.mlp import MLP
from shiftadd3d.kernels.ops.matshift import matshift
from shiftadd3d.kernels.ops.mlp import shift_mlp
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.reference.mlp import shift_mlp_twin
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.numerics import COMPILED

pytest.importorskip("tvm")


def problem(tokens: int, inputs: int = 20, hidden: int = 40, outputs: int = 24, bits: int = 4, terms: int = 1):
    """Tokens, and the arguments that describe two layers."""
    generator = torch.Generator().manual_seed(0)
    layers: list[Tensor] = []
    for width, height in ((inputs, hidden), (hidden, outputs)):
        weight = torch.randn(height, width, generator=generator) / max(1, width) ** 0.5
        codes = power_of_two.encode(weight, bits, terms)
        layers += [power_of_two.pack(codes.codes, bits), codes.offset, torch.randn(height, generator=generator)]
    return torch.randn(tokens, inputs, generator=generator), layers


def weights(layers: list[Tensor], inputs: int, bits: int = 4) -> list[Tensor]:
    widths = (inputs, layers[0].shape[1])
    return [
        power_of_two.decode(power_of_two.unpack(layers[3 * i], bits, width), layers[3 * i + 1], bits)
        for i, width in enumerate(widths)
    ]


def error_allowed(numerics: str, x: Tensor, layers: list[Tensor], bits: int) -> Tensor:
    """What `matshift` promises for each layer, one after the other; no activation is steeper than 1.13."""
    stated = error_bound(forms(targets.current(), numerics, bits, layers[0].shape[0], "float32")[0], bits)
    first, second = (w.abs().sum(-1).max() for w in weights(layers, x.shape[-1], bits))
    largest = x.abs().amax(-1, keepdim=True)
    hidden = largest * first + layers[2].abs().max()
    return (stated + 2e-6) * (1.13 * largest * first * second + hidden * second)


def assert_close(y: Tensor, x: Tensor, layers: list[Tensor], activation: str, numerics: str, bits: int = 4) -> None:
    error = (y - shift_mlp_twin(x, *layers, bits, activation)).abs()
    assert (error <= error_allowed(numerics, x, layers, bits)).all()


def test_the_twin_is_an_mlp_of_decoded_weights():
    x, layers = problem(7)
    first, second = weights(layers, 20)
    expected = F.linear(F.gelu(F.linear(x, first, layers[2])), second, layers[5])
    assert torch.equal(shift_mlp_twin(x, *layers), expected)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 220),
    inputs=st.integers(1, 150),
    hidden=st.integers(1, 150),
    outputs=st.integers(1, 70),
    activation=st.sampled_from(["gelu", "relu"]),
    numerics=st.sampled_from(COMPILED),
)
def test_any_number_of_tokens_and_any_widths(tokens, inputs, hidden, outputs, activation, numerics):
    x, layers = problem(tokens, inputs, hidden, outputs)
    with kernels.numerics(numerics):
        y = shift_mlp(x, *layers, activation=activation)
    assert y.shape == (tokens, outputs)
    assert_close(y, x, layers, activation, numerics)


@pytest.mark.parametrize(("bits", "terms", "numerics"), [(5, 1, "fast"), (4, 2, "exact"), (3, 1, "exact")])
def test_other_codes(bits: int, terms: int, numerics: str):
    x, layers = problem(50, bits=bits, terms=terms)
    with kernels.numerics(numerics):
        y = shift_mlp(x, *layers, bits)
    assert_close(y, x, layers, "gelu", numerics, bits)


@pytest.mark.parametrize("numerics", COMPILED)
def test_it_is_no_less_exact_than_two_products(numerics: str):
    x, layers = problem(300, 64, 256, 64)
    exact = [x.double(), *(t.double() if t.is_floating_point() else t for t in layers)]
    truth = shift_mlp_twin(*exact)
    with kernels.numerics(numerics):
        fused = (shift_mlp(x, *layers).double() - truth).abs()
        apart = (matshift(matshift(x, *layers[:3], activation="gelu"), *layers[3:]).double() - truth).abs()
    assert fused.mean() <= 1.05 * apart.mean()


def test_bfloat16_keeps_hidden_activations_in_float32():
    x, layers = problem(50)
    y = shift_mlp(x.bfloat16(), *layers)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), shift_mlp_twin(x.bfloat16().float(), *layers), rtol=2**-8, atol=2**-8)


def test_other_dtypes_and_layers_of_unequal_formats_run_through_the_twin():
    x, layers = problem(5)
    assert torch.equal(shift_mlp(x.double(), *layers), shift_mlp_twin(x.double(), *layers))
    _, two_terms = problem(5, terms=2)
    mixed = layers[:3] + two_terms[3:]
    assert torch.equal(shift_mlp(x, *mixed), shift_mlp_twin(x, *mixed))


def test_leading_dimensions_strides_and_missing_biases():
    x, layers = problem(60)
    layers[2] = layers[5] = None
    expected = shift_mlp(x, *layers)
    assert torch.equal(shift_mlp(x.view(3, 4, 5, 20), *layers), expected.view(3, 4, 5, 24))
    assert torch.equal(shift_mlp(x.T.contiguous().T, *layers), expected)
    assert torch.equal(shift_mlp(x[:, None].expand(-1, 2, -1), *layers)[:, 1], expected)
    assert torch.equal(shift_mlp(x[0], *layers), expected[0])
    torch.testing.assert_close(expected, shift_mlp_twin(x, *layers))


def test_nothing_in_nothing_out():
    x, layers = problem(0)
    assert shift_mlp(x, *layers).shape == (0, 24)
    x, layers = problem(3, outputs=0)
    assert shift_mlp(x, *layers).shape == (3, 0)
    x, layers = problem(3, inputs=0)
    torch.testing.assert_close(shift_mlp(x, *layers), shift_mlp_twin(x, *layers))


@pytest.mark.parametrize("numerics", COMPILED)
@pytest.mark.parametrize("broken", [float("inf"), float("nan"), 1e30])
def test_a_number_out_of_range_spoils_its_own_token_only(numerics: str, broken: float):
    x, layers = problem(50)
    with kernels.numerics(numerics):
        expected = shift_mlp(x, *layers)
        x[17, 3] = broken
        y = shift_mlp(x, *layers)
    twin = shift_mlp_twin(x, *layers)
    assert torch.equal(y[17].isnan(), twin[17].isnan())
    torch.testing.assert_close(y[17], twin[17], rtol=1e-4, atol=1e-4, equal_nan=True)
    others = torch.arange(50) != 17
    for outcome in (expected, y):
        assert_close(outcome[others], x[others], layers, "gelu", numerics)


@pytest.mark.parametrize("tokens", [1, 61, 700])
def test_threads_share_the_tokens(torch_threads: int, tokens: int):
    x, layers = problem(tokens)
    assert_close(shift_mlp(x, *layers), x, layers, "gelu", "exact")


def test_many_python_threads_at_once():
    x, layers = problem(100)
    expected = shift_mlp(x, *layers)
    wrong = []

    def run() -> None:
        for _ in range(10):
            if not torch.equal(shift_mlp(x, *layers), expected):
                wrong.append(1)

    workers = [threading.Thread(target=run) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_op_keeps_torchs_rules():
    x, layers = problem(5)
    op = torch.ops.shiftadd3d.shift_mlp.default
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op, (x, *layers, 4, "gelu"), test_utils=checks)


def test_torch_compile_sees_through_for_any_number_of_tokens():
    _, layers = problem(0)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def block(x: Tensor) -> Tensor:
        return x.tanh() + shift_mlp(x.tanh(), *layers)[..., :20]

    for tokens in (40, 9, 3):
        x, _ = problem(tokens)
        torch.testing.assert_close(block(x), x.tanh() + shift_mlp(x.tanh(), *layers)[..., :20])


def test_numerics_twin_runs_no_compiled_code(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MLP, "function", lambda **spec: pytest.fail("compiled code"))
    x, layers = problem(5)
    with kernels.numerics("twin"):
        assert torch.equal(shift_mlp(x, *layers), shift_mlp_twin(x, *layers))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"activation": "tanh"}, "activation must be one of none, relu, gelu, not 'tanh'"),
        ({"x": torch.zeros(3, 21)}, r"x \[3, 21\] has 21 inputs, but rows of 10 bytes hold 20 codes"),
        ({"codes": problem(1, hidden=42)[1][3]}, "the first layer has 40 outputs, but rows of 21 bytes in the second"),
        ({"bias": torch.zeros(25)}, r"bias must be floating point \[24\]"),
        ({"hidden_offset": torch.zeros(1, 40)}, r"offset must be int8 \[1, 40\]"),
    ],
)
def test_what_does_not_go_together_is_named(change: dict, complaint: str):
    x, layers = problem(3)
    names = ("x", "hidden_codes", "hidden_offset", "hidden_bias", "codes", "offset", "bias")
    with pytest.raises(UserError, match=complaint):
        shift_mlp(**dict(zip(names, (x, *layers), strict=True)) | change)


def test_the_smallest_target_computes_the_same(on_target: Callable[[str], None]):
    on_target("generic")
    x, layers = problem(33)
    torch.testing.assert_close(shift_mlp(x, *layers), shift_mlp_twin(x, *layers), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "form", "instruction"),
    [
        ("avx2", "int16", "vpmaddwd"),
        ("avx2", "int8", "vpmaddubsw"),
        ("avx512_vnni", "int16", "vpdpwssd"),
        ("avx512_vnni", "int8", "vpdpbusd"),
        ("amx", "bfloat16x3", "tdpbf16ps"),
    ],
)
def test_every_machine_gets_its_own_instructions(name: str, form: str, instruction: str):
    spec = {"form": form, "bits": 4, "terms": 1, "dtype": "float32", "activation": "gelu"}
    assert MLP.assembly(targets.find(name), **spec).count(instruction) >= 2
