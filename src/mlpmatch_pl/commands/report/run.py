"""Write a report: read the runs, write tables, plots and the page, name what cannot be read."""

from __future__ import annotations

import base64
import io
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from mlpmatch_pl.commands.report.plots import curve_plots, method_color, score_plot, series_names, series_styles
from mlpmatch_pl.commands.report.runs import Run, Unreadable, find_run_folders, read_run
from mlpmatch_pl.commands.report.tables import (
    Group,
    Table,
    class_table,
    group_runs,
    problem_table,
    runs_csv,
    runs_table,
    score_table,
    summary_csv,
    unfinished_table,
)
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import OTHER_OUTPUT, refuse_overwrite
from mlpmatch_pl.utils.seeding import evenly_spaced
from mlpmatch_pl.visualization.panels import read_panels

_FILES = ("report.html", "summary.md", "summary.csv", "runs.csv", "miou_*.svg", "curves_*.svg")
_PANEL_WIDTH, _MATRIX_WIDTH = 320, 900  # pixels
_FEW_COLUMNS = 8  # of numbers, which are printed in any terminal
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """Options of the command.

    Attributes:
        runs: Run folders, or folders with run folders below.
        output: Folder to write to.
        overwrite: Whether to replace an existing report.
        pool_splits: Whether to average over seeded splits of one size, see `tables.group_runs`.
        num_images: Number of test images to compare.

    Raises:
        UserError: If the number of images is negative.
    """

    runs: tuple[str, ...]
    output: Path
    overwrite: bool = False
    pool_splits: bool = False
    num_images: int = 4

    def __post_init__(self) -> None:
        if self.num_images < 0:
            raise UserError(f"expected num_images of at least 0, but got {self.num_images}")


@dataclass(frozen=True)
class Report:
    """What was found and written.

    Attributes:
        summary: How many runs were found, in a sentence.
        tables: The tables for the terminal.
        files: The files written.
        broken: Whether a file could not be read.
    """

    summary: str
    tables: tuple[Table, ...]
    files: tuple[Path, ...]
    broken: bool

    def show(self) -> None:
        """Print the tables, the summary and the files."""
        for table in self.tables:
            _print(table)
        print(self.summary)
        plots = [path for path in self.files if path.suffix == ".svg"]
        for path in self.files:
            if path not in plots:
                print(f"wrote {path}")
        if plots:
            print(f"wrote {len(plots)} plots to {plots[0].parent}/*.svg")


def write_report(options: Options) -> Report:
    """Read all runs in and below folders, and write tables, plots and the page.

    Args:
        options: Options of the command.

    Returns:
        What was found and written. Broken files are named in it and do not affect other runs.

    Raises:
        UserError: If a folder does not exist, no run is found, or a report would be overwritten.
    """
    earlier = _earlier_report(options)
    runs, unreadable = _read_runs([Path(folder) for folder in options.runs])
    groups = group_runs(runs, options.pool_splits)
    parts = [
        _Part([group for group in groups if group.dataset == dataset], options.num_images, unreadable)
        for dataset in dict.fromkeys(group.dataset for group in groups)
    ]
    first = runs[0].overrides if len(runs) > 1 else ()
    shared = [override for override in first if all(override in run.overrides for run in runs)]
    finished = runs_table(groups, shared)
    unfinished = unfinished_table([run for run in runs if not run.finished], shared)
    problems = problem_table(runs, unreadable)
    tables = [table for part in parts for table in part.tables]
    last = [table for table in (unfinished, problems) if table.rows]
    summary = _summary(runs, unreadable)
    listed = [table for table in (finished, unfinished, problems) if table.rows]
    texts = {
        "report.html": _page(parts=parts, tables=listed, summary=summary),
        "summary.md": "\n".join(table.markdown() for table in [*tables, *listed]),
        "summary.csv": summary_csv(groups),
        "runs.csv": runs_csv(groups),
        **{name: svg for part in parts for name, svg in part.plots.items()},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for path in earlier:
        path.unlink()
    for name, text in texts.items():
        (options.output / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    broken = any(entry.broken for entry in unreadable) or any(run.problems for run in runs)
    return Report(summary, (*tables, *last), tuple(options.output / name for name in texts), broken)


def _earlier_report(options: Options) -> list[Path]:
    """Return the files of an existing report, which are refused unless they may be overwritten."""
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"expected output as a folder, but {options.output} is a file; choose another output")
    found = [path for pattern in _FILES for path in sorted(options.output.glob(pattern))]
    if not options.overwrite:
        refuse_overwrite(found, OTHER_OUTPUT)
    return found


def _read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Unreadable]]:
    for folder in folders:
        if not folder.exists():
            raise UserError(f"expected folders of runs, but {folder} does not exist; name a folder such as runs")
    found = [read_run(folder) for folder in find_run_folders(folders)]
    if not found:
        raise UserError(
            f"expected run folders in or below {', '.join(map(str, folders))}, but there is none with a "
            "config.yaml and splits.json; name a folder that mlpmatch_pl.train wrote to"
        )
    return [run for run in found if isinstance(run, Run)], [e for e in found if isinstance(e, Unreadable)]


