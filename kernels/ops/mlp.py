"""The perceptron of shifts as an op.

Accuracy: that of two calls of `matshift`, except that hidden activations of a bfloat16 layer stay in float32.

Inference only: no gradients flow through this op; training uses the layers of `shiftadd3d.nn`.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from shiftadd3d.kernels.cpu.forms import forms
from shiftadd3d.kernels.cpu.mlp import MLP, block_rows, run
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.ops.matshift import matshift_cuda
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.mlp import check_mlp, shift_mlp_twin
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.memory import DTYPES
from shiftadd3d.kernels.runtime.numerics import Numerics, get_numerics


def shift_mlp(
    x: Tensor,  # [*, inputs]
    hidden_codes: Tensor,  # [terms, hidden, ceil(inputs * bits / 8)] uint8
    hidden_offset: Tensor,  # [terms, hidden] int8
    hidden_bias: Tensor | None,  # [hidden]
    codes: Tensor,  # [terms, outputs, ceil(hidden * bits / 8)] uint8
    offset: Tensor,  # [terms, outputs] int8
    bias: Tensor | None,  # [outputs]
    bits: int = 4,
    activation: Activation = "gelu",
) -> Tensor:  # [*, outputs], dtype of x
    """Two linear layers with power-of-two weights and an activation function between them.

    Runs compiled code on CPUs in float32 and bfloat16, on CUDA GPUs as two calls of `matshift`, and `shift_mlp_twin`
    everywhere else.

    Args:
        x: activations, any leading shape.
        hidden_codes, hidden_offset, hidden_bias: the first layer, as `matshift` takes it.
        codes, offset, bias: the second layer.
        bits: bits of one code, 2 to 6, in both layers.
        activation: one of ``"none"``, ``"relu"``, ``"gelu"`` (with erf).

    Raises:
        UserError: if shapes, dtypes or names do not fit together.
    """
    layers = (hidden_codes, hidden_offset, hidden_bias, codes, offset, bias)
    return _mlp_op(x, *layers, bits, activation, get_numerics())


def _mlp_cpu(
    x: Tensor,
    hidden_codes: Tensor,
    hidden_offset: Tensor,
    hidden_bias: Tensor | None,
    codes: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    bits: int,
    activation: str,
    numerics: str,
) -> Tensor:
    layers = (hidden_codes, hidden_offset, hidden_bias, codes, offset, bias)
    check_mlp(x, *layers, bits, activation, numerics)
    terms, outputs, _ = codes.shape
    empty = not (x.numel() and hidden_codes.numel() and codes.numel())
    if numerics == "twin" or x.dtype not in DTYPES or hidden_codes.shape[0] != terms or empty:
        return shift_mlp_twin(x, *layers, bits, activation)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    dtype = DTYPES[x.dtype]
    for form in forms(targets.current(), cast(Numerics, numerics), bits, terms, dtype):
        function = MLP.function(form=form, bits=bits, terms=terms, dtype=dtype, activation=activation)
        if function is None:
            continue
        y = run(function, rows, layers, block_rows(form, rows.shape[0], (rows.shape[1], hidden_codes.shape[1])))
        if y is not None:
            return y.view(*x.shape[:-1], outputs)
    return shift_mlp_twin(x, *layers, bits, activation)


def _mlp_cuda(
    x: Tensor,
    hidden_codes: Tensor,
    hidden_offset: Tensor,
    hidden_bias: Tensor | None,
    codes: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    bits: int,
    activation: str,
    numerics: str,
) -> Tensor:
    """Two products, the first with the activation function in it.

    One kernel for both would have to keep all outputs of its tokens in registers, which 64 of them allow and 192 do
    not; and what lies between the products mostly stays in a GPU's second-level cache of tens of megabytes.
    """
    check_mlp(x, hidden_codes, hidden_offset, hidden_bias, codes, offset, bias, bits, activation, numerics)
    hidden = matshift_cuda(x, hidden_codes, hidden_offset, hidden_bias, bits, activation, numerics)
    return matshift_cuda(hidden, codes, offset, bias, bits, "none", numerics)


def _fake(
    x: Tensor,
    hidden_codes: Tensor,
    hidden_offset: Tensor,
    hidden_bias: Tensor | None,
    codes: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    bits: int,
    activation: str,
    numerics: str,
) -> Tensor:
    check_mlp(x, hidden_codes, hidden_offset, hidden_bias, codes, offset, bias, bits, activation, numerics)
    return x.new_empty((*x.shape[:-1], codes.shape[1]))


_mlp_op = define_op(
    "shift_mlp(Tensor x, Tensor hidden_codes, Tensor hidden_offset, Tensor? hidden_bias, Tensor codes, Tensor offset, "
    "Tensor? bias, int bits, str activation, str numerics) -> Tensor",
    cpu=_mlp_cpu,
    cuda=_mlp_cuda,
    twin=shift_mlp_twin,
    fake=_fake,
    activations=1,
)
