"""The run folder: never written over, and resumed only by a run that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from mlpmatch_pl.data.sources import SegmentationData, Source
from mlpmatch_pl.data.splits import Split
from mlpmatch_pl.errors import UserError
from mlpmatch_pl.module import MLPMatch, check_architecture


def find_checkpoint(resume: str | None, output_dir: Path) -> Path | None:
    """Return the checkpoint to go on from; refuse to write over a run.

    Args:
        resume: None, ``auto`` or a path.
        output_dir: The run folder.

    Raises:
        UserError: If the run folder holds a run and nothing says to resume, or there is no checkpoint to resume.
    """
    if resume is None:
        existing = [*sorted((output_dir / "checkpoints").glob("*.ckpt")), *output_dir.glob("metrics.csv")]
        if existing:
            raise UserError(
                f"expected a new run folder, but {existing[0]} exists; go on with resume=auto, or choose another "
                "hydra.run.dir"
            )
        return None
    path = output_dir / "checkpoints" / "last.ckpt" if resume == "auto" else Path(resume)
    if not path.is_file():
        raise UserError(
            f"expected a checkpoint to resume from, but {path} does not exist; leave resume out to start anew"
        )
    return path


def check_checkpoint(path: Path, module: MLPMatch) -> int:
    """Refuse a checkpoint that the module cannot go on from, before anything is written.

    Returns:
        The optimizer step at which it was written.

    Raises:
        UserError: If it is broken, no checkpoint of a training, or of another architecture.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step, hparams = int(content["global_step"]), dict(content["hyper_parameters"])
    except Exception as error:  # a broken file makes the reader raise nearly anything
        raise UserError(
            f"expected a checkpoint of a training, but {path} cannot be read as one ({type(error).__name__}); "
            "published weights are loaded by init_weights"
        ) from error
    check_architecture(hparams, module.hparams)
    return step


def write_run_folder(cfg: DictConfig, output_dir: Path, data: SegmentationData) -> None:
    """Write config.yaml, the lists labeled.txt and val.txt, and splits.json with the name, size and hash of each."""
    output_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, output_dir / "config.yaml")
    save_lists(output_dir, data)
    (output_dir / "splits.json").write_text(json.dumps(describe_splits(data), indent=2) + "\n", encoding="utf-8")


def save_lists(folder: Path, data: SegmentationData) -> None:
    """Write labeled.txt and val.txt, which give another run the same split: an image a line, with its mask."""
    for name, source, indices in (
        ("labeled", data.train, data.labeled_indices),
        ("val", data.val, range(len(data.val))),
    ):
        line = getattr(source, "listing", source.name)  # a source without files has names only
        lines = "".join(f"{line(index)}\n" for index in indices)
        (folder / f"{name}.txt").write_text(lines, encoding="utf-8", errors="surrogateescape")


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


def _names(source: Source, indices: Any) -> tuple[str, ...]:
    return tuple(source.name(index) for index in indices)
