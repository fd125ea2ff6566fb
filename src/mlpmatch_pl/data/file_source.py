"""Image and mask files as a source."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlpmatch_pl.data.image_reader import ImageReader, stamp
from mlpmatch_pl.data.mask_reader import MaskReader
from mlpmatch_pl.data.paths import PathTable
from mlpmatch_pl.data.sources import Image, Mask
from mlpmatch_pl.errors import UserError


class Pair(NamedTuple):
    """An image and its mask, if it has one, as paths relative to a root (or absolute, outside of it)."""

    image: str
    mask: str | None


class FileSource:
    """Pairs of files, see `mlpmatch_pl.data.sources.Source`.

    Args:
        root: Folder that the paths are relative to.
        pairs: The files.
        read_image: Reads an image.
        read_mask: Reads a mask.
    """

    def __init__(self, root: Path, pairs: Sequence[Pair], read_image: ImageReader, read_mask: MaskReader) -> None:
        self.root, self.read_image, self.read_mask = str(root), read_image, read_mask
        self._images = PathTable(pair.image for pair in pairs)
        self._masks = PathTable(pair.mask or "" for pair in pairs)

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """Return the image's path relative to the root."""
        return self._images[index]

    def pair(self, index: int) -> Pair:
        """Return the paths of an image and its mask."""
        return Pair(self._images[index], self._masks[index] or None)

    def has_mask(self, index: int) -> bool:
        """Tell whether an image has a mask."""
        return bool(self._masks[index])

    def listing(self, index: int) -> str:
        """Return the line that names an image, and its mask if it has one, in a list file."""
        image, mask = self.pair(index)
        return f"{image}\t{mask}" if mask else image

    def image(self, index: int) -> Image:
        """Read an image, (H, W, channels)."""
        return self.read_image(os.path.join(self.root, self._images[index]))

    def mask(self, index: int) -> Mask:
        """Read a mask, (H, W)."""
        return self.read_mask(self._mask_path(index))

    def stamp(self, index: int) -> str:
        """Return what changes when the image, its mask, or how they are read changes."""
        image = os.path.realpath(os.path.join(self.root, self._images[index]))
        parts = [image, stamp(image), self.read_image.describe()]
        if mask := self._masks[index]:
            parts += [mask, stamp(os.path.join(self.root, mask)), self.read_mask.describe()]
        return " ".join(parts)

    def _mask_path(self, index: int) -> str:
        if not (mask := self._masks[index]):
            raise UserError(f"expected a mask for the image {self.name(index)}, but it has none")
        return os.path.join(self.root, mask)
