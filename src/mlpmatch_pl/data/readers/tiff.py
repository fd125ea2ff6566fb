"""TIFF files with any number of channels and 8 or 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mlpmatch_pl.data.readers.decoding import decode, refuse_large
from mlpmatch_pl.utils.errors import UserError

Array = NDArray[Any]
MOST_CHANNELS = 64  # of a very large image; smaller ones may have more
_INVERTED, _CONVERTED = 0, (3, 5, 6, 8)  # photometric tag: white is 0; palette, CMYK, YCbCr, CIE L*a*b*
_ALPHA = (1, 2)  # extra samples tag
_TURNS: dict[int, Callable[[Array], Array]] = {  # orientation tag
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


def read_tiff(path: str | Path, as_rgb: bool) -> Array:
    """Read a file whose channels are interleaved, planar or a page each.

    Args:
        path: The file.
        as_rgb: Whether gray is made RGB, and an alpha channel left out.

    Returns:
        (H, W) or (H, W, channels).

    Raises:
        UserError: If the file cannot be read.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            page: Any = series.keyframe
            if page.photometric in _CONVERTED:
                return decode(path, cv2.IMREAD_COLOR_RGB)
            refuse_large(max(page.imagewidth * page.imagelength, series.size // MOST_CHANNELS), path)
            pixels = _channels_last(series.asarray(), series.axes, path)
    except UserError:
        raise
    except Exception as error:  # a broken file makes the reader raise nearly anything
        return _without_codec(path, as_rgb, error)
    if page.photometric == _INVERTED and pixels.dtype.kind == "u":
        pixels = np.iinfo(pixels.dtype).max - pixels
    tags = page.tags
    if as_rgb:
        pixels = _as_rgb(pixels, alpha=bool(set(page.extrasamples) & set(_ALPHA)))
    turn = _TURNS.get(tags[274].value if 274 in tags else 1)
    return np.ascontiguousarray(turn(pixels) if turn else pixels)


def _channels_last(pixels: Array, axes: str, path: str | Path) -> Array:
    if pixels.ndim == 3 and "Y" in axes and "X" in axes:
        channel = next(axis for axis, name in enumerate(axes) if name not in "YX")
        pixels = np.moveaxis(pixels, channel, -1)
    if pixels.ndim not in (2, 3):
        raise UserError(
            f"expected an image with height, width and channels, but {path} has the axes {axes}; convert it"
        )
    return pixels


def _as_rgb(pixels: Array, alpha: bool) -> Array:
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if channels == 1 or (channels == 2 and alpha):
        return np.repeat(pixels.reshape(*pixels.shape[:2], channels)[..., :1], 3, axis=2)
    return pixels[..., :3] if channels == 4 and alpha else pixels


def _without_codec(path: str | Path, as_rgb: bool, error: Exception) -> Array:
    """Read with OpenCV what needs a codec that is not installed, as LZW does: gray and RGB; else explain."""
    if "imagecodecs" not in str(error):
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the image {path} ({reason}); replace or remove it") from error
    try:
        pixels = decode(path, cv2.IMREAD_UNCHANGED)
    except UserError:
        pixels = None
    if pixels is None or (pixels.ndim == 3 and pixels.shape[2] != 3):  # OpenCV multiplies colors by alpha
        raise UserError(
            f"cannot read the image {path}, whose compression needs another package; pip install imagecodecs, or save "
            "it with deflate or without compression"
        ) from error
    return _as_rgb(pixels, alpha=False) if as_rgb else pixels
