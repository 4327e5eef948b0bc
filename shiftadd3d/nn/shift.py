"""Linear layers whose weights are powers of two: multiplications become bit shifts.

`ShiftLinear` trains such a layer, `PackedShiftLinear` stores a trained one in 4 bits a weight. What a power-of-two
weight is, `shiftadd3d.nn.power_of_two` defines.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2; Elhoushi et al., DeepShift (CVPR workshops 2021).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from shiftadd3d._errors import UserError
from shiftadd3d.nn import power_of_two

ShiftMode = Literal["Q", "PS"]
SHIFT_MODES = ("Q", "PS")


class _StraightThrough(Function):
    """Value of the quantised weight, gradient of the float one."""

    @staticmethod
    def forward(weight: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


class _ShiftAndSign(Function):
    """``W = sum over terms of sign * 2**shift`` with DeepShift's gradients.

    With g the gradient of W: ``d shift = g W ln 2`` as calculus has it, rounding taken as the identity, and ``d sign
    = g``. The sign's gradient is *not* scaled by ``2**shift``: a small weight must be as free to flip as a large one.
    """

    @staticmethod
    def forward(shift: Tensor, sign: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        levels = power_of_two.num_exponents(bits)
        low, high = power_of_two.offset_range(bits, shift.dtype)
        direction = sign.round().sign()
        exponent = shift.round()
        offset = exponent.masked_fill(direction == 0, low).amax(-1, keepdim=True).clamp(low, high)
        exponent = torch.minimum(torch.maximum(exponent, offset - (levels - 1)), offset)
        magnitude = power_of_two.exact_exp2(exponent.to(torch.int32), shift.dtype)
        # NaN would round to some shift or other: keep it NaN.
        terms = direction * magnitude + 0.0 + (shift - shift)
        weight = terms.sum(0) if terms.shape[0] > 1 else terms[0]
        return weight, terms

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx, grad_weight: Tensor, _grad_terms: Tensor) -> tuple[Tensor, Tensor, None]:
        (terms,) = ctx.saved_tensors
        return grad_weight * terms * math.log(2), grad_weight.expand_as(terms), None


class ShiftLinear(nn.Module):
    """``y = x W^T + b`` with ``W`` made of powers of two.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        bias: add a float bias.
        bits: bits of one code, 2 to 6: 4 packs two weights a byte, 5 is the paper's.
        mode: `"Q"` keeps a float weight, named as in `nn.Linear`, that the forward pass quantises and the gradient
            reaches straight through. `"PS"` makes shift and sign the parameters; keep weight decay away from them, it
            would pull magnitudes to ``2**0`` and signs to zero.
        terms: 1, or 2 for weights that are sums of two powers of two.
        stochastic: in training, round at random with the float weight as the expected value (mode `"Q"` only).

    Shapes: x [*, in_features], y [*, out_features]. State dict: `weight` [out, in] (Q) or `shift` and `sign`
    [terms, out, in] (PS), and `bias` [out].

    In evaluation the quantised weight is kept until the float weight changes (its version counter tells). Writing
    through ``weight.data`` does not count as a change to torch: call `train()` or `eval()` after doing that.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 4,
        mode: ShiftMode = "Q",
        terms: int = 1,
        *,
        stochastic: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        power_of_two.check_format(bits, terms)
        if mode not in SHIFT_MODES:
            raise UserError(f"mode must be one of {', '.join(SHIFT_MODES)}, not {mode!r}")
        if stochastic and mode != "Q":
            raise UserError("stochastic rounding needs mode 'Q': in mode 'PS' no float weight is rounded")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.mode, self.terms, self.stochastic = bits, mode, terms, stochastic
        factory = {"device": device, "dtype": dtype}
        if mode == "Q":
            self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        else:
            self.shift = nn.Parameter(torch.empty(terms, out_features, in_features, **factory))
            self.sign = nn.Parameter(torch.empty(terms, out_features, in_features, **factory))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, **factory))
        else:
            self.register_parameter("bias", None)
        self._cache: tuple | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters as `nn.Linear` draws its own (then split into shift and sign in mode PS)."""
        like = self.weight if self.mode == "Q" else self.shift[0]
        weight = torch.empty_like(like)
        if weight.numel():
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self._set_weight(weight)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features else 0
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        bits: int = 4,
        mode: ShiftMode = "Q",
        terms: int = 1,
        stochastic: bool = False,
        name: str | None = None,
    ) -> ShiftLinear:
        """A shift layer with the weights, bias, dtype, device and training flag of `linear`, which is left as it is.

        Args:
            name: how an error calls the layer, for instance its qualified name.

        Raises:
            UserError: if the weights hold NaN or infinity.
        """
        power_of_two.check_format(bits, terms)
        power_of_two.check_finite(linear.weight.detach(), f"the weight of {name}" if name else None)
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            bits=bits,
            mode=mode,
            terms=terms,
            stochastic=stochastic,
            device="meta",
        )
        layer = layer.to(linear.weight.dtype).to_empty(device=linear.weight.device)
        layer._set_weight(linear.weight.detach())
        for parameter in layer._weight_parameters():
            parameter.requires_grad_(linear.weight.requires_grad)
        if linear.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(linear.bias)
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """An ordinary linear layer that computes the same: its weight is the quantised one."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = self.quantized_weight().detach()
        linear = linear.to(weight.dtype).to_empty(device=weight.device)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def freeze(self) -> PackedShiftLinear:
        """The same layer for inference, equal bit for bit in evaluation, with codes of `bits` bits as its only weight.

        Raises:
            UserError: if training has left NaN or infinity in the weights.
        """
        packed = PackedShiftLinear(
            self.in_features, self.out_features, bias=self.bias is not None, bits=self.bits, terms=self.terms
        )
        if self.mode == "Q":
            codes, offset, _ = power_of_two.encode(self.weight, self.bits, self.terms)
        else:
            _, terms = _ShiftAndSign.apply(self.shift.detach(), self.sign.detach(), self.bits)
            power_of_two.check_finite(terms)
            terms = terms if terms.dtype in (torch.float32, torch.float64) else terms.float()
            codes, offset = power_of_two.encode_exact(terms, self.bits)
        packed.codes = power_of_two.pack(codes, self.bits)
        packed.offset = offset
        packed.bias = None if self.bias is None else self.bias.detach().clone()
        return packed.eval()

    def quantized_weight(self) -> Tensor:
        """The weight [out, in] that the forward pass uses, every entry a sum of `terms` powers of two.

        Differentiable: straight through to `weight` (Q), DeepShift's rules to `shift` and `sign` (PS).
        """
        if self.mode == "PS":
            return _ShiftAndSign.apply(self.shift, self.sign, self.bits)[0]
        quantized = self._cached_quantized_weight()
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return _StraightThrough.apply(self.weight, quantized)
        return quantized

    def forward(self, x: Tensor) -> Tensor:  # [*, in_features] -> [*, out_features]
        return F.linear(x, self.quantized_weight(), self.bias)

    def _cached_quantized_weight(self) -> Tensor:
        weight = self.weight
        if self.training or torch.compiler.is_compiling() or weight.is_inference():
            return power_of_two.quantize(weight, self.bits, self.terms, stochastic=self.stochastic and self.training)
        state = (weight._version, weight.data_ptr(), weight.dtype, weight.device)
        if self._cache is None or self._cache[0] is not weight or self._cache[1] != state:
            # Inference tensors could not take part in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._cache = (weight, state, power_of_two.quantize(weight, self.bits, self.terms))
        return self._cache[2]

    def _weight_parameters(self) -> list[nn.Parameter]:
        return [self.weight] if self.mode == "Q" else [self.shift, self.sign]

    @torch.no_grad()
    def _set_weight(self, weight: Tensor) -> None:
        if self.mode == "Q":
            self.weight.copy_(weight)
            return
        if weight.is_meta:
            return
        # A weight of zero starts at its window's smallest power, one step away from being alive again.
        codes, offset, _ = power_of_two.encode(weight, self.bits, self.terms)
        levels = power_of_two.num_exponents(self.bits)
        level = (codes & levels).to(torch.int32)
        self.shift.copy_(level.clamp(min=1) + (offset.to(torch.int32) - levels).unsqueeze(-1))
        self.sign.copy_(torch.where(level == 0, 0, torch.where(codes > levels, -1, 1)))

    def train(self, mode: bool = True) -> ShiftLinear:
        self._cache = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        # A copy has parameters of its own: the kept weight would only be dead storage in it.
        return {**self.__dict__, "_cache": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, mode={self.mode!r}, terms={self.terms}"
        )


