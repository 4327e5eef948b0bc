"""Accuracy, per-class figures and calibration, against plain formulas."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftadd3d.vision.metrics import ClassificationMetrics, MetricSums


def measure(logits: torch.Tensor, targets: torch.Tensor, batch: int) -> ClassificationMetrics:
    sums = MetricSums(logits.shape[1])
    for start in range(0, len(targets), batch):
        sums.add(logits[start : start + batch], targets[start : start + batch])
    return sums.result([f"class {i}" for i in range(logits.shape[1])])


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 12), st.integers(1, 60), st.integers(1, 20), st.integers(0, 10_000))
def test_metrics_agree_with_their_definitions(classes: int, count: int, batch: int, seed: int):
    torch.manual_seed(seed)
    logits, targets = torch.randn(count, classes) * 2, torch.randint(classes, (count,))
    metrics = measure(logits, targets, batch)
    order = logits.argsort(dim=1, descending=True).numpy()
    assert metrics.count == count
    assert metrics.top1 == pytest.approx(np.mean(order[:, 0] == targets.numpy()))
    assert metrics.top5 == pytest.approx(
        np.mean([t in row[:5] for t, row in zip(targets.tolist(), order, strict=True)])
    )
    assert metrics.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), rel=1e-5)
    confusion = np.zeros((classes, classes), dtype=int)
    np.add.at(confusion, (targets.numpy(), order[:, 0]), 1)
    assert np.array_equal(metrics.confusion, confusion)
    confidence, right = logits.softmax(1).max(1).values.numpy(), order[:, 0] == targets.numpy()
    edges = np.linspace(0, 1, 16)
    error = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert metrics.calibration_error == pytest.approx(error, abs=1e-5)
    for number, row in enumerate(metrics.classes):
        of_it = targets.numpy() == number
        assert row.count == of_it.sum() and row.predicted == (order[:, 0] == number).sum()
        assert row.recall == (pytest.approx((order[of_it, 0] == number).mean()) if of_it.any() else None)


def test_a_class_without_pictures_has_no_recall_and_does_not_count_in_the_mean():
    metrics = measure(torch.eye(3)[[0, 0, 2]] * 5, torch.tensor([0, 0, 0]), 3)
    assert [row.recall for row in metrics.classes] == [pytest.approx(2 / 3), None, None]
    assert [row.precision for row in metrics.classes] == [1.0, None, 0.0]
    assert metrics.mean_recall == pytest.approx(2 / 3)


def test_a_sure_classifier_that_is_always_right_is_calibrated():
    metrics = measure(torch.eye(4) * 100, torch.arange(4), 2)
    assert metrics.top1 == 1.0 and metrics.calibration_error == pytest.approx(0, abs=1e-6)


def test_metrics_survive_a_round_through_json():
    metrics = measure(torch.randn(20, 3), torch.randint(3, (20,)), 7)
    assert ClassificationMetrics.from_dict(json.loads(json.dumps(metrics.as_dict()))) == metrics
