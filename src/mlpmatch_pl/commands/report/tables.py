"""Average runs that differ only in their seed, and write the results as tables for reading and as CSV."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mlpmatch_pl.commands.report.plots import COLORS, method_color
from mlpmatch_pl.commands.report.runs import Run, Unreadable, steps_done

# Keys that cannot change a result: where files are, how fast they are read, what is shown.
_WITHOUT_EFFECT = re.compile(
    r"seed|output_dir|resume|logger\..*|.*\.dirpath"
    r"|callbacks\.(predictions|confusion|finite\w*)\..*|callbacks\.checkpoint\.(?!monitor).*"
    r"|loader\.(num_workers|multiprocessing_context|cache|eval_batch_size)"
    r"|trainer\.(accelerator|enable_progress_bar|log_every_n_steps|deterministic|benchmark)"
    r"|\w+\.(channels_last|compile_blocks|activation_checkpointing|fused\w*)"
)
# Keys that choose images; the hashes of the lists say which ones.
_CHOOSES_IMAGES = re.compile(
    r"dataset\.(_target_|labeled|unlabeled|train|val|test|split_seed|cover_classes|image_set|images|masks)"
)
_SEEDED = re.compile(r"(.+) \(seed \d+(, every class)?\)")
_SCORES = {"miou": "mIoU %", "dice": "Dice %", "acc": "accuracy %"}


@dataclass(frozen=True)
class Group:
    """Runs of one dataset, method, labeled list and configuration, with different seeds.

    Attributes:
        dataset: Name of the dataset.
        method: Name of the method.
        label: Name of the labeled list.
        count: Number of labeled images.
        hashes: Hashes of the labeled lists; several only if seeded splits are pooled.
        settings: Configuration keys in which runs of this dataset differ, with this group's values.
        runs: The runs, finished or not, by seed.
    """

    dataset: str
    method: str
    label: str
    count: int
    hashes: tuple[str, ...]
    settings: Mapping[str, str]
    runs: tuple[Run, ...]

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs with a result."""
        return tuple(run for run in self.runs if run.finished)

    @property
    def scores(self) -> pd.DataFrame:
        """The scores of the finished runs, a row for each run; ``best_val_miou`` is one of them."""
        rows = [{**run.scores, "best_val_miou": run.facts["best_val_miou"]} for run in self.finished]
        return pd.DataFrame(rows, dtype=float)

    @property
    def series(self) -> str:
        """The method and its settings: the name of a line in a plot."""
        return ", ".join([self.method, *(f"{key}={value}" for key, value in self.settings.items() if value)])

    @property
    def list_name(self) -> str:
        """The first digits of the labeled list's hash, or the number of pooled lists."""
        return self.hashes[0][:8] if len(self.hashes) == 1 else f"{len(self.hashes)} lists"

    @property
    def evaluated_on(self) -> str:
        """The images of the scores: test, validation, or both in different runs."""
        return " and ".join(sorted({run.facts["evaluated_on"] for run in self.finished}))


def group_runs(runs: Sequence[Run], pool_splits: bool = False) -> list[Group]:
    """Group runs by dataset, labeled list, method and every setting in which runs of the dataset differ.

    Lists are compared by hash, whatever their names. Keys of ``method`` are compared within a method, as methods differ
    in them by definition.

    Args:
        runs: The runs, finished or not.
        pool_splits: Whether seeded splits of one size, ``1/8 (seed 0)`` and ``1/8 (seed 1)``, count as one list, so
            that the deviation includes that of the split.

    Returns:
        The groups, by dataset, number of labeled images, list, method (baselines first) and settings.
    """
    rows = []
    for run in runs:
        labeled = run.lists["labeled"]
        pooled = _SEEDED.fullmatch(labeled.label) if pool_splits else None
        name = f"{pooled[1]} (several seeds{pooled[2] or ''})" if pooled else labeled.sha256
        rows.append((run.dataset, labeled.count, name, run.method, labeled.sha256))
    frame = pd.DataFrame(rows, columns=["dataset", "count", "list", "method", "sha256"], dtype=object)
    compared = pd.DataFrame([_compared(run, pool_splits) for run in runs], dtype=object).fillna("none")
    groups = []
    for dataset, indices in frame.groupby("dataset").groups.items():
        settings = _settings(frame.loc[indices], compared.loc[indices])
        keyed = frame.loc[indices].join(settings.add_prefix("setting "))
        for (_, count, name, method, *values), members in keyed.groupby(
            [c for c in keyed if c != "sha256"], sort=False
        ):
            own = sorted((runs[i] for i in members.index), key=lambda run: (str(run.seed).zfill(20), str(run.folder)))
            hashes = tuple(dict.fromkeys(run.lists["labeled"].sha256 for run in own))
            label = _shorten(own[0].lists["labeled"].label if len(hashes) == 1 else name)
            setting = dict(zip(settings, values, strict=True))
            groups.append(Group(dataset, method, label, count, hashes, setting, tuple(own)))
    ranks = {method: rank for rank, method in enumerate(COLORS)}
    return sorted(
        groups,
        key=lambda g: (
            g.dataset, g.count, g.label, g.hashes, ranks.get(g.method, len(ranks)), g.method, *g.settings.values()
        ),
    )  # fmt: skip


