"""The memory that kernels read and write."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Dtype = Literal["float32", "bfloat16"]

# Below this, the C library hands out memory that has been used before.
_LARGE = 8 << 20
_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14

DTYPES: dict[torch.dtype, Dtype] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What kernels call the dtypes of activations that CPUs compute with."""


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU. On Linux, large memory comes in pages of 2 MiB if possible.

    The system clears fresh memory at the first write. With pages of 4 KiB, this takes longer than many kernels take to
    fill it.
    """
    fresh = torch.empty(shape, dtype=dtype)
    if fresh.nbytes >= _LARGE:
        advise = _madvise()
        start = -(-fresh.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (fresh.data_ptr() + fresh.nbytes) // _HUGE_PAGE * _HUGE_PAGE
        if advise is not None and end > start:
            advise(start, end - start, _MADV_HUGEPAGE)  # advice only: whether it is taken makes no difference here
    return fresh


def stored(x: Tensor) -> Tensor:
    """`x` as functions take it: bfloat16 as integers with its bits, and a mask as bytes."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16)
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def float32_bias(bias: Tensor | None, outputs: int, device: torch.device | None = None) -> Tensor:
    """The bias [outputs] as functions take it: in float32, or zeros on `device` if there is none."""
    if bias is None:
        return torch.zeros(outputs, device=device)
    return bias if bias.dtype == torch.float32 and bias.is_contiguous() else bias.float().contiguous()


class Flag(threading.local):
    """One int32 for each thread. It is zero, and compiled code sets it to 1 if it cannot compute the outcome."""

    def __init__(self) -> None:
        with torch.inference_mode(False):  # or else it could not be cleared outside
            self.tensor = torch.zeros(1, dtype=torch.int32, device="cpu")

    def was_raised(self) -> bool:
        """Whether code has set the flag. Afterwards it is zero again."""
        raised = bool(self.tensor.item())
        if raised:
            self.tensor.zero_()
        return raised


FLAG = Flag()


@lru_cache(maxsize=1)
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def empty_by_heads(q: Tensor, v: Tensor) -> Tensor:
    """[B, H, N, E] in the dtype of v. Its heads are side by side in memory if those of q are."""
    batch, heads, tokens, _ = q.shape
    if heads > 1 and tokens > 1 and q.stride(1) < q.stride(2):
        return q.new_empty(batch, tokens, heads, v.shape[-1], dtype=v.dtype).transpose(1, 2)
    return q.new_empty(batch, heads, tokens, v.shape[-1], dtype=v.dtype)
