"""The images that a checkpoint is evaluated on: those of its own run, or of another dataset."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlpmatch_pl.data.base import FileFacts, Image, Mask, SegmentationData, file_facts
from mlpmatch_pl.data.dataset import EvalDataset
from mlpmatch_pl.data.datasets.folder import DEFAULT_VAL
from mlpmatch_pl.data.validation import require_same_palettes
from mlpmatch_pl.engine.build import build_data
from mlpmatch_pl.engine.run_folder import describe_splits
from mlpmatch_pl.engine.schema import checked_target
from mlpmatch_pl.evaluation import SlidingWindowInference
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.errors import UserError, suggest
from mlpmatch_pl.utils.files import load_yaml

log = logging.getLogger(__name__)

Part = Literal["val", "test", "train"]
FOLDER = "mlpmatch_pl.data.datasets.folder.folder"
# A function in a module of the same name; the modules that such a module imports do not match.
OWN_TARGET = re.compile(r"mlpmatch_pl\.data\.(?:datasets\.)?(\w+)\.\1")


class _LabeledImages:
    """The labeled training images as a source of their own."""

    def __init__(self, data: SegmentationData) -> None:
        self.source, self.indices = data.train, data.labeled_indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def image(self, index: int) -> Image:
        return self.source.image(self.indices[index])

    def mask(self, index: int) -> Mask:
        return self.source.mask(self.indices[index])

    def file_facts(self, index: int) -> FileFacts:
        return file_facts(self.source, self.indices[index])


@dataclass(frozen=True)
class EvaluatedPart:
    """The part of a dataset to evaluate on.

    Attributes:
        data: The dataset.
        part: ``val``, ``test``, or ``train`` for the labeled training images.
        split: Label, number of images and hash of the part.
        same_as_run: Whether the run had the same images as this part; None if unknown.
    """

    data: SegmentationData
    part: Part
    split: dict[str, Any]
    same_as_run: bool | None

    def images(self, inference: SlidingWindowInference | None = None) -> EvalDataset:
        """Return the images with their masks; with ``inference``, large ones in blocks."""
        sources = {"val": self.data.val, "test": self.data.test or self.data.val, "train": _LabeledImages(self.data)}
        source: Any = sources[self.part]
        return EvalDataset(source, len(self.data.class_names), self.data.ignore_index, inference)


def open_part(checkpoint: Path, dataset: Mapping[str, Any] | None, part: Part | None) -> EvaluatedPart:
    """Open the part of a dataset to evaluate on.

    Args:
        checkpoint: A checkpoint, whose run folder describes the run's own dataset.
        dataset: What to instantiate. Without ``_target_``, keys that replace those of the run's own dataset; None for
            the run's own dataset.
        part: ``val``, ``test`` or ``train`` (the labeled images); None for ``test``, or ``val`` without test images.

    A folder is evaluated as a whole, every image with a mask, unless the configuration or ``part`` says which images.

    Raises:
        UserError: If the run folder or the dataset does not exist, the dataset has no such part, or the palettes of
            its masks differ.
    """
    own = dataset is None or "_target_" not in dataset
    if own:
        data = open_run_dataset(checkpoint, dataset or {})
    else:
        data = build_data(checked_target("dataset", _whole(dict(dataset or {}), part)))
    if part == "test" and not data.test:
        raise UserError("expected test images for part=test, but the dataset has none; use part=val")
    part = part or ("test" if data.test else "val")
    key = "labeled" if part == "train" else part
    split = describe_splits(data)[key]
    if not split["count"]:
        raise UserError(f"expected images to evaluate on, but {part} has none; choose another part or dataset.{part}")
    saved = _saved_hash(checkpoint, key) if own else None
    if saved != split["sha256"]:
        require_same_palettes(data, key)
    return EvaluatedPart(data, part, split, None if saved is None else saved == split["sha256"])


def open_run_dataset(checkpoint: Path, changes: Mapping[str, Any]) -> SegmentationData:
    """Open the dataset of a checkpoint's run, with some keys replaced.

    Raises:
        UserError: If the run folder or the dataset does not exist.
    """
    return build_data(checked_target("dataset", _run_dataset(checkpoint, changes)))


def _whole(dataset: dict[str, Any], part: Part | None) -> dict[str, Any]:
    """Make all images with masks of a folder validation images: its default holds out a share for a training."""
    lists = ("train", "labeled", "unlabeled", "test")
    chosen = part is not None or any(dataset.get(key) is not None for key in lists)
    if dataset["_target_"] != FOLDER or chosen or dataset.get("val", DEFAULT_VAL) != DEFAULT_VAL:
        return dataset
    return {**dataset, "val": 1.0, "group_by": None}  # groups are for a share


def check_compatible(module: MLPMatch, data: SegmentationData, checkpoint: Path) -> None:
    """Refuse a dataset with other classes or another kind of images than the network was trained on.

    Another orientation or choice of channels is noted: the files may differ.

    Raises:
        UserError: For the first difference.
    """
    trained, found = list(module.class_names), list(data.class_names)
    if len(trained) != len(found):
        raise UserError(
            f"expected a dataset with {len(trained)} classes, as {checkpoint} was trained on, but it has "
            f"{len(found)}; choose another dataset, or set its classes"
        )
    unnamed = trained == [str(index) for index in range(len(trained))]
    if different := [pair for pair in zip(trained, found, strict=True) if pair[0] != pair[1] and not unnamed]:
        raise UserError(
            f"expected a dataset with the classes that {checkpoint} was trained on, but instead of "
            f"{different[0][0]!r} it has {different[0][1]!r}; choose another dataset, or rename its classes"
        )
    for name, own, other in (
        ("channels", module.hparams["in_chans"], data.in_chans),
        ("bits per channel", module.hparams.get("bit_depth", 8), data.bit_depth),
    ):
        if own != other:
            raise UserError(
                f"expected images of {own} {name}, as {checkpoint} was trained on, but the dataset's have {other}"
            )
    read, reads = dict(module.hparams.get("image_options") or {}), dict(data.image_options)
    for key in sorted({key for key in {**read, **reads} if read.get(key) != reads.get(key)}):
        log.warning(
            "note: images were read with dataset.%s=%s for the training, and are read with %s now; set it if the files "
            "are of the same kind",
            key, *(options.get(key, "its default") for options in (read, reads)),
        )  # fmt: skip


def run_folder_of(checkpoint: Path) -> Path | None:
    """Return the folder with config.yaml, the one above checkpoints/ or the checkpoint's own; None if there is none."""
    folders = (checkpoint.resolve().parent.parent, checkpoint.resolve().parent)
    return next((folder for folder in folders if (folder / "config.yaml").is_file()), None)


