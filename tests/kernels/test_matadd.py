"""Products with binary codes: the kernels against their twins, the twins against the layers and against themselves."""

from __future__ import annotations

import multiprocessing
import re
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shiftadd3d import UserError, kernels
from shiftadd3d.kernels.cpu.matadd import MATADD, PRODUCTS, SUMS
from shiftadd3d.kernels.ops.matadd import add_attention, matadd, matadd_kv, matadd_q
from shiftadd3d.kernels.reference.linear_angular import LEAST_ROW_SUM
from shiftadd3d.kernels.reference.matadd import (
    LOW,
    add_attention_twin,
    decode_signs,
    matadd_kv_twin,
    matadd_q_twin,
    pack_signs,
)
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.nn import binarize
from shiftadd3d.nn.add import linear_add_attention

WIDTHS = [(32, 32), (20, 93)]
"""Features and values of a token: whole vectors; and neither, in more than one pass over the values."""

matadd_twin = partial(add_attention_twin, attention=False)
OPS = {"matadd": (matadd, matadd_twin), "add_attention": (add_attention, add_attention_twin)}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(*lead: int, queries: int = 45, keys: int = 70, widths: tuple[int, int] = (32, 32), seed: int = 0):
    features, columns = widths
    sizes = (queries, features), (keys, features), (keys, columns)
    return tuple(draw(*lead, *size, seed=seed + i) for i, size in enumerate(sizes))


def assert_sums_agree(found: Tensor, expected: Tensor, terms: int) -> None:
    """Both are sums of about `terms` numbers of about 1, in different order."""
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6 * terms)


# Twins


def test_the_twin_of_attention_is_the_layers_linear_order():
    q, k, v = problem(2, 3)
    mask = draw(2, 70) > 0
    for codes in LOW:
        layer = linear_add_attention(binarize(q, codes), binarize(k, codes), v, mask=mask, order="linear")
        torch.testing.assert_close(add_attention_twin(q, k, v, mask[:, None], codes), layer, rtol=1e-5, atol=1e-6)


def test_packing_keeps_the_signs_of_binarize():
    x = torch.cat(
        (draw(5, 19), torch.tensor([[0.0, -0.0, float("nan"), float("inf"), -float("inf")]]).expand(5, -1)), 1
    )
    packed = pack_signs(x)
    assert packed.shape == (5, 3)
    for codes in LOW:
        assert torch.equal(decode_signs(packed, codes, 24, torch.float32), binarize(x, codes))
        assert torch.equal(decode_signs(x, codes, 24, torch.float32), binarize(x, codes))


# Kernels against twins


@settings(max_examples=20, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=3),
    queries=st.integers(1, 70),
    keys=st.integers(1, 70),
    widths=st.sampled_from(WIDTHS),
    codes=st.sampled_from(list(LOW)),
    masked=st.booleans(),
    name=st.sampled_from(list(OPS)),
)
def test_any_number_of_queries_keys_and_heads(lead, queries, keys, widths, codes, masked, name):
    q, k, v = problem(*lead, queries=queries, keys=keys, widths=widths)
    mask = draw(*lead, keys, seed=9) > 0 if masked else None
    op, twin = OPS[name]
    assert_sums_agree(op(q, k, v, mask, codes), twin(q, k, v, mask, codes), terms=keys * widths[0])


@settings(max_examples=12, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=3),
    tokens=st.integers(1, 70),
    widths=st.sampled_from(WIDTHS),
    codes=st.sampled_from(list(LOW)),
    masked=st.booleans(),
)
def test_the_two_products_on_their_own(lead, tokens, widths, codes, masked):
    q, k, v = problem(*lead, keys=tokens, widths=widths)
    mask = draw(*lead, tokens, seed=9) > 0 if masked else None
    kv = matadd_kv_twin(k, v, mask, codes)
    assert_sums_agree(matadd_kv(k, v, mask, codes), kv, terms=tokens)
    assert_sums_agree(matadd_q(q, kv, codes), matadd_q_twin(q, kv, codes), terms=tokens * widths[0])


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("codes", LOW)
def test_packed_signs_give_what_the_features_give(name: str, codes: str):
    op, _ = OPS[name]
    q, k, v = problem(2, 2, widths=(20, 93))
    expected = op(q, k, v, None, codes)
    assert torch.equal(op(pack_signs(q), pack_signs(k), v, None, codes, 20), expected)


def test_queries_and_keys_need_not_come_alike():
    q, k, v = problem(2, 2)
    assert torch.equal(matadd(q, pack_signs(k), v), matadd(q, k, v))


