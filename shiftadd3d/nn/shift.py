"""Layers whose weights are powers of two: multiplications become bit shifts.

`ShiftLinear` is trained. `PackedShiftLinear` holds the trained weights with 4 bits each. `ShiftConv2d` and
`PackedShiftConv2d` do the same for convolutions whose patches do not overlap, because these are linear layers over
patches. `shiftadd3d.nn.power_of_two` defines what a power-of-two weight is.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2; Elhoushi et al., DeepShift (CVPR workshops 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.fx import Proxy

from shiftadd3d._errors import UserError, kind_of
from shiftadd3d.kernels.ops.matshift import matshift
from shiftadd3d.kernels.runtime.numerics import uses_kernels
from shiftadd3d.kernels.runtime.recording import is_recorded
from shiftadd3d.nn import power_of_two
from shiftadd3d.nn.attachments import has_own_forward
from shiftadd3d.nn.derived_weight import WithoutWeight, derived_weight
from shiftadd3d.nn.tracing import one_node

ShiftMode = Literal["Q", "PS"]
SHIFT_MODES = ("Q", "PS")


class _StraightThrough(Function):
    """Value of the quantised weight, gradient of the float one."""

    generate_vmap_rule = True

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

    generate_vmap_rule = True

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


def counts_as_linear(conv: nn.Conv2d) -> bool:
    """Whether a convolution multiplies each pixel, or each patch of a grid, by one matrix.

    This is true for 1x1 kernels and for kernels whose stride is their size, if there is no padding and only one group.
    """
    is_pointwise = conv.kernel_size == (1, 1)
    is_patchwise = conv.kernel_size == conv.stride and conv.dilation == (1, 1)
    unpadded = conv.padding in ("valid", (0, 0)) or (is_pointwise and conv.padding == "same")
    return (is_pointwise or is_patchwise) and unpadded and conv.groups == 1


class _Patches:
    """How a convolution whose patches do not overlap reads an image: `in_channels`, `kernel_size` and `stride`."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    # What `nn.Conv2d` has, too.
    padding, dilation, output_padding = (0, 0), (1, 1), (0, 0)
    groups, padding_mode, transposed = 1, "zeros", False

    def tokens(self, x: Tensor) -> Tensor:  # [*, C, H, W] -> [*, H', W', C * kh * kw]
        """The patches that the weight multiplies, channels first within each.

        Pixels at the border that fill no patch are left out.
        """
        (kh, kw), (sh, sw) = self.kernel_size, self.stride
        if x.dim() < 3 or x.shape[-3] != self.in_channels or x.shape[-2] < kh or x.shape[-1] < kw:
            raise UserError(
                f"{type(self).__name__} takes images [..., {self.in_channels}, H, W] of at least {kh} x {kw} pixels, "
                f"not {list(x.shape)}"
            )
        if (kh, kw) == (1, 1):
            return x[..., ::sh, ::sw].movedim(-3, -1)
        rows, columns = x.shape[-2] // kh, x.shape[-1] // kw
        x = x[..., : rows * kh, : columns * kw].unflatten(-1, (columns, kw)).unflatten(-3, (rows, kh))
        return x.movedim((-4, -2), (-5, -4)).flatten(-3)

    def _over_tokens(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """`product` of all tokens [T, C * kh * kw] at once, as the channels of an image."""
        tokens = self.tokens(x)
        return product(tokens.flatten(0, -2)).unflatten(0, tokens.shape[:-1]).movedim(-1, -3)


_Layer = TypeVar("_Layer", bound="ShiftLayer")
_Float = TypeVar("_Float", nn.Linear, nn.Conv2d)


class ShiftLayer(nn.Module):
    """What `ShiftLinear` and `ShiftConv2d` share: a weight with one row and one offset for each output channel."""

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        bias: bool,
        bits: int,
        mode: ShiftMode,
        terms: int,
        stochastic: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        power_of_two.check_format(bits, terms)
        if mode not in SHIFT_MODES:
            raise UserError(f"mode must be one of {', '.join(SHIFT_MODES)}, not {mode!r}")
        if stochastic and mode != "Q":
            raise UserError("stochastic rounding needs mode 'Q': in mode 'PS' no float weight is rounded")
        self.in_features, self.out_features, self._shape = math.prod(weight_shape[1:]), weight_shape[0], weight_shape
        self.bits, self.mode, self.terms, self.stochastic = bits, mode, terms, stochastic
        factory = {"device": device, "dtype": dtype}
        if mode == "Q":
            self.weight = nn.Parameter(torch.empty(weight_shape, **factory))
        else:
            self.shift = nn.Parameter(torch.empty(terms, *weight_shape, **factory))
            self.sign = nn.Parameter(torch.empty(terms, *weight_shape, **factory))
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, **factory))
        else:
            self.register_parameter("bias", None)
        self._cache: tuple | None = None
        self.reset_parameters()

    # A property, for mode PS: there it is only derived. In mode Q it is a parameter, or what utilities that keep
    # another one (pruning, older norms of weights) put in its place.
    @property
    def weight(self) -> nn.Parameter:
        """The float weight (mode Q), or the quantised weight for reading only (mode PS).

        Its shape is that of the ordinary layer.
        """
        if self.mode == "PS":
            shift = cast(Tensor, self._parameters["shift"])  # itself, also where torch.fx looks on
            values = lambda: self.quantized_weight().view(self._shape)  # noqa: E731
            weight = derived_weight(values, shift, self._shape, shift.dtype, self._refusal())
        elif "weight" in self.__dict__:
            weight = self.__dict__["weight"]
        else:
            weight = self.__getattr__("weight")
        return cast(nn.Parameter, weight)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        if self.mode == "PS":
            raise UserError(self._refusal())
        self.__dict__["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        del self.__dict__["weight"]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and self.mode == "PS":
            raise UserError(self._refusal())
        super().register_parameter(name, param)

    def _refusal(self) -> str:
        return (
            f"the weight of {kind_of(self)} in mode PS is read-only: it is derived from shift and sign, which "
            "can be written; weight.clone() is an ordinary tensor"
        )

    def reset_parameters(self) -> None:
        """Draw the parameters as `nn.Linear` and `nn.Conv2d` do.

        In mode PS, the weight is then split into shift and sign.
        """
        like = self.weight if self.mode == "Q" else self.shift[0]
        weight = torch.empty_like(like)
        if weight.numel():
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self._set_weight(weight)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features else 0
            nn.init.uniform_(self.bias, -bound, bound)

    def quantized_weight(self) -> Tensor:
        """The weight [out_features, in_features] of the forward pass: each value is a sum of `terms` powers of two.

        It is differentiable. In mode Q, the gradient goes straight through to `weight`. In mode PS, it reaches `shift`
        and `sign` by DeepShift's rules.
        """
        if self.mode == "PS":
            quantize = _ShiftAndSign.forward if is_recorded() else _ShiftAndSign.apply
            return quantize(self.shift.flatten(2), self.sign.flatten(2), self.bits)[0]
        if is_recorded():
            return self._quantize()
        if torch.is_grad_enabled() and self.weight.requires_grad:
            # What comes next may be a step of a fused optimizer, which the version counter does not see.
            self._cache = None
            return _StraightThrough.apply(self.weight.flatten(1), self._quantize())
        return self._quantize() if self.training else self._cached_quantized_weight()

    def _quantize(self) -> Tensor:
        stochastic = self.stochastic and self.training
        return power_of_two.quantize(self.weight.flatten(1), self.bits, self.terms, stochastic=stochastic)

    def _cached_quantized_weight(self) -> Tensor:
        weight = self.weight
        if torch.compiler.is_compiling() or weight.is_inference():
            return self._quantize()
        try:
            state = (weight._version, weight.data_ptr(), weight.dtype, weight.device)
        except RuntimeError:  # within torch.func tensors have no storage
            return self._quantize()
        if self._cache is None or self._cache[0] is not weight or self._cache[1] != state:
            # Inference tensors could not take part in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._cache = (weight, state, power_of_two.quantize(weight.flatten(1), self.bits, self.terms))
        return self._cache[2]

    @torch.no_grad()
    def _set_weight(self, weight: Tensor) -> None:
        if self.mode == "Q":
            self.weight.copy_(weight)
            return
        if weight.is_meta:
            return
        # A weight of zero starts at its window's smallest power, one step away from being alive again.
        codes, offset, _ = power_of_two.encode(weight.flatten(1), self.bits, self.terms)
        levels = power_of_two.num_exponents(self.bits)
        level = (codes & levels).to(torch.int32)
        shift = level.clamp(min=1) + (offset.to(torch.int32) - levels).unsqueeze(-1)
        self.shift.copy_(shift.view_as(self.shift))
        self.sign.copy_(torch.where(level == 0, 0, torch.where(codes > levels, -1, 1)).view_as(self.sign))

    def _take_over(self: _Layer, layer: nn.Linear | nn.Conv2d, name: str | None) -> _Layer:
        """This layer, made without storage, with the weights, dtype, device and flags of `layer`."""
        weight = layer.weight.detach()
        power_of_two.check_finite(weight, f"the weight of {name}" if name else None)
        self.to(weight.dtype).to_empty(device=weight.device)
        self._set_weight(weight)
        for parameter in [self.weight] if self.mode == "Q" else [self.shift, self.sign]:
            parameter.requires_grad_(layer.weight.requires_grad)
        if layer.bias is not None:
            with torch.no_grad():
                self.bias.copy_(layer.bias)
            self.bias.requires_grad_(layer.bias.requires_grad)
        return self.train(layer.training)

    @torch.no_grad()
    def _hand_over(self, layer: _Float) -> _Float:
        """`layer`, an ordinary one made without storage, with the quantised weight, dtype, device and training flag."""
        weight = self.quantized_weight()
        layer = layer.to(weight.dtype).to_empty(device=weight.device)
        layer.weight.copy_(weight.view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(self.bias)
        return layer.train(self.training)

    @torch.no_grad()
    def _pack_into(self, packed: PackedShiftLayer, name: str | None) -> None:
        try:
            if self.mode == "Q":
                codes, offset, _ = power_of_two.encode(self.weight.flatten(1), self.bits, self.terms)
            else:
                _, terms = _ShiftAndSign.apply(self.shift.flatten(2), self.sign.flatten(2), self.bits)
                power_of_two.check_finite(terms)
                terms = terms if terms.dtype in (torch.float32, torch.float64) else terms.float()
                codes, offset = power_of_two.encode_exact(terms, self.bits)
        except UserError as error:
            raise UserError(f"{name}: {error}" if name else str(error)) from None
        packed.codes = power_of_two.pack(codes, self.bits)
        packed.offset = offset
        packed.bias = None if self.bias is None else self.bias.detach().clone()
        packed.dtype = (self.weight if self.mode == "Q" else self.shift).dtype
        packed.eval()

    def train(self: _Layer, mode: bool = True) -> _Layer:
        self._cache = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        # A copy has parameters of its own: the kept weight would only be dead storage in it.
        return {**self.__dict__, "_cache": None}

    def _format_repr(self) -> str:
        return f"bias={self.bias is not None}, bits={self.bits}, mode={self.mode!r}, terms={self.terms}"


class ShiftLinear(ShiftLayer):
    """``y = x W^T + b``, where all values of ``W`` are powers of two, or sums of two.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        bias: add a float bias.
        bits: bits of one code, 2 to 6. With 4, two weights fit into a byte. The paper uses 5.
        mode: `"Q"` keeps a float weight under the name that `nn.Linear` gives it. The forward pass quantises it, and
            the gradient goes straight through. In `"PS"`, shift and sign are the parameters. Use no weight decay for
            them, because it would pull magnitudes to ``2**0`` and signs to zero.
        terms: 1, or 2 for weights that are sums of two powers of two.
        stochastic: round at random in training, with the float weight as the expected value (mode `"Q"` only).

    Shapes: x [*, in_features], y [*, out_features]. State dict: `weight` [out, in] (Q), or `shift` and `sign` [terms,
    out, in] (PS), and `bias` [out].

    In evaluation without gradients, the layer keeps the quantised weight until the float weight changes, which its
    version counter shows. Writing through ``weight.data`` does not move that counter: call `train()` or `eval()`
    afterwards.

    Raises:
        UserError: for bits, terms or a mode that do not exist, or stochastic rounding in mode `"PS"`.
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
        super().__init__((out_features, in_features), bias, bits, mode, terms, stochastic, device, dtype)

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
        """A shift layer with the weights, bias, dtype, device and training flag of `linear`. `linear` is not changed.

        Args:
            linear: the layer with float weights.
            bits, mode, terms, stochastic: as in the constructor.
            name: what errors call the layer, for instance its qualified name.

        Raises:
            UserError: if the weights hold NaN or infinity.
        """
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
        return layer._take_over(linear, name)

    def to_linear(self) -> nn.Linear:
        """An ordinary linear layer with the same output. Its weight is the quantised one."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        return self._hand_over(linear)

    def freeze(self, *, name: str | None = None) -> PackedShiftLinear:
        """The same layer for inference. Its only weight is codes of `bits` bits.

        In plain torch, its output equals that of this layer in evaluation, bit for bit. Kernels sum in another order.

        Args:
            name: what errors call the layer.

        Raises:
            UserError: if training has left NaN or infinity in the weights.
        """
        packed = PackedShiftLinear(
            self.in_features, self.out_features, bias=self.bias is not None, bits=self.bits, terms=self.terms
        )
        self._pack_into(packed, name)
        return packed

    def forward(self, x: Tensor) -> Tensor:  # [*, in_features] -> [*, out_features]
        if isinstance(x, Proxy):
            return one_node(self, x)
        _check_width(self, x)
        return F.linear(x, self.quantized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._format_repr()}"


class ShiftConv2d(_Patches, ShiftLayer):
    """A convolution whose patches do not overlap and whose weights are powers of two: a shift layer over patches.

    Args:
        in_channels: channels of x.
        out_channels: channels of y.
        kernel_size: rows and columns of a patch; 1 for pointwise convolutions.
        stride: None for the size of the kernel, so that patches tile the image. Pointwise convolutions may have any
            stride.
        bias, bits, mode, terms, stochastic: as in `ShiftLinear`.

    Shapes: x [*, in_channels, H, W], y [*, out_channels, H', W'], with the channels of y last in memory. State dict: as
    in `ShiftLinear`, but the weight is [out, in, kh, kw], as in `nn.Conv2d`.

    Raises:
        UserError: for a stride with which patches overlap or leave gaps.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        bias: bool = True,
        bits: int = 4,
        mode: ShiftMode = "Q",
        terms: int = 1,
        *,
        stochastic: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kernel, stride = _check_patches(kernel_size, stride)
        super().__init__((out_channels, in_channels, *kernel), bias, bits, mode, terms, stochastic, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size, self.stride = in_channels, out_channels, kernel, stride

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        bits: int = 4,
        mode: ShiftMode = "Q",
        terms: int = 1,
        stochastic: bool = False,
        name: str | None = None,
    ) -> ShiftConv2d:
        """A shift layer with the weights, bias, dtype, device and training flag of `conv`. `conv` is not changed.

        Args:
            conv: the convolution with float weights.
            bits, mode, terms, stochastic: as in `ShiftLinear`.
            name: what errors call the layer, for instance its qualified name.

        Raises:
            UserError: if the weights hold NaN or infinity, or if patches overlap, are padded or are in groups.
        """
        if not counts_as_linear(conv):
            raise UserError(
                f"{name or 'the convolution'} is no linear layer over patches: that has a kernel of 1x1 or a stride "
                f"equal to the kernel, no padding, dilation or groups, not {conv.extra_repr()}"
            )
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            cast(tuple[int, int], conv.kernel_size),
            cast(tuple[int, int], conv.stride),
            bias=conv.bias is not None,
            bits=bits,
            mode=mode,
            terms=terms,
            stochastic=stochastic,
            device="meta",
        )
        return layer._take_over(conv, name)

    def to_conv(self) -> nn.Conv2d:
        """An ordinary convolution with the same output. Its weight is the quantised one."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            bias=self.bias is not None,
            device="meta",
        )
        return self._hand_over(conv)

    def freeze(self, *, name: str | None = None) -> PackedShiftConv2d:
        """The same layer for inference, as `ShiftLinear.freeze` makes it."""
        packed = PackedShiftConv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            bias=self.bias is not None,
            bits=self.bits,
            terms=self.terms,
        )
        self._pack_into(packed, name)
        return packed

    def forward(self, x: Tensor) -> Tensor:  # [*, in_channels, H, W] -> [*, out_channels, H', W']
        if isinstance(x, Proxy):
            return one_node(self, x)
        return self._over_tokens(x, lambda tokens: F.linear(tokens, self.quantized_weight(), self.bias))

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"{self._format_repr()}"
        )