def _compared(run: Run, pool_splits: bool) -> dict[str, str]:
    """Return what must be equal for two runs to be averaged, with lists of images by their hashes."""
    own_folder = str(run.config["dataset._target_"]).endswith(".folder")
    values = {
        key: _value(value)
        for key, value in run.config.items()
        if not _WITHOUT_EFFECT.fullmatch(key)
        and not _CHOOSES_IMAGES.fullmatch(key)
        and (key != "dataset.root" or own_folder)  # a benchmark may have another path on another machine
    }
    for use in ("test",) if pool_splits else ("unlabeled", "val", "test"):
        values[f"{use} list"] = run.lists[use].sha256[:8] if use in run.lists else "none"
    return values


def _value(value: Any) -> str:
    """Write a value so that 1 and 1.0 are equal."""
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "none" if value is None else str(value)


def _settings(frame: pd.DataFrame, compared: pd.DataFrame) -> pd.DataFrame:
    """Return the keys in which runs of one dataset differ; blank where a key does not differ within its scope."""
    varying = pd.DataFrame(index=compared.index)
    for key in sorted(compared):
        # The unlabeled images are what the labeled ones leave.
        scope = "method" if key.startswith("method.") else "list" if key == "unlabeled list" else "dataset"
        differs = compared[key].groupby(frame[scope]).transform("nunique") > 1
        if differs.any():
            varying[key] = compared[key].where(differs, "")
    # backbone.name determines backbone.output_stride and the like, which then say nothing more.
    names = {key: f"{key.rpartition('.')[0]}.name" for key in varying}
    determined = [
        key
        for key, name in names.items()
        if key != name and name in varying and (varying.groupby(name)[key].nunique() == 1).all()
    ]
    return varying.drop(columns=determined)


def _shorten(label: str) -> str:
    """Keep the end of a long path."""
    parts = label.split("/")
    return label if len(parts) < 4 else f".../{'/'.join(parts[-2:])}"


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it says.
        best: Whether it is the best among its rivals.
        gain: Difference to the baseline, ``+1.23``.
        color: Color of a mark before the text.
    """

    text: str
    best: bool = False
    gain: str = ""
    color: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.gain})" if self.gain else self.text


@dataclass(frozen=True)
class Table:
    """A table for reading.

    Attributes:
        title: What it shows.
        columns: Names of the columns.
        rows: The cells of each row.
        numbers: Indices of the columns that are aligned to the right.
        note: How to read it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numbers: range = range(0)
    note: str = ""

    def markdown(self) -> str:
        r"""Write it in Markdown.

        Example:
            >>> print(Table("t", ("class", "IoU"), ((Cell("a|b"), Cell("1", best=True)),), range(1, 2)).markdown())
            ### t
            <BLANKLINE>
            | class | IoU |
            |---|---:|
            | a\|b | **1** |
            <BLANKLINE>
        """

        def row(cells: Sequence[Cell | str]) -> str:
            texts = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
            marked = (f"**{t}**" if isinstance(c, Cell) and c.best else t for t, c in zip(texts, cells, strict=True))
            return f"| {' | '.join(marked)} |"

        rules = ["---:" if index in self.numbers else "---" for index in range(len(self.columns))]
        lines = [f"### {self.title}", "", row(self.columns), f"|{'|'.join(rules)}|", *map(row, self.rows), ""]
        return "\n".join([*lines, *([self.note, ""] if self.note else [])])


