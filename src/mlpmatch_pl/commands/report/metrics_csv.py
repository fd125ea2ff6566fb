"""Reading metrics.csv, also while a training writes it."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

Curve = tuple[tuple[int, float], ...]
"""Steps and values, by step."""


def read_curves(path: Path) -> dict[str, Curve]:
    r"""Read every logged value by its name.

    A last line without its end is being written, and left out. A run that was interrupted and resumed has steps twice:
    the later ones count.

    Args:
        path: metrics.csv of a run folder.

    Returns:
        For each column, such as ``val/miou``, its steps and values; columns without values are left out.

    Raises:
        ValueError: If a line does not fit the header, or holds something other than numbers.
        OSError: If the file cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "metrics.csv"
        ...     _ = path.write_text("step,train/loss,val/miou\n4,1.5,\n4,,0.25\n9,0.")
        ...     read_curves(path)
        {'train/loss': ((4, 1.5),), 'val/miou': ((4, 0.25),)}
    """
    with path.open(encoding="utf-8", newline="") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    header, *lines = list(csv.reader(io.StringIO(whole))) or [[]]
    if header and "step" not in header:
        raise ValueError("line 1 has no column step")
    rows: list[tuple[int, dict[str, float]]] = []
    for number, line in enumerate(lines, 2):
        row = _row(header, line, number)
        while rows and row[0] < rows[-1][0]:  # resumed from an earlier step
            rows.pop()
        rows.append(row)
    return _by_name(rows)


def _row(header: list[str], line: list[str], number: int) -> tuple[int, dict[str, float]]:
    if len(line) != len(header):
        raise ValueError(f"line {number} has {len(line)} values, and the header {len(header)}")
    try:
        values = {name: float(value) for name, value in zip(header, line, strict=True) if value}
        return int(values.pop("step")), values
    except (KeyError, ValueError) as error:
        raise ValueError(f"line {number} is not a step and numbers") from error


def _by_name(rows: list[tuple[int, dict[str, float]]]) -> dict[str, Curve]:
    found: dict[str, dict[int, float]] = {}
    for step, values in rows:
        for name, value in values.items():
            found.setdefault(name, {})[step] = value
    return {name: tuple(values.items()) for name, values in sorted(found.items()) if name != "epoch"}


def steps_done(curves: Mapping[str, Curve]) -> int:
    """Return how many optimizer steps had been made when the last training or validation values were logged.

    Example:
        >>> steps_done({"train/loss": ((4, 1.5), (9, 1.0)), "val/miou": ((4, 0.2),)})  # steps are counted from 0
        10
    """
    ends = [curve[-1][0] for name, curve in curves.items() if name.startswith(("train/", "val/"))]
    return max(ends, default=-1) + 1
