"""Functions of whole programs: each against plain torch; programs from the cache, or compiled, or refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shiftadd3d.kernels.cpu.forms.base import ShiftProduct
from shiftadd3d.kernels.pack.gnt.view_attention import shift_forms
from shiftadd3d.kernels.pack.shift import panel_forms
from shiftadd3d.kernels.pack.whole import code_panels, ordinary, shifts
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.whole import executable
from shiftadd3d.kernels.whole.conv_mixtures import CONV_MIXTURE
from shiftadd3d.kernels.whole.conv_perceptrons import CONV_PERCEPTRON
from shiftadd3d.kernels.whole.gnt.blocks import POSITION, RAY_BLOCK, VIEW_ATTENTION
from shiftadd3d.kernels.whole.gnt.head import COLORS
from shiftadd3d.kernels.whole.gnt.perceptrons import PERCEPTRONS
from shiftadd3d.kernels.whole.gnt.rays import SWEEP, VIEWS
from shiftadd3d.kernels.whole.gnt.samples import AROUND
from shiftadd3d.kernels.whole.grids import CONVOLUTION, SPREAD, Window
from shiftadd3d.kernels.whole.mixtures import MIXTURE
from shiftadd3d.kernels.whole.products import LINEAR, PERCEPTRON, linear
from shiftadd3d.kernels.whole.program import Function, Program
from shiftadd3d.kernels.whole.softmax import SOFTMAX_ATTENTION
from shiftadd3d.kernels.whole.tokens import ATTENTION, DEPTHWISE, PATCHES, POOL

tvm = pytest.importorskip("tvm")

LAYER = {"bits": 4, "terms": 1, "eps": 1e-6, "activation": "gelu", "residual": True}
BARE = {"eps": None, "activation": "none", "residual": False}
SHIFT, DENSE = {"bits": 4, "terms": 1}, {"bits": 0, "terms": 0}
DENSE_TO, SHIFT_TO = ({"outputs": 37} | layer for layer in (DENSE, SHIFT))
DENSE_BEHIND = {"behind": (0, 0)}
GELU = {"activation": "gelu", "added": False, "last": False}
VALUES = DENSE_BEHIND | {"activation": "none", "added": True, "last": True}
MIXED = {"experts": (0, 1), "bits": 4, "residual": True}
OF_BANDS = {"bits": 4, "eps": 1e-6, "activation": "gelu"}
CASES: list[tuple[Function, dict[str, Any]]] = [
    (LINEAR, LAYER | {"inputs": 325, "tokens": 49}),
    (LINEAR, LAYER | {"inputs": 32, "tokens": 196}),
    (LINEAR, LAYER | BARE | {"bits": 5, "inputs": 325, "tokens": 1}),
    (LINEAR, LAYER | BARE | {"terms": 2, "inputs": 325, "tokens": 196}),
    (LINEAR, LAYER | {"bits": 0, "terms": 0, "inputs": 325, "tokens": 49}),
    (PERCEPTRON, LAYER | {"inputs": 192, "hidden": 768}),
    (PERCEPTRON, LAYER | BARE | {"activation": "relu", "bits": 0, "terms": 0, "inputs": 192, "hidden": 768}),
    (PATCHES, {"bits": 4, "terms": 1, "channels": 3, "patch": (4, 8), "inputs": 96}),
    (PATCHES, {"bits": 0, "terms": 0, "channels": 3, "patch": (16, 16), "inputs": 768}),
    (ATTENTION, {"features": 64, "columns": 64, "parts": 1, "low": -1.0}),
    (ATTENTION, {"features": 20, "columns": 12, "parts": 2, "low": 0.0}),
    (ATTENTION, {"features": 16, "columns": 32, "parts": 3, "low": -1.0}),
    (SOFTMAX_ATTENTION, {"heads": 3, "width": 32, "keys": 70, "joint": True}),
    (SOFTMAX_ATTENTION, {"heads": 2, "width": 64, "keys": 49, "joint": False}),
    (DEPTHWISE, VALUES | {"kernel_size": 3, "grid": (5, 14)}),
    (DEPTHWISE, GELU | DENSE_BEHIND | {"kernel_size": 5, "grid": (3, 2)}),
    (DEPTHWISE, GELU | {"kernel_size": 3, "grid": (4, 9), "behind": (4, 1)}),
    (CONV_PERCEPTRON, SHIFT | {"eps": 1e-6, "activation": "gelu", "sizes": (20, 64, 37, 60, 40)}),
    (CONV_PERCEPTRON, SHIFT | {"eps": None, "activation": "relu", "sizes": (160, 640, 160, 9, 3)}),
    (CONV_PERCEPTRON, DENSE | {"eps": 1e-6, "activation": "gelu", "sizes": (32, 96, 35, 5, 14)}),
    (CONV_MIXTURE, OF_BANDS | {"mixtures": (((0, 1), True), ((0, 1), True)), "sizes": (32, 64, 37, 60, 40)}),
    (CONV_MIXTURE, OF_BANDS | {"mixtures": (((1, 0, 1), False), ((0,), False)), "sizes": (20, 64, 24, 9, 3)}),
    (CONVOLUTION, DENSE_TO | {"window": Window(False, 16, 14, 14, 2, 2, 0), "eps_before": 1e-6, "eps_behind": 1e-5}),
    (CONVOLUTION, DENSE_TO | {"window": Window(True, 3, 19, 22, 7, 4, 3), "eps_before": None, "eps_behind": 1e-5}),
    (CONVOLUTION, DENSE_TO | {"window": Window(False, 24, 9, 6, 3, 2, 1), "eps_before": 1e-6, "eps_behind": None}),
    (CONVOLUTION, SHIFT_TO | {"window": Window(False, 20, 9, 6, 2, 2, 0), "eps_before": 1e-6, "eps_behind": 1e-5}),
    (SPREAD, {}),
    (MIXTURE, MIXED | {"depth": 2, "activation": "gelu", "gated": True, "eps": 1e-6, "widths": (192, 768)}),
    (MIXTURE, MIXED | {"depth": 1, "activation": "none", "gated": False, "eps": None, "widths": (192,)}),
    (POOL, {"mean": False, "eps": 1e-6}),
    (POOL, {"mean": True, "eps": None}),
]


#: Functions of GNTs, whose forms say which integers they take.
BLOCK = {"width": 32, "eps": 1e-6}
RAY = BLOCK | {"heads": 4, "attention": "pm1", "kernel": 3}
MIXED_FORMS = {"activation": "relu", "gated": True}
GNT_CASES: list[tuple[Function, dict[str, Any]]] = [
    (SWEEP, {"channels": 8, "hidden": 32}),
    (SWEEP, {"channels": 5, "hidden": 12}),
    (VIEWS, {"inputs": 36, "hidden": 32, "width": 32, "with_moments": True, "tiles": False}),
    (VIEWS, {"inputs": 13, "hidden": 16, "width": 16, "with_moments": False, "tiles": False}),
    (VIEWS, {"inputs": 36, "hidden": 32, "width": 32, "with_moments": True, "tiles": True}),
    (VIEW_ATTENTION, BLOCK | {"hidden": 4, "packed": False}),
    (VIEW_ATTENTION, BLOCK | {"hidden": 4, "packed": True}),
    (RAY_BLOCK, RAY | {"hidden": 0}),
    (RAY_BLOCK, RAY | {"attention": "softmax", "kernel": 0, "hidden": 128}),
    (AROUND, {"on_board": False}),
    (AROUND, {"on_board": True}),
    (POSITION, {"width": 32, "hidden": 32, "outputs": 32, "canonical": True}),
    (POSITION, {"width": 32, "hidden": 20, "outputs": 32, "canonical": False}),
    (COLORS, {"width": 32, "inputs": 36, "hidden": 16, "eps": 1e-5, "tiles": False}),
    (COLORS, {"width": 32, "inputs": 36, "hidden": 16, "eps": 1e-5, "tiles": True}),
    (PERCEPTRONS, BLOCK | MIXED_FORMS | {"experts": (128, 64, 32)}),
    (PERCEPTRONS, BLOCK | {"activation": "gelu", "gated": False, "experts": (96,)}),
]

OTHERS = ("avx512_vnni", "generic")


@pytest.mark.parametrize("target", ["amx", "avx2", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.parametrize(("function", "spec"), CASES, ids=lambda part: getattr(part, "name", ""))
def test_functions_compute_what_torch_does(function: Function, spec: dict[str, Any], target: str, on_target) -> None:
    on_target(target)
    here = targets.current()
    resolved = {str(found): found for found in (function.resolve(here, e, dict(spec)) for e in ("int8", "safe"))}
    for one in resolved.values():
        built = function.build(here, **one).with_attr("global_symbol", "tried")
        function.trial(tvm.compile(tvm.IRModule({"tried": built}), target=here.tvm_target())["tried"], **one)


@pytest.mark.parametrize("target", ["amx", "avx2", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.parametrize(("function", "spec"), GNT_CASES, ids=lambda part: getattr(part, "name", ""))
def test_functions_of_gnts_compute_what_torch_does(
    function: Function, spec: dict[str, Any], target: str, on_target
) -> None:
    on_target(target)
    here = targets.current()
    if function is POSITION and not here.has_fma:
        pytest.skip("sines take fused multiply-adds")
    if (spec.get("tiles") or spec.get("packed")) and not here.has_amx:
        pytest.skip("no matrix tiles")
    found = shift_forms(here) if function is VIEW_ATTENTION else panel_forms(here)
    forms = ("float32", *found) if function in (VIEW_ATTENTION, RAY_BLOCK, PERCEPTRONS) else (None,)
    if spec.get("packed"):
        forms = ("bfloat16",)
    for form in forms:
        one = spec if form is None else spec | {"form": form}
        if function is PERCEPTRONS:
            first, *others = spec["experts"]
            one = spec | {"experts": (("float32", first), *((form, hidden) for hidden in others))}
        built = function.build(here, **one).with_attr("global_symbol", "tried")
        function.trial(tvm.compile(tvm.IRModule({"tried": built}), target=here.tvm_target())["tried"], **one)


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
