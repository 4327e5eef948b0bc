"""Functions of whole programs: each against plain torch; programs from the cache, or compiled, or refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shiftadd3d.kernels.cpu.forms.base import ShiftProduct
from shiftadd3d.kernels.cpu.forms.panels import AnyForm
from shiftadd3d.kernels.pack.gnt.view_attention import shift_forms
from shiftadd3d.kernels.pack.shift import GRANULE, panel_forms
from shiftadd3d.kernels.pack.whole import Format, code_panels, ordinary, shifts
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.whole import executable
from shiftadd3d.kernels.whole.conv_mixtures import CONV_MIXTURE, ConvMixture, Mixed
from shiftadd3d.kernels.whole.conv_perceptrons import CONV_PERCEPTRON, ConvPerceptron, Sizes
from shiftadd3d.kernels.whole.gnt.blocks import (
    POSITION,
    RAY_BLOCK,
    VIEW_ATTENTION,
    PositionSpec,
    RayBlockSpec,
    ViewBlockSpec,
)
from shiftadd3d.kernels.whole.gnt.head import COLORS, ColorsSpec
from shiftadd3d.kernels.whole.gnt.perceptrons import PERCEPTRONS, PerceptronsSpec
from shiftadd3d.kernels.whole.gnt.rays import SWEEP, VIEWS, SweepSpec, ViewsSpec
from shiftadd3d.kernels.whole.gnt.samples import AROUND, SamplesSpec
from shiftadd3d.kernels.whole.grids import CONVOLUTION, SPREAD, Convolution, Window
from shiftadd3d.kernels.whole.mixtures import MIXTURE, Mixture
from shiftadd3d.kernels.whole.parts import Around, tiles_of
from shiftadd3d.kernels.whole.products import LINEAR, PERCEPTRON, Linear, Perceptron, linear
from shiftadd3d.kernels.whole.program import AnyFunction, Program
from shiftadd3d.kernels.whole.softmax import SOFTMAX_ATTENTION, SoftmaxSpec
from shiftadd3d.kernels.whole.tokens import (
    ATTENTION,
    DEPTHWISE,
    PATCHES,
    POOL,
    AttentionSpec,
    Depthwise,
    Patches,
    PoolSpec,
)

tvm = pytest.importorskip("tvm")

SHIFT, DENSE = Format(4, 1), Format(0, 0)
GELU, BARE, RELU = Around(1e-6, "gelu", True), Around(None, "none", False), Around(None, "relu", False)
TWO = Mixed((0, 1), True)
CASES: list[tuple[AnyFunction, tuple[object, ...]]] = [
    (LINEAR, Linear(SHIFT, GELU, inputs=325, tokens=49)),
    (LINEAR, Linear(SHIFT, GELU, inputs=32, tokens=196)),
    (LINEAR, Linear(SHIFT, BARE, inputs=192, tokens=197, signs=True)),
    (LINEAR, Linear(Format(5, 1), BARE, inputs=325, tokens=1)),
    (LINEAR, Linear(Format(4, 2), BARE, inputs=325, tokens=196)),
    (LINEAR, Linear(DENSE, GELU, inputs=325, tokens=49)),
    (PERCEPTRON, Perceptron(SHIFT, GELU, inputs=192, hidden=768, tokens=197)),
    (PERCEPTRON, Perceptron(DENSE, RELU, inputs=192, hidden=768, tokens=1)),
    (PATCHES, Patches(SHIFT, channels=3, patch=(4, 8))),
    (PATCHES, Patches(DENSE, channels=3, patch=(16, 16))),
    (ATTENTION, AttentionSpec(features=64, columns=64, codes="float32", parts="qkv", low=-1.0)),
    (ATTENTION, AttentionSpec(features=20, columns=12, codes="float32", parts="q kv", low=0.0)),
    (ATTENTION, AttentionSpec(features=16, columns=32, codes="float32", parts="q k v", low=-1.0)),
    (ATTENTION, AttentionSpec(features=64, columns=64, codes="uint8", parts="qk v", low=-1.0)),
    (ATTENTION, AttentionSpec(features=32, columns=12, codes="uint8", parts="q k v", low=0.0)),
    (SOFTMAX_ATTENTION, SoftmaxSpec(heads=3, width=32, keys=70, joint=True)),
    (SOFTMAX_ATTENTION, SoftmaxSpec(heads=2, width=64, keys=49, joint=False)),
    (DEPTHWISE, Depthwise(3, (5, 14), "none", added=True, last=True, behind=DENSE)),
    (DEPTHWISE, Depthwise(5, (3, 2), "gelu", added=False, last=False, behind=DENSE)),
    (DEPTHWISE, Depthwise(3, (4, 9), "gelu", added=False, last=False, behind=SHIFT)),
    (CONV_PERCEPTRON, ConvPerceptron(SHIFT, 1e-6, "gelu", Sizes(20, 64, 37, 60, 40))),
    (CONV_PERCEPTRON, ConvPerceptron(SHIFT, None, "relu", Sizes(160, 640, 160, 9, 3))),
    (CONV_PERCEPTRON, ConvPerceptron(DENSE, 1e-6, "gelu", Sizes(32, 96, 35, 5, 14))),
    (CONV_MIXTURE, ConvMixture(4, (TWO, TWO), 1e-6, "gelu", Sizes(32, 64, 37, 60, 40))),
    (
        CONV_MIXTURE,
        ConvMixture(4, (Mixed((1, 0, 1), False), Mixed((0,), False)), 1e-6, "gelu", Sizes(20, 64, 24, 9, 3)),
    ),
    (CONVOLUTION, Convolution(DENSE, Window(False, 16, 14, 14, 2, 2, 0), 1e-6, 1e-5, outputs=37)),
    (CONVOLUTION, Convolution(DENSE, Window(True, 3, 19, 22, 7, 4, 3), None, 1e-5, outputs=37)),
    (CONVOLUTION, Convolution(DENSE, Window(False, 24, 9, 6, 3, 2, 1), 1e-6, None, outputs=37)),
    (CONVOLUTION, Convolution(SHIFT, Window(False, 20, 9, 6, 2, 2, 0), 1e-6, 1e-5, outputs=37)),
    (SPREAD, ()),
    (MIXTURE, Mixture((0, 1), 2, 4, gated=True, around=GELU, widths=(192, 768))),
    (MIXTURE, Mixture((0, 1), 1, 4, gated=False, around=Around(None, "none", True), widths=(192,))),
    (POOL, PoolSpec(mean=False, eps=1e-6)),
    (POOL, PoolSpec(mean=True, eps=None)),
]


#: Functions of GNTs, with a form that others take the place of.
RAYS = RayBlockSpec(32, 4, hidden=0, attention="pm1", kernel=3, form="float32", eps=1e-6)
EXPERTS: tuple[tuple[AnyForm, int], ...] = (("float32", 128), ("float32", 64), ("float32", 32))
MIXED = PerceptronsSpec(32, EXPERTS, "relu", gated=True, eps=1e-6)
GNT_CASES: list[tuple[AnyFunction, Any]] = [
    (SWEEP, SweepSpec(channels=8, hidden=32)),
    (SWEEP, SweepSpec(channels=5, hidden=12)),
    (VIEWS, ViewsSpec(36, hidden=32, width=32, with_moments=True, form="float32")),
    (VIEWS, ViewsSpec(13, hidden=16, width=16, with_moments=False, form="float32")),
    (VIEWS, ViewsSpec(36, hidden=32, width=32, with_moments=True, form="bfloat16")),
    (VIEW_ATTENTION, ViewBlockSpec(32, hidden=4, form="float32", eps=1e-6, packed=False)),
    (VIEW_ATTENTION, ViewBlockSpec(32, hidden=4, form="bfloat16", eps=1e-6, packed=True)),
    (RAY_BLOCK, RAYS),
    (RAY_BLOCK, RAYS._replace(attention="softmax", kernel=0, hidden=128)),
    (AROUND, SamplesSpec(on_board=False)),
    (AROUND, SamplesSpec(on_board=True)),
    (POSITION, PositionSpec(32, hidden=32, outputs=32, canonical=True)),
    (POSITION, PositionSpec(32, hidden=20, outputs=32, canonical=False)),
    (COLORS, ColorsSpec(32, inputs=36, hidden=16, eps=1e-5, tiles=False)),
    (COLORS, ColorsSpec(32, inputs=36, hidden=16, eps=1e-5, tiles=True)),
    (PERCEPTRONS, MIXED),
    (PERCEPTRONS, PerceptronsSpec(32, (("float32", 96),), "gelu", gated=False, eps=1e-6)),
]

OTHERS = ("avx512_vnni", "generic")


@pytest.mark.parametrize(
    ("target", "tokens", "rows"),
    [
        ("avx512", 197, 11),
        ("avx512", 49, 13),
        ("avx512", 196, 11),
        ("avx512", 784, 12),
        ("avx512", 1, 4),
        ("avx512", "tokens", 12),
        ("avx2", 197, 6),
    ],
)
def test_tiles_fit_a_pictures_rows(target: str, tokens: int | str, rows: int) -> None:
    tile, longest = tiles_of(targets.find(target), "int8", 384, tokens)
    assert tile == rows
    assert 384 - rows < longest <= 384
    assert longest % rows == 0


@pytest.mark.parametrize("target", ["amx", "avx2", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.parametrize(("function", "asked"), CASES, ids=lambda part: getattr(part, "name", ""))
def test_functions_compute_what_torch_does(
    function: AnyFunction, asked: tuple[object, ...], target: str, on_target
) -> None:
    on_target(target)
    if getattr(asked, "signs", False) and target == "generic":
        pytest.skip("signs are kept with the help of AVX2")
    for spec in {function.resolve(targets.current(), exactness, asked) for exactness in ("int8", "safe")}:
        try_compiled(function, spec)


@pytest.mark.parametrize("target", ["amx", "avx2", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.parametrize(("function", "spec"), GNT_CASES, ids=lambda part: getattr(part, "name", ""))
def test_functions_of_gnts_compute_what_torch_does(function: AnyFunction, spec: Any, target: str, on_target) -> None:
    on_target(target)
    here = targets.current()
    if function is POSITION and not here.has_fma:
        pytest.skip("sines take fused multiply-adds")
    takes_tiles = getattr(spec, "tiles", False) or getattr(spec, "form", "") == "bfloat16"
    if takes_tiles and not here.has_amx:
        pytest.skip("no matrix tiles")
    try_compiled(function, spec)
    one_form = takes_tiles or (function is VIEWS and spec.hidden % GRANULE)
    for form in () if one_form else shift_forms(here) if function is VIEW_ATTENTION else panel_forms(here):
        if function is PERCEPTRONS:
            first, *others = spec.experts
            try_compiled(function, spec._replace(experts=(first, *((form, hidden) for _, hidden in others))))
        elif hasattr(spec, "form"):
            try_compiled(function, spec._replace(form=form))


def try_compiled(function: AnyFunction, spec: tuple[object, ...]) -> None:
    target = targets.current()
    built = function.build(target, spec).with_attr("global_symbol", "tried")
    function.trial(tvm.compile(tvm.IRModule({"tried": built}), target=target.tvm_target())["tried"], spec)


def small_program(weight: torch.Tensor) -> Program:
    program = Program()
    x = program.input("batch", 3, 24)
    layer = ordinary(weight, None, 2 * targets.current().lanes)
    program.output(linear(program, x, layer))
    return program


def run(program: Program, x: torch.Tensor) -> torch.Tensor:
    control = executable.Control()
    control.reset(1)
    main = executable.load({"main": program}, "exact")["main"]
    return torch.from_dlpack(main(x, control.tensor, executable.weights_of(program)))


@pytest.mark.parametrize("lanes", [8, 16])
def test_panels_have_the_code_of_each_weight_where_products_look_for_it(lanes: int) -> None:
    outputs, inputs = 2 * lanes + 5, 22
    codes = torch.randint(16, (outputs, inputs), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = power_of_two.pack(codes[None], 4)
    panels = code_panels(shifts(packed, torch.zeros(1, outputs, dtype=torch.int8), None, inputs, 4), lanes)
    assert panels.shape == (2, 6, 4 * lanes)
    for output, of_output in enumerate(codes.tolist()):
        panel, column = divmod(output, 2 * lanes)
        upper, lane = divmod(column, lanes)
        bytes_ = panels[panel, :, 4 * lane : 4 * lane + 4].flatten() >> 4 * upper & 15
        assert bytes_.tolist() == [*of_output, 0, 0]
    assert not (panels[1, :, 4 * 5 :] & 15).any() and not (panels[1] >> 4).any()


def test_programs_that_differ_in_weights_share_their_code(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = torch.randn(5, 3, 24), torch.randn(2, 7, 24)
    first = run(small_program(weights[0]), x)
    libraries = sorted(empty_cache.glob("*.so"))
    monkeypatch.setattr(executable, "compile_programs", lambda *_: pytest.fail("compiled again"))
    second = run(small_program(weights[1]), x[:2])
    assert sorted(empty_cache.glob("*.so")) == libraries
    torch.testing.assert_close(first, x @ weights[0].T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second, x[:2] @ weights[1].T, rtol=1e-5, atol=1e-5)


def test_what_else_a_process_has_imported_does_not_change_the_key(empty_cache: Path) -> None:
    ask = """
