"""Plots drawn as SVG: sharp at any size, small, and part of a page without other files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito, for all eyes
_FONT = 'font-family="system-ui, sans-serif"'
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 30, 40  # room around a plot


@dataclass(frozen=True)
class Line:
    """A line through points.

    Attributes:
        points: x and y of each.
        color: Its color.
        width: Its width.
        opacity: 0..1.
    """

    points: Sequence[tuple[float, float]]
    color: str
    width: float = 2
    opacity: float = 1


@dataclass(frozen=True)
class Point:
    """A point with an error bar.

    Attributes:
        x: Where it is.
        y: Its value.
        deviation: Half the length of its bar; None for none.
        color: Its color.
        text: What a browser shows when the mouse is over it.
    """

    x: float
    y: float
    deviation: float | None
    color: str
    text: str


@dataclass(frozen=True)
class Plot:
    """What one pair of axes shows.

    Attributes:
        title: Above it.
        x_label: Below it.
        lines: Lines.
        points: Points, over the lines.
        x_ticks: Where the x axis is marked; chosen if left out.
        x_log: Whether the x axis is logarithmic.
        x_range: Its ends; what the lines and points need if left out.
    """

    title: str
    x_label: str
    lines: Sequence[Line] = ()
    points: Sequence[Point] = ()
    x_ticks: Sequence[float] | None = None
    x_log: bool = False
    x_range: tuple[float, float] | None = None


def series_color(index: int) -> str:
    """Return the color of the series with a number; different for any number of series."""
    return _COLORS[index] if index < len(_COLORS) else f"hsl({index * 137.5 % 360:.0f}, 65%, 40%)"


def figure(plots: Sequence[Plot], legend: Sequence[tuple[str, str]], columns: int, width: int, height: int) -> str:
    """Draw plots in rows, below a legend.

    Args:
        plots: The plots.
        legend: Name and color of each series.
        columns: Plots in a row.
        width: Width of a plot.
        height: Height of a plot.

    Returns:
        An SVG document, which can also stand in a page.
    """
    columns = min(columns, len(plots))
    total = columns * width
    rows = _legend_rows([name for name, _ in legend], total)
    top = 20 * len(rows) + 8
    parts = []
    for number, row in enumerate(rows):
        for index, x in row:
            name, color = legend[index]
            parts.append(f'<rect x="{x}" y="{20 * number + 6}" width="14" height="10" rx="2" fill="{color}"/>')
            parts.append(_text(x + 20, 20 * number + 15, name))
    for index, plot in enumerate(plots):
        x, y = index % columns * width, top + index // columns * height
        parts.append(f'<g transform="translate({x} {y})">{_axes(plot, width, height)}</g>')
    total_height = top + ceil(len(plots) / columns) * height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {total_height}" width="{total}" '
        f'height="{total_height}" {_FONT} font-size="12">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers between two values.

    Example:
        >>> ticks(0.0, 0.93)
        [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    rough = (high - low) / count
    magnitude = 10 ** floor(log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * 0.999)
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _axes(plot: Plot, width: int, height: int) -> str:
    """Draw a frame with ticks, and what is in it."""
    xs, ys = _extent(plot)
    to_x, to_y = _scale(xs, _LEFT, width - _RIGHT, plot.x_log), _scale(ys, height - _BOTTOM, _TOP)
    parts = [_text(_LEFT, 18, plot.title, weight="600")]
    for value in ticks(*ys):
        y = to_y(value)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{width - _RIGHT}" stroke="#e3e3e3"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{value:g}", "end"))
    free = 0.0
    for value in ticks(*xs) if plot.x_ticks is None else plot.x_ticks:
        x, label = to_x(value), f"{value:g}"
        parts.append(f'<path d="M{x:.1f} {height - _BOTTOM}v5" stroke="#666"/>')
        if x - 4 * len(label) > free:  # labels do not overlap
            parts.append(_text(x, height - _BOTTOM + 18, label, "middle"))
            free = x + 4 * len(label) + 4
    parts.append(f'<path d="M{_LEFT} {_TOP}V{height - _BOTTOM}H{width - _RIGHT}" fill="none" stroke="#666"/>')
    parts.append(_text((_LEFT + width - _RIGHT) / 2, height - 5, plot.x_label, "middle"))
    parts += [_line(line, to_x, to_y) for line in plot.lines if line.points]
    parts += [_point(point, to_x, to_y) for point in plot.points]
    return "".join(parts)


def _extent(plot: Plot) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the least and greatest x and y, with some room."""
    points = [point for line in plot.lines for point in line.points]
    bars = [(p.x, p.y + sign * (p.deviation or 0)) for p in plot.points for sign in (-1, 1)]
    xs, ys = zip(*[*points, *bars], strict=True) if points or bars else ((0.0, 1.0), (0.0, 1.0))
    low, high = plot.x_range or (min(xs), max(xs))
    if plot.x_log:
        factor = (high / low) ** 0.06 if high > low else 1.5
        x_range = low / factor, high * factor
    else:
        x_range = (low, high) if high > low else (low - 1, high + 1)
    low, high = min(ys), max(ys)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return x_range, (0.0 if 0 <= low < room else low - room, high + room)


def _scale(values: tuple[float, float], first: float, last: float, log: bool = False) -> Callable[[float], float]:
    low, high = (log10(values[0]), log10(values[1])) if log else values
    return lambda value: first + ((log10(value) if log else value) - low) / (high - low) * (last - first)


def _line(line: Line, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    places = "L".join(f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in line.points)
    # A line of no length with round ends is a dot.
    dot, width = ("h0", 4 * line.width) if len(line.points) == 1 else ("", line.width)
    return (
        f'<path d="M{places}{dot}" fill="none" stroke="{line.color}" stroke-width="{width:g}" '
        f'stroke-opacity="{line.opacity:g}" stroke-linecap="round" stroke-linejoin="round"/>'
    )


def _point(point: Point, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    x, y, bar = to_x(point.x), to_y(point.y), ""
    if point.deviation is not None:
        low, high = to_y(point.y - point.deviation), to_y(point.y + point.deviation)
        d = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 5:.1f} {low:.1f}h10M{x - 5:.1f} {high:.1f}h10"
        bar = f'<path d="{d}" stroke="{point.color}" stroke-width="1.5"/>'
    dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{point.color}" stroke="#fff"/>'
    return f"<g><title>{escape(point.text)}</title>{bar}{dot}</g>"


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "400") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text {place} fill="#222">{escape(text)}</text>'


def _legend_rows(names: Sequence[str], width: float) -> list[list[tuple[int, float]]]:
    """Lay the legend out: rows of (series, x)."""
    rows: list[list[tuple[int, float]]] = [[]]
    x = float(_LEFT)
    for index, name in enumerate(names):
        needed = 20 + 7 * len(name) + 16  # 7: a wide guess, as only the browser knows the font
        if x + needed > width and rows[-1]:
            rows.append([])
            x = float(_LEFT)
        rows[-1].append((index, x))
        x += needed
    return rows
