"""Single photometric operations, as torchvision applies them to PIL images, on arrays and fast.

All take and return (H, W, C) of one type, uint8 or uint16, and leave their input alone. Brightness, contrast and
blur know any number of channels; saturation, hue and gray are for RGB.

8-bit brightness, contrast and saturation equal torchvision's within 1 level. Gray is within 1, too. Hue differs by
rounding in HSV: about 1 level on average, up to 12 for single saturated pixels. Blur is a true Gaussian where
PIL approximates one by boxes: under 1 level on average in photographs.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
from albucore import sz_lut  # albumentations' kernels, faster than cv2.LUT
from numpy.typing import NDArray

from mlpmatch_pl.data.base import Image

LUMA = np.array([0.299, 0.587, 0.114])  # weights of R, G and B in gray (ITU-R 601), as PIL's
BLUR_REACH = 2.5  # sigmas after which the Gaussian is cut off; PIL's boxes reach 2.4
_LEVELS = np.arange(256, dtype=np.float32)[:, None]


def adjust_brightness(image: Image, factor: float) -> Image:
    """Multiply by a factor of at least 0; 1 changes nothing.

    Example:
        >>> adjust_brightness(np.array([[[10, 100, 200]]], np.uint8), 1.5).tolist()
        [[[15, 150, 255]]]
    """
    return _blend(image, np.zeros(1), factor)


def adjust_contrast(image: Image, factor: float) -> Image:
    """Multiply the distance to the mean by a factor of at least 0; 1 changes nothing.

    The mean is that of the gray image for RGB, and each channel's own for any other number of channels.

    Example:
        >>> adjust_contrast(np.array([[[100], [200]]], np.uint8), 0.5).ravel().tolist()
        [125, 175]
    """
    rgb = image.shape[2] == 3
    mean = np.dot(cv2.mean(image)[:3], LUMA)[None] if rgb else image.mean(axis=(0, 1), dtype=np.float64)
    return _blend(image, np.floor(mean + 0.5), factor)


def adjust_saturation(image: Image, factor: float) -> Image:
    """Multiply the distance to gray by a factor of at least 0; 1 changes nothing, 0 is gray.

    Example:
        >>> adjust_saturation(np.array([[[100, 100, 200]]], np.uint8), 2.0).tolist()
        [[[88, 88, 255]]]
    """
    matrix = factor * np.eye(3) + (1 - factor) * LUMA
    # PIL rounds down; not by a whole half, which would change whole numbers, too.
    return _array(cv2.transform(image, np.column_stack([matrix, np.full(3, -0.499)])))


def adjust_hue(image: Image, shift: float) -> Image:
    """Turn the hue by a share of the color circle, from -0.5 to 0.5.

    Example:
        >>> adjust_hue(np.array([[[255, 0, 0]]], np.uint8), 1 / 3).tolist()
        [[[0, 255, 0]]]
    """
    if image.dtype == np.uint8:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
        rows = hsv.reshape(len(hsv), -1)
        # Steps of 1/255, rounded towards 0, as in torchvision; the sum wraps around at 256.
        rows += np.tile(np.array([int(shift * 255) % 256, 0, 0], np.uint8), image.shape[1])
        return _array(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL))
    top = np.float32(np.iinfo(image.dtype).max)
    hsv = cv2.cvtColor(image / top, cv2.COLOR_RGB2HSV)  # float: H in degrees
    hsv[..., 0] = (hsv[..., 0] + 360 * shift) % 360
    return _array(np.rint(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).clip(0, 1) * top).astype(image.dtype))


def to_gray(image: Image) -> Image:
    """Give all three channels the gray value.

    Example:
        >>> to_gray(np.array([[[255, 0, 0]]], np.uint8)).tolist()
        [[[76, 76, 76]]]
    """
    return _array(cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))


def gaussian_blur(image: Image, sigma: float) -> Image:
    """Blur by a Gaussian of sigma pixels; the image goes on beyond its border with the border's pixels.

    Example:
        >>> gaussian_blur(np.array([[[0], [100], [0]]], np.uint8), 0.5).ravel().tolist()
        [11, 79, 11]
    """
    length = 2 * math.ceil(BLUR_REACH * sigma) + 1
    blurred = cv2.GaussianBlur(image, (length, length), sigma, borderType=cv2.BORDER_REPLICATE)
    return _array(blurred.reshape(image.shape))  # OpenCV drops a single channel


def _blend(image: Image, base: NDArray[np.float64], factor: float) -> Image:
    """Move every value away from a base (one for all channels, or one for each): base + factor * (value - base)."""
    base32 = base.astype(np.float32)
    if image.dtype != np.uint8:
        top = np.iinfo(image.dtype).max
        moved = np.subtract(image, base32, dtype=np.float32)
        moved *= np.float32(factor)
        moved += base32
        return _array(moved.clip(0, top, out=moved).astype(image.dtype))
    # Rounded down, as in PIL.
    table = (base32 + np.float32(factor) * (_LEVELS - base32)).clip(0, 255).astype(np.uint8)
    if table.shape[1] == 1:
        return _array(sz_lut(image, np.ascontiguousarray(table[:, 0]), inplace=False))
    return _array(cv2.LUT(image, table[None]).reshape(image.shape))


def _array(pixels: Any) -> Image:  # OpenCV's and albucore's hints are too wide
    image: Image = pixels
    return image
