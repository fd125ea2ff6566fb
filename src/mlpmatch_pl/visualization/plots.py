"""Bar charts and confusion matrices as images, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BAR_COLORS = ("#356ea8", "#80b1d3")  # alternate between neighboring groups
NUMBERED_CLASSES = 32  # matrices of more classes have cells too small for numbers
LONGEST_NAME = 24  # characters
DPI = 100


def bar_plot(groups: Sequence[Sequence[tuple[str, int]]], title: str) -> PILImage.Image:
    """Draw one bar per count, labeled with its name and value.

    Args:
        groups: Groups of (name, count); neighboring groups differ in color.
        title: What is counted.

    Returns:
        An RGB image.

    Example:
        >>> bar_plot([[("0", 4), ("1", 2)], [("2", 0)]], "steps").mode
        'RGB'
    """
    from matplotlib.figure import Figure

    names = [name for group in groups for name, _ in group]
    figure = Figure(figsize=(max(5.0, 0.4 * len(names)), 2.4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    start = 0
    for number, group in enumerate(groups):
        counts = [count for _, count in group]
        bars = axes.bar(range(start, start + len(group)), counts, color=BAR_COLORS[number % 2])
        axes.bar_label(bars, fontsize=7)
        start += len(group)
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set_title(title, loc="left", fontsize=9)
    axes.margins(x=0.02, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    return _render(figure)


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
    from matplotlib.figure import Figure

    numbered = len(class_names) <= NUMBERED_CLASSES
    names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in class_names]
    side = (0.36 if numbered else 0.14) * len(names)
    margin = 0.9 + 0.075 * max(map(len, names))
    figure = Figure(figsize=(side + margin, side + margin), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    percent_CC = row_percent(counts_CC)
    axes.set_facecolor("#e1e1e1")  # shows through where a row is NaN
    axes.imshow(percent_CC, cmap="Blues", vmin=0, vmax=100)
    size = 9 if numbered else 6
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=size, parse_math=False)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted class", fontsize=9)
    axes.set_ylabel("true class, pixels in %", fontsize=9)
    if numbered:
        for (row, column), percent in np.ndenumerate(percent_CC):
            if percent >= 0.5:
                ink = "white" if percent >= 50 else "black"
                axes.text(column, row, f"{percent:.0f}", color=ink, fontsize=8, ha="center", va="center")
    return _render(figure)


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


def _render(figure: Figure) -> PILImage.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return PILImage.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