def test_bits_beyond_the_last_feature_do_not_matter():
    q, k, v = problem(2, widths=(20, 93))
    ones = torch.tensor([0, 0, 0xF0], dtype=torch.uint8)
    expected = add_attention(q, k, v)
    assert torch.equal(add_attention(pack_signs(q) | ones, pack_signs(k) | ones, v, features=20), expected)


@pytest.mark.parametrize("name", OPS)
def test_bfloat16_is_summed_in_float32(name: str):
    op, _ = OPS[name]
    q, k, v = (x.bfloat16() for x in problem(2, 2))
    assert torch.equal(op(q, k, v), op(q.float(), k.float(), v.float()).bfloat16())
    kv = matadd_kv(k, v)
    assert torch.equal(kv, matadd_kv(k.float(), v.float()).bfloat16())
    assert torch.equal(matadd_q(q, kv), matadd_q(q.float(), kv.float()).bfloat16())


def test_other_dtypes_run_through_the_twin():
    q, k, v = (x.double() for x in problem(2, 2))
    assert torch.equal(add_attention(q, k, v), add_attention_twin(q, k, v))
    assert add_attention(q.half(), k.half(), v.half()).dtype == torch.float16


def test_zeros_of_either_sign_count_as_positive_and_nan_as_negative():
    q, k, v = problem(1, 2)
    k[..., ::3], k[..., 1::3] = -0.0, float("nan")
    q[..., ::2] = -0.0
    assert_sums_agree(matadd(q, k, v), matadd_twin(q, k, v), terms=70 * 32)


@pytest.mark.parametrize("codes", LOW)
@pytest.mark.parametrize("broken", [float("inf"), -float("inf"), float("nan")])
def test_values_that_are_not_finite_go_where_the_twins_go(codes: str, broken: float):
    q, k, v = problem(1, 2)
    v[0, 0, 3, 5] = v[0, 1, 7, 9] = v[0, 1, 8, 9] = broken
    kv, expected = matadd_kv(k, v, None, codes), matadd_kv_twin(k, v, None, codes)
    for found, twin in ((kv, expected), (matadd_q(q, expected, codes), matadd_q_twin(q, expected, codes))):
        assert torch.equal(found.isnan(), twin.isnan())
        assert torch.equal(found.isinf(), twin.isinf())
        torch.testing.assert_close(found, twin, rtol=1e-4, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("name", OPS)
def test_masked_keys_take_no_part_whatever_they_hold(name: str):
    op, _ = OPS[name]
    q, k, v = problem(2, 3)
    mask = draw(2, 1, 70) > 0
    expected = op(q, k, v, mask)
    k[~mask.expand(2, 3, 70)], v[~mask.expand(2, 3, 70)] = 7.0, float("nan")
    assert torch.equal(op(q, k, v, mask), expected)
    for i in range(2):
        seen = mask[i, 0]
        alone = op(q[i], k[i][:, seen], v[i][:, seen])
        torch.testing.assert_close(expected[i], alone, rtol=1e-5, atol=1e-4)


def test_queries_that_see_no_key_get_zeros():
    q, k, v = problem(2, 3)
    assert LEAST_ROW_SUM < 0.18  # the least similarity of two codes: what one key alone gives
    assert torch.equal(add_attention(q, k, v, torch.zeros(2, 1, 70, dtype=torch.bool)), torch.zeros(2, 3, 45, 32))
    assert torch.equal(add_attention(q, k[..., :0, :], v[..., :0, :]), torch.zeros(2, 3, 45, 32))
    one = torch.zeros(2, 1, 70, dtype=torch.bool)
    one[..., 4] = True
    torch.testing.assert_close(add_attention(q, k, v, one), v[..., 4:5, :].expand(2, 3, 45, 32))


@pytest.mark.parametrize("codes", LOW)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("lead", [(2, 3), (3,), (2, 2, 3)])
def test_contrast_moves_outcomes_away_from_the_mean_of_the_values(
    codes: str, widths: tuple[int, int], lead: tuple[int, ...], torch_threads: int
):
    q, k, v = problem(*lead, widths=widths)
    v = v + 2
    mask, contrast = draw(*lead, 70) > 0, torch.tensor([0.0, 1.0, 16.0])
    mask[..., 0, :] = False
    for seen in (None, mask):
        found = add_attention(q, k, v, seen, codes, contrast=contrast)
        twin = add_attention_twin(q, k, v, seen, codes, contrast=contrast)
        torch.testing.assert_close(found, twin, rtol=1e-5, atol=1e-4)
        plain = add_attention(q, k, v, seen, codes)
        torch.testing.assert_close(found[..., 1, :, :], plain[..., 1, :, :])
        if seen is None:
            moved = v.mean(-2, keepdim=True).lerp(plain, contrast[:, None, None])
            torch.testing.assert_close(found, moved, rtol=1e-5, atol=1e-4)
        else:
            assert (found[..., 0, :, :] == 0).all()  # no key is seen


def test_contrast_in_bfloat16_and_with_packed_codes():
    q, k, v = (x.bfloat16() for x in problem(2, 3))
    contrast = torch.tensor([2.0, 4.0, 8.0], dtype=torch.bfloat16)
    found = add_attention(pack_signs(q), pack_signs(k), v, contrast=contrast)
    twin = add_attention_twin(q.double(), k.double(), v.double(), contrast=contrast)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), twin, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(0, 3, 45, 70), (2, 0, 45, 70), (2, 3, 0, 70), (2, 3, 45, 0)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]):
    batch, heads, queries, keys = shape
    q, k, v = problem(batch, heads, queries=queries, keys=keys)
    for op, _ in OPS.values():
        assert op(q, k, v).shape == (batch, heads, queries, 32)
    assert_sums_agree(matadd_kv(k, v), matadd_kv_twin(k, v), terms=70)
    assert matadd(q, k, v[..., :0]).shape == (batch, heads, queries, 0)
    assert add_attention(q, k, v, contrast=torch.ones(heads)).shape == (batch, heads, queries, 32)


