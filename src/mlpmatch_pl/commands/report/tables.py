"""Average runs that differ only in their seed, and write the results as tables for reading and as CSV."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from mlpmatch_pl.commands.report.plots import COLORS, method_color
from mlpmatch_pl.commands.report.runs import Problem

# Keys that cannot change a result (where files are, how fast they are read, what is shown), and, last, keys that choose
# images: the hashes of the lists say which ones.
_NOT_COMPARED = re.compile(
    r"seed|output_dir|resume|logger\..*|.*\.dirpath"
    r"|callbacks\.(predictions|confusion|finite\w*)\..*|callbacks\.checkpoint\.(?!monitor).*"
    r"|loader\.(num_workers|multiprocessing_context|cache|eval_batch_size)"
    r"|trainer\.(accelerator|enable_progress_bar|log_every_n_steps|deterministic|benchmark)"
    r"|\w+\.(channels_last|compile_blocks|activation_checkpointing|fused\w*)"
    r"|dataset\.(_target_|labeled|unlabeled|train|val|test|split_seed|cover_classes|image_set|images|masks)"
)
_SCORES = {"test/miou": "mIoU %", "test/dice": "Dice %", "test/acc": "accuracy %", "best_val_miou": "best val mIoU %"}


def group_runs(runs: pd.DataFrame, pool_splits: bool = False) -> pd.DataFrame:
    """Group runs by dataset, labeled list (by its hash), method and every setting in which runs of the dataset differ.

    Args:
        runs: As read by `read_runs`.
        pool_splits: Whether seeded splits of one size, ``1/8 (seed 0)`` and ``1/8 (seed 1)``, count as one list.

    Returns:
        The runs by dataset, number of labeled images, list, method (baselines first), settings and seed, with further
        columns: ``list_id`` and ``list`` (its name), ``setting/*``, ``series`` (method and settings), ``group``.
    """
    runs = runs.assign(list_id=runs["sha256"])
    if pool_splits:
        seeded = runs["labeled_list"].str.extract(r"^(.+) \(seed \d+(, every class)?\)$").astype(object)
        runs["list_id"] = (seeded[0] + " (several seeds" + seeded[1].fillna("") + ")").fillna(runs["sha256"])
    lists = runs.groupby(["dataset", "labels", "list_id"])
    names = runs["list_id"].where(lists["sha256"].transform("nunique") > 1, lists["labeled_list"].transform("first"))
    runs["list"] = names.str.replace(r"^(?:[^/]*/){2,}([^/]+/[^/]+)$", r".../\1", regex=True)  # the end of long paths
    settings = _settings(runs, pool_splits)
    runs["series"] = [
        ", ".join([method, *(f"{key}={value}" for key, value in row.items() if value)])
        for method, row in zip(runs["method"], settings.to_dict("records"), strict=True)
    ]
    ranks = {method: rank for rank, method in enumerate(COLORS)}
    order = {"rank": [ranks.get(method, len(ranks)) for method in runs["method"]], "nth": runs["seed"].str.zfill(20)}
    settings = settings.add_prefix("setting/")
    keys = ["dataset", "labels", "list", "list_id", "rank", "method", *settings]
    runs = runs.assign(**order).join(settings).sort_values([*keys, "nth"], ignore_index=True)
    return runs.assign(group=runs.groupby(keys, sort=False).ngroup()).drop(columns=["rank", "nth"])


def _settings(runs: pd.DataFrame, pool_splits: bool) -> pd.DataFrame:
    """Return the keys in which runs of one dataset differ; blank where a key does not differ within its scope."""
    rows = []
    for config, hashes in zip(runs["config"], runs["hashes"], strict=True):
        # A benchmark dataset may have another path on another machine.
        same_root = "" if config["dataset._target_"].endswith(".folder") else "dataset.root"
        compared = (key for key in config if not _NOT_COMPARED.fullmatch(key) and key != same_root)
        uses = ("test",) if pool_splits else ("unlabeled", "val", "test")
        lists = {f"{use} list": hashes[use][:8] for use in uses if use in hashes}
        rows.append({key: _value(config[key]) for key in compared} | lists)
    values = pd.DataFrame(rows, index=runs.index, dtype=object).fillna("none")
    varying = pd.DataFrame(index=runs.index)
    for key in sorted(values):
        # The unlabeled images are what the labeled ones leave.
        scope = {"method": "method", "unlabeled list": "list_id"}.get(key.partition(".")[0], "dataset")
        differs = values[key].groupby([runs["dataset"], runs[scope]]).transform("nunique") > 1
        if differs.any():
            varying[key] = values[key].where(differs, "")
    for key in list(varying):  # backbone.name determines backbone.output_stride and the like, which say nothing more
        name = f"{key.rpartition('.')[0]}.name"
        determined = name in varying and varying.groupby([runs["dataset"], name])[key].nunique().max() == 1
        if determined and key != name:
            del varying[key]
    return varying