def _summary(runs: Sequence[Run], unreadable: Sequence[Unreadable]) -> str:
    finished = [run for run in runs if run.finished]
    lost = {entry.name for entry in unreadable if entry.broken} - {str(run.folder) for run in runs}
    counts = (
        (len(finished), "finished"),
        (len(runs) - len(finished), "without a result"),
        (sum(not entry.broken for entry in unreadable), "refused or not begun"),
        (len(lost), "not readable"),
    )
    text = f"{', '.join(f'{count} {what}' for count, what in counts if count)}; {time.strftime('%Y-%m-%d %H:%M')}"
    made = dict.fromkeys(f"mlpmatch_pl {run.facts['version']} on {run.facts['device']}" for run in finished)
    return f"Runs: {text}" + (f"; {', '.join(made)}" if made else "") + "."


class _Part:
    """Tables, plots and images of one dataset, as the page's template reads them.

    Pictures that cannot be read are appended to ``unreadable``.
    """

    def __init__(self, groups: Sequence[Group], num_images: int, unreadable: list[Unreadable]) -> None:
        self.dataset = groups[0].dataset
        finished, styles = [group for group in groups if group.finished], series_styles(groups)
        self.tables = [score_table(finished), class_table(finished)] if finished else []
        self.plots = {f"miou_{_slug(self.dataset)}.svg": score_plot(finished, styles)} if finished else {}
        self.lists: list[dict[str, Any]] = []
        for hashes in dict.fromkeys(group.hashes for group in groups):
            own = [group for group in groups if group.hashes == hashes]
            curves = curve_plots(own, styles)
            stem = f"curves_{_slug(self.dataset)}_{own[0].count}_{_slug(hashes[0][:8])}"
            self.plots |= {f"{stem}_{_slug(key.partition('/')[2])}.svg": svg for key, svg in curves.items()}
            self.lists.append(
                {
                    "title": f"{own[0].label}, {own[0].count:,} labeled images",
                    "gallery": _gallery(own, num_images, unreadable),
                    "matrices": _matrices(own, unreadable),
                    "curves": list(curves.values()),
                }
            )
        self.score_plot = next(iter(self.plots.values()), "") if finished else ""


def _slug(name: str) -> str:
    """Make a name from a run folder safe as a part of a file name."""
    return re.sub(r"[^\w.-]+", "-", name)[:80]


