"""Finding and reading run folders: finished, unfinished, refused and broken ones."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmatch_pl.commands.report.metrics_csv import Curve, read_curves, steps_done
from mlpmatch_pl.utils.files import load_yaml

_NOT_SEARCHED = {"checkpoints", "predictions", "tensorboard", "wandb"}  # W&B writes a config.yaml of its own


@dataclass(frozen=True)
class ImageList:
    """A named list of images.

    Attributes:
        label: What it is called.
        count: Number of images.
        sha256: Hash of the list.
    """

    label: str
    count: int
    sha256: str


@dataclass(frozen=True)
class Result:
    """What metrics.json says of a finished run.

    Attributes:
        scores: Figures of the best checkpoint without their prefix (``miou``, ``iou/road``), 0..1.
        evaluated_on: ``test`` or ``validation``.
        best_val: Best validation mIoU, 0..1.
        steps: Optimizer steps.
        seconds: Training time.
        device: What it was trained on.
        version: Version of this package.
    """

    scores: Mapping[str, float]
    evaluated_on: str
    best_val: float | None
    steps: int
    seconds: float
    device: str
    version: str


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: Where it is.
        name: What it is called in the report.
        config: The configuration by dotted key, ``{"schedule.lr": 0.05}``.
        lists: The lists of images by their use: labeled, unlabeled, val, test.
        result: None if the run is not finished.
        curves: Steps and values of everything that was logged.
        problems: What could not be read, in sentences.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    lists: Mapping[str, ImageList]
    result: Result | None
    curves: Mapping[str, Curve]
    problems: tuple[str, ...] = ()

    @property
    def dataset(self) -> str:
        """Name of the data set; of an own folder, the folder's."""
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
    """A run folder of which nothing can be reported.

    Attributes:
        name: What it is called in the report.
        problem: Why, in a sentence.
        broken: False for a job that has not begun, or was refused, and left no configuration.
    """

    name: str
    problem: str
    broken: bool


def find_run_folders(folders: Sequence[Path]) -> list[Path]:
    """Find the run folders among folders and below them, each once, by name with numbers in order.

    A run folder has a config.yaml, or at least the train.log of a job that was refused.
    """
    found = {here.resolve(): here for folder in folders for here in _walk(folder)}
    return sorted(found.values(), key=_natural)


def _walk(folder: Path) -> Iterator[Path]:
    for place, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if name not in _NOT_SEARCHED and not name.startswith(".")]
        if "train.log" in files or ("config.yaml" in files and "splits.json" in files):
            yield Path(place)


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Order 2_shapes before 10_shapes."""
    key: list[tuple[int, int | str]] = []
    for part in path.parts:
        digits, _, rest = part.partition("_")
        key += [(0, int(digits)), (1, rest)] if digits.isdecimal() else [(1, part)]
    return key


def read_run(folder: Path) -> Run | Unreadable:
    """Read a run folder as it is now; its training may go on meanwhile.

    Returns:
        The run; or why it cannot be reported, if its configuration or its lists cannot be read.
    """
    name = str(folder)
    for needed in ("config.yaml", "splits.json"):
        if not (folder / needed).is_file():
            return Unreadable(name, f"has no {needed}: the job was refused or has not begun", broken=False)
    try:
        config = _read_config(folder / "config.yaml")
        lists = _read_lists(folder / "splits.json")
    except _BrokenFileError as error:
        return Unreadable(name, str(error), broken=True)
    problems = []
    result, curves = None, dict[str, Curve]()
    if (folder / "metrics.csv").is_file():
        try:
            curves = _reading(folder / "metrics.csv", read_curves)
        except _BrokenFileError as error:
            problems.append(str(error))
    if (folder / "metrics.json").is_file():
        try:
            result = _reading(folder / "metrics.json", _result)
        except _BrokenFileError as error:
            problems.append(str(error))
    if result and steps_done(curves) > result.steps:
        result = None  # resumed: what metrics.json says is from before
    return Run(folder, name, config, lists, result, curves, tuple(problems))


class _BrokenFileError(Exception):
    """A file that cannot be read, with the reason."""


def _reading(path: Path, read: Any) -> Any:
    """Read a file; whatever is wrong with it becomes one sentence that names it."""
    try:
        return read(path)
    except OSError as error:
        raise _BrokenFileError(f"{path.name} cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise _BrokenFileError(f"{path.name} is broken: {reason}") from error


def _read_config(path: Path) -> dict[str, Any]:
    """Read a configuration into dotted keys."""

    def read(path: Path) -> dict[str, Any]:
        try:
            config = load_yaml(path)
        except Exception as error:  # of the YAML reader's own kinds
            raise ValueError(str(error)) from error
        if not isinstance(config, dict):
            raise TypeError("expected keys and values")
        flat = dict(_flatten(config))
        for key in ("seed", "dataset._target_", "method.name"):
            flat[key]  # a KeyError says which one is missing
        return flat

    flat: dict[str, Any] = _reading(path, read)
    return flat


def _flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_lists(path: Path) -> dict[str, ImageList]:
    def read(path: Path) -> dict[str, ImageList]:
        lists = {
            str(use): ImageList(str(entry["split"]), int(entry["count"]), str(entry["sha256"]))
            for use, entry in json.loads(path.read_text(encoding="utf-8")).items()
        }
        lists["labeled"]  # a KeyError says that it is missing
        return lists

    lists: dict[str, ImageList] = _reading(path, read)
    return lists


def _result(path: Path) -> Result:
    content = json.loads(path.read_text(encoding="utf-8"))
    best, versions = content["best"]["val/miou"], content["versions"]
    scores = {key.partition("/")[2]: float(value) for key, value in content["test"].items()}
    scores["miou"]  # a KeyError says that it is missing
    return Result(
        scores,
        str(content["evaluated_on"]),
        None if best is None else float(best),
        int(content["steps"]),
        float(content["seconds"]),
        str(content["device"]),
        str(versions["mlpmatch_pl"]),
    )