def _run_dataset(checkpoint: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the run's own dataset, with some keys replaced."""
    folder = run_folder_of(checkpoint)
    if folder is None:
        raise UserError(
            f"expected the run's config.yaml in the folder above {checkpoint.parent}, but there is none; name the "
            "dataset, as in dataset=folder dataset.root=my_images"
        )
    path = folder / "config.yaml"
    saved = _read_dataset(path)
    if unknown := [key for key in changes if key not in saved]:
        raise UserError(
            f"expected keys of the dataset in {path}, but it has no {unknown[0]}." + suggest(unknown[0], saved)
        )
    for key, value in saved.items():
        if key not in changes and "${" in str(value):  # instantiate() would resolve it
            raise UserError(
                f"expected a value for dataset.{key} in {path}, but found {value!r}, which is not resolved here; set "
                f"it, as in dataset.{key}=..."
            )
    return {**saved, **changes}


def _read_dataset(path: Path) -> dict[str, Any]:
    """Read the dataset of a run; a file that came with a checkpoint must not call anything but a dataset function."""
    try:
        content = load_yaml(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the run's configuration {path} ({type(error).__name__}); name the dataset, as in "
            "dataset=folder dataset.root=my_images"
        ) from error
    saved = content.get("dataset") if isinstance(content, dict) else None
    if not isinstance(saved, dict) or not isinstance(saved.get("_target_"), str):
        raise UserError(f"expected the configuration of a training run in {path}, but it has no dataset")
    target = OWN_TARGET.fullmatch(saved["_target_"])
    if not target or _has_target([*saved.values()]):
        raise UserError(
            f"expected a dataset of mlpmatch_pl in {path}, but it calls {saved['_target_']}; if you trust it, name it "
            f"with all its keys, as in +dataset._target_={saved['_target_']}"
        )
    # Runs of earlier versions name modules that have moved into mlpmatch_pl.data.datasets.
    return {**saved, "_target_": f"mlpmatch_pl.data.datasets.{target[1]}.{target[1]}"}


def _has_target(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or _has_target([*value.values()])
    return isinstance(value, list) and any(map(_has_target, value))


def _saved_hash(checkpoint: Path, part: str) -> str | None:
    folder = run_folder_of(checkpoint)
    try:
        splits = json.loads(((folder or Path()) / "splits.json").read_text(encoding="utf-8"))
        return str(splits[part]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):  # missing, from another version, or damaged
        return None
