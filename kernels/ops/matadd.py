"""MatAdd as ops: ``K^T V``, ``Q S``, both, and additive attention.

Accuracy: results differ from the reference's by the order of summation only, whatever the numerics; bfloat16 is summed
in float32. Infinity and NaN propagate as in a matmul, except that a masked key takes no part at all.

Gradients: `matadd_kv` and `matadd_q` have those with respect to values and sums, each the other one's product. Codes
are constants here; training differentiates `shiftadd3d.nn.binarize`. `matadd` and `add_attention` are for inference.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.cpu.matadd import CODES, MATADD, PRODUCTS, SUMS, run_matadd, run_products, run_sums
from shiftadd3d.kernels.cuda import matadd as cuda_matadd
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.reference.linear_angular import LEAST_ROW_SUM
from shiftadd3d.kernels.reference.matadd import (
    LOW,
    Codes,
    add_attention_twin,
    features_of,
    matadd_kv_twin,
    matadd_q_twin,
    matadd_twin,
)
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.kernel import Compiled, Kernel, SpecValue
from shiftadd3d.kernels.runtime.memory import DTYPES, empty_by_heads
from shiftadd3d.kernels.runtime.targets import CpuTarget


def matadd_kv(
    k: Tensor,  # [*, M, D], or [*, M, ceil(D / 8)] uint8
    v: Tensor,  # [*, M, E]
    mask: Tensor | None = None,  # [*, M] bool
    codes: Codes = "pm1",
    features: int | None = None,
) -> Tensor:  # [*, D, E]
    """``K^T V`` with K the codes of features k.

    Args:
        k: features in any floating dtype, of which the signs count (either zero is positive, NaN negative), or the
            outcome of `pack_signs`.
        v: values. Compiled code serves float32 and bfloat16; the twin, everything else.
        mask: True where a key counts; dimensions may be 1 to repeat. The values of other keys are not even read.
        codes: what the signs stand for, "pm1" for +1 and -1, "01" for 1 and 0.
        features: D, where k is packed and D is not a multiple of 8.

    Raises:
        UserError: for arguments that do not go together.
    """
    return _kv_op(k, v, mask, codes, features)


def matadd_q(
    q: Tensor,  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    kv: Tensor,  # [*, D, E]
    codes: Codes = "pm1",
) -> Tensor:  # [*, N, E]
    """``Q S`` with Q the codes of features q and S = kv; arguments as those of `matadd_kv`."""
    return _q_op(q, kv, codes)


def matadd(
    q: Tensor,  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    k: Tensor,  # [*, M, D], or [*, M, ceil(D / 8)] uint8
    v: Tensor,  # [*, M, E]
    mask: Tensor | None = None,  # [*, M] bool
    codes: Codes = "pm1",
    features: int | None = None,
) -> Tensor:  # [*, N, E]
    """``Q (K^T V)`` with Q and K the codes of features q and k; arguments as those of `matadd_kv`.

    q, k and v [B, H, tokens, width] are read where they are, whatever their strides. Where q has its heads side by
    side in memory, as a projection leaves them, so has the outcome.
    """
    return _matadd_op(q, k, v, mask, codes, features)


def add_attention(
    q: Tensor,  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    k: Tensor,  # [*, M, D], or [*, M, ceil(D / 8)] uint8
    v: Tensor,  # [*, M, E]
    mask: Tensor | None = None,  # [*, M] bool
    codes: Codes = "pm1",
    features: int | None = None,
    contrast: Tensor | None = None,  # [H]
) -> Tensor:  # [*, N, E]
    """Linear-angular attention of binary codes, in linear order; arguments and memory as those of `matadd`.

    ``out_i = sum_j s_ij v_j / sum_j s_ij`` with ``s_ij = 1/2 + q_i . k_j / (pi D)``, q and k being codes. A query
    that sees no key gives zeros.

    Args:
        contrast: for each head, the dimension before the last two, what the difference of an outcome to the mean of the
            values is multiplied by. It costs next to nothing: ``K^T V`` takes it on, by an outer product.
    """
    return _attention_op(q, k, v, mask, codes, features, contrast)


class MatAddKV(NamedTuple):
    """The arguments of ``K^T V``."""

    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    codes: Codes = "pm1"
    features: int | None = None


class MatAddQ(NamedTuple):
    """The arguments of ``Q S``."""

    q: Tensor
    kv: Tensor
    codes: Codes = "pm1"


class MatAdd(NamedTuple):
    """The arguments of both products in a row."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    codes: Codes = "pm1"
    features: int | None = None


