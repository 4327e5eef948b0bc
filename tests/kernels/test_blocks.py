"""The blocks that kernels share, each in a function of its own, on the instructions of this machine."""

from __future__ import annotations

import pytest
import torch

from shiftadd3d.kernels.cpu import blocks
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.cpu.tile import ROW_PADDING, product
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime import tir as T


def compiled(build):
    """The function that `build(isa)` emits the arguments and statements of."""
    import tvm

    target = targets.current()
    with T.function("block") as function:
        build(Isa(target))
    module = tvm.IRModule({"block": function.get().with_attr("global_symbol", "block")})
    return tvm.compile(module, target=target.tvm_target())["block"]


@pytest.fixture(scope="module")
def softmax():
    """Rows of scores [rows, count] with room for vectors [rows, room], and their sums [rows]."""

    def build(isa: Isa) -> None:
        rows, room = T.sizes(2)
        scores, sums = T.argument("scores", (rows, room)), T.argument("sums", (rows,))
        count = T.scalar("count")
        with T.serial(rows) as row:
            sums[row] = blocks.softmax_of_row(isa, scores.part(row), count)

    return compiled(build)


@pytest.mark.parametrize("count", [1, 3, 4, 15, 16, 17, 40, 64])
def test_the_softmax_of_a_row_is_torchs_whatever_lies_behind_the_scores(softmax, count):
    scores = torch.randn(3, count + 32, generator=torch.Generator().manual_seed(count)) * 20
    scores[:, count:] = float("nan")
    scores[1, : count // 2] = -1e9  # as masked ones are
    expected, sums = scores[:, :count].softmax(-1), torch.empty(3)
    softmax(scores, sums, count)
    torch.testing.assert_close(scores[:, :count] / sums[:, None], expected, rtol=1e-5, atol=1e-7)
    assert not scores[1, : count // 2].any()  # not the least number there is, whose products are subnormal


@pytest.mark.parametrize("place", [0, 5, 18])
def test_nan_makes_the_whole_row_nan(softmax, place):
    scores, sums = torch.zeros(1, 64), torch.empty(1)
    scores[0, place] = float("nan")
    softmax(scores, sums, 19)
    assert (scores[:, :19] / sums[:, None]).isnan().all()


@pytest.mark.parametrize("width", [16, 35, 64])
def test_layer_norm_is_torchs_for_any_width(width):
    def build(isa: Isa) -> None:
        (rows,) = T.sizes(1)
        x, y = T.argument("x", (rows, width)), T.argument("y", (rows, width))
        blocks.layer_norm(isa, rows, width, lambda r, c: x[r, c], y, T.float32(1e-5))

    x = torch.randn(7, width, generator=torch.Generator().manual_seed(0)) * 3 + 100
    y = torch.empty_like(x)
    compiled(build)(x, y)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (width,)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vectors", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("rows", [1, 8, 13])
def test_a_product_is_torchs_for_all_widths_of_its_tiles_and_reads_no_row_beyond_the_last(vectors, rows):
    width, terms = vectors * targets.current().lanes, (5, 3)

    def build(isa: Isa) -> None:
        (padded,) = T.sizes(1)
        x = T.argument("x", (padded, sum(terms)))
        weight, bias = T.panel("weight", sum(terms), width), T.panel("bias", width)
        out, count = T.argument("out", (padded, width)), T.scalar("count")
        split = (terms[0], x, weight), (terms[1], lambda r, k: x[r, terms[0] + k], weight.below(terms[0]))
        product(isa, count, width, bias, split, out, isa.relu)

    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows + ROW_PADDING, 8, generator=generator), torch.randn(8, width, generator=generator)
    x[rows:] = 1e30  # what memory holds there must not count, not even as time: it may be subnormal
    bias, out = torch.randn(width, generator=generator), torch.zeros(rows + ROW_PADDING, width)
    compiled(build)(x, weight, bias, out, rows)
    torch.testing.assert_close(out[:rows], (x @ weight + bias).relu()[:rows], rtol=1e-5, atol=1e-5)
    beyond = out[rows:]
    assert ((beyond == out[rows - 1]) | (beyond == 0.0)).all()  # copies of the last row, up to the end of its tile


@pytest.fixture(scope="module")
def coarse_gelu():
    """Of numbers, as many as vectors hold."""

    def build(isa: Isa) -> None:
        (count,) = T.sizes(1)
        x, y = T.argument("x", (count,)), T.argument("y", (count,))
        with T.serial(count // isa.lanes) as part:
            at = isa.at(part * isa.lanes)
            y[at] = blocks.activate(isa, "gelu", T.bind(x[at]), coarse=True)

    return compiled(build)


def test_a_coarse_gelu_is_as_near_as_it_says(coarse_gelu):
    x = torch.cat([torch.linspace(-6, 6, 120_000), torch.linspace(-100, 100, 16_000)])
    y = torch.empty_like(x)
    coarse_gelu(x, y)
    error = (y.double() - torch.nn.functional.gelu(x.double())).abs().max()
    assert blocks.COARSE_GELU_ERROR / 2 < error <= blocks.COARSE_GELU_ERROR


def test_a_coarse_gelu_keeps_large_numbers_and_nan(coarse_gelu):
    x = torch.tensor([1e30, -1e30, 3e38, -3e38, float("nan"), 0.0, float("inf"), 4.0] * 2)
    y = torch.empty_like(x)
    coarse_gelu(x, y)
    torch.testing.assert_close(y[0:4:2], x[0:4:2], rtol=1e-6, atol=0)
    assert (y[1:4:2].abs() <= 1e-6 * x[1:4:2].abs()).all()
    assert y[4].isnan()
    assert y[5] == 0
    assert y[6] == float("inf")
    assert y[7] == pytest.approx(4, rel=1e-6)