def _gallery(groups: Sequence[Group], num_images: int, unreadable: list[Unreadable]) -> dict[str, Any]:
    """Put the same test images of all methods side by side: those of each group's first run that has some.

    Returns:
        ``columns`` with name, color and seed of each method; ``rows`` with the name of an image, the data URIs of image
        and truth, and those of the predictions; ``classes`` with their colors.
    """
    sources: list[tuple[str, Group, Run, dict[str, Path]]] = []
    for series, group in zip(series_names(groups), groups, strict=True):
        drawn = ((run, _pictures(run.folder / "predictions")) for run in group.runs)
        sources += [(series, group, run, paths) for run, paths in drawn if paths][:1]
    names = sorted({name for *_, paths in sources for name in paths})
    rows, classes = [], dict[str, str]()
    for name in evenly_spaced(names, num_images):
        row: dict[str, Any] = {"name": name, "image": "", "truth": "", "predictions": []}
        for _, _, run, paths in sources:
            found = _readable(run, paths[name], read_panels, unreadable) if name in paths else None
            panels, colors = found or ({}, {})
            classes |= colors
            for kind in ("image", "truth"):
                if kind in panels and not row[kind]:
                    row[kind] = _data_uri(panels[kind], _PANEL_WIDTH, lossless=kind == "truth")
            prediction = panels.get("prediction")
            row["predictions"].append(_data_uri(prediction, _PANEL_WIDTH, lossless=True) if prediction else "")
        rows += [row] if any(row["predictions"]) else []
    columns = [{"name": series, "color": method_color(g.method), "seed": run.seed} for series, g, run, _ in sources]
    return {"columns": columns, "rows": rows, "classes": classes}


def _pictures(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.glob("*.png") if path.is_file()}  # no pipes


def _matrices(groups: Sequence[Group], unreadable: list[Unreadable]) -> list[dict[str, Any]]:
    """Return caption and data URI of the confusion matrix of each group's first finished run."""
    matrices = []
    for series, group in zip(series_names(groups), groups, strict=True):
        for run in group.finished[:1]:
            path = run.folder / f"confusion_{'test' if run.facts['evaluated_on'] == 'test' else 'val'}.png"
            picture = _readable(run, path, _open, unreadable) if path.is_file() else None
            if picture is not None:
                uri = _data_uri(picture, _MATRIX_WIDTH, lossless=True)
                matrices.append({"caption": f"{series}, seed {run.seed}", "uri": uri})
    return matrices


def _open(path: Path) -> PILImage.Image:
    with PILImage.open(path) as picture:
        return picture.convert("RGB")


def _readable(run: Run, path: Path, read: Callable[[Path], T], unreadable: list[Unreadable]) -> T | None:
    """Read a picture; None, and an entry among the problems, if it is broken."""
    try:
        return read(path)
    # What Pillow raises for broken files and for those that would fill the memory, and JSON of another form.
    except (
        OSError,
        ValueError,
        SyntaxError,
        PILImage.DecompressionBombError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        name = path.relative_to(run.folder)
        unreadable.append(Unreadable(str(run.folder), f"{name} is broken: {error}", broken=True))
        return None


def _data_uri(picture: PILImage.Image, width: int, lossless: bool) -> str:
    """Embed a picture as WebP of at most a width."""
    if picture.width > width:
        method = PILImage.Resampling.NEAREST if lossless else PILImage.Resampling.BICUBIC
        picture = picture.resize((width, max(round(picture.height * width / picture.width), 1)), method)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=lossless, quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _page(**content: Any) -> str:
    # Names of runs, methods and classes come from files that may come from anywhere.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(**content)


def _print(table: Table) -> None:
    """Print a table, or its name if its many columns are too wide for the terminal; pipes have 200 characters."""
    rich = RichTable(title=Text(table.title), title_justify="left")
    for index, column in enumerate(table.columns):
        rich.add_column(Text(column), justify="right" if index in table.numbers else "left", overflow="fold")
    for row in table.rows:
        rich.add_row(*(Text(str(cell), "bold" if cell.best else "") for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    width = console.measure(rich, options=console.options.update(width=10_000)).maximum
    if len(table.numbers) > _FEW_COLUMNS and width > console.width:
        console.print(f"{table.title}: too wide for the terminal, see report.html or summary.md", markup=False)
    else:
        console.print(rich)
