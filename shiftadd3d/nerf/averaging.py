"""Which weights are evaluated and kept while training goes on with others: their moving average, or the best so far."""

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
    """An exponential moving average beside a network (Polyak and Juditsky 1992; torch's `AveragedModel`).

    Args:
        network: whose weights are averaged.
        decay: share of the average that stays in a step, 0 < decay < 1.

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
        """Take the network's weights in, after a step of the optimizer."""
        self._average.update_parameters(self._network)

    def in_place(self) -> AbstractContextManager[None]:
        """Let the network have the averaged weights for a while."""
        return _for_a_while(self._exchange)

    def _exchange(self) -> None:
        pairs = zip(self._network.parameters(), self._average.module.parameters(), strict=True)
        for own, averaged in pairs:
            own.data, averaged.data = averaged.data, own.data

    def training_state(self) -> dict[str, Any]:
        """What going on takes beside the averaged weights, to be asked for outside of `in_place`."""
        return {"weights": self._network.state_dict(), "updates": int(self._average.n_averaged)}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Take the network's weights for the average, and `training_state`'s for the network."""
        self._average.module.load_state_dict(self._network.state_dict())
        self._average.n_averaged.fill_(state["updates"])
        self._network.load_state_dict(state["weights"])

    def weights(self) -> dict[str, Any]:
        """The averaged weights, to be asked for outside of `in_place`."""
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
    """The weights that did best so far, beside a network (early stopping that keeps what it stopped at; Prechelt 1998).

    Args:
        network: whose weights they are.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._weights: list[Tensor] | None = None
        self.quality = -math.inf
        """How well they did; minus infinity as long as there are none."""

    def offer(self, quality: float) -> None:
        """Take the network's weights if they do better than all before."""
        if quality > self.quality:
            self.quality = quality
            self._weights = [parameter.detach().clone() for parameter in self._network.parameters()]

    def in_place(self) -> AbstractContextManager[None]:
        """Let the network have the best weights for a while, if there are any."""
        return _for_a_while(self._exchange)

    def restore(self) -> None:
        """Let the network go on from the best weights, if there are any."""
        with torch.no_grad():
            for own, best in zip(self._network.parameters(), self._weights or (), strict=self._weights is not None):
                own.copy_(best)

    def _exchange(self) -> None:
        best = self._weights
        if best is not None:
            for index, own in enumerate(self._network.parameters()):
                own.data, best[index] = best[index], own.data
