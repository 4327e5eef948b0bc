"""MatAdd as ops: ``K^T V``, ``Q S``, both, and additive attention.

Accuracy: results differ from the reference's by the order of summation only, whatever the numerics; bfloat16 is summed
in float32. Infinity and NaN propagate as in a matmul, except that a masked key takes no part at all.

Gradients: `matadd_kv` and `matadd_q` have those with respect to values and sums, each the other one's product. Codes
are constants here; training differentiates `shiftadd3d.nn.binarize`. `matadd` and `add_attention` are for inference.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.cpu.matadd import CODES, MATADD, PRODUCTS, SUMS, run_matadd, run_products, run_sums
from shiftadd3d.kernels.cuda import matadd as cuda_matadd
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.reference.linear_angular import LEAST_ROW_SUM
from shiftadd3d.kernels.reference.matadd import (
    LOW,
    add_attention_twin,
    check_codes,
    check_contrast,
    matadd_kv_twin,
    matadd_q_twin,
    matadd_twin,
)
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.kernel import Kernel
from shiftadd3d.kernels.runtime.memory import empty_by_heads
from shiftadd3d.kernels.runtime.numerics import get_numerics
from shiftadd3d.kernels.runtime.targets import CpuTarget


def matadd_kv(
    k: Tensor,  # [*, M, D], or [*, M, ceil(D / 8)] uint8
    v: Tensor,  # [*, M, E]
    mask: Tensor | None = None,  # [*, M] bool
    codes: str = "pm1",
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
    if get_numerics() == "twin":
        return matadd_kv_twin(k, v, mask, codes, features)
    return _kv_op(k, v, mask, codes, features)


def matadd_q(
    q: Tensor,  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    kv: Tensor,  # [*, D, E]
    codes: str = "pm1",
) -> Tensor:  # [*, N, E]
    """``Q S`` with Q the codes of features q and S = kv; arguments as those of `matadd_kv`."""
    if get_numerics() == "twin":
        return matadd_q_twin(q, kv, codes)
    return _q_op(q, kv, codes)


def matadd(
    q: Tensor,  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    k: Tensor,  # [*, M, D], or [*, M, ceil(D / 8)] uint8
    v: Tensor,  # [*, M, E]
    mask: Tensor | None = None,  # [*, M] bool
    codes: str = "pm1",
    features: int | None = None,
) -> Tensor:  # [*, N, E]
    """``Q (K^T V)`` with Q and K the codes of features q and k; arguments as those of `matadd_kv`.

    q, k and v [B, H, tokens, width] are read where they are, whatever their strides. Where q has its heads side by
    side in memory, as a projection leaves them, so has the outcome.
    """
    if get_numerics() == "twin":
        return matadd_twin(q, k, v, mask, codes, features)
    return _matadd_op(q, k, v, mask, codes, features)


def add_attention(
    q: Tensor,  # [*, N, D], or [*, N, ceil(D / 8)] uint8
    k: Tensor,  # [*, M, D], or [*, M, ceil(D / 8)] uint8
    v: Tensor,  # [*, M, E]
    mask: Tensor | None = None,  # [*, M] bool
    codes: str = "pm1",
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
    if get_numerics() == "twin":
        return add_attention_twin(q, k, v, mask, codes, features, contrast)
    return _attention_op(q, k, v, mask, codes, features, contrast)


def _kv_cpu(
    k: Tensor, v: Tensor, mask: Tensor | None = None, codes: str = "pm1", features: int | None = None
) -> Tensor:
    features = check_codes(k, v, mask, codes, features)
    function = _function(
        SUMS, targets.current(), v.dtype, features, v.shape[-1], ("codes", k.dtype), ("masked", mask is not None)
    )
    if function is None or not k.numel():
        return matadd_kv_twin(k, v, mask, codes, features)
    kv = run_sums(function, _heads(k), _heads(v), _mask_of_heads(mask, k), codes, features)
    return kv.to(v.dtype).view(*v.shape[:-2], features, v.shape[-1])


def _q_cpu(q: Tensor, kv: Tensor, codes: str = "pm1") -> Tensor:
    check_codes(q, kv, None, codes, kv.shape[-2], rows=False)
    function = _function(PRODUCTS, targets.current(), kv.dtype, *kv.shape[-2:], ("codes", q.dtype))
    if function is None or not q.numel():
        return matadd_q_twin(q, kv, codes)
    return _unheaded(run_products(function, _heads(q), _heads(kv), codes), q)


def _matadd_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    codes: str = "pm1",
    features: int | None = None,
    contrast: Tensor | None = None,
    *,
    attention: bool = False,
) -> Tensor:
    features = check_codes(k, v, mask, codes, features)
    check_codes(q, v, None, codes, features, rows=False)
    check_contrast(contrast, v)
    function = _function(
        MATADD,
        targets.current(),
        v.dtype,
        features,
        v.shape[-1],
        ("codes", q.dtype),
        ("key_codes", k.dtype),
        ("masked", mask is not None),
        ("attention", attention),
        ("contrasted", contrast is not None),
    )
    if function is None or not q.numel() or not k.numel():
        if attention:
            return add_attention_twin(q, k, v, mask, codes, features, contrast)
        return matadd_twin(q, k, v, mask, codes, features)
    heads = _heads(q), _heads(k), _heads(v)
    return _unheaded(run_matadd(function, *heads, _mask_of_heads(mask, k), codes, features, contrast), q)


def _kv_cuda(
    k: Tensor, v: Tensor, mask: Tensor | None = None, codes: str = "pm1", features: int | None = None
) -> Tensor:
    features = check_codes(k, v, mask, codes, features)
    state = None
    if k.numel() and v.numel():
        keys, values, mask_of_heads = _heads(k), _heads(v), _mask_of_heads(mask, k)
        state = cuda_matadd.sums(keys, values, mask_of_heads, LOW[codes], features, attention=False)
    if state is None:
        return matadd_kv_twin(k, v, mask, codes, features)
    return state.to(v.dtype).view(*v.shape[:-2], features, v.shape[-1])


def _q_cuda(q: Tensor, kv: Tensor, codes: str = "pm1") -> Tensor:
    features = kv.shape[-2]
    check_codes(q, kv, None, codes, features, rows=False)
    queries = _heads(q)
    out = empty_by_heads(queries, _heads(kv))
    if q.numel() and kv.numel():
        state = kv.float().reshape(-1, features, kv.shape[-1]).contiguous()
        if cuda_matadd.products(queries, state, LOW[codes], features, out, attention=False):
            return _unheaded(out, q)
    return matadd_q_twin(q, kv, codes)


def _matadd_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    codes: str = "pm1",
    features: int | None = None,
    contrast: Tensor | None = None,
    *,
    attention: bool = False,
) -> Tensor:
    features = check_codes(k, v, mask, codes, features)
    check_codes(q, v, None, codes, features, rows=False)
    check_contrast(contrast, v)
    if q.numel() and k.numel() and v.numel():
        queries, values, low = _heads(q), _heads(v), LOW[codes]
        out = empty_by_heads(queries, values)
        state = cuda_matadd.sums(_heads(k), values, _mask_of_heads(mask, k), low, features, attention)
        if state is not None and contrast is not None:
            _add_contrast_(state, contrast)
        if state is not None and cuda_matadd.products(
            queries, state, low, features, out, attention=attention, least=LEAST_ROW_SUM
        ):
            return _unheaded(out, q)
    if attention:
        return add_attention_twin(q, k, v, mask, codes, features, contrast)
    return matadd_twin(q, k, v, mask, codes, features)


def _add_contrast_(state: Tensor, contrast: Tensor) -> None:
    """Give contrast [H] to sums [B * H, D + 1, E + 1] whose last row and column sum values and codes, in place.

    See `sign_tables.Products`, which does the same on the way.
    """
    keys, values, count = state[:, :-1, -1:], state[:, -1:, :-1], state[:, -1:, -1:]
    factors = contrast.to(state.dtype).repeat(len(state) // len(contrast))[:, None, None]
    state[:, :-1, :-1] = torch.lerp(keys * (values / count.clamp(min=1)), state[:, :-1, :-1], factors)


@cache
def _function(
    kernel: Kernel, target: CpuTarget, dtype: torch.dtype, features: int, columns: int, *spec: tuple[str, Any]
) -> Any:
    """The compiled function for this process's target, or None where the twin has to do."""
    if dtype not in (torch.float32, torch.bfloat16) or not features or not columns:
        return None
    if any(isinstance(value, torch.dtype) and value not in CODES for _, value in spec):
        return None
    stored = {name: CODES.get(value, value) for name, value in spec}
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


