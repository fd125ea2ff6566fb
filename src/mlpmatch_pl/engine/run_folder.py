"""The run folder: the files written when a run starts, and the check that a resumed run uses the same images."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from mlpmatch_pl.data.base import ImageSource, SegmentationData
from mlpmatch_pl.data.splits import Split
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import atomic_write, free_name, load_yaml

log = logging.getLogger(__name__)
SPLITS = "splits.json"
LOCK_SECONDS = 10  # the loading workers of a killed run hold its lock for up to 5 s


def write_run_folder(cfg: DictConfig, output_dir: Path, data: SegmentationData) -> None:
    """Write config.yaml, overrides.yaml, the lists labeled.txt and val.txt, and splits.json that describes all lists.

    When a run is resumed with another configuration, the previous one is kept as config-1.yaml, config-2.yaml ...
    """
    path, config = output_dir / "config.yaml", resolved_config(cfg)
    changed = path.exists() and not has_settings(output_dir, cfg)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    atomic_write(path, text, keep_as=free_name(path).name if changed else None)
    if HydraConfig.initialized():
        atomic_write(output_dir / "overrides.yaml", OmegaConf.to_yaml(HydraConfig.get().overrides.task))
    save_lists(output_dir, data)
    atomic_write(output_dir / SPLITS, json.dumps(describe_splits(data), indent=2) + "\n")


def has_settings(folder: Path, cfg: DictConfig) -> bool:
    """Tell whether the run in a folder was started with a configuration."""
    return bool(_settings(_load_or_none(folder / "config.yaml")) == _settings(resolved_config(cfg)))


def resolved_config(cfg: DictConfig) -> dict[str, Any]:
    """Return a configuration as plain data, with its interpolations resolved, except two kinds.

    Paths in the run folder stay ``${output_dir}/...``: a run that is repeated with this configuration and another
    ``output_dir`` must not write into the first one. Environment variables may hold secrets, and run folders are
    shared: only those named ``MLPMATCH_*`` are replaced by their values; others stay as ``${oc.env:NAME}``, also where
    another key refers to them.

    Example:
        >>> resolved_config(OmegaConf.create({"seed": 3, "same": "${seed}", "key": "${oc.env:HOME}", "also": "${key}"}))
        {'seed': 3, 'same': 3, 'key': '${oc.env:HOME}', 'also': '${oc.env:HOME}'}
    """

    def env(name: str, *default: str | None) -> str | None:
        return oc.env(name, *default) if name.startswith("MLPMATCH_") else f"${{oc.env:{name}}}"

    output_dir, cfg = cfg.get("output_dir"), deepcopy(cfg)
    if output_dir is not None:
        cfg.output_dir = r"\${output_dir}"  # escaped, so that it resolves to itself
    OmegaConf.register_new_resolver("oc.env", env, replace=True)
    try:
        config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
    return config if output_dir is None else config | {"output_dir": output_dir}


def _settings(config: Any) -> Any:
    """Leave out what may differ between two starts of the same run; W&B's group is the time of the start."""
    ignored = ("resume", "logger", "output_dir")
    return {key: config[key] for key in config if key not in ignored} if isinstance(config, dict) else None


def _load_or_none(path: Path) -> Any:
    try:
        return load_yaml(path)
    except ValueError:  # damaged: kept beside the new one
        return None


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder.

    The system releases the lock when the process ends, however it ends. On disks without locks there is none.

    Args:
        folder: The run folder, which is created, and removed again if nothing is written into it.

    Raises:
        UserError: If another process holds the lock.
    """
    new, path = not folder.exists(), folder / "run.lock"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise UserError(
            f"expected a run folder that no other process uses, but another one holds {path}; wait for its end, or "
            "choose another hydra.run.dir"
        ) from error
    except OSError as error:
        log.debug("no locks in %s (%s)", folder, error)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
        if new:
            with suppress(OSError):  # the run is in it
                folder.rmdir()


def check_splits(checkpoint: Path, output_dir: Path, data: SegmentationData) -> None:
    """Refuse to resume with other images in the same run folder; in a new folder, warn.

    Args:
        checkpoint: The file to resume from.
        output_dir: The run folder.
        data: The current images.

    Raises:
        UserError: If labeled, unlabeled or validation images differ from those in splits.json beside the checkpoint, or
            that file is damaged.
    """
    path = checkpoint.parent.parent / SPLITS
    for name, now, then in _read_pairs(path, describe_splits(data)):
        if then["sha256"] == now["sha256"]:
            continue
        expected = f"{then['count']} {name} images ({then['split']}, sha256 {then['sha256'][:8]}) as in {path}"
        found = f"{now['count']} ({now['split']}, sha256 {now['sha256'][:8]})"
        if path.parent.resolve() == output_dir:
            raise UserError(
                f"expected {expected}, but got {found}; use the dataset options of config.yaml there, or continue in a "
                f"new folder with resume={checkpoint} hydra.run.dir=..."
            )
        log.warning("the checkpoint was trained with %s; now with %s", expected, found)


def _read_pairs(path: Path, here: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return name, current and saved description of each split; nothing if there is no splits.json."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        pairs = [(name, now, before.get(name, now)) for name, now in here.items()]
        for _, _, then in pairs:
            {key: str(then[key])[:8] for key in ("split", "count", "sha256")}
    except OSError:
        return []
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"expected the images of the run in {path}, but it is damaged ({type(error).__name__}); remove it to "
            "continue without comparing them"
        ) from error
    return pairs


def save_lists(folder: Path, data: SegmentationData) -> None:
    """Write labeled.txt and val.txt, from which another run gets the same split: one image per line, with its mask."""
    for name, source, indices in (
        ("labeled", data.train, data.labeled_indices),
        ("val", data.val, range(len(data.val))),
    ):
        line = getattr(source, "listing", source.name)  # a source without files has only names
        lines = "".join(f"{line(index)}\n" for index in indices)
        atomic_write(folder / f"{name}.txt", lines)


def describe_splits(data: SegmentationData) -> dict[str, dict[str, Any]]:
    """Return label, number of images and hash of the labeled, unlabeled, validation and test images."""
    splits = {
        "labeled": data.labeled,
        "unlabeled": Split("unlabeled", _names(data.train, data.unlabeled)),
        "val": Split("validation", _names(data.val, range(len(data.val)))),
        "test": Split("test", _names(data.test, range(len(data.test)))) if data.test else None,
    }
    return {key: describe_split(split) for key, split in splits.items() if split is not None}


def describe_split(split: Split) -> dict[str, Any]:
    """Return a split's label, number of images and hash."""
    return {"split": split.label, "count": len(split.names), "sha256": split.sha256}


def _names(source: ImageSource, indices: Any) -> tuple[str, ...]:
    return tuple(source.name(index) for index in indices)
