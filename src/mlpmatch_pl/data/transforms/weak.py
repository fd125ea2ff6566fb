"""Weak views: random scale, random crop with padding at the right and bottom, random horizontal flip."""

from __future__ import annotations

import random
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from mlpmatch_pl.data.base import Image, Mask
from mlpmatch_pl.data.transforms.resample import Span, resample_image, resample_mask
from mlpmatch_pl.utils.errors import UserError

LARGEST_CROP = 8192  # larger crops fit into no memory


@dataclass(frozen=True)
class WeakView:
    """Scales, crops and flips an image and its mask at random.

    Args:
        crop_size: Height and width of the view in pixels, at least 33.
        scale: Smallest and largest factor of the long side, which is drawn uniformly in whole pixels.
        flip: Probability of a horizontal flip.
        ignore_index: Value of the mask in the padding.

    Raises:
        UserError: If a value is out of range.

    Example:
        >>> image, mask = np.full((40, 60, 3), 9, np.uint8), np.zeros((40, 60), np.uint8)
        >>> view, view_mask, valid = WeakView(50)(image, mask, random.Random(0))
        >>> view.shape, view_mask.shape, bool((view_mask[~valid] == 255).all())
        ((50, 50, 3), (50, 50), True)
    """

    crop_size: int
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    ignore_index: int = 255

    def __post_init__(self) -> None:
        if not 33 <= self.crop_size <= LARGEST_CROP:
            raise UserError(f"expected loader.crop_size from 33 to {LARGEST_CROP} pixels, but got {self.crop_size}")
        if not 0 < self.scale[0] <= self.scale[1] or not 0 <= self.flip <= 1:
            raise UserError(
                f"expected loader.scale as 0 < low <= high and flip from 0 to 1, but got {self.scale} and {self.flip}"
            )

    def __call__(self, image: Image, mask: Mask | None, rng: random.Random) -> tuple[Image, Mask, NDArray[np.bool_]]:
        """Make a view.

        Args:
            image: (H, W, C), uint8 or uint16, at least one pixel; it is not changed and may be read-only.
            mask: (H, W), uint8, or None for an unlabeled image.
            rng: Generator of the sample; the view is a function of its state.

        Returns:
            The view, (S, S, C) of the image's type, 0 in the padding; its mask, (S, S) uint8, 0 for an unlabeled image
            and the ignore index in the padding; and the valid pixels, (S, S) bool, False in the padding. The view may
            share memory with the image.
        """
        rows, columns = self._draw(image.shape[0], image.shape[1], rng)
        flipped = rng.random() < self.flip
        size = self.crop_size
        # The padding is at the right before the flip, and at the left after it.
        left = size - columns.length if flipped else 0
        inside = (slice(rows.length), slice(left, left + columns.length))
        labels = np.full((size, size), self.ignore_index, np.uint8)
        valid = np.zeros((size, size), np.bool_)
        valid[inside] = True
        pixels = resample_image(image, rows, columns)
        labels[inside] = 0 if mask is None else _flip(resample_mask(mask, rows, columns), flipped)
        return self._padded(_flip(pixels, flipped), inside), labels, valid

    def _draw(self, height: int, width: int, rng: random.Random) -> tuple[Span, Span]:
        long_side = max(height, width)
        target = rng.randint(max(int(long_side * self.scale[0]), 1), max(int(long_side * self.scale[1]), 1))
        new_height = max(int(height * target / long_side + 0.5), 1)
        new_width = max(int(width * target / long_side + 0.5), 1)
        rows, columns = min(new_height, self.crop_size), min(new_width, self.crop_size)
        top, left = rng.randint(0, new_height - rows), rng.randint(0, new_width - columns)
        return Span(height, new_height, top, rows), Span(width, new_width, left, columns)

    def _padded(self, pixels: Image, inside: tuple[slice, slice]) -> Image:
        size = self.crop_size
        if pixels.shape[:2] == (size, size):
            return pixels
        view = np.zeros((size, size, pixels.shape[2]), pixels.dtype)
        view[inside] = pixels
        return view


def _flip(pixels: Image, flipped: bool) -> Image:
    return cv2.flip(pixels, 1).reshape(pixels.shape) if flipped else pixels
