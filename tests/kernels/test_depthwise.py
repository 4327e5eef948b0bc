"""Depthwise convolution of tokens on a grid: the kernel against its twin, and the twin against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftadd3d import UserError
from shiftadd3d.kernels import numerics
from shiftadd3d.kernels.cpu.depthwise import DEPTHWISE_CONV
from shiftadd3d.kernels.ops.depthwise import depthwise_conv
from shiftadd3d.kernels.reference.depthwise import depthwise_conv_twin
from shiftadd3d.kernels.runtime import targets


def problem(
    batch: int = 2,
    grid: tuple[int, int] = (5, 9),
    channels: int = 20,
    prefix: int = 0,
    size: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return draw(batch, prefix + grid[0] * grid[1], channels), draw(channels, 1, size, size), draw(channels)


def assert_same(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.dtype == expected.dtype
    rtol, atol = (2e-2, 2e-2) if out.dtype == torch.bfloat16 else (1e-5, 2e-5)
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)


def test_tokens_are_the_pixels_of_an_image():
    x, weight, bias = problem()
    image = F.conv2d(x.mT.unflatten(-1, (5, 9)), weight, bias, padding=1, groups=20)
    assert_same(depthwise_conv(x, weight, bias, 5, 9, "gelu"), F.gelu(image).flatten(2).mT)


@settings(max_examples=20, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 15),
    channels=st.integers(1, 70),
    prefix=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_the_kernel_computes_what_the_twin_does(height: int, width: int, channels: int, prefix: int, seed: int):
    x, weight, bias = problem(2, (height, width), channels, prefix, seed=seed)
    expected = depthwise_conv_twin(x, weight, bias, height, width, "gelu")
    assert_same(depthwise_conv(x, weight, bias, height, width, "gelu"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_sizes_of_kernels_dtypes_and_threads(dtype: torch.dtype, size: int, torch_threads: int):
    x, weight, bias = problem(size=size, dtype=dtype)
    expected = depthwise_conv_twin(x.float(), weight.float(), bias.float(), 5, 9, "relu").to(dtype)
    assert_same(depthwise_conv(x, weight, bias, 5, 9, "relu"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_twin_serves_other_dtypes(dtype: torch.dtype):
    x, weight, bias = problem(dtype=dtype)
    assert torch.equal(depthwise_conv(x, weight, bias, 5, 9), depthwise_conv_twin(x, weight, bias, 5, 9))


def test_tokens_before_the_grid_get_the_addend_alone_and_no_neighbour_sees_them():
    x, weight, _ = problem(prefix=2)
    addend = torch.randn_like(x)
    out = depthwise_conv(x, weight, None, 5, 9, addend=addend)
    assert torch.equal(out[:, :2], addend[:, :2])
    x[:, :2] = torch.nan
    assert torch.equal(depthwise_conv(x, weight, None, 5, 9, addend=addend), out)
    assert bool((depthwise_conv(x, weight, None, 5, 9, "gelu")[:, :2] == 0).all())


def test_slices_of_a_wider_tensor_are_read_where_they_are():
    wide, weight, bias = problem(channels=60)
    x, addend = wide[..., 40:], wide[..., :20]
    assert not x.is_contiguous()
    weight, bias = weight[:20], bias[:20]
    assert_same(
        depthwise_conv(x, weight, bias, 5, 9, "none", addend),
        depthwise_conv_twin(x, weight, bias, 5, 9, "none", addend),
    )
    turned = x.mT.contiguous().mT  # channels far apart
    assert_same(depthwise_conv(turned, weight, bias, 5, 9), depthwise_conv(x, weight, bias, 5, 9))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_to_neighbours_only(bad: float):
    x, weight, bias = problem()
    x[0, 2 * 9 + 4] = bad
    touched = ~depthwise_conv(x, weight, bias, 5, 9).isfinite().all(-1)
    rows, columns = touched[0].view(5, 9).nonzero(as_tuple=True)
    assert not touched[1].any() and touched[0].sum() == 9
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 3, 3, 5)


def test_no_images_give_none():
    x, weight, bias = problem()
    assert depthwise_conv(x[:0], weight, bias, 5, 9).shape == (0, 45, 20)


def test_numerics_twin_is_plain_torch():
    x, weight, bias = problem()
    with numerics("twin"):
        out = depthwise_conv(x, weight, bias, 5, 9, "gelu")
    assert torch.equal(out, depthwise_conv_twin(x, weight, bias, 5, 9, "gelu"))


def test_compiled_models_see_through_it():
    x, weight, bias = problem()

    def model(x: torch.Tensor) -> torch.Tensor:
        return depthwise_conv(x * 2.0, weight, bias, 5, 9, "gelu").sum(-1)

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(45, 20)}, r"x must be floating point \[B, tokens, C\]"),
        ({"x": torch.zeros(2, 45, 20, dtype=torch.int32)}, "x must be floating point"),
        ({"weight": torch.zeros(20, 20, 3, 3)}, r"weight must be \[20, 1, k, k\]"),
        ({"weight": torch.zeros(20, 1, 2, 2)}, "must be odd, not 2"),
        ({"bias": torch.zeros(3)}, r"bias must be \[20\]"),
        ({"height": 6}, "45 tokens are too few for a grid of 6 x 9"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"addend": torch.zeros(2, 45, 1)}, r"the addend must be float32 \[2, 45, .*\], like x, not"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict, message: str):
    x, weight, bias = problem()
    arguments = {"x": x, "weight": weight, "bias": bias, "height": 5, "width": 9} | change
    with pytest.raises(UserError, match=message):
        depthwise_conv(**arguments)


def test_sums_stay_in_registers_on_avx_512():
    spec = {"dtype": "float32", "kernel_size": 3, "activation": "gelu", "added": False}
    assert "zmm" in DEPTHWISE_CONV.assembly(targets.find("avx512"), **spec)
