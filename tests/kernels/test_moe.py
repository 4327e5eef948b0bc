"""The mixture of experts: the kernel against its twin, token by token."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shiftadd3d import UserError, kernels
from shiftadd3d.kernels.cpu.forms import error_bound, forms
from shiftadd3d.kernels.cpu.moe import MOE
from shiftadd3d.kernels.ops.moe import moe_mlp
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.reference.mlp import shift_mlp_twin
from shiftadd3d.kernels.reference.moe import moe_mlp_twin
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.numerics import COMPILED

pytest.importorskip("tvm")

Layers = list[Tensor | None]


def problem(
    tokens: int, widths: tuple[int, ...] = (20, 40, 24), kinds: tuple[str, ...] = ("mult", "shift"), terms: int = 1
) -> tuple[Tensor, Tensor, Layers]:
    """Tokens, a router's logits, and the layers of experts of the given kinds."""
    generator = torch.Generator().manual_seed(0)
    layers: Layers = []
    for kind, (inputs, outputs) in itertools.product(kinds, itertools.pairwise(widths)):
        weight = torch.randn(outputs, inputs, generator=generator) / max(1, inputs) ** 0.5
        if kind == "mult":
            layers += [weight, None]
        else:
            codes = power_of_two.encode(weight, 4, terms)
            layers += [power_of_two.pack(codes.codes, 4), codes.offset]
        layers.append(torch.randn(outputs, generator=generator))
    x = torch.randn(tokens, widths[0], generator=generator)
    return x, torch.randn(tokens, len(kinds), generator=generator), layers


def assert_close(outcome: tuple[Tensor, Tensor], twin: tuple[Tensor, Tensor], numerics: str = "exact") -> None:
    stated = error_bound(forms(targets.current(), numerics, 4, 1, "float32")[0], 4)
    assert torch.equal(outcome[1], twin[1])
    # The layers of `problem` gain less than ten times what goes in, each.
    torch.testing.assert_close(outcome[0], twin[0], rtol=1e-5, atol=2e-5 + 400 * stated)


def test_the_twin_sends_each_token_through_its_expert():
    x, logits, layers = problem(9)
    y, assignment = moe_mlp_twin(x, logits, layers)
    mult = F.linear(F.gelu(F.linear(x, layers[0], layers[2])), layers[3], layers[5])
    shift = shift_mlp_twin(x, *layers[6:])
    assert assignment.tolist() == logits.argmax(-1).tolist() and set(assignment.tolist()) == {0, 1}
    torch.testing.assert_close(y, torch.where(assignment[:, None] == 0, mult, shift))
    gated, _ = moe_mlp_twin(x, logits, layers, gated=True)
    torch.testing.assert_close(gated, y * logits.softmax(-1).amax(-1, keepdim=True))


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 300),
    widths=st.tuples(*[st.integers(1, 150)] * 3),
    numerics=st.sampled_from(COMPILED),
    gated=st.booleans(),
    lean=st.sampled_from([-9.0, -1.0, 0.0, 9.0]),
)
def test_any_number_of_tokens_any_widths_and_any_shares(tokens, widths, numerics, gated, lean):
    x, logits, layers = problem(tokens, widths)
    logits[:, 0] += lean
    with kernels.numerics(numerics):
        outcome = moe_mlp(x, logits, layers, gated=gated)
    assert outcome[0].shape == (tokens, widths[-1])
    assert_close(outcome, moe_mlp_twin(x, logits, layers, gated=gated), numerics)


def test_any_list_of_experts_of_one_layer():
    x, logits, layers = problem(130, (33, 50), ("shift", "mult", "shift"))
    assert_close(moe_mlp(x, logits, layers, depth=1), moe_mlp_twin(x, logits, layers, depth=1))


