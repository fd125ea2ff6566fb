"""The views of a sample: weak and strong input perturbation. The only file that knows albumentations.

Weak: the long side scaled by U(0.5, 2), a random crop padded at the right and bottom, a flip. Strong: colour
jitter, grey and blur on top of the weak view. Every draw comes from a generator made for the sample, never from
a global one: albumentations' own seeding repeats itself over workers and epochs.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from mlpmatch_pl.data.sources import Image, Mask
from mlpmatch_pl.errors import UserError

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network for a newer version
import albumentations as A

# Workers times ranks times cores threads would be far too many; loading is parallel over workers.
cv2.setNumThreads(0)
cv2.ocl.setUseOpenCL(False)


@dataclass(frozen=True)
class WeakView:
    """Random scale, crop and flip, of an image and its mask alike.

    Args:
        crop_size: Height and width of the view in pixels, at least 33.
        scale: Smallest and largest factor of the long side.
        flip: Probability of a horizontal flip.
        ignore_index: Mask value of the padding.

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
        if self.crop_size < 33:
            raise UserError(f"expected loader.crop_size of at least 33 pixels, but got {self.crop_size}")
        if not 0 < self.scale[0] <= self.scale[1] or not 0 <= self.flip <= 1:
            raise UserError(
                f"expected loader.scale as 0 < low <= high and flip from 0 to 1, but got {self.scale} and {self.flip}"
            )

    def __call__(self, image: Image, mask: Mask | None, rng: random.Random) -> tuple[Image, Mask, NDArray[np.bool_]]:
        """Return the view, its mask (all zero without one) and where it is no padding."""
        height, width = image.shape[:2]
        long_side = max(height, width)
        target = rng.randint(max(int(long_side * self.scale[0]), 1), max(int(long_side * self.scale[1]), 1))
        new_height = max(int(height * target / long_side + 0.5), 1)
        new_width = max(int(width * target / long_side + 0.5), 1)
        crop_height, crop_width = min(new_height, self.crop_size), min(new_width, self.crop_size)
        y0, x0 = rng.randint(0, new_height - crop_height), rng.randint(0, new_width - crop_width)

        view = np.zeros((self.crop_size, self.crop_size, image.shape[2]), np.uint8)
        labels = np.full((self.crop_size, self.crop_size), self.ignore_index, np.uint8)
        valid = np.zeros((self.crop_size, self.crop_size), np.bool_)
        # Only the part of the image that survives the crop is resized.
        y_scale, x_scale = height / new_height, width / new_width
        box = (x0 * x_scale, y0 * y_scale, (x0 + crop_width) * x_scale, (y0 + crop_height) * y_scale)
        resized = PILImage.fromarray(image).resize((crop_width, crop_height), PILImage.Resampling.BILINEAR, box=box)
        view[:crop_height, :crop_width] = np.asarray(resized)
        valid[:crop_height, :crop_width] = True
        if mask is None:
            labels[valid] = 0
        else:  # nearest-exact takes the pixel that PIL takes; cv2's plain nearest is off by half a pixel
            whole = cv2.resize(mask, (new_width, new_height), interpolation=cv2.INTER_NEAREST_EXACT)
            labels[:crop_height, :crop_width] = whole[y0 : y0 + crop_height, x0 : x0 + crop_width]
        if rng.random() < self.flip:
            view, labels, valid = view[:, ::-1], labels[:, ::-1], valid[:, ::-1]
        return view, labels, valid


class StrongView:
    """Colour jitter, grey and blur.

    Args:
        jitter: Strengths of brightness, contrast, saturation and hue.
        jitter_p: Probability of the jitter.
        gray_p: Probability of grey.
        blur_sigma: Smallest and largest sigma of the Gaussian blur, in pixels.
        blur_p: Probability of the blur.

    Example:
        >>> strong = StrongView()
        >>> image = np.full((40, 40, 3), 128, np.uint8)
        >>> strong.reseed(7)
        >>> first, second = strong(image), strong(image)
        >>> strong.reseed(7)
        >>> bool((strong(image) == first).all())
        True
    """

    def __init__(
        self,
        jitter: Sequence[float] = (0.5, 0.5, 0.5, 0.25),
        jitter_p: float = 0.8,
        gray_p: float = 0.2,
        blur_sigma: Sequence[float] = (0.1, 2.0),
        blur_p: float = 0.5,
    ) -> None:
        if len(jitter) != 4 or min(jitter) < 0 or max(jitter[:3]) > 1 or jitter[3] > 0.5:
            raise UserError(
                "expected loader.strong.jitter as brightness, contrast and saturation from 0 to 1 and hue from 0 to "
                f"0.5, but got {list(jitter)}"
            )
        if (
            min(jitter_p, gray_p, blur_p) < 0
            or max(jitter_p, gray_p, blur_p) > 1
            or not 0 < blur_sigma[0] <= blur_sigma[1]
        ):
            raise UserError(
                "expected loader.strong's probabilities from 0 to 1 and blur_sigma as 0 < low <= high, but got "
                f"jitter_p={jitter_p}, gray_p={gray_p}, blur_p={blur_p}, blur_sigma={list(blur_sigma)}"
            )
        brightness, contrast, saturation, hue = jitter
        self._compose: Any = A.Compose(
            [
                A.ColorJitter(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue, p=jitter_p),
                A.ToGray(p=gray_p),
                A.GaussianBlur(sigma_limit=tuple(blur_sigma), blur_limit=0, p=blur_p),
            ]
        )

    def reseed(self, seed: int) -> None:
        """Make the following views a function of the seed; all transforms share one generator."""
        self._compose.set_random_state(np.random.default_rng(seed), random.Random(seed))

    def __call__(self, image: Image) -> Image:
        """Return a strong view of a weak one, uint8, (H, W, 3)."""
        view: Image = self._compose(image=image)["image"]
        return view
