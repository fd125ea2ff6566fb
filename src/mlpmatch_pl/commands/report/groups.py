"""Which runs are averaged: those that differ in nothing but their seed."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from mlpmatch_pl.commands.report.runs import ImageList, Run

# Keys that cannot change a result: where things are, how fast they are made, what is shown of them.
_WITHOUT_EFFECT = re.compile(
    r"seed|output_dir|resume|logger\..*|callbacks\.predictions\..*|.*\.dirpath"
    r"|loader\.(num_workers|multiprocessing_context|cache|eval_batch_size)"
    r"|trainer\.(accelerator|enable_progress_bar|log_every_n_steps|deterministic|benchmark|channels_last)"
    r"|trainer\.(compile_blocks|activation_checkpointing|fused_optimizer)"
)
# Keys that choose images; the hashes of the lists say what was chosen.
_CHOOSES_IMAGES = re.compile(
    r"dataset\.(_target_|labeled|unlabeled|train|val|test|split_seed|cover_classes|image_set|images|masks)"
)
_SEEDED = re.compile(r"(.+) \(seed \d+(, every class)?\)")


@dataclass(frozen=True)
class Group:
    """Runs of one data set, method, labeled list and configuration, with different seeds.

    Attributes:
        dataset: Name of the data set.
        method: Name of the method.
        label: What the labeled list is called.
        count: Number of labeled images.
        hashes: Hashes of the labeled lists; more than one only where seeded splits are pooled.
        settings: The configuration's keys in which runs of this data set differ, and this group's values.
        runs: The runs, by seed, finished or not.
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
        return tuple(run for run in self.runs if run.result)

    @property
    def series(self) -> str:
        """The method and its settings: what a line in a plot stands for."""
        return ", ".join([self.method, *(f"{key}={value}" for key, value in self.settings.items() if value)])

    def values(self, score: str) -> list[float]:
        """Return a score of the finished runs, by seed, without runs that have no such score (an absent class)."""
        found = [run.result.scores.get(score, float("nan")) for run in self.runs if run.result]
        return [value for value in found if value == value]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation (n - 1), None for a single value.

    Example:
        >>> mean_and_deviation([1.0, 3.0]), mean_and_deviation([2.0])
        ((2.0, 1.4142135623730951), (2.0, None))
    """
    return mean(values), stdev(values) if len(values) > 1 else None


def group_runs(runs: Iterable[Run], pool_splits: bool = False) -> list[Group]:
    """Group runs by data set, method, labeled list and every setting in which runs of the data set differ.

    Lists are told apart by their hash, whatever they are called. Keys of ``method`` are compared within a method, as
    methods differ in them by definition.

    Args:
        runs: The runs, finished or not.
        pool_splits: Whether seeded splits of one size, ``1/8 (seed 0)`` and ``1/8 (seed 1)``, count as one, so that the
            deviation includes that of the split.

    Returns:
        The groups, by data set, number of labeled images, method and settings.
    """
    runs = list(runs)
    settings = _settings(runs, pool_splits)
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run, own in zip(runs, settings, strict=True):
        split = _split_key(run.lists["labeled"], pool_splits)
        found.setdefault((run.dataset, split[1], run.method, tuple(own.items()), split), []).append(run)
    groups = [_group(key[3], members, pool_splits) for key, members in found.items()]
    return sorted(
        groups, key=lambda group: (group.dataset, group.count, group.label, group.method, *group.settings.values())
    )


def _group(settings: tuple[tuple[str, str], ...], members: Sequence[Run], pool_splits: bool) -> Group:
    members = sorted(members, key=lambda run: (str(run.seed).zfill(20), run.name))
    labeled, first = [run.lists["labeled"] for run in members], members[0]
    hashes = tuple(dict.fromkeys(split.sha256 for split in labeled))
    label = _split_key(labeled[0], pool_splits)[0] if len(hashes) > 1 else labeled[0].label
    return Group(first.dataset, first.method, _short(label), labeled[0].count, hashes, dict(settings), tuple(members))


def _short(label: str) -> str:
    """Leave the end of a long path."""
    parts = label.split("/")
    return label if len(parts) < 4 else f".../{'/'.join(parts[-2:])}"


def _split_key(split: ImageList, pool_splits: bool) -> tuple[str, int]:
    """Return what two runs must share to have the same labeled list, and its size."""
    if pool_splits and (match := _SEEDED.fullmatch(split.label)):
        return f"{match[1]} (several seeds{match[2] or ''})", split.count
    return split.sha256, split.count


def _settings(runs: Sequence[Run], pool_splits: bool) -> list[dict[str, str]]:
    """Return for each run the compared keys in which runs of its data set differ; blank where they do not apply."""
    compared = [_compared(run, pool_splits) for run in runs]
    found: list[dict[str, str]] = [{} for _ in runs]
    for dataset in {run.dataset for run in runs}:
        indices = [index for index, run in enumerate(runs) if run.dataset == dataset]
        differing = _differing(runs, compared, indices)
        keys = _without_determined({key for key, _ in differing}, [compared[index] for index in indices])
        for index in indices:
            found[index] = {
                key: _text(compared[index].get(key)) if (key, _scope(key, runs[index])) in differing else ""
                for key in sorted(keys)
            }
    return found


def _compared(run: Run, pool_splits: bool) -> dict[str, Any]:
    """Return what must be equal for two runs to be averaged, lists of images by their hashes."""
    own_folder = str(run.config["dataset._target_"]).endswith(".folder")
    values = {
        key: value
        for key, value in run.config.items()
        if not _WITHOUT_EFFECT.fullmatch(key)
        and not _CHOOSES_IMAGES.fullmatch(key)
        and (key != "dataset.root" or own_folder)  # a benchmark may lie elsewhere on another machine
    }
    for use in ("test",) if pool_splits else ("unlabeled", "val", "test"):
        values[f"{use} list"] = run.lists[use].sha256[:8] if use in run.lists else None
    return values


def _scope(key: str, run: Run) -> tuple[str, ...]:
    """Return within which runs of a data set a key is compared; an empty scope means all."""
    if key.startswith("method."):
        return (run.method,)
    return (run.lists["labeled"].sha256,) if key == "unlabeled list" else ()


def _differing(
    runs: Sequence[Run], compared: Sequence[Mapping[str, Any]], indices: Sequence[int]
) -> set[tuple[str, tuple[str, ...]]]:
    """Return the keys, with the scope in which they are compared, that have more than one value."""
    seen: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for key in {key for index in indices for key in compared[index]}:
        for index in indices:
            seen.setdefault((key, _scope(key, runs[index])), set()).add(_text(compared[index].get(key)))
    return {place for place, values in seen.items() if len(values) > 1}


def _without_determined(keys: set[str], compared: Sequence[Mapping[str, Any]]) -> set[str]:
    """Leave out keys that the name beside them determines, as backbone.name does backbone.output_stride."""

    def determined(key: str) -> bool:
        name = f"{key.rpartition('.')[0]}.name"
        if key == name or name not in keys:
            return False
        pairs = {(_text(values.get(name)), _text(values.get(key))) for values in compared}
        return len(pairs) == len({named for named, _ in pairs})

    return {key for key in keys if not determined(key)}


def _text(value: Any) -> str:
    """Write a value so that 1 and 1.0 are equal."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "none" if value is None else str(value)
