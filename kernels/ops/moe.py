"""The mixture of experts, as an op.

Accuracy: that of `shift_mlp` for experts with power-of-two weights. Other experts are computed in float32 throughout.
Inference only: this op has no gradients. Training uses the layers of `shiftadd3d.nn`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.cpu.forms import Form, forms
from shiftadd3d.kernels.cpu.mlp import block_rows
from shiftadd3d.kernels.cpu.moe import MOE, run
from shiftadd3d.kernels.cuda import moe as cuda_moe
from shiftadd3d.kernels.cuda import product
from shiftadd3d.kernels.ops.define import define_op, first_outcome
from shiftadd3d.kernels.ops.matshift import check_layer, described
from shiftadd3d.kernels.reference.moe import (
    TENSORS_OF_LAYER,
    ExpertLayer,
    MoeMlp,
    gates_of,
    layers_of_experts,
    moe_mlp_twin,
    outputs_of,
    width_of,
)
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.memory import DTYPES
from shiftadd3d.kernels.runtime.numerics import get_numerics


def _check(given: MoeMlp) -> None:
    x, logits, layers, depth, bits, *_ = given
    if not x.is_floating_point() or x.ndim == 0:
        raise UserError(f"x must be floating point [*, inputs], not {x.dtype} {list(x.shape)}")
    if logits.ndim == 0 or not logits.is_floating_point() or logits.shape[:-1] != x.shape[:-1]:
        raise UserError(f"logits must be floating point {[*x.shape[:-1], 'E']} beside x, not {list(logits.shape)}")
    number = logits.shape[-1]
    if depth < 1 or number < 1 or len(layers) != TENSORS_OF_LAYER * depth * number:
        raise UserError(
            f"{number} experts of {depth} layers have {TENSORS_OF_LAYER * depth * number} tensors, not {len(layers)}"
        )
    if any(weight is None for weight in layers[::TENSORS_OF_LAYER]):
        raise UserError("every layer of an expert needs a weight or codes")
    for place, expert in enumerate(_experts(given)):
        width = x.shape[-1]
        for layer in expert:
            try:
                _check_layer(layer, x.new_empty(0, width), bits)
            except UserError as error:
                raise UserError(f"expert {place}: {error}") from None
            width = width_of(layer)
        if width != outputs_of(layers):
            raise UserError(f"expert {place} has {width} outputs, the last one {outputs_of(layers)}")


def _check_layer(layer: ExpertLayer, x: Tensor, bits: int) -> None:
    weight, offset, bias = layer
    if offset is not None:
        check_layer(x, weight, offset, bias, bits)
    elif weight.ndim != 2 or not weight.is_floating_point() or weight.shape[1] != x.shape[1]:
        expected = f"floating point [outputs, {x.shape[1]}]"
        raise UserError(f"a weight without an offset must be {expected}, not {described(weight)}")
    elif bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise UserError(f"bias must be floating point [{weight.shape[0]}], not {described(bias)}")


def _experts(given: MoeMlp) -> list[list[ExpertLayer]]:
    listed = layers_of_experts(given.layers)
    return [listed[i : i + given.depth] for i in range(0, len(listed), given.depth)]


def _terms(given: MoeMlp) -> int | None:
    """Powers of two that weights of shifts are sums of; None if the layers differ, or there is nothing to compute."""
    layers = layers_of_experts(given.layers)
    if not given.x.numel() or any(layer.weight.numel() == 0 for layer in layers):
        return None
    terms = {layer.weight.shape[0] for layer in layers if layer.offset is not None} or {1}
    return terms.pop() if len(terms) == 1 else None


def _cpu(given: MoeMlp) -> tuple[Tensor, Tensor] | None:
    x, logits, layers, depth, bits, activation, gated = given
    experts, terms = _experts(given), _terms(given)
    kinds = [{layer.offset is None for layer in expert} for expert in experts]
    if terms is None or x.dtype not in DTYPES or any(len(kind) > 1 for kind in kinds):
        return None
    rows, dtype = x.reshape(-1, x.shape[-1]).contiguous(), DTYPES[x.dtype]
    widths = [rows.shape[1], *(width_of(layer) for expert in experts for layer in expert[:-1])]
    expected = math.ceil(len(rows) / len(experts))  # tokens of an expert

    def mixture_of(function: Compiled, form: Form) -> tuple[Tensor, Tensor] | None:
        block = block_rows(form, expected, widths)
        return run(function, rows, logits.reshape(len(rows), -1), layers, depth, gated, block)

    outcome = first_outcome(
        MOE.function,
        forms(targets.current(), get_numerics(), bits, terms, dtype),
        mixture_of,
        experts=",".join("mult" if kind == {True} else "shift" for kind in kinds),
        depth=depth,
        bits=bits,
        terms=terms,
        dtype=dtype,
        activation=activation if depth > 1 else "none",
    )
    return None if outcome is None else (outcome[0].view(*x.shape[:-1], -1), outcome[1].view(x.shape[:-1]))


def _cuda(given: MoeMlp) -> tuple[Tensor, Tensor] | None:
    x, logits, _, _, bits, activation, gated = given
    terms, numerics = _terms(given), get_numerics()
    if terms is None or x.dtype not in product.DTYPES:
        return None
    assignment, gates = logits.argmax(-1), gates_of(logits.float()) if gated else None
    rows = x.reshape(-1, x.shape[-1])
    y = cuda_moe.mixture(rows, assignment.flatten(), gates, _experts(given), bits, terms, activation, numerics)
    return None if y is None else (y.view(*x.shape[:-1], y.shape[-1]), assignment)


def _fake(given: MoeMlp) -> tuple[Tensor, Tensor]:
    x, leading = given.x, given.x.shape[:-1]
    return x.new_empty((*leading, outputs_of(given.layers))), x.new_empty(leading, dtype=torch.int64)


#: [*, outputs] in the dtype of x, and [*] int64.
moe_mlp = define_op("moe_mlp", MoeMlp, twin=moe_mlp_twin, check=_check, cpu=_cpu, cuda=_cuda, fake=_fake, activations=1)
