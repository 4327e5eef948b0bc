"""Mixtures: dispatch against dense evaluation, the balance loss against its definition, and what routers learn."""

# Wrong arguments on purpose, and attributes of submodules, to which torch gives no types.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportIndexIssue=false, reportOptionalOperand=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bounds import assert_within, network_bound
from shiftadd3d import UserError
from shiftadd3d.kernels.runtime.numerics import numerics
from shiftadd3d.nn import (
    FrozenMoE,
    MoE,
    MoELinear,
    MoEMlp,
    PackedShiftLinear,
    ShiftLinear,
    balance_loss,
    collect_moe_losses,
    dispatch,
    freeze_,
    latency_weights,
    measure_latencies,
    reset_router_statistics,
    router_statistics,
    squared_coefficient_of_variation,
)

quick = settings(max_examples=40, deadline=None)


def dense(tokens, assignment, experts):
    """All tokens through all experts, then pick."""
    outputs = torch.stack([expert(tokens) for expert in experts])
    return outputs[assignment, torch.arange(len(tokens))]


@quick
@given(st.integers(0, 30), st.integers(1, 4), st.booleans(), st.integers(0, 1000))
def test_dispatch_equals_dense_evaluation(tokens: int, experts: int, training: bool, seed: int) -> None:
    torch.manual_seed(seed)
    modules = [nn.Linear(5, 3).double().train(training) for _ in range(experts)]
    assignment = torch.randint(0, max(1, experts - 1), (tokens,))  # the last expert stays empty if there are several
    grads = []
    for run in (lambda x: dispatch(x, assignment, modules)[0], lambda x: dense(x, assignment, modules)):
        torch.manual_seed(seed)
        x = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
        for module in modules:
            module.zero_grad()
        out = run(x)
        out.square().sum().backward()
        parameters = [p.grad if p.grad is not None else torch.zeros_like(p) for m in modules for p in m.parameters()]
        grads.append([out.detach(), x.grad, *parameters])
    for sparse, full in zip(*grads, strict=True):
        torch.testing.assert_close(sparse, full)


def test_each_token_runs_through_one_expert_only() -> None:
    seen = []

    class Probe(nn.Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    layer = MoE([Probe(4, 4), Probe(4, 4), Probe(4, 4)], 4).eval()
    layer(torch.randn(3, 7, 4))
    assert sum(seen) == 21
    assert layer.token_counts == [int((layer.last_assignment == i).sum()) for i in range(3)]


def test_in_training_every_parameter_gets_a_gradient_even_in_an_empty_expert() -> None:
    layer = MoEMlp(4, 8, noise=0.0)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.bias.copy_(torch.tensor([5.0, -5.0]))
    out = layer(torch.randn(6, 4))
    assert layer.last_shares.tolist() == [1.0, 0.0]
    (out.sum() + collect_moe_losses(layer)).backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert all((p.grad == 0).all() for p in layer.experts[1].parameters())


def test_a_unit_gate_leaves_the_experts_output_as_it_is_and_still_teaches_the_router() -> None:
    layer = MoEMlp(4, 8, gate="unit").eval()
    x = torch.randn(6, 4)
    out = layer(x)
    with torch.no_grad():
        assert torch.equal(out, layer(x))  # where there is no gate
    wide = copy.deepcopy(layer.experts).double()
    assert_within(out, dense(x.double(), layer.last_assignment, wide), network_bound(layer))
    out.square().sum().backward()
    assert layer.router.weight.grad.abs().sum() > 0


def test_a_probability_gate_scales_by_the_probability_of_the_chosen_expert() -> None:
    layer = MoELinear(4, 3, gate="probability").eval()
    x = torch.randn(6, 4)
    out = layer(x)
    probability = layer.router(x).softmax(-1).max(-1).values
    expected = dense(x, layer.last_assignment, layer.experts) * probability.unsqueeze(1)
    torch.testing.assert_close(out, expected)


def test_both_gates_have_the_gradient_of_the_probability() -> None:
    grads = {}
    for gate in ("unit", "probability"):
        torch.manual_seed(5)
        layer = MoELinear(4, 3, gate=gate).double().eval()
        x = torch.randn(1, 4, dtype=torch.float64)
        p = layer.router(x).softmax(-1).max().detach()
        layer(x).sum().backward()
        grads[gate] = layer.router.weight.grad * (p if gate == "unit" else 1)
    torch.testing.assert_close(grads["unit"], grads["probability"])


@quick
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5))
def test_the_loss_vanishes_where_shares_are_proportional_to_inverse_latencies(latencies: list[float]) -> None:
    inverse = torch.tensor([1 / latency for latency in latencies], dtype=torch.float64)
    share = inverse / inverse.sum()
    alpha = torch.tensor(latency_weights(latencies), dtype=torch.float64)
    assert alpha.sum().item() == pytest.approx(1)
    # All tokens have these probabilities; the importance term sees nothing else.
    importance = alpha * share * 1000
    assert squared_coefficient_of_variation(importance).item() < 1e-20
    moved = share.clone()
    moved[0], moved[1] = moved[0] * 0.7, moved[1] + moved[0] * 0.3
    assert squared_coefficient_of_variation(alpha * moved).item() > 1e-4


