"""Attention over binary codes against its definition in float64."""

# Wrong arguments on purpose, and attributes of submodules, to which torch gives no types.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportOperatorIssue=false, reportIndexIssue=false, reportOptionalOperand=false

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shiftadd3d import UserError, kernels
from shiftadd3d.nn import (
    BINARIZERS,
    AddAttention,
    ShiftLinear,
    TokenConv,
    TokenConv2d,
    binarize,
    first_query_weights,
    freeze_,
    linear_add_attention,
)

quick = settings(max_examples=40, deadline=None)


def brute_force(q, k, v, mask=None, bias=None):
    """Similarity of every pair, one by one, and the map itself."""
    q, k, v = q.double(), k.double(), v.double()
    similarity = 0.5 + torch.einsum("bhnd,bhmd->bhnm", q, k) / (math.pi * q.shape[-1])
    if bias is not None:
        similarity = (similarity + bias).clamp(min=0)
    if mask is not None:
        similarity = similarity * mask
    total = similarity.sum(-1, keepdim=True)
    attention = torch.where(total > 0, similarity / total, 0.0)
    return torch.einsum("bhnm,bhme->bhne", attention, v), attention


def random_codes(codes: str, *shape: int) -> torch.Tensor:
    return binarize(torch.randn(shape), codes)


@quick
@given(
    st.sampled_from(["pm1", "01"]),
    st.sampled_from(["auto", "linear", "quadratic"]),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 24),
    st.integers(1, 24),
    st.sampled_from(["none", "keys", "keys4", "heads", "sequences"]),
    st.integers(0, 1000),
)
def test_both_orders_equal_brute_force(codes, order, heads, queries, keys, code, value, masking, seed) -> None:
    torch.manual_seed(seed)
    q, k = random_codes(codes, 2, heads, queries, code), random_codes(codes, 2, heads, keys, code)
    v = torch.randn(2, heads, keys, value)
    shapes = {"keys": (2, keys), "keys4": (2, 1, 1, keys), "heads": (2, heads, 1, keys), "sequences": (2, 1, 1, 1)}
    shape = shapes.get(masking)
    mask = None if shape is None else torch.rand(shape) < 0.6
    full = mask[:, None, None] if masking == "keys" else mask
    expected, attention = brute_force(q, k, v, full)
    out = linear_add_attention(q, k, v, mask=mask, order=order)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    first = first_query_weights(q, k, mask)
    torch.testing.assert_close(first.double(), attention[:, :, 0], rtol=1e-5, atol=1e-6)


