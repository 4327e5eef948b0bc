"""Binary codes, their straight-through gradients, and hash functions that follow an attention."""

# Wrong arguments on purpose, and attributes of submodules, to which torch gives no types.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from shiftadd3d import UserError
from shiftadd3d.nn import BINARIZERS, HashBinarizer, RandomBinarizer, SignBinarizer, binarize, make_binarizer

quick = settings(max_examples=40, deadline=None)
codes_of = pytest.mark.parametrize(("codes", "low"), [("pm1", -1.0), ("01", 0.0)])
binarizers = pytest.mark.parametrize("name", list(BINARIZERS))


@codes_of
def test_codes_and_their_clipped_gradient(codes: str, low: float) -> None:
    x = torch.tensor([-2.0, -0.5, -0.0, 0.0, 0.5, 2.0], requires_grad=True)
    code = binarize(x, codes)
    assert code.tolist() == [low, low, 1.0, 1.0, 1.0, 1.0]
    code.sum().backward()
    slope = (1 - low) / 2
    assert x.grad.tolist() == [0.0, slope, slope, slope, slope, 0.0]


@quick
@given(
    st.sampled_from(["pm1", "01"]),
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20),
    st.floats(0.0625, 100, width=32),
)
def test_the_gradient_is_that_of_the_clipped_line(codes: str, values: list[float], clip: float) -> None:
    # At the kinks every slope between the two sides' is one.
    x = torch.tensor([value for value in values if abs(value) != clip], requires_grad=True)
    weight = torch.randn(len(x))
    code = binarize(x, codes, clip)
    assert torch.equal(code, torch.where(x >= 0, 1.0, -1.0 if codes == "pm1" else 0.0))
    (code * weight).sum().backward()
    line = x.detach().double().requires_grad_()
    clamped = (line / clip).clamp(-1, 1)
    ((clamped if codes == "pm1" else (clamped + 1) / 2) * weight).sum().backward()
    torch.testing.assert_close(x.grad.double(), line.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@binarizers
def test_codes_have_the_dtype_of_the_features(name: str, dtype: torch.dtype) -> None:
    binarizer = make_binarizer(name, 8, 2).to(dtype)
    code = binarizer(torch.randn(3, 2, 5, 8, dtype=dtype))
    assert code.dtype == dtype and code.shape == (3, 2, 5, 8) and code.abs().eq(1).all()


@quick
@given(
    st.sampled_from(["random", "hash"]), st.integers(1, 12), st.integers(1, 4), st.integers(1, 40), st.integers(0, 99)
)
def test_codes_of_any_length_are_signs_of_projections(name, head_dim, num_heads, code_dim, seed) -> None:
    torch.manual_seed(seed)
    binarizer = make_binarizer(name, head_dim, num_heads, code_dim=code_dim)
    x = torch.randn(2, num_heads, 3, head_dim)
    z = binarizer.project(x)
    assert z.shape == (2, num_heads, 3, code_dim)
    assert torch.equal(binarizer(x), torch.where(z >= 0, 1.0, -1.0))


@binarizers
@codes_of
def test_the_gradient_of_a_code_does_not_depend_on_how_long_its_token_is(name: str, codes: str, low: float) -> None:
    """By definition: the gradient of the clipped line at projections that were divided by their root mean square."""
    binarizer = make_binarizer(name, 16, 2, codes).double()
    weight = torch.randn(3, 2, 5, 16, dtype=torch.float64)
    x = torch.randn(3, 2, 5, 16, dtype=torch.float64) * 100
    by_estimator, by_hand = x.clone().requires_grad_(), x.clone().requires_grad_()
    code = binarizer(by_estimator)
    assert set(code.unique().tolist()) == {low, 1.0}
    (code * weight).sum().backward()
    z = binarizer.project(by_hand)
    line = (z / z.detach().square().mean(-1, keepdim=True).sqrt()).clamp(-1, 1)
    ((line if codes == "pm1" else (line + 1) / 2) * weight).sum().backward()
    torch.testing.assert_close(by_estimator.grad, by_hand.grad)
    assert by_hand.grad.any()


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-6])
def test_padding_has_no_gradient_that_drowns_the_others(length: float) -> None:
    x = torch.randn(2, 2, 5, 16)
    x[1, :, -2:] *= length
    x.requires_grad_()
    (SignBinarizer(16, 2)(x) * torch.randn(2, 2, 5, 16)).sum().backward()
    assert x.grad.abs().max() < 5


