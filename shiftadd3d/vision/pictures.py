"""Pictures of how a training went and what a classifier sees: curves, confusion matrix, labels, routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shiftadd3d.vision.checkpoint import write_atomically
from shiftadd3d.vision.metrics import ClassificationMetrics

_MOST_LABELLED_CLASSES = 40
_MOST_NUMBERED_CLASSES = 25


def _figure(width: float, height: float) -> Any:
    # Without pyplot: no window system is asked for, and no figure is kept.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    # No version of matplotlib in the file: equal content, equal bytes.
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110, metadata={"Software": None}))


def save_curves(history: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Losses, accuracy and, with mixtures, the routers' shares over the epochs, as a PNG.

    Raises:
        UserError: it cannot be written.
    """
    epochs = [record["epoch"] for record in history]
    layers = list(history[0]["mult_shares"])
    figure = _figure(12 if layers else 8.5, 3.4)
    axes = figure.subplots(1, 3 if layers else 2)
    axes[0].plot(epochs, [record["train_loss"] for record in history], marker=".", label="training")
    axes[0].plot(epochs, [record["val_loss"] for record in history], marker=".", label="validation")
    axes[0].set(title="loss", xlabel="epoch")
    axes[0].legend()
    axes[1].plot(epochs, [100 * record["top1"] for record in history], marker=".", label="top-1")
    axes[1].plot(epochs, [100 * record["top5"] for record in history], marker=".", label="top-5")
    axes[1].set(title="validation accuracy, %", xlabel="epoch")
    axes[1].legend(loc="lower right")
    if layers:
        for position, layer in enumerate(layers):
            shade = 0.15 + 0.75 * position / max(1, len(layers) - 1)
            shares = [100 * record["mult_shares"][layer] for record in history]
            axes[2].plot(epochs, shares, marker=".", color=_colormap("viridis")(shade), label=layer)
        axes[2].set(title="tokens sent to the mult expert, %", xlabel="epoch", ylim=(0, 100))
        if len(layers) <= 8:
            axes[2].legend(fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    _save(figure, path)


def _colormap(name: str) -> Any:
    from matplotlib import colormaps

    return colormaps[name]


def save_confusion(metrics: ClassificationMetrics, title: str, path: Path) -> None:
    """The confusion matrix, each row as shares of its class, as a PNG. Rows are classes, columns what they became.

    Raises:
        UserError: it cannot be written.
    """
    counts = np.array(metrics.confusion)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    number = len(counts)
    side = 2.2 + 0.36 * min(number, _MOST_LABELLED_CLASSES)
    figure = _figure(side + 1.2, side)
    axis = figure.subplots()
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, label="share of the class", shrink=0.8)
    axis.set(title=f"{title}: top-1 {metrics.top1:.1%}", xlabel="predicted", ylabel="class")
    names = [row.name for row in metrics.classes]
    if number <= _MOST_LABELLED_CLASSES:
        axis.set_xticks(range(number), names, rotation=90, fontsize=8)
        axis.set_yticks(range(number), names, fontsize=8)
    if number <= _MOST_NUMBERED_CLASSES:
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.6 else "black"
            axis.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=color)
    _save(figure, path)
