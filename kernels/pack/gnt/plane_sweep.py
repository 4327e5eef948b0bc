"""The weights of the plane sweep's network, in the panels that kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.pack.panel import across, lanes_of, padded, row, stored
from shiftadd3d.kernels.reference.arguments import takes
from shiftadd3d.kernels.reference.gnt.gather import Scene
from shiftadd3d.kernels.reference.gnt.plane_sweep import Network, plane_sweep_twin


class Panels(NamedTuple):
    """Weights [inputs, outputs], inputs and outputs padded to whole vectors; D are the hidden units.

    Attributes:
        hidden: [3 * (3 + F + 1), D], its rows not padded.
        hidden_bias: [D].
        score: [D, 1].
        score_bias: [1].
        scales: [2], of angles and of agreement.
    """

    hidden: Tensor
    hidden_bias: Tensor
    score: Tensor
    score_bias: Tensor
    scales: Tensor


def panels(network: Network, lanes: int) -> Panels:
    """The panels of a network as `plane_sweep_twin` takes it."""
    hidden_weight, hidden_bias, score_weight, score_bias, *scales = network
    hidden = hidden_weight.shape[0]
    packed = Panels(
        hidden=across(hidden_weight, lanes=lanes),
        hidden_bias=row(hidden_bias, lanes),
        score=F.pad(across(score_weight, lanes=lanes), (0, 0, 0, padded(hidden, lanes) - hidden)),
        score_bias=row(score_bias, lanes),
        scales=torch.stack(scales),
    )
    return Panels(*map(stored, packed))


def channels_compared(panels: Sequence[Tensor]) -> int:
    """F, the number of channels of the maps that are compared."""
    return panels[0].shape[0] // 3 - 4


def sizes(lanes: int, channels: int, hidden: int) -> list[tuple[int, ...]]:
    """The shapes of the panels for F compared channels and D hidden units."""
    deep = padded(hidden, lanes)
    return [(3 * (3 + channels + 1), deep), (deep,), (deep, lanes), (lanes,), (2,)]


def check_panels(panels: Sequence[Tensor], channels: int, hidden: int) -> int:
    """`lanes_of` the panels of a network with D hidden units, for maps with this many channels.

    Raises:
        UserError: if the panels do not fit.
    """
    compared = channels_compared(panels)
    if panels[0].shape[0] % 3 or not 0 <= compared <= channels:
        raise UserError(f"hidden must have 3 (3 + F + 1) inputs for F <= {channels} channels, not {panels[0].shape[0]}")
    return lanes_of("plane_sweep", panels, partial(sizes, channels=compared, hidden=hidden))


class PlaneSweep(NamedTuple):
    """Colours and weights of the points on rays: see `shiftadd3d.kernels.reference.gnt.plane_sweep`.

    A kernel runs on CPUs in float32, and plain torch in all other cases. The outcome is that of `plane_sweep_twin`.
    Inference only. Raises `UserError` if shapes or dtypes do not fit each other.

    Attributes:
        points, origins, projection, centers, images, maps, valid: a `Scene`.
        panels: `Panels`.
        hidden: D.
    """

    points: Tensor
    origins: Tensor
    projection: Tensor
    centers: Tensor
    images: Tensor
    maps: Tensor
    valid: Tensor | None
    panels: list[Tensor]
    hidden: int

    @property
    def scene(self) -> Scene:
        return Scene(*self[:7])


@takes(PlaneSweep)
def plane_sweep_of_panels(given: PlaneSweep) -> tuple[Tensor, Tensor, Tensor]:
    """The twin with the weights of panels. It runs where no kernel serves."""
    hidden, (of_hidden, hidden_bias, score, score_bias, scales) = given.hidden, given.panels
    layers = (of_hidden[:, :hidden].mT, hidden_bias[:hidden], score[:hidden, :1].mT, score_bias[:1])
    return plane_sweep_twin(given.scene, Network(*layers, *scales.unbind()))
