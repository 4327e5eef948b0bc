"""Binary codes of queries and keys.

`binarize` is the only definition of a code and of its straight-through gradient. Binarizers differ in what they compare
with zero: the features themselves ("sign"), random projections of them ("random"), or hash functions ("hash"). Hash
functions are fitted so that codes agree where the attention of a pretrained model is high.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.runtime.recording import is_recorded

Codes = Literal["pm1", "01"]
CODES = ("pm1", "01")

#: Support tokens of a head's hash functions. EcoFormer has 25.
NUM_SUPPORTS = 32

# Fitted products of codes follow standardised logits up to here. Lower values follow the largest ones less closely but
# use more of the codes' range, without which the linear-angular map stays flat.
_LARGEST_TARGET = 1.0
# The root mean square of a token's projections below which it counts as zero: the gradient grows by the inverse.
_SHORTEST_TOKEN = 1e-4
# Turns after which a bit hardly gets better.
_TURNS = 10
# Added to the diagonal of the second moments, as a share of it.
_DAMPING = 1e-3


class _Binarize(Function):
    """Threshold at zero; the gradient is that of a line clipped at +-clip, which may be a tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codes: str, clip: float | Tensor) -> Tensor:
        bit = (x >= 0).to(x.dtype)
        return bit if codes == "01" else bit.mul_(2).sub_(1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.codes, clip = inputs
        ctx.clip, tensors = (None, (x, clip)) if isinstance(clip, Tensor) else (clip, (x,))
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        x, *clips = ctx.saved_tensors
        clip = clips[0] if clips else ctx.clip
        # From -clip to clip the line climbs by 2 for +-1 codes and by 1 for 0/1 codes.
        slope = (1.0 if ctx.codes == "pm1" else 0.5) / clip
        return grad * ((x.abs() <= clip) * slope).to(grad.dtype), None, None


def binarize(x: Tensor, codes: Codes = "pm1", clip: float | Tensor = 1.0) -> Tensor:
    """Binary codes of `x`: +1 where x >= 0 (either zero counts), else -1 ("pm1") or 0 ("01").

    Differentiable by a clipped straight-through estimator: the gradient is that of ``clamp(x / clip, -1, 1)`` for
    "pm1" and of ``clamp((x / clip + 1) / 2, 0, 1)`` for "01", so it vanishes where ``|x| > clip``.

    Args:
        x: any shape, any floating dtype.
        clip: where the line ends; positive, a number or a tensor that broadcasts to `x`.

    Returns:
        Codes of the shape and dtype of `x`.

    Raises:
        UserError: for codes that do not exist.
    """
    if codes not in CODES:
        raise UserError(f"codes must be one of {', '.join(CODES)}, not {codes!r}")
    # Autograd functions cannot be recorded.
    return _Binarize.forward(x, codes, clip) if is_recorded() else _Binarize.apply(x, codes, clip)


class Binarizer(nn.Module):
    """What all binarizers share: a projection whose sign is the code.

    The length of a token does not change its code. So it does not change the clipping range of the gradient either: the
    range ends at the root mean square of each token's projections.

    Args:
        head_dim: features D of a head.
        num_heads: heads H.
        codes: "pm1" for codes of -1 and +1, "01" for 0 and 1.
        code_dim: bits of a code; None for `head_dim`.

    Shapes: [B, H, N, D] to [B, H, N, code_dim].

    After `freeze_` (which sets `frozen`), codes are for inference and have no gradient.

    Raises:
        UserError: for unknown codes, or a `code_dim` that is not positive.
    """

    def __init__(self, head_dim: int, num_heads: int, codes: Codes = "pm1", code_dim: int | None = None) -> None:
        super().__init__()
        if codes not in CODES:
            raise UserError(f"codes must be one of {', '.join(CODES)}, not {codes!r}")
        code_dim = head_dim if code_dim is None else code_dim
        if code_dim < 1:
            raise UserError(f"code_dim must be a positive number of bits, not {code_dim}")
        self.codes: Codes = codes
        self.frozen = False
        self.head_dim, self.num_heads, self.code_dim = head_dim, num_heads, code_dim

    def project(self, x: Tensor) -> Tensor:  # [B, H, N, D] -> [B, H, N, code_dim]
        """The values whose signs are the code: [B, H, N, D] to [B, H, N, code_dim]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:  # [B, H, N, D] -> [B, H, N, code_dim]
        z = self.project(x)
        if self.frozen:
            return binarize(z.detach(), self.codes)
        if torch.is_grad_enabled() and z.requires_grad:
            return binarize(z, self.codes, _token_scale(z.detach()))
        return binarize(z, self.codes)

    @torch.no_grad()
    def agreement(self, q: Tensor, k: Tensor, keys: Binarizer | None = None) -> float:
        """How closely codes follow a softmax attention, from -1 to 1.

        This is the correlation along the keys between the inner products of codes and ``q k^T``, averaged over the
        queries.

        Args:
            q: queries [B, H, N, D].
            k: keys [B, H, M, D] of the same sequences.
            keys: the binarizer of the keys; None if this one is for both.

        Raises:
            UserError: if shapes do not fit each other, there are no samples, or some are NaN or infinite.
        """
        self._check_samples(q, k)
        products = self(q) @ (self if keys is None else keys)(k).transpose(-2, -1)
        return float((_standardize(products.to(torch.promote_types(q.dtype, torch.float32))) * _logits(q, k)).mean())

    def _check_samples(self, q: Tensor, k: Tensor) -> None:
        for tokens, name in ((q, "queries"), (k, "keys")):
            if tokens.dim() != 4 or tokens.shape[1::2] != (self.num_heads, self.head_dim) or not tokens.numel():
                raise UserError(
                    f"{name} must be [B, {self.num_heads}, tokens, {self.head_dim}], not {list(tokens.shape)}"
                )
            if not bool(torch.isfinite(tokens).all()):
                raise UserError(f"the {name} are not all finite")
        if len(q) != len(k):
            raise UserError(f"queries of {len(q)} sequences need keys of as many, not of {len(k)}")

    def extra_repr(self) -> str:
        return f"codes={self.codes!r}, code_dim={self.code_dim}"


def _token_scale(z: Tensor) -> Tensor:  # [..., code_dim] -> [..., 1], at least float32: half squares only up to 256
    """The root mean square of each token; 1 for those so short, like padding, that their gradient would explode."""
    scale = z.to(torch.promote_types(z.dtype, torch.float32)).square().mean(-1, keepdim=True).sqrt_()
    return torch.where(scale < _SHORTEST_TOKEN, 1, scale)


class SignBinarizer(Binarizer):
    """Plain binarization, "sign": one bit for the sign of each feature."""

    def __init__(self, head_dim: int, num_heads: int, codes: Codes = "pm1", code_dim: int | None = None) -> None:
        super().__init__(head_dim, num_heads, codes, code_dim)
        if self.code_dim != head_dim:
            raise UserError(
                f"sign codes have one bit for each of a head's {head_dim} features, not {code_dim}; binarizers "
                "'random' and 'hash' make codes of any length"
            )

    def project(self, x: Tensor) -> Tensor:
        return x


class RandomBinarizer(Binarizer):
    """Signs of random projections, "random": the share of agreeing bits estimates ``1 - angle(q, k) / pi``.

    The projections are drawn once and are not trained. Queries and keys need the same ones, hence a copy (or
    `share_codes`).

    Source: Charikar, "Similarity estimation techniques from rounding algorithms" (STOC 2002); orthogonal projections
    after Ji et al., "Super-Bit Locality-Sensitive Hashing" (NeurIPS 2012).
    """

    projection: Tensor

    def __init__(self, head_dim: int, num_heads: int, codes: Codes = "pm1", code_dim: int | None = None) -> None:
        super().__init__(head_dim, num_heads, codes, code_dim)
        self.register_buffer("projection", random_projections(num_heads, head_dim, self.code_dim))

    def project(self, x: Tensor) -> Tensor:
        return x @ self.projection


def random_projections(num_heads: int, head_dim: int, code_dim: int) -> Tensor:
    """Unit vectors [H, D, code_dim] of random directions, orthogonal in groups of D: their angles spread evenly."""
    groups = -(-code_dim // head_dim)
    orthogonal = torch.linalg.qr(torch.randn(num_heads, groups, head_dim, head_dim)).Q  # [H, groups, D, D]
    return orthogonal.transpose(1, 2).flatten(2)[..., :code_dim].contiguous()


class HashBinarizer(Binarizer):
    """Kernelised hash functions, "hash": bits are signs of ``W^T x + A^T kappa(S, x) + t``.

    ``kappa(S, x)_j = exp(-gamma |x - s_j|^2)`` are radial basis functions around support tokens S. `fit` samples S from
    the tokens of an attention layer and learns W, A and t, so that codes agree where the attention is high. All three
    are parameters and are trained further with the straight-through estimator. Before `fit`, W holds random projections
    as in `RandomBinarizer`, and A and t are zero. EcoFormer has the radial basis functions only. The linear part W
    makes this start possible and the codes better.

    A token costs ``D code_dim + NUM_SUPPORTS (D + code_dim)`` multiplications in each head.

    Source: Liu et al., EcoFormer (NeurIPS 2022), section 4; the functions and the bit-by-bit fit are those of Liu et
    al., "Supervised Hashing with Kernels" (CVPR 2012).
    """

    support: Tensor
    gamma: Tensor

    def __init__(self, head_dim: int, num_heads: int, codes: Codes = "pm1", code_dim: int | None = None) -> None:
        super().__init__(head_dim, num_heads, codes, code_dim)
        weight = torch.zeros(num_heads, head_dim + NUM_SUPPORTS + 1, self.code_dim)
        weight[:, :head_dim] = random_projections(num_heads, head_dim, self.code_dim)
        self.weight = nn.Parameter(weight)  # W, A and t, one below the other
        # For training from scratch: about tokens whose features have a variance of 1.
        self.register_buffer("support", torch.randn(num_heads, NUM_SUPPORTS, head_dim))
        self.register_buffer("gamma", torch.full((num_heads,), 0.5 / head_dim))

    def project(self, x: Tensor) -> Tensor:
        # Distances are differences of large numbers: keep them out of reduced precision.
        with torch.autocast(x.device.type, enabled=False):
            features = self.features(x)
            return (features @ self.weight.to(features.dtype)).to(x.dtype)

    def features(self, x: Tensor) -> Tensor:
        """The inputs of the hash functions, which are linear in them: ``(x, kappa(S, x), 1)``.

        Args:
            x: [B, H, N, D].

        Returns:
            [B, H, N, D + NUM_SUPPORTS + 1], at least float32.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        kernel = torch.exp(-self.gamma.to(x.dtype)[:, None, None] * _squared_distance(x, self.support.to(x.dtype)))
        return torch.cat([x, kernel, torch.ones_like(x[..., :1])], -1)

    @torch.no_grad()
    def fit(self, q: Tensor, k: Tensor, keys: HashBinarizer | None = None) -> None:
        """Learn hash functions from queries and keys of a softmax attention, in place.

        The target for the inner products of codes is the exponent of the softmax, ``q k^T``. It is clipped and brought
        to mean 0 and variance 1 for each query, because the attention map is normalised by rows as well. Bits are
        fitted one after the other, each to what the bits before it leave over. The two functions of a bit (for queries
        and keys) are fitted in turns, by regression, starting from their current values.

        EcoFormer's target is 1 for the 10 largest entries of a row, -1 for the 10 smallest and 0 between. The target
        here needs no such count, and codes follow the attention more closely.

        Args:
            q: queries of B sequences, [B, H, N, D].
            k: their keys, [B, H, M, D].
            keys: the binarizer of the keys, fitted as well; None if this one is for both.

        Raises:
            UserError: if shapes do not fit each other, there are no samples, or some are NaN or infinite.
        """
        self._check_samples(q, k)
        if keys is None:
            self._place_supports(torch.cat([q, k], 2))
        else:
            self._place_supports(q)
            keys._place_supports(k)
        key_binarizer = self if keys is None else keys
        queries, keyed = _Tokens(self.features(q)), _Tokens(key_binarizer.features(k))
        if keys is None:
            inverse_q = inverse_k = _damped_inverse(queries.moments + keyed.moments)
        else:
            inverse_q, inverse_k = _damped_inverse(queries.moments), _damped_inverse(keyed.moments)
        target = _logits(q, k).transpose(0, 1).clamp(-_LARGEST_TARGET, _LARGEST_TARGET)
        rest = (target * (self.code_dim / _LARGEST_TARGET)).contiguous()  # [H, B, N, M]
        for bit in range(self.code_dim):
            w_q, w_k = (b.weight[..., bit : bit + 1].to(rest.dtype) for b in (self, key_binarizer))  # [H, F, 1]
            best_q, best_k, most = w_q, w_k, rest.new_full((self.num_heads, 1, 1), -torch.inf)
            for _ in range(_TURNS):
                bits_q, bits_k = queries.bits(w_q), keyed.bits(w_k)
                towards_q = rest @ bits_k
                suits = (bits_q * towards_q).sum((1, 2)).unsqueeze(1)  # [H, 1, 1]
                better = suits > most
                if not better.any():
                    break
                best_q, best_k = torch.where(better, w_q, best_q), torch.where(better, w_k, best_k)
                most = torch.maximum(most, suits)
                if keys is None:
                    towards_k = rest.transpose(-2, -1) @ bits_q
                    w_q = w_k = inverse_q @ (queries.pull(towards_q) + keyed.pull(towards_k))
                else:
                    w_q = inverse_q @ queries.pull(towards_q)
                    w_k = inverse_k @ keyed.pull(rest.transpose(-2, -1) @ queries.bits(w_q))
            rest -= queries.bits(best_q) @ keyed.bits(best_k).transpose(-2, -1)
            self.weight[..., bit : bit + 1] = best_q
            key_binarizer.weight[..., bit : bit + 1] = best_k

    def _place_supports(self, tokens: Tensor) -> None:
        """Sample the support tokens from `tokens` [B, H, N, D], and set the width of the radial basis functions."""
        tokens = tokens.transpose(0, 1).flatten(1, 2).to(torch.promote_types(tokens.dtype, torch.float32))
        self.support.copy_(tokens[:, torch.randint(tokens.shape[1], (NUM_SUPPORTS,), device=tokens.device)])
        mean = _squared_distance(tokens, self.support.to(tokens.dtype)).mean((-2, -1))
        self.gamma.copy_(1 / mean.clamp(min=torch.finfo(mean.dtype).eps))


class _Tokens:
    """Queries or keys in the course of `HashBinarizer.fit`, as what hash functions are linear in."""

    def __init__(self, features: Tensor) -> None:  # [B, H, N, F]
        self._tokens = features.shape[::2]
        self._features = features.transpose(0, 1).flatten(1, 2).contiguous()  # [H, B * N, F]
        self.moments = self._features.transpose(-2, -1) @ self._features

    def bits(self, weight: Tensor) -> Tensor:  # [H, F, 1] -> [H, B, N, 1]
        return binarize(self._features @ weight).unflatten(1, self._tokens)

    def pull(self, towards: Tensor) -> Tensor:  # [H, B, N, 1] -> [H, F, 1]
        return self._features.transpose(-2, -1) @ towards.flatten(1, 2)


BINARIZERS: dict[str, type[Binarizer]] = {"sign": SignBinarizer, "random": RandomBinarizer, "hash": HashBinarizer}
"""Classes that turn queries and keys into codes, by their names in recipes."""


def make_binarizer(
    name: str, head_dim: int, num_heads: int, codes: Codes = "pm1", code_dim: int | None = None
) -> Binarizer:
    """The binarizer of this name: a module from features [B, H, N, D] to codes [B, H, N, code_dim].

    Raises:
        UserError: for an unknown name (the message lists the names), or for a length that its codes cannot have.
    """
    if name not in BINARIZERS:
        raise UserError(f"binarizer must be one of {', '.join(BINARIZERS)}, not {name!r}")
    return BINARIZERS[name](head_dim, num_heads, codes, code_dim)


def _squared_distance(x: Tensor, points: Tensor) -> Tensor:
    """[B, H, N, D] and [H, S, D] to [B, H, N, S]."""
    cross = x @ points.transpose(-2, -1)
    return (x.square().sum(-1, keepdim=True) + points.square().sum(-1).unsqueeze(-2) - 2 * cross).clamp(min=0)


def _standardize(rows: Tensor) -> Tensor:
    """Rows [..., M] brought to mean 0 and variance 1; constant ones to 0."""
    rows = rows - rows.mean(-1, keepdim=True)
    return rows / rows.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(rows.dtype).tiny)


def _logits(q: Tensor, k: Tensor) -> Tensor:
    """What the softmax of an attention exponentiates, standardised for each query: [B, H, N, M], at least float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return _standardize(q.to(dtype) @ k.to(dtype).transpose(-2, -1))


def _damped_inverse(moments: Tensor) -> Tensor:
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    damping = _DAMPING * diagonal + torch.finfo(moments.dtype).eps * diagonal.mean(-1, keepdim=True)
    return torch.linalg.inv(moments + torch.diag_embed(damping))
