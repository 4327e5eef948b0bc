"""MatShift by literal shifts: the same bits as every other form, on integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shiftadd3d import UserError, kernels
from shiftadd3d.kernels.cpu.literal import LITERAL
from shiftadd3d.kernels.ops.literal import matshift_literal
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.reference.literal import matshift_literal_twin
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime.kernel import Kernel

pytest.importorskip("tvm")


@pytest.fixture(autouse=True)
def kernels_really_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that fell back on its twin would make the comparisons below pass for nothing."""
    real = Kernel.function

    def function(self: Kernel, **spec: object) -> object:
        found = real(self, **spec)
        assert found is not None
        return found

    monkeypatch.setattr(Kernel, "function", function)


def layer(outputs: int, inputs: int, bits: int = 4, terms: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, offsets and the weight they stand for, with channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight *= torch.exp2(torch.randint(-9, 5, (outputs, 1), generator=generator).float())
    codes = power_of_two.encode(weight, bits, terms)
    return power_of_two.pack(codes.codes, bits), codes.offset, power_of_two.decode(*codes)


def integers(*shape: int, largest: int = 127, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator, dtype=torch.int32)


@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 80),
    inputs=st.integers(1, 90),
    outputs=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize(("bits", "terms"), [(4, 1), (4, 2), (3, 1), (5, 1)])
def test_any_shape_gives_the_bits_of_the_twin(bits: int, terms: int, rows: int, inputs: int, outputs: int, seed: int):
    codes, offset, _ = layer(outputs, inputs, bits, terms, seed)
    x = integers(rows, inputs, seed=seed)
    assert torch.equal(matshift_literal(x, codes, offset, bits), matshift_literal_twin(x, codes, offset, bits))


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_all_forms_give_the_same_bits_on_integers(numerics: str, torch_threads: int):
    """7 bits of activations, 6 of shifts and 192 inputs: all sums fit float32 and the integers of every form."""
    codes, offset, weight = layer(70, 192)
    x = integers(3, 67, 192)
    literal = matshift_literal(x, codes, offset)
    with kernels.numerics(numerics):
        assert torch.equal(literal, kernels.matshift(x.float(), codes, offset))
        assert torch.equal(literal.bfloat16(), kernels.matshift(x.bfloat16(), codes, offset))
    assert torch.equal(literal, (x.double() @ weight.double().T).float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_narrow_integers_and_strides(dtype: torch.dtype):
    codes, offset, weight = layer(24, 48)
    x = integers(2, 48, 5).to(dtype).transpose(1, 2)
    y = matshift_literal(x, codes, offset)
    assert y.shape == (2, 5, 24)
    assert torch.equal(y, x.float() @ weight.T)


@pytest.mark.parametrize("shape", [(0, 48), (3, 0, 48)])
def test_empty_input(shape: tuple[int, ...]):
    codes, offset, _ = layer(24, 48)
    assert matshift_literal(torch.zeros(shape, dtype=torch.int32), codes, offset).shape == (*shape[:-1], 24)


@pytest.mark.parametrize("target", ["generic", "avx2"])
def test_a_smaller_target_computes_the_same(target: str, on_target):
    on_target(target)
    codes, offset, weight = layer(21, 77)
    x = integers(31, 77)
    assert torch.equal(matshift_literal(x, codes, offset), x.float() @ weight.T)


def test_its_code_multiplies_nothing():
    """No vector product of any kind; what scalar products there are reckon addresses and units of channels."""
    text = LITERAL.assembly(targets.find("avx2"), bits=4, terms=1)
    assert "vpsravd" in text
    assert not [name for name in ("vpmull", "vpmadd", "vmulps", "vfmadd", "vpdp") if name in text]


def test_the_op_is_well_behaved():
    codes, offset, _ = layer(24, 48)
    torch.library.opcheck(torch.ops.shiftadd3d.matshift_literal.default, (integers(5, 48), codes, offset, 4))


@pytest.mark.parametrize(
    ("x", "bits", "complaint"),
    [
        (torch.zeros(3, 48), 4, "x must be int8, int16 or int32, not float32"),
        (integers(3, 45), 4, r"x \[3, 45\] has 45 inputs, but rows of 24 bytes hold 48 codes of 4 bits"),
        (integers(3, 48, largest=1 << 22), 4, r"sums of shifted activations may reach \d+, and 32-bit integers end at"),
        (integers(3, 48), 7, "bits must be an integer from 2 to 6, not 7"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_line(x: Tensor, bits: int, complaint: str):
    codes, offset, _ = layer(24, 48)
    with pytest.raises(UserError, match=complaint):
        matshift_literal(x, codes, offset, bits)
