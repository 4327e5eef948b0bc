"""MatShift: every form against the twin, on any shape, layout, thread and number, and as a citizen of torch."""

from __future__ import annotations

import copy
import itertools
import os
import threading
from collections.abc import Callable

import psutil
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bounds import assert_within, linear_bound, unit_roundoff
from shiftadd3d import UserError, kernels
from shiftadd3d.kernels.cpu.blocks import COARSE_GELU_ERROR
from shiftadd3d.kernels.cpu.forms import error_bound, forms
from shiftadd3d.kernels.cpu.matshift import MATSHIFT
from shiftadd3d.kernels.ops.matshift import matshift
from shiftadd3d.kernels.reference import activations, power_of_two
from shiftadd3d.kernels.reference.matshift import matshift_twin
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.numerics import COMPILED
from shiftadd3d.nn import ShiftConv2d, ShiftLinear

pytest.importorskip("tvm")

FORMS: list[tuple[str, int, int]] = [
    ("exact", 4, 1),
    ("exact", 4, 2),
    ("exact", 5, 1),
    ("exact", 2, 2),
    ("exact", 3, 1),
    ("exact", 6, 1),
    ("fast", 4, 1),
    ("fast", 5, 1),
    ("int8", 4, 1),
    ("int8", 3, 1),
    ("int8", 5, 1),
]
"""Numerics, bits, terms."""


