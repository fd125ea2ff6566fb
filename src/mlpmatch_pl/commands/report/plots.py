"""mIoU against the number of labels, and learning curves side by side."""

from collections.abc import Sequence

from mlpmatch_pl.commands.report.groups import Group, mean_and_deviation
from mlpmatch_pl.commands.report.metrics_csv import Curve, steps_done
from mlpmatch_pl.commands.report.svg import Line, Plot, Point, figure, series_color
from mlpmatch_pl.commands.report.tables import evaluated_on, lists_of

_MAX_POINTS = 200  # of a curve; more than a plot has pixels for only make the page slow
_HIDDEN = ("train/loss_s1", "train/loss_s2")  # parts of train/loss_s


def label_plot(dataset: str, groups: Sequence[Group], names: Sequence[str]) -> str:
    """Draw mIoU against the number of labeled images with error bars, a line for each method and settings.

    A line goes through the mean where several lists have one size; each list has a point of its own.

    Args:
        dataset: Name for the title.
        groups: The groups of the data set.
        names: All series of the data set, so that a color means the same in every figure.

    Returns:
        An SVG document; empty if no run is finished.
    """
    groups = [group for group in groups if group.values("miou")]
    if not groups:
        return ""
    lines: list[Line] = []
    points: list[Point] = []
    for index, name in enumerate(names):
        own = [group for group in groups if group.series == name]
        # Side by side, so that error bars at one number of labels stay apart.
        shift = 1.02 ** (index - (len(names) - 1) / 2)
        by_count: dict[int, list[float]] = {}
        for group in own:
            center, deviation = mean_and_deviation([100 * value for value in group.values("miou")])
            by_count.setdefault(group.count, []).append(center)
            points.append(_point(group, center, deviation, shift, series_color(index)))
        path = [(count * shift, sum(values) / len(values)) for count, values in sorted(by_count.items())]
        lines.append(Line(path, series_color(index)))
    counts = sorted({float(group.count) for group in groups})
    plot = Plot(f"{dataset}: mIoU % ({evaluated_on(groups)})", "labeled images", lines, points, counts, x_log=True)
    return figure([plot], _legend(groups, names), 1, 640, 400)


def _point(group: Group, center: float, deviation: float | None, shift: float, color: str) -> Point:
    spread = "" if deviation is None else f" ± {deviation:.2f}"
    runs = f"{len(group.finished)} run{'s' if len(group.finished) > 1 else ''}"
    text = f"{group.series}, {group.label} ({lists_of(group)}): {center:.2f}{spread} %, {runs}"
    return Point(group.count * shift, center, deviation, color, text)


def curve_plots(groups: Sequence[Group], names: Sequence[str]) -> str:
    """Draw the learning curves of groups with one labeled list: validation mIoU, each loss term, confident ratio.

    A thin line is a run, finished or not; a thick one is the mean of a group's finished runs.

    Args:
        groups: The groups.
        names: All series of the data set, as in `label_plot`.

    Returns:
        An SVG document; empty if nothing was logged.
    """
    found = {key for group in groups for run in group.runs for key in run.curves}
    losses = sorted(key for key in found if key.startswith("train/loss") and key not in _HIDDEN)
    wanted = ("val/miou", *losses, "train/confident_ratio", "train/lambda_np")
    last = max((steps_done(run.curves) for group in groups for run in group.runs), default=0)
    plots = [_curve_plot(groups, names, key, last) for key in wanted if key in found]
    return figure(plots, _legend(groups, names), 3, 400, 240) if plots else ""


def _legend(groups: Sequence[Group], names: Sequence[str]) -> list[tuple[str, str]]:
    own = {group.series for group in groups}
    return [(name, series_color(index)) for index, name in enumerate(names) if name in own]


def _curve_plot(groups: Sequence[Group], names: Sequence[str], key: str, last: int) -> Plot:
    thin, thick = [], []
    for group in groups:
        color = series_color(names.index(group.series))
        curves = [run.curves[key] for run in group.runs if key in run.curves]
        average = _mean_curve([run.curves[key] for run in group.finished if key in run.curves])
        thin += [Line(_thinned(curve), color, 1, 0.45) for curve in curves]
        thick += [Line(_thinned(average), color, 2)] if average else []
    return Plot(key, "step", thin + thick, x_range=(0, max(last, 1)))


def series_names(groups: Sequence[Group]) -> list[str]:
    """Return the series of groups in order, each once."""
    return list(dict.fromkeys(group.series for group in sorted(groups, key=lambda group: group.series)))


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean at the steps that all curves have."""
    tables = [dict(curve) for curve in curves]
    steps = sorted(set(tables[0]).intersection(*tables[1:])) if tables else []
    return tuple((step, sum(table[step] for table in tables) / len(tables)) for step in steps)


def _thinned(curve: Curve) -> list[tuple[float, float]]:
    """Return a curve without values that are no numbers, and means over equal parts of a long one."""
    points = [(step, value) for step, value in curve if abs(value) < float("inf")]
    size = -(-len(points) // _MAX_POINTS) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(step for step, _ in part) / len(part), sum(value for _, value in part) / len(part)) for part in parts]
