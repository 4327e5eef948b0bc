"""MatAdd as ops: ``K^T V``, ``Q S``, both of them, and additive attention.

Accuracy: for all numerics, results differ from the reference's only by the order of summation. bfloat16 is summed in
float32. Infinity and NaN propagate as in a matrix product, but masked keys have no influence at all.

Gradients: `matadd_kv` and `matadd_q` have gradients for values and sums. Each one's gradient is the other one's
product. Codes have no gradient here: training differentiates `shiftadd3d.nn.binarize`. `matadd` and `add_attention` are
for inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.cpu import matadd_calls
from shiftadd3d.kernels.cpu.matadd import MATADD, PRODUCTS, SUMS
from shiftadd3d.kernels.cpu.matadd_calls import CODES
from shiftadd3d.kernels.cuda import matadd as cuda_matadd
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.reference.matadd import (
    AddAttention,
    Codes,
    MatAddKV,
    MatAddQ,
    add_attention_twin,
    features_of,
    matadd_kv_twin,
    matadd_q_twin,
)
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, Spec
from shiftadd3d.kernels.runtime.memory import DTYPES, empty_by_heads
from shiftadd3d.kernels.runtime.targets import CpuTarget, current


def _check_codes(x: Tensor, values: Tensor, features: int | None) -> int:
    """The number of features whose signs x holds."""
    shape = x.shape
    if len(shape) < 2 or shape[:-2] != values.shape[:-2]:
        raise UserError(
            f"queries, keys and values must have the same dimensions before the last two, not {list(shape)} and "
            f"{list(values.shape)}"
        )
    packed = x.dtype == torch.uint8
    if not (packed or x.is_floating_point()):
        raise UserError(f"codes are the signs of floating-point features, or packed in uint8, not {x.dtype}")
    width = 8 * shape[-1] if packed else shape[-1]
    features = width if features is None else features
    if not (width - 8 < features <= width if packed else features == width):
        raise UserError(f"{'packed signs' if packed else 'features'} {list(shape)} do not hold {features} a token")
    return features


def _check_keys(k: Tensor, v: Tensor, mask: Tensor | None, features: int | None) -> int:
    """The number of features of a key."""
    features = _check_codes(k, v, features)
    if k.shape[-2] != v.shape[-2]:
        raise UserError(f"every key needs a value: there are {k.shape[-2]} keys and {v.shape[-2]} values")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise UserError(f"the mask must be bool (True where a key counts), not {mask.dtype}")
        if mask.dim() != k.dim() - 1 or any(m not in (1, n) for m, n in zip(mask.shape, k.shape, strict=False)):
            raise UserError(f"the mask must be {list(k.shape[:-1])}, with 1 where it repeats, not {list(mask.shape)}")
    return features


def _check(given: AddAttention) -> None:
    q, k, v, mask, _, features, contrast, _ = given
    _check_codes(q, v, _check_keys(k, v, mask, features))
    if contrast is not None and (v.dim() < 3 or contrast.shape != v.shape[-3:-2]):
        raise UserError(
            f"contrast must be [H], one for each head of values [*, H, M, E], not {list(contrast.shape)} for "
            f"{list(v.shape)}"
        )


class _Backend(Protocol):
    """The backend of one kind of device, for tensors [B, H, tokens, width] that are not empty. None: the twin must run.

    Rows are contiguous, masks [B, H, M], and `features` a number.
    """

    def sums(self, given: MatAddKV) -> Tensor | None: ...  # [B, H, D, E] float32
    def products(self, given: MatAddQ) -> Tensor | None: ...  # [B, H, N, E]
    def attend(self, given: AddAttention) -> Tensor | None: ...  # [B, H, N, E]


class _Cpu:
    """What CPUs compute."""

    def sums(self, given: MatAddKV) -> Tensor | None:
        k, v, mask, *_ = given
        widths = features_of(k, given.features), v.shape[-1]
        function = _function(SUMS, current(), v.dtype, (k.dtype,), *widths, mask is not None)
        return None if function is None else matadd_calls.sums(function, given)

    def products(self, given: MatAddQ) -> Tensor | None:
        q, kv, _ = given
        function = _function(PRODUCTS, current(), kv.dtype, (q.dtype,), *kv.shape[-2:])
        return None if function is None else matadd_calls.products(function, given)

    def attend(self, given: AddAttention) -> Tensor | None:
        q, k, v, mask, _, features, contrast, attention = given
        widths, flags = (features_of(k, features), v.shape[-1]), (mask is not None, attention, contrast is not None)
        function = _function(MATADD, current(), v.dtype, (q.dtype, k.dtype), *widths, *flags)
        return None if function is None else matadd_calls.attend(function, given)


_CPU = _Cpu()


@cache
def _function(
    kernel: Kernel,
    target: CpuTarget,  # this process's
    values: torch.dtype,
    signs: tuple[torch.dtype, ...],
    features: int,
    columns: int,
    *flags: bool,
) -> Compiled | None:
    """The compiled function for values and signs of such dtypes, found quickly."""
    if values not in DTYPES or any(dtype not in CODES for dtype in signs):
        return None
    codes = zip(("codes", "key_codes"), (CODES[dtype] for dtype in signs), strict=False)
    spec: Spec = {**dict(codes), **dict(zip(("masked", "attention", "contrasted"), flags, strict=False))}
    return kernel.function(**spec, dtype=CODES[values], features=features, columns=columns)


def _kv(backend: _Backend, given: MatAddKV) -> Tensor | None:
    k, v, mask, codes, features = given
    if not (k.numel() and v.numel()):
        return None
    kv = backend.sums(MatAddKV(_heads(k), _heads(v), _mask_of_heads(mask, k), codes, features_of(k, features)))
    return None if kv is None else kv.to(v.dtype).view(*v.shape[:-2], *kv.shape[-2:])


def _q(backend: _Backend, given: MatAddQ) -> Tensor | None:
    q, kv, codes = given
    out = backend.products(MatAddQ(_heads(q), _heads(kv), codes)) if q.numel() and kv.numel() else None
    return None if out is None else _unheaded(out, q)


def _attention(backend: _Backend, given: AddAttention) -> Tensor | None:
    q, k, v, mask, codes, features, contrast, attention = given
    if not (q.numel() and k.numel() and v.numel()):
        return None
    heads = _heads(q), _heads(k), _heads(v), _mask_of_heads(mask, k)
    out = backend.attend(AddAttention(*heads, codes, features_of(k, features), contrast, attention))
    return None if out is None else _unheaded(out, q)


def _heads(x: Tensor) -> Tensor:
    """[*, tokens, width] as [B, H, tokens, width], the elements of a row side by side; in place if it can be."""
    if x.dim() > 4:
        x = x.flatten(0, -4)
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _mask_of_heads(mask: Tensor | None, k: Tensor) -> Tensor | None:
    return None if mask is None else _heads(mask.expand(k.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def _unheaded(out: Tensor, q: Tensor) -> Tensor:
    """What was computed by heads, with the leading dimensions of q."""
    return out if q.dim() == 4 else out.reshape(*q.shape[:-1], out.shape[-1])


def _fake_kv(given: MatAddKV) -> Tensor:
    v = given.v
    return v.new_empty(*v.shape[:-2], features_of(given.k, given.features), v.shape[-1])


def _fake(q: Tensor, values: Tensor) -> Tensor:
    return _unheaded(empty_by_heads(_heads(q), values), q)


def _backward_kv(given: MatAddKV, gradient: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    _refuse(wanted[0])
    of_v, mask = matadd_q(given.k, gradient, given.codes), given.mask
    return None, of_v if mask is None else torch.where(mask.unsqueeze(-1), of_v, 0), None, None, None


def _backward_q(given: MatAddQ, gradient: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    _refuse(wanted[0])
    return None, matadd_kv(given.q, gradient, None, given.codes, given.kv.shape[-2]), None


def _refuse(asked: bool) -> None:
    if asked:
        raise UserError("codes have no gradient here; shiftadd3d.nn.binarize trains the features whose signs they are")


#: [*, D, E] in the dtype of v.
matadd_kv = define_op(
    "matadd_kv",
    MatAddKV,
    twin=matadd_kv_twin,
    check=lambda given: _check_keys(given.k, given.v, given.mask, given.features),
    cpu=partial(_kv, _CPU),
    cuda=partial(_kv, cuda_matadd),
    fake=_fake_kv,
    backward=_backward_kv,
)

#: [*, N, E] in the dtype of kv.
matadd_q = define_op(
    "matadd_q",
    MatAddQ,
    twin=matadd_q_twin,
    check=lambda given: _check_codes(given.q, given.kv, given.kv.shape[-2]),
    cpu=partial(_q, _CPU),
    cuda=partial(_q, cuda_matadd),
    fake=lambda given: _fake(given.q, given.kv),
    backward=_backward_q,
)

#: [*, N, E] in the dtype of v.
add_attention = define_op(
    "add_attention",
    AddAttention,
    twin=add_attention_twin,
    check=_check,
    cpu=partial(_attention, _CPU),
    cuda=partial(_attention, cuda_matadd),
    fake=lambda given: _fake(given.q, given.v),
)


def matadd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    codes: Codes = "pm1",
    features: int | None = None,
) -> Tensor:
    """``Q (K^T V)``; arguments as those of `add_attention`."""
    return add_attention(q, k, v, mask, codes, features, None, False)
