"""Counts as a picture of bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from mlpmatch_pl.visualization.panels import FONT_SIZE, INK, MARGIN, PAPER, TITLE

HEIGHT, LEAST_BAR, GAP = 160, 26, 4  # pixels
COLORS = ((53, 110, 168), (128, 177, 211))  # of neighboring groups, in turns
SMALL = 11  # font size


def bar_plot(groups: Sequence[Sequence[tuple[str, int]]], title: str) -> PILImage.Image:
    """Draw a bar for each count, with its name below and its count above.

    Args:
        groups: Bars, as name and count, that belong together; neighboring groups differ in color.
        title: What is counted.

    Example:
        >>> picture = bar_plot([[("0", 4), ("1", 2)], [("2", 0)]], "steps")
        >>> picture.mode, picture.height
        ('RGB', 220)
    """
    bars = [(name, count, COLORS[number % 2]) for number, group in enumerate(groups) for name, count in group]
    font, small = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(SMALL)
    texts = [text for name, count, _ in bars for text in (name, str(count))]
    wide = max([LEAST_BAR, *(round(small.getlength(text)) + GAP for text in texts)])
    width = max(2 * MARGIN + len(bars) * (wide + GAP), round(font.getlength(title)) + 2 * MARGIN)
    floor = TITLE + SMALL + MARGIN + HEIGHT
    picture = PILImage.new("RGB", (width, floor + SMALL + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, 3), title, fill=INK, font=font)
    most = max((count for _, count, _ in bars), default=0)
    for index, (name, count, color) in enumerate(bars):
        x, top = MARGIN + index * (wide + GAP), floor - round(HEIGHT * count / max(most, 1))
        if count:
            draw.rectangle((x, top, x + wide - 1, floor - 1), fill=color)
        draw.text((x + wide // 2, top - 2), str(count), fill=INK, font=small, anchor="mb")
        draw.text((x + wide // 2, floor + 2), name, fill=INK, font=small, anchor="mt")
    return picture


CELL, SMALL_CELL = 36, 14  # pixels; small without numbers
MOST_NUMBERED = 32  # classes, for cells with numbers
LONGEST_NAME = 24  # characters
WHITE, FULL, EMPTY = (255, 255, 255), (8, 48, 107), (225, 225, 225)  # 0 %, 100 %, and a class without true pixels
DARK = 50  # percent from which numbers are white


def confusion_matrix_plot(counts_CC: NDArray[Any], class_names: Sequence[str]) -> PILImage.Image:
    """Draw a confusion matrix, normalized by row.

    Args:
        counts_CC: Pixels by true and predicted class, (C, C).
        class_names: Names of the classes.

    Example:
        >>> picture = confusion_matrix_plot(np.array([[3, 1], [0, 0]]), ["road", "sky"])
        >>> picture.mode, picture.getpixel((picture.width - 1, 0)) == PAPER
        ('RGB', True)
    """
    numbered = len(class_names) <= MOST_NUMBERED
    cell, font = (CELL, _font(FONT_SIZE)) if numbered else (SMALL_CELL, _font(SMALL_CELL - 3))
    names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in class_names]
    longest = round(max(font.getlength(name) for name in names))
    title = "pixels of a true class (row) by predicted class (column), %"
    left, top = longest + 2 * MARGIN, longest + 2 * MARGIN + TITLE
    width = max(left + cell * len(names) + MARGIN, round(_font(FONT_SIZE).getlength(title)) + 2 * MARGIN)
    picture = PILImage.new("RGB", (width, top + cell * len(names) + MARGIN), PAPER)
    ImageDraw.Draw(picture).text((MARGIN, 3), title, fill=INK, font=_font(FONT_SIZE))
    _draw_names(picture, names, (left, top), cell, font)
    _draw_cells(picture, row_percent(counts_CC), (left, top), cell, font if numbered else None)
    return picture


def row_percent(counts_CC: NDArray[Any]) -> NDArray[np.float64]:
    """Return each row's shares in percent; NaN in the rows of classes without true pixels.

    Example:
        >>> row_percent(np.array([[3, 1], [0, 0]])).tolist()
        [[75.0, 25.0], [nan, nan]]
    """
    totals = counts_CC.sum(axis=1, keepdims=True)
    percent: NDArray[np.float64] = np.full(counts_CC.shape, np.nan)
    np.divide(100.0 * counts_CC, totals, out=percent, where=totals > 0)
    return percent


def _draw_names(picture: PILImage.Image, names: Sequence[str], corner: tuple[int, int], cell: int, font: Any) -> None:
    (left, top), draw = corner, ImageDraw.Draw(picture)
    for index, name in enumerate(names):
        middle = index * cell + cell // 2
        draw.text((left - MARGIN // 2, top + middle), name, fill=INK, font=font, anchor="rm")
        upright = PILImage.new("RGB", (top - TITLE, cell), PAPER)
        ImageDraw.Draw(upright).text((MARGIN // 2, cell // 2), name, fill=INK, font=font, anchor="lm")
        picture.paste(upright.rotate(90, expand=True), (left + index * cell, TITLE))


def _draw_cells(
    picture: PILImage.Image, percent_CC: NDArray[np.float64], corner: tuple[int, int], cell: int, font: Any | None
) -> None:
    draw = ImageDraw.Draw(picture)
    for (row, column), percent in np.ndenumerate(percent_CC):
        x, y = corner[0] + column * cell, corner[1] + row * cell
        draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=_color(percent))  # a line of paper between cells
        if font is not None and percent >= 0.5:
            ink = WHITE if percent >= DARK else INK
            draw.text((x + cell // 2, y + cell // 2), f"{percent:.0f}", fill=ink, font=font, anchor="mm")


def _color(percent: float) -> tuple[int, int, int]:
    if percent != percent:
        return EMPTY
    red, green, blue = (round(a + (b - a) * percent / 100) for a, b in zip(WHITE, FULL, strict=True))
    return red, green, blue


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