@binarizers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_are_the_same_with_and_without_a_gradient(name: str, dtype: torch.dtype) -> None:
    binarizer = make_binarizer(name, 8, 1).to(dtype)
    x = torch.randn(1, 1, 40, 8, dtype=dtype) * torch.logspace(-6, 4, 40).unsqueeze(-1).to(dtype)
    x[..., 3] *= 1e-3  # far from the others, where a scaled one would round to zero
    with torch.no_grad():
        codes = binarizer(x)
    assert torch.equal(binarizer(x.clone().requires_grad_()).detach(), codes)


def test_the_share_of_agreeing_random_bits_estimates_the_angle() -> None:
    """The property that SimHash is named for: P(bits agree) = 1 - angle / pi."""
    binarizer = RandomBinarizer(16, 1, code_dim=20_000)
    q, k = torch.randn(1, 1, 6, 16), torch.randn(1, 1, 6, 16)
    agreeing = (binarizer(q) == binarizer(k)).float().mean(-1)
    angle = torch.arccos(torch.cosine_similarity(q, k, dim=-1))
    torch.testing.assert_close(agreeing, 1 - angle / math.pi, rtol=0, atol=0.02)


def test_random_projections_are_orthogonal_in_groups_and_no_parameters() -> None:
    binarizer = RandomBinarizer(8, 2, code_dim=20)
    assert not list(binarizer.parameters()) and list(binarizer.state_dict()) == ["projection"]
    for group in binarizer.projection.split(8, -1):
        torch.testing.assert_close(group.mT @ group, torch.eye(group.shape[-1]).expand(2, -1, -1), rtol=0, atol=1e-5)


def test_hash_functions_that_are_not_fitted_are_random_projections() -> None:
    torch.manual_seed(1)
    random = RandomBinarizer(16, 2, code_dim=40)
    torch.manual_seed(1)
    hashed = HashBinarizer(16, 2, code_dim=40)
    for scale in (1e-3, 1.0, 1e3):
        x = torch.randn(2, 2, 9, 16) * scale
        assert torch.equal(hashed(x), random(x))


def test_hash_functions_are_the_kernel_expansion_they_are_said_to_be() -> None:
    binarizer = HashBinarizer(6, 2, code_dim=5).double()
    nn.init.normal_(binarizer.weight)
    x = torch.randn(2, 2, 4, 6, dtype=torch.float64)
    linear, kernel, threshold = binarizer.weight.split([6, binarizer.support.shape[1], 1], 1)
    for h in range(2):
        distance = torch.cdist(x[:, h], binarizer.support[h].expand(2, -1, -1))
        kappa = torch.exp(-binarizer.gamma[h] * distance.square())
        expected = x[:, h] @ linear[h] + kappa @ kernel[h] + threshold[h]
        torch.testing.assert_close(binarizer.project(x)[:, h], expected)


def test_hash_functions_train() -> None:
    binarizer = HashBinarizer(8, 2, code_dim=4)
    binarizer(torch.randn(3, 2, 5, 8)).sum().backward()
    used = binarizer.weight.grad.abs().sum((0, 2)) > 0
    assert used.all()


