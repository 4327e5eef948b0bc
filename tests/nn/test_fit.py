"""`fit_binarizers_`, `fit_contrast_` and `fit_attention_` on a small stack of attention layers."""

# Wrong arguments on purpose, and attributes of submodules, to which torch gives no types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shiftadd3d import UserError
from shiftadd3d.nn import AddAttention, HashBinarizer, fit_attention_, fit_binarizers_, fit_contrast_


class Block(nn.Module):
    def __init__(self, binarizer: str = "hash", **options) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attn = AddAttention(16, 2, binarizer=binarizer, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attn(self.norm(x))


def stack(**options) -> nn.Module:
    """Two blocks whose projections are large enough for the softmax to be far from flat."""
    model = nn.Sequential(Block(**options), Block(**options))
    for block in model:
        block.attn.q_fc.weight.data *= 4
        block.attn.k_fc.weight.data *= 4
    return model


def softmax_attention(attn: AddAttention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (attn.split_heads(fc(x)) for fc in (attn.q_fc, attn.k_fc, attn.v_fc))
    return attn.out_fc(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.fixture
def fitted_to(monkeypatch: pytest.MonkeyPatch) -> list:
    """The samples that hash functions are fitted to, layer by layer."""
    samples = []
    fit = HashBinarizer.fit

    def spy(self, q, k, keys=None):
        samples.append((q, k))
        fit(self, q, k, keys)

    monkeypatch.setattr(HashBinarizer, "fit", spy)
    return samples


@pytest.mark.parametrize("share", [False, True])
def test_the_codes_of_every_layer_follow_its_softmax_better(share: bool) -> None:
    model = stack(share_codes=share)
    report = fit_binarizers_(model, torch.randn(4, 8, 12, 16).unbind(), verbose=False)
    assert [layer.name for layer in report.layers] == ["0.attn", "1.attn"] and not report.unreached
    for layer in report.layers:
        assert layer.code_dim == 8 and layer.after > layer.before + 0.05


def test_layers_see_what_the_softmax_model_saw(fitted_to: list) -> None:
    model, x = stack(), torch.randn(3, 12, 16)
    fit_binarizers_(model, [x], verbose=False)
    with torch.no_grad():
        for block, (q, k) in zip(model, fitted_to, strict=True):
            seen = block.norm(x)
            for tokens, fc in ((q, block.attn.q_fc), (k, block.attn.k_fc)):
                # All there are, sequences and tokens in another order.
                expected = block.attn.split_heads(fc(seen)).transpose(0, 1).flatten(1, 2)
                torch.testing.assert_close(
                    tokens.transpose(0, 1).flatten(1, 2).sort(1).values, expected.sort(1).values, rtol=1e-4, atol=1e-5
                )
            x = x + softmax_attention(block.attn, seen)


def test_a_model_tuned_since_is_run_as_it_is(fitted_to: list) -> None:
    model, x = stack(), torch.randn(3, 12, 16)
    with torch.no_grad():
        second = model[1].norm(model[0](x))
        expected = model[1].attn.split_heads(model[1].attn.q_fc(second)).mean()
    fit_binarizers_(model, [x], attention="add", verbose=False)
    torch.testing.assert_close(fitted_to[1][0].mean(), expected)


def test_masks_and_biases_count_in_the_softmax_pass(fitted_to: list) -> None:
    first, second = AddAttention(16, 2, binarizer="hash"), AddAttention(16, 2, binarizer="hash")
    x, mask = torch.randn(3, 12, 16), torch.rand(3, 12) < 0.6
    mask[:, 0] = True
    bias = torch.randn(2, 12, 12)
    fit_binarizers_(
        nn.ModuleList([first, second]),
        [x],
        forward=lambda _, batch: second(first(batch, True, mask, bias=bias)[0]),
        verbose=False,
    )
    with torch.no_grad():
        q, k, v = (first.split_heads(fc(x)) for fc in (first.q_fc, first.k_fc, first.v_fc))
        both = bias.masked_fill(~mask[:, None, None], -torch.inf)
        out = first.out_fc(F.scaled_dot_product_attention(q, k, v, both).transpose(1, 2).flatten(2))
        torch.testing.assert_close(fitted_to[1][0].mean(), first.split_heads(second.q_fc(out)).mean())


def test_the_model_is_left_as_it_was_but_for_the_hash_functions() -> None:
    model = stack(dwconv=3, dropout=0.5)
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    fit_binarizers_(model, [torch.randn(4, 20, 16)], verbose=False)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all("_code." in name for name in changed)
    assert model[0].training and not model[1].training
    assert not any("attend" in vars(module) for module in model.modules())
    assert torch.isfinite(copy.deepcopy(model)(torch.randn(2, 20, 16))).all()


def test_labelled_batches_and_sequences_of_changing_lengths() -> None:
    batches = [{"image": torch.randn(2, n, 16), "label": 1} for n in (12, 20, 300)]
    report = fit_binarizers_(stack(), batches, forward=lambda model, batch: model(batch["image"]), verbose=False)
    assert len(report.layers) == 2
    with pytest.raises(UserError, match="forward=lambda"):
        fit_binarizers_(stack(), batches, verbose=False)


def test_layers_that_no_batch_comes_by_are_listed(capsys: pytest.CaptureFixture) -> None:
    model = nn.ModuleDict({"used": Block(), "idle": Block(), "sign": Block("sign")})
    report = fit_binarizers_(model, [torch.randn(2, 9, 16)], forward=lambda m, x: m["used"](x))
    assert [layer.name for layer in report.layers] == ["used.attn"] and report.unreached == ("idle.attn",)
    printed = capsys.readouterr().out
    assert "used.attn" in printed and "never reached, left as they are: idle.attn" in printed
    assert json.loads(json.dumps(report.as_dict()))["layers"][0]["name"] == "used.attn"


def test_what_cannot_be_fitted_is_refused_and_nothing_changes() -> None:
    model = stack()
    before = copy.deepcopy(model.state_dict())
    for batches, options, message in (
        ([], {}, "no batches"),
        ([torch.full((1, 4, 16), math.nan)], {}, r"0\.attn are not all finite"),
        ([torch.randn(1, 4, 16)], {"attention": "angular"}, "softmax or add"),
    ):
        with pytest.raises(UserError, match=message):
            fit_binarizers_(model, batches, verbose=False, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("attend" in vars(module) for module in model.modules())
    with pytest.raises(UserError, match="binarizer='hash'"):
        fit_binarizers_(stack(binarizer="sign"), [torch.randn(1, 4, 16)], verbose=False)


def contrasted(**options) -> nn.Module:
    return stack(binarizer="sign", contrast=16.0, **options)


def test_contrast_brings_outputs_as_close_to_the_softmax_as_a_factor_can() -> None:
    torch.manual_seed(0)
    model, x = contrasted(), torch.randn(6, 12, 16)
    with torch.no_grad():
        model[0].attn.log_contrast.copy_(torch.tensor([2.0, 5.0]).log())
    reference = copy.deepcopy(model)
    report = fit_contrast_(model, list(x.split(2)), verbose=False)
    seen = x
    for block, old, layer in zip(model, reference, report.layers, strict=True):
        with torch.no_grad():
            q, k, v = (
                block.attn.split_heads(fc(block.norm(seen)))
                for fc in (block.attn.q_fc, block.attn.k_fc, block.attn.v_fc)
            )
            mean, softmax = v.mean(-2, keepdim=True), F.scaled_dot_product_attention(q, k, v)
            old.attn.log_contrast = None
            moved = (old.attn.attend(q, k, v)[0] - mean).transpose(0, 1).flatten(1)
            wanted = (softmax - mean).transpose(0, 1).flatten(1)
            best = torch.stack(
                [torch.linalg.lstsq(m[:, None], w[:, None]).solution[0, 0] for m, w in zip(moved, wanted, strict=True)]
            )
            torch.testing.assert_close(block.attn.log_contrast.exp(), best, rtol=1e-4, atol=1e-4)
            error = (best[:, None] * moved - wanted).norm() / wanted.norm()
            assert layer.error_after == pytest.approx(float(error), rel=1e-3) and layer.error_after < layer.error_before
            assert layer.after == pytest.approx(float(best.log().mean().exp()), rel=1e-3)
            seen = seen + softmax_attention(block.attn, block.norm(seen))


def test_contrast_is_fitted_under_masks_and_biases_and_again_changes_nothing() -> None:
    layer = AddAttention(16, 2, contrast=9.0)
    x, mask, bias = torch.randn(3, 12, 16), torch.rand(3, 12) < 0.6, torch.randn(2, 12, 12) / 9
    mask[:, 0] = True
    options = {"forward": lambda m, batch: m(batch, mask=mask, bias=bias), "verbose": False}
    first = fit_contrast_(layer, [x], **options).layers[0]
    found = layer.log_contrast.detach().clone()
    again = fit_contrast_(layer, [x], **options).layers[0]
    torch.testing.assert_close(layer.log_contrast.detach(), found, rtol=1e-4, atol=1e-4)
    assert again.before == pytest.approx(first.after) and again.error_before == pytest.approx(
        first.error_after, rel=1e-3
    )


def test_heads_whose_values_are_all_alike_keep_their_contrast_and_none_is_extreme() -> None:
    layer = AddAttention(16, 2, contrast=9.0)
    report = fit_contrast_(layer, [torch.randn(3, 1, 16)], verbose=False)
    torch.testing.assert_close(layer.log_contrast.exp(), torch.full((2,), 9.0))
    assert report.layers[0].error_after == 0
    # Tokens that are all alike: what is left is rounding, and contrast multiplies it.
    alike = torch.randn(3, 1, 16).expand(3, 7, 16)
    report = fit_contrast_(layer, [alike], verbose=False)
    torch.testing.assert_close(layer.log_contrast.exp(), torch.full((2,), 9.0))
    assert report.layers[0].error_after == 0
    layer.q_fc.weight.data *= 1e-4  # the softmax is flat then
    fit_contrast_(layer, [torch.randn(3, 20, 16)], verbose=False)
    torch.testing.assert_close(layer.log_contrast.exp(), torch.full((2,), 0.25))


def test_only_contrast_changes_and_what_cannot_be_fitted_is_refused(capsys: pytest.CaptureFixture) -> None:
    model = nn.ModuleDict({"used": Block("sign", contrast=4.0), "idle": Block("sign", contrast=4.0)})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"what used\.attn sees is not all finite"):
        fit_contrast_(model, [torch.full((1, 4, 16), math.inf)], forward=lambda m, x: m["used"](x), verbose=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    report = fit_contrast_(model, [torch.randn(2, 9, 16)], forward=lambda m, x: m["used"](x))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"used.attn.log_contrast"} and report.unreached == ("idle.attn",)
    assert model.training and not any("attend" in vars(module) for module in model.modules())
    printed = capsys.readouterr().out
    assert "contrast of 1 attention layers fitted" in printed and "left as they are: idle.attn" in printed
    with pytest.raises(UserError, match="no contrast to fit"):
        fit_contrast_(stack(), [torch.randn(1, 4, 16)], verbose=False)


def test_every_attention_learns_by_itself_what_its_softmax_put_out() -> None:
    torch.manual_seed(0)
    model, x = stack(binarizer="sign", dwconv=3), torch.randn(32, 12, 16)
    reference = copy.deepcopy(model)
    report = fit_attention_(model, list(x.split(8)), steps=60, verbose=False)
    assert [layer.name for layer in report.layers] == ["0.attn", "1.attn"]
    seen = x
    for block, old, layer in zip(model, reference, report.layers, strict=True):
        with torch.no_grad():
            normed = block.norm(seen)
            wanted = softmax_attention(old.attn, normed)
            scale = (wanted - wanted.flatten(0, 1).mean(0)).norm()
            before, after = ((attn(normed) - wanted).norm() / scale for attn in (old.attn, block.attn))
            assert layer.error_before == pytest.approx(float(before), rel=1e-3)
            assert layer.error_after == pytest.approx(float(after), rel=1e-3)
            assert layer.error_after < 0.97 * layer.error_before
            seen = block(seen)  # the second layer is fitted on what the first one puts out now


def test_fitting_attention_leaves_all_else_as_it_was(capsys: pytest.CaptureFixture) -> None:
    model = nn.ModuleDict({"used": Block("sign", contrast=4.0, dwconv=3), "idle": Block("sign")})
    model["used"].attn.q_fc.weight.requires_grad_(False)
    gradient = model["used"].attn.out_fc.weight.grad = torch.ones(16, 16)
    before = copy.deepcopy(model.state_dict())
    report = fit_attention_(model, [torch.randn(8, 9, 16)], steps=20, forward=lambda m, x: m["used"](x))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith("used.attn.")}
    assert report.unreached == ("idle.attn",)
    assert model.training and not any("attend" in vars(module) for module in model.modules())
    assert not model["used"].attn.q_fc.weight.requires_grad and model["used"].attn.k_fc.weight.requires_grad
    assert model["used"].attn.out_fc.weight.grad is gradient and torch.equal(gradient, torch.ones(16, 16))
    printed = " ".join(capsys.readouterr().out.split())
    assert "all weights of 1 attention layers fitted" in printed and "left as they are: idle.attn" in printed


def test_attention_that_training_makes_worse_is_left_as_it_was() -> None:
    model, x = stack(binarizer="sign"), torch.randn(8, 12, 16)
    before = copy.deepcopy(model.state_dict())
    report = fit_attention_(model, [x], steps=3, rate=1e3, verbose=False)
    assert all(layer.error_after == layer.error_before for layer in report.layers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_attention_of_one_key_has_nothing_to_learn() -> None:
    report = fit_attention_(AddAttention(16, 2), [torch.zeros(3, 1, 16)], steps=2, verbose=False)
    assert report.layers[0].error_after == 0


def test_attention_that_cannot_be_fitted_is_refused_and_nothing_changes() -> None:
    model = stack(binarizer="sign")
    before = copy.deepcopy(model.state_dict())
    for batches, options, message in (
        ([], {}, "no batches"),
        ([torch.full((1, 4, 16), math.nan)], {}, "0.attn are not all finite"),
        ([torch.randn(1, 4, 16)], {"steps": 0}, "steps 0"),
        ([torch.randn(1, 4, 16)], {"rate": -1.0}, "rate -1"),
    ):
        with pytest.raises(UserError, match=message):
            fit_attention_(model, batches, verbose=False, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match="no additive attention"):
        fit_attention_(nn.Linear(3, 3), [torch.randn(2, 3)], verbose=False)
