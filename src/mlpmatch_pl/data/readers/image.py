"""Image files to arrays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from mlpmatch_pl.data.base import Image
from mlpmatch_pl.data.readers.decoding import RGB, decode
from mlpmatch_pl.data.readers.tiff import read_tiff
from mlpmatch_pl.utils.errors import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
DTYPES = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16)}
Array = NDArray[Any]


class ImageReader:
    """Reads image files of one kind.

    Args:
        in_chans: Channels of an image. 3 reads gray files as RGB, too, and leaves out an alpha channel; any other
            number must be that of the files, and more than 4 are read from TIFF files only.
        bit_depth: 8 or 16 bits a channel, as the files have.

    Raises:
        UserError: If an argument is out of range.

    Example:
        >>> ImageReader().describe()
        'in_chans=3 bit_depth=8'
    """

    def __init__(self, in_chans: int = 3, bit_depth: int = 8) -> None:
        if in_chans < 1 or bit_depth not in DTYPES:
            raise UserError(
                "expected dataset.in_chans of at least 1 and dataset.bit_depth of 8 or 16, but got "
                f"{in_chans} and {bit_depth}"
            )
        self.in_chans, self.bit_depth = in_chans, bit_depth

    def __call__(self, path: str | Path) -> Image:
        """Read an image: (H, W, in_chans), RGB order, uint8 or uint16.

        Files with one or three channels, and TIFF files, are turned as their orientation tag says.

        Raises:
            UserError: If the file cannot be read, or has other channels or another depth.
        """
        if _is_tiff(path):
            pixels = read_tiff(path, as_rgb=self.in_chans == 3)
        elif self.in_chans == 2:  # OpenCV reads gray with alpha as four channels
            pixels = _read_pillow(path)
        else:
            gray = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH
            pixels = decode(path, {1: gray, 3: RGB}.get(self.in_chans, cv2.IMREAD_UNCHANGED))
        image: Image = pixels[..., None] if pixels.ndim == 2 else pixels
        self._refuse_other(image, path)
        return image

    def describe(self) -> str:
        """Return the options as text: what the decoded images depend on beside the files."""
        return f"in_chans={self.in_chans} bit_depth={self.bit_depth}"

    def _refuse_other(self, image: Image, path: str | Path) -> None:
        """Refuse an image of another depth or with other channels."""
        if image.dtype != DTYPES[self.bit_depth]:
            known = [depth for depth, dtype in DTYPES.items() if dtype == image.dtype]
            advice = f"set dataset.bit_depth={known[0]}, or " if known else ""
            raise UserError(
                f"expected {DTYPES[self.bit_depth]} pixels (dataset.bit_depth={self.bit_depth}), but {path} has "
                f"{image.dtype}; {advice}convert it to whole numbers of {self.bit_depth} bits"
            )
        if image.shape[2] != self.in_chans:
            found = image.shape[2] if _is_tiff(path) else _bands(path) or image.shape[2]
            raise UserError(
                f"expected an image of {self.in_chans} channels, but {path} has {found}; set "
                f"dataset.in_chans={found}, or convert it"
            )


def _read_pillow(path: str | Path) -> Array:
    try:
        with PILImage.open(path) as file:
            return np.array(file)
    except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path} ({error}); replace or remove it") from error


def _is_tiff(path: str | Path) -> bool:
    return str(path).lower().endswith((".tif", ".tiff"))


def _bands(path: str | Path) -> int | None:
    """Return the number of channels as the file states it, if PIL knows the format."""
    try:
        with PILImage.open(path) as file:
            return len(file.getbands())
    except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError):
        return None


def stamp(path: str | Path) -> str:
    """Return what changes when a file changes: its size and time of change; ``none`` for a file that is not there."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return "none"
    return f"{status.st_size}:{status.st_mtime_ns}"
