"""Attention over binary queries and keys: every product with a code is an addition.

The similarity is the linear-angular one: the angular kernel ``1 - angle(q, k) / pi`` to first order, ``1/2 + cos(q, k)
/ pi``. It needs no softmax. So keys and values can be multiplied first, ``q (k^T v)``, at a cost that is linear in the
number of tokens. With codes of length D, ``cos(q, k)`` is ``q . k / D``: a count of agreeing bits.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.2; You et al., Castling-ViT (CVPR 2023), for the
linear-angular similarity and the depthwise convolution on the values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.ops.depthwise import depthwise_conv
from shiftadd3d.kernels.ops.matadd import add_attention
from shiftadd3d.kernels.reference import linear_angular
from shiftadd3d.kernels.runtime.numerics import uses_kernels
from shiftadd3d.nn.attachments import has_hooks
from shiftadd3d.nn.binarize import Codes, make_binarizer
from shiftadd3d.nn.shift import JointLayers, joint_layers
from shiftadd3d.nn.tracing import one_node

if TYPE_CHECKING:
    from typing_extensions import Self

Order = Literal["auto", "linear", "quadratic"]
ORDERS = ("auto", "linear", "quadratic")


def linear_add_attention(
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, H, M, D]
    v: Tensor,  # [B, H, M, E]
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    order: Order = "auto",
    dropout_p: float = 0.0,
) -> Tensor:  # [B, H, N, E]
    """Linear-angular attention of binary codes.

    ``out_i = sum_j s_ij v_j / sum_j s_ij`` with ``s_ij = 1/2 + q_i . k_j / (pi D)``. For codes of -1 and +1,
    similarities are between 0.18 and 0.82; for codes of 0 and 1, between 0.5 and 0.82. So each row is a distribution
    over keys. Class tokens are treated like all others. N and M may differ.

    Args:
        q: codes of the queries (see `binarize`), [B, H, N, D], in the dtype of `v`.
        k: codes of the keys, [B, H, M, D].
        v: values, [B, H, M, E].
        mask: bool, True where a key counts: [B, M], or [.., .., 1 or N, M] that broadcasts to [B, H, N, M]. A query
            without any key gives zeros. A mask that depends on the query needs the quadratic order.
        bias: added to the similarities, for instance a relative position bias: ``s_ij = max(0, 1/2 + q_i . k_j / (pi D)
            + b_ij)``. It broadcasts to [B, H, N, M]. Minus infinity leaves a key out. It needs the quadratic order.
        order: "linear" for ``q (k^T v)``, "quadratic" for ``(q k^T) v``, "auto" for the one with fewer additions.
            Results differ by rounding only.
        dropout_p: probability with which an entry of the attention map is dropped, as in softmax attention. The other
            entries are scaled up to make up for it. Only the quadratic order has a map.

    Returns:
        [B, H, N, E].

    Raises:
        UserError: for an unknown order, or for the linear order with something that needs the quadratic one.
    """
    mask, bias = broadcastable_mask(mask), _checked_bias(bias)
    order = _choose_order(order, q, k, v, mask, bias, dropout_p)
    if order == "quadratic":
        return F.dropout(linear_angular.attention_map(q, k, mask, bias), dropout_p) @ v
    return linear_angular.attend(q, k, v, None if mask is None else mask.transpose(-2, -1))


def first_query_weights(q: Tensor, k: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The attention weights of the first query only.

    Args:
        q: codes [B, H, N, D]. Only the first query is read.
        k: codes [B, H, M, D].
        mask: as in `linear_add_attention`.
        bias: as in `linear_add_attention`.

    Returns:
        [B, H, M]: the first row of the map that `linear_add_attention` applies. It sums to 1 if any key counts.
    """
    return linear_angular.first_row(q, k, broadcastable_mask(mask), _checked_bias(bias))


