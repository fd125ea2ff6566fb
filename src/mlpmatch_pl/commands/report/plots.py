"""Draw mIoU and learning curves with matplotlib, as SVG that follows the page's light or dark theme."""

from __future__ import annotations

import io
import textwrap
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from mlpmatch_pl.commands.report.tables import Group

# A method has the same color in every report. The order is that of tables: baselines first.
COLORS = {
    "supervised": "#8a8a8a",
    "fixmatch": "#e69f00",
    "unimatch": "#2f86d6",
    "mlpmatch": "#d55e00",
    "mlpmatch_official": "#009e73",
}
_OTHER_COLORS = ("#cc79a7", "#56b4e9", "#8c6bb1", "#a6761d")
_LINES = ("-", "--", ":", "-.")  # of the settings of one method
_SHADES = (0.0, 0.45, -0.35, 0.25)  # towards white, or black if negative
_INK = "#222223"  # becomes currentColor
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "mlpmatch_pl", "text.parse_math": False, "text.color": _INK,
    "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "font.size": 9,
    "axes.titlesize": 9, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#888888", "grid.alpha": 0.25, "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip
_MAX_POINTS = 200  # of a curve; more than a plot has pixels for only make the page slow
_HIDDEN = ("train/loss_s1", "train/loss_s2")  # parts of train/loss_s


def method_color(method: str) -> str:
    """Return the color of a method, the same in every report."""
    return COLORS.get(method) or _OTHER_COLORS[zlib.crc32(method.encode()) % len(_OTHER_COLORS)]