def test_equal_and_broken_logits_are_decided_as_torch_decides():
    x, logits, layers = problem(8)
    nan, inf = float("nan"), float("inf")
    logits[:7] = torch.tensor([[1, 1], [nan, 1], [1, nan], [nan, nan], [-inf, -inf], [inf, nan], [-inf, inf]])
    outcome = moe_mlp(x, logits, layers)
    assert outcome[1].tolist()[:7] == [0, 0, 1, 0, 0, 1, 1]
    assert_close(outcome, moe_mlp_twin(x, logits, layers))


def test_it_is_no_less_exact_than_torch():
    x, logits, layers = problem(300, (64, 256, 64))
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in layers]
    truth, _ = moe_mlp_twin(x.double(), logits.double(), wide)
    errors = [(run(x, logits, layers)[0].double() - truth).abs().mean() for run in (moe_mlp, moe_mlp_twin)]
    assert errors[0] <= 1.05 * errors[1]


def test_bfloat16_rounds_ordinary_weights_as_the_twin_and_hidden_activations_not_at_all():
    x, logits, layers = problem(50)
    rounded: Layers = [t.bfloat16().float() if i % 6 in (0, 3) and i < 6 else t for i, t in enumerate(layers)]
    y, assignment = moe_mlp(x.bfloat16(), logits, layers)
    twin, chosen = moe_mlp_twin(x.bfloat16().float(), logits, rounded)
    assert y.dtype == torch.bfloat16 and torch.equal(assignment, chosen)
    torch.testing.assert_close(y.float(), twin, rtol=2**-8, atol=2**-7)


def test_other_dtypes_and_layers_of_unequal_formats_run_through_the_twin(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MOE, "function", lambda **spec: pytest.fail("compiled code"))
    x, logits, layers = problem(5)
    assert torch.equal(moe_mlp(x.double(), logits, layers)[0], moe_mlp_twin(x.double(), logits, layers)[0])
    mixed = layers[:3] + layers[9:]
    for experts in (mixed, problem(5, kinds=("shift",), terms=2)[2][:3] + layers[9:]):
        assert torch.equal(moe_mlp(x, logits[:, :1], experts)[0], moe_mlp_twin(x, logits[:, :1], experts)[0])
    with kernels.numerics("twin"):
        assert torch.equal(moe_mlp(x, logits, layers)[0], moe_mlp_twin(x, logits, layers)[0])


def test_leading_dimensions_strides_and_missing_biases():
    x, logits, layers = problem(60)
    layers[2::3] = [None] * 4
    y, assignment = moe_mlp(x, logits, layers)
    assert_close((y, assignment), moe_mlp_twin(x, logits, layers))
    folded = moe_mlp(x.view(3, 4, 5, 20), logits.view(3, 4, 5, 2), layers)
    assert torch.equal(folded[0], y.view(3, 4, 5, 24)) and torch.equal(folded[1], assignment.view(3, 4, 5))
    assert torch.equal(moe_mlp(x.T.contiguous().T, logits.T.contiguous().T, layers)[0], y)
    alone = moe_mlp(x[0], logits[0], layers)
    assert alone[0].shape == (24,) and alone[1].shape == ()
    torch.testing.assert_close(alone[0], y[0])


def test_nothing_in_nothing_out():
    x, logits, layers = problem(0)
    y, assignment = moe_mlp(x, logits, layers)
    assert y.shape == (0, 24) and assignment.shape == (0,)
    x, logits, layers = problem(3, (20, 40, 0))
    assert moe_mlp(x, logits, layers)[0].shape == (3, 0)
    x, logits, layers = problem(3, (0, 40, 24))
    assert_close(moe_mlp(x, logits, layers), moe_mlp_twin(x, logits, layers))


@pytest.mark.parametrize("numerics", COMPILED)
def test_a_number_out_of_range_spoils_its_own_token_only(numerics: str):
    x, logits, layers = problem(50)
    with kernels.numerics(numerics):
        expected = moe_mlp(x, logits, layers)
        x[17, 3] = float("inf")
        x[18, 3] = float("nan")
        y = moe_mlp(x, logits, layers)
    twin = moe_mlp_twin(x, logits, layers)
    torch.testing.assert_close(y[0][17:19], twin[0][17:19], rtol=1e-4, atol=1e-4, equal_nan=True)
    others = [i for i in range(50) if i not in (17, 18)]
    for outcome in (expected, y):
        assert_close((outcome[0][others], outcome[1][others]), (twin[0][others], twin[1][others]), numerics)