def broadcastable_mask(mask: Tensor | None) -> Tensor | None:
    """A mask over keys [B, M] as [B, 1, 1, M]. A mask of 4 dimensions is returned as it is."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise UserError(f"the attention mask must be bool (True where a key counts), not {mask.dtype}")
    if mask.dim() not in (2, 4):
        raise UserError(f"the attention mask must have 2 dimensions [B, M] or 4, not {mask.dim()}")
    return mask[:, None, None] if mask.dim() == 2 else mask


def _checked_bias(bias: Tensor | None) -> Tensor | None:
    if bias is not None and (bias.dim() < 2 or not bias.is_floating_point()):
        raise UserError(
            f"the attention bias must hold floats and have at least 2 dimensions [N, M], not {bias.dtype} and "
            f"{bias.dim()}; to leave keys out, give a mask"
        )
    return bias


def _choose_order(
    order: Order, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, dropout_p: float
) -> Order:
    if order not in ORDERS:
        raise UserError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
    for present, what in (
        (mask is not None and mask.shape[-2] != 1, "a mask for each query"),
        (bias is not None, "an attention bias"),
        (dropout_p > 0, "dropout in the attention map"),
    ):
        if present and order == "linear":
            raise UserError(f"the linear order sums over the keys once for all queries: {what} needs 'quadratic'")
        if present:
            return "quadratic"
    if order != "auto":
        return order
    queries, keys, code, value = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    return "linear" if (queries + keys) * code * value <= queries * keys * (code + value) else "quadratic"


class TokenConv(nn.Module):
    """Depthwise convolution of the values along the tokens of a sequence, with one kernel for each head.

    It restores the local detail that the nearly flat linear-angular map averages away. Its weights start at zero, so a
    layer that replaces another one first does what its attention does.

    Args:
        num_heads: number of kernels.
        kernel_size: number of tokens, odd.

    Raises:
        UserError: for a size that is even or not positive.
    """

    def __init__(self, num_heads: int, kernel_size: int) -> None:
        super().__init__()
        self.num_heads, self.kernel_size = num_heads, _checked_kernel_size(kernel_size)
        self.weight = nn.Parameter(torch.zeros(num_heads, 1, kernel_size, 1))

    def forward(self, v: Tensor) -> Tensor:  # [B, H, N, E] -> [B, H, N, E]
        if isinstance(v, Proxy):
            return one_node(self, v)
        return F.conv2d(v, self.weight, padding=(self.kernel_size // 2, 0), groups=self.num_heads)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}"


class TokenConv2d(nn.Module):
    """Depthwise convolution of the values over the grid of an image's tokens, with one kernel for each channel.

    This is `TokenConv` for images, and its weights start at zero as well. Class and register tokens are not on the
    grid: they get zeros, and they are no token's neighbours.

    After `freeze_` (which sets `frozen`), it runs as a kernel where possible (see `shiftadd3d.kernels`).

    Args:
        channels: H * E, the channels of all heads together.
        kernel_size: number of tokens along each side, odd.
        num_prefix_tokens: class and register tokens before the grid.
        grid: height and width in tokens; None for a square of any size.

    Raises:
        UserError: for a size that is even or not positive.
    """

    def __init__(
        self, channels: int, kernel_size: int, num_prefix_tokens: int = 0, grid: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.channels, self.kernel_size = channels, _checked_kernel_size(kernel_size)
        self.num_prefix_tokens, self.grid = num_prefix_tokens, grid
        self.frozen = False
        self.weight = nn.Parameter(torch.zeros(channels, 1, kernel_size, kernel_size))

    def forward(self, v: Tensor, grid: tuple[int, int] | None = None, addend: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            v: [B, H, prefix + h * w, E], the grid row by row.
            grid: (h, w), if it differs from that of the constructor.
            addend: is added to the outcome and has its shape.

        Returns:
            The shape of `v`.

        Raises:
            UserError: if the number of tokens does not fit the grid.
        """
        if isinstance(v, Proxy):
            return one_node(self, v, grid, addend)
        prefix, tokens = self.num_prefix_tokens, v.shape[-2] - self.num_prefix_tokens
        height, width = grid or self.grid or (math.isqrt(max(tokens, 0)),) * 2
        if height * width != tokens:
            raise UserError(
                f"{v.shape[-2]} tokens are not {prefix} prefix tokens and a grid of {height} x {width}; the "
                "convolution on the values must be given a grid that is not square"
            )
        if self.frozen and uses_kernels("depthwise_conv", v):
            added = None if addend is None else _join_heads(addend)
            out = depthwise_conv(_join_heads(v), self.weight, None, height, width, addend=added)
            return out.view(*out.shape[:-1], v.shape[1], v.shape[-1]).transpose(1, 2)
        image = v[:, :, prefix:].transpose(-2, -1).reshape(v.shape[0], self.channels, height, width)  # [B, H * E, h, w]
        image = F.conv2d(image, self.weight, padding=self.kernel_size // 2, groups=self.channels)
        out = image.unflatten(1, (v.shape[1], -1)).flatten(-2).transpose(-2, -1)
        out = F.pad(out, (0, 0, prefix, 0)) if prefix else out
        return out if addend is None else addend + out

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, kernel_size={self.kernel_size}, num_prefix_tokens={self.num_prefix_tokens}, "
            f"grid={self.grid}"
        )