class AddAttention(NamedTuple):
    """The arguments of additive attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    codes: Codes = "pm1"
    features: int | None = None
    contrast: Tensor | None = None


def _check_codes(x: Tensor, values: Tensor, features: int | None) -> None:
    if x.dim() < 2 or x.shape[:-2] != values.shape[:-2]:
        raise UserError(
            f"queries, keys and values must have the same dimensions before the last two, not {list(x.shape)} and "
            f"{list(values.shape)}"
        )
    packed = x.dtype == torch.uint8
    if not (packed or x.is_floating_point()):
        raise UserError(f"codes are the signs of floating-point features, or packed in uint8, not {x.dtype}")
    width, features = features_of(x, None), features_of(x, features)
    if not (width - 8 < features <= width if packed else features == width):
        raise UserError(f"{'packed signs' if packed else 'features'} {list(x.shape)} are not {features} a token")


def _check_kv(given: MatAddKV) -> None:
    k, v, mask, _, features = given
    _check_codes(k, v, features)
    if k.shape[-2] != v.shape[-2]:
        raise UserError(f"every key needs a value: there are {k.shape[-2]} keys and {v.shape[-2]} values")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise UserError(f"the mask must be bool (True where a key counts), not {mask.dtype}")
        if mask.dim() != k.dim() - 1 or any(m not in (1, n) for m, n in zip(mask.shape, k.shape, strict=False)):
            raise UserError(f"the mask must be {list(k.shape[:-1])}, or 1 where it repeats, not {list(mask.shape)}")


def _check(given: MatAdd | AddAttention) -> None:
    q, k, v, mask, codes, features, *contrasts = given
    _check_kv(MatAddKV(k, v, mask, codes, features))
    _check_codes(q, v, features_of(k, features))
    for contrast in contrasts:
        if contrast is not None and (v.dim() < 3 or contrast.shape != v.shape[-3:-2]):
            raise UserError(
                f"contrast must be [H], one for each head of values [*, H, M, E], not {list(contrast.shape)} for "
                f"{list(v.shape)}"
            )


def _kv_cpu(given: MatAddKV) -> Tensor | None:
    k, v, mask, codes, features = given
    features = features_of(k, features)
    spec = ("codes", k.dtype), ("masked", mask is not None)
    function = _function(SUMS, targets.current(), v.dtype, features, v.shape[-1], *spec)
    if function is None or not k.numel():
        return None
    kv = run_sums(function, _heads(k), _heads(v), _mask_of_heads(mask, k), codes, features)
    return kv.to(v.dtype).view(*v.shape[:-2], features, v.shape[-1])


def _q_cpu(given: MatAddQ) -> Tensor | None:
    q, kv, codes = given
    function = _function(PRODUCTS, targets.current(), kv.dtype, *kv.shape[-2:], ("codes", q.dtype))
    if function is None or not q.numel():
        return None
    return _unheaded(run_products(function, _heads(q), _heads(kv), codes), q)


def _cpu(given: MatAdd | AddAttention) -> Tensor | None:
    q, k, v, mask, codes, features, *contrasts = given
    features, contrast = features_of(k, features), contrasts[0] if contrasts else None
    function = _function(
        MATADD,
        targets.current(),
        v.dtype,
        features,
        v.shape[-1],
        ("codes", q.dtype),
        ("key_codes", k.dtype),
        ("masked", mask is not None),
        ("attention", isinstance(given, AddAttention)),
        ("contrasted", contrast is not None),
    )
    if function is None or not q.numel() or not k.numel():
        return None
    heads = _heads(q), _heads(k), _heads(v)
    return _unheaded(run_matadd(function, *heads, _mask_of_heads(mask, k), codes, features, contrast), q)


def _kv_cuda(given: MatAddKV) -> Tensor | None:
    k, v, mask, codes, features = given
    features = features_of(k, features)
    if not (k.numel() and v.numel()):
        return None
    keys, values, mask_of_heads = _heads(k), _heads(v), _mask_of_heads(mask, k)
    state = cuda_matadd.sums(keys, values, mask_of_heads, LOW[codes], features, attention=False)
    return None if state is None else state.to(v.dtype).view(*v.shape[:-2], features, v.shape[-1])


def _q_cuda(given: MatAddQ) -> Tensor | None:
    q, kv, codes = given
    if not (q.numel() and kv.numel()):
        return None
    queries = _heads(q)
    out, state = empty_by_heads(queries, _heads(kv)), kv.float().reshape(-1, *kv.shape[-2:]).contiguous()
    served = cuda_matadd.products(queries, state, LOW[codes], kv.shape[-2], out, attention=False)
    return _unheaded(out, q) if served else None


def _cuda(given: MatAdd | AddAttention) -> Tensor | None:
    q, k, v, mask, codes, features, *contrasts = given
    features, attention = features_of(k, features), isinstance(given, AddAttention)
    if not (q.numel() and k.numel() and v.numel()):
        return None
    queries, values, low = _heads(q), _heads(v), LOW[codes]
    state = cuda_matadd.sums(_heads(k), values, _mask_of_heads(mask, k), low, features, attention)
    if state is None:
        return None
    for contrast in contrasts:
        if contrast is not None:
            _add_contrast_(state, contrast)
    out = empty_by_heads(queries, values)
    least = LEAST_ROW_SUM if attention else 0.0
    served = cuda_matadd.products(queries, state, low, features, out, attention=attention, least=least)
    return _unheaded(out, q) if served else None


def _add_contrast_(state: Tensor, contrast: Tensor) -> None:
    """Give contrast [H] to sums [B * H, D + 1, E + 1] whose last row and column sum values and codes, in place.

    See `sign_tables.Products`, which does the same on the way.
    """
    keys, values, count = state[:, :-1, -1:], state[:, -1:, :-1], state[:, -1:, -1:]
    factors = contrast.to(state.dtype).repeat(len(state) // len(contrast))[:, None, None]
    state[:, :-1, :-1] = torch.lerp(keys * (values / count.clamp(min=1)), state[:, :-1, :-1], factors)


@cache
def _function(
    kernel: Kernel,
    target: CpuTarget,
    dtype: torch.dtype,
    features: int,
    columns: int,
    *spec: tuple[str, torch.dtype | SpecValue],
) -> Compiled | None:
    """The compiled function for this process's target, or None where the twin has to do."""
    if dtype not in DTYPES or not features or not columns:
        return None
    if any(isinstance(value, torch.dtype) and value not in CODES for _, value in spec):
        return None
    stored = {name: CODES[value] if isinstance(value, torch.dtype) else value for name, value in spec}
    return kernel.function(dtype=CODES[dtype], features=features, columns=columns, **stored)


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


