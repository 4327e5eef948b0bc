"""The moving average of weights, and the best weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shiftadd3d import UserError
from shiftadd3d.nerf.averaging import BestWeights, WeightAverage


def set_weight(layer: nn.Linear, value: float) -> None:
    with torch.no_grad():
        layer.weight.fill_(value)


def test_the_average_follows_the_weights_by_its_decay():
    layer = nn.Linear(1, 1, bias=False)
    average = WeightAverage(layer, 0.75)
    for value in (1.0, 2.0, 4.0):  # the first is taken as it is
        set_weight(layer, value)
        average.update()
    with average.in_place():
        assert float(layer.weight.detach()) == pytest.approx(0.75 * (0.75 * 1.0 + 0.25 * 2.0) + 0.25 * 4.0)
    assert float(layer.weight.detach()) == 4.0


def test_the_weights_come_back_after_an_error():
    layer = nn.Linear(1, 1)
    average = WeightAverage(layer, 0.5)
    set_weight(layer, 3.0)
    with pytest.raises(ValueError, match="inside"), average.in_place():
        raise ValueError("inside")
    assert float(layer.weight.detach()) == 3.0


def test_an_interrupted_average_goes_on_as_one_that_was_not():
    def step(layer: nn.Linear, average: WeightAverage, value: float) -> None:
        set_weight(layer, value)
        average.update()

    whole = nn.Linear(1, 1, bias=False)
    whole_average = WeightAverage(whole, 0.9)
    first = nn.Linear(1, 1, bias=False)
    first_average = WeightAverage(first, 0.9)
    for value in (1.0, 5.0):
        step(whole, whole_average, value)
        step(first, first_average, value)
    with first_average.in_place():
        kept = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    state = first_average.training_state()

    second = nn.Linear(1, 1, bias=False)
    second.load_state_dict(kept)
    second_average = WeightAverage(second, 0.9)
    second_average.go_on(state)
    assert float(second.weight.detach()) == 5.0
    step(whole, whole_average, 2.0)
    step(second, second_average, 2.0)
    with whole_average.in_place(), second_average.in_place():
        assert float(second.weight.detach()) == float(whole.weight.detach())


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_cannot_be_is_refused(decay):
    with pytest.raises(UserError, match=r"--average-weights .*: expected 0 < average-weights < 1"):
        WeightAverage(nn.Linear(1, 1), decay)


def test_the_best_weights_are_those_of_the_highest_quality():
    layer = nn.Linear(1, 1, bias=False)
    best = BestWeights(layer)
    with best.in_place():  # there are none yet
        pass
    best.restore()
    for value, quality in ((1.0, 20.0), (2.0, 21.0), (3.0, 19.0)):
        set_weight(layer, value)
        best.offer(quality)
    for _ in range(2):  # as often as one likes
        with best.in_place():
            assert float(layer.weight.detach()) == 2.0
        assert float(layer.weight.detach()) == 3.0
    with pytest.raises(ValueError, match="inside"), best.in_place():
        raise ValueError("inside")
    assert float(layer.weight.detach()) == 3.0
    best.restore()
    set_weight(layer, float(layer.weight.detach()) + 1.0)  # changes no copy
    with best.in_place():
        assert float(layer.weight.detach()) == 2.0
    assert best.quality == 21.0


def test_a_quality_that_is_no_number_is_never_the_best():
    layer = nn.Linear(1, 1, bias=False)
    best = BestWeights(layer)
    set_weight(layer, 1.0)
    best.offer(5.0)
    set_weight(layer, 2.0)
    best.offer(float("nan"))
    with best.in_place():
        assert float(layer.weight.detach()) == 1.0
