"""Find run folders and read them into one DataFrame: finished, unfinished, refused and broken ones."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
from PIL import Image as PILImage

from mlpmatch_pl.utils.files import FAILURE, load_yaml

_NOT_SEARCHED = {"checkpoints", "predictions", "tensorboard", "wandb"}  # W&B writes a config.yaml of its own
_MAX_BYTES = 2**28  # ten times the metrics.csv of a long training; run folders may come from anywhere
_NO_RESULT = dict.fromkeys(("steps", "seconds", "device", "version", "evaluated_on", "test/miou"))
T = TypeVar("T")


class Problem(NamedTuple):
    """A run folder, or a file in it, that cannot be read; a job that was refused or has not begun is not broken."""

    run: str
    reason: str
    broken: bool = True


def find_run_folders(folders: Sequence[Path]) -> list[Path]:
    """Find the run folders among and below folders, each once; ``2_shapes`` comes before ``10_shapes``.

    A run folder has a config.yaml and a splits.json, or at least the train.log of a job that was refused.
    """
    found = {}
    for folder in folders:
        for here, subfolders, files in os.walk(folder):
            subfolders[:] = [name for name in subfolders if name not in _NOT_SEARCHED and not name.startswith(".")]
            if {"train.log", FAILURE} & set(files) or {"config.yaml", "splits.json"} <= set(files):
                found[Path(here).resolve()] = Path(here)
    return sorted(
        found.values(), key=lambda path: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", str(path))]
    )


def read_runs(folders: Sequence[Path]) -> tuple[pd.DataFrame, list[Problem]]:
    """Read run folders in their present state; trainings may still be running.

    Returns:
        A row for each run, and what cannot be read. The columns ``steps``, ``seconds``, ``device``, ``version``,
        ``evaluated_on`` and ``test/*`` (0..1) are empty unless ``finished``; ``config`` has dotted keys, ``hashes`` are
        those of the image lists by use, ``curves`` is that of `read_curves`.
    """
    problems: list[Problem] = []
    runs = pd.DataFrame([run for folder in folders if (run := read_run(folder, problems))])
    floats = [column for column in runs if column.startswith("test/") or column in ("seconds", "best_val_miou")]
    return runs.astype(dict.fromkeys(floats, "float64") | ({"steps": "Int64"} if len(runs) else {})), problems


def read_run(folder: Path, problems: list[Problem]) -> dict[str, Any] | None:
    """Read a run folder into a row of `read_runs`; None if its configuration or its lists cannot be read."""
    if (folder / FAILURE).is_file():
        reason = read_file(folder, FAILURE, lambda path: " ".join(_text(path)[:1000].split()), problems)
        problems.append(Problem(str(folder), f"failed: {reason}", broken=False))
    for needed in ("config.yaml", "splits.json"):
        if not (folder / needed).is_file():
            if not (folder / FAILURE).is_file():
                problems.append(Problem(str(folder), f"has no {needed}: the job was refused or has not begun", False))
            return None
    config = read_file(folder, "config.yaml", _config, problems)
    lists = read_file(folder, "splits.json", _lists, problems)
    if config is None or lists is None:
        return None
    curves = read_file(folder, "metrics.csv", read_curves, problems)
    curves = pd.DataFrame() if curves is None else curves
    logged = curves.filter(regex="^(train|val)/").dropna(how="all")
    steps_logged = int(logged.index[-1]) + 1 if len(logged) else 0  # steps are counted from 0
    result = read_file(folder, "metrics.json", _result, problems)
    if result and steps_logged > result["steps"]:
        result = None  # resumed: metrics.json is from before
    return {
        "run": str(folder), "dataset": _dataset_name(config), "labeled_list": lists["labeled"]["split"],
        "sha256": lists["labeled"]["sha256"], "labels": lists["labeled"]["count"], "method": str(config["method.name"]),
        "seed": str(config["seed"]), "finished": result is not None, "steps_logged": steps_logged,
        "overrides": read_file(folder, "overrides.yaml", lambda path: [*map(str, load_yaml(path))], problems) or [],
        "config": config, "hashes": {use: entry["sha256"] for use, entry in lists.items()}, "curves": curves,
        "best_val_miou": curves["val/miou"].max() if "val/miou" in curves else None, **(result or _NO_RESULT),
    }  # fmt: skip


def read_file(folder: Path, name: str, read: Callable[[Path], T], problems: list[Problem]) -> T | None:
    """Read a file of a run folder; None if it is missing, or broken, which is added to the problems."""
    try:
        return read(folder / name) if (folder / name).is_file() else None
    except OSError as error:
        reason = f"cannot be read ({error.strerror})" if error.strerror else f"is broken: {error}"
    except KeyError as error:
        reason = f"is broken: lacks {error}"
    # What json, YAML, pandas and Pillow raise for broken files, and for those that would fill the memory.
    except (
        ValueError,
        TypeError,
        AttributeError,
        SyntaxError,
        RecursionError,
        PILImage.DecompressionBombError,
    ) as error:
        reason = f"is broken: {' '.join(str(error).split())}"
    problems.append(Problem(str(folder), f"{name} {reason}"))
    return None


def read_curves(path: Path) -> pd.DataFrame:
    """Read metrics.csv, also while a training writes it.

    A last line without its end is still being written and left out. After a resume, steps repeat or go back: the rows
    that were written last count.

    Returns:
        A row for each step, a column such as ``val/miou`` for each metric, NaN where a metric was not logged.

    Raises:
        ValueError: If the file is not a table of numbers with a column ``step``.
        OSError: If the file cannot be read.
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


def _text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"expected at most {_MAX_BYTES >> 20} MiB")
    return content.decode("utf-8")


def _config(path: Path) -> dict[str, Any]:
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


def _dataset_name(config: Mapping[str, Any]) -> str:
    """Return the name of the dataset; for ``dataset=folder``, that of the folder."""
    name, root = str(config["dataset._target_"]).rpartition(".")[2], config.get("dataset.root")
    return Path(root).name or name if name == "folder" and isinstance(root, str) else name


def _lists(path: Path) -> dict[str, dict[str, Any]]:
    lists = {
        str(use): {"split": str(entry["split"]), "count": int(entry["count"]), "sha256": str(entry["sha256"])}
        for use, entry in json.loads(_text(path)).items()
    }
    lists["labeled"]  # a KeyError says that it is missing
    return lists


def _result(path: Path) -> dict[str, Any]:
    content = json.loads(_text(path))
    best, scores = content["best"]["val/miou"], content["test"]
    return {
        "steps": int(content["steps"]), "seconds": float(content["seconds"]), "device": str(content["device"]),
        "version": str(content["versions"]["mlpmatch_pl"]), "evaluated_on": str(content["evaluated_on"]),
        "best_val_miou": None if best is None else float(best), "test/miou": float(scores["test/miou"]),
        **{key: float(score) for key, score in scores.items() if key.startswith("test/")},
    }  # fmt: skip
