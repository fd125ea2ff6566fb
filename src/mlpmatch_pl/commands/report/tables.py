"""Tables of results: as text cells for reading, and as plain numbers for CSV."""

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mlpmatch_pl.commands.report.groups import Group, mean_and_deviation
from mlpmatch_pl.commands.report.metrics_csv import steps_done
from mlpmatch_pl.commands.report.runs import Run, Unreadable

Value = str | int | float | None
_SCORES = (("mIoU", "miou"), ("Dice", "dice"), ("accuracy", "acc"))


@dataclass(frozen=True)
class Table:
    """A table for reading.

    Attributes:
        title: What it shows.
        columns: Names of the columns.
        rows: The cells, a tuple a row.
        numbers: How many columns, counted from the last, are aligned to the right.
        note: A sentence on how to read it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: int = 0
    note: str = ""

    def markdown(self) -> str:
        r"""Write it in Markdown.

        Example:
            >>> print(Table("t", ("class", "IoU"), (("a|b", "1"),), numbers=1).markdown())
            ### t
            <BLANKLINE>
            | class | IoU |
            |---|---:|
            | a\|b | 1 |
            <BLANKLINE>
        """
        rules = ["---"] * (len(self.columns) - self.numbers) + ["---:"] * self.numbers
        lines = [_markdown_row(self.columns), f"|{'|'.join(rules)}|", *map(_markdown_row, self.rows)]
        return "\n".join([f"### {self.title}", "", *lines, "", *([self.note, ""] if self.note else [])])

    def html(self) -> str:
        """Write it as a figure in HTML."""
        first_number = len(self.columns) - self.numbers

        def row(cells: Sequence[str], tag: str) -> str:
            kind = [' class="number"' if index >= first_number else "" for index in range(len(cells))]
            return "".join(f"<{tag}{k}>{escape(cell)}</{tag}>" for k, cell in zip(kind, cells, strict=True))

        body = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in self.rows)
        note = f"<p class=note>{escape(self.note)}</p>" if self.note else ""
        return (
            f"<div class=table><table><thead><tr>{row(self.columns, 'th')}</tr></thead>\n<tbody>{body}</tbody></table>"
            f"</div>{note}"
        )


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def score_table(dataset: str, groups: Sequence[Group]) -> Table:
    """Write mean and deviation of the scores by labeled list, method and settings."""
    keys = tuple(groups[0].settings)
    rows = []
    for group in groups:
        rows.append((
            group.label, lists_of(group), group.method, *group.settings.values(), evaluated_on([group]), _seeds(group),
            str(group.count), str(len(group.finished)), *(percent(group.values(score)) for _, score in _SCORES),
            percent(_best_val(group)),
        ))  # fmt: skip
    columns = (
        "labeled list", "sha256", "method", *keys, "evaluated on", "seeds", "labels", "runs",
        *(f"{name} %" for name, _ in _SCORES), "best val mIoU %",
    )  # fmt: skip
    note = (
        "Mean ± sample standard deviation (n - 1) over the finished runs; no deviation where there is one run. "
        "Best checkpoint by validation mIoU."
    )
    if any(len(group.finished) > len({run.seed for run in group.finished}) for group in groups):
        note += " A seed that is listed twice is a repeated run, which tells less than a run with another seed."
    return Table(f"{dataset}: scores", columns, tuple(rows), numbers=3 + len(_SCORES), note=note)


def metrics_table(dataset: str, groups: Sequence[Group]) -> Table:
    """Write mean and deviation of each class's IoU, a column a class."""
    found = [key for group in groups for run in group.finished if run.result for key in run.result.scores]
    scores = [key for key in dict.fromkeys(found) if key.startswith("iou/")]
    keys = tuple(groups[0].settings)
    rows = tuple(
        (
            group.label,
            lists_of(group),
            group.method,
            *group.settings.values(),
            *(percent(group.values(s)) for s in scores),
        )
        for group in groups
    )
    columns = ("labeled list", "sha256", "method", *keys, *(score.partition("/")[2] for score in scores))
    note = "IoU in %. A class that is absent from truth and prediction of a run is left out of its mean; - if of all."
    return Table(f"{dataset}: IoU by class", columns, rows, numbers=len(scores), note=note)


