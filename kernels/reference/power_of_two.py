"""The power-of-two code: what a multiplication-free weight is, and how it is stored.

A weight is ``sign * 2**exponent`` with sign in {-1, 0, +1}. The exponents of one output channel lie in a window of
``2**(bits - 1) - 1`` consecutive integers that ends at the channel's *offset*, so scaling by the channel is a shift as
well. With ``terms=2`` a weight is the sum of two such numbers, each with a window of its own.

A code is an unsigned integer of ``bits`` bits::

    code = negative << (bits - 1) | level
    level 0                 the weight 0 (always stored without the sign bit)
    level 1 .. L            2**(offset - L + level),  L = 2**(bits - 1) - 1

so codes order magnitudes, the largest magnitude of a channel has level L, and 4 bits hold seven exponents and zero.

Rounding is to the *nearest value* (ties to the larger power), not to the nearest exponent: it has the smaller error,
and on the bits of a float it is one addition, because adding half of the significand's range carries into the
exponent exactly when the significand is at least 1.5. A channel's offset is the rounded exponent of its largest
weight, or, for codes of 2 and 3 bits, whichever of that and the two below has the smallest squared error over the
channel. Magnitudes below half of the smallest power in the window, and that half itself, become 0.

Everything else in the project asks this module; the layers know it as `shiftadd3d.nn.power_of_two`.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2; Elhoushi et al., DeepShift (CVPR workshops 2021).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.runtime.recording import is_recorded

MIN_BITS, MAX_BITS = 2, 6
MAX_TERMS = 2

# Every coded weight, and its reciprocal, is a normal number of float32 and bfloat16.
MIN_EXPONENT, MAX_EXPONENT = -126, 126

# A window this short loses more by reaching up to the largest weight than by cutting it off: the offset is searched.
MAX_SEARCHED_LEVELS = 3

# dtype -> (integer dtype of the same width, bits of the significand's fraction)
_FLOAT_LAYOUT = {torch.float32: (torch.int32, 23), torch.float64: (torch.int64, 52)}


class PowerOfTwoCodes(NamedTuple):
    """Weights as integers: `codes` [terms, *channels, inputs] uint8, `offset` [terms, *channels] int8, `bits` each."""

    codes: Tensor
    offset: Tensor
    bits: int


def num_exponents(bits: int) -> int:
    """How many exponents a code of `bits` bits can tell apart: ``2**(bits - 1) - 1``."""
    return 2 ** (bits - 1) - 1


def check_format(bits: int, terms: int) -> None:
    """Raise `UserError` unless `bits` and `terms` name a format that exists."""
    if not (isinstance(bits, int) and MIN_BITS <= bits <= MAX_BITS):
        raise UserError(f"bits must be an integer from {MIN_BITS} to {MAX_BITS}, not {bits!r}")
    if not (isinstance(terms, int) and 1 <= terms <= MAX_TERMS):
        raise UserError(f"terms must be 1 or {MAX_TERMS}, not {terms!r}")


def offset_range(bits: int, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Smallest and largest offset whose whole window `dtype` represents exactly."""
    lowest, highest = (-24, 15) if dtype == torch.float16 else (MIN_EXPONENT, MAX_EXPONENT)
    return lowest + num_exponents(bits) - 1, highest


def check_finite(weight: Tensor, name: str | None = None) -> None:
    """Raise `UserError` if `weight` holds NaN or infinity, which no power of two stands for."""
    if weight.is_meta or bool(torch.isfinite(weight).all()):
        return
    broken = int((~torch.isfinite(weight)).sum())
    raise UserError(
        f"{name or 'the weight'} holds {broken} of {weight.numel()} values that are NaN or infinite; "
        "a power-of-two code has no such values"
    )


def quantize(weight: Tensor, bits: int = 4, terms: int = 1, *, stochastic: bool = False) -> Tensor:
    """Replace every weight by the nearest one that the code can express.

    Args:
        weight: [*channels, inputs], any floating dtype. The last dimension shares one offset.
        bits: bits of one code, 2 to 6.
        terms: 1, or 2 for a sum of two powers of two (the second one codes what the first one leaves over).
        stochastic: round up or down at random so that the expected value is the weight (magnitudes above the channel's
            largest power excepted).

    Returns:
        The quantised weights, shape and dtype of `weight`. A channel that holds NaN or infinity becomes NaN: the
        training loss shows it, and no device has to be waited for. `encode` and the layers' constructors raise
        instead.
    """
    check_format(bits, terms)
    weight = weight.detach()
    if weight.numel() == 0:
        return weight.clone()
    work = weight if weight.dtype in _FLOAT_LAYOUT else weight.float()
    low, high = offset_range(bits, weight.dtype)
    total = _quantize_term(work, num_exponents(bits), low, high, stochastic)
    for _ in range(terms - 1):
        total = total + _quantize_term(work - total, num_exponents(bits), low, high, stochastic)
    return total.to(weight.dtype)


