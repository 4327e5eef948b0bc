"""Pictures side by side, with captions."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from shiftadd3d._errors import UserError

_GAP = 4
_CAPTION = 18
_MIN_CELL_WIDTH = 160
"""Pixels that a caption needs: smaller pictures are enlarged by a whole factor, so that they stay what they are."""


def grid(
    rows: Sequence[Sequence[UInt8[np.ndarray, "h w 3"]]],
    columns: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
) -> Image.Image:
    """A table of pictures on white.

    Args:
        rows: pictures, as many in each row as there are columns; they may differ in size.
        columns: a heading for each.
        captions: a line below each picture, or none.
    """
    cells = [[Image.fromarray(cell) for cell in row] for row in rows]
    factor = -(-_MIN_CELL_WIDTH // max(cell.width for row in cells for cell in row))
    cells = [
        [cell.resize((cell.width * factor, cell.height * factor), Image.Resampling.NEAREST) for cell in row]
        for row in cells
    ]
    widths = [max(row[column].width for row in cells) for column in range(len(columns))]
    below = 0 if captions is None else _CAPTION
    heights = [max(cell.height for cell in row) + below for row in cells]

    sheet = Image.new(
        "RGB", (sum(widths) + _GAP * (len(widths) + 1), _CAPTION + sum(heights) + _GAP * (len(heights) + 1)), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    y = _GAP
    lefts = [_GAP * (column + 1) + sum(widths[:column]) for column in range(len(columns))]
    for left, heading in zip(lefts, columns, strict=True):
        draw.text((left, y), heading, fill="black", font=font)
    y += _CAPTION
    for index, row in enumerate(cells):
        for column, cell in enumerate(row):
            sheet.paste(cell, (lefts[column], y))
            if captions is not None:
                draw.text((lefts[column], y + cell.height + 1), captions[index][column], fill="black", font=font)
        y += heights[index] + _GAP
    return sheet


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a PNG; it appears whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(unfinished, format="PNG")
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            unfinished.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}; name a writable folder") from None
