"""Pictures of trainings and predictions: curves, confusion matrix, labels, routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shiftadd3d.nn.routing import RoutingMap
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

    Top-5 accuracy is left out if it is always 1, as with few classes.

    Raises:
        UserError: it cannot be written.
    """
    epochs = [record["epoch"] for record in history]
    layers = list(history[0]["mult_shares"])
    figure = _figure(12 if layers else 8.5, 3.8)
    axes = figure.subplots(1, 3 if layers else 2)
    axes[0].plot(epochs, [record["train_loss"] for record in history], marker=".", label="training")
    axes[0].plot(epochs, [record["val_loss"] for record in history], marker=".", label="validation")
    axes[0].set(title="loss", xlabel="epoch")
    _legend_below(axes[0])
    axes[1].plot(epochs, [100 * record["top1"] for record in history], marker=".", label="top-1")
    if any(record["top5"] < 1 for record in history):
        axes[1].plot(epochs, [100 * record["top5"] for record in history], marker=".", label="top-5")
    axes[1].set(title="validation accuracy, %", xlabel="epoch")
    _legend_below(axes[1])
    if layers:
        for position, layer in enumerate(layers):
            shade = 0.15 + 0.75 * position / max(1, len(layers) - 1)
            shares = [100 * record["mult_shares"][layer] for record in history]
            axes[2].plot(epochs, shares, marker=".", color=_colormap("viridis")(shade), label=layer)
        axes[2].set(title="tokens sent to the mult expert, %", xlabel="epoch", ylim=(0, 100))
        if len(layers) <= 12:
            _legend_below(axes[2])
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    _save(figure, path)


def _legend_below(axis: Any) -> None:
    # Anywhere within, it covers the curves of some training.
    longest = max(len(label) for label in axis.get_legend_handles_labels()[1])
    columns = min(4, max(1, 50 // longest))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=columns, fontsize=7, frameon=False)


def _colormap(name: str) -> Any:
    from matplotlib import colormaps

    return colormaps[name]


def save_confusion(metrics: ClassificationMetrics, title: str, path: Path) -> None:
    """The confusion matrix as a PNG. Rows are classes, and columns are predictions. Each row shows shares of its class.

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


_LABELLED_WIDTH = 480
_LABELLED_HEIGHT = 1440
_BAR_HEIGHT = 22


def save_labelled(image: Image.Image, labels: Sequence[str], probabilities: Sequence[float], path: Path) -> None:
    """A picture with its likeliest classes below, as a PNG: 480 pixels wide, and at most 1440 high without these.

    Args:
        image: RGB.
        labels: best first.
        probabilities: of the labels.
        path: where to.

    Raises:
        UserError: it cannot be written.
    """
    factor = min(_LABELLED_WIDTH / image.width, _LABELLED_HEIGHT / image.height)
    width, height = (max(1, round(side * factor)) for side in image.size)
    picture = image.resize((width, height), Image.Resampling.LANCZOS)
    shown = list(zip(labels, probabilities, strict=True))[:3]
    sheet = Image.new("RGB", (_LABELLED_WIDTH, height + _BAR_HEIGHT * len(shown)), "white")
    sheet.paste(picture, ((_LABELLED_WIDTH - width) // 2, 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for row, (label, probability) in enumerate(shown):
        top = height + row * _BAR_HEIGHT
        draw.rectangle((0, top, probability * _LABELLED_WIDTH, top + _BAR_HEIGHT - 2), fill="#b8d4f0")
        draw.text((6, top + 2), f"{label}  {probability:.1%}", fill="black", font=font)
    write_atomically(path, lambda file: sheet.save(file, format="PNG"))


_EXPERT_COLORS = ("#e8590c", "#1971c2", "#2f9e44", "#9c36b5")
_ROUTING_COLUMNS = 6


def save_routing(seen: np.ndarray, maps: Sequence[RoutingMap], title: str, path: Path) -> None:
    """The expert of each patch, layer by layer, as colours over the picture, as in the paper.

    Args:
        seen: [size, size, 3] uint8, the input of the model.
        maps: at least one routing map.
        title: a line above.
        path: the file.

    Raises:
        UserError: it cannot be written.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    panels = len(maps) + 2
    columns = min(_ROUTING_COLUMNS, panels)
    rows = -(-panels // columns)
    figure = _figure(1.9 * columns, 2.15 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    extent = (0, seen.shape[1], seen.shape[0], 0)
    axes[0].imshow(seen, extent=extent)
    axes[0].set_title("what the model saw", fontsize=8)
    # How often, over the layers, a patch went to the first expert.
    finest = max(len(layer.assignment) for layer in maps)
    often = np.mean([_enlarged(layer.assignment == 0, finest) for layer in maps], axis=0)
    axes[1].imshow(seen.mean(-1), extent=extent, cmap="gray")
    heat = axes[1].imshow(often, extent=extent, cmap="inferno", vmin=0, vmax=1, alpha=0.75, interpolation="nearest")
    axes[1].set_title(f"{maps[0].experts[0]}, mean of layers", fontsize=8)
    # Within the panel: beside it, it would push the panels of all rows apart.
    bar = axes[1].inset_axes((0.04, 0.04, 0.92, 0.1))
    figure.colorbar(heat, cax=bar, orientation="horizontal", ticks=[])
    for share, color in ((0, "white"), (1, "black")):
        alignment = "right" if share else "left"
        bar.text(0.02 + 0.96 * share, 0.45, f"{share:.0%}", color=color, fontsize=6, ha=alignment, va="center")
    for axis, layer in zip(axes[2:], maps, strict=False):
        colors = np.array([to_rgb(color) for color in _EXPERT_COLORS])[layer.assignment]
        axis.imshow(seen.mean(-1), extent=extent, cmap="gray")
        axis.imshow(colors, extent=extent, alpha=0.5, interpolation="nearest")
        axis.set_title(f"{layer.layer}\n{layer.experts[0]} {layer.share(0):.0%}", fontsize=7)
    names = maps[0].experts
    handles = [Patch(color=color, label=name) for color, name in zip(_EXPERT_COLORS, names, strict=False)]
    figure.legend(
        handles=handles,
        title=title,
        title_fontsize=10,
        loc="outside upper center",
        ncols=len(names),
        fontsize=8,
        frameon=False,
    )
    _save(figure, path)


def _enlarged(grid: np.ndarray, side: int) -> np.ndarray:
    """`grid` on `side` x `side` cells, each taking the cell it lies in."""
    rows, columns = ((np.arange(side) * length) // side for length in grid.shape)
    return grid[np.ix_(rows, columns)].astype(float)