@quick
@given(
    st.sampled_from(["pm1", "01"]),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from(["pairs", "heads", "all", "keys"]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_a_bias_is_added_to_the_similarities(codes, heads, queries, keys, shape, masked, seed) -> None:
    torch.manual_seed(seed)
    q, k = random_codes(codes, 2, heads, queries, 8), random_codes(codes, 2, heads, keys, 8)
    v = torch.randn(2, heads, keys, 5)
    bias = torch.randn(
        {
            "pairs": (queries, keys),
            "heads": (heads, queries, keys),
            "all": (2, heads, queries, keys),
            "keys": (1, 1, 1, keys),
        }[shape]
    )
    mask = torch.rand(2, keys) < 0.7 if masked else None
    expected, attention = brute_force(q, k, v, None if mask is None else mask[:, None, None], bias)
    # Where similarities about cancel, what is left over is rounding.
    torch.testing.assert_close(
        linear_add_attention(q, k, v, mask=mask, bias=bias).double(), expected, rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(first_query_weights(q, k, mask, bias).double(), attention[:, :, 0], rtol=1e-3, atol=1e-3)


def test_a_bias_of_minus_infinity_is_a_mask_and_has_no_gradient_there() -> None:
    q, k, v = random_codes("pm1", 1, 2, 6, 8), random_codes("pm1", 1, 2, 6, 8), torch.randn(1, 2, 6, 4)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    bias = torch.zeros(6, 6).masked_fill(~causal, -torch.inf).requires_grad_()
    out = linear_add_attention(q, k, v, bias=bias)
    torch.testing.assert_close(out, linear_add_attention(q, k, v, mask=causal[None, None]))
    out.square().sum().backward()
    assert torch.isfinite(bias.grad).all() and not bias.grad[~causal].any() and bias.grad[causal].any()


def test_the_linear_order_refuses_what_needs_the_map() -> None:
    q, k, v = random_codes("pm1", 1, 2, 6, 8), random_codes("pm1", 1, 2, 6, 8), torch.randn(1, 2, 6, 4)
    for options, what in (
        ({"bias": torch.zeros(6, 6)}, "an attention bias"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)}, "a mask for each query"),
    ):
        with pytest.raises(UserError, match=f"{what}.* needs 'quadratic'"):
            linear_add_attention(q, k, v, order="linear", **options)


def test_dropout_drops_entries_of_the_map_and_keeps_the_mean() -> None:
    q, k = random_codes("pm1", 1, 2, 3, 8), random_codes("pm1", 1, 2, 40, 8)
    v = torch.eye(40).expand(1, 2, 40, 40)  # the output is the map
    whole = linear_add_attention(q, k, v)
    dropped = torch.stack([linear_add_attention(q, k, v, dropout_p=0.25) for _ in range(400)])
    kept = dropped > 0
    torch.testing.assert_close(dropped[kept], (whole / 0.75).expand_as(dropped)[kept])
    assert abs(kept.float().mean() - 0.75) < 0.01
    layer = AddAttention(16, 2, attn_dropout=0.5)
    x = torch.randn(2, 30, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_the_two_orders_have_the_same_gradients() -> None:
    grads = []
    for order in ("linear", "quadratic"):
        torch.manual_seed(1)
        q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (7, 11, 11))
        linear_add_attention(binarize(q), binarize(k), v, order=order).square().sum().backward()
        grads.append((q.grad, k.grad, v.grad))
    for linear, quadratic in zip(*grads, strict=True):
        torch.testing.assert_close(linear, quadratic)


def test_a_mask_per_query_takes_the_quadratic_order() -> None:
    q, k = (random_codes("pm1", 1, 2, 6, 8).double() for _ in range(2))
    v = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(linear_add_attention(q, k, v, mask=causal), brute_force(q, k, v, causal)[0])
    with pytest.raises(UserError, match="quadratic"):
        linear_add_attention(q, k, v, mask=causal, order="linear")


def test_a_query_without_keys_gives_zeros() -> None:
    q, k, v = random_codes("pm1", 2, 1, 3, 8), random_codes("pm1", 2, 1, 5, 8), torch.randn(2, 1, 5, 4)
    mask = torch.tensor([[True] * 5, [False] * 5])
    for order in ("linear", "quadratic"):
        out = linear_add_attention(q, k, v, mask=mask, order=order)
        assert (out[1] == 0).all() and torch.isfinite(out).all()
    assert (first_query_weights(q, k, mask)[1] == 0).all()


@pytest.mark.parametrize("codes", ["pm1", "01"])
def test_the_first_row_is_a_proper_distribution(codes: str) -> None:
    q, k = random_codes(codes, 4, 2, 192, 16), random_codes(codes, 4, 2, 192, 16)
    weights = first_query_weights(q, k)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2))


def test_only_additions_touch_the_codes() -> None:
    """With codes of 0 and 1, ``q (k^T v)`` is sums of values that the codes select: integers stay exact integers."""
    q, k = random_codes("01", 1, 1, 5, 8), random_codes("01", 1, 1, 9, 8)
    v = torch.randint(-50, 50, (1, 1, 9, 3)).float()
    key_values = k.transpose(-2, -1) @ v
    by_selection = torch.stack([v[0, 0][k[0, 0, :, d] == 1].sum(0) for d in range(8)])
    assert torch.equal(key_values[0, 0], by_selection)
    assert torch.equal((q @ key_values)[0, 0], torch.stack([by_selection[row == 1].sum(0) for row in q[0, 0]]))


