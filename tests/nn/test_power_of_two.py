"""What the power-of-two code promises, for every format and every float."""

# Wrong arguments on purpose, and attributes of submodules, to which torch gives no types.
# pyright: reportArgumentType=false

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftadd3d import UserError
from shiftadd3d.nn import power_of_two

FORMATS = [(bits, terms) for bits in range(2, 7) for terms in (1, 2)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

bits_values = st.integers(2, 6)
rows = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12)
quick = settings(max_examples=60, deadline=None)


def as_weight(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(0)


def nearest_by_search(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The definition spelled out: for each offset try all powers of its window, keep what is nearest."""
    weight = weight.double()
    levels = 2 ** (bits - 1) - 1
    out = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        peak = weight[row].abs().max().item()
        if peak == 0:
            continue
        below = 2.0 ** math.floor(math.log2(peak))
        top = math.log2(below if peak - below < 2 * below - peak else 2 * below)
        best = (math.inf, out[row])
        for offset in (top, top - 1, top - 2)[: 3 if levels <= 3 else 1]:
            powers = torch.tensor([0.0, *(2.0 ** (offset - i) for i in range(levels))], dtype=torch.float64)
            # argmin takes the first of equals: zero before the smallest power, larger powers before smaller ones.
            distance = (weight[row].abs().unsqueeze(-1) - powers).abs()
            value = powers[distance.argmin(-1)] * weight[row].sign()
            error = (value - weight[row]).square().sum().item()
            if error < best[0]:
                best = (error, value)
        out[row] = best[1]
    return out


@pytest.mark.parametrize("bits", range(2, 7))
def test_quantize_takes_the_nearest_value_of_the_window(bits: int) -> None:
    weight = torch.randn(16, 40) * torch.logspace(-3, 3, 16, base=10).unsqueeze(1)
    torch.testing.assert_close(
        power_of_two.quantize(weight, bits).double(), nearest_by_search(weight, bits), rtol=0, atol=0
    )


def test_ties_go_to_the_larger_power_and_half_of_the_smallest_goes_to_zero() -> None:
    # 4 bits: 1 down to 1/64 below the largest weight.
    weight = torch.tensor([[1.0, 0.75, 0.374, 1 / 64, 1 / 128, 1.01 / 128]])
    expected = torch.tensor([[1.0, 1.0, 0.25, 1 / 64, 0.0, 1 / 64]])
    assert torch.equal(power_of_two.quantize(weight), expected)


@quick
@given(rows, st.sampled_from([(bits, terms) for bits, terms in FORMATS if terms == 1 or bits > 3]))
def test_quantizing_twice_changes_nothing(values: list[float], code: tuple[int, int]) -> None:
    # Two terms of 2 or 3 bits are left out: their windows are searched, and the sum's best ones may be others.
    once = power_of_two.quantize(as_weight(values), *code)
    assert torch.equal(power_of_two.quantize(once, *code), once)


@quick
@given(rows, bits_values, st.sampled_from([1, 2]))
def test_sign_symmetry(values: list[float], bits: int, terms: int) -> None:
    weight = as_weight(values)
    assert torch.equal(power_of_two.quantize(-weight, bits, terms), -power_of_two.quantize(weight, bits, terms))


@quick
@given(rows, bits_values, st.sampled_from([1, 2]))
def test_order_within_a_channel_is_kept(values: list[float], bits: int, terms: int) -> None:
    weight = as_weight(sorted(values))
    assert (power_of_two.quantize(weight, bits, terms).diff() >= 0).all()


@quick
@given(rows, bits_values, st.integers(-20, 20))
def test_scaling_by_a_power_of_two_only_moves_the_offset(values: list[float], bits: int, shift: int) -> None:
    values = [value for value in values if value == 0 or 1e-20 < abs(value) < 1e20] or [1.0]
    weight = as_weight(values)
    scaled = power_of_two.quantize(weight * 2.0**shift, bits)
    assert torch.equal(scaled, power_of_two.quantize(weight, bits) * 2.0**shift)


@quick
@given(rows, bits_values)
def test_every_weight_is_zero_or_a_power_of_two_in_one_window(values: list[float], bits: int) -> None:
    quantized = power_of_two.quantize(as_weight(values), bits)
    fraction, exponent = np.frexp(quantized.numpy())
    assert set(np.abs(fraction).ravel()) <= {0.0, 0.5}
    used = exponent[fraction != 0]
    if used.size:
        assert used.max() - used.min() < 2 ** (bits - 1) - 1


def test_zero_stays_zero_and_has_one_code() -> None:
    weight = torch.tensor([[0.0, -0.0, 1.0, -1e-9], [0.0, -0.0, 0.0, 0.0]])
    quantized = power_of_two.quantize(weight)
    assert not torch.signbit(quantized[quantized == 0]).any()
    codes = power_of_two.encode(weight).codes
    assert (codes[0][quantized == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_extreme_magnitudes_saturate_or_vanish(dtype: torch.dtype, bits: int) -> None:
    info = torch.finfo(dtype)
    for value in (info.max, info.tiny, info.tiny * info.eps, info.eps):
        weight = torch.tensor([[value, -value, 0.0]], dtype=dtype)
        quantized = power_of_two.quantize(weight, bits)
        assert torch.isfinite(quantized).all()
        assert quantized[0, 0] == -quantized[0, 1] and quantized[0, 2] == 0
        decoded = power_of_two.decode(*power_of_two.encode(weight, bits), dtype)
        assert torch.equal(decoded, quantized)
    assert power_of_two.quantize(torch.tensor([[info.max]], dtype=dtype), bits) > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "terms"), FORMATS)
def test_codes_decode_to_the_quantized_weight_bit_for_bit(bits: int, terms: int, dtype: torch.dtype) -> None:
    weight = (torch.randn(9, 33) * torch.logspace(-4, 3, 9).unsqueeze(1)).to(dtype)
    codes, offset, _ = power_of_two.encode(weight, bits, terms)
    assert codes.dtype == torch.uint8 and codes.shape == (terms, 9, 33) and int(codes.max()) < 2**bits
    assert offset.dtype == torch.int8 and offset.shape == (terms, 9)
    quantized = power_of_two.quantize(weight, bits, terms)
    assert torch.equal(power_of_two.decode(codes, offset, bits, dtype), quantized)


@quick
@given(bits_values, st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_packing_is_undone_by_unpacking(bits: int, inputs: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (2, 3, inputs), dtype=np.uint8))
    packed = power_of_two.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, math.ceil(inputs * bits / 8))
    assert torch.equal(power_of_two.unpack(packed, bits, inputs), codes)


def test_four_bit_codes_lie_two_to_a_byte_low_half_first() -> None:
    codes = torch.tensor([0x3, 0xA, 0xF], dtype=torch.uint8)
    assert power_of_two.pack(codes, 4).tolist() == [0xA3, 0x0F]


def test_more_bits_and_more_terms_never_hurt() -> None:
    weight = torch.randn(64, 64)
    errors = {f: (power_of_two.quantize(weight, *f) - weight).norm().item() for f in FORMATS}
    for bits, terms in FORMATS:
        if bits > 2:
            assert errors[bits, terms] <= errors[bits - 1, terms] * 1.001
        if terms == 2:
            assert errors[bits, 2] < errors[bits, 1]
    # A uniform distribution of log2|w| gives nearest-value rounding a relative error of about 0.19 to 0.2.
    assert errors[4, 1] / weight.norm() < 0.2


def test_stochastic_rounding_has_the_weight_as_its_mean() -> None:
    weight = torch.tensor([[2.0, 1.3, 0.7, -0.45, 0.05, 0.02, -0.004]])
    draws = torch.stack([power_of_two.quantize(weight, 4, stochastic=True) for _ in range(8000)])
    # Neighbouring powers are at most a factor of two apart: deviation below w / 2 for each draw.
    torch.testing.assert_close(draws.mean(0), weight, rtol=0.03, atol=2e-3)
    assert draws[:, 0, 1].unique().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name_and_shown_in_training(broken: float) -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = broken
    with pytest.raises(UserError, match=r"blocks\.0\.fc1 holds 1 of 12 values"):
        power_of_two.encode(weight, name="blocks.0.fc1")
    quantized = power_of_two.quantize(weight)
    assert torch.isnan(quantized[1]).all() and torch.equal(quantized[[0, 2]], weight[[0, 2]])


@pytest.mark.parametrize(("bits", "terms"), [(1, 1), (7, 1), (4.0, 1), (4, 0), (4, 3)])
def test_formats_that_do_not_exist_are_refused(bits: int, terms: int) -> None:
    with pytest.raises(UserError):
        power_of_two.quantize(torch.ones(1, 1), bits, terms)


def test_codes_of_values_that_span_too_wide_a_window_are_refused() -> None:
    with pytest.raises(ValueError, match="span more than"):
        power_of_two.encode_exact(torch.tensor([[1.0, 2.0**-7]]), 4)


def test_empty_weights_work() -> None:
    for shape in ((0, 4), (4, 0)):
        weight = torch.empty(shape)
        assert power_of_two.quantize(weight).shape == shape
        assert power_of_two.decode(*power_of_two.encode(weight)).shape == shape


@pytest.mark.parametrize("terms", [1, 2])
@quick
@given(
    bits=st.integers(2, 6),
    top=st.integers(-12, 12),
    drop=st.integers(1, 6),
    values=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12),
)
def test_quantize_keeps_what_was_rounded_to_given_windows(
    terms: int, bits: int, top: int, drop: int, values: list[float]
) -> None:
    if terms == 2 and bits < 4:  # it searches the first window there
        return
    weight = as_weight(values)
    offset = torch.tensor([[top], [top - drop]])[:terms]
    rounded = power_of_two.round_to_windows(weight, offset, bits)
    assert torch.equal(power_of_two.quantize(rounded, bits, terms), rounded)
    assert power_of_two.encode(rounded, bits, terms).offset[0].item() <= top or not rounded.any()


@pytest.mark.parametrize("bits", range(2, 7))
def test_rounding_to_the_windows_that_quantize_derives_is_quantize(bits: int) -> None:
    weight = torch.randn(32, 40)
    offset = power_of_two.encode(weight, bits).offset
    assert torch.equal(power_of_two.round_to_windows(weight, offset, bits), power_of_two.quantize(weight, bits))
