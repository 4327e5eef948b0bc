"""Attention over binary queries and keys: every product against a code is an addition.

The similarity is the linear-angular one: the angular kernel ``1 - angle(q, k) / pi`` to first order,
``1/2 + cos(q, k) / pi``. It needs no softmax, so keys and values can be summed up first, ``q (k^T v)``, at a cost
linear in the number of tokens. With codes of length D, ``cos(q, k)`` is ``q . k / D``: a count of agreeing bits.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2; You et al., Castling-ViT (CVPR 2023), for the
linear-angular similarity and the depthwise convolution on the values.
"""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from shiftadd3d._errors import UserError

Codes = Literal["pm1", "01"]
CODES = ("pm1", "01")
Order = Literal["auto", "linear", "quadratic"]
ORDERS = ("auto", "linear", "quadratic")

# Similarities are at least 1/2 - 1/pi = 0.18, so a row sum below this has no key at all.
_LEAST_ROW_SUM = 0.1


class _Binarize(Function):
    """Threshold at zero; the gradient is that of a line clipped at +-clip."""

    @staticmethod
    def forward(x: Tensor, codes: str, clip: float) -> Tensor:
        bit = (x >= 0).to(x.dtype)
        return bit if codes == "01" else bit.mul_(2).sub_(1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.codes, ctx.clip = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        # From -clip to clip the line climbs by 2 for +-1 codes and by 1 for 0/1 codes.
        slope = (1.0 if ctx.codes == "pm1" else 0.5) / ctx.clip
        return grad * (x.abs() <= ctx.clip).to(grad.dtype).mul_(slope), None, None


def binarize(x: Tensor, codes: Codes = "pm1", clip: float = 1.0) -> Tensor:
    """Binary codes of `x`: +1 where x >= 0 (either zero counts), else -1 ("pm1") or 0 ("01").

    Differentiable by a clipped straight-through estimator: the gradient is that of ``clamp(x / clip, -1, 1)`` for
    "pm1" and of ``clamp((x / clip + 1) / 2, 0, 1)`` for "01", so it vanishes where ``|x| > clip``.

    Args:
        x: any shape, any floating dtype.

    Returns:
        Codes of the shape and dtype of `x`.

    Raises:
        UserError: for codes that do not exist.
    """
    if codes not in CODES:
        raise UserError(f"codes must be one of {', '.join(CODES)}, not {codes!r}")
    return _Binarize.apply(x, codes, clip)


def linear_add_attention(
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, H, M, D]
    v: Tensor,  # [B, H, M, E]
    *,
    mask: Tensor | None = None,
    order: Order = "auto",
) -> Tensor:  # [B, H, N, E]
    """Linear-angular attention of binary codes.

    ``out_i = sum_j s_ij v_j / sum_j s_ij`` with ``s_ij = 1/2 + q_i . k_j / (pi D)``. For codes of -1 and +1 that is
    between 0.18 and 0.82, for codes of 0 and 1 between 0.5 and 0.82: rows are proper distributions. Class tokens are
    tokens like any other; N and M may differ.

    Args:
        q: codes of the queries (see `binarize`), in the dtype of `v`.
        k: codes of the keys.
        v: values.
        mask: bool, True where a key counts: [B, M], or [.., .., 1 or N, M] broadcasting to [B, H, N, M]. A query that
            sees no key gives zeros. A mask that differs from query to query needs the quadratic order.
        order: "linear" for ``q (k^T v)``, "quadratic" for ``(q k^T) v``, "auto" for the one with fewer additions. The
            results differ by rounding only.

    Raises:
        UserError: for an order that does not exist, or the linear order with a mask per query.
    """
    mask = _broadcastable(mask)
    order = _choose_order(order, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], mask)
    scale = 1 / (math.pi * q.shape[-1])
    if order == "quadratic":
        similarity = (q @ k.transpose(-2, -1)) * scale + 0.5
        if mask is not None:
            similarity = similarity * mask
        return (similarity @ v) / similarity.sum(-1, keepdim=True).clamp(min=_LEAST_ROW_SUM)
    if mask is not None:
        key_mask = mask.transpose(-2, -1)  # [.., .., M, 1]
        k, v = k * key_mask, v * key_mask
        count = key_mask.sum(-2, keepdim=True)
    else:
        count = k.shape[-2]
    key_values = k.transpose(-2, -1) @ v  # [B, H, D, E]
    key_sum = k.sum(-2).unsqueeze(-1)  # [B, H, D, 1]
    numerator = (q @ key_values) * scale + v.sum(-2, keepdim=True) * 0.5
    row_sum = (q @ key_sum) * scale + count * 0.5
    return numerator / row_sum.clamp(min=_LEAST_ROW_SUM)


