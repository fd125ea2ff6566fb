"""Bar charts, confusion matrices and reliability diagrams as images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from mlpmatch_pl.evaluation.calibration import Calibration

BAR_COLORS = ("#356ea8", "#80b1d3")  # alternate between neighboring groups
NUMBERED_CLASSES = 32  # matrices of more classes have cells too small for numbers
LONGEST_NAME = 24  # characters
DPI = 100


def bar_plot(groups: Sequence[Sequence[tuple[str, int]]], title: str, x: str, y: str) -> PILImage.Image:
    """Draw one bar per count, labeled with its name and value.

    Args:
        groups: Groups of (name, count); neighboring groups differ in color.
        title: Title of the plot.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.

    Returns:
        An RGB image.

    Example:
        >>> bar_plot([[("0", 4), ("1", 2)], [("2", 0)]], "deactivated", "block", "steps").mode
        'RGB'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for group in groups for name, _ in group]
    figure = Figure(figsize=(max(5.0, 0.4 * len(names)), 2.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    start = 0
    for number, group in enumerate(groups):
        counts = [count for _, count in group]
        bars = axes.bar(range(start, start + len(group)), counts, color=BAR_COLORS[number % 2])
        axes.bar_label(bars, fontsize=7)
        start += len(group)
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(x=0.02, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return PILImage.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def reliability_plot(calibration: Calibration) -> PILImage.Image:
    """Draw the share of pixels that are right over their confidence, above the number of pixels.

    Returns:
        An RGB image.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4.6), dpi=DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges_B1 = np.linspace(0, 1, len(calibration.count_B) + 1)
    width, left_B = edges_B1[1], edges_B1[:-1]
    upper.bar(left_B, calibration.accuracy_B.nan_to_num(), width, align="edge", color=BAR_COLORS[1], edgecolor="white")
    upper.plot((0, 1), (0, 1), "--", color="#777777", linewidth=1, label="calibrated")
    upper.plot(calibration.confidence_B, calibration.accuracy_B, ".-", color=BAR_COLORS[0], label="measured")
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="share of right pixels")
    upper.set_title(f"calibration error {calibration.ece:.3f}", loc="left", fontsize=9)
    upper.legend(frameon=False, fontsize=8, loc="upper left")
    share_B = calibration.count_B / calibration.count_B.sum()
    lower.bar(left_B, share_B, width, align="edge", color=BAR_COLORS[1], edgecolor="white")
    lower.set(xlabel="confidence", ylabel="share of pixels")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return PILImage.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def confusion_matrix_plot(counts_CC: NDArray[Any], class_names: Sequence[str]) -> PILImage.Image:
    """Draw a confusion matrix, normalized by row; rows of classes without true pixels are gray.

    Args:
        counts_CC: Number of pixels by true and predicted class, (C, C).
        class_names: Names of the classes.

    Returns:
        An RGB image.

    Example:
        >>> confusion_matrix_plot(np.array([[3, 1], [0, 0]]), ["road", "sky"]).mode
        'RGB'
    """
    import matplotlib as mpl
    from matplotlib.font_manager import findfont

    # Pillow draws text a hundred times faster than matplotlib, which takes seconds for 150 classes.
    numbered = len(class_names) <= NUMBERED_CLASSES
    cell, size = (36, 13) if numbered else (14, 9)  # pixels
    title_font, font = (ImageFont.truetype(findfont("DejaVu Sans"), pixels) for pixels in (12, size))
    lines = (" ".join(name.split()) for name in class_names)
    names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in lines]
    margin, side = math.ceil(max(map(font.getlength, names))) + 8, cell * len(names)
    labels = PILImage.new("RGB", (margin, side), "white")
    for row, name in enumerate(names):
        ImageDraw.Draw(labels).text((margin - 4, (row + 0.5) * cell), name, "black", font, "rm")
    percent_CC = row_percent(counts_CC)
    shades = mpl.colormaps["Blues"].with_extremes(bad="#e1e1e1")(np.ma.masked_invalid(percent_CC / 100), bytes=True)
    title, top = "true class (rows), predicted class (columns), pixels in %", 26
    width = 8 + max(margin + side, math.ceil(title_font.getlength(title)))
    picture = PILImage.new("RGB", (width, top + side + margin), "white")
    picture.paste(labels, (0, top))
    picture.paste(labels.transpose(PILImage.Transpose.ROTATE_90), (margin, top + side))
    cells = PILImage.fromarray(shades[..., :3]).resize((side, side), PILImage.Resampling.NEAREST)
    draw = ImageDraw.Draw(cells)
    for (row, column), percent in np.ndenumerate(percent_CC):
        if numbered and percent >= 0.5:
            center, ink = ((column + 0.5) * cell, (row + 0.5) * cell), "white" if percent >= 50 else "black"
            draw.text(center, f"{percent:.0f}", ink, title_font, "mm")
    picture.paste(cells, (margin, top))
    ImageDraw.Draw(picture).text((4, 5), title, "black", title_font)
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
