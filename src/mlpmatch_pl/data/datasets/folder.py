"""Images and masks in folders, list files or CSV files: one's own data, without writing a class.

    root/images/**/a.jpg     root/masks/**/a.png      paired by relative path without suffix

or list files with a line ``image mask`` (or just ``image``) each, relative to root, as UniMatch publishes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mlpmatch_pl.data.base import SegmentationData
from mlpmatch_pl.data.files import FileIndex, Pair
from mlpmatch_pl.data.label_selection import LabelSelection, hold_out, layout, select
from mlpmatch_pl.data.readers.image import ImageReader
from mlpmatch_pl.data.readers.mask import MaskReader
from mlpmatch_pl.data.splits import Choice, is_path

Names = str | Sequence[str]


def folder(
    root: Names,
    classes: Sequence[str],
    images: str = "images",
    masks: str = "masks",
    train: Names | None = None,
    labeled: Choice | None = None,
    unlabeled: Names | None = None,
    val: Choice = 0.2,
    test: str | None = None,
    in_chans: int = 3,
    bit_depth: int = 8,
    mask_values: Mapping[int | str, int] | None = None,
    palette: Sequence[Sequence[int]] | None = None,
    ignore_colors: Sequence[Sequence[int]] = (),
    ignore_index: int = 255,
    split_seed: int = 0,
    cover_classes: bool = False,
) -> SegmentationData:
    """Describe a data set of files.

    ``train``, ``labeled``, ``unlabeled``, ``val`` and ``test`` take a list file (lines ``image mask`` or ``image``), a
    CSV file (columns image and mask), or a folder (with ``images`` and ``masks`` in it, below the folder of the images,
    or with images alone), relative to the root or the working directory.

    Args:
        root: The folder that everything else is relative to, or several of them.
        classes: Class names in the order of the mask values, background included.
        images: Folder with the images, with any sub-folders.
        masks: Folder with the masks.
        train: The training images, labeled or not; every image that is not in val or test if left out.
        labeled: The images whose masks are used; also a fraction (``1/8``) or count (``20``) of those that have a mask;
            all of them if left out.
        unlabeled: Images without masks; the rest of the training images if left out.
        val: Images to choose a checkpoint by; also a fraction or count of the images with masks.
        test: Images to report on.
        in_chans: Channels of an image. 3 also reads gray files, as RGB.
        bit_depth: 8 or 16 bits a channel, as the files have.
        mask_values: Class of each value in the mask files, as in ``{0: 0, 255: 1}``; the key ``other`` stands for
            all the rest. The values are the classes if left out.
        palette: An RGB color for each class, for pictures and to read masks that are saved in colors.
        ignore_colors: RGB colors of pixels that do not count, in such masks.
        ignore_index: Mask value of pixels that do not count.
        split_seed: Seed of choices by fraction or count.
        cover_classes: Whether a choice of labeled images starts with some that together hold every class.

    Raises:
        UserError: If a folder, file, list or choice is wrong. Files' contents are checked by `checks`.
    """
    form = layout(
        classes, palette, ImageReader(in_chans, bit_depth),
        MaskReader(mask_values, palette or (), ignore_colors, ignore_index),
    )  # fmt: skip
    files = FileIndex([Path(name).expanduser() for name in _names(root)], images, masks)
    wanted = LabelSelection(labeled, _names(unlabeled), split_seed, cover_classes)
    test_pairs = files.with_masks(files.part(str(test)), {}) if test is not None else []
    pairs = _training_images(files, _names(train), wanted, {pair.image for pair in test_pairs})
    rest, val_pairs = hold_out(files, pairs, wanted, val)
    listed = bool(train) and is_path(val)  # what is in both lists is then an error or a note, no choice of ours
    return select(files, form, pairs if listed else rest, val_pairs, test_pairs, wanted)


def _training_images(files: FileIndex, train: Sequence[str], wanted: LabelSelection, tested: set[str]) -> list[Pair]:
    """Return the training images; those of the labeled and unlabeled lists may still be missing."""
    if train:
        return [pair for name in train for pair in files.part(name)]
    if is_path(wanted.labeled) and wanted.unlabeled:
        return []  # the two lists are the training set
    return [pair for pair in files.discover() if pair.image not in tested]


def _names(value: Names | None) -> tuple[str, ...]:
    # Hydra reads a folder called 2019 as a number.
    return () if value is None else (str(value),) if isinstance(value, str | int) else tuple(map(str, value))