def unfinished_table(runs: Sequence[Run]) -> Table:
    """Write what is known of runs without a result."""
    rows = []
    for run in runs:
        val = [value for _, value in run.curves.get("val/miou", ())]
        steps = run.config.get("schedule.steps")
        rows.append((
            run.name, run.dataset, run.method, run.lists["labeled"].label, str(run.seed),
            f"{steps_done(run.curves)}{f' of {steps}' if steps else ''}",
            percent(val[-1:]), percent([max(val)] if val else []), _since(run.folder),
        ))  # fmt: skip
    columns = (
        "run", "dataset", "method", "labeled list", "seed", "steps logged", "last val mIoU %", "best val mIoU %",
        "last written",
    )  # fmt: skip
    note = (
        "Running, or stopped: a run that has not been written to for long was probably interrupted. A broken "
        "metrics.json is named among the problems."
    )
    return Table("Runs without a result", columns, tuple(rows), numbers=4, note=note)


def problem_table(runs: Sequence[Run], unreadable: Sequence[Unreadable]) -> Table:
    """Name the runs that were refused, or that could not be read, wholly or in part."""
    rows = [(entry.name, entry.problem) for entry in unreadable]
    rows += [(run.name, problem) for run in runs for problem in run.problems]
    return Table("Problems", ("run", "what was found"), tuple(rows))


def score_records(groups: Sequence[Group]) -> list[dict[str, Value]]:
    """Return the rows of summary.csv: a group each, with figures from 0 to 1."""
    records = []
    for group in groups:
        record: dict[str, Value] = {
            "dataset": group.dataset, "labeled_list": group.label, "sha256": " ".join(group.hashes),
            "labels": group.count, "method": group.method, **group.settings,
            "evaluated_on": evaluated_on([group]),
            "seeds": " ".join(str(run.seed) for run in group.finished),
        }  # fmt: skip
        scores = dict.fromkeys(key for run in group.finished if run.result for key in run.result.scores)
        for name, values in ((score, group.values(score)) for score in scores):
            center, deviation = mean_and_deviation(values) if values else (None, None)
            record |= {f"{name}_mean": center, f"{name}_std": deviation, f"{name}_n": len(values)}
        records.append(record)
    return records


def run_records(groups: Sequence[Group]) -> list[dict[str, Value]]:
    """Return the rows of runs.csv: a run each, finished or not, with figures from 0 to 1."""
    records = []
    for group in groups:
        for run in group.runs:
            labeled, result = run.lists["labeled"], run.result
            record: dict[str, Value] = {
                "run": run.name, "dataset": run.dataset, "labeled_list": labeled.label, "sha256": labeled.sha256,
                "labels": labeled.count, "method": run.method, **group.settings, "seed": run.seed,
                "finished": "yes" if result else "no", "steps_logged": steps_done(run.curves),
            }  # fmt: skip
            if result:
                record |= {
                    "steps": result.steps, "seconds": result.seconds, "device": result.device,
                    "version": result.version, "best_val_miou": result.best_val, "evaluated_on": result.evaluated_on,
                    **result.scores,
                }  # fmt: skip
            records.append(record)
    return records


def to_csv(records: Sequence[dict[str, Value]]) -> str:
    r"""Write records as CSV; the columns are the keys of all.

    Example:
        >>> to_csv([{"a": 1}, {"a": 0.5, "b": "x,y"}])
        'a,b\n1,\n0.5,"x,y"\n'
    """
    text = io.StringIO()
    columns = dict.fromkeys(key for record in records for key in record)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def percent(values: Sequence[float]) -> str:
    """Write mean and deviation in percent.

    Example:
        >>> percent([0.5, 0.52]), percent([0.5]), percent([])
        ('51.00 ± 1.41', '50.00', '-')
    """
    if not values:
        return "-"
    center, deviation = mean_and_deviation(values)
    return f"{100 * center:.2f}" + (f" ± {100 * deviation:.2f}" if deviation is not None else "")


def lists_of(group: Group) -> str:
    """Name the labeled list by its hash, or say how many were pooled."""
    return group.hashes[0][:8] if len(group.hashes) == 1 else f"{len(group.hashes)} lists"


def evaluated_on(groups: Sequence[Group]) -> str:
    """Name the images that the scores are of: test, validation, or both in different runs."""
    return " and ".join(sorted({run.result.evaluated_on for group in groups for run in group.runs if run.result}))


def _best_val(group: Group) -> list[float]:
    return [run.result.best_val for run in group.finished if run.result and run.result.best_val is not None]


def _seeds(group: Group) -> str:
    return ", ".join(str(run.seed) for run in group.finished) or "-"


def _since(folder: Path) -> str:
    """Say how long ago the run was written to."""
    newest = max(
        ((folder / name).stat().st_mtime for name in ("metrics.csv", "config.yaml") if (folder / name).is_file()),
        default=None,
    )
    if newest is None:
        return "-"
    minutes = max(time.time() - newest, 0) / 60
    if minutes < 60:
        return f"{minutes:.0f} min ago"
    return f"{minutes / 60:.0f} h ago" if minutes < 48 * 60 else f"{minutes / 1440:.0f} days ago"