def test_the_loss_without_noise_is_its_definition() -> None:
    logits = torch.randn(50, 2, dtype=torch.float64, requires_grad=True)
    assignment = logits.argmax(-1)
    alpha = torch.tensor([0.7, 0.3], dtype=torch.float64)

    def squared_variation(x):
        return x.var(unbiased=False) / x.mean() ** 2

    share = logits.softmax(-1).sum(0)
    count = torch.stack([(assignment == i).sum() for i in range(2)]).double().requires_grad_()
    expected = squared_variation(alpha * share) + squared_variation(alpha * count)
    loss = balance_loss(logits, assignment, alpha)
    torch.testing.assert_close(loss, expected)
    # Counts have no gradient of their own: theirs goes to the probabilities as it is.
    by_count, by_share = torch.autograd.grad(expected, (count, share), retain_graph=True)
    (by_logits,) = torch.autograd.grad(share, logits, by_count + by_share)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], by_logits)


def test_the_noisy_load_is_the_chance_to_win_against_the_others() -> None:
    noise, tokens, draws = 0.5, 400, 400
    logits = torch.randn(tokens, 3)
    alpha = torch.full((3,), 1 / 3)
    estimate, count = torch.zeros(3), torch.zeros(3)
    for _ in range(draws):
        noisy = logits + noise * torch.randn_like(logits)
        winner = noisy.argmax(-1)
        count += torch.bincount(winner, minlength=3)
        rival = torch.stack([noisy[:, [j for j in range(3) if j != i]].amax(-1) for i in range(3)], -1)
        estimate += torch.special.ndtr((logits - rival) / noise).sum(0)
        expected = squared_coefficient_of_variation(alpha * logits.softmax(-1).sum(0)) + (
            squared_coefficient_of_variation(alpha * torch.special.ndtr((logits - rival) / noise).sum(0))
        )
        if _ < 3:
            torch.testing.assert_close(balance_loss(logits, winner, alpha, noisy, noise), expected)
    # Shazeer et al. call it a smooth estimator of the load: its mean is the mean number of tokens.
    torch.testing.assert_close(estimate / draws, count / draws, rtol=0.02, atol=1.0)


def test_the_slower_an_expert_is_declared_the_fewer_tokens_it_gets() -> None:
    x = torch.randn(512, 8)
    shares = []
    for latency in (0.25, 0.5, 1.0, 2.0, 4.0):
        torch.manual_seed(0)
        layer = MoELinear(8, 8, latencies=(latency, 1.0))
        optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.02)
        for _ in range(250):
            optimizer.zero_grad()
            layer(x)
            collect_moe_losses(layer).backward()
            optimizer.step()
        layer.eval()(x)
        shares.append(layer.last_shares[0].item())
    assert all(slower < faster for faster, slower in itertools.pairwise(shares)), shares
    for latency, share in zip((0.25, 0.5, 1.0, 2.0, 4.0), shares, strict=True):
        assert share == pytest.approx(1 / (1 + latency), abs=0.04)


def test_three_experts_share_tokens_by_their_inverse_latencies() -> None:
    latencies = (4.0, 2.0, 1.0)
    layer = MoE([nn.Linear(8, 8) for _ in latencies], 8, latencies=latencies)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.02)
    x = torch.randn(512, 8)
    for _ in range(250):
        optimizer.zero_grad()
        layer(x)
        collect_moe_losses(layer).backward()
        optimizer.step()
    layer.eval()(x)
    assert layer.last_shares.tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=0.04)


