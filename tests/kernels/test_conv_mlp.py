"""The perceptron with a depthwise convolution in it: the op against its twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftadd3d import UserError
from shiftadd3d.kernels.ops import conv_mlp
from shiftadd3d.kernels.ops.conv_mlp import shift_conv_mlp
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.reference.conv_mlp import shift_conv_mlp_twin


def problem(
    batch: int = 3, grid: tuple[int, int] = (5, 6), sizes: tuple[int, int, int] = (12, 40, 20), bits: int = 4
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def layer(inputs: int, outputs: int) -> tuple[torch.Tensor, ...]:
        codes, offset, _ = power_of_two.encode(draw(outputs, inputs) / inputs**0.5, bits, 1)
        return power_of_two.pack(codes, bits), offset, draw(outputs)

    inputs, hidden, outputs = sizes
    x = draw(batch, grid[0] * grid[1], inputs)
    return x, *layer(inputs, hidden), draw(hidden, 1, 3, 3) / 3, draw(hidden), *layer(hidden, outputs)


def assert_same(out: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 5e-2 if out.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out, expected.to(out.dtype), rtol=tolerance, atol=tolerance)


@settings(max_examples=10, deadline=None)
@given(batch=st.integers(0, 4), height=st.integers(1, 8), width=st.integers(1, 8), hidden=st.integers(1, 50))
def test_it_computes_what_the_twin_does(batch: int, height: int, width: int, hidden: int):
    arguments = problem(batch, (height, width), (12, hidden, 20))
    assert_same(shift_conv_mlp(*arguments, height, width), shift_conv_mlp_twin(*arguments, height, width))


@pytest.mark.parametrize("images", [0, 1, 2, 3])
def test_images_may_take_turns(images: int, torch_threads: int, monkeypatch: pytest.MonkeyPatch):
    arguments = problem()
    expected = shift_conv_mlp_twin(*arguments, 5, 6)
    monkeypatch.setattr(conv_mlp, "_HIDDEN_BYTES", images * 30 * 40 * 4)
    assert_same(shift_conv_mlp(*arguments, 5, 6), expected)


def test_other_formats_dtypes_and_activations():
    arguments = problem(bits=5)
    assert_same(shift_conv_mlp(*arguments, 5, 6, 5, "relu"), shift_conv_mlp_twin(*arguments, 5, 6, 5, "relu"))
    x, *rest = problem()
    out = shift_conv_mlp(x.bfloat16(), *rest, 5, 6)
    assert out.dtype == torch.bfloat16
    assert_same(out, shift_conv_mlp_twin(x, *rest, 5, 6))


def test_compiled_models_see_through_it():
    x, *rest = problem()

    def model(x: torch.Tensor) -> torch.Tensor:
        return shift_conv_mlp(x * 2.0, *rest, 5, 6).sum(-1)

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_arguments_that_do_not_fit_are_refused():
    x, *rest = problem()
    with pytest.raises(UserError, match="x must be floating point"):
        shift_conv_mlp(x.int(), *rest, 5, 6)
    with pytest.raises(UserError, match="30 tokens are too few for a grid of 6 x 6"):
        shift_conv_mlp(x, *rest, 6, 6)
    with pytest.raises(UserError, match="inputs, but rows of"):
        shift_conv_mlp(x[..., :7], *rest, 5, 6)
