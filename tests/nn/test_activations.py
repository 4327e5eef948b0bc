"""Running a model over batches, and seeing what its layers see."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shiftadd3d import UserError
from shiftadd3d.nn import MoELinear
from shiftadd3d.nn.activations import (
    as_batches,
    call_model,
    evaluating,
    gather_statistics,
    input_rows,
    trace_inputs,
    watching,
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_fc, self.k_fc, self.v_fc, self.out_fc, self.unused = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x, scale=1.0):
        x = x * scale
        attended = self.out_fc(F.scaled_dot_product_attention(self.q_fc(x), self.k_fc(x), self.v_fc(x)))
        return self.out_fc(attended)  # twice


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_batches_may_be_a_tensor_a_tuple_or_a_mapping_each_or_anything_with_a_forward() -> None:
    model, x = Attention(), torch.randn(2, 3, 4)
    wanted = model(x, 2.0)
    assert torch.equal(call_model(model, x), model(x))
    assert torch.equal(call_model(model, (x, 2.0)), wanted)
    assert torch.equal(call_model(model, {"x": x, "scale": 2.0}), wanted)
    assert torch.equal(call_model(model, {"image": x}, lambda model, batch: model(batch["image"], 2.0)), wanted)


def test_a_call_that_does_not_fit_says_how_to_help() -> None:
    with pytest.raises(UserError, match=r"Attention cannot be called with this batch .*; say how by forward="):
        call_model(Attention(), (torch.randn(2, 3, 4), 1.0, torch.zeros(2)))


@pytest.mark.parametrize("batches", [[], iter(())])
def test_no_batches_are_refused(batches) -> None:
    with pytest.raises(UserError, match="there are no batches"):
        as_batches(batches)


@pytest.mark.parametrize("batches", [torch.randn(2, 3), {"x": torch.randn(2, 3)}])
def test_one_batch_is_no_list_of_batches(batches) -> None:
    with pytest.raises(UserError, match="must be a list or another iterable of batches, not one"):
        as_batches(batches)


def test_the_trace_tells_the_order_the_calls_and_who_shares_an_input() -> None:
    model = Attention()
    trace = trace_inputs(model, linears(model), [torch.randn(2, 3, 4), torch.randn(1, 3, 4)])
    assert trace.groups == [["q_fc", "k_fc", "v_fc"], ["out_fc"]]
    assert [dict(calls) for calls in trace.calls] == [{"q_fc": 1, "k_fc": 1, "v_fc": 1, "out_fc": 2}] * 2


def test_statistics_are_the_moments_of_all_inputs_of_all_calls_and_batches() -> None:
    model, batches = Attention(), [torch.randn(2, 3, 4), torch.randn(5, 3, 4)]
    layers = {"out_fc": model.out_fc, "q_fc": model.q_fc}
    seen: list[torch.Tensor] = []
    hook = model.out_fc.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().reshape(-1, 4)))
    trace = trace_inputs(model, linears(model), batches)
    hook.remove()
    gathered = gather_statistics(model, layers, batches, trace)
    inputs = torch.cat(seen).double()
    assert gathered["out_fc"].rows == len(inputs) == 2 * 21 and gathered["q_fc"].rows == 21
    torch.testing.assert_close(gathered["out_fc"].mean, inputs.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        gathered["out_fc"].second_moments(centered=True), inputs.T.cov(correction=0), rtol=1e-5, atol=1e-6
    )


def test_a_pass_ends_once_all_has_been_seen() -> None:
    calls: list[str] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].register_forward_hook(lambda *_: calls.append("1"))
    trace = trace_inputs(model, linears(model), [torch.randn(3, 4)])
    calls.clear()
    gather_statistics(model, {"1": model[1]}, [torch.randn(3, 4)], trace)
    assert calls == []
    gather_statistics(model, {"1": model[1], "2": model[2]}, [torch.randn(3, 4)], trace)
    assert calls == ["1"]


def test_experts_see_every_token_whatever_the_router_says() -> None:
    model = nn.Sequential(nn.Linear(4, 4), MoELinear(4, 6)).eval()
    mixture = model[1]
    with torch.no_grad():
        mixture.router.bias.copy_(torch.tensor([100.0, -100.0]))  # all tokens to the first expert
    layers = {f"1.experts.{i}": mixture.experts[i] for i in range(2)}
    batches = [torch.randn(7, 4)]
    trace = trace_inputs(model, layers, batches)
    gathered = gather_statistics(model, layers, batches, trace)
    assert [gathered[name].rows for name in layers] == [7, 7]
    assert trace.groups == [list(layers)]


def test_broken_activations_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].bias[1] = math.inf
    with pytest.raises(UserError, match=r"the inputs of 2 are not all finite: 3 of 12 values in batch 1"):
        trace_inputs(model, {"2": model[2]}, [torch.zeros(0, 4), torch.zeros(3, 4)])  # an empty batch is none


def test_nothing_is_left_on_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), MoELinear(4, 4), nn.Dropout())
    model[2].eval()

    def fail(name, inputs):
        assert not any(module.training for module in model.modules())
        raise RuntimeError

    with pytest.raises(RuntimeError), evaluating(model), watching(model, {"0": model[0]}, fail):
        model(torch.randn(2, 4))
    assert model.training and model[1].experts[0].training and not model[2].training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_rows_of_a_convolution_are_its_patches() -> None:
    conv = nn.Conv2d(3, 5, kernel_size=2, stride=2, bias=False)
    images = torch.randn(2, 3, 6, 4)
    out = (input_rows(conv, images) @ conv.weight.flatten(1).T).view(2, -1, 5).transpose(1, 2).view(2, 5, 3, 2)
    torch.testing.assert_close(out, conv(images))
    torch.testing.assert_close(input_rows(conv, images[0]), input_rows(conv, images[:1]))
