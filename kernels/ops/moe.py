"""The mixture of experts as an op.

Accuracy: that of `shift_mlp` for experts of powers of two; the others are computed in float32 throughout.

Inference only: no gradients flow through this op; training uses the layers of `shiftadd3d.nn`.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.forms import forms
from shiftadd3d.kernels.cpu.mlp import block_rows
from shiftadd3d.kernels.cpu.moe import MOE, run
from shiftadd3d.kernels.cuda import moe as cuda_moe
from shiftadd3d.kernels.cuda import product
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.moe import check_moe, gates_of, moe_mlp_twin, outputs_of, width_of
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.memory import DTYPES
from shiftadd3d.kernels.runtime.numerics import Numerics, get_numerics


def moe_mlp(
    x: Tensor,  # [*, inputs]
    logits: Tensor,  # [*, E]
    layers: list[Tensor | None],
    depth: int = 2,
    bits: int = 4,
    activation: Activation = "gelu",
    gated: bool = False,
) -> tuple[Tensor, Tensor]:  # [*, outputs] in the dtype of x, [*] int64
    """A mixture of perceptrons that sends each token to the expert with the largest logit.

    Runs compiled code on CPUs in float32 and bfloat16, on CUDA GPUs in these and float16 (see
    `shiftadd3d.kernels.cuda_moe`), and `moe_mlp_twin` everywhere else.

    Args:
        x: tokens, any leading shape.
        logits: of the router, floating point.
        layers: three tensors for each layer, expert by expert: ``weight [outputs, inputs], None, bias`` of an ordinary
            one, ``codes, offset, bias`` of one with powers of two, as `matshift` takes them. A bias may be None.
        depth: how many layers an expert has.
        bits: bits of one code, 2 to 6, in all layers.
        activation: between the layers of an expert, one of ``"none"``, ``"relu"``, ``"gelu"`` (with erf).
        gated: multiply each outcome by the softmax of the chosen logit.

    Returns:
        The outcome, and the number of each token's expert; the first of equal logits wins.

    Raises:
        UserError: if shapes, dtypes or names do not fit together.
    """
    return _moe_op(x, logits, layers, depth, bits, activation, gated, get_numerics())


def _moe_cpu(
    x: Tensor,
    logits: Tensor,
    layers: list[Tensor | None],
    depth: int,
    bits: int,
    activation: str,
    gated: bool,
    numerics: str,
) -> tuple[Tensor, Tensor]:
    experts = check_moe(x, logits, layers, depth, bits, activation, numerics)
    all_layers = [layer for expert in experts for layer in expert]
    terms = {layer.weight.shape[0] for layer in all_layers if layer.offset is not None} or {1}
    kinds = [{layer.offset is None for layer in expert} for expert in experts]
    empty = not x.numel() or any(layer.weight.numel() == 0 for layer in all_layers)
    if numerics == "twin" or x.dtype not in DTYPES or empty or len(terms) > 1 or any(len(kind) > 1 for kind in kinds):
        return moe_mlp_twin(x, logits, layers, depth, bits, activation, gated)
    rows, dtype = x.reshape(-1, x.shape[-1]).contiguous(), DTYPES[x.dtype]
    spec = {
        "experts": ",".join("mult" if kind == {True} else "shift" for kind in kinds),
        "depth": depth,
        "bits": bits,
        "terms": terms.pop(),
        "dtype": dtype,
        "activation": activation if depth > 1 else "none",
    }
    widths = [rows.shape[1], *(width_of(layer) for expert in experts for layer in expert[:-1])]
    expected = math.ceil(len(rows) / len(experts))  # tokens of an expert
    for form in forms(targets.current(), cast(Numerics, numerics), bits, spec["terms"], dtype):
        function = MOE.function(**spec, form=form)
        if function is None:
            continue
        block = block_rows(form, expected, widths)
        outcome = run(function, rows, logits.reshape(len(rows), -1), layers, depth, gated, block)
        if outcome is not None:
            y, assignment = outcome
            return y.view(*x.shape[:-1], y.shape[-1]), assignment.view(x.shape[:-1])
    return moe_mlp_twin(x, logits, layers, depth, bits, activation, gated)


def _moe_cuda(
    x: Tensor,
    logits: Tensor,
    layers: list[Tensor | None],
    depth: int,
    bits: int,
    activation: str,
    gated: bool,
    numerics: str,
) -> tuple[Tensor, Tensor]:
    experts = check_moe(x, logits, layers, depth, bits, activation, numerics)
    all_layers = [layer for expert in experts for layer in expert]
    terms = {layer.weight.shape[0] for layer in all_layers if layer.offset is not None}
    empty = not x.numel() or any(layer.weight.numel() == 0 for layer in all_layers)
    y, assignment = None, logits.argmax(-1)
    if numerics != "twin" and x.dtype in product.DTYPES and not empty and len(terms) <= 1:
        y = cuda_moe.mixture(
            x.reshape(-1, x.shape[-1]),
            assignment.flatten(),
            gates_of(logits.float()) if gated else None,
            experts,
            bits,
            cast(Activation, activation),
            cast(Numerics, numerics),
        )
    if y is None:
        return moe_mlp_twin(x, logits, layers, depth, bits, activation, gated)
    return y.view(*x.shape[:-1], y.shape[-1]), assignment


def _fake(
    x: Tensor,
    logits: Tensor,
    layers: list[Tensor | None],
    depth: int,
    bits: int,
    activation: str,
    gated: bool,
    numerics: str,
) -> tuple[Tensor, Tensor]:
    check_moe(x, logits, layers, depth, bits, activation, numerics)
    return x.new_empty((*x.shape[:-1], outputs_of(layers))), x.new_empty(x.shape[:-1], dtype=torch.int64)


_moe_op = define_op(
    "moe_mlp(Tensor x, Tensor logits, Tensor?[] layers, int depth, int bits, str activation, bool gated, "
    "str numerics) -> (Tensor, Tensor)",
    cpu=_moe_cpu,
    cuda=_moe_cuda,
    twin=moe_mlp_twin,
    fake=_fake,
    activations=1,
)
