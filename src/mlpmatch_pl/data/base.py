"""Datasets as sources of named images with masks.

A source doesn't deal with splits, views or batches. Write one for data that `mlpmatch_pl.folder` cannot read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlpmatch_pl.data.splits import Split
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.palette import default_palette

Image = NDArray[np.uint8] | NDArray[np.uint16]
Mask = NDArray[np.uint8]
SWAPPED = (5, 6, 7, 8)  # orientation tags that swap height and width


class ImageSource(Protocol):
    """Named images, some of them with masks."""

    def __len__(self) -> int:
        """Return the number of images."""

    def name(self, index: int) -> str:
        """Return a stable name, used in split lists and messages."""

    def image(self, index: int) -> Image:
        """Return an image, uint8 or uint16, (H, W, channels); RGB if there are three."""

    def mask(self, index: int) -> Mask:
        """Return the mask, uint8, (H, W): 0..C-1 or the ignore index. Called for labeled and evaluation images only."""


@dataclass(frozen=True)
class SegmentationData:
    """A dataset with its split.

    Attributes:
        class_names: A name for each class, in the order of the mask values.
        train: Labeled and unlabeled training images.
        labeled: The training images whose masks are used.
        unlabeled: Indices into ``train`` of the images that are used without mask.
        val: Images for choosing a checkpoint.
        test: Images for the final evaluation, if different from ``val``.
        ignore_index: Mask value of pixels to ignore.
        palette: An RGB color for each class.
        in_chans: Channels of an image.
        bit_depth: Bits per channel, 8 or 16.
        image_options: Other options of the image reader, to read images for prediction in the same way.
        notes: Remarks for the user about the split, one sentence each.
    """

    class_names: tuple[str, ...]
    train: ImageSource
    labeled: Split
    unlabeled: tuple[int, ...]
    val: ImageSource
    test: ImageSource | None = None
    ignore_index: int = 255
    palette: tuple[tuple[int, int, int], ...] = ()
    in_chans: int = 3
    bit_depth: int = 8
    image_options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def labeled_indices(self) -> tuple[int, ...]:
        """Indices into ``train`` of the labeled images, in the order of the list."""
        index = {self.train.name(i): i for i in range(len(self.train))}
        return tuple(index[name] for name in self.labeled.names)

    @property
    def colors(self) -> tuple[tuple[int, int, int], ...]:
        """The palette, or default colors if there is none."""
        return self.palette or default_palette(len(self.class_names))


def class_list(classes: Sequence[str], ignore_index: int) -> tuple[str, ...]:
    """Validate class names.

    Raises:
        UserError: If there are fewer than two, a name occurs twice, or the ignore index is one of the classes.

    Example:
        >>> class_list(["road", "sky"], 255)
        ('road', 'sky')
    """
    if isinstance(classes, str):
        raise UserError(
            f"expected a list of class names, but got {classes!r}; write 'dataset.classes=[background,road]'"
        )
    names = tuple(str(name) for name in classes)
    if len(names) < 2:
        raise UserError(
            f"expected at least 2 class names, background included, but got {list(names)}; "
            "set dataset.classes, as in 'dataset.classes=[background,road]'"
        )
    if len(set(names)) < len(names):
        raise UserError(f"expected different class names, but got {list(names)}")
    if not len(names) <= ignore_index <= 255:
        raise UserError(
            f"expected an ignore value from {len(names)} (the number of classes) to 255, but got {ignore_index}"
        )
    return names


def require_classes(mask: Mask, name: str, num_classes: int, ignore_index: int) -> None:
    """Raise for a mask with values that are not classes.

    Raises:
        UserError: With the name of the image and the values.

    Example:
        >>> require_classes(np.full((2, 2), 9, np.uint8), "a.png", 7, 255)
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected mask values 0..6 or 255 (ignore), but the mask of a.png has 9; ...
    """
    wrong = (mask >= num_classes) & (mask != ignore_index)
    if wrong.any():
        values = np.unique(mask[wrong])[:5]
        shifted = values.tolist() == [num_classes] and mask.all() and wrong.mean() > 0.001  # not a stray pixel
        hint = " and no 0, as if all ids were shifted by one" if shifted else ""
        raise UserError(
            f"expected mask values 0..{num_classes - 1} or {ignore_index} (ignore), but the mask of {name} has "
            f"{', '.join(map(str, values))}{hint}; correct the mask, dataset.classes or "
            "dataset.ignore_index, or map the values by dataset.mask_values"
        )


def transparent_pixels(source: ImageSource, index: int) -> NDArray[np.bool_] | None:
    """Return an image's transparent pixels, (H, W); None if it has none or the source has no method ``transparent``."""
    tell = getattr(source, "transparent", None)
    return tell(index) if tell else None


@dataclass(frozen=True)
class FileFacts:
    """What the files of an image and its mask say about their pixels.

    Attributes:
        orientation: Orientation tag of the image if it is applied, 1 (upright) to 8.
        palette: Colors in the mask if the numbers are read as classes, three bytes each.
        transparent: Whether pixels are ignored because the image or the mask is transparent there.
    """

    orientation: int = 1
    palette: bytes = b""
    transparent: bool = False


def file_facts(source: ImageSource, index: int) -> FileFacts:
    """Return the facts about an image's files; the default for sources without a method ``file_facts(index)``."""
    tell = getattr(source, "file_facts", None)
    return tell(index) if tell else FileFacts()


def require_same_size(image: Image, mask: Mask, source: ImageSource, index: int) -> None:
    """Raise for a mask of another size than its image.

    Raises:
        UserError: With the name of the image, both sizes, and the orientation tag if that is the reason.
    """
    if image.shape[:2] == mask.shape:
        return
    name, tag = source.name(index), file_facts(source, index).orientation
    sizes = f"{image.shape[1]} x {image.shape[0]}", f"{mask.shape[1]} x {mask.shape[0]}"
    if tag in SWAPPED and image.shape[:2] == mask.shape[::-1]:
        raise UserError(
            f"expected image and mask of the same size, but the orientation tag {tag} turns {name} to {sizes[0]}, and "
            f"its mask is {sizes[1]} pixels; set dataset.orientation=ignore if masks were drawn on the stored pixels"
        )
    raise UserError(
        f"expected image and mask of the same size, but {name} is {sizes[0]} and its mask {sizes[1]} pixels"
    )


def has_mask(source: ImageSource, index: int) -> bool:
    """Tell whether an image has a mask; False for sources without a method ``has_mask(index)``."""
    tell = getattr(source, "has_mask", None)
    return bool(tell and tell(index))
