"""Calls of `matadd`'s compiled functions: what they are compiled for, their arguments, and their trials."""

from __future__ import annotations

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.sign_tables import TOKENS
from shiftadd3d.kernels.reference.matadd import (
    LOW,
    AddAttention,
    Codes,
    MatAddKV,
    MatAddQ,
    add_attention_twin,
    features_of,
    matadd_kv_twin,
    matadd_q_twin,
)
from shiftadd3d.kernels.reference.trials import Draw, assert_close
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.memory import DTYPES, empty_by_heads, stored

CODES: dict[torch.dtype, str] = {**DTYPES, torch.uint8: "uint8"}
"""What kernels call the dtypes that signs are taken of; those of uint8 are packed."""

_NO_MASK = torch.zeros(1, 1, 1, dtype=torch.uint8)
_NO_CONTRAST = torch.ones(1)


class SignSpec(NamedTuple):
    """What is compiled in: dtypes (see `CODES`), widths of heads, and whether there are a mask, a scale, a contrast."""

    codes: str
    dtype: str
    features: int
    columns: int
    key_codes: str = ""  # of the function that has both queries and keys
    masked: bool = False
    attention: bool = False
    contrasted: bool = False


def sums(function: Compiled, given: MatAddKV) -> Tensor:
    """``K^T V`` of heads, [B, H, D, E] float32."""
    k, v, mask, codes, _ = given
    batch, heads, tokens, columns = v.shape
    state = torch.empty(batch, heads, _parts(batch * heads, tokens), features_of(k, given.features), columns)
    function(stored(k), stored(v), stored(_NO_MASK if mask is None else mask), LOW[codes], state)
    return state.sum(2) if state.shape[2] > 1 else state.squeeze(2)


def products(function: Compiled, given: MatAddQ) -> Tensor:
    """``Q S`` of heads, [B, H, N, E]."""
    q, kv, codes = given
    out, parts = empty_by_heads(q, kv), _parts(q.shape[0] * q.shape[1], q.shape[2])
    function(stored(q), kv.float().contiguous().unsqueeze(2), LOW[codes], parts, stored(out))
    return out


def attend(function: Compiled, given: AddAttention) -> Tensor:
    """Both in a row, [B, H, N, E]."""
    q, k, v, mask, codes, features, contrast, _ = given
    batch_heads = q.shape[0] * q.shape[1]
    parts = _parts(batch_heads, q.shape[2]), _parts(batch_heads, k.shape[2])
    out, scale = empty_by_heads(q, v), 1 / (math.pi * features_of(k, features))
    mask = _NO_MASK if mask is None else mask
    contrast = _NO_CONTRAST if contrast is None else contrast.float().contiguous()
    function(stored(q), stored(k), stored(v), stored(mask), contrast, LOW[codes], scale, *parts, stored(out))
    return out


def _parts(batch_heads: int, tokens: int) -> int:
    """Tasks that each batch and head is split into, so that threads have equally many; one if there are many anyway."""
    threads = torch.get_num_threads()
    if threads == 1 or batch_heads >= 8 * threads or tokens < 2 * TOKENS:
        return 1
    return threads // math.gcd(batch_heads, threads)


def try_sums(function: Compiled, spec: SignSpec) -> None:
    """Tails of tokens, both kinds of codes."""
    draw = Draw()
    k, v = draw.signs(spec.codes, 1, 2, 45, spec.features), draw.normal(1, 2, 45, spec.columns, dtype=spec.dtype)
    mask = draw.normal(1, 2, 45) > 0 if spec.masked else None
    for name in get_args(Codes):
        given = MatAddKV(k, v, mask, name, spec.features)
        assert_close(sums(function, given), matadd_kv_twin(*given._replace(v=v.float())))


def try_products(function: Compiled, spec: SignSpec) -> None:
    """The same of queries."""
    draw = Draw()
    q = draw.signs(spec.codes, 1, 2, 45, spec.features)
    kv = draw.normal(1, 2, spec.features, spec.columns, dtype=spec.dtype)
    for name in get_args(Codes):
        assert_close(products(function, MatAddQ(q, kv, name)), matadd_q_twin(q, kv.float(), name))


def try_matadd(function: Compiled, spec: SignSpec) -> None:
    """The same of both; a contrast below 1 and one above."""
    draw = Draw()
    q, k = draw.signs(spec.codes, 1, 2, 45, spec.features), draw.signs(spec.key_codes, 1, 2, 70, spec.features)
    v = draw.normal(1, 2, 70, spec.columns, dtype=spec.dtype)
    mask = draw.normal(1, 2, 70) > 0 if spec.masked else None
    contrast = torch.tensor([0.5, 16.0]) if spec.contrasted else None
    for name in get_args(Codes):
        given = AddAttention(q, k, v, mask, name, spec.features, contrast, spec.attention)
        assert_close(attend(function, given), add_attention_twin(*given._replace(v=v.float())))