def test_losses_gather_over_passes_until_they_are_collected() -> None:
    model = nn.Sequential(MoELinear(4, 4), nn.ReLU(), MoELinear(4, 4))
    x = torch.randn(10, 4)
    assert collect_moe_losses(model).item() == 0
    model(x)
    model(x)
    mean = collect_moe_losses(model, reset=False)
    total = collect_moe_losses(model, reduction="sum")
    torch.testing.assert_close(total, mean * 4)
    assert total.requires_grad and collect_moe_losses(model).item() == 0
    total.backward()
    with torch.no_grad():
        model(x)
    assert collect_moe_losses(model).item() == 0
    model(x)
    model.eval()
    model(x)
    assert collect_moe_losses(model).item() == 0
    assert collect_moe_losses(nn.Linear(2, 2)).item() == 0


def test_losses_that_nobody_collects_are_let_go_with_a_warning() -> None:
    layer = MoELinear(2, 2)
    for _ in range(256):
        layer(torch.ones(1, 2))
    with pytest.warns(UserWarning, match="collect_moe_losses"):
        layer(torch.ones(1, 2))
    assert len(layer.take_losses()) == 256


def test_a_pass_that_checkpointing_repeats_counts_once() -> None:
    layer = MoELinear(4, 4, noise=0.0)
    x = torch.randn(6, 4, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    (out.sum() + collect_moe_losses(layer)).backward()
    assert collect_moe_losses(layer).item() == 0 and x.grad is not None
    assert sum(layer.token_counts) == 6


def test_reentrant_checkpointing_is_said_to_lose_the_loss() -> None:
    layer = MoELinear(4, 4)
    x = torch.randn(6, 4, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
    assert not collect_moe_losses(layer).requires_grad
    with pytest.warns(UserWarning, match="use_reentrant=False"):
        out.sum().backward()
    assert sum(layer.token_counts) == 6


def test_mixtures_made_without_storage_have_the_loss_of_others() -> None:
    with torch.device("meta"):
        layer = MoELinear(6, 4, noise=0.0, latencies=(3, 1))
    layer.to_empty(device="cpu")
    other = MoELinear(6, 4, noise=0.0, latencies=(3, 1))
    layer.load_state_dict(other.state_dict())
    x = torch.randn(20, 6)
    layer(x), other(x)
    assert torch.equal(collect_moe_losses(layer), collect_moe_losses(other))


def test_a_single_token_needs_no_batch() -> None:
    layer, x = MoELinear(6, 4).eval(), torch.randn(6)
    assert torch.equal(layer(x), layer(x.unsqueeze(0))[0])
    assert torch.equal(FrozenMoE(layer)(x), layer(x))


def test_statistics_by_layer_and_by_token() -> None:
    model = nn.ModuleDict({"a": MoEMlp(4, 8, latencies=(3, 1)), "b": nn.Linear(4, 4)}).eval()
    x = torch.randn(2, 5, 4)
    model["a"](x)
    model["a"](x)
    assert model["a"].last_assignment.shape == (2, 5)
    (name, entry), *rest = router_statistics(model).items()
    assert name == "a" and not rest
    assert entry["experts"] == ["mult", "shift"] and entry["latencies"] == [3.0, 1.0]
    assert sum(entry["tokens"]) == 20 and sum(entry["shares"]) == pytest.approx(1)
    assert entry["last_shares"][1] == pytest.approx(model["a"].last_assignment.float().mean().item())
    reset_router_statistics(model)
    assert router_statistics(model)["a"]["tokens"] == [0, 0]


def test_noise_is_for_training_only() -> None:
    layer = MoELinear(4, 4, noise=5.0)
    x = torch.randn(200, 4)
    layer(x)
    first = layer.last_assignment
    layer(x)
    assert not torch.equal(layer.last_assignment, first)
    layer.eval()(x)
    assert torch.equal(layer.last_assignment, layer.router(x).argmax(-1))


def test_converted_layers_carry_weights_and_flags_over() -> None:
    linear = nn.Linear(6, 3).double().eval()
    layer = MoELinear.from_linear(linear, shift={"bits": 5})
    assert layer.experts[0] is linear and layer.experts[1].bits == 5
    assert not layer.training and layer.router.weight.dtype == torch.float64
    mlp = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
    mixture = MoEMlp.from_mlp(mlp)
    assert mixture.experts[0] is mlp and mixture.dim == 6
    assert [type(m) for m in mixture.experts[1]] == [ShiftLinear, nn.GELU, ShiftLinear]
    assert torch.equal(mixture.experts[1][2].weight, mlp[2].weight)
    assert mixture.experts[1][2].weight is not mlp[2].weight


def test_deepcopy_and_state_dict_round_trip() -> None:
    layer = MoEMlp(4, 8, latencies=(2, 1))
    x = torch.randn(3, 5, 4)
    layer(x)
    copied = copy.deepcopy(layer)
    assert collect_moe_losses(copied).item() == 0 and collect_moe_losses(layer).item() > 0
    assert set(layer.state_dict()) == {
        *(f"experts.{i}.{fc}.{p}" for i in range(2) for fc in ("fc1", "fc2") for p in ("weight", "bias")),
        "router.weight",
        "router.bias",
    }
    other = MoEMlp(4, 8)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x), layer.eval()(x)) and torch.equal(copied.eval()(x), layer(x))