def series_styles(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Return matplotlib's style of each series: the method's color, with a shade and dashes by settings."""
    styles: dict[str, dict[str, Any]] = {}
    used: dict[str, int] = {}
    for group in sorted(groups, key=lambda group: group.series):
        if group.series not in styles:
            color = method_color(group.method)
            rank = used[color] = used.get(color, -1) + 1
            styles[group.series] = {
                "color": _shaded(color, _SHADES[rank % len(_SHADES)]), "linestyle": _LINES[rank % len(_LINES)]
            }  # fmt: skip
    return styles


def _shaded(color: str, shade: float) -> str:
    channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    target = 255 if shade > 0 else 0
    return "#" + "".join(f"{round(c):02x}" for c in channels + (target - channels) * abs(shade))


def series_names(groups: Sequence[Group]) -> list[str]:
    """Name each of the groups that are drawn together by its method and by the settings in which they differ."""
    settings = pd.DataFrame([group.settings for group in groups], dtype=str)
    differing = settings.loc[:, settings.nunique() > 1]
    return [
        ", ".join([group.method, *(f"{key}={value}" for key, value in row.items() if value)])
        for group, (_, row) in zip(groups, differing.iterrows(), strict=True)
    ]


def score_plot(groups: Sequence[Group], styles: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw the mIoU of finished groups of one dataset, against the number of labels if there are several numbers.

    Dots are runs, or means over runs if drawn against the number of labels; bars are standard deviations.

    Args:
        groups: The groups.
        styles: Those of `series_styles`.

    Returns:
        An SVG document.
    """
    several = len({group.count for group in groups}) > 1
    return _against_labels(groups, styles) if several else _one_row_each(groups, styles)


def _against_labels(groups: Sequence[Group], styles: Mapping[str, Mapping[str, Any]]) -> str:
    counts = sorted({group.count for group in groups})
    names = dict(zip((group.series for group in groups), series_names(groups), strict=True))
    with _figure(6.4, 3.4, [*names.values()]) as (axes, svg):
        for index, (series, name) in enumerate(names.items()):
            own, style = [group for group in groups if group.series == series], styles[series]
            shift = 1.015 ** (index - (len(names) - 1) / 2)  # keeps error bars at one number of labels apart
            x = np.array([group.count * shift for group in own])
            scores = [100 * group.scores["miou"] for group in own]
            means, deviations = [s.mean() for s in scores], [s.std() for s in scores]
            axes.errorbar(x, means, deviations, fmt="o", ms=5, capsize=3, color=style["color"])
            line = pd.Series(means).groupby(x).mean()  # through the mean of lists of one size
            axes.plot(line.index, line, label=name, **style)
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.set(xlabel="labeled images", title="mIoU %")
    return svg()


def _one_row_each(groups: Sequence[Group], styles: Mapping[str, Mapping[str, Any]]) -> str:
    several = len({group.hashes for group in groups}) > 1
    names = [
        _wrapped(f"{name} ({group.label})" if several else name)
        for group, name in zip(groups, series_names(groups), strict=True)
    ]
    with _figure(6.4, 0.9 + 0.42 * len(groups)) as (axes, svg):
        for row, group in enumerate(groups):
            scores, color = 100 * group.scores["miou"], styles[group.series]["color"]
            axes.plot(scores, [row] * len(scores), "o", ms=5, alpha=0.45, color=color, mew=0)
            axes.errorbar(scores.mean(), row, xerr=scores.std(), fmt="D", ms=6, capsize=4, color=color)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_title("mIoU %: runs, mean and standard deviation")
    return svg()


def curve_plots(groups: Sequence[Group], styles: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Draw the learning curves of groups with one labeled list: validation mIoU, each loss term, confident ratio.

    A line is the mean of a group's finished runs in a band of their standard deviation. Unfinished runs are thin lines.

    Args:
        groups: The groups.
        styles: Those of `series_styles`.

    Returns:
        An SVG document by the name of each metric.
    """
    found = {key for group in groups for run in group.runs for key in run.curves}
    losses = sorted(key for key in found if key.startswith("train/loss") and key not in _HIDDEN)
    wanted = ("val/miou", *losses, "train/confident_ratio", "train/lambda_np")
    return {key: _curve_plot(groups, styles, key) for key in wanted if key in found}


def _curve_plot(groups: Sequence[Group], styles: Mapping[str, Mapping[str, Any]], key: str) -> str:
    drawn = [
        (name, group)
        for name, group in zip(series_names(groups), groups, strict=True)
        if any(key in run.curves for run in group.runs)
    ]
    with _figure(4.6, 2.7, [name for name, _ in drawn]) as (axes, svg):
        for name, group in drawn:
            style = styles[group.series]
            axes.plot([], [], label=name, **style)
            if curves := [run.curves[key] for run in group.finished if key in run.curves]:
                table = _thinned(pd.concat(curves, axis="columns").dropna())
                mean, deviation = table.mean(axis="columns"), table.std(axis="columns").fillna(0)
                axes.plot(table.index, mean, marker="o" if len(table) == 1 else None, **style)
                axes.fill_between(
                    table.index, mean - deviation, mean + deviation, color=style["color"], alpha=0.18, lw=0
                )
            for run in group.runs:
                if not run.finished and key in run.curves:
                    curve = _thinned(run.curves[key].dropna().to_frame())
                    axes.plot(curve.index, curve, lw=0.8, **style)
        axes.set(title=key, xlabel="step")
    return svg()


def _thinned(table: pd.DataFrame) -> pd.DataFrame:
    """Replace a long curve by means over equal parts, and leave out values that are not finite."""
    table = table[np.isfinite(table).all(axis="columns")]
    parts = np.arange(len(table)) // (len(table) // (_MAX_POINTS + 1) + 1)
    means = table.groupby(parts).mean()
    return means.set_index(pd.Series(table.index, dtype=float).groupby(parts).mean().to_numpy())


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 60, break_on_hyphens=False)


@contextmanager
def _figure(width: float, height: float, names: Sequence[str] = ()) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Yield the axes of a figure, and a function that returns its SVG document after the ``with`` block.

    Args:
        width: Width in inches.
        height: Height in inches, without the legend.
        names: Labels of the lines, for a legend below the axes if there are several.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    labels, file = [_wrapped(name) for name in names], io.StringIO()
    columns = max(1, int(width * 13 / max(map(len, labels), default=1)))
    lines = sum(1 + label.count("\n") for label in labels) / columns if len(labels) > 1 else 0
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height + 0.16 * lines), layout="constrained")
        axes = figure.subplots()
        yield axes, lambda: _follow_theme(file.getvalue())
        if lines:
            handles, _ = axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower left", ncols=columns)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata=nothing)


def _follow_theme(svg: str) -> str:
    """Drop what comes before the root, and draw text and axes in the color of the text around the figure."""
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")