def layer_by_hand(layer: AddAttention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    def heads(t):
        return t.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)

    q, k, v = heads(layer.q_fc(x)), heads(layer.k_fc(x)), heads(layer.v_fc(x))
    out, attention = brute_force((q >= 0) * 2.0 - 1, (k >= 0) * 2.0 - 1, v)
    if layer.dwconv is not None:
        size = layer.dwconv.kernel_size
        padded = torch.nn.functional.pad(v.double(), (0, 0, size // 2, size // 2))
        for i in range(size):
            tap = layer.dwconv.weight[:, 0, i].view(1, -1, 1, 1)
            out = out + padded[:, :, i : i + v.shape[2]] * tap
    return layer.out_fc(out.transpose(1, 2).flatten(-2).float()), attention.mean(1)[:, 0]


@pytest.mark.parametrize("samples", [1, 16, 64, 192])
@pytest.mark.parametrize("dwconv", [0, 9])
def test_the_layer_equals_its_definition(samples: int, dwconv: int) -> None:
    layer = AddAttention(64, 4, dwconv=dwconv).eval()
    if dwconv:
        nn.init.normal_(layer.dwconv.weight)
    x = torch.randn(3, samples, 64)
    out, weights = layer(x, return_weights=True)
    expected, expected_weights = layer_by_hand(layer, x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights, expected_weights.float())
    assert torch.equal(layer(x), out)


def test_the_layer_trains_all_its_parameters() -> None:
    layer = AddAttention(32, 4, dwconv=3, qkv_bias=True)
    out, weights = layer(torch.randn(2, 10, 32), return_weights=True)
    (out.square().sum() + weights.square().sum()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradients_of_codes_do_not_depend_on_how_long_tokens_are() -> None:
    x = torch.randn(2, 10, 32)
    grads = []
    for scale in (1.0, 100.0):
        torch.manual_seed(3)
        layer = AddAttention(32, 4)
        with torch.no_grad():
            layer.q_fc.weight.mul_(scale)
        layer(x).square().sum().backward()
        grads.append(layer.q_fc.weight.grad * scale)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


def test_masked_tokens_are_not_attended_to() -> None:
    layer = AddAttention(32, 4).eval()
    x = torch.randn(2, 10, 32)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[:, 6:] = False
    out, weights = layer(x, True, mask)
    short, short_weights = layer(x[:, :6], True)
    torch.testing.assert_close(out[:, :6], short)
    torch.testing.assert_close(weights[:, :6], short_weights)
    assert (weights[:, 6:] == 0).all()


@pytest.mark.parametrize("order", ["linear", "quadratic"])
def test_cross_attention_is_from_x_to_the_context(order: str) -> None:
    layer = AddAttention(32, 4, context_dim=20, order=order).eval()
    x, context = torch.randn(3, 7, 32), torch.randn(3, 11, 20)
    mask = torch.rand(3, 11) < 0.7
    out, weights = layer(x, return_weights=True, mask=mask, context=context)
    q, k, v = layer.split_heads(layer.q_fc(x)), *(layer.split_heads(fc(context)) for fc in (layer.k_fc, layer.v_fc))
    expected, attention = brute_force((q >= 0) * 2.0 - 1, (k >= 0) * 2.0 - 1, v, mask[:, None, None])
    torch.testing.assert_close(out, layer.out_fc(expected.transpose(1, 2).flatten(2).float()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights, attention.mean(1)[:, 0].float())
    with pytest.raises(UserError, match="dwconv=0"):
        AddAttention(32, 4, dwconv=3)(x, context=torch.randn(3, 7, 32))


def test_a_bias_reaches_the_attention_and_its_weights() -> None:
    layer = AddAttention(32, 4).eval()
    x, bias = torch.randn(2, 9, 32), torch.randn(4, 9, 9)
    out, weights = layer(x, return_weights=True, bias=bias)
    q, k, v = (layer.split_heads(fc(x)) for fc in (layer.q_fc, layer.k_fc, layer.v_fc))
    expected, attention = brute_force((q >= 0) * 2.0 - 1, (k >= 0) * 2.0 - 1, v, bias=bias)
    torch.testing.assert_close(out, layer.out_fc(expected.transpose(1, 2).flatten(2).float()), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weights, attention.mean(1)[:, 0].float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seen", ["all", "keys", "pairs", "biased", "none"])
@pytest.mark.parametrize("order", ["auto", "linear"])
def test_contrast_moves_rows_of_the_map_away_from_the_mean_over_the_keys_that_count(order: str, seen: str) -> None:
    if order == "linear" and seen in ("pairs", "biased"):
        return
    layer, x = AddAttention(32, 4, order=order, contrast=5.0).eval(), torch.randn(2, 9, 32)
    layer.log_contrast.data += torch.randn(4)
    masks = {"keys": torch.rand(2, 9) < 0.7, "pairs": torch.rand(2, 4, 9, 9) < 0.7, "none": torch.zeros(2, 9).bool()}
    mask, bias = masks.get(seen), torch.randn(4, 9, 9) if seen == "biased" else None
    out, weights = layer(x, True, mask, bias=bias)
    q, k, v = (layer.split_heads(fc(x)) for fc in (layer.q_fc, layer.k_fc, layer.v_fc))
    full_mask = None if mask is None else mask if mask.dim() == 4 else mask[:, None, None]
    q, k = (q >= 0) * 2.0 - 1, (k >= 0) * 2.0 - 1
    of_map, attention = brute_force(q, k, v, full_mask, bias)
    of_mean, flat = brute_force(0 * q, k, v, full_mask, bias)
    contrast = layer.log_contrast.exp().view(4, 1, 1).double()
    expected = (of_mean + contrast * (of_map - of_mean)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, layer.out_fc(expected.float()), rtol=1e-3, atol=1e-4)
    expected = (flat + contrast * (attention - flat)).mean(1)[:, 0]
    torch.testing.assert_close(weights, expected.float(), rtol=1e-3, atol=1e-4)
    if seen != "none":
        torch.testing.assert_close(weights.sum(-1), torch.ones(2))


def test_a_contrast_of_one_changes_nothing_and_is_learned_for_each_head() -> None:
    plain, x = AddAttention(32, 4), torch.randn(2, 9, 32)
    layer = AddAttention(32, 4, contrast=1.0)
    layer.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(layer(x), plain(x))
    layer(x).square().sum().backward()
    assert layer.log_contrast.grad.shape == (4,) and layer.log_contrast.grad.all()
    assert "log_contrast" in layer.state_dict() and "log_contrast" not in plain.state_dict()


@pytest.mark.parametrize("masked", [False, True])
def test_contrast_is_there_on_the_kernel_too(masked: bool) -> None:
    model, x = nn.Sequential(AddAttention(32, 4, contrast=9.0)), torch.randn(2, 9, 32)
    mask = torch.arange(9) < torch.tensor([[5], [9]]) if masked else None
    with torch.no_grad():
        expected = model.eval()[0](x, mask=mask)
        freeze_(model, verbose=False)
        with kernels.numerics("exact"):
            torch.testing.assert_close(model[0](x, mask=mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", list(BINARIZERS))
def test_queries_and_keys_start_with_the_same_codes(name: str, share: bool) -> None:
    layer = AddAttention(32, 4, binarizer=name, share_codes=share)
    x = torch.randn(2, 4, 5, 8)
    assert (layer.k_code is None) == share
    if not share:
        assert torch.equal(layer.q_code(x), layer.k_code(x)) and layer.q_code is not layer.k_code
    q, k, v = (layer.split_heads(fc(x.transpose(1, 2).flatten(2))) for fc in (layer.q_fc, layer.k_fc, layer.v_fc))
    expected, _ = brute_force(layer.q_code(q), layer.q_code(k), v)
    torch.testing.assert_close(layer.attend(q, k, v)[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_codes_and_heads_have_the_widths_asked_for() -> None:
    layer = AddAttention(30, 4, binarizer="random", head_dim=6, code_dim=40)
    assert layer.q_fc.out_features == 24 and layer.q_code.projection.shape == (4, 6, 40)
    assert layer(torch.randn(2, 5, 30)).shape == (2, 5, 30)


@quick
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([1, 3, 5]),
)
def test_the_convolution_over_a_grid_equals_its_definition(heads, width, prefix, height, length, size) -> None:
    conv = TokenConv2d(heads * width, size, num_prefix_tokens=prefix, grid=(height, length))
    nn.init.normal_(conv.weight)
    v = torch.randn(2, heads, prefix + height * length, width)
    out = conv(v)
    expected = torch.zeros_like(v, dtype=torch.float64)
    for row in range(height):
        for column in range(length):
            for dy in range(-(size // 2), size // 2 + 1):
                for dx in range(-(size // 2), size // 2 + 1):
                    y, x = row + dy, column + dx
                    if 0 <= y < height and 0 <= x < length:
                        tap = conv.weight[:, 0, dy + size // 2, dx + size // 2].view(heads, width)
                        expected[:, :, prefix + row * length + column] += tap * v[:, :, prefix + y * length + x]
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_grid_is_given_recognised_as_a_square_or_refused() -> None:
    conv = TokenConv2d(8, 3, num_prefix_tokens=1)
    nn.init.normal_(conv.weight)
    v = torch.randn(1, 2, 17, 4)
    assert torch.equal(conv(v), conv(v, (4, 4))) and not torch.equal(conv(v), conv(v, (2, 8)))
    with pytest.raises(UserError, match=r"18 tokens are not 1 prefix tokens and a grid of 4 x 4"):
        conv(torch.randn(1, 2, 18, 4))
    with pytest.raises(UserError, match="must be given a grid that is not square"):
        TokenConv2d(8, 3, num_prefix_tokens=5)(torch.randn(1, 2, 2, 4))


def test_a_fresh_convolution_over_a_grid_changes_nothing_and_trains() -> None:
    layer = AddAttention(16, 2, dwconv=TokenConv2d(16, 3, num_prefix_tokens=1))
    plain = AddAttention(16, 2)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 10, 16)
    assert torch.equal(layer(x), plain(x))
    layer(x).square().sum().backward()
    assert layer.dwconv.weight.grad.any()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((16, 16), (16, 12), (16, 16), (16, 16)), "widths are 16, 12 and 16"),
        (((16, 15), (16, 15), (16, 15), (15, 16)), "2 heads must divide"),
        (((16, 16), (8, 16), (16, 16), (16, 16)), "widths 8 and 16"),
        (((16, 16), (16, 16), (16, 16), (12, 16)), "the output projection must have 16 inputs, not 12"),
    ],
)
def test_projections_that_do_not_fit_each_other_are_refused(sizes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AddAttention.from_projections(*(nn.Linear(*size) for size in sizes), num_heads=2)


def test_from_projections_takes_over_the_modules() -> None:
    q, k, v, out = (nn.Linear(16, 16, bias=False) for _ in range(4))
    q.eval()
    layer = AddAttention.from_projections(q, ShiftLinear.from_linear(k), v, out, num_heads=2, dwconv=3)
    assert layer.q_fc is q and layer.v_fc is v and layer.out_fc is out and not layer.training
    assert list(dict(layer.named_children())) == ["q_fc", "k_fc", "v_fc", "out_fc", "q_code", "k_code", "dwconv"]
    assert layer.double().dwconv.weight.dtype == torch.float64


def test_a_fresh_convolution_changes_nothing_and_any_module_can_stand_in() -> None:
    x = torch.randn(2, 9, 16)
    plain = AddAttention(16, 2)
    with_conv = AddAttention(16, 2, dwconv=5)
    with_conv.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(plain(x), with_conv(x))

    class Image(nn.Module):
        def forward(self, v):  # [B, H, N, E], N = 3 x 3
            return (
                torch.nn.functional.avg_pool2d(v.transpose(2, 3).unflatten(-1, (3, 3)).flatten(1, 2), 3, 1, 1)
                .view(*v.transpose(2, 3).shape)
                .transpose(2, 3)
            )

    assert AddAttention(16, 2, dwconv=Image())(x).shape == x.shape


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", list(BINARIZERS))
def test_layers_come_back_from_state_dicts_and_can_be_copied(name: str, share: bool) -> None:
    options = {"binarizer": name, "share_codes": share, "dwconv": 3}
    layer, x = AddAttention(32, 4, **options), torch.randn(2, 20, 32)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    other = AddAttention(32, 4, **options)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("name", list(BINARIZERS))
def test_layers_compile_and_export(name: str) -> None:
    layer, x = AddAttention(32, 4, binarizer=name, dwconv=TokenConv2d(32, 3, 1)), torch.randn(2, 17, 32)
    out = layer(x)
    out.square().sum().backward()
    grad, layer.q_fc.weight.grad = layer.q_fc.weight.grad, None
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, out)
    compiled.square().sum().backward()
    torch.testing.assert_close(layer.q_fc.weight.grad, grad, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(layer.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(exported.module()(torch.cat([x, x])), torch.cat([out, out]))


@pytest.mark.parametrize("name", list(BINARIZERS))
def test_autocast_to_bfloat16_flips_few_codes_and_trains(name: str) -> None:
    layer, x = AddAttention(32, 4, binarizer=name, dwconv=3), torch.randn(2, 20, 32)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = layer(x, return_weights=True)
        (out.float().sum() + weights.sum()).backward()
    # A code may flip where its feature is about zero; on average nothing may move.
    assert (out.float() - expected).norm() < 0.15 * expected.norm()
    assert layer.q_fc.weight.grad.any() and torch.isfinite(layer.q_fc.weight.grad).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AddAttention(30, 4), "divide"),
        (lambda: AddAttention(32, 4, binarizer="hsh"), "sign, random, hash"),
        (lambda: AddAttention(32, 4, codes="pm"), "pm1, 01"),
        (lambda: AddAttention(32, 4, order="cubic"), "auto, linear, quadratic"),
        (lambda: AddAttention(32, 4, dwconv=4), "odd"),
        (lambda: AddAttention(32, 4, contrast=0.0), "positive"),
        (lambda: TokenConv(4, -1), "odd"),
        (lambda: TokenConv2d(4, 2), "odd"),
        (lambda: AddAttention(32, 4, order="linear", attn_dropout=0.1), "quadratic"),
        (lambda: AddAttention(8, 2)(torch.ones(1, 3, 8), bias=torch.ones(3)), "at least 2 dimensions"),
        (lambda: AddAttention(8, 2)(torch.ones(1, 3, 8), bias=torch.ones(3, 3, dtype=torch.bool)), "give a mask"),
        (lambda: AddAttention(8, 2)(torch.ones(1, 3, 8), mask=torch.ones(1, 3)), "bool"),
    ],
)
def test_wrong_arguments_name_what_would_be_right(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
