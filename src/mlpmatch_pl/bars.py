"""Counts as a picture of bars."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from mlpmatch_pl.pictures import FONT_SIZE, INK, MARGIN, PAPER, TITLE

HEIGHT, LEAST_BAR, GAP = 160, 26, 4  # pixels
COLORS = ((53, 110, 168), (128, 177, 211))  # of neighboring groups, in turns
SMALL = 11  # font size


def bar_picture(groups: Sequence[Sequence[tuple[str, int]]], title: str) -> PILImage.Image:
    """Draw a bar for each count, with its name below and its count above.

    Args:
        groups: Bars, as name and count, that belong together; neighboring groups differ in color.
        title: What is counted.

    Example:
        >>> picture = bar_picture([[("0", 4), ("1", 2)], [("2", 0)]], "steps")
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
