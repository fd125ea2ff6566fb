"""Find run folders and read them: finished, unfinished, refused and broken ones."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from mlpmatch_pl.utils.files import load_yaml

_NOT_SEARCHED = {"checkpoints", "predictions", "tensorboard", "wandb"}  # W&B writes a config.yaml of its own
_MAX_BYTES = 2**28  # ten times the metrics.csv of a long training; run folders may come from anywhere
T = TypeVar("T")


@dataclass(frozen=True)
class ImageList:
    """A named list of images.

    Attributes:
        label: Its name, such as ``1/8 (seed 0)``.
        count: Number of images.
        sha256: Hash of the list.
    """

    label: str
    count: int
    sha256: str


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: Its path.
        config: The configuration by dotted key, ``{"schedule.lr": 0.05}``.
        overrides: What the command line changed, if the run folder says so.
        lists: The lists of images by use: labeled, unlabeled, val, test.
        scores: Scores of the best checkpoint (``miou``, ``iou/road``), 0..1; empty unless the run is finished.
        facts: Steps, seconds, device and the like, by their names in ``runs.csv``; empty unless the run is finished.
        curves: Logged values, a row for each step, a column for each metric.
        problems: Sentences about files that cannot be read.
    """

    folder: Path
    config: Mapping[str, Any]
    overrides: tuple[str, ...]
    lists: Mapping[str, ImageList]
    scores: Mapping[str, float]
    facts: Mapping[str, Any]
    curves: pd.DataFrame
    problems: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the run has a result."""
        return bool(self.scores)

    @property
    def dataset(self) -> str:
        """Name of the dataset; for ``dataset=folder``, that of the folder."""
        name = str(self.config["dataset._target_"]).rpartition(".")[2]
        root = self.config.get("dataset.root")
        return Path(root).name or name if name == "folder" and isinstance(root, str) else name

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.config["method.name"])

    @property
    def seed(self) -> Any:
        """Seed of the training."""
        return self.config["seed"]


@dataclass(frozen=True)
class Unreadable:
    """A run folder, or a file in it, that cannot be reported.

    Attributes:
        name: The run folder.
        problem: The reason, in a sentence.
        broken: False for a job that has not begun or was refused, and left no configuration.
    """

    name: str
    problem: str
    broken: bool


def find_run_folders(folders: Sequence[Path]) -> list[Path]:
    """Find the run folders among and below folders, each once; ``2_shapes`` comes before ``10_shapes``.

    A run folder has a config.yaml and a splits.json, or at least the train.log of a job that was refused.
    """

    def order(path: Path) -> list[tuple[int, int | str]]:
        key: list[tuple[int, int | str]] = []
        for part in path.parts:
            digits, _, rest = part.partition("_")
            key += [(0, int(digits)), (1, rest)] if digits.isdecimal() else [(1, part)]
        return key

    found = {here.resolve(): here for folder in folders for here in _walk(folder)}
    return sorted(found.values(), key=order)


def _walk(folder: Path) -> Iterator[Path]:
    for here, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if name not in _NOT_SEARCHED and not name.startswith(".")]
        if "train.log" in files or ("config.yaml" in files and "splits.json" in files):
            yield Path(here)


def read_run(folder: Path) -> Run | Unreadable:
    """Read a run folder in its present state; its training may still be running.

    Returns:
        The run, or the reason why there is none, if its configuration or its lists cannot be read.
    """
    for needed in ("config.yaml", "splits.json"):
        if not (folder / needed).is_file():
            return Unreadable(str(folder), f"has no {needed}: the job was refused or has not begun", broken=False)
    problems: list[str] = []

    def optional(name: str, read: Callable[[Path], T], default: T) -> T:
        try:
            return _read(folder / name, read) if (folder / name).is_file() else default
        except _BrokenFileError as error:
            problems.append(str(error))
            return default

    try:
        config, lists = _read(folder / "config.yaml", _config), _read(folder / "splits.json", _lists)
    except _BrokenFileError as error:
        return Unreadable(str(folder), str(error), broken=True)
    curves = optional("metrics.csv", read_curves, pd.DataFrame())
    none: tuple[str, ...] = ()
    overrides = optional("overrides.yaml", lambda path: tuple(map(str, load_yaml(path))), none)
    nothing: tuple[dict[str, Any], dict[str, float]] = ({}, {})
    facts, scores = optional("metrics.json", _result, nothing)
    if facts and steps_done(curves) > facts["steps"]:
        facts, scores = {}, {}  # resumed: metrics.json is from before
    return Run(folder, config, overrides, lists, scores, facts, curves, tuple(problems))


def read_curves(path: Path) -> pd.DataFrame:
    r"""Read metrics.csv, also while a training writes it.

    A last line without its end is still being written and left out. After a resume, steps repeat or go back: the rows
    that were written last count.

    Returns:
        A row for each step, a column such as ``val/miou`` for each metric, NaN where a metric was not logged.

    Raises:
        ValueError: If the file is not a table of numbers with a column ``step``.
        OSError: If the file cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "metrics.csv"
        ...     _ = path.write_text("step,train/loss,val/miou\n4,1.5,\n9,1.2,\n4,,0.25\n4,1.6,\n9,0.")
        ...     read_curves(path).to_dict("index")
        {4: {'train/loss': 1.6, 'val/miou': 0.25}}
    """
    text = _text(path)
    complete = text[: text.rfind("\n") + 1]
    if not complete:
        return pd.DataFrame()
    frame = pd.read_csv(io.StringIO(complete), dtype=float)
    if "step" not in frame:
        raise ValueError("line 1 has no column step")
    # pandas takes the first column for an index if the lines are longer than the header.
    if not isinstance(frame.index, pd.RangeIndex) or not frame["step"].between(0, 2**53).all():
        raise ValueError("expected lines as long as the header, with a step in each")
    frame["step"] = frame["step"].astype(int)
    smallest_from_here_on = frame["step"][::-1].cummin()[::-1]
    latest = frame[frame["step"] <= smallest_from_here_on]
    return latest.drop(columns="epoch", errors="ignore").groupby("step").last().dropna(axis="columns", how="all")


def steps_done(curves: pd.DataFrame) -> int:
    """Return the number of optimizer steps at the last training or validation values.

    Example:
        >>> steps_done(pd.DataFrame({"train/loss": [1.5, 1.0]}, index=[4, 9]))  # steps are counted from 0
        10
    """
    logged = curves.filter(regex="^(train|val)/").dropna(how="all")
    return int(logged.index[-1]) + 1 if len(logged) else 0


class _BrokenFileError(Exception):
    """A file that cannot be read, with the reason."""


def _read(path: Path, read: Callable[[Path], T]) -> T:
    """Read a file, and turn whatever is wrong with it into one sentence that names it."""
    try:
        return read(path)
    except OSError as error:
        raise _BrokenFileError(f"{path.name} cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise _BrokenFileError(f"{path.name} is broken: {reason}") from error


def _text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"expected at most {_MAX_BYTES >> 20} MiB")
    return content.decode("utf-8")


def _config(path: Path) -> dict[str, Any]:
    """Read a configuration into dotted keys."""
    config = load_yaml(path)
    if not isinstance(config, dict):
        raise TypeError("expected keys and values")
    flat = dict(_flatten(config))
    for key in ("seed", "dataset._target_", "method.name"):
        flat[key]  # a KeyError says which one is missing
    return flat


def _flatten(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _lists(path: Path) -> dict[str, ImageList]:
    lists = {
        str(use): ImageList(str(entry["split"]), int(entry["count"]), str(entry["sha256"]))
        for use, entry in json.loads(_text(path)).items()
    }
    lists["labeled"]  # a KeyError says that it is missing
    return lists


def _result(path: Path) -> tuple[dict[str, Any], dict[str, float]]:
    content = json.loads(_text(path))
    best = content["best"]["val/miou"]
    scores = {str(key).partition("/")[2]: float(value) for key, value in content["test"].items()}
    scores["miou"]  # a KeyError says that it is missing
    facts = {
        "steps": int(content["steps"]),
        "seconds": float(content["seconds"]),
        "device": str(content["device"]),
        "version": str(content["versions"]["mlpmatch_pl"]),
        "best_val_miou": None if best is None else float(best),
        "evaluated_on": str(content["evaluated_on"]),
    }
    return facts, scores