def test_bf16_autocast_and_compile() -> None:
    layer = MoEMlp(8, 16)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert out.dtype == torch.bfloat16
        (out.float().sum() + collect_moe_losses(layer)).backward()
    assert layer.router.weight.grad.dtype == torch.float32
    layer.eval()
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x))


def test_latencies_are_measured_once_and_tell_slow_from_fast() -> None:
    class Slow(nn.Linear):
        def forward(self, x):
            for _ in range(20):
                super().forward(x)
            return super().forward(x)

    experts = [Slow(32, 32), nn.Linear(32, 32)]
    experts[0].eval()
    slow, fast = measure_latencies(experts, torch.randn(512, 32))
    assert slow > 3 * fast > 0
    assert not experts[0].training and experts[1].training
    layer = MoE(experts, 32, latencies="measure")
    layer(torch.randn(512, 32))
    measured = layer.latencies
    assert measured[0] > 3 * measured[1]
    layer(torch.randn(512, 32))
    assert layer.latencies == measured


def test_mixtures_that_are_alike_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from shiftadd3d.nn import moe

    measured = []

    def measure(experts, tokens):
        measured.append(tokens.shape)
        return tuple(float(len(measured) + i) for i in range(len(experts)))

    monkeypatch.setattr(moe, "_measured", {})
    monkeypatch.setattr(moe, "measure_latencies", measure)
    layers = nn.Sequential(*(MoELinear(8, 8, latencies="measure") for _ in range(12)))
    layers(torch.randn(5, 8))
    assert measured == [(5, 8)] and {layer.latencies for layer in layers} == {(1.0, 2.0)}
    MoELinear(8, 8, latencies="measure")(torch.randn(5, 8))
    assert len(measured) == 1
    # Another number of tokens, other sizes, codes, dtypes or classes take other times.
    MoELinear(8, 8, latencies="measure")(torch.randn(6, 8))
    MoELinear(8, 4, latencies="measure")(torch.randn(5, 8))
    MoELinear(8, 8, shift={"terms": 2}, latencies="measure")(torch.randn(5, 8))
    MoELinear(8, 8, latencies="measure").double()(torch.randn(5, 8, dtype=torch.float64))
    MoE([nn.Linear(8, 8), nn.Identity()], 8, latencies="measure")(torch.randn(5, 8))
    with torch.autocast("cpu", torch.bfloat16):
        MoELinear(8, 8, latencies="measure")(torch.randn(5, 8))
    assert len(measured) == 7
    # Long batches are cut: what counts is the ratio.
    MoELinear(8, 8, latencies="measure")(torch.randn(5000, 8))
    assert measured[-1] == (4096, 8)


def test_latencies_given_later_are_not_measured_any_more() -> None:
    layer = MoELinear(4, 4, latencies="measure")
    layer.set_latencies((2, 1))
    layer(torch.randn(3, 4))
    assert layer.latencies == (2.0, 1.0)


def test_a_high_temperature_makes_probabilities_even() -> None:
    x = torch.randn(300, 4)
    layer = MoELinear(4, 4, noise=0.5)
    with torch.no_grad():
        layer.router.weight.mul_(10)
    cold, assignment, _ = layer.route(x)
    noisy_share = (layer.route(x)[1] == assignment).float().mean()
    layer.temperature = 100.0
    hot, _, _ = layer.route(x)
    torch.testing.assert_close(hot, cold / 100)
    assert (hot.softmax(-1) - 0.5).abs().max() < 0.2 < (cold.softmax(-1) - 0.5).abs().max()
    # Next to logits this small the noise decides.
    assert (layer.route(x)[1] == assignment).float().mean() < 0.75 < noisy_share
    assert torch.equal(layer.eval().route(x)[1], hot.argmax(-1))