class PackedShiftLinear(nn.Module):
    """A frozen `ShiftLinear`: packed codes, one int8 offset per output channel, and the bias are all it stores.

    `ShiftLinear.freeze` makes one; an empty one takes a state dict. It has no parameters, and it computes in the dtype
    of its input, in which powers of two are exact.

    State dict: `codes` [terms, out, ceil(in * bits / 8)] uint8, `offset` [terms, out] int8, `bias` [out].
    """

    codes: Tensor
    offset: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 4,
        terms: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        power_of_two.check_format(bits, terms)
        self.in_features, self.out_features, self.bits, self.terms = in_features, out_features, bits, terms
        row = (in_features * bits + 7) // 8
        self.register_buffer("codes", torch.zeros(terms, out_features, row, dtype=torch.uint8, device=device))
        self.register_buffer("offset", torch.zeros(terms, out_features, dtype=torch.int8, device=device))
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=dtype) if bias else None)

    def weight_codes(self) -> power_of_two.PowerOfTwoCodes:
        """The unpacked codes [terms, out, in] and offsets [terms, out]."""
        codes = power_of_two.unpack(self.codes, self.bits, self.in_features)
        return power_of_two.PowerOfTwoCodes(codes, self.offset, self.bits)

    def quantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] that the codes stand for."""
        return power_of_two.decode(*self.weight_codes(), dtype)

    def forward(self, x: Tensor) -> Tensor:  # [*, in_features] -> [*, out_features]
        return F.linear(x, self.quantized_weight(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, terms={self.terms}"
        )