def test_heads_that_lie_side_by_side_are_read_in_place_and_left_so():
    """As projections of tokens leave them, and as the next projection wants them."""
    contiguous = problem(2, 3, queries=45, keys=45)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in contiguous)
    for op, _ in OPS.values():
        out = op(q, k, v)
        assert torch.equal(out, op(*contiguous))
        assert out.transpose(1, 2).is_contiguous()
        assert op(*contiguous).is_contiguous()


def test_any_strides():
    q, k, v = problem(2, 3)
    expected = add_attention(q, k, v)
    apart = [torch.stack((x, x + 1), dim=-1)[..., 0] for x in (q, k, v)]
    assert torch.equal(add_attention(*apart), expected)
    backwards = [x.mT.contiguous().mT for x in (q, k, v)]
    assert torch.equal(add_attention(*backwards), expected)
    same = [x[:1, :1].expand(2, 3, -1, -1) for x in (q, k, v)]
    assert torch.equal(add_attention(*same), expected[:1, :1].expand(2, 3, -1, -1))


def test_more_leading_dimensions_than_batch_and_heads():
    q, k, v = problem(2, 2, 3)
    mask = draw(2, 1, 1, 70) > 0
    expected = torch.stack([add_attention(q[i], k[i], v[i], mask[i]) for i in range(2)])
    assert torch.equal(add_attention(q, k, v, mask), expected)


# Threads and processes


@pytest.mark.parametrize("heads", [1, 3, 40])
def test_threads_share_the_tokens_where_heads_are_few(torch_threads: int, heads: int):
    q, k, v = problem(1, heads, queries=333, keys=500)
    mask = draw(1, 1, 500) > 0
    for op, twin in OPS.values():
        assert_sums_agree(op(q, k, v, mask), twin(q, k, v, mask), terms=500 * 32)
    assert_sums_agree(matadd_kv(k, v), matadd_kv_twin(k, v), terms=500)


def test_many_python_threads_at_once():
    q, k, v = problem(2, 3)
    expected = add_attention(q, k, v)
    wrong = []

    def run() -> None:
        for _ in range(20):
            if not torch.equal(add_attention(q, k, v), expected):
                wrong.append(1)

    workers = [threading.Thread(target=run) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def _in_child(arguments: tuple[Tensor, ...], expected: Tensor) -> None:
    raise SystemExit(0 if torch.allclose(add_attention(*arguments), expected, atol=1e-5) else 1)


def test_a_forked_child_computes_too():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        arguments = problem(2, 3)
        child = multiprocessing.get_context("fork").Process(
            target=_in_child, args=(arguments, add_attention(*arguments))
        )
        child.start()
        child.join(60)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(before)


# A citizen of torch


@pytest.mark.parametrize("codes", LOW)
def test_gradients_of_values_and_sums_are_the_twins(codes: str):
    q, k, v = problem(2, 3)
    mask = draw(2, 1, 70) > 0
    gradients = []
    for first, second in ((matadd_kv, matadd_q), (matadd_kv_twin, matadd_q_twin)):
        leaf = v.clone().requires_grad_()
        out = second(q, first(k, leaf, mask, codes), codes)
        (out * draw(2, 3, 45, 32, seed=5)).sum().backward()
        gradients.append(leaf.grad)
    assert_sums_agree(*gradients, terms=45 * 32)


def test_codes_have_no_gradient_and_say_so():
    q, k, v = problem(2, 3)
    out = matadd_kv(k.requires_grad_(), v.requires_grad_())
    with pytest.raises(UserError, match=r"shiftadd3d\.nn\.binarize trains"):
        out.sum().backward()
    out = matadd_q(q.requires_grad_(), matadd_kv(k.detach(), v.detach()))
    with pytest.raises(UserError, match=r"shiftadd3d\.nn\.binarize trains"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["matadd_kv", "matadd_q", "add_attention"])
def test_the_ops_keep_torchs_rules(name: str):
    q, k, v = problem(2, 3, queries=4, keys=5)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    arguments = {"matadd_kv": (k, v.requires_grad_()), "matadd_q": (q, draw(2, 3, 32, 32).requires_grad_())}
    op = getattr(torch.ops.shiftadd3d, name).default
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op, arguments.get(name, (q, k, v.detach())), test_utils=checks)
    if name == "add_attention":
        torch.library.opcheck(op, (q, k, v.detach(), None, "pm1", None, torch.ones(3)), test_utils=checks)


