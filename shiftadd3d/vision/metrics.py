"""The quality of a classifier's predictions: accuracy, metrics for each class, calibration. They come from sums that
processes can add up.

A confusion matrix and three sums are enough for all of them. So torchmetrics is not needed, which only nerfstudio
installs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftadd3d._report import RichReport

if TYPE_CHECKING:
    from rich.console import Group

_CALIBRATION_BINS = 15


@dataclass(frozen=True)
class ClassMetrics:
    """One class: its pictures, the predictions of it, and the shares of both that are right (None of none)."""

    name: str
    count: int
    predicted: int
    recall: float | None
    precision: float | None


@dataclass(frozen=True)
class ClassificationMetrics(RichReport):
    """All metrics, as shares from 0 to 1."""

    count: int
    """Number of pictures."""
    top1: float
    """Share of pictures whose class is the likeliest one."""
    top5: float
    """Share of pictures whose class is among the five likeliest (all, if there are fewer)."""
    loss: float
    """Cross-entropy in nats."""
    calibration_error: float
    """Expected calibration error, over 15 bins of confidence (Guo et al., ICML 2017)."""
    mean_recall: float
    """Recall (share of a class that is found), averaged over the classes with pictures."""
    classes: tuple[ClassMetrics, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Pictures by class (rows) and predicted class (columns)."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClassificationMetrics:
        """The metrics from the outcome of `as_dict`, also after a round through JSON."""
        return cls(
            **{
                **values,
                "classes": tuple(ClassMetrics(**row) for row in values["classes"]),
                "confusion": tuple(tuple(row) for row in values["confusion"]),
            }
        )

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        table = Table("class", "pictures", "recall", "precision")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in self.classes:
            table.add_row(row.name, str(row.count), _percent(row.recall), _percent(row.precision))
        table.add_section()
        table.add_row("mean", str(self.count), _percent(self.mean_recall), "")
        return Group(
            table,
            f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%}, loss {self.loss:.4f}, "
            f"calibration error {self.calibration_error:.2%}",
        )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


class MetricSums:
    """The sums for `ClassificationMetrics`, batch by batch."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self._in_top5 = torch.zeros(1, dtype=torch.int64)
        self._loss = torch.zeros(1, dtype=torch.float64)
        # Count, correct and confidence of each bin.
        self._bins = torch.zeros(3, _CALIBRATION_BINS, dtype=torch.float64)

    @torch.no_grad()
    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch.

        Args:
            logits: [B, classes], any device and floating dtype.
            targets: [B] int64.
        """
        logits, targets = logits.detach().float().cpu(), targets.cpu()
        confidence, predicted = logits.softmax(-1).max(-1)
        cells = targets * self.num_classes + predicted
        self._confusion += torch.bincount(cells, minlength=self.num_classes**2).view_as(self._confusion)
        best = logits.topk(min(5, self.num_classes), dim=-1).indices
        self._in_top5 += (best == targets.unsqueeze(1)).any(-1).sum()
        self._loss += F.cross_entropy(logits, targets, reduction="sum").double()
        bins = (confidence.double() * _CALIBRATION_BINS).ceil().long().clamp(1, _CALIBRATION_BINS) - 1
        values = torch.stack([torch.ones_like(confidence), (predicted == targets).float(), confidence]).double()
        self._bins.index_add_(1, bins, values)

    def sums(self) -> tuple[Tensor, ...]:
        """Tensors to be added up over processes, in place. Their sums are those of all pictures."""
        return self._confusion, self._in_top5, self._loss, self._bins

    def result(self, classes: Sequence[str]) -> ClassificationMetrics:
        """The metrics. There must be at least one picture."""
        confusion = self._confusion
        count = int(confusion.sum())
        right, actual, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
        rows = tuple(
            ClassMetrics(
                name,
                int(actual[i]),
                int(predicted[i]),
                float(right[i] / actual[i]) if actual[i] else None,
                float(right[i] / predicted[i]) if predicted[i] else None,
            )
            for i, name in enumerate(classes)
        )
        recalls = [row.recall for row in rows if row.recall is not None]
        in_bin, correct, confidence = self._bins
        return ClassificationMetrics(
            count=count,
            top1=float(right.sum() / count),
            top5=float(self._in_top5 / count),
            loss=float(self._loss / count),
            # |accuracy - confidence| of a bin times the bin's share of the pictures.
            calibration_error=float((correct - confidence).abs().sum() / in_bin.sum()),
            mean_recall=sum(recalls) / len(recalls),
            classes=rows,
            confusion=tuple(tuple(row) for row in confusion.tolist()),
        )
