"""Write a report: read the runs, write tables, plots and the page, name what cannot be read."""

from __future__ import annotations

import base64
import io
import re
import sys
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from mlpmatch_pl.commands.report import tables
from mlpmatch_pl.commands.report.plots import curve_plots, method_color, score_plot, series_styles
from mlpmatch_pl.commands.report.runs import Problem, find_run_folders, read_file, read_runs
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import OTHER_OUTPUT, refuse_overwrite
from mlpmatch_pl.utils.seeding import evenly_spaced
from mlpmatch_pl.visualization.panels import read_panels

_FILES = ("report.html", "summary.md", "summary.csv", "runs.csv", "miou_*.svg", "curves_*.svg")
_PANEL_WIDTH, _MATRIX_WIDTH = 320, 900  # pixels
_SHOWN = ("image", "truth", "prediction")  # panels
_MAX_PRINTED = 8  # columns of numbers that fit into a terminal


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


def write_report(options: Options) -> bool:
    """Read all runs in and below folders, write tables, plots and the page, and print the tables.

    Returns:
        Whether all files could be read. Broken ones are listed and do not affect other runs.

    Raises:
        UserError: If a folder does not exist, no run can be read, or a report would be overwritten.
    """
    output, folders = options.output, [Path(folder) for folder in options.runs]
    if output.exists() and not output.is_dir():
        raise UserError(f"expected output as a folder, but {output} is a file; choose another output")
    earlier = [path for pattern in _FILES for path in output.glob(pattern)]
    if not options.overwrite:
        refuse_overwrite(earlier, OTHER_OUTPUT)
    for folder in folders:
        if not folder.exists():
            raise UserError(f"expected folders of runs, but {folder} does not exist; name a folder such as runs")
    runs, problems = read_runs(find_run_folders(folders))
    if runs.empty:
        reasons = "".join(f"; {problem.run}: {problem.reason}" for problem in problems[:3])
        raise UserError(
            f"expected run folders in or below {', '.join(options.runs)}, but there is none with a readable "
            f"config.yaml and splits.json{reasons}; name a folder that mlpmatch_pl.train wrote to"
        )
    runs = tables.group_runs(runs, options.pool_splits)
    unfinished = runs[~runs["finished"]]
    parts = [_part(own, options.num_images, problems) for _, own in runs.groupby("dataset")]
    results = [table for part in parts for table in part["tables"]]
    listed = [tables.runs_table("Runs", runs), *([tables.problem_table(problems)] if problems else [])]
    counts = {"finished": len(runs) - len(unfinished), "without a result": len(unfinished), "problems": len(problems)}
    counted = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    made = ", ".join((runs["version"] + " on " + runs["device"]).dropna().unique())
    summary = f"Runs: {counted}; {time.strftime('%Y-%m-%d %H:%M')}; mlpmatch_pl {made}."
    texts = {
        "report.html": _page(parts=parts, tables=listed, summary=summary),
        "summary.md": "\n".join(table.markdown() for table in [*results, *listed]),
        "summary.csv": tables.summary_csv(runs),
        "runs.csv": tables.runs_csv(runs),
    }
    plots = {name: svg for part in parts for name, svg in part["plots"].items()}
    output.mkdir(parents=True, exist_ok=True)
    for path in earlier:
        path.unlink()
    for name, text in (texts | plots).items():
        (output / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    shown = [tables.runs_table("Runs without a result", unfinished)] if len(unfinished) else []
    for table in [*results, *shown, *listed[1:]]:
        print_table(table)
    print(summary)
    for name in texts:
        print(f"wrote {output / name}")
    print(f"wrote {len(plots)} plots to {output}/*.svg")
    return not any(problem.broken for problem in problems)


def _part(runs: pd.DataFrame, num_images: int, problems: list[Problem]) -> dict[str, Any]:
    """Return tables, plots and images of one dataset, as the page's template reads them."""
    dataset, finished, styles = runs["dataset"].iloc[0], runs[runs["finished"]], series_styles(runs)
    plots = {f"miou_{_slug(dataset)}.svg": score_plot(finished, styles)} if len(finished) else {}
    main_plot = next(iter(plots.values()), "")
    lists = []
    for _, own in runs.groupby("list_id", sort=False):
        first, curves, matrices = own.iloc[0], curve_plots(own, styles), []
        stem = f"curves_{_slug(dataset)}_{first['labels']}_{_slug(first['sha256'][:8])}"
        plots |= {f"{stem}_{_slug(key.partition('/')[2])}.svg": svg for key, svg in curves.items()}
        for _, run in own[own["finished"]].drop_duplicates("group").iterrows():
            # That of the scores: without test images, of the best checkpoint on the validation images.
            if picture := read_file(Path(run["run"]), "confusion_test.png", _open, problems):
                uri = _data_uri(picture, _MATRIX_WIDTH, lossless=True)
                matrices.append({"caption": f"{run['series']}, seed {run['seed']}", "uri": uri})
        title = f"{first['list']}, {first['labels']:,} labeled images"
        gallery = _gallery(own, num_images, problems)
        lists.append({"title": title, "gallery": gallery, "matrices": matrices, "curves": list(curves.values())})
    results = [tables.score_table(finished), tables.class_table(finished)] if len(finished) else []
    return {"dataset": dataset, "tables": results, "plots": plots, "score_plot": main_plot, "lists": lists}


def _slug(name: str) -> str:
    """Make a name from a run folder safe as a part of a file name."""
    return re.sub(r"[^\w.-]+", "-", name)[:80]


def _gallery(runs: pd.DataFrame, num_images: int, problems: list[Problem]) -> dict[str, Any]:
    """Put the same test images of all methods side by side: those of each group's first run that has some."""
    pictures = [{p.stem: p for p in Path(run, "predictions").glob("*.png") if p.is_file()} for run in runs["run"]]
    sources = runs.assign(pictures=pictures)[[bool(found) for found in pictures]].drop_duplicates("group")
    names = sorted({name for found in sources["pictures"] for name in found})
    rows, classes = [], dict[str, str]()
    for name in evenly_spaced(names, num_images):
        row: dict[str, Any] = {"name": name, "image": "", "truth": "", "predictions": []}
        for run in sources["run"]:
            panels, colors = read_file(Path(run), f"predictions/{name}.png", read_panels, problems) or ({}, {})
            classes |= colors
            uris = {kind: _data_uri(panels[kind], _PANEL_WIDTH, kind != "image") for kind in panels if kind in _SHOWN}
            row |= {kind: row[kind] or uris.get(kind, "") for kind in ("image", "truth")}
            row["predictions"].append(uris.get("prediction", ""))
        rows += [row] if any(row["predictions"]) else []
    columns = [
        {"name": run["series"], "color": method_color(run["method"]), "seed": run["seed"]}
        for _, run in sources.iterrows()
    ]
    return {"columns": columns, "rows": rows, "classes": classes}


def _open(path: Path) -> PILImage.Image:
    with PILImage.open(path) as picture:
        return picture.convert("RGB")


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


def print_table(table: tables.Table) -> None:
    """Print a table, or where to find it if it has too many columns for a terminal."""
    if len(table.numbers) > _MAX_PRINTED:
        print(f"{table.title}: too wide for the terminal, see report.html or summary.md")
        return
    rich = RichTable(title=Text(table.title), title_justify="left")
    for index, column in enumerate(table.columns):
        rich.add_column(Text(column), justify="right" if index in table.numbers else "left", overflow="fold")
    for row in table.rows:
        rich.add_row(*(Text(str(cell), "bold" if cell.best else "") for cell in row))
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(rich)  # pipes have no width