def _value(value: Any) -> str:
    """Write a value so that 1 and 1.0 are equal."""
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "none" if value is None else str(value)


class Cell(NamedTuple):
    """A cell: its text, whether it is the best of its list, the difference to the baseline, the color of its mark."""

    text: str
    best: bool = False
    gain: str = ""
    color: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.gain})" if self.gain else self.text


class Table(NamedTuple):
    """A table for reading; the columns whose indices are in ``numbers`` are aligned to the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: range = range(0)
    note: str = ""

    def markdown(self) -> str:
        """Write it in Markdown."""
        rules = ["---:" if index in self.numbers else "---" for index in range(len(self.columns))]
        texts = [[f"**{cell}**" if cell.best else str(cell) for cell in row] for row in self.rows]
        escaped = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in (self.columns, *texts)]
        header, *lines = (f"| {' | '.join(row)} |" for row in escaped)
        note = [self.note, ""] if self.note else []
        return "\n".join([f"### {self.title}", "", header, f"|{'|'.join(rules)}|", *lines, "", *note])


def score_table(runs: pd.DataFrame) -> Table:
    """Mean and standard deviation of the scores of one dataset's finished runs, with the gain over the baseline."""
    note = (
        "Mean ± sample standard deviation (n - 1) over finished runs; best checkpoint by validation mIoU. Bold: best "
        "of a labeled list. Signed: mIoU gain over supervised training, or else over the first row of the list."
    )
    return _results("scores", runs, _SCORES, note)


def class_table(runs: pd.DataFrame) -> Table:
    """Mean and standard deviation of each class's IoU."""
    classes = {column: column.removeprefix("test/iou/") for column in runs if column.startswith("test/iou/")}
    note = "IoU in %. Runs in which a class is absent from truth and prediction are left out of its mean."
    return _results("IoU by class", runs, classes, note)


def _results(title: str, runs: pd.DataFrame, names: Mapping[str, str], note: str) -> Table:
    scores = [column for column in names if column in runs and runs[column].notna().any()]
    settings = [column for column in runs if column.startswith("setting/") and runs[column].any()]
    groups = runs.groupby("group", sort=False)
    first, means = groups[["list_id", "list", "labels", "method", *settings]].first(), groups[scores].mean()
    evaluated_on = groups["evaluated_on"].agg(_joined)
    # Scores are compared where the labeled list and the evaluated images are the same.
    rivals = first["list_id"] + evaluated_on + first.get("setting/test list", "")
    best = means.eq(means.groupby(rivals).transform("max")).mul(rivals.duplicated(keep=False), axis="index")
    # Supervised training comes first in its list.
    gains, has_baseline = 100 * (means - means.groupby(rivals).transform("first")), rivals.duplicated()
    deviations, seeds = groups[scores].std(), groups["seed"].agg(" ".join)
    hashes = groups["sha256"].agg(lambda own: own.iloc[0][:8] if own.nunique() == 1 else f"{own.nunique()} lists")
    rows = []
    for group, row in first.iterrows():
        cells = [Cell(row["list"]), Cell(row["method"], color=method_color(row["method"])), *map(Cell, row[settings])]
        for score in scores:
            signed = score == "test/miou" and has_baseline[group] and pd.notna(gains.at[group, score])
            gain = f"{gains.at[group, score]:+.2f}" if signed else ""
            text = _percent(means.at[group, score], deviations.at[group, score])
            cells.append(Cell(text, bool(best.at[group, score]), gain))
        rows.append([*cells, Cell(seeds[group]), Cell(f"{row['labels']:,}"), Cell(hashes[group])])
    columns = ["labeled list", "method", *(key.removeprefix("setting/") for key in settings)]
    numbers = range(len(columns), len(columns) + len(scores))
    columns += [*(names[score] for score in scores), "seeds", "labels", "sha256"]
    title = f"{runs['dataset'].iloc[0]}: {title}, {_joined(evaluated_on)} images"
    return Table(title, columns, rows, numbers, note)


