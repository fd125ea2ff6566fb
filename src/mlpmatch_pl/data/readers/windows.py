"""Read windows of TIFF files without decoding the rest, and where GeoTIFF files lie on the map."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpmatch_pl.utils.errors import UserError

Array = NDArray[Any]
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)  # scale, tie points, transformation, and keys of GeoTIFF
_SEPARATE = 2  # planar configuration of TIFF


class Window(NamedTuple):
    """A part of an image.

    Attributes:
        rows: Its rows.
        columns: Its columns.
        size: Height and width of the whole image.
    """

    rows: slice
    columns: slice
    size: tuple[int, int]

    def require_size(self, found: tuple[int, int], path: str | Path) -> None:
        """Raise a `UserError` for a file of another size than the image."""
        if found != self.size:
            (height, width), (own_height, own_width) = self.size, found
            raise UserError(
                f"expected image and mask of the same size, but the image is {width} x {height} and {path} "
                f"{own_width} x {own_height} pixels"
            )


class TiffFacts(NamedTuple):
    """What the head of a TIFF file says.

    Attributes:
        size: Height and width.
        geo_tags: The tags of a GeoTIFF that place it on the map, as arguments of tifffile: code, type, count, value,
            and whether to write it once.
    """

    size: tuple[int, int]
    geo_tags: tuple[tuple[int, int, int, Any, bool], ...]


def tiff_facts(path: str | Path) -> TiffFacts | None:
    """Return the facts about a TIFF file; None for other files and those that cannot be read."""
    if os.path.splitext(path)[1].lower() not in (".tif", ".tiff"):
        return None
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page: Any = file.pages[0]
            tags = [page.tags[code] for code in GEO_TAGS if code in page.tags]
            geo_tags = tuple((tag.code, int(tag.dtype), tag.count, tag.value, True) for tag in tags)
            return TiffFacts((page.imagelength, page.imagewidth), geo_tags)
    except Exception:  # reading the pixels gives the message
        return None


def read_window(file: Any, window: Window, path: str | Path, max_pixels: int) -> Array:
    """Read a window of the first series of an open TIFF file, with the axes of the series.

    Args:
        file: A `tifffile.TiffFile`.
        window: The window.
        path: The file's path, for messages.
        max_pixels: Largest tile or strip to decode.

    Raises:
        UserError: If the file has another size than the image, or too large strips.
    """
    series = file.series[0]
    window.require_size((series.keyframe.imagelength, series.keyframe.imagewidth), path)
    if series.dataoffset is not None:  # uncompressed, in one piece
        stored = file.filehandle.memmap_array(file.byteorder + series.dtype.char, series.shape, series.dataoffset)
        index = tuple({"Y": window.rows, "X": window.columns}.get(axis, slice(None)) for axis in series.axes)
        return np.array(stored[index], series.dtype)
    pages = [_read_page(page, window, path, max_pixels) for page in series.pages]
    leading = series.shape[: len(series.shape) - pages[0].ndim]
    return np.stack(pages).reshape(*leading, *pages[0].shape)


def _read_page(page: Any, window: Window, path: str | Path, max_pixels: int) -> Array:
    """Decode the tiles or strips that a window touches."""
    key, (rows, columns, (height, width)) = page.keyframe, window
    tile_height, tile_width = (
        (key.tilelength, key.tilewidth) if key.is_tiled else (min(key.rowsperstrip, height), width)
    )
    if tile_height * tile_width > max_pixels:
        raise UserError(
            f"expected a TIFF file with tiles or small strips to read windows from, but {path} has one strip of "
            f"{width} x {tile_height} pixels; save it with tiles"
        )
    down, across = math.ceil(height / tile_height), math.ceil(width / tile_width)
    planes = key.samplesperpixel if key.planarconfig == _SEPARATE else 1
    shape = (planes, rows.stop - rows.start, columns.stop - columns.start, key.samplesperpixel // planes)
    pixels = np.full(shape, key.nodata, key.dtype)
    for plane in range(planes):
        for row in range(rows.start // tile_height, math.ceil(rows.stop / tile_height)):
            for column in range(columns.start // tile_width, math.ceil(columns.stop / tile_width)):
                index = (plane * down + row) * across + column
                file = page.parent.filehandle
                file.seek(page.dataoffsets[index])
                data = file.read(page.databytecounts[index])
                tile, (_, _, top, left, _), _ = key.decode(
                    data or None, index, jpegtables=page.jpegtables, jpegheader=key.jpegheader
                )
                if tile is not None:  # GDAL leaves out empty tiles
                    _paste(pixels[plane], tile[0], top - rows.start, left - columns.start)
    return pixels.reshape([{"Y": shape[1], "X": shape[2]}.get(axis, key.samplesperpixel) for axis in key.axes])


def _paste(pixels_HWC: Array, tile_HWC: Array, top: int, left: int) -> None:
    """Copy the part of a tile that lies within the pixels; ``top`` and ``left`` may be negative."""
    (height, width), (tile_height, tile_width) = pixels_HWC.shape[:2], tile_HWC.shape[:2]
    rows = slice(max(top, 0), min(top + tile_height, height))
    columns = slice(max(left, 0), min(left + tile_width, width))
    pixels_HWC[rows, columns] = tile_HWC[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