def test_torch_compile_sees_through_for_any_number_of_tokens():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return add_attention(q.tanh(), k, v).transpose(1, 2).flatten(-2)

    for tokens in (45, 33, 8):
        q, k, v = problem(2, 3, queries=tokens, keys=tokens)
        expected = add_attention(q.tanh(), k, v).transpose(1, 2).flatten(-2)
        torch.testing.assert_close(attend(q, k, v), expected)


def test_numerics_twin_runs_no_compiled_code(monkeypatch: pytest.MonkeyPatch):
    for kernel in (SUMS, PRODUCTS, MATADD):
        monkeypatch.setattr(kernel, "function", lambda **spec: pytest.fail("compiled code"))
    q, k, v = problem(1, 1, widths=(9, 9))
    with kernels.numerics("twin"):
        assert torch.equal(matadd(q, k, v), matadd_twin(q, k, v))
        assert torch.equal(add_attention(q, k, v), add_attention_twin(q, k, v))
        assert torch.equal(matadd_q(q, matadd_kv(k, v)), matadd_twin(q, k, v))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"codes": "±1"}, "codes must be one of pm1, 01, not '±1'"),
        ({"k": draw(2, 2, 70, 32)}, "must have the same dimensions before the last two"),
        ({"k": draw(2, 3, 71, 32)}, "every key needs a value: there are 71 keys and 70 values"),
        ({"k": draw(2, 3, 70, 32).long()}, "features, or packed in uint8, not torch.int64"),
        ({"features": 31}, r"features \[2, 3, 70, 32\] do not hold 31 a token"),
        ({"q": draw(2, 3, 45, 31)}, r"features \[2, 3, 45, 31\] do not hold 32 a token"),
        ({"k": pack_signs(draw(2, 3, 70, 40))}, "do not hold 40 a token"),
        ({"mask": torch.ones(2, 3, 70)}, "the mask must be bool"),
        ({"mask": torch.ones(2, 3, 71, dtype=torch.bool)}, r"the mask must be \[2, 3, 70\]"),
        ({"mask": torch.ones(2, 70, dtype=torch.bool)}, r"the mask must be \[2, 3, 70\]"),
    ],
)
def test_what_does_not_go_together_is_named(change: dict, complaint: str):
    arguments = dict(zip("qkv", problem(2, 3), strict=True)) | change
    for op in (matadd, add_attention):
        with pytest.raises(UserError, match=complaint):
            op(**arguments)


def test_contrast_is_one_for_each_head():
    q, k, v = problem(2, 3)
    with pytest.raises(
        UserError, match=r"contrast must be \[H\], one for each head .*, not \[2\] for \[2, 3, 70, 32\]"
    ):
        add_attention(q, k, v, contrast=torch.ones(2))


# Other machines


def test_the_smallest_target_computes_the_same(on_target: Callable[[str], None]):
    on_target("generic")
    q, k, v = problem(2, 3, widths=(20, 13))
    assert_sums_agree(add_attention(q, k, v), add_attention_twin(q, k, v), terms=70)


@pytest.mark.parametrize(("name", "register"), [("avx2", "ymm"), ("avx512", "zmm")])
def test_additions_are_vectors_as_wide_as_the_machines(name: str, register: str):
    spec = {"codes": "float32", "dtype": "float32", "features": 64, "columns": 64, "masked": False}
    code = SUMS.assembly(targets.find(name), **spec)
    assert len(re.findall(rf"vaddps.*%{register}", code)) >= 8
    assert "callq\tfma" not in code
