"""Panels of shift weights as integers, for layers with so few weights that they need not be packed.

The unit of an output channel is its smallest power of two. Relative to it, each weight is an integer of 7 bits and a
sign, so no weight is rounded. A panel has words of 32 bits, with inputs down and outputs across. A word holds as many
inputs as an instruction of the form takes. The last rows hold the other constants of each output. The height of a panel
tells its form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.pack.panel import padded
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.runtime.numerics import Numerics
from shiftadd3d.kernels.runtime.targets import CpuTarget

PanelForm = Literal["int16", "int8", "bfloat16"]

MOST_BITS = 4
"""The largest number of bits of a code. With more, the integers do not fit into bytes."""
GRANULE = 32
"""Inputs are a multiple of this."""

PAIR: dict[PanelForm, int] = {"int16": 2, "int8": 4, "bfloat16": 2}
"""Numbers in a word."""
_HAS_START: dict[PanelForm, bool] = {"int16": True, "int8": True, "bfloat16": False}
_DTYPES: dict[PanelForm, torch.dtype] = {"int16": torch.int16, "int8": torch.int8, "bfloat16": torch.bfloat16}

UNSIGNED = 128
"""This is added to activations of ``"int8"``, because one factor of the instruction is unsigned."""


class WholeWeights(NamedTuple):
    """The weights of a layer as integers or bfloat16.

    Attributes:
        integers: [outputs, inputs]. For shift layers, integers from -64 to 64. For other layers, the weights in
            bfloat16 (`as_bfloat16`), or integers of 16 bits (`in_int16`).
        unit: [outputs], the value of 1 in each output. For shift layers, it is a power of two.
    """

    integers: Tensor
    unit: Tensor


def whole_weights(codes: Tensor, offset: Tensor, bits: int, inputs: int) -> WholeWeights | None:
    """The integers of codes from `power_of_two.pack`; None if weights are sums of powers, or have too many bits."""
    if bits > MOST_BITS or codes.shape[0] != 1:
        return None
    unit = power_of_two.exact_exp2(offset[0].int() - (power_of_two.num_exponents(bits) - 1))
    decoded = power_of_two.decode(power_of_two.unpack(codes, bits, inputs), offset, bits)
    return WholeWeights(decoded / unit[:, None], unit)


def as_bfloat16(weights: Sequence[Tensor]) -> list[WholeWeights] | None:
    """Ordinary weights [outputs, inputs] for panels of ``"bfloat16"``; None if a weight is not a bfloat16 number."""
    if any(not torch.equal(weight.bfloat16().to(weight), weight) for weight in weights):
        return None
    return [WholeWeights(weight.detach(), weight.new_ones(len(weight))) for weight in weights]


def in_pieces(weight: Tensor) -> WholeWeights:
    """A weight [outputs, inputs] as the sum of two bfloat16 pieces, one after the other, exact to 2**-17 of each
    number.
    """
    first = weight.bfloat16().to(weight)
    pieces = torch.cat([first, (weight - first).bfloat16().to(weight)], dim=1)
    return WholeWeights(pieces, weight.new_ones(len(weight)))


def in_int16(weight: Tensor) -> WholeWeights:
    """A weight [outputs, inputs] as integers whose sums with rows of ``"int16"`` fit into 32 bits.

    Rounding the weights of an output changes it by at most ``inputs / 65534`` of the largest activation times the sum
    of their absolute values.
    """
    size = weight.abs()
    unit = torch.maximum(size.sum(1) / (2**16 - weight.shape[1] / 2), size.amax(1) / 32767)
    unit = torch.where(unit > 0, unit, 1.0).float()
    return WholeWeights((weight / unit[:, None]).round(), unit)


def panel_forms(target: CpuTarget) -> tuple[PanelForm, ...]:
    """The forms that this CPU can run."""
    if target.has_amx:
        return ("bfloat16",)
    return ("int16", "int8") if "avx2" in target.flags else ()


def panel_form(target: CpuTarget, numerics: Numerics) -> PanelForm | None:
    """The form for these numerics; None if it is float32."""
    found = panel_forms(target) if numerics in ("fast", "int8") else ()
    return found[-1 if numerics == "int8" else 0] if found else None


def rounded(x: Tensor, form: PanelForm) -> Tensor:
    """Activations [*, inputs] as a form takes them, in the dtype of x."""
    if form == "bfloat16":
        return x.bfloat16().to(x)
    most = 127 if form == "int8" else 32767
    peak = x.abs().amax(-1, keepdim=True).clamp(min=2.0**-64)
    return (x * (most / peak)).round() * (peak / most)


def panel_shape(form: PanelForm, inputs: int, outputs: int) -> tuple[int, int]:
    """Words of a panel; `outputs` are padded to whole vectors already."""
    return inputs // PAIR[form] + 1 + _HAS_START[form], outputs


def across(*weights: WholeWeights, lanes: int) -> WholeWeights:
    """The weights of all outputs, those of each layer padded to whole vectors, with zeros."""
    layers = [columns_at(layer, range(len(layer.unit)), padded(len(layer.unit), lanes)) for layer in weights]
    return WholeWeights(*(torch.cat(parts) for parts in zip(*layers, strict=True)))


def columns_at(layer: WholeWeights, places: Sequence[int], count: int) -> WholeWeights:
    """The weights of `count` outputs, a layer's at these places and zeros elsewhere."""
    integers, unit = layer.integers.new_zeros(count, layer.integers.shape[1]), layer.unit.new_ones(count)
    index = torch.tensor(list(places), device=unit.device)
    return WholeWeights(integers.index_copy(0, index, layer.integers), unit.index_copy(0, index, layer.unit))