def _joined(values: pd.Series[str]) -> str:
    return " and ".join(values.unique())


def _percent(mean: float, deviation: float = float("nan")) -> str:
    if pd.isna(mean):
        return "-"
    return f"{100 * mean:.2f}" + ("" if pd.isna(deviation) else f" ± {100 * deviation:.2f}")


def runs_table(title: str, runs: pd.DataFrame) -> Table:
    """The runs one by one, each with its overrides; those that all runs share are in the note."""
    shared = [one for one in runs["overrides"].iloc[0] if len(runs) > 1 and all(one in o for o in runs["overrides"])]
    rows = []
    for _, run in runs.iterrows():
        written = max(path.stat().st_mtime for path in Path(run["run"]).iterdir() if path.is_file())
        minutes = run["seconds"] / 60 if run["finished"] else (time.time() - written) / 60
        duration = f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
        texts = (
            run["list"], run["seed"], " ".join(one for one in run["overrides"] if one not in shared),
            f"{run['steps_logged']} of {run['config'].get('schedule.steps', '?')}", _percent(run["test/miou"]),
            _percent(run["best_val_miou"]), duration if run["finished"] else f"last written {duration} ago",
        )  # fmt: skip
        rows.append([Cell(run["run"]), Cell(run["method"], color=method_color(run["method"])), *map(Cell, texts)])
    columns = ("run", "method", "labeled list", "seed", "overrides", "steps", "mIoU %", "best val mIoU %", "duration")
    return Table(title, columns, rows, range(5, 9), f"All runs: {' '.join(shared)}" if shared else "")


def problem_table(problems: Sequence[Problem]) -> Table:
    """The runs that were refused or cannot be read, entirely or in part, and why."""
    rows = [[Cell(problem.run), Cell(problem.reason)] for problem in problems]
    return Table("Problems", ("run", "problem"), rows)


def summary_csv(runs: pd.DataFrame) -> str:
    """Write a line for each group with finished runs; scores are from 0 to 1."""
    groups = runs[runs["finished"]].groupby("group", sort=False)
    table = groups[["dataset", "list", "sha256", "labels", "method"]].first().rename(columns={"list": "labeled_list"})
    table["sha256"] = groups["sha256"].agg(lambda own: " ".join(own.unique()))
    table = table.join(groups[[column for column in runs if column.startswith("setting/")]].first())
    table = table.join(groups[["evaluated_on", "seed"]].agg({"evaluated_on": _joined, "seed": " ".join}))
    for score in (column for column in runs if column.startswith("test/") or column == "best_val_miou"):
        table = table.join(groups[score].agg(mean="mean", std="std", n="count").add_prefix(f"{score}_"))
    return _csv(table.rename(columns={"seed": "seeds"}))


def runs_csv(runs: pd.DataFrame) -> str:
    """Write a line for each run, finished or not; scores are from 0 to 1."""
    finished = runs["finished"].map({True: "yes", False: "no"})
    runs = runs.assign(finished=finished, overrides=runs["overrides"].str.join(" "))
    return _csv(runs.drop(columns=["config", "hashes", "curves", "list", "list_id", "series", "group"]))


def _csv(frame: pd.DataFrame) -> str:
    safe = frame.astype(object).map(_inert)
    safe.columns = [_inert(re.sub("^(setting|test)/", "", column)) for column in frame]
    text: str = safe.to_csv(index=False, lineterminator="\n")
    return text


def _inert(value: Any) -> Any:
    """Quote a string that a spreadsheet would run as a formula; numbers such as ``-1e-05`` are none."""
    is_formula = isinstance(value, str) and re.match(r"[=@\t\r]|[+-](?!\d*\.?\d*(e[+-]?\d+)?$)", value)
    return f"'{value}" if is_formula else value