def _fake(given: MatAdd | AddAttention) -> Tensor:
    return _unheaded(empty_by_heads(_heads(given.q), given.v), given.q)


def _set_up_kv(ctx: Any, inputs: MatAddKV, output: Tensor) -> None:
    k, _, mask, ctx.codes, _ = inputs
    ctx.save_for_backward(k, mask)


def _backward_kv(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    k, mask = ctx.saved_tensors
    _refuse(ctx.needs_input_grad[0])
    of_v = matadd_q(k, gradient, ctx.codes)
    return None, of_v if mask is None else torch.where(mask.unsqueeze(-1), of_v, 0), None, None, None


def _set_up_q(ctx: Any, inputs: MatAddQ, output: Tensor) -> None:
    q, kv, ctx.codes = inputs
    ctx.features = kv.shape[-2]
    ctx.save_for_backward(q)


def _backward_q(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (q,) = ctx.saved_tensors
    _refuse(ctx.needs_input_grad[0])
    return None, matadd_kv(q, gradient, None, ctx.codes, ctx.features), None


def _refuse(asked: bool) -> None:
    if asked:
        raise UserError("codes are constants here; shiftadd3d.nn.binarize trains what they are the signs of")


_kv_op = define_op(
    "matadd_kv",
    MatAddKV,
    twin=matadd_kv_twin,
    check=_check_kv,
    cpu=_kv_cpu,
    cuda=_kv_cuda,
    fake=_fake_kv,
    backward=_backward_kv,
    setup_context=_set_up_kv,
)

_q_op = define_op(
    "matadd_q",
    MatAddQ,
    twin=matadd_q_twin,
    check=lambda given: _check_codes(given.q, given.kv, given.kv.shape[-2]),
    cpu=_q_cpu,
    cuda=_q_cuda,
    fake=lambda given: _unheaded(empty_by_heads(_heads(given.q), given.kv), given.q),
    backward=_backward_q,
    setup_context=_set_up_q,
)

_matadd_op, _attention_op = (
    define_op(name, arguments, twin=twin, check=_check, cpu=_cpu, cuda=_cuda, fake=_fake)
    for name, arguments, twin in (
        ("matadd", MatAdd, matadd_twin),
        ("add_attention", AddAttention, add_attention_twin),
    )
)