def first_query_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """How the first query attends, without the other rows of the attention map.

    Args:
        q: codes [B, H, N, D]; only the first query is read.
        k: codes [B, H, M, D].
        mask: as in `linear_add_attention`.

    Returns:
        [B, H, M], the first row of the map that `linear_add_attention` applies; sums to 1 where any key counts.
    """
    similarity = (k @ q[..., 0, :].unsqueeze(-1)).squeeze(-1) / (math.pi * q.shape[-1]) + 0.5
    mask = _broadcastable(mask)
    if mask is not None:
        similarity = similarity * mask[..., 0, :]
    return similarity / similarity.sum(-1, keepdim=True).clamp(min=_LEAST_ROW_SUM)


def _broadcastable(mask: Tensor | None) -> Tensor | None:
    """A mask over keys [B, M] as [B, 1, 1, M]; a 4-dimensional one as it is."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise UserError(f"the attention mask must be bool (True where a key counts), not {mask.dtype}")
    if mask.dim() not in (2, 4):
        raise UserError(f"the attention mask must have 2 dimensions [B, M] or 4, not {mask.dim()}")
    return mask[:, None, None] if mask.dim() == 2 else mask


def _choose_order(order: Order, queries: int, keys: int, code: int, value: int, mask: Tensor | None) -> Order:
    if order not in ORDERS:
        raise UserError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
    if mask is not None and mask.shape[-2] != 1:
        if order == "linear":
            raise UserError("the linear order sums over keys once for all queries: a mask per query needs 'quadratic'")
        return "quadratic"
    if order != "auto":
        return order
    return "linear" if (queries + keys) * code * value <= queries * keys * (code + value) else "quadratic"


class SignBinarizer(nn.Module):
    """Vanilla binarisation: the sign of each feature ("sign").

    A code does not see how long its token is, so the estimator's clipping range should not either: for the gradient,
    tokens are brought to a root mean square of 1 first.
    """

    def __init__(self, head_dim: int, num_heads: int, codes: Codes = "pm1") -> None:
        super().__init__()
        if codes not in CODES:
            raise UserError(f"codes must be one of {', '.join(CODES)}, not {codes!r}")
        self.codes: Codes = codes

    def forward(self, x: Tensor) -> Tensor:  # [B, H, N, D] -> [B, H, N, D]
        if torch.is_grad_enabled() and x.requires_grad:
            with torch.no_grad():
                scale = x.square().mean(-1, keepdim=True).add_(torch.finfo(x.dtype).tiny).rsqrt_()
            x = x * scale
        return binarize(x, self.codes)

    def extra_repr(self) -> str:
        return f"codes={self.codes!r}"


BINARIZERS: dict[str, type[nn.Module]] = {"sign": SignBinarizer}


def make_binarizer(name: str, head_dim: int, num_heads: int, codes: Codes = "pm1") -> nn.Module:
    """The binarizer called `name`: a module from features [B, H, N, D] to codes [B, H, N, D'].

    Raises:
        UserError: listing the names, if there is none of that name.
    """
    if name not in BINARIZERS:
        raise UserError(f"binarizer must be one of {', '.join(BINARIZERS)}, not {name!r}")
    return BINARIZERS[name](head_dim, num_heads, codes)


class TokenConv(nn.Module):
    """Depthwise convolution of the values along the tokens of a sequence, one kernel a head.

    It gives back the local detail that the nearly flat linear-angular map averages away. It starts at zero, so that a
    layer put in place of another one first does what its attention does.

    Args:
        num_heads: number of kernels.
        kernel_size: odd number of tokens.
    """

    def __init__(self, num_heads: int, kernel_size: int) -> None:
        super().__init__()
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(
                f"the kernel size of the convolution on the values must be odd and positive, not {kernel_size!r}"
            )
        self.num_heads, self.kernel_size = num_heads, kernel_size
        self.weight = nn.Parameter(torch.zeros(num_heads, 1, kernel_size, 1))

    def forward(self, v: Tensor) -> Tensor:  # [B, H, N, E] -> [B, H, N, E]
        return F.conv2d(v, self.weight, padding=(self.kernel_size // 2, 0), groups=self.num_heads)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}"


class AddAttention(nn.Module):
    """Multi-head self-attention whose products with queries and keys are additions.

    Args:
        dim: token width C.
        num_heads: must divide `dim`.
        qkv_bias: biases for the query, key and value projections.
        out_bias: bias for the output projection.
        binarizer: how queries and keys become codes, a name in `BINARIZERS`.
        codes: "pm1" for codes of -1 and +1, "01" for 0 and 1.
        dwconv: kernel size of the convolution on the values along the sequence, 0 for none; or a module from values
            [B, H, N, C / H] to the same shape, for tokens that lie otherwise (an image, say).
        order: see `linear_add_attention`.
        dropout: probability for the output.

    Shapes: x [B, N, C] to [B, N, C]. The projections are `q_fc`, `k_fc`, `v_fc`, `out_fc`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        out_bias: bool = True,
        binarizer: str = "sign",
        codes: Codes = "pm1",
        dwconv: int | nn.Module = 0,
        order: Order = "auto",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise UserError(f"num_heads must divide dim; {num_heads} does not divide {dim}")
        if order not in ORDERS:
            raise UserError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
        self.num_heads, self.dropout = num_heads, dropout
        self.order: Order = order
        head_dim = dim // num_heads
        self.q_fc = nn.Linear(dim, dim, bias=qkv_bias)
        self.k_fc = nn.Linear(dim, dim, bias=qkv_bias)
        self.v_fc = nn.Linear(dim, dim, bias=qkv_bias)
        self.out_fc = nn.Linear(dim, dim, bias=out_bias)
        self.q_code = make_binarizer(binarizer, head_dim, num_heads, codes)
        self.k_code = make_binarizer(binarizer, head_dim, num_heads, codes)
        if isinstance(dwconv, nn.Module):
            self.dwconv: nn.Module | None = dwconv
        else:
            self.dwconv = TokenConv(num_heads, dwconv) if dwconv else None

    @classmethod
    def from_projections(
        cls,
        q_fc: nn.Module,
        k_fc: nn.Module,
        v_fc: nn.Module,
        out_fc: nn.Module,
        num_heads: int,
        **kwargs,
    ) -> AddAttention:
        """An attention layer that takes over the given projections (the very modules, not copies).

        The four are `nn.Linear` or anything else with `in_features` and `out_features`; device, dtype and training flag
        are those of `q_fc`. `kwargs` are those of the constructor.
        """
        layer = cls(cast(nn.Linear, q_fc).in_features, num_heads, **kwargs)
        example = next(q_fc.parameters(), None)
        if example is not None:
            layer = layer.to(example)
        layer.train(q_fc.training)  # before the projections come in: they keep their own flags
        layer.q_fc, layer.k_fc, layer.v_fc, layer.out_fc = q_fc, k_fc, v_fc, out_fc
        return layer

    def forward(
        self, x: Tensor, return_weights: bool = False, mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend within each sequence.

        Args:
            x: [B, N, C].
            return_weights: also return how the first token attends, [B, N]: the first row of the attention map, the
                mean over the heads (GNT reads the volume rendering weights of a ray off it).
            mask: bool [B, N], True where a token may be attended to.

        Returns:
            [B, N, C], or that and the weights [B, N].
        """
        q, k, v = (
            fc(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for fc in (self.q_fc, self.k_fc, self.v_fc)
        )
        q, k = self.q_code(q), self.k_code(k)
        out = linear_add_attention(q, k, v, mask=mask, order=self.order)
        if self.dwconv is not None:
            out = out + self.dwconv(v)
        out = self.out_fc(out.transpose(1, 2).flatten(-2))
        out = F.dropout(out, self.dropout, self.training)
        return (out, first_query_weights(q, k, mask).mean(1)) if return_weights else out

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, order={self.order!r}, dropout={self.dropout}"
