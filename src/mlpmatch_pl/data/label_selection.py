"""Select labeled, unlabeled, validation and test images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlpmatch_pl.data.base import SegmentationData, class_list
from mlpmatch_pl.data.files import FileIndex, FileSource, Pair, count_suffixes, image_files
from mlpmatch_pl.data.readers.image import MASK_SUFFIXES, ImageReader
from mlpmatch_pl.data.readers.mask import MaskReader
from mlpmatch_pl.data.splits import Choice, Split, choose, choose_groups, cover_first, is_path
from mlpmatch_pl.utils.cpu import reader_threads
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.palette import require_colors
from mlpmatch_pl.utils.prefetch import ordered_map

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetFormat:
    """Classes of a dataset, and readers of its files.

    Attributes:
        class_names: Names of the classes, in the order of the mask values.
        read_image: Reads an image.
        read_mask: Reads a mask.
        palette: An RGB color for each class, for visualization.
        ignore_index: Mask value of pixels to ignore.
    """

    class_names: tuple[str, ...]
    read_image: ImageReader
    read_mask: MaskReader
    palette: tuple[tuple[int, int, int], ...] = ()
    ignore_index: int = 255


@dataclass(frozen=True)
class LabelSelection:
    """The choice of labeled and unlabeled images.

    Attributes:
        labeled: Fraction, count, list file or folder. None: all images with a mask.
        unlabeled: List files or folders. Empty: the remaining training images.
        seed: Seed of a choice by fraction or count.
        cover_classes: Whether a choice by fraction or count starts with images that together contain every class.
        label: Name of the labeled list in results. Default: its path.
    """

    labeled: Choice | None = None
    unlabeled: tuple[str, ...] = ()
    seed: int = 0
    cover_classes: bool = False
    label: str | None = None


def make_format(
    classes: Sequence[str], palette: Sequence[Sequence[int]] | None, read_image: ImageReader, read_mask: MaskReader
) -> DatasetFormat:
    """Validate classes and palette.

    Raises:
        UserError: If class names, ignore index or palette are wrong.
    """
    if palette is not None and len(palette) != len(classes):
        raise UserError(f"expected {len(classes)} colors in dataset.palette, one per class, but got {len(palette)}")
    names = class_list(classes, read_mask.ignore_index)
    require_colors("dataset.palette", palette or ())
    colors = tuple((red, green, blue) for red, green, blue in palette or ())
    return DatasetFormat(names, read_image, read_mask, colors, read_mask.ignore_index)


def hold_out(
    files: FileIndex,
    pairs: list[Pair],
    wanted: LabelSelection,
    val: Choice,
    group_by: str | None = None,
    tested: bool = False,
) -> tuple[list[Pair], list[Pair]]:
    """Split validation images off the training images.

    Args:
        files: The files.
        pairs: The training images.
        wanted: The choice of labeled images; those of a list are not chosen for validation.
        val: Fraction or count of the images with masks, or a list file or folder.
        group_by: See `mlpmatch_pl.data.datasets.folder.folder`.
        tested: Whether there are test images. Then all images with masks may be among them.

    Returns:
        The remaining training images, and the validation images.

    Raises:
        UserError: If there are no images to choose from, or the choice or grouping is invalid.
    """
    if is_path(val):
        val_pairs = files.held_out(str(val))
        listed = {pair.image for pair in val_pairs}
        return [pair for pair in pairs if pair.image not in listed], val_pairs
    fixed = {pair.image for pair in files.part(str(wanted.labeled))} if is_path(wanted.labeled) else set()
    candidates = [pair.image for pair in pairs if pair.mask and pair.image not in fixed]
    if not candidates and fixed:
        raise UserError(
            f"expected images with a mask beside the lists in dataset.labeled and dataset.unlabeled to choose "
            f"dataset.val={val} from, but there are none; set dataset.val to a list file or folder"
        )
    if not candidates and tested:
        return pairs, []
    _require_masks(files, candidates)
    if group_by:
        chosen = choose_groups(candidates, val, wanted.seed, group_by)
    else:
        chosen = set(choose(candidates, val, wanted.seed, "val").names)
    return [pair for pair in pairs if pair.image not in chosen], [pair for pair in pairs if pair.image in chosen]


def select(
    files: FileIndex, form: DatasetFormat, train: list[Pair], val: list[Pair], test: list[Pair], wanted: LabelSelection
) -> SegmentationData:
    """Choose the labeled and unlabeled images, and return the dataset.

    Raises:
        UserError: If a list or choice is invalid, labeled and evaluation images overlap, or one of these has no mask.
            The content of files is checked later, by `mlpmatch_pl.data.validation`.
    """
    pairs = {pair.image: pair for pair in train}
    split = _labeled(files, form, pairs, wanted, any(pair.mask for pair in (*val, *test)))
    for held_out, what in ((val, "validation"), (test, "test")):
        _refuse_overlap(split.names, held_out, what)
        files.require_masks(held_out, f"{what} image")
    unlabeled, notes = _unlabeled(files, pairs, split, wanted, {pair.image for pair in (*val, *test)})
    if both := sorted({pair.image for pair in val} & {pair.image for pair in test}):
        notes += (f"{both[0]} is a validation image and a test image ({len(both)} in total)",)
    ordered = list(pairs.values())
    notes += tuple(files.notes)

    def source(chosen: list[Pair]) -> FileSource:
        return FileSource(files.base, chosen, form.read_image, form.read_mask)

    return SegmentationData(
        class_names=form.class_names,
        train=source(ordered),
        labeled=split,
        unlabeled=tuple(index for index, pair in enumerate(ordered) if pair.image in unlabeled),
        val=source(val),
        test=source(test) if test else None,
        ignore_index=form.ignore_index,
        palette=form.palette,
        in_chans=form.read_image.in_chans,
        bit_depth=form.read_image.bit_depth,
        image_options=form.read_image.options,
        notes=notes,
    )


def _labeled(
    files: FileIndex, form: DatasetFormat, pairs: dict[str, Pair], wanted: LabelSelection, evaluated: bool
) -> Split:
    """Choose the labeled images; add those of a list to the pairs. There may be none if there is data to evaluate."""
    if is_path(wanted.labeled):
        # Bare names in a list get the masks of the training images.
        listed = files.with_masks(files.part(str(wanted.labeled)), pairs)
        files.require_masks(listed, f"image in {wanted.labeled}")
        pairs |= {pair.image: pair for pair in listed}
        return Split(wanted.label or str(wanted.labeled), tuple(pair.image for pair in listed))
    masked = [name for name, pair in pairs.items() if pair.mask]
    if not masked and evaluated:
        return Split("none", ())
    _require_masks(files, masked)
    if wanted.labeled is None:
        return Split("all", tuple(sorted(masked)))
    if not wanted.cover_classes:
        return choose(masked, wanted.labeled, wanted.seed)
    classes = _classes_in(files.base, form, [pairs[name] for name in sorted(masked)])
    split = choose(masked, wanted.labeled, wanted.seed, order=lambda names: cover_first(names, classes))
    there, covered = ({label for name in names for label in classes[name]} for names in (masked, split.names))
    if missing := sorted(there - covered):
        raise UserError(
            f"expected enough labeled images to contain every class, but {len(split.names)} have no "
            f"{form.class_names[missing[0]]} ({len(missing)} classes in total); raise dataset.labeled, or set "
            "dataset.cover_classes=false"
        )
    return split


def _require_masks(files: FileIndex, masked: Sequence[str]) -> None:
    if not masked:
        folder = files.base / files.masks
        there = "but found none" if folder.is_dir() else "but that folder does not exist"
        others: list[str] = []
        if not list(image_files(str(folder), MASK_SUFFIXES, others)) and others:
            there = f"but found only {count_suffixes(others)}, which cannot be read"
        raise UserError(
            f"expected masks for some training images below {folder}, {there}; a mask has the path and name of its "
            "image, with its own suffix, or set dataset.masks and dataset.mask_name"
        )


def _unlabeled(
    files: FileIndex, pairs: dict[str, Pair], split: Split, wanted: LabelSelection, held_out: set[str]
) -> tuple[set[str], tuple[str, ...]]:
    """Choose the unlabeled images; add those of lists and folders to the pairs."""
    taken, notes = set(split.names), []
    candidates = set(pairs)
    if wanted.unlabeled:
        listed = _listed_unlabeled(files, wanted, taken)
        candidates = {pair.image for pair in listed}
        if unused := sorted(set(pairs) - candidates - taken - held_out):
            notes.append(
                f"{unused[0]} is a training image, but neither labeled nor in dataset.unlabeled ({len(unused)} in "
                "total); it is not used"
            )
        for pair in listed:
            pairs.setdefault(pair.image, pair)
    if left_out := sorted(candidates & held_out):
        notes.append(
            f"{left_out[0]} is a training image and a validation or test image ({len(left_out)} in total); it is "
            "removed from the training images"
        )
    return candidates - held_out - taken, tuple(notes)


def _listed_unlabeled(files: FileIndex, wanted: LabelSelection, labeled: set[str]) -> list[Pair]:
    """Read the unlabeled lists and folders. Labeled images are an error in a list, but not in a folder."""
    listed = []
    for name in wanted.unlabeled:
        part = files.part(name, with_masks=False)
        both = sorted(labeled & {pair.image for pair in part})
        if both and is_path(wanted.labeled) and not files.is_folder(name):
            raise UserError(f"expected labeled and unlabeled images to differ, but {both[0]} is in both lists")
        listed += part
    return listed


def _classes_in(base: Path, form: DatasetFormat, pairs: list[Pair]) -> dict[str, frozenset[int]]:
    """Return the classes in each mask."""
    log.info("reading %d masks for dataset.cover_classes", len(pairs))
    source = FileSource(base, pairs, form.read_image, form.read_mask)

    def read(index: int) -> frozenset[int]:
        counts = np.bincount(source.mask(index).ravel(), minlength=len(form.class_names))
        return frozenset(np.flatnonzero(counts[: len(form.class_names)]).tolist())

    classes = ordered_map(read, range(len(pairs)), reader_threads())
    return dict(zip((pair.image for pair in pairs), classes, strict=True))


def _refuse_overlap(labeled: Iterable[str], held_out: Iterable[Pair], what: str) -> None:
    if both := sorted(set(labeled) & {pair.image for pair in held_out}):
        raise UserError(
            f"expected labeled and {what} images to differ, but {both[0]} is in both ({len(both)} in total); "
            "remove them from one list"
        )
