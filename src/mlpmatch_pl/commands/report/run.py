"""The report: read the runs, write the files, say what could not be read."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlpmatch_pl.commands.report.groups import Group, group_runs
from mlpmatch_pl.commands.report.page import Section, heading, page, pictures
from mlpmatch_pl.commands.report.plots import curve_plots, label_plot, series_names
from mlpmatch_pl.commands.report.runs import Run, Unreadable, find_run_folders, read_run
from mlpmatch_pl.commands.report.tables import (
    Table,
    metrics_table,
    problem_table,
    run_records,
    score_records,
    score_table,
    to_csv,
    unfinished_table,
)
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import OTHER_OUTPUT, refuse_overwrite

_FILES = ("report.html", "summary.md", "summary.csv", "runs.csv", "miou_*.svg", "curves_*.svg")
_CURVE_NOTE = "A thin line is a run, finished or not; a thick one is the mean over the seeds of the finished runs."


@dataclass(frozen=True)
class Options:
    """How to report.

    Attributes:
        output: Folder to write to.
        overwrite: Whether a report that is there is replaced.
        pool_splits: Whether seeded splits of one size are averaged, see `groups.group_runs`.
        pictures: Prediction pictures of a run.

    Raises:
        UserError: If the number of pictures is negative.
    """

    output: Path
    overwrite: bool = False
    pool_splits: bool = False
    pictures: int = 3

    def __post_init__(self) -> None:
        if self.pictures < 0:
            raise UserError(f"expected pictures as a whole number of at least 0, but got {self.pictures}")


@dataclass(frozen=True)
class Report:
    """What was found and written.

    Attributes:
        summary: How many runs were found, in a sentence.
        tables: The tables; empty ones are left out.
        files: What was written.
        broken: Whether some file could not be read.
    """

    summary: str
    tables: tuple[Table, ...]
    files: tuple[Path, ...]
    broken: bool


def write_report(folders: Sequence[Path], options: Options) -> Report:
    """Read all runs in and below folders, and write tables, plots and the page.

    Args:
        folders: Run folders, or folders with run folders somewhere below.
        options: How to report.

    Returns:
        What was found and written; broken files are named in it, and leave the other runs whole.

    Raises:
        UserError: If a folder does not exist, no run is found, or a report would be written over.
    """
    earlier = _earlier_report(options)
    runs, unreadable = _read(folders)
    groups = group_runs(runs, options.pool_splits)
    gallery, broken_pictures = pictures(groups, options.pictures)
    unreadable += broken_pictures
    unfinished = unfinished_table([run for run in runs if not run.result])
    problems = problem_table(runs, unreadable)
    parts = [_Part.of(groups, dataset) for dataset in dict.fromkeys(group.dataset for group in groups)]
    tables = [table for part in parts for table in part.tables] + [t for t in (unfinished, problems) if t.rows]
    summary = _summary(runs, unreadable)
    sections = [section for part in parts for section in part.sections]
    sections += [Section(table.title, table.html()) for table in (unfinished, problems) if table.rows]
    texts = {
        "report.html": page("Runs", summary, [*sections, Section("Predictions", gallery)]),
        "summary.md": "\n".join(table.markdown() for table in tables),
        "summary.csv": to_csv(score_records([group for group in groups if group.finished])),
        "runs.csv": to_csv(run_records(groups)),
        **{name: svg for part in parts for name, svg in part.plots.items()},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for path in earlier:
        path.unlink()
    for name, text in texts.items():
        (options.output / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    broken = any(entry.broken for entry in unreadable) or any(run.problems for run in runs)
    return Report(summary, tuple(tables), tuple(options.output / name for name in texts), broken)


def _earlier_report(options: Options) -> list[Path]:
    """Return the files of a report that is there.

    Raises:
        UserError: If there are some, and nothing says to replace them.
    """
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"expected output as a folder, but {options.output} is a file; choose another output")
    found = [path for pattern in _FILES for path in sorted(options.output.glob(pattern))]
    if not options.overwrite:
        refuse_overwrite(found, OTHER_OUTPUT)
    return found


def _read(folders: Sequence[Path]) -> tuple[list[Run], list[Unreadable]]:
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
    finished = [run.result for run in runs if run.result]
    lost = {entry.name for entry in unreadable if entry.broken} - {run.name for run in runs}
    counts = (
        (len(finished), "finished"),
        (len(runs) - len(finished), "without a result"),
        (sum(not entry.broken for entry in unreadable), "refused or not begun"),
        (len(lost), "not readable"),
    )
    text = f"{', '.join(f'{count} {what}' for count, what in counts if count)}; {time.strftime('%Y-%m-%d %H:%M')}"
    made = dict.fromkeys(f"mlpmatch_pl {result.version} on {result.device}" for result in finished)
    return f"Runs: {text}" + (f"; {', '.join(made)}" if made else "") + "."


@dataclass(frozen=True)
class _Part:
    """What the report says of one data set."""

    tables: list[Table]
    plots: dict[str, str]
    sections: list[Section]

    @classmethod
    def of(cls, groups: Sequence[Group], dataset: str) -> "_Part":
        own = [group for group in groups if group.dataset == dataset]
        finished, names = [group for group in own if group.finished], series_names(own)
        tables = [score_table(dataset, finished), metrics_table(dataset, finished)] if finished else []
        plots = {f"miou_{_slug(dataset)}.svg": label_plot(dataset, finished, names)} if finished else {}
        shown = [heading(table.title) + table.html() for table in tables]
        body = "".join([*shown[:1], *plots.values(), *shown[1:]])
        curves = ""
        for hashes in dict.fromkeys(group.hashes for group in own):
            alike = [group for group in own if group.hashes == hashes]
            if svg := curve_plots(alike, names):
                plots[f"curves_{_slug(dataset)}_{alike[0].count}_{hashes[0][:8]}.svg"] = svg
                curves += heading(f"{alike[0].label} ({alike[0].count} labeled images)") + svg
        return cls(tables, plots, [Section(dataset, body), Section(f"{dataset}: learning curves", curves, _CURVE_NOTE)])


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)