def layer(outputs: int, inputs: int, bits: int = 4, terms: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, offsets and the weight they stand for, with channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight *= torch.exp2(torch.randint(-9, 5, (outputs, 1), generator=generator).float())
    codes = power_of_two.encode(weight, bits, terms)
    return power_of_two.pack(codes.codes, bits), codes.offset, power_of_two.decode(*codes)


def assert_as_exact_as_promised(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, numerics: str, bits: int, terms: int = 1
) -> None:
    """Against float64: no worse than torch's own float32 product, or within the bound that the form states."""
    exact = F.linear(x.double(), weight.double(), bias.double())
    error = (y.double() - exact).abs()
    size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    stated = error_bound(forms(targets.current(), numerics, bits, terms, "float32")[0], bits)
    if stated:
        bound = stated * x.double().abs().amax(-1, keepdim=True) * weight.double().abs().sum(-1)
        assert (error <= bound + 1e-6 * size).all()
        return
    assert (error <= 1e-6 * size).all()
    if y.numel() > 100_000:  # few are no sample
        torchs = (F.linear(x, weight, bias).double() - exact).abs()
        assert (error / size).mean() <= 1.05 * (torchs / size).mean()


@pytest.fixture(autouse=True)
def kernels_really_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that fell back on its twin would make the comparisons below pass for nothing."""
    real = MATSHIFT.function

    def function(**spec: object) -> object:
        found = real(**spec)
        assert found is not None
        return found

    monkeypatch.setattr(MATSHIFT, "function", function)


@pytest.mark.parametrize(("numerics", "bits", "terms"), FORMS)
@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 90) | st.sampled_from([255, 256, 257, 512, 513, 1030]),
    outputs=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_any_shape_is_as_exact_as_promised(
    numerics: str, bits: int, terms: int, rows: int, inputs: int, outputs: int, seed: int
):
    codes, offset, weight = layer(outputs, inputs, bits, terms, seed)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    bias = torch.randn(outputs)
    with kernels.numerics(numerics):
        y = matshift(x, codes, offset, bias, bits)
    assert_as_exact_as_promised(y, x, weight, bias, numerics, bits, terms)


@pytest.mark.parametrize("numerics", COMPILED)
@pytest.mark.parametrize("shape", [(196, 192, 768), (784, 1024, 128), (3000, 64, 64)])
def test_the_shapes_of_vision_transformers(numerics: str, shape: tuple[int, int, int], torch_threads: int):
    rows, inputs, outputs = shape
    codes, offset, weight = layer(outputs, inputs)
    x, bias = torch.randn(rows, inputs), torch.randn(outputs)
    with kernels.numerics(numerics):
        y = matshift(x, codes, offset, bias)
    assert_as_exact_as_promised(y, x, weight, bias, numerics, 4)


@pytest.mark.parametrize(
    ("numerics", "terms", "dtype", "activation"),
    [
        *itertools.product(COMPILED, (1,), (torch.float32, torch.bfloat16), ("none", "relu", "gelu")),
        ("exact", 2, torch.bfloat16, "none"),
    ],
)
def test_activations_and_dtypes_are_those_of_the_twin(numerics: str, terms: int, dtype: torch.dtype, activation: str):
    codes, offset, weight = layer(37, 100, 4, terms)
    x = torch.randn(3, 7, 100).to(dtype)
    bias = torch.randn(37).to(dtype)
    with kernels.numerics(numerics):
        y = matshift(x, codes, offset, bias, 4, activation)
    assert y.dtype == dtype
    assert y.shape == (3, 7, 37)
    stated = error_bound(forms(targets.current(), numerics, 4, terms, "float32")[0], 4)
    weight = weight.to(dtype)  # two terms do not all fit bfloat16, in which the twin has its weights, too
    product = F.linear(x.double(), weight.double(), bias.double())
    exact = activations.apply(activation, product)
    bound = linear_bound(x, weight, bias)
    bound += stated * x.double().abs().amax(-1, keepdim=True) * weight.double().abs().sum(-1)
    if activation == "gelu":  # nowhere steeper than 1.13, and see `test_gelu_is_the_exact_one`
        bound = 1.13 * bound + 5 * unit_roundoff() * product.abs() + (COARSE_GELU_ERROR if stated > 2**-10 else 0)
    if dtype == torch.bfloat16:
        bound += unit_roundoff(dtype) * (exact.abs() + bound)
    assert_within(y, exact, bound)


def test_gelu_is_the_exact_one():
    identity = power_of_two.encode(torch.eye(64))
    x = torch.cat([torch.linspace(-8, 8, 64 * 200), torch.tensor([-1e30, -1e4, -30, 30, 1e4, 1e30] * 32)]).view(-1, 64)
    y = matshift(x, power_of_two.pack(identity.codes, 4), identity.offset, activation="gelu")
    # With u a rounding, erf is off by 3 units in its last place, 6 u at most, and its argument, rounded twice, moves it
    # by u at most; its product with x / 2 is rounded, and so is the sum of that and x / 2, |x| at most: 10 u of x / 2.
    assert_within(y, F.gelu(x.double()), 5 * unit_roundoff() * x.double().abs())
    far = x.abs() > 5.5  # where erf is 1 in float32
    assert torch.equal(y[far], x[far].clamp(min=0))


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_integers_come_out_bit_for_bit(numerics: str):
    codes, offset, weight = layer(40, 300)
    x = torch.randint(-100, 101, (50, 300)).float()
    with kernels.numerics(numerics):
        y = matshift(x, codes, offset)
    assert torch.equal(y.double(), x.double() @ weight.double().T)


def test_8_bits_hold_integers_up_to_127():
    codes, offset, weight = layer(40, 600)
    x = torch.randint(-127, 128, (50, 600)).float()
    x[:, 7], x[1], weight_sign = 127, 127, weight[0].sign()
    x[2] = 127 * weight_sign  # the largest sum that a channel can make
    with kernels.numerics("int8"):
        y = matshift(x, codes, offset)
    assert torch.equal(y.double(), x.double() @ weight.double().T)


@pytest.mark.parametrize("numerics", COMPILED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_spread_as_in_the_twin(numerics: str, value: float):
    codes, offset, _ = layer(20, 33)
    x = torch.randn(9, 33)
    x[2, 5] = value
    x[7, 32] = value
    x[7, 31] = -value
    with kernels.numerics(numerics):
        y = matshift(x, codes, offset, torch.ones(20))
    twin = matshift_twin(x, codes, offset, torch.ones(20))
    assert torch.equal(y.isnan(), twin.isnan())
    assert torch.equal(y.isinf(), twin.isinf())
    torch.testing.assert_close(y, twin, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("numerics", COMPILED)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_nan_survives_activations_and_bfloat16(numerics: str, activation: str):
    codes, offset, _ = layer(20, 33)
    x = torch.randn(9, 33, dtype=torch.bfloat16)
    x[4] = float("nan")
    with kernels.numerics(numerics):
        assert matshift(x, codes, offset, None, 4, activation)[4].isnan().all()


@pytest.mark.parametrize("numerics", COMPILED)
@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("exponent", [-126, -60, 60, 126])
def test_exponents_at_the_ends_of_their_range(numerics: str, bits: int, exponent: int):
    low, high = power_of_two.offset_range(bits)
    weight = torch.randn(20, 40)
    weight = power_of_two.quantize(weight / weight.abs().max() * 2.0 ** max(low, min(high, exponent)), bits)
    codes = power_of_two.encode(weight, bits)
    packed = power_of_two.pack(codes.codes, bits)
    x = torch.randn(10, 40).clamp(-3, 3) * 2.0 ** min(126, max(-126, -exponent))  # 4 * 2**126 would be infinite
    with kernels.numerics(numerics):
        y = matshift(x, packed, codes.offset, bits=bits)
    assert_as_exact_as_promised(y, x, weight, torch.zeros(20), numerics, bits)
    assert y.abs().max() > 0.01


@pytest.mark.parametrize("numerics", COMPILED)
def test_rows_of_tiny_and_zero_activations(numerics: str):
    codes, offset, weight = layer(20, 40)
    x = torch.randn(4, 40) * torch.tensor([[0.0], [1e-30], [1e-38], [1e-44]])
    with kernels.numerics(numerics):
        y = matshift(x, codes, offset)
    assert torch.equal(y[0], torch.zeros(20))
    exact = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(y[1], exact[1], rtol=1e-3, atol=1e-33)
    assert (y - exact)[2:].abs().max() < 2.0**-120


@pytest.mark.parametrize("numerics", COMPILED)
def test_any_layout_in_memory(numerics: str):
    codes, offset, _ = layer(24, 48)
    base = torch.randn(10, 6, 48 * 2 + 1)
    with kernels.numerics(numerics):
        for x in (
            base[..., 1:49],
            base[..., ::2][..., :48],
            base[:, 0, 48:96].expand(3, 10, 48),
            torch.randn(48, 11).T,
            torch.randn(48),
        ):
            assert torch.equal(matshift(x, codes, offset), matshift(x.contiguous(), codes, offset))
        x = torch.randn(5, 48)
        strided = torch.empty(1, 24, 48, dtype=torch.uint8)[..., ::2].copy_(codes)
        assert torch.equal(matshift(x, strided, offset), matshift(x, codes, offset))


@pytest.mark.parametrize("shape", [(0, 48), (3, 0, 48), (0,)])
def test_empty_input(shape: tuple[int, ...]):
    inputs = shape[-1]
    codes, offset, _ = layer(24, inputs or 1)
    if not inputs:
        codes = codes[..., :0]
    y = matshift(torch.zeros(shape), codes, offset, torch.ones(24))
    assert torch.equal(y, torch.ones(*shape[:-1], 24))


def test_other_dtypes_and_the_twin_setting_run_plain_torch(monkeypatch: pytest.MonkeyPatch):
    codes, offset, weight = layer(24, 48)
    monkeypatch.setattr(MATSHIFT, "function", lambda **spec: pytest.fail("compiled code"))
    x = torch.randn(5, 48)
    assert torch.equal(matshift(x.double(), codes, offset), F.linear(x.double(), weight.double()))
    with kernels.numerics("twin"):
        assert torch.equal(matshift(x, codes, offset), F.linear(x, weight))


def test_without_a_kernel_the_twin_computes(monkeypatch: pytest.MonkeyPatch):
    codes, offset, weight = layer(24, 48)
    monkeypatch.setattr(MATSHIFT, "function", lambda **spec: None)
    x = torch.randn(5, 48)
    assert torch.equal(matshift(x, codes, offset), F.linear(x, weight))


@pytest.mark.parametrize("numerics", COMPILED)
def test_rows_do_not_depend_on_their_neighbours_or_the_threads(numerics: str, torch_threads: int):
    codes, offset, _ = layer(70, 300)
    x = torch.randn(500, 300)
    with kernels.numerics(numerics):
        y = matshift(x, codes, offset)
        for rows in (1, 2, 6, 13, 101):
            assert torch.equal(matshift(x[:rows], codes, offset), y[:rows])


@pytest.mark.parametrize("numerics", COMPILED)
def test_eight_python_threads_at_once(numerics: str, torch_threads: int):
    codes, offset, _ = layer(40, 64)
    xs = [torch.randn(100, 64) for _ in range(8)]
    alike = [0] * 8

    def work(i: int) -> None:
        for _ in range(20):
            alike[i] += torch.equal(matshift(xs[i], codes, offset), alone[i])

    with kernels.numerics(numerics):
        alone = [matshift(x, codes, offset) for x in xs]
        workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert alike == [20] * 8


class Rows(torch.utils.data.Dataset[Tensor]):
    """A data set that runs the kernel in its workers, which are forked."""

    def __init__(self, codes: Tensor, offset: Tensor) -> None:
        self.codes, self.offset = codes, offset

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return matshift(torch.full((30, 64), float(index)), self.codes, self.offset)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_workers_of_a_data_loader_that_are_forked_after_a_call(torch_threads: int):
    codes, offset, weight = layer(40, 64)
    matshift(torch.randn(1000, 64), codes, offset)
    loader = torch.utils.data.DataLoader(
        Rows(codes, offset), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for index, y in enumerate(loader):
        torch.testing.assert_close(y, (weight.sum(1) * index).expand(30, 40), rtol=1e-5, atol=1e-4)


def test_ten_thousand_calls_do_not_grow_memory():
    codes, offset, _ = layer(16, 16)
    x = torch.randn(4, 16)
    process = psutil.Process()
    for _ in range(1000):
        matshift(x, codes, offset)
    before = process.memory_info().rss
    for _ in range(10_000):
        matshift(x, codes, offset)
    assert process.memory_info().rss - before < 2 << 20


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_gradients_are_those_of_the_twin(activation: str):
    codes, offset, _ = layer(24, 48)
    x = torch.randn(2, 5, 48, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    gradient = torch.randn(2, 5, 24)
    ours = torch.autograd.grad(matshift(x, codes, offset, bias, 4, activation), [x, bias], gradient)
    twins = torch.autograd.grad(matshift_twin(x, codes, offset, bias, 4, activation), [x, bias], gradient)
    torch.testing.assert_close(ours, twins, rtol=1e-4, atol=1e-5)
    assert matshift(x.detach(), codes, offset, bias.detach()).requires_grad is False


def test_torch_compile_sees_through(monkeypatch: pytest.MonkeyPatch):
    codes, offset, _ = layer(24, 48)

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return matshift(x.tanh(), codes, offset, None, 4, "relu").sum(-1)

    net = Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        x = torch.randn(rows, 48)
        torch.testing.assert_close(compiled(x), net(x))
        with kernels.numerics("twin"):
            torch.testing.assert_close(compiled(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize(("bits", "terms"), [(4, 1), (5, 2)])
def test_frozen_layers_run_on_it_without_gradients(monkeypatch: pytest.MonkeyPatch, bits: int, terms: int):
    layers = ShiftLinear(48, 24, bits=bits, terms=terms), ShiftConv2d(3, 8, kernel_size=4, bits=bits, terms=terms)
    inputs = torch.randn(5, 7, 48), torch.randn(2, 3, 8, 8)
    for made, x in zip(layers, inputs, strict=True):
        packed = made.eval().freeze()
        twin = made(x)
        assert torch.equal(packed(x), twin)
        exact = copy.deepcopy(made).double()(x.double())
        with torch.no_grad():
            weight = made.quantized_weight().flatten(1)
            rows = x if x.dim() == 3 else F.unfold(x, 4, stride=made.stride).mT
            bound = linear_bound(rows, weight, made.bias)
            assert_within(packed(x), exact, bound if x.dim() == 3 else bound.mT.reshape(exact.shape))
            assert torch.equal(torch.compile(packed, fullgraph=True, backend="eager")(x), packed(x))
            with monkeypatch.context() as patch:
                patch.setattr(MATSHIFT, "function", lambda **spec: pytest.fail("compiled code"))
                with pytest.raises(pytest.fail.Exception):
                    packed(x)
                with kernels.numerics("twin"):
                    assert torch.equal(packed(x), twin)


def test_the_op_is_well_behaved():
    codes, offset, _ = layer(24, 48)
    x = torch.randn(5, 48, requires_grad=True)
    arguments = (x, codes, offset, torch.randn(24), 4, "gelu")
    torch.library.opcheck(torch.ops.shiftadd3d.matshift.default, arguments)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.zeros(3, 47)}, r"x \[3, 47\] has 47 inputs, but rows of 25 bytes hold 50 codes of 4 bits"),
        ({"x": torch.zeros(3, 49, dtype=torch.int64)}, r"x must be floating point \[\*, inputs\], not int64 \[3, 49\]"),
        ({"codes": torch.zeros(24, 25, dtype=torch.uint8)}, r"codes must be uint8 \[terms, outputs, bytes\]"),
        ({"offset": torch.zeros(1, 23, dtype=torch.int8)}, r"offset must be int8 \[1, 24\]"),
        ({"bias": torch.zeros(23)}, r"bias must be floating point \[24\], not float32 \[23\]"),
        ({"bits": 7}, "bits must be an integer from 2 to 6, not 7"),
        ({"activation": "tanh"}, "activation must be one of none, relu, gelu, not 'tanh'"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(change: dict[str, object], complaint: str):
    codes, offset, _ = layer(24, 49)
    arguments = {"x": torch.zeros(3, 49), "codes": codes, "offset": offset, "bias": None, "bits": 4, **change}
    with pytest.raises(UserError, match=complaint):
        matshift(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize(("numerics", "terms"), [("exact", 2), ("fast", 1), ("int8", 1)])
def test_it_compiles_for_every_target(target: targets.CpuTarget, numerics: str, terms: int):
    form = forms(target, numerics, 4, terms, "float32")[0]
    text = MATSHIFT.assembly(target, form=form, bits=4, terms=terms, dtype="float32", activation="none")
    if target.has_amx:
        products = 4 if form == "bfloat16x1" else 12
        assert text.count("tdpbf16ps") >= products
        assert text.count("tdpbf16ps") % products == 0
        assert text.count("ldtilecfg") == text.count("tilerelease")
    elif form == "int16":
        assert ("vpdpwssd" if target.has_vnni else "vpmaddwd") in text
    elif form == "int8":
        assert ("vpdpbusd" if target.has_vnni else "vpmaddubsw") in text
    elif target.has_fma:
        assert text.count("vfmadd") >= 24
    assert ("%zmm" in text) == target.has_avx512


@pytest.mark.parametrize("target", ["generic", "avx2"])
def test_a_smaller_target_computes_the_same(target: str, on_target: Callable[[str], None]):
    on_target(target)
    x, bias = torch.randn(31, 177), torch.randn(21)
    for numerics, bits, terms in (("exact", 4, 1), ("exact", 5, 2), ("fast", 4, 1), ("int8", 4, 1)):
        codes, offset, weight = layer(21, 177, bits, terms)
        with kernels.numerics(numerics):
            y = matshift(x, codes, offset, bias, bits)
        assert_as_exact_as_promised(y, x, weight, bias, numerics, bits, terms)


def test_rounding_can_be_told_from_a_mistake(monkeypatch: pytest.MonkeyPatch):
    """The trial that guards untested machines notices a product that is slightly wrong."""
    spec = {"form": "float32", "bits": 4, "terms": 1, "dtype": "float32", "activation": "none"}
    function = MATSHIFT.function(**spec)
    MATSHIFT.trial(function, **spec)

    def wrong(*arguments: object) -> None:
        function(*arguments)
        arguments[4][-1, -1] *= 1 + 1e-4

    with pytest.raises(AssertionError, match="it is off by"):
        MATSHIFT.trial(wrong, **spec)
