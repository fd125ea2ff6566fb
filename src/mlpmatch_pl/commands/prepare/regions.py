"""Regions as annotation tools store them, drawn into masks.

A pixel is in a polygon if its center is. Where a polygon crosses itself, the even-odd rule holds, so that a ring that
is connected to an outer one is a hole.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpmatch_pl.utils.errors import UserError

# pycocotools rounds corners to a fifth of a pixel, so polygons are drawn up to 9 times larger, with up to so many
# pixels, and sampled at the centers of pixels.
_FINE, _FINE_PIXELS = 9, 2**24
_DAMAGE = (TypeError, ValueError, LookupError, ArithmeticError, OSError, SyntaxError)
_FAR = 10  # points this many times the image's size away are not of this image
Bits = NDArray[np.bool_]


class Region(NamedTuple):
    """A region of one class.

    Attributes:
        label: Its class; None to ignore its pixels.
        kind: How it is stored, a key of `DRAW`.
        data: What is stored, see there.
    """

    label: str | None
    kind: str
    data: Any


def draw(region: Region, height: int, width: int) -> tuple[slice, slice, Bits]:
    """Draw a region of an image.

    Returns:
        Rows and columns of the image, and which of their pixels are in the region, (rows, columns).

    Raises:
        UserError: If the region does not fit to an image of this size.
    """
    try:
        return DRAW[region.kind](region.data, height, width)
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"it is damaged ({' '.join(str(error).split())})") from error


def draw_mask(
    regions: Sequence[Region], labels: dict[str | None, int], size: tuple[int, int], by_size: bool
) -> NDArray[np.uint8]:
    """Draw regions over each other.

    Args:
        regions: In the order of drawing.
        labels: The value of each class.
        size: Height and width.
        by_size: Whether to draw ignored regions first, then larger before smaller ones, instead.

    Returns:
        The mask, (H, W), 0 outside of all regions.

    Raises:
        UserError: If a region is wrong.
    """
    drawn = [(labels[region.label], *draw(region, *size)) for region in regions]
    if by_size:
        drawn.sort(key=lambda layer: (layer[0] != labels[None], -np.count_nonzero(layer[3])))
    mask = np.zeros(size, np.uint8)
    for value, rows, columns, inside in drawn:
        mask[rows, columns][inside] = value
    return mask


def _polygons(rings: Sequence[NDArray[np.float64]], height: int, width: int) -> tuple[slice, slice, Bits]:
    """Draw the union of polygons, each (points, 2) with x and y."""
    from pycocotools import mask as rle

    points = np.concatenate([*rings, np.empty((0, 2))])
    if not len(points):
        return slice(0, 0), slice(0, 0), np.zeros((0, 0), np.bool_)
    if not np.isfinite(points).all() or np.abs(points).max() > _FAR * max(height, width):
        raise UserError(f"it has a point far outside of the {width} x {height} pixels")
    left, top = np.floor(points.min(0)).clip(0, (width, height)).astype(int).tolist()
    right, bottom = np.ceil(points.max(0)).clip(0, (width, height)).astype(int).tolist()
    inside = np.zeros((max(bottom - top, 0), max(right - left, 0)), np.bool_)
    if inside.size:
        fine = max(min(_FINE, math.isqrt(_FINE_PIXELS // inside.size)) - 1 | 1, 1)  # odd: its center is a pixel's
        rows, columns = np.multiply(inside.shape, fine).tolist()
        for ring in rings:
            flat = ((ring - (left, top)) * fine).ravel().tolist()
            pixels = rle.decode(rle.frPyObjects([flat], rows, columns)[0])
            inside |= pixels[fine // 2 :: fine, fine // 2 :: fine].astype(np.bool_)
    return slice(top, top + inside.shape[0]), slice(left, left + inside.shape[1]), inside


def _relative(rings: Sequence[NDArray[np.float64]], height: int, width: int) -> tuple[slice, slice, Bits]:
    """Draw polygons in fractions of the image's size."""
    return _polygons([ring * (width, height) for ring in rings], height, width)