@pytest.mark.parametrize("gate", ["unit", "probability"])
def test_a_frozen_mixture_computes_what_the_mixture_does_in_evaluation(gate: str) -> None:
    layer = MoEMlp(6, 12, gate=gate, temperature=3.0).eval()
    x = torch.randn(4, 5, 6)
    expected, assignment = layer(x), layer.last_assignment
    frozen = FrozenMoE(layer)
    assert torch.equal(frozen(x), expected) and frozen.last_assignment is None
    frozen.keep_assignment = True
    frozen(x)
    assert torch.equal(frozen.last_assignment, assignment)
    assert layer.state_dict().keys() == frozen.state_dict().keys()
    frozen.train()
    assert torch.equal(frozen(x), expected) and collect_moe_losses(frozen).item() == 0
    assert frozen(torch.empty(0, 6)).shape == (0, 6)


@pytest.mark.parametrize("make", [MoELinear, MoEMlp])
@pytest.mark.parametrize("gate", ["unit", "probability"])
def test_on_a_cpu_one_kernel_computes_a_frozen_mixture(make, gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(make(6, 12, gate=gate, temperature=3.0))
    x = torch.randn(4, 25, 6)
    freeze_(model, verbose=False)
    frozen = model[0]
    frozen.keep_assignment = True
    with torch.no_grad():
        expected, assignment = frozen(x), frozen.last_assignment
        monkeypatch.setattr("shiftadd3d.nn.moe.dispatch", lambda *_: pytest.fail("dispatch in plain torch"))
        with numerics("exact"):
            torch.testing.assert_close(frozen(x), expected)
            assert torch.equal(frozen.last_assignment, assignment) and 0 < assignment.float().mean() < 1
            frozen.keep_assignment = False
            torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
            program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(program.module()(x[:3]), expected[:3])


def test_mixtures_that_no_kernel_knows_run_as_they_are() -> None:
    for experts in ([nn.Linear(6, 6), nn.Identity()], [PackedShiftLinear(6, 6), PackedShiftLinear(6, 6, bits=5)]):
        frozen = FrozenMoE(MoE(experts, 6).eval())
        x = torch.randn(9, 6)
        with torch.no_grad():
            expected = frozen(x)
            with numerics("exact"):
                torch.testing.assert_close(frozen(x), expected)
    watched, seen = FrozenMoE(MoELinear(6, 6).eval()), []
    watched.experts[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad(), numerics("exact"):
        watched(x)
    assert seen


def test_any_module_can_be_an_expert() -> None:
    layer = MoE([nn.Linear(4, 4), ShiftLinear(4, 4), PackedShiftLinear(4, 4), nn.Identity()], 4, names="abcd")
    assert layer(torch.randn(20, 4)).shape == (20, 4)
    assert layer.expert_names == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoE([], 4), "at least one"),
        (lambda: MoELinear(4, 4, gate="prob"), "unit, probability"),
        (lambda: MoELinear(4, 4, noise=-1.0), "negative"),
        (lambda: MoELinear(4, 4, noise=math.nan), "negative"),
        (lambda: MoELinear(4, 4, temperature=0.0), "temperature must be positive and finite, got 0"),
        (lambda: MoELinear(4, 4, latencies=(1.0,)), "as many latencies"),
        (lambda: MoELinear(4, 4, latencies=(1.0, 0.0)), "positive"),
        (lambda: MoELinear(4, 4, latencies="guess"), "'measure'"),
        (lambda: MoE([nn.Identity()], 4, names=["a", "b"]), "as many names"),
        (lambda: MoELinear(4, 4)(torch.ones(2, 5)), r"the mixture takes tokens \[..., 4\], not \[2, 5\]"),
        (lambda: FrozenMoE(MoELinear(4, 4))(torch.ones(2, 5)), r"tokens \[..., 4\], not \[2, 5\]"),
        (lambda: MoEMlp.from_mlp(nn.ReLU()), "no linear layer"),
        (lambda: collect_moe_losses(nn.ReLU(), reduction="max"), "mean or sum"),
    ],
)
def test_wrong_arguments_name_what_would_be_right(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