def shift_panel(layer: WholeWeights, form: PanelForm) -> Tensor:
    """int32 `panel_shape`: the integers, for ``"int8"`` and ``"int16"`` what sums start with, and the units' bits."""
    numbers = layer.integers.to(_DTYPES[form]).unflatten(1, (-1, PAIR[form]))  # [outputs, words, numbers of a word]
    rows = [numbers.transpose(0, 1).contiguous().view(torch.int32)[..., 0]]
    if _HAS_START[form]:
        start = -UNSIGNED * layer.integers.sum(1) if form == "int8" else torch.zeros_like(layer.unit)
        rows.append(start.to(torch.int32)[None])
    rows.append(layer.unit.float().view(torch.int32)[None])
    return torch.cat(rows).contiguous()


def panels_of_forms(layers: Mapping[str, WholeWeights], forms: Sequence[PanelForm]) -> dict[str, Tensor]:
    """Panels of layers in each form, by names such as ``"int8_out"``; none of layers that forms cannot take."""
    if any(layer.integers.is_cuda or layer.integers.shape[1] % GRANULE for layer in layers.values()):
        return {}
    return {f"{form}_{name}": shift_panel(layer, form) for form in forms for name, layer in layers.items()}


def find_panels(panels: Sequence[Tensor], form: PanelForm, sizes: Sequence[tuple[int, int]]) -> list[Tensor] | None:
    """The panels of a form among those of all forms; None if they are not there.

    Args:
        sizes: inputs and outputs of each.
    """
    expected = [panel_shape(form, *size) for size in sizes]
    count = len(expected)
    for first in range(0, len(panels) - count + 1, count):
        found = panels[first : first + count]
        if [tuple(panel.shape) for panel in found] == expected and all(p.dtype == torch.int32 for p in found):
            return list(found)
    return None


def forms_of(
    form: PanelForm | None, panels: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
) -> dict[str, list[Tensor]]:
    """The forms to try, with their panels: the wanted one, if its panels are there, and float32 last."""
    found = None if form is None else find_panels(panels, form, sizes)
    return {"float32": []} if form is None or found is None else {form: found, "float32": []}
