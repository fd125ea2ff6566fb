"""What a checkpoint is evaluated on: the data of its run, or others."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlpmatch_pl.data.base import ImageSource, SegmentationData
from mlpmatch_pl.engine.build import build_data
from mlpmatch_pl.engine.run_folder import describe_splits
from mlpmatch_pl.engine.schema import checked_target
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.errors import UserError, suggest
from mlpmatch_pl.utils.files import load_yaml

Part = Literal["val", "test"]
# A function in a module of its name, and nothing that such a module imports.
OWN_TARGET = re.compile(r"mlpmatch_pl\.data\.(?:datasets\.)?(\w+)\.\1")


@dataclass(frozen=True)
class EvaluatedPart:
    """A part of a data set.

    Attributes:
        data: The data set.
        part: ``val`` or ``test``.
        split: Its label, number of images and hash.
        same_as_run: Whether these are the images that the run had as this part; None where that is not known.
    """

    data: SegmentationData
    part: Part
    split: dict[str, Any]
    same_as_run: bool | None

    @property
    def source(self) -> ImageSource:
        """The images of the part."""
        return self.data.test or self.data.val if self.part == "test" else self.data.val


def open_part(checkpoint: Path, dataset: Mapping[str, Any] | None, part: Part | None) -> EvaluatedPart:
    """Open a part of a data set.

    Args:
        checkpoint: A checkpoint, whose run folder tells the run's own data.
        dataset: What to instantiate; None for the run's own data, without ``_target_`` the keys in them to change.
        part: ``val``, ``test``, or None for test, or val where there are no test images.

    Raises:
        UserError: If the run folder or the data are not there, or the data have no such part.
    """
    data = build_data(checked_target("dataset", _dataset_config(checkpoint, dataset)))
    if part == "test" and not data.test:
        raise UserError("expected test images for part=test, but the data have none; use part=val")
    part = part or ("test" if data.test else "val")
    split = describe_splits(data)[part]
    if not split["count"]:
        raise UserError(f"expected images to evaluate on, but {part} has none; choose another part or dataset.{part}")
    saved = _saved_hash(checkpoint, part) if dataset is None or "_target_" not in dataset else None
    return EvaluatedPart(data, part, split, None if saved is None else saved == split["sha256"])


def require_fit(module: MLPMatch, data: SegmentationData, checkpoint: Path) -> None:
    """Refuse data with other classes or another kind of images than the network was trained on.

    Raises:
        UserError: For the first difference.
    """
    trained, found = list(module.class_names), list(data.class_names)
    unnamed = trained == [str(index) for index in range(len(trained))]
    if len(trained) != len(found):
        raise UserError(
            f"expected data with {len(trained)} classes, as {checkpoint} was trained on, but they have {len(found)}; "
            "choose other data, or their classes"
        )
    if different := [pair for pair in zip(trained, found, strict=True) if pair[0] != pair[1] and not unnamed]:
        raise UserError(
            f"expected data with the classes that {checkpoint} was trained on, but where it has {different[0][0]!r} "
            f"they have {different[0][1]!r}; choose other data, or name their classes alike"
        )
    for name, own, other in (
        ("channels", module.hparams["in_chans"], data.in_chans),
        ("bits a channel", module.hparams.get("bit_depth", 8), data.bit_depth),
    ):
        if own != other:
            raise UserError(
                f"expected images of {own} {name}, as {checkpoint} was trained on, but the data have {other}"
            )


def run_folder_of(checkpoint: Path) -> Path | None:
    """Return the folder with config.yaml: that above checkpoints/, or the checkpoint's own; None if there is none."""
    folders = (checkpoint.resolve().parent.parent, checkpoint.resolve().parent)
    return next((folder for folder in folders if (folder / "config.yaml").is_file()), None)


def _dataset_config(checkpoint: Path, dataset: Mapping[str, Any] | None) -> dict[str, Any]:
    given = dict(dataset or {})
    folder = run_folder_of(checkpoint)
    if folder is None and "_target_" not in given:
        raise UserError(
            f"expected the run's config.yaml in the folder above {checkpoint.parent}, but there is none; name the "
            "data, as in dataset=folder dataset.root=my_images"
        )
    if folder is None or "_target_" in given:
        return given
    own = _saved_dataset(folder / "config.yaml")
    if unknown := [key for key in given if key not in own]:
        raise UserError(
            f"expected keys of the dataset in {folder / 'config.yaml'}, but it has no {unknown[0]}."
            + suggest(unknown[0], own)
        )
    for key, value in own.items():
        if key not in given and "${" in str(value):
            raise UserError(
                f"expected a value for dataset.{key} in {folder / 'config.yaml'}, but found {value!r}, which is not "
                f"resolved here; set it, as in +dataset.{key}=..."
            )
    return {**own, **given}


def _saved_dataset(path: Path) -> dict[str, Any]:
    """Read the dataset of a run; a file that came with a checkpoint must not make anything else run."""
    try:
        content = load_yaml(path)
    except Exception as error:  # a broken file makes the reader raise nearly anything
        raise UserError(
            f"cannot read the run's configuration {path} ({type(error).__name__}); name the data"
        ) from error
    saved = content.get("dataset") if isinstance(content, dict) else None
    if not isinstance(saved, dict) or not isinstance(saved.get("_target_"), str):
        raise UserError(f"expected the configuration of a training in {path}, but it describes no dataset")
    target = OWN_TARGET.fullmatch(saved["_target_"])
    if not target or _has_target([*saved.values()]):
        raise UserError(
            f"expected a dataset of mlpmatch_pl in {path}, but it calls {saved['_target_']}; if you trust it, name it "
            f"with all its keys, as in +dataset._target_={saved['_target_']}"
        )
    return {
        **saved,
        "_target_": f"mlpmatch_pl.data.datasets.{target[1]}.{target[1]}",
    }  # runs from before this package existed


def _has_target(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or _has_target([*value.values()])
    return isinstance(value, list) and any(map(_has_target, value))


def _saved_hash(checkpoint: Path, part: str) -> str | None:
    folder = run_folder_of(checkpoint)
    if folder is None or not (folder / "splits.json").is_file():
        return None
    try:
        sha256: str = json.loads((folder / "splits.json").read_text(encoding="utf-8"))[part]["sha256"]
    except (ValueError, KeyError, TypeError):  # of another version, or damaged: nothing to compare with
        return None
    return sha256