def _fake_kv(
    k: Tensor, v: Tensor, mask: Tensor | None = None, codes: str = "pm1", features: int | None = None
) -> Tensor:
    features = check_codes(k, v, mask, codes, features)
    return v.new_empty(*v.shape[:-2], features, v.shape[-1])


def _fake_q(q: Tensor, kv: Tensor, codes: str = "pm1") -> Tensor:
    check_codes(q, kv, None, codes, kv.shape[-2], rows=False)
    return _unheaded(empty_by_heads(_heads(q), kv), q)


def _fake_matadd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    codes: str = "pm1",
    features: int | None = None,
    contrast: Tensor | None = None,
) -> Tensor:
    features = check_codes(k, v, mask, codes, features)
    check_codes(q, v, None, codes, features, rows=False)
    check_contrast(contrast, v)
    return _unheaded(empty_by_heads(_heads(q), v), q)


def _set_up_kv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    k, _, mask, ctx.codes, _ = inputs
    ctx.save_for_backward(k, mask)


def _backward_kv(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    k, mask = ctx.saved_tensors
    _refuse(ctx.needs_input_grad[0])
    of_v = matadd_q(k, gradient, ctx.codes)
    return None, of_v if mask is None else torch.where(mask.unsqueeze(-1), of_v, 0), None, None, None


def _set_up_q(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
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
    "matadd_kv(Tensor k, Tensor v, Tensor? mask=None, str codes='pm1', int? features=None) -> Tensor",
    cpu=_kv_cpu,
    cuda=_kv_cuda,
    twin=matadd_kv_twin,
    fake=_fake_kv,
    backward=_backward_kv,
    setup_context=_set_up_kv,
)

_q_op = define_op(
    "matadd_q(Tensor q, Tensor kv, str codes='pm1') -> Tensor",
    cpu=_q_cpu,
    cuda=_q_cuda,
    twin=matadd_q_twin,
    fake=_fake_q,
    backward=_backward_q,
    setup_context=_set_up_q,
)

_matadd_op = define_op(
    "matadd(Tensor q, Tensor k, Tensor v, Tensor? mask=None, str codes='pm1', int? features=None) -> Tensor",
    cpu=_matadd_cpu,
    cuda=_matadd_cuda,
    twin=matadd_twin,
    fake=_fake_matadd,
)

_attention_op = define_op(
    "add_attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, str codes='pm1', int? features=None, "
    "Tensor? contrast=None) -> Tensor",
    cpu=partial(_matadd_cpu, attention=True),
    cuda=partial(_matadd_cuda, attention=True),
    twin=add_attention_twin,
    fake=_fake_matadd,
)
