"""The perceptron of shifts, as an op.

Accuracy: that of two calls of `matshift`, except that hidden activations of a bfloat16 layer stay in float32. Inference
only: this op has no gradients. Training uses the layers of `shiftadd3d.nn`.
"""

from __future__ import annotations

from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.cpu.forms import Form, forms
from shiftadd3d.kernels.cpu.mlp import MLP, block_rows, run
from shiftadd3d.kernels.ops.define import define_op, first_outcome
from shiftadd3d.kernels.ops.matshift import check_layer, matshift
from shiftadd3d.kernels.reference.mlp import ShiftMlp, shift_mlp_twin
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.memory import DTYPES
from shiftadd3d.kernels.runtime.numerics import get_numerics


def _check(given: ShiftMlp) -> None:
    x, hidden_codes, hidden_offset, hidden_bias, codes, offset, bias, bits, _ = given
    check_layer(x, hidden_codes, hidden_offset, hidden_bias, bits)
    hidden = hidden_codes.shape[1]
    if codes.ndim == 3 and codes.shape[2] != (hidden * bits + 7) // 8:
        raise UserError(
            f"the first layer has {hidden} outputs, but rows of {codes.shape[2]} bytes in the second one hold "
            f"{codes.shape[2] * 8 // bits} codes of {bits} bits"
        )
    check_layer(x.new_empty(0, hidden), codes, offset, bias, bits)


def _cpu(given: ShiftMlp) -> Tensor | None:
    x, bits, activation = given.x, given.bits, given.activation
    terms, outputs, _ = given.codes.shape
    if x.dtype not in DTYPES or given.hidden_codes.shape[0] != terms:
        return None
    if not (x.numel() and given.hidden_codes.numel() and given.codes.numel()):
        return None
    rows, dtype = x.reshape(-1, x.shape[-1]).contiguous(), DTYPES[x.dtype]
    layers, widths = (given[1:4], given[4:7]), (rows.shape[1], given.hidden_codes.shape[1])

    def taken_through(function: Compiled, form: Form) -> Tensor | None:
        return run(function, rows, layers, block_rows(form, len(rows), widths))

    found = forms(targets.current(), get_numerics(), bits, terms, dtype)
    spec = {"bits": bits, "terms": terms, "dtype": dtype, "activation": activation}
    y = first_outcome(MLP.function, found, taken_through, **spec)
    return None if y is None else y.view(*x.shape[:-1], outputs)


def _cuda(given: ShiftMlp) -> Tensor:
    """Two products, the first with the activation function in it.

    One kernel for both would have to keep all outputs of its tokens in registers, which 64 of them allow and 192 do
    not; and what lies between the products mostly stays in a GPU's second-level cache of tens of megabytes.
    """
    hidden = matshift(*given[:4], given.bits, given.activation)
    return matshift(hidden, *given[4:7], given.bits)


#: [*, outputs] in the dtype of x.
shift_mlp = define_op(
    "shift_mlp",
    ShiftMlp,
    twin=shift_mlp_twin,
    check=_check,
    cpu=_cpu,
    cuda=_cuda,
    fake=lambda given: given.x.new_empty((*given.x.shape[:-1], given.codes.shape[1])),
    activations=1,
)