def round_to_windows(weight: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Round to the nearest weight whose exponents lie in the windows that end at `offset`, instead of deriving these.

    `quantize` leaves the result as it is, so a layer that stores it computes with it: the windows it derives hold all
    exponents that occur (with two terms of 2 or 3 bits, where it searches, ask it).

    Args:
        weight: [*channels, inputs], float32 or float64.
        offset: [terms, *channels] integers within `offset_range`; a second one must be below the first.

    Returns:
        Weights of the shape and dtype of `weight`.
    """
    levels = num_exponents(bits)
    bottom = exact_exp2(offset.to(torch.int32) - (levels - 1), weight.dtype).unsqueeze(-1)
    if len(bottom) > 1:
        # From 1.5 times the window's top on, `quantize` would take the next power for the top.
        limit = bottom[0] * (1.25 * 2 ** (levels - 1))
        weight = torch.minimum(torch.maximum(weight, -limit), limit)
    total = _round_within(weight, bottom[0], levels, stochastic=False)
    for term_bottom in bottom[1:]:
        total = total + _round_within(weight - total, term_bottom, levels, stochastic=False)
    return total


def encode(weight: Tensor, bits: int = 4, terms: int = 1, *, name: str | None = None) -> PowerOfTwoCodes:
    """Codes of the nearest weights; ``decode(*encode(w, b, t), w.dtype)`` equals ``quantize(w, b, t)`` bit for bit.

    Args:
        weight: [*channels, inputs].
        name: how an error calls the weight.

    Raises:
        UserError: for NaN, infinity, or a format that does not exist.
    """
    check_format(bits, terms)
    check_finite(weight, name)
    weight = weight.detach()
    work = weight if weight.dtype in _FLOAT_LAYOUT else weight.float()
    low, high = offset_range(bits, weight.dtype)
    codes, offsets = [], []
    for _ in range(terms):
        value = _quantize_term(work, num_exponents(bits), low, high, stochastic=False) if work.numel() else work
        code, offset = encode_exact(value, bits, low)
        codes.append(code)
        offsets.append(offset)
        work = work - value
    return PowerOfTwoCodes(torch.stack(codes), torch.stack(offsets), bits)


def encode_exact(value: Tensor, bits: int, lowest_offset: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes [*channels, inputs] uint8 and offsets [*channels] int8 of powers of two that lie within one window."""
    levels = num_exponents(bits)
    lowest_offset = offset_range(bits)[0] if lowest_offset is None else lowest_offset
    exponent = _exponent(value)
    if value.shape[-1]:
        offset = exponent.masked_fill(value == 0, MIN_EXPONENT).amax(-1).clamp(min=lowest_offset)
    else:
        offset = exponent.new_full(value.shape[:-1], lowest_offset)
    level = torch.where(value == 0, 0, exponent - offset.unsqueeze(-1) + levels)
    if not value.is_meta and bool(((level < 0) | (level > levels) | ((level == 0) & (value != 0))).any()):
        raise ValueError(f"exponents of one channel span more than the {levels} that {bits} bits can hold")
    code = level | ((value < 0).to(level.dtype) << (bits - 1))
    return code.to(torch.uint8), offset.to(torch.int8)


def decode(codes: Tensor, offset: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights [*channels, inputs] of codes [terms, *channels, inputs] and offsets [terms, *channels], in `dtype`."""
    levels = num_exponents(bits)
    codes = codes.to(torch.int32)
    level = codes % (levels + 1) if is_recorded() else codes & levels
    exponent = level + (offset.to(torch.int32) - levels).unsqueeze(-1)
    if is_recorded():
        magnitude = torch.where(level == 0, 0.0, exact_exp2(exponent))
        return _sum_terms(torch.where(codes > levels, -magnitude, magnitude), dtype)
    pattern = torch.where(level == 0, 0, (exponent + 127) << 23)
    value = torch.where(codes > levels, pattern | -(2**31), pattern).view(torch.float32)
    return _sum_terms(value, dtype)


def exact_exp2(exponent: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``2**exponent`` of int32 exponents within the code's range: the bits put together, exact where pow() is not."""
    if is_recorded():
        powers = [2.0**power for power in range(-127, MAX_EXPONENT + 2)]
        return torch.tensor(powers, device=exponent.device)[(exponent + 127).long()].to(dtype)
    return ((exponent + 127) << 23).view(torch.float32).to(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Store codes densely: [..., inputs] uint8 to [..., ceil(inputs * bits / 8)] uint8.

    Bit ``j`` of code ``i`` is bit ``i * bits + j`` of the row, counted from the least significant bit of the first
    byte. With 4 bits a byte holds two codes, the first one in its low half.
    """
    if bits == 4:
        if codes.shape[-1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    stream = (codes.unsqueeze(-1) >> _bit_numbers(bits, codes)) & 1
    stream = stream.flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (stream << _bit_numbers(8, codes)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, inputs: int) -> Tensor:
    """Undo `pack`: [..., ceil(inputs * bits / 8)] uint8 to [..., inputs] uint8."""
    if is_recorded():  # shifts, and sums of uint8, are not everywhere
        places = 2 ** torch.arange(8, device=packed.device)
        stream = torch.div(packed.long().unsqueeze(-1), places, rounding_mode="floor") % 2
        stream = stream.flatten(-2)[..., : inputs * bits].unflatten(-1, (inputs, bits))
        return (stream * places[:bits]).sum(-1).to(torch.uint8)
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :inputs]
    stream = ((packed.unsqueeze(-1) >> _bit_numbers(8, packed)) & 1).flatten(-2)[..., : inputs * bits]
    return (stream.unflatten(-1, (inputs, bits)) << _bit_numbers(bits, packed)).sum(-1, dtype=torch.uint8)


def _bit_numbers(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)


def _sum_terms(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[terms, ...] float32 to [...] in `dtype`. Two terms add up in float32 before a narrower dtype rounds them."""
    if values.shape[0] == 1:
        return values[0].to(dtype)
    return (values if dtype != torch.float64 else values.double()).sum(0).to(dtype)


def _nearest_power(magnitude: Tensor, stochastic: bool = False) -> Tensor:
    """The power of two next to each magnitude (normal, positive): the carry of an addition to the float's bits."""
    if is_recorded() and not stochastic:
        return _nearest_power_by_arithmetic(magnitude)
    integer, fraction_bits = _FLOAT_LAYOUT[magnitude.dtype]
    pattern = magnitude.view(integer)
    if stochastic:
        carry = torch.randint_like(pattern, 1 << fraction_bits)
    else:
        carry = 1 << (fraction_bits - 1)
    return ((pattern + carry) & (-1 << fraction_bits)).view(magnitude.dtype)


def _nearest_power_by_arithmetic(magnitude: Tensor) -> Tensor:
    """The same where no bits can be read: a binary search for the exponent, in which every product is exact."""
    power = torch.ones_like(magnitude)
    for step in (64, 32, 16, 8, 4, 2, 1):
        factor = torch.where(magnitude >= 2.0**step, 2.0**step, 1.0).to(magnitude.dtype)
        factor = torch.where(magnitude < 2.0 ** (1 - step), 2.0**-step, factor).to(magnitude.dtype)
        magnitude, power = magnitude / factor, power * factor
    return torch.where(magnitude >= 1.5, 2 * power, power)


def _quantize_term(weight: Tensor, levels: int, low: int, high: int, stochastic: bool) -> Tensor:
    """Nearest coded weight, one term. float32 or float64, not empty. It runs each training step: few, cheap passes."""
    peak = weight.abs().amax(-1, keepdim=True)
    # NaN - NaN and inf - inf are NaN: the sum carries a broken channel into the result instead of hiding it.
    bottom = _nearest_power(peak.clamp(2.0**low, 2.0**high)) * 2.0 ** (1 - levels) + (peak - peak)
    value = _round_within(weight, bottom, levels, stochastic)
    if levels > MAX_SEARCHED_LEVELS:
        return value
    unit = bottom.reciprocal()  # squares of errors in this unit neither overflow nor vanish

    def squared_error(value: Tensor) -> Tensor:
        return ((weight - value) * unit).square().sum(-1, keepdim=True)

    error = squared_error(value)
    for _ in range(2):
        bottom = (bottom * 0.5).clamp_(min=2.0 ** (low - levels + 1))
        candidate = _round_within(weight, bottom, levels, stochastic)
        candidate_error = squared_error(candidate)
        better = candidate_error < error
        value = torch.where(better, candidate, value)
        error = torch.where(better, candidate_error, error)
    return value


def _round_within(weight: Tensor, bottom: Tensor, levels: int, stochastic: bool) -> Tensor:
    """Round to 0 or to one of the `levels` powers of two from `bottom` [*channels, 1] upwards."""
    scaled = weight * bottom.reciprocal()  # exact; from here on the window is 1 .. 2**(levels - 1)
    power = _nearest_power(scaled.abs().clamp_(1.0, 2.0 ** (levels - 1)), stochastic)
    sign = scaled.clamp_(-1.0, 1.0)
    if stochastic:
        sign = (sign + torch.rand_like(sign) * (1 - 2.0**-20)).floor_()  # the factor keeps 1 + rand() below 2
        power = power.clamp_(max=2.0 ** (levels - 1))
    else:
        sign = sign.round_()
    return power.mul_(sign).mul_(bottom).add_(0.0)  # -0 + 0 is +0: zero has one code


def _exponent(value: Tensor) -> Tensor:
    """int32 exponents of powers of two; zero gives an exponent below every window."""
    integer, fraction_bits = _FLOAT_LAYOUT[value.dtype]
    bias = 127 if value.dtype == torch.float32 else 1023
    exponent_mask = 255 if value.dtype == torch.float32 else 2047
    return (((value.view(integer) >> fraction_bits) & exponent_mask) - bias).to(torch.int32)
