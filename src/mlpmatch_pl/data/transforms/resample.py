"""A crop of a resized image, from the pixels that it needs: no whole image is resized to be cut up.

The crop equals PIL's ``resize(BILINEAR)`` and then ``crop`` within 2 levels for 8-bit images (smooth ones within 1),
antialiased when it shrinks; that of a mask equals PIL's ``resize(NEAREST)`` exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch.nn import functional as F

from mlpmatch_pl.data.base import Image, Mask

MISFIT = 1 / 256  # source pixels by which a crop may be shifted, see `Span.window`

# Workers times ranks times cores threads would be far too many; loading is parallel over workers.
cv2.setNumThreads(0)
cv2.ocl.setUseOpenCL(False)


@dataclass(frozen=True)
class Span:
    """A run of pixels on one axis of a resized image.

    Args:
        old: Length of the axis before it is resized.
        new: Length of the axis after it is resized.
        start: First pixel of the run, after resizing.
        length: Number of pixels of the run.

    Example:
        >>> Span(old=4, new=8, start=2, length=4).nearest().tolist()
        [1, 1, 2, 2]
    """

    old: int
    new: int
    start: int
    length: int

    @property
    def factor(self) -> float:
        """Source pixels a new pixel."""
        return self.old / self.new

    def nearest(self) -> NDArray[np.intp]:
        """Return the source pixel of each pixel of the run, as PIL's NEAREST takes it."""
        # PIL adds the factor again and again; a product would round differently and take other pixels.
        steps = np.full(self.start + self.length, self.factor)
        steps[0] *= 0.5
        return np.add.accumulate(steps)[self.start :].astype(np.intp)

    def window(self) -> tuple[slice, int]:
        """Return the source pixels to resize, and where the run starts in the result.

        Resizing starts at a whole source pixel, so the window begins with the nearest new pixel before the run
        (and the filter's reach) whose edge falls on one, at most MISFIT beside it. The first pixel always does.
        """
        reach = max(self.factor, 1.0)
        latest = int(self.start - reach / self.factor)
        if latest <= 0:
            first = 0
        else:
            candidates = np.arange(latest, -1, -1)
            edges = candidates * self.factor + 1e-9  # a whole number may come out just below itself
            first = int(candidates[np.argmax(edges - np.floor(edges) <= MISFIT)])
        begin = int(first * self.factor + 1e-9)
        end = min(int((self.start + self.length) * self.factor + reach) + 2, self.old)
        return slice(begin, end), self.start - first


def resample_image(image: Image, rows: Span, columns: Span) -> Image:
    """Return a crop of the resized image.

    Args:
        image: (H, W, C), uint8 or uint16; any number of channels, read-only or not.
        rows: The crop's rows, of ``image.shape[0]``.
        columns: The crop's columns, of ``image.shape[1]``.

    Returns:
        (rows.length, columns.length, C), of the same type; it may be a view of the image where nothing is resized.

    Example:
        >>> image = np.arange(12, dtype=np.uint8).reshape(3, 4, 1) * 10
        >>> resample_image(image, Span(3, 6, 0, 2), Span(4, 4, 1, 2))[..., 0].tolist()
        [[10, 20], [20, 30]]
    """
    (y, top), (x, left) = rows.window(), columns.window()
    part = image[y, x]
    if rows.old != rows.new or columns.old != columns.new:
        if _too_small(rows, y) or _too_small(columns, x):
            return _by_pil(part, rows, columns, y.start, x.start)
        shrinks = rows.factor > 1 or columns.factor > 1
        part = (_shrink if shrinks else _enlarge)(part, 1 / rows.factor, 1 / columns.factor)
    return part[top : top + rows.length, left : left + columns.length]


def resample_mask(mask: Mask, rows: Span, columns: Span) -> Mask:
    """Return a crop of the resized mask: no label that was not in it.

    Args:
        mask: (H, W), uint8.
        rows: The crop's rows, of ``mask.shape[0]``.
        columns: The crop's columns, of ``mask.shape[1]``.

    Returns:
        (rows.length, columns.length), uint8.

    Example:
        >>> resample_mask(np.array([[3, 7]], np.uint8), Span(1, 2, 0, 2), Span(2, 4, 1, 3)).tolist()
        [[3, 7, 7], [3, 7, 7]]
    """
    return mask.take(rows.nearest(), axis=0).take(columns.nearest(), axis=1)


def _too_small(span: Span, window: slice) -> bool:
    """Tell whether OpenCV or torch would get a window wrong.

    Both only copy what is as long afterwards as before, whatever the factor; torch 2.14 repeats the first row of images
    that are, or become, one pixel wide.
    """
    length = window.stop - window.start
    return (span.old != span.new and abs(length / span.factor - length) <= 1) or 1 in (span.old, span.new)


def _by_pil(part: Image, rows: Span, columns: Span, top: int, left: int) -> Image:
    """Resize the source pixels from row top and column left on, a channel at a time: slower, for `_too_small` ones."""
    # The ends may come out just outside by rounding.
    box = (
        max(columns.start * columns.factor - left, 0.0),
        max(rows.start * rows.factor - top, 0.0),
        min((columns.start + columns.length) * columns.factor - left, part.shape[1]),
        min((rows.start + rows.length) * rows.factor - top, part.shape[0]),
    )
    size = (columns.length, rows.length)
    planes = part if part.dtype == np.uint8 else part.astype(np.float32)
    resized = [
        np.asarray(PILImage.fromarray(planes[..., c]).resize(size, PILImage.Resampling.BILINEAR, box))
        for c in range(part.shape[2])
    ]
    result = np.stack(resized, axis=2)
    return result if part.dtype == np.uint8 else np.rint(result).astype(part.dtype)


def _enlarge(part: Image, y_scale: float, x_scale: float) -> Image:
    large: NDArray[Any] = cv2.resize(part, None, fx=x_scale, fy=y_scale, interpolation=cv2.INTER_LINEAR)
    return large.reshape(*large.shape[:2], part.shape[2])  # OpenCV drops a single channel


def _shrink(part: Image, y_scale: float, x_scale: float) -> Image:
    # cv2 does not antialias bilinear shrinking. A copy, because torch wants pixels that it could write to.
    pixels = part.copy() if part.dtype == np.uint8 else part.astype(np.float32)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    # Sizes are rounded down, so a scale must not come out just below.
    scale = (y_scale * (1 + 1e-9), x_scale * (1 + 1e-9))
    small = F.interpolate(planes, scale_factor=scale, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    return small if part.dtype == np.uint8 else np.rint(small).astype(part.dtype)
