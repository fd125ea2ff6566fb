"""Draw mIoU and learning curves with matplotlib, as SVG that follows the page's light or dark theme."""

from __future__ import annotations

import io
import textwrap
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd

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
_INK = "#222223"  # becomes currentColor
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "mlpmatch_pl", "text.parse_math": False, "text.color": _INK,
    "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "font.size": 9,
    "axes.titlesize": 9, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#888888", "grid.alpha": 0.25, "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip
_MAX_POINTS = 200  # of a curve; more than a plot has pixels for only make the page slow
_HIDDEN = ("train/loss_s1", "train/loss_s2")  # parts of train/loss_s
Styles = Mapping[str, Mapping[str, Any]]


def method_color(method: str) -> str:
    """Return the color of a method, the same in every report."""
    return COLORS.get(method) or _OTHER_COLORS[zlib.crc32(method.encode()) % len(_OTHER_COLORS)]


def series_styles(runs: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return matplotlib's style of each series of `group_runs`: the method's color; dashes and opacity by settings."""
    series = runs[["method", "series"]].drop_duplicates().sort_values("series")
    colors = series["method"].map(method_color)
    return {
        name: {"color": color, "linestyle": _LINES[rank % len(_LINES)], "alpha": max(0.45, 1 - 0.25 * rank)}
        for name, color, rank in zip(series["series"], colors, colors.groupby(colors).cumcount(), strict=True)
    }


def score_plot(runs: pd.DataFrame, styles: Styles) -> str:
    """Draw the mIoU of one dataset's finished runs as SVG, against the number of labels if there are several numbers.

    Dots are runs, or means over runs if drawn against the number of labels; bars are standard deviations.
    """
    groups = runs.assign(percent=100 * runs["test/miou"]).groupby("group", sort=False)
    table = groups[["labels", "list", "list_id", "series"]].first().join(groups["percent"].agg(["mean", "std"]))
    if table["labels"].nunique() > 1:
        return _against_labels(table, styles)
    names = table["series"] + (" (" + table["list"] + ")" if table["list_id"].nunique() > 1 else "")
    with _figure(6.4, 0.9 + 0.42 * len(table)) as (axes, svg):
        for row, (group, scores) in enumerate(groups["percent"]):
            color = styles[table.at[group, "series"]]["color"]
            axes.plot(scores, [row] * len(scores), "o", ms=5, alpha=0.45, color=color, mew=0)
            axes.errorbar(scores.mean(), row, xerr=scores.std(), fmt="D", ms=6, capsize=4, color=color)
        axes.set_yticks(range(len(names)), names.map(_wrapped))
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_title("mIoU %: runs, mean and standard deviation")
    return svg()


def _against_labels(table: pd.DataFrame, styles: Styles) -> str:
    names, counts = list(table["series"].unique()), sorted(table["labels"].unique())
    with _figure(6.4, 3.4, names) as (axes, svg):
        for index, (name, own) in enumerate(table.groupby("series", sort=False)):
            x = own["labels"] * 1.015 ** (index - (len(names) - 1) / 2)  # keeps error bars at one number apart
            axes.errorbar(x, own["mean"], own["std"], fmt="o", ms=5, capsize=3, color=styles[name]["color"])
            line = own["mean"].groupby(x).mean()  # through the mean of lists of one size
            axes.plot(line.index, line, label=name, **styles[name])
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.set(xlabel="labeled images", title="mIoU %")
    return svg()


def curve_plots(runs: pd.DataFrame, styles: Styles) -> dict[str, str]:
    """Draw the learning curves of runs with one labeled list as SVG: validation mIoU, loss terms, confident ratio.

    A line is the mean of a group's finished runs in a band of their standard deviation. Unfinished runs are thin lines.

    Returns:
        An SVG document by the name of each metric.
    """
    found = {key for curves in runs["curves"] for key in curves}
    losses = sorted(key for key in found if key.startswith("train/loss") and key not in _HIDDEN)
    wanted = ("val/miou", *losses, "train/confident_ratio", "train/lambda_np")
    return {key: _curve_plot(runs, styles, key) for key in wanted if key in found}


def _curve_plot(runs: pd.DataFrame, styles: Styles, key: str) -> str:
    drawn = runs[[key in curves for curves in runs["curves"]]]
    with _figure(4.6, 2.7, list(drawn["series"].unique())) as (axes, svg):
        for name, own in drawn.groupby("series", sort=False):
            style = styles[name]
            axes.plot([], [], label=name, **style)
            if finished := [curves[key] for curves in own.loc[own["finished"], "curves"]]:
                table = _thinned(pd.concat(finished, axis="columns").dropna())
                mean, deviation = table.mean(axis="columns"), table.std(axis="columns").fillna(0)
                axes.plot(table.index, mean, marker="o" if len(table) == 1 else None, **style)
                axes.fill_between(
                    table.index, mean - deviation, mean + deviation, color=style["color"], alpha=0.18, lw=0
                )
            for curves in own.loc[~own["finished"], "curves"]:
                curve = _thinned(curves[[key]].dropna())
                axes.plot(curve.index, curve, lw=0.8, **style)
        axes.set(title=key, xlabel="step")
    return svg()


def _thinned(table: pd.DataFrame) -> pd.DataFrame:
    """Replace a long curve by means over equal parts, and leave out values that are not finite."""
    table = table[np.isfinite(table).all(axis="columns")]
    parts = np.arange(len(table)) // (len(table) // (_MAX_POINTS + 1) + 1)
    steps = table.index.to_series().astype(float).groupby(parts).mean()
    return table.groupby(parts).mean().set_index(steps)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 60, break_on_hyphens=False)


@contextmanager
def _figure(width: float, height: float, names: Sequence[str] = ()) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Yield axes, with a legend below if there are several names, and a function that returns the finished SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    labels, file = [_wrapped(name) for name in names], io.StringIO()
    columns = max(1, int(width * 13 / max(map(len, labels), default=1)))
    lines = sum(1 + label.count("\n") for label in labels) / columns if len(labels) > 1 else 0
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height + 0.16 * lines), layout="constrained")
        axes = figure.subplots()
        # Text and axes have the color of the text around the figure; what comes before the root is dropped.
        yield axes, lambda: file.getvalue()[file.getvalue().index("<svg") :].replace(_INK, "currentColor")
        if lines:
            handles, _ = axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower left", ncols=columns)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata=nothing)
