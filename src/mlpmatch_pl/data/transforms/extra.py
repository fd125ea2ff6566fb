"""Pixel transforms of albumentations, from a config. The only file that knows albumentations."""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import albumentations as A
import numpy as np

from mlpmatch_pl.data.base import Image
from mlpmatch_pl.utils.errors import UserError, suggest

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network for a newer version


class ExtraTransforms:
    """Applies pixel transforms of albumentations, in order, for 8-bit images.

    Args:
        transforms: Mappings of ``name`` and the arguments of that transform, for example
            ``{"name": "RandomGamma", "gamma_limit": [60, 140], "p": 0.3}``. Only transforms that keep every pixel's
            place are known, because masks and the weak view stay as they are.

    Raises:
        UserError: If albumentations has no such pixel transform or argument, or refuses a value.

    Example:
        >>> transforms = ExtraTransforms([{"name": "InvertImg", "p": 1.0}])
        >>> transforms(np.full((4, 4, 3), 55, np.uint8), random.Random(0))[0, 0].tolist()
        [200, 200, 200]
    """

    def __init__(self, transforms: Sequence[Mapping[str, Any]]) -> None:
        self._compose: Any = A.Compose([_transform(dict(options)) for options in transforms])

    def __call__(self, image: Image, rng: random.Random) -> Image:
        """Return the transformed image, of the same size and type.

        Raises:
            UserError: If the image is no 8-bit one, or a transform changes its size or type.
        """
        if image.dtype != np.uint8:
            raise UserError(
                f"expected 8-bit images for loader.strong.extra, but got {image.dtype}; set loader.strong.extra=[]"
            )
        # Its own seeding repeats itself over workers and epochs; all transforms share this generator.
        seed = rng.getrandbits(63)
        self._compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        result: Image = self._compose(image=image)["image"]
        if (result.shape, result.dtype) != (image.shape, image.dtype):
            raise UserError(
                f"expected loader.strong.extra to keep images of {image.shape} {image.dtype}, but they became "
                f"{result.shape} {result.dtype}; take the transform that changes them out"
            )
        return result


def _transform(options: dict[str, Any]) -> Any:
    name = options.pop("name", None)
    known = [key for key, value in vars(A).items() if _is_pixel_transform(value)]
    if name not in known:
        raise UserError(
            "expected a pixel transform of albumentations as name in loader.strong.extra, as in {name: RandomGamma}, "
            f"but got {name!r}.{suggest(str(name), known)}"
        )
    transform = getattr(A, name)
    arguments = [key for key in inspect.signature(transform.__init__).parameters if key != "self"]
    if unknown := sorted(set(options) - set(arguments)):  # albumentations would only warn
        raise UserError(
            f"expected the arguments {', '.join(arguments)} for {name} in loader.strong.extra, but got {unknown[0]}"
        )
    try:
        return transform(**options)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"expected arguments of loader.strong.extra that albumentations takes, but {name} refuses them: {reason}"
        ) from error


def _is_pixel_transform(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, A.ImageOnlyTransform) and value is not A.ImageOnlyTransform