def score_table(groups: Sequence[Group]) -> Table:
    """Mean and standard deviation of the scores, with the gain over the baseline of each labeled list."""
    note = (
        "Mean ± sample standard deviation (n - 1) over finished runs; best checkpoint by validation mIoU. Bold: best "
        "of a labeled list. Signed: mIoU gain over supervised training, or else over the first row of the list."
    )
    return _results("scores", groups, {**_SCORES, "best_val_miou": "best val mIoU %"}, note)


def class_table(groups: Sequence[Group]) -> Table:
    """Mean and standard deviation of each class's IoU."""
    keys = dict.fromkeys(key for group in groups for key in group.scores if key.startswith("iou/"))
    note = "IoU in %. Runs in which a class is absent from truth and prediction are left out of its mean."
    return _results("IoU by class", groups, {key: key.partition("/")[2] for key in keys}, note)


def _results(title: str, groups: Sequence[Group], scores: Mapping[str, str], note: str) -> Table:
    means = pd.DataFrame([group.scores.mean() for group in groups]).reindex(columns=list(scores))
    # Scores are compared where the labeled list and the evaluated images are the same.
    rivals = pd.Series([
        " ".join((*group.hashes, group.evaluated_on, group.settings.get("test list", ""))) for group in groups
    ])  # fmt: skip
    bests = means.groupby(rivals).transform("max").where(means.groupby(rivals).transform("size") > 1)
    baselines: dict[str, int] = {}
    for index, key in enumerate(rivals):
        if key not in baselines or groups[baselines[key]].method != "supervised" == groups[index].method:
            baselines[key] = index
    rows = []
    for index, group in enumerate(groups):
        baseline = baselines[rivals[index]]
        cells = [Cell(group.label), Cell(group.method, color=method_color(group.method))]
        cells += map(Cell, group.settings.values())
        for score in scores:
            text = percent(group.scores[score]) if score in group.scores else "-"
            gain = 100 * (means.at[index, score] - means.at[baseline, score])
            shown = f"{gain:+.2f}" if score == "miou" and index != baseline and gain == gain else ""
            cells.append(Cell(text, bool(means.at[index, score] == bests.at[index, score]), shown))
        seeds = " ".join(str(run.seed) for run in group.finished)
        rows.append((*cells, *map(Cell, (seeds, f"{group.count:,}", group.list_name))))
    images = " and ".join(dict.fromkeys(group.evaluated_on for group in groups))
    columns = ("labeled list", "method", *groups[0].settings, *scores.values(), "seeds", "labels", "sha256")
    first = 2 + len(groups[0].settings)
    title = f"{groups[0].dataset}: {title}, {images} images"
    return Table(title, columns, tuple(rows), range(first, first + len(scores)), note)


def percent(values: pd.Series[float]) -> str:
    """Write mean and standard deviation in percent.

    Example:
        >>> percent(pd.Series([0.5, 0.52])), percent(pd.Series([0.5])), percent(pd.Series([], dtype=float))
        ('51.00 ± 1.41', '50.00', '-')
    """
    if not values.count():
        return "-"
    return f"{100 * values.mean():.2f}" + (f" ± {100 * values.std():.2f}" if values.count() > 1 else "")


def runs_table(groups: Sequence[Group], shared: Collection[str]) -> Table:
    """The finished runs one by one, each with its overrides but those that all runs share."""
    rows = tuple(
        (
            Cell(str(run.folder)),
            Cell(group.method, color=method_color(group.method)),
            *map(Cell, (group.label, str(run.seed), _own_overrides(run, shared))),
            *map(Cell, (f"{100 * run.scores['miou']:.2f}", f"{run.facts['steps']:,}")),
            Cell(f"{run.facts['seconds'] / 60:.1f}"),
        )
        for group in groups
        for run in group.finished
    )
    columns = ("run", "method", "labeled list", "seed", "overrides", "mIoU %", "steps", "minutes")
    note = f"All runs: {' '.join(shared)}" if shared else ""
    return Table("Finished runs", columns, rows, range(5, 8), note)


