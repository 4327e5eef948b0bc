"""Weights to evaluate and keep in place of the present ones: their moving average, or the best so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from shiftadd3d._errors import UserError


class WeightAverage:
    """An exponential moving average of a network's weights (Polyak and Juditsky 1992; torch's `AveragedModel`).

    Args:
        network: the network.
        decay: share of the average that a step keeps, 0 < decay < 1.

    Raises:
        UserError: another decay.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise UserError(f"--average-weights {decay:g}: expected 0 < average-weights < 1, or 0 for no average")
        self._network = network
        # It copies the network as it is, and again at the first update.
        self._average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def update(self) -> None:
        """Add the network's weights to the average, after a step of the optimizer."""
        self._average.update_parameters(self._network)

    def in_place(self) -> AbstractContextManager[None]:
        """Inside this context, the network has the averaged weights."""
        return _for_a_while(self._exchange)

    def _exchange(self) -> None:
        pairs = zip(self._network.parameters(), self._average.module.parameters(), strict=True)
        for own, averaged in pairs:
            own.data, averaged.data = averaged.data, own.data

    def training_state(self) -> dict[str, Any]:
        """The state that training needs in addition to the averaged weights. Ask for it outside of `in_place`."""
        return {"weights": self._network.state_dict(), "updates": int(self._average.n_averaged)}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Make the network's weights the average, and give the network the weights of `training_state`."""
        self._average.module.load_state_dict(self._network.state_dict())
        self._average.n_averaged.fill_(state["updates"])
        self._network.load_state_dict(state["weights"])

    def weights(self) -> dict[str, Any]:
        """The averaged weights. Ask for them outside of `in_place`."""
        return self._average.module.state_dict()


@contextmanager
def _for_a_while(exchange: Callable[[], None]) -> Iterator[None]:
    """Exchange, and exchange back in the end, whatever happens meanwhile."""
    exchange()
    try:
        yield
    finally:
        exchange()


class BestWeights:
    """The best weights of a network so far (early stopping that keeps the best weights; Prechelt 1998).

    Args:
        network: the network.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._weights: list[Tensor] | None = None
        self.quality = -math.inf
        """How well they did; minus infinity as long as there are none."""

    def offer(self, quality: float) -> None:
        """Store the network's weights if their quality is higher than before."""
        if quality > self.quality:
            self.quality = quality
            self._weights = [parameter.detach().clone() for parameter in self._network.parameters()]

    def in_place(self) -> AbstractContextManager[None]:
        """Inside this context, the network has the best weights, if there are any."""
        return _for_a_while(self._exchange)

    def restore(self) -> None:
        """Give the network the best weights, if there are any."""
        with torch.no_grad():
            for own, best in zip(self._network.parameters(), self._weights or (), strict=self._weights is not None):
                own.copy_(best)

    def _exchange(self) -> None:
        best = self._weights
        if best is not None:
            for index, own in enumerate(self._network.parameters()):
                own.data, best[index] = best[index], own.data