@pytest.mark.parametrize("tokens", [1, 61, 700])
def test_threads_share_the_tokens(torch_threads: int, tokens: int):
    x, logits, layers = problem(tokens)
    assert_close(moe_mlp(x, logits, layers), moe_mlp_twin(x, logits, layers))


def test_many_python_threads_at_once():
    x, logits, layers = problem(100)
    expected, _ = moe_mlp(x, logits, layers)
    wrong = []

    def run() -> None:
        for _ in range(10):
            if not torch.equal(moe_mlp(x, logits, layers)[0], expected):
                wrong.append(1)

    workers = [threading.Thread(target=run) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_op_keeps_torchs_rules():
    x, logits, layers = problem(5)
    op = torch.ops.shiftadd3d.moe_mlp.default
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op, (x, logits, layers, 2, 4, "gelu", True), test_utils=checks)


def test_torch_compile_sees_through_for_any_number_of_tokens():
    _, _, layers = problem(0)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def block(x: Tensor, logits: Tensor) -> Tensor:
        return x + moe_mlp(x.tanh(), logits, layers)[0][..., :20]

    for tokens in (40, 9, 3):
        x, logits, _ = problem(tokens)
        torch.testing.assert_close(block(x, logits), x + moe_mlp(x.tanh(), logits, layers)[0][..., :20])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"activation": "tanh"}, "activation must be one of none, relu, gelu, not 'tanh'"),
        ({"x": torch.zeros(3, 21)}, r"expert 0: a weight without an offset must be floating point \[outputs, 21\]"),
        ({"x": torch.zeros(3, 20, dtype=torch.int64)}, r"x must be floating point \[\*, inputs\]"),
        ({"logits": torch.zeros(4, 2)}, r"logits must be floating point \[3, 'E'\] beside x, not \[4, 2\]"),
        ({"logits": torch.zeros(3, 3)}, "3 experts of 2 layers have 18 tensors, not 12"),
        ({"depth": 3}, "2 experts of 3 layers have 18 tensors, not 12"),
        ({"layers": problem(1)[2][:6] + problem(1, (20, 40, 25))[2][6:]}, "expert 0 has 24 outputs, the last one 25"),
        ({"layers": problem(1)[2][:6] + problem(1, (21, 40, 24))[2][6:]}, r"expert 1: x \[0, 20\] has 20 inputs"),
        ({"layers": [None] * 12}, "every layer of an expert needs a weight or codes"),
        ({"layers": [*problem(1)[2][:2], torch.zeros(9), *problem(1)[2][3:]]}, r"bias must be floating point \[40\]"),
    ],
)
def test_what_does_not_go_together_is_named(change: dict, complaint: str):
    x, logits, layers = problem(3)
    with pytest.raises(UserError, match=complaint):
        moe_mlp(**{"x": x, "logits": logits, "layers": layers} | change)


def test_the_smallest_target_computes_the_same(on_target):
    on_target("generic")
    x, logits, layers = problem(33)
    assert_close(moe_mlp(x, logits, layers), moe_mlp_twin(x, logits, layers))


@pytest.mark.parametrize(
    ("name", "form", "instruction"), [("avx512_vnni", "int16", "vpdpwssd"), ("amx", "bfloat16x3", "tdpbf16ps")]
)
def test_every_machine_gets_its_own_instructions(name: str, form: str, instruction: str):
    spec = {"experts": "mult,shift", "depth": 1, "form": form, "bits": 4, "terms": 1, "dtype": "float32"}
    assembly = MOE.assembly(targets.find(name), **spec, activation="none")
    assert instruction in assembly and "vfmadd" in assembly and "zmm" in assembly