def _coco_runs(stored: dict[str, Any], height: int, width: int) -> tuple[slice, slice, Bits]:
    """Draw COCO's run lengths, compressed or not: by columns, beginning with those outside."""
    from pycocotools import mask as rle

    counts = stored["counts"]
    if list(stored["size"]) != [height, width]:
        raise UserError(f"its run lengths are for {stored['size'][1]} x {stored['size'][0]} pixels")
    if isinstance(counts, list):
        if min(counts, default=0) < 0 or sum(counts) != height * width:
            raise UserError(f"its run lengths sum up to {sum(counts)} instead of {width} x {height} pixels")
        stored = rle.frPyObjects(stored, height, width)
    pixels = rle.decode(stored)
    if pixels.sum(dtype=np.int64) != rle.area(stored):  # pycocotools leaves what damaged ones lack as it finds it
        raise UserError("its run lengths are damaged")
    return slice(0, height), slice(0, width), pixels.astype(np.bool_)


def _cvat_runs(stored: tuple[list[int], int, int, int, int], height: int, width: int) -> tuple[slice, slice, Bits]:
    """Draw CVAT's run lengths: by rows of a box (left, top, width, height), beginning with those outside."""
    counts, left, top, columns, rows = stored
    if min(counts, default=0) < 0 or sum(counts) != rows * columns:
        raise UserError(f"its run lengths sum up to {sum(counts)} instead of {columns} x {rows} pixels")
    inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(rows, columns)
    return _placed(inside, left, top, height, width)


def _png(stored: tuple[str, int, int], height: int, width: int) -> tuple[slice, slice, Bits]:
    """Draw labelme's mask: a PNG in base64, which is not 0 inside, and its left and top corner."""
    from PIL import Image

    content, left, top = stored
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        inside = np.asarray(image) != 0
    if inside.ndim != 2:
        raise UserError(f"its mask has the shape {inside.shape} instead of one channel")
    return _placed(inside, left, top, height, width)


def _placed(inside: Bits, left: int, top: int, height: int, width: int) -> tuple[slice, slice, Bits]:
    """Cut a mask off where it crosses the border of the image."""
    inside = inside[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
    left, top = max(left, 0), max(top, 0)
    return slice(top, top + inside.shape[0]), slice(left, left + inside.shape[1]), inside


def _brush(stored: Sequence[int], height: int, width: int) -> tuple[slice, slice, Bits]:
    """Draw Label Studio's brush: RGBA pixels packed by the JavaScript library rle-pack, inside where alpha is not 0.

    The only maintained decoder, in Label Studio's SDK, needs an older OpenCV.
    """
    data, position = bytes(stored), 0

    def read(bits: int) -> int:
        nonlocal position
        start, position = position, position + bits
        if position > 8 * len(data):
            raise UserError("its brush is damaged")
        word = int.from_bytes(data[start // 8 : (position + 7) // 8], "big") >> -position % 8
        return word & ((1 << bits) - 1)

    count, word_size = read(32), read(5) + 1
    if count != 4 * height * width:
        raise UserError(f"its brush has {count} values instead of 4 x {width} x {height}")
    length_bits = [read(4) + 1 for _ in range(4)]
    values = np.zeros(count, np.uint8)
    filled = 0
    while filled < count:
        is_run = read(1)
        end = filled + read(length_bits[read(2)]) + 1
        if is_run:
            values[filled:end] = read(word_size)
        else:
            values[filled:end] = [read(word_size) for _ in range(min(end, count) - filled)]
        filled = end
    return slice(0, height), slice(0, width), values.reshape(height, width, 4)[..., 3] != 0


DRAW: dict[str, Callable[[Any, int, int], tuple[slice, slice, Bits]]] = {
    "polygons": _polygons,
    "relative": _relative,
    "coco": _coco_runs,
    "cvat": _cvat_runs,
    "png": _png,
    "brush": _brush,
}
