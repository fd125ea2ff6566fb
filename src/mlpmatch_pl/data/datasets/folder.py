"""Images and masks in folders, list files or CSV files: your own data without writing a class.

    root/images/**/a.jpg     root/masks/**/a.png      paired by relative path without suffix
    root/images/**/a.jpg     root/masks/**/a_mask.png or any other word more, if all masks have it
    root/a.jpg               root/a_mask.png          images=. masks=.

or list files with lines ``image mask`` (or just ``image``), relative to root, as UniMatch publishes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mlpmatch_pl.data.base import SegmentationData
from mlpmatch_pl.data.files import FileIndex, Pair
from mlpmatch_pl.data.label_selection import LabelSelection, hold_out, make_format, select
from mlpmatch_pl.data.layout import find_layout, read_classes
from mlpmatch_pl.data.readers.image import ImageReader
from mlpmatch_pl.data.readers.mask import MaskReader
from mlpmatch_pl.data.splits import Choice, is_path
from mlpmatch_pl.utils.errors import UserError

Names = str | Sequence[str]
DEFAULT_VAL = 0.2


def folder(
    root: Names,
    classes: Sequence[str] | None = None,
    images: str | None = None,
    masks: str | None = None,
    image_name: str | None = None,
    mask_name: str | None = None,
    train: Names | None = None,
    labeled: Choice | None = None,
    unlabeled: Names | None = None,
    val: Choice = DEFAULT_VAL,
    test: str | None = None,
    in_chans: int = 3,
    bit_depth: int = 8,
    bands: Sequence[int] | None = None,
    channel_axis: str = "auto",
    mask_values: Mapping[int | float | str, int] | None = None,
    palette: Sequence[Sequence[int]] | None = None,
    ignore_colors: Sequence[Sequence[int]] = (),
    ignore_index: int = 255,
    orientation: str = "apply",
    class_channels: bool = False,
    split_seed: int = 0,
    cover_classes: bool = False,
    group_by: str | None = None,
) -> SegmentationData:
    r"""Return a dataset of files.

    ``train``, ``labeled``, ``unlabeled``, ``val`` and ``test`` take a list file (lines ``image mask`` or ``image``), a
    CSV file (columns image and mask), or a folder (with ``images`` and ``masks`` in it, below the folder of the images,
    or with images alone), relative to the root or the working directory.

    Args:
        root: The folder that all other paths are relative to, or several folders.
        classes: Class names in the order of the mask values, background included. Default: those of ``labelmap.txt``
            (with their colors) or ``_classes.csv`` (with their values), as annotation tools write them.
        images: Folder with the images, with any subfolders. Default, if ``masks`` is not given either: ``images`` with
            ``masks``, ``JPEGImages`` with ``SegmentationClass``, or the root itself with ``masks``.
        masks: Folder with the masks; may be that of the images. Default: ``masks``.
        image_name: Pattern of the images' names without suffix, such as ``*_sat``. Default: any.
        mask_name: Pattern of the masks' names, such as ``*_mask``; ``*`` is what an image and its mask share. Default:
            the names of the images, or, if no mask has one, what pairs all masks with images by one word more or
            another word.
        train: The training images, labeled or not. Default: all images that are not in val or test.
        labeled: The images whose masks are used; also a fraction (``1/8``) or count (``20``) of the images with a mask.
            Default: all of them.
        unlabeled: Images used without masks. Default: the remaining training images.
        val: Images for choosing a checkpoint; also a fraction or count of the images with a mask.
        test: Images for the final evaluation.
        in_chans: Channels of an image. 3 also reads gray files, as RGB.
        bit_depth: Bits per channel of the files, 8 or 16.
        bands: Numbers of the channels to read, counted from 1, such as ``[4, 3, 2]``. Default: all.
        channel_axis: ``first`` or ``last``, for TIFF files that don't say which axis is that of the channels.
        mask_values: Class of each value in the mask files, such as ``{0: 0, 255: 1}`` or ``{-9999: 255, 0: 0, 1: 1}``.
            The key ``other`` matches all other values. Default: the values are the classes.
        palette: An RGB color for each class, for visualization and for reading masks saved as colors. Masks saved with
            a palette are read by their colors too, unless ``mask_values`` is given.
        ignore_colors: RGB colors of pixels to ignore in such masks.
        ignore_index: Mask value of pixels to ignore.
        orientation: Whether to ``apply`` or ``ignore`` the orientation tag of images and masks.
        class_channels: Whether a mask file has a page or channel for each class, see
            `mlpmatch_pl.data.readers.mask.MaskReader`.
        split_seed: Seed of choices by fraction or count.
        cover_classes: Whether a choice of labeled images starts with images that together contain every class.
        group_by: Keeps images of one scene on one side of a fraction or count in ``val``: ``folder``, or a regular
            expression whose match in an image's path names its scene, such as ``scene_\d+``.

    Raises:
        UserError: If a folder, file, list or choice is invalid. The content of files is checked later, by
            `mlpmatch_pl.data.validation`.
    """
    roots = [Path(name).expanduser() for name in _names(root)]
    if images is None and masks is None and roots:
        images, masks = find_layout(roots[0])
    files = FileIndex(roots, images or "images", masks or "masks", image_name=image_name, mask_name=mask_name)
    if classes is None:
        found = read_classes(roots)
        if found is None:
            raise UserError(
                f"expected dataset.classes, or labelmap.txt or _classes.csv in {roots[0]}, but there is none; name the "
                "classes in the order of the mask values, as in 'dataset.classes=[background,road]', or draw masks "
                "from an annotation tool's export by 'python -m mlpmatch_pl.prepare dataset=annotations'"
            )
        classes, ignore_colors = found.names, ignore_colors or found.ignore_colors
        palette, mask_values = palette or found.palette or None, mask_values or found.mask_values
    form = make_format(
        classes, palette, ImageReader(in_chans, bit_depth, orientation, bands, channel_axis),
        MaskReader(
            mask_values, palette or (), ignore_colors, ignore_index, orientation, class_channels, len(classes)
        ),
    )  # fmt: skip
    wanted = LabelSelection(labeled, _names(unlabeled), split_seed, cover_classes)
    test_pairs = files.held_out(str(test)) if test is not None else []
    pairs = _training_images(files, _names(train), wanted, {pair.image for pair in test_pairs})
    rest, val_pairs = hold_out(files, pairs, wanted, val, group_by, tested=bool(test_pairs))
    listed = bool(train) and is_path(val)  # select() reports images that are in both lists
    return select(files, form, pairs if listed else rest, val_pairs, test_pairs, wanted)


def _training_images(files: FileIndex, train: Sequence[str], wanted: LabelSelection, tested: set[str]) -> list[Pair]:
    """Return the training images, perhaps without those of the labeled and unlabeled lists."""
    if train:
        pairs = [pair for name in train for pair in files.part(name)]
        return pairs if any(pair.mask for pair in pairs) else files.with_masks(pairs, {})
    if is_path(wanted.labeled) and wanted.unlabeled:
        return []  # the two lists are the training set
    return [pair for pair in files.discover() if pair.image not in tested]


def _names(value: Names | None) -> tuple[str, ...]:
    # Hydra parses a folder named 2019 as a number.
    return () if value is None else (str(value),) if isinstance(value, str | int) else tuple(map(str, value))