def _repack_what_was_loaded(attention: nn.Module, _: object) -> None:
    assert isinstance(attention, AddAttention)
    attention.repack()


def _join_heads(x: Tensor) -> Tensor:  # [B, H, N, E] -> [B, N, H * E]
    return x.transpose(1, 2).flatten(-2)


def _checked_kernel_size(kernel_size: int) -> int:
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise UserError(
            f"the kernel size of the convolution on the values must be odd and positive, not {kernel_size!r}"
        )
    return kernel_size


def flat_attention(v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The outputs for queries that are equally similar to all keys: [B, H, N, E], or [B, H, 1, E] if all queries get
    the same.

    Args:
        v: values [B, H, M, E].
        mask, bias: as in `linear_add_attention`.
    """
    if mask is None and bias is None:
        return v.mean(-2, keepdim=True)
    rows = max(1 if given is None else given.shape[-2] for given in (mask, bias))
    queries, keys = (v.new_zeros(*v.shape[:2], tokens, 1) for tokens in (rows, v.shape[-2]))
    return linear_add_attention(queries, keys, v, mask=mask, bias=bias)


class AddAttention(nn.Module):
    """Multi-head attention whose products with queries and keys are additions.

    Args:
        dim: token width C.
        num_heads: must divide `dim`, unless `head_dim` is given.
        qkv_bias: add biases to the query, key and value projections.
        out_bias: add a bias to the output projection.
        binarizer: how queries and keys become codes, a name in `BINARIZERS`.
        codes: "pm1" for codes of -1 and +1, "01" for 0 and 1.
        dwconv: kernel size of the convolution on the values along the sequence, 0 for none. Or a module from values [B,
            H, N, D] to the same shape, for tokens in another arrangement (`TokenConv2d`).
        order: see `linear_add_attention`.
        dropout: probability for the output.
        attn_dropout: probability for the entries of the attention map in training. It needs the quadratic order.
        head_dim: width D of a head; None for ``dim / num_heads``.
        context_dim: token width of the context in cross attention; None for `dim`.
        code_dim: bits of a code; None for `head_dim`.
        share_codes: use one binarizer for queries and keys. If not, each has its own, and they start alike.
        contrast: start value of a factor for each head, learned as `log_contrast`, which scales how much outputs differ
            from the mean of the values. It is needed because the linear-angular map weighs no key more than 4.5 times
            as much as another one. Rows of the map still sum to one, but weights may become negative for factors above
            1. None leaves the map as it is.

    Shapes: x [B, N, C] to [B, N, C]. The projections are `q_fc`, `k_fc`, `v_fc`, `out_fc`.

    Raises:
        UserError: for sizes that do not fit each other, or an unknown binarizer, code or order.
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
        attn_dropout: float = 0.0,
        *,
        head_dim: int | None = None,
        context_dim: int | None = None,
        code_dim: int | None = None,
        share_codes: bool = False,
        contrast: float | None = None,
    ) -> None:
        super().__init__()
        if contrast is not None and not 0.0 < contrast < math.inf:
            raise UserError(f"contrast must be a positive number, not {contrast}")
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise UserError(f"num_heads must divide dim; {num_heads} does not divide {dim}")
        if order not in ORDERS:
            raise UserError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
        if attn_dropout > 0 and order == "linear":
            raise UserError("dropout in the attention map needs the quadratic order: order 'auto' or 'quadratic'")
        self.num_heads, self.dropout, self.attn_dropout = num_heads, dropout, attn_dropout
        self.order: Order = order
        head_dim = dim // num_heads if head_dim is None else head_dim
        context_dim = dim if context_dim is None else context_dim
        self.q_fc = nn.Linear(dim, num_heads * head_dim, bias=qkv_bias)
        self.k_fc = nn.Linear(context_dim, num_heads * head_dim, bias=qkv_bias)
        self.v_fc = nn.Linear(context_dim, num_heads * head_dim, bias=qkv_bias)
        self.out_fc = nn.Linear(num_heads * head_dim, dim, bias=out_bias)
        self.q_code = make_binarizer(binarizer, head_dim, num_heads, codes, code_dim)
        # A copy: random functions tell how similar queries and keys are only if they are the same ones for both.
        self.k_code = None if share_codes else copy.deepcopy(self.q_code)
        if isinstance(dwconv, nn.Module):
            self.dwconv: nn.Module | None = dwconv
        else:
            self.dwconv = TokenConv(num_heads, dwconv) if dwconv else None
        self.log_contrast = None if contrast is None else nn.Parameter(torch.full((num_heads,), math.log(contrast)))
        self.joint: JointLayers | None = None

    @classmethod
    def from_projections(
        cls,
        q_fc: nn.Module,
        k_fc: nn.Module,
        v_fc: nn.Module,
        out_fc: nn.Module,
        num_heads: int,
        **kwargs,
    ) -> Self:
        """An attention layer with the given projections: the same modules, not copies.

        The four are `nn.Linear` or other modules with `in_features` and `out_features`. Device, dtype and training flag
        are those of `q_fc`. `kwargs` go to the constructor.

        Raises:
            UserError: if the projections do not fit each other.
        """
        q, k, v, out = (cast(nn.Linear, fc) for fc in (q_fc, k_fc, v_fc, out_fc))
        if q.out_features != k.out_features or q.out_features % num_heads or v.out_features % num_heads:
            raise UserError(
                f"queries and keys must be equally wide and {num_heads} heads must divide them and the values; their "
                f"widths are {q.out_features}, {k.out_features} and {v.out_features}"
            )
        if k.in_features != v.in_features:
            raise UserError(
                "the projections of keys and values must have the same inputs, not of widths "
                f"{k.in_features} and {v.in_features}"
            )
        if out.in_features != v.out_features:
            raise UserError(f"the output projection must have {v.out_features} inputs, not {out.in_features}")
        layer = cls(
            q.in_features,
            num_heads,
            head_dim=q.out_features // num_heads,
            context_dim=k.in_features,
            **kwargs,
        )
        example = next(q_fc.parameters(), None)
        if example is not None:
            layer = layer.to(example)
        layer.train(q_fc.training)  # before the projections come in: they keep their own flags
        layer.q_fc, layer.k_fc, layer.v_fc, layer.out_fc = q_fc, k_fc, v_fc, out_fc
        return layer

    def forward(
        self,
        x: Tensor,
        return_weights: bool = False,
        mask: Tensor | None = None,
        *,
        context: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend within each sequence, or from it to a context.

        Args:
            x: [B, N, C].
            return_weights: also return the attention weights of the first token, [B, M]: the first row of the attention
                map, averaged over the heads. GNT uses them as the volume rendering weights of a ray.
            mask: bool [B, M], True where a token may be attended to; or one mask for each query, [.., .., N, M].
            context: tokens [B, M, context_dim] to attend to; None for x itself.
            bias: added to the similarities, see `linear_add_attention`.

        Returns:
            [B, N, C], or that and the weights [B, M].

        Raises:
            UserError: for a context in a layer with a convolution on the values, which needs values at the places of
                the queries.
        """
        if isinstance(x, Proxy):
            return one_node(self, x, return_weights, mask, context=context, bias=bias)
        if context is not None and self.dwconv is not None:
            raise UserError("cross attention has no convolution on the values: make the layer with dwconv=0")
        context = x if context is None else context
        q, k, v = self.project(x, context)
        out, weights = self.attend(q, k, v, mask, bias, return_weights)
        out = _join_heads(self.add_convolution(out, v))
        out = F.dropout(self.out_fc(out), self.dropout, self.training)
        return out if weights is None else (out, weights)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, N, D] of x [B, N, C], and keys and values [B, H, M, D] of a context [B, M, context_dim]."""
        if x is context:
            q, k, v = self._products((self.q_fc, self.k_fc, self.v_fc), x)
        else:
            q, (k, v) = self.q_fc(x), self._products((self.k_fc, self.v_fc), context)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def _products(self, layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
        joint = self.joint
        if joint is not None and uses_kernels("matshift", x) and joint.stands_for(layers):
            return joint.products(x, len(layers))
        return tuple(layer(x) for layer in layers)

    def repack(self) -> None:
        """Combine the codes of packed projections.

        `freeze_` and loading do this. Call it after changing codes in place.
        """
        was_packed = self.joint is not None
        self.joint = joint_layers(self.q_fc, self.k_fc, self.v_fc) or joint_layers(self.k_fc, self.v_fc)
        if self.joint is not None:
            self.joint.train(
                self.training
            )  # in training it would have whatever holds this attention do without kernels
        if self.joint is not None and not was_packed:
            self.register_load_state_dict_post_hook(_repack_what_was_loaded)

    def add_convolution(self, out: Tensor, v: Tensor) -> Tensor:
        """The outputs of the heads, plus the convolution on the values if there is one. All are [B, H, N, D]."""
        if self.dwconv is None:
            return out
        return self.dwconv(v, addend=out) if isinstance(self.dwconv, TokenConv2d) else out + self.dwconv(v)

    def split_heads(self, x: Tensor) -> Tensor:  # [B, N, H * D] -> [B, H, N, D]
        """The heads of a projection: [B, N, H * D] to [B, H, N, D]."""
        return x.view(*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads).transpose(1, 2)

    def attend(
        self,
        q: Tensor,  # [B, H, N, D]
        k: Tensor,  # [B, H, M, D]
        v: Tensor,  # [B, H, M, E]
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """From projected queries, keys and values to the outputs of the heads [B, H, N, E], before the output
        projection.

        Derived classes call it in place of `F.scaled_dot_product_attention`. The second value is the attention of the
        first query [B, M]. It is None unless asked for.
        """
        key_binarizer = self.q_code if self.k_code is None else self.k_code
        mask = broadcastable_mask(mask)
        if (
            self.q_code.frozen
            and not self.training
            and self.order != "quadratic"
            and not return_weights
            and bias is None
            and (mask is None or mask.shape[-2] == 1)
            and uses_kernels("add_attention", q, k, v)
            and not has_hooks(self.q_code, key_binarizer)
        ):
            # Signs are taken in the kernel.
            key_mask = None if mask is None else mask.squeeze(-2)
            contrast = None if self.log_contrast is None else self.log_contrast.exp()
            features = self.q_code.project(q), key_binarizer.project(k)
            return add_attention(*features, v, key_mask, self.q_code.codes, contrast=contrast), None
        q_code, k_code = self.q_code(q).to(v.dtype), key_binarizer(k).to(v.dtype)
        dropout_p = self.attn_dropout if self.training else 0.0
        out = linear_add_attention(q_code, k_code, v, mask=mask, bias=bias, order=self.order, dropout_p=dropout_p)
        weights = first_query_weights(q_code, k_code, mask, bias) if return_weights else None
        if weights is not None and self.log_contrast is not None:
            flat = first_query_weights(torch.zeros_like(q_code), k_code, mask, bias)
            weights = torch.lerp(flat, weights, self.log_contrast.exp().to(flat.dtype)[:, None])
        return self._add_contrast(out, v, mask, bias), None if weights is None else weights.mean(1)

    def _add_contrast(self, out: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        """Move the outputs of the heads away from the outputs of equal attention to all keys."""
        if self.log_contrast is None:
            return out
        flat = flat_attention(v, mask, bias)
        return torch.lerp(flat, out, self.log_contrast.exp().to(out.dtype)[:, None, None])

    def extra_repr(self) -> str:
        text = f"num_heads={self.num_heads}, order={self.order!r}, dropout={self.dropout}"
        return f"{text}, attn_dropout={self.attn_dropout}" if self.attn_dropout else text