import sys, torch
from shiftadd3d.kernels.pack.whole import ordinary
from shiftadd3d.kernels.whole import executable, products
from shiftadd3d.kernels.whole.program import Program
if sys.argv[1:]:
    import shiftadd3d.models.gnt, shiftadd3d.kernels.manage
program = Program()
program.output(products.linear(program, program.input("batch", 3, 24), ordinary(torch.zeros(7, 24), None, 32)))
print(executable.entry({"main": program}, "exact"))
"""
    keys = [
        subprocess.run([sys.executable, "-c", ask, *more], check=True, capture_output=True, text=True).stdout
        for more in ([], ["everything"])
    ]
    assert keys[0] == keys[1]


def test_several_programs_in_one_executable(empty_cache: Path) -> None:
    program = small_program(torch.randn(7, 24))
    both = executable.load({"one": program, "other": program}, "exact")
    control, weights, x = executable.Control(), executable.weights_of(program), torch.randn(1, 3, 24)
    control.reset(2)
    one, other = (torch.from_dlpack(both[name](x, control.tensor, weights)) for name in ("one", "other"))
    assert torch.equal(one, other)


def test_a_function_that_fails_its_trial_is_not_kept(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShiftProduct, "activation", lambda product, name: lambda x: x + product.isa.splat(1.0))
    with pytest.raises(AssertionError, match=r"^linear: it is off by"):
        run(small_program(torch.randn(7, 24)), torch.randn(1, 3, 24))
    assert not any("whole" in record.read_text() for record in empty_cache.glob("*.json"))


def test_interrupted_compiling_leaves_nothing_half_written(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Any, library: Path) -> None:
        library.write_bytes(b"half")
        raise KeyboardInterrupt

    program = small_program(torch.randn(7, 24))
    with monkeypatch.context() as patch:
        patch.setattr(executable, "_link", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(program, torch.randn(1, 3, 24))
    assert not [*empty_cache.glob("building*"), *empty_cache.glob("*.trial")]
    run(program, torch.randn(1, 3, 24))


@pytest.mark.filterwarnings("ignore:no C compiler")
def test_without_a_linker_programs_live_in_the_process(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvm.support.cc.get_cc", lambda: None)
    weight, x = torch.randn(7, 24), torch.randn(2, 3, 24)
    torch.testing.assert_close(run(small_program(weight), x), x @ weight.T, rtol=1e-5, atol=1e-5)
    assert not list(empty_cache.glob("*.json"))