def _own_overrides(run: Run, shared: Collection[str]) -> str:
    return " ".join(override for override in run.overrides if override not in shared)


def unfinished_table(runs: Sequence[Run], shared: Collection[str]) -> Table:
    """What is known of runs without a result, each with its overrides but those that all runs share."""
    rows = []
    for run in runs:
        val = run.curves["val/miou"].dropna() if "val/miou" in run.curves else pd.Series(dtype=float)
        steps = run.config.get("schedule.steps")
        files = (run.folder / name for name in ("metrics.csv", "config.yaml"))
        minutes = (time.time() - max(path.stat().st_mtime for path in files if path.is_file())) / 60
        age = f"{minutes:.0f} min" if minutes < 60 else f"{minutes / 60:.0f} h"
        texts = (
            str(run.folder), run.dataset, run.method, run.lists["labeled"].label, str(run.seed),
            _own_overrides(run, shared), f"{steps_done(run.curves)}{f' of {steps}' if steps else ''}",
            percent(val[-1:]), percent(val.nlargest(1)), f"{age} ago",
        )  # fmt: skip
        rows.append(tuple(map(Cell, texts)))
    columns = (
        "run", "dataset", "method", "labeled list", "seed", "overrides", "steps logged", "last val mIoU %",
        "best val mIoU %", "last written",
    )  # fmt: skip
    note = "Running or stopped: a run that was last written long ago was probably interrupted."
    return Table("Runs without a result", columns, tuple(rows), range(6, 10), note)


def problem_table(runs: Sequence[Run], unreadable: Sequence[Unreadable]) -> Table:
    """The runs that were refused or cannot be read, entirely or in part, and why."""
    found = [(entry.name, entry.problem) for entry in unreadable]
    found += [(str(run.folder), problem) for run in runs for problem in run.problems]
    return Table("Problems", ("run", "problem"), tuple((Cell(name), Cell(problem)) for name, problem in found))


def summary_csv(groups: Sequence[Group]) -> str:
    """Write a line for each group with finished runs; scores are from 0 to 1."""
    records = []
    for group in groups:
        if not group.finished:
            continue
        record: dict[str, Any] = {
            "dataset": group.dataset, "labeled_list": group.label, "sha256": " ".join(group.hashes),
            "labels": group.count, "method": group.method, **group.settings, "evaluated_on": group.evaluated_on,
            "seeds": " ".join(str(run.seed) for run in group.finished),
        }  # fmt: skip
        scores = group.scores.drop(columns="best_val_miou")
        for name, values in scores.items():
            record |= {f"{name}_mean": values.mean(), f"{name}_std": values.std(), f"{name}_n": values.count()}
        records.append(record)
    return _csv(records)


def runs_csv(groups: Sequence[Group]) -> str:
    """Write a line for each run, finished or not; scores are from 0 to 1."""
    return _csv([
        {
            "run": str(run.folder), "dataset": run.dataset, "labeled_list": run.lists["labeled"].label,
            "sha256": run.lists["labeled"].sha256, "labels": run.lists["labeled"].count, "method": run.method,
            **group.settings, "seed": run.seed, "finished": "yes" if run.finished else "no",
            "steps_logged": steps_done(run.curves), "overrides": " ".join(run.overrides), **run.scores, **run.facts,
        }
        for group in groups
        for run in group.runs
    ])  # fmt: skip


def _csv(records: Sequence[Mapping[str, Any]]) -> str:
    frame = pd.DataFrame(records, dtype=object)
    return frame.map(_inert).rename(columns=_inert).to_csv(index=False, lineterminator="\n") if records else ""


def _inert(value: Any) -> Any:
    """Quote a string that a spreadsheet would run as a formula.

    Example:
        >>> _inert("=HYPERLINK(1)"), _inert("-cmd"), _inert("-1e-05"), _inert("-"), _inert(-1)
        ("'=HYPERLINK(1)", "'-cmd", '-1e-05', '-', -1)
    """
    is_formula = isinstance(value, str) and re.match(r"[=@\t\r]|[+-](?!\d*\.?\d*(e[+-]?\d+)?$)", value)
    return f"'{value}" if is_formula else value