_Packed = TypeVar("_Packed", bound="PackedShiftLayer")


class PackedShiftLayer(WithoutWeight):
    """What `PackedShiftLinear` and `PackedShiftConv2d` share: the packed weight and the product with it.

    `weight` can be read, in the shape and dtype of the ordinary layer's weight. Every read decodes it. It is not
    stored.
    """

    codes: Tensor
    offset: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    """Dtype of `weight` when it is read. `half()` and the like change it. Products have the dtype of x."""

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        bias: bool,
        bits: int,
        terms: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        power_of_two.check_format(bits, terms)
        in_features, out_features = math.prod(weight_shape[1:]), weight_shape[0]
        self.in_features, self.out_features, self.bits, self.terms = in_features, out_features, bits, terms
        self._shape = weight_shape
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        row = (in_features * bits + 7) // 8
        self.register_buffer("codes", torch.zeros(terms, out_features, row, dtype=torch.uint8, device=device))
        self.register_buffer("offset", torch.zeros(terms, out_features, dtype=torch.int8, device=device))
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=dtype) if bias else None)

    def weight_codes(self) -> power_of_two.PowerOfTwoCodes:
        """The unpacked codes [terms, out_features, in_features] and offsets [terms, out_features]."""
        codes = power_of_two.unpack(self.codes, self.bits, self.in_features)
        return power_of_two.PowerOfTwoCodes(codes, self.offset, self.bits)

    def quantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out_features, in_features] that the codes stand for."""
        return power_of_two.decode(*self.weight_codes(), dtype)

    def _derived_weight(self) -> Tensor:
        values = lambda: self.quantized_weight(self.dtype).view(self._shape)  # noqa: E731
        return derived_weight(values, self.codes, self._shape, self.dtype, self._refusal())

    def _refusal(self) -> str:
        return (
            f"the weight of {kind_of(self)} is read-only: it is derived from codes; change weights before "
            "freeze_, weight.clone() is an ordinary tensor"
        )

    def _apply(self: _Packed, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Packed:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="meta" if self.codes.is_meta else None)).dtype
        return self

    def product(self, x: Tensor) -> Tensor:  # [*, in_features] -> [*, out_features]
        """``x W^T + b``. The weight is decoded for this call only, and the layer keeps no float copy of it.

        Without gradients, on CPUs and CUDA GPUs, a kernel computes the product from the codes (see
        `shiftadd3d.kernels`).
        """
        if uses_kernels("matshift", x):
            return matshift(x, self.codes, self.offset, self.bias, self.bits)
        if not (x.is_floating_point() or x.is_complex()):  # fractions would be decoded to zero
            raise UserError(f"{type(self).__name__} takes floating-point numbers, not {x.dtype}")
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.quantized_weight(x.dtype), bias)

    def _format_repr(self) -> str:
        return f"bias={self.bias is not None}, bits={self.bits}, terms={self.terms}"


class PackedShiftLinear(PackedShiftLayer):
    """A frozen `ShiftLinear`. It stores only packed codes, one int8 offset for each output channel, and the bias.

    `ShiftLinear.freeze` makes one. An empty one can load a state dict. It has no parameters. It computes in the dtype
    of its input, in which powers of two are exact.

    State dict: `codes` [terms, out, ceil(in * bits / 8)] uint8, `offset` [terms, out] int8, `bias` [out].
    """

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
        super().__init__((out_features, in_features), bias, bits, terms, device, dtype)

    def forward(self, x: Tensor) -> Tensor:  # [*, in_features] -> [*, out_features]
        if isinstance(x, Proxy):
            return one_node(self, x)
        _check_width(self, x)
        return self.product(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._format_repr()}"


class JointLayers(nn.Module):
    """Packed layers of one format with the same input, computed as one product. Small products take less time than the
    calls for them.

    Its own buffers hold the codes of all layers, one after the other. They are not in the state dict. They move to
    other devices and dtypes with the module that contains them. Whoever changes or loads the codes of the layers must
    make new `JointLayers`.

    Args:
        layers: two or more layers. They stay where they are (see `joint_layers`).
    """

    codes: Tensor
    offset: Tensor
    bias: Tensor | None

    def __init__(self, layers: Sequence[PackedShiftLinear]) -> None:
        super().__init__()
        self._layers = tuple(layers)
        self.register_buffer("codes", torch.cat([layer.codes for layer in self._layers], 1), persistent=False)
        self.register_buffer("offset", torch.cat([layer.offset for layer in self._layers], 1), persistent=False)
        biases = [layer.bias for layer in self._layers if layer.bias is not None]
        self.register_buffer("bias", torch.cat(biases) if biases else None, persistent=False)

    def stands_for(self, layers: Sequence[nn.Module]) -> bool:
        """Whether the last layers are exactly these, and no hook watches or changes what one of them does."""
        own = self._layers[-len(layers) :]
        return len(own) == len(layers) and not any(
            layer is not one or layer._forward_hooks or layer._forward_pre_hooks or has_own_forward(layer)
            for layer, one in zip(layers, own, strict=True)
        )

    def products(self, x: Tensor, count: int) -> tuple[Tensor, ...]:  # [*, in_features] -> [*, out_features] each
        """The products of x with the last `count` layers."""
        layers = self._layers[-count:]
        _check_width(layers[0], x)
        codes, offset, bias = self.codes, self.offset, self.bias
        if count < len(self._layers):
            start = codes.shape[1] - sum(layer.out_features for layer in layers)
            codes, offset, bias = codes[:, start:], offset[:, start:], None if bias is None else bias[start:]
        y = matshift(x, codes, offset, bias, layers[0].bits)
        return torch.split_with_sizes(y, [layer.out_features for layer in layers], -1)


def joint_layers(*layers: nn.Module) -> JointLayers | None:
    """The `JointLayers` of some layers; None if they are not all packed, with one format and one input."""
    packed = [layer for layer in layers if type(layer) is PackedShiftLinear]
    formats = {(layer.in_features, layer.bits, layer.terms, layer.bias is None) for layer in packed}
    return JointLayers(packed) if len(packed) == len(layers) and len(formats) == 1 else None


class PackedShiftConv2d(_Patches, PackedShiftLayer):
    """A frozen `ShiftConv2d`, which `ShiftConv2d.freeze` makes.

    It is stored like a `PackedShiftLinear` over patches.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        bias: bool = True,
        bits: int = 4,
        terms: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kernel, stride = _check_patches(kernel_size, stride)
        super().__init__((out_channels, in_channels, *kernel), bias, bits, terms, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size, self.stride = in_channels, out_channels, kernel, stride

    def forward(self, x: Tensor) -> Tensor:  # [*, in_channels, H, W] -> [*, out_channels, H', W']
        if isinstance(x, Proxy):
            return one_node(self, x)
        return self._over_tokens(x, self.product)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"{self._format_repr()}"
        )


def _check_width(layer: ShiftLinear | PackedShiftLinear, x: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] != layer.in_features:
        raise UserError(f"{type(layer).__name__} takes [..., {layer.in_features}], not {list(x.shape)}")


def _check_patches(
    kernel_size: int | tuple[int, int], stride: int | tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    stride = kernel if stride is None else (stride, stride) if isinstance(stride, int) else stride
    if min(*kernel, *stride) < 1 or (kernel != (1, 1) and stride != kernel):
        raise UserError(f"patches of {kernel} must tile the image: the stride must be the same, not {stride}")
    return kernel, stride
