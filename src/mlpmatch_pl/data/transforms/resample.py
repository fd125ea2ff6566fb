"""Resizing and cropping in one step, which reads only the pixels that the crop needs.

For 8-bit images, the result equals that of PIL (``resize(BILINEAR)``, then ``crop``) within 2 levels, and smooth images
within 1; shrinking antialiases. For masks, it equals that of ``resize(NEAREST)``, then ``crop``, exactly.
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

# Loading is parallel over workers already; threads in each of them would compete for the cores.
cv2.setNumThreads(0)
cv2.ocl.setUseOpenCL(False)


@dataclass(frozen=True)
class Span:
    """A range of pixels on one axis of a resized image.

    Args:
        old: Length of the axis before resizing.
        new: Length of the axis after resizing.
        start: First pixel of the range, after resizing.
        length: Number of pixels in the range, after resizing.

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
        """Source pixels per resized pixel."""
        return self.old / self.new

    def nearest(self) -> NDArray[np.intp]:
        """Return the index of the source pixel that PIL's NEAREST takes for each pixel of the range."""
        # PIL accumulates the factor; a product would round differently and select other pixels.
        steps = np.full(self.start + self.length, self.factor)
        steps[0] *= 0.5
        return np.add.accumulate(steps)[self.start :].astype(np.intp)

    def window(self) -> tuple[slice, int]:
        """Return the source pixels to resize, and where the range starts in the result.

        Resizing can only start at the edge of a source pixel. The window therefore begins at the last resized pixel
        before the range and the filter's reach whose edge is at most MISFIT away from one; pixel 0 always is.
        """
        reach = max(self.factor, 1.0)
        latest = int(self.start - reach / self.factor)
        if latest <= 0:
            first = 0
        else:
            candidates = np.arange(latest, -1, -1)
            edges = candidates * self.factor + 1e-9  # rounding may leave an integer just below itself
            first = int(candidates[np.argmax(edges - np.floor(edges) <= MISFIT)])
        begin = int(first * self.factor + 1e-9)
        end = min(int((self.start + self.length) * self.factor + reach) + 2, self.old)
        return slice(begin, end), self.start - first


def resample_image(image: Image, rows: Span, columns: Span) -> Image:
    """Return a crop of the resized image.

    Args:
        image: (H, W, C), uint8 or uint16, any number of channels; it may be read-only.
        rows: Rows of the crop, with ``rows.old == H``.
        columns: Columns of the crop, with ``columns.old == W``.

    Returns:
        (rows.length, columns.length, C) of the same type; a view of the image if its size does not change.

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
    """Return a crop of the mask, resized by nearest neighbor.

    Args:
        mask: (H, W), uint8.
        rows: Rows of the crop, with ``rows.old == H``.
        columns: Columns of the crop, with ``columns.old == W``.

    Returns:
        (rows.length, columns.length), uint8.

    Example:
        >>> resample_mask(np.array([[3, 7]], np.uint8), Span(1, 2, 0, 2), Span(2, 4, 1, 3)).tolist()
        [[3, 7, 7], [3, 7, 7]]
    """
    return mask.take(rows.nearest(), axis=0).take(columns.nearest(), axis=1)


def _too_small(span: Span, window: slice) -> bool:
    """Tell whether OpenCV or torch would resize a window incorrectly.

    Both copy a window whose length in pixels stays the same, regardless of the factor; torch 2.14 repeats the first row
    of images that are one pixel wide before or after.
    """
    length = window.stop - window.start
    return (span.old != span.new and abs(length / span.factor - length) <= 1) or 1 in (span.old, span.new)


def _by_pil(part: Image, rows: Span, columns: Span, top: int, left: int) -> Image:
    """Resize a part that starts at (top, left), one channel at a time; slower, for `_too_small` windows."""
    # Rounding may put the ends just outside.
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
    # OpenCV does not antialias. Copied, because torch warns about read-only arrays.
    pixels = part.copy() if part.dtype == np.uint8 else part.astype(np.float32)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    # torch rounds sizes down, so the scale must not be just below the exact one.
    scale = (y_scale * (1 + 1e-9), x_scale * (1 + 1e-9))
    small = F.interpolate(planes, scale_factor=scale, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    return small if part.dtype == np.uint8 else np.rint(small).astype(part.dtype)
