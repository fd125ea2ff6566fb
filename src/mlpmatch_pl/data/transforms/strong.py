"""Strong views: color jitter, gray and blur on top of the weak view.

Every draw comes from a generator made for the sample, never from a global one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlpmatch_pl.data.base import Image
from mlpmatch_pl.data.transforms import photometric
from mlpmatch_pl.utils.errors import UserError

# The jitter's four, each with the amount that changes nothing; the last two are for RGB.
_OPERATIONS: tuple[tuple[Callable[[Image, float], Image], float], ...] = (
    (photometric.adjust_brightness, 1.0),
    (photometric.adjust_contrast, 1.0),
    (photometric.adjust_saturation, 1.0),
    (photometric.adjust_hue, 0.0),
)


class StrongView:
    """Color jitter, gray and blur.

    Images that are not RGB have no saturation, hue or gray: the jitter is then of brightness and contrast.

    Args:
        jitter: Strengths of brightness, contrast, saturation and hue: factors are drawn from U(1 - s, 1 + s), the hue's
            shift from U(-s, s) of the color circle. The four come in random order.
        jitter_p: Probability of the jitter.
        gray_p: Probability of gray.
        blur_sigma: Smallest and largest sigma of the Gaussian blur, in pixels.
        blur_p: Probability of the blur.
        extra: Pixel transforms of albumentations to apply afterwards, in order, as ``{"name": "RandomGamma"}`` with
            the transform's own arguments, see `mlpmatch_pl.data.transforms.extra.ExtraTransforms`.

    Raises:
        UserError: If a value is out of range, or albumentations has no such transform or argument.

    Example:
        >>> import numpy as np
        >>> strong, view = StrongView(jitter_p=1.0), np.full((40, 40, 3), 128, np.uint8)
        >>> bool((strong(view, random.Random(7)) == strong(view, random.Random(7))).all())
        True
    """

    def __init__(
        self,
        jitter: Sequence[float] = (0.5, 0.5, 0.5, 0.25),
        jitter_p: float = 0.8,
        gray_p: float = 0.2,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        blur_p: float = 0.5,
        extra: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        _check_jitter(jitter)
        probabilities = (jitter_p, gray_p, blur_p)
        if min(probabilities) < 0 or max(probabilities) > 1 or not 0 < blur_sigma[0] <= blur_sigma[1] <= 100:
            raise UserError(
                "expected loader.strong's probabilities from 0 to 1 and blur_sigma as 0 < low <= high <= 100, but got "
                f"jitter_p={jitter_p}, gray_p={gray_p}, blur_p={blur_p}, blur_sigma={list(blur_sigma)}"
            )
        self.jitter, self.jitter_p, self.gray_p = tuple(jitter), jitter_p, gray_p
        self.blur_sigma, self.blur_p = (blur_sigma[0], blur_sigma[1]), blur_p
        self._extra: Callable[[Image, random.Random], Image] | None = None
        if extra:
            from mlpmatch_pl.data.transforms.extra import (
                ExtraTransforms,  # albumentations takes half a second to import
            )

            self._extra = ExtraTransforms(extra)

    def __call__(self, view: Image, rng: random.Random) -> Image:
        """Make a strong view of a weak one.

        Args:
            view: (H, W, C), uint8 or uint16; it is not changed and may be read-only.
            rng: Generator of the sample; the result is a function of its state.

        Returns:
            (H, W, C) of the same type; the view itself if nothing was drawn.
        """
        rgb = view.shape[2] == 3
        if rng.random() < self.jitter_p:
            view = self._jittered(view, rng)
        if rng.random() < self.gray_p and rgb:
            view = photometric.to_gray(view)
        if rng.random() < self.blur_p:
            view = photometric.gaussian_blur(view, rng.uniform(*self.blur_sigma))
        return view if self._extra is None else self._extra(view, rng)

    def _jittered(self, view: Image, rng: random.Random) -> Image:
        operations = list(zip(_OPERATIONS, self.jitter, strict=True))[: 4 if view.shape[2] == 3 else 2]
        rng.shuffle(operations)
        for (operation, neutral), strength in operations:
            if strength:
                view = operation(view, rng.uniform(neutral - strength, neutral + strength))
        return view


def _check_jitter(jitter: Sequence[float]) -> None:
    if len(jitter) != 4 or min(jitter) < 0 or max(jitter[:3]) > 1 or jitter[3] > 0.5:
        raise UserError(
            "expected loader.strong.jitter as brightness, contrast and saturation from 0 to 1 and hue from 0 to "
            f"0.5, but got {list(jitter)}"
        )
