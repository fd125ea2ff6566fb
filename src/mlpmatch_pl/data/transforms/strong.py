"""Strong views: pixel transforms of albumentations, chosen by name and arguments."""

from __future__ import annotations

import inspect
import logging
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from mlpmatch_pl.data.base import Image
from mlpmatch_pl.utils.errors import UserError, suggest

UNIMATCH: tuple[Mapping[str, Any], ...] = (  # as published; conf/loader/default.yaml shows it to users
    {"name": "ColorJitter", "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.25, "p": 0.8},
    {"name": "ToGray", "p": 0.2},
    {"name": "GaussianBlur", "sigma_limit": [0.1, 2.0], "p": 0.5},
)

log = logging.getLogger(__name__)


class StrongView:
    """Applies pixel transforms of albumentations in order, with draws that depend on the sample's generator alone.

    8-bit images are transformed as they are, 16-bit images as float32 in [0, 1]. Transforms that albumentations does
    not define for the number of channels or the bit depth, such as ``ToGray`` for 4 channels, are left out, and a note
    that names them is logged.

    The default is the recipe of UniMatch (Yang et al., CVPR 2023), which jitters colors with torchvision and blurs with
    PIL. Colors differ from theirs by rounding. A blur with sigma below 0.45 is weaker than PIL's, and has no effect
    below 0.29, because the kernel consists of samples of the Gaussian.

    Args:
        transforms: Mappings of ``name`` and the arguments of that transform, for example
            ``{"name": "RandomGamma", "gamma_limit": [60, 140], "p": 0.3}``. Spatial transforms are refused, because
            pseudo-labels of the weak view must fit the strong view pixel by pixel.
        in_chans: Channels of an image.
        bit_depth: Bits per channel, 8 or 16.

    Raises:
        UserError: If albumentations has no such pixel transform or argument, refuses a value, or the transform changes
            the shape or type of an image or needs more than the image.

    Example:
        >>> strong = StrongView([{"name": "InvertImg", "p": 1.0}])
        >>> strong(np.full((4, 4, 3), 55, np.uint8), random.Random(0))[0, 0].tolist()
        [200, 200, 200]
    """

    def __init__(
        self, transforms: Sequence[Mapping[str, Any]] = UNIMATCH, in_chans: int = 3, bit_depth: int = 8
    ) -> None:
        rgb = np.random.default_rng(0).integers(0, 256, (33, 33, 3), np.uint8)
        image = np.resize(rgb, (33, 33, in_chans))
        self._transforms, left_out = [], []
        for options in transforms:
            transform = _build(options)
            fault = _fault(transform, image if bit_depth == 8 else image / np.float32(255))
            if fault is None:
                self._transforms.append(transform)
            elif _fault(transform, rgb) is None:
                left_out.append(str(options["name"]))
            else:
                raise _refusal(options, fault)
        if left_out:
            log.info(
                f"loader.strong leaves out {', '.join(left_out)}, which albumentations does not define for "
                f"in_chans={in_chans}, bit_depth={bit_depth}; RandomBrightnessContrast takes any number of channels"
            )

    def __call__(self, view: Image, rng: random.Random) -> Image:
        """Make a strong view of a weak one.

        Args:
            view: (H, W, C), uint8 or uint16; it is not changed and may be read-only.
            rng: Generator of the sample; a view takes a single draw from it, whatever the transforms.

        Returns:
            (H, W, C) of the same type; the view itself if no transform was drawn.
        """
        # albumentations' own seeding repeats draws over workers, epochs and transforms.
        seed = rng.getrandbits(63)
        generator, py_random = np.random.default_rng(seed), random.Random(seed)
        image: NDArray[Any] = view if view.dtype == np.uint8 else view / np.float32(65535)
        for transform in self._transforms:
            transform.set_random_state(generator, py_random)
            image = transform(image=image)["image"]
        return image if view.dtype == np.uint8 else np.rint(image.clip(0, 1) * 65535).astype(np.uint16)


def _build(options: Mapping[str, Any]) -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it queries a package index
    import albumentations as A  # takes half a second

    known = {
        key: value
        for key, value in vars(A).items()
        if inspect.isclass(value) and issubclass(value, A.ImageOnlyTransform)
    }
    name = str(options.get("name") if isinstance(options, Mapping) else options)
    if name not in known:
        raise UserError(
            "expected an albumentations transform of pixel values as name in loader.strong, as in "
            f"{{name: RandomGamma, p: 0.3}}, but got {name}.{suggest(name, known)}"
        )
    arguments = {key: value for key, value in options.items() if key != "name"}
    accepted = list(inspect.signature(known[name]).parameters)
    if unknown := sorted(map(str, arguments.keys() - set(accepted))):  # albumentations would only warn
        raise UserError(
            f"expected the arguments {', '.join(accepted)} for {name} in loader.strong, but got {unknown[0]}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # some wrong values would become defaults with a warning
            return known[name](**arguments)
    except Exception as error:  # a transform may raise anything
        raise _refusal(options, _reason(error)) from error


def _fault(transform: Any, image: NDArray[Any]) -> str | None:
    """Return why a transform cannot be applied to images of this kind, or None if it can."""
    transform.set_random_state(np.random.default_rng(0), random.Random(0))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as "The image is already gray", which would come for every sample
            result = transform(image=image, force_apply=True)["image"]
    except Exception as error:
        return _reason(error)
    if (result.shape, result.dtype) != (image.shape, image.dtype):
        return f"images of {image.shape} {image.dtype} become {result.shape} {result.dtype}"
    return None


def _reason(error: Exception) -> str:
    if isinstance(error.__cause__, ValidationError):  # of pydantic, several lines for each argument
        first = error.__cause__.errors()[0]
        return f"{first['loc'][0]}: {first['msg']}"
    return " ".join(str(error).split()) or type(error).__name__


def _refusal(options: Mapping[str, Any], fault: str) -> UserError:
    shown = ", ".join(f"{key}: {value}" for key, value in options.items())
    return UserError(f"expected a transform in loader.strong that applies to images, but {{{shown}}} fails: {fault}")