def attention_samples(sequences: int, *, head_dim: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of two heads that project clustered tokens differently, as a trained attention does."""
    fixed = torch.Generator().manual_seed(7)
    centres = torch.randn(10, 24, generator=fixed)
    to_q, to_k = (torch.randn(2, 24, head_dim, generator=fixed) / 24**0.5 for _ in range(2))
    mean = torch.randn(2, 1, head_dim, generator=fixed)
    noise = torch.Generator().manual_seed(seed)
    kind = torch.randint(10, (sequences, 1, 20), generator=noise)
    tokens = centres[kind] + 0.5 * torch.randn(sequences, 1, 20, 24, generator=noise)
    return tokens @ to_q + mean, tokens @ to_k


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("codes", ["pm1", "01"])
def test_fitted_codes_follow_the_attention_on_sequences_not_seen(codes: str, share: bool) -> None:
    q, k = attention_samples(32)
    unseen = attention_samples(16, seed=1)
    binarizer = HashBinarizer(16, 2, codes, code_dim=16)
    keys = None if share else copy.deepcopy(binarizer)
    before = binarizer.agreement(*unseen, keys)
    binarizer.fit(q, k, keys)
    after = binarizer.agreement(*unseen, keys)
    sign = SignBinarizer(16, 2, codes).agreement(*unseen)
    assert before < 0.6  # there was something to learn
    assert after > max(before, sign) + (0.1 if share else 0.2)
    assert after > (0.6 if share else 0.7)


def test_agreement_is_the_correlation_it_is_said_to_be() -> None:
    q, k = attention_samples(2)
    binarizer = SignBinarizer(16, 2)
    correlations = [
        torch.corrcoef(torch.stack([q[b, h, i] @ k[b, h].T, binarizer(q)[b, h, i] @ binarizer(k)[b, h].T]))[0, 1]
        for b in range(2)
        for h in range(2)
        for i in range(20)
    ]
    assert binarizer.agreement(q, k) == pytest.approx(float(torch.stack(correlations).mean()), abs=1e-5)


def test_a_fit_keeps_device_dtype_and_what_is_a_parameter() -> None:
    q, k = attention_samples(4)
    for dtype in (torch.bfloat16, torch.float64):
        binarizer = HashBinarizer(16, 2, code_dim=4).to(dtype)
        binarizer.fit(q.to(dtype), k.to(dtype))
        assert {tensor.dtype for tensor in binarizer.state_dict().values()} == {dtype}
        assert [name for name, _ in binarizer.named_parameters()] == ["weight"]
        assert torch.isfinite(binarizer.weight).all() and binarizer.weight.requires_grad


@pytest.mark.parametrize("tokens", [torch.zeros(2, 2, 5, 16), torch.ones(2, 2, 5, 16), torch.randn(1, 2, 1, 16)])
def test_tokens_that_say_nothing_do_no_harm(tokens: torch.Tensor) -> None:
    binarizer = HashBinarizer(16, 2, code_dim=4)
    binarizer.fit(tokens, tokens)
    assert torch.isfinite(binarizer.weight).all() and torch.isfinite(binarizer.gamma).all()
    assert math.isfinite(binarizer.agreement(tokens, tokens))


@binarizers
def test_binarizers_come_back_from_a_file_and_can_be_copied(name: str, tmp_path) -> None:
    q, k = attention_samples(4)
    binarizer = make_binarizer(name, 16, 2)
    if name == "hash":
        binarizer.fit(q, k)
    expected = binarizer(q)
    save_file(binarizer.state_dict(), tmp_path / "binarizer.safetensors")
    other = make_binarizer(name, 16, 2)
    other.load_state_dict(load_file(tmp_path / "binarizer.safetensors"))
    assert torch.equal(other(q), expected) and torch.equal(copy.deepcopy(binarizer)(q), expected)


def test_hash_codes_are_the_same_under_autocast() -> None:
    """Distances to support tokens are differences of large numbers: bfloat16 would get them wrong."""
    q, k = attention_samples(8)
    binarizer = HashBinarizer(16, 2)
    binarizer.fit(q, k)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(binarizer(q), binarizer(q.float()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_binarizer("hsh", 8, 2), "sign, random, hash"),
        (lambda: make_binarizer("hash", 8, 2, "pm"), "pm1, 01"),
        (lambda: make_binarizer("sign", 8, 2, code_dim=4), "one bit for each of a head's 8 features, not 4"),
        (lambda: make_binarizer("random", 8, 2, code_dim=0), "positive number of bits, not 0"),
        (lambda: binarize(torch.ones(1), "0/1"), "pm1, 01"),
        (
            lambda: HashBinarizer(8, 2).fit(torch.randn(3, 1, 5, 8), torch.randn(3, 2, 5, 8)),
            r"queries.*\[B, 2, tokens, 8",
        ),
        (
            lambda: HashBinarizer(8, 2).fit(torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 4)),
            r"keys.*not \[3, 2, 5, 4\]",
        ),
        (lambda: HashBinarizer(8, 2).fit(torch.randn(0, 2, 5, 8), torch.randn(0, 2, 5, 8)), "queries"),
        (lambda: HashBinarizer(8, 2).fit(torch.randn(3, 2, 5, 8), torch.randn(2, 2, 5, 8)), "3 sequences.*of 2"),
        (
            lambda: HashBinarizer(8, 2).fit(torch.randn(1, 2, 5, 8), torch.full((1, 2, 5, 8), math.nan)),
            "keys are not all finite",
        ),
    ],
)
def test_wrong_arguments_name_what_would_be_right(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
