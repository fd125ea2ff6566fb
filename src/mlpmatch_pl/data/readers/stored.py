"""Read the numbers that a mask file stores, not what a viewer shows."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from mlpmatch_pl.data.readers.image import (
    ALPHA,
    MAX_PIXELS,
    TURNS,
    channels_last,
    lacks_codec,
    pillow_pixels,
    require_max_pixels,
    require_upright,
)
from mlpmatch_pl.data.readers.windows import Window, read_window
from mlpmatch_pl.utils.errors import UserError

Array = NDArray[Any]

_PIL_ERRORS = (OSError, SyntaxError, ValueError, EOFError, zlib.error, PILImage.DecompressionBombError)
_MIN_IS_WHITE, _RGB, _PALETTE = 0, 2, 3  # photometric interpretations of TIFF
_LOSSY_TIFF = {6, 7, 33003, 33004, 33005, 34712, 34892, 50001, 50002}  # JPEG, JPEG 2000, WebP and JPEG XL in TIFF


@dataclass(frozen=True)
class StoredMask:
    """The content of a mask file.

    Attributes:
        pixels: (H, W), or (H, W, channels) without alpha.
        is_color: Whether the channels are red, green and blue.
        palette: Color of each id as (colors, 3) uint8, if the file has a palette.
        transparent: (H, W) bool, if the file has transparent pixels.
        lossy: Name of the compression if it changes values, or may do so.
    """

    pixels: Array
    is_color: bool = False
    palette: Array | None = None
    transparent: Array | None = None
    lossy: str = ""


def read_stored(path: str | Path, apply_orientation: bool = True, window: Window | None = None) -> StoredMask:
    """Read a mask file.

    Args:
        path: The file: TIFF, NPY, or a format that Pillow reads.
        apply_orientation: Whether the orientation tag is applied.
        window: The part to return; the rest of a TIFF file is not decoded.

    Raises:
        UserError: If it cannot be read.
    """
    suffix = str(path).lower().rpartition(".")[2]
    try:
        if suffix == "npy":
            pixels = np.lib.format.open_memmap(path, mode="r")
            require_max_pixels(pixels.size, path)
            return _cropped(StoredMask(_channels_of_npy(np.array(pixels))), window, path)
        if suffix in ("tif", "tiff"):
            return _read_tiff(path, apply_orientation, window)
        return _cropped(_read_pillow(path, apply_orientation), window, path)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"cannot read the mask {path}: it is damaged or not an image; replace or remove it") from error
    except _PIL_ERRORS as error:
        raise UserError(f"cannot read the mask {path} ({error}); replace or remove it") from error


def _channels_of_npy(pixels: Array) -> Array:
    """Move the channels to the end if they come first, and remove a single one; such files name no axes."""
    if pixels.ndim == 3 and pixels.shape[0] < min(pixels.shape[1:]):
        pixels = np.moveaxis(pixels, 0, -1)
    return pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels


def _cropped(stored: StoredMask, window: Window | None, path: str | Path) -> StoredMask:
    if window is None:
        return stored
    window.require_size(stored.pixels.shape[:2], path)
    transparent = None if stored.transparent is None else stored.transparent[window.rows, window.columns]
    return replace(stored, pixels=stored.pixels[window.rows, window.columns], transparent=transparent)


def read_palette(path: str | Path) -> bytes:
    """Return the colors of a palette file, three bytes each; none if it has no palette or cannot be read."""
    try:
        with PILImage.open(path) as file:
            if file.mode != "P" or file.palette is None or file.palette.mode != "RGB":
                return b""
            return bytes(file.getpalette() or ())
    except _PIL_ERRORS:
        return b""


def has_transparent_pixels(path: str | Path) -> bool:
    """Tell whether a mask file has transparent pixels; False if it cannot be read."""
    try:
        with PILImage.open(path) as file:
            if "A" not in file.getbands() and "transparency" not in file.info:
                return False
        transparent = read_stored(path).transparent
    except (UserError, *_PIL_ERRORS):
        return False
    return transparent is not None and bool(transparent.any())


def _read_pillow(path: str | Path, apply_orientation: bool) -> StoredMask:
    with PILImage.open(path) as file:
        lossy = _lossy(file, path)
        if (frames := getattr(file, "n_frames", 1)) > 1 and file.format != "MPO":
            raise UserError(f"expected a mask with one frame, but {path} has {frames}; save each frame as a file")
        rawmode = str(file.tile[0][3]) if file.tile else ""  # such as L;4 for 4 bits; it is gone after loading
        pixels = pillow_pixels(file, apply_orientation)
        if file.mode.startswith("RGB") and ";16" in rawmode:
            raise UserError(
                f"expected a mask with 8-bit colors, but {path} has 16 bits per channel; save class ids as a gray PNG"
            )
        return _from_pillow(file, pixels, rawmode, lossy)


def _from_pillow(file: PILImage.Image, pixels: Array, rawmode: str, lossy: str) -> StoredMask:
    transparency = file.info.get("transparency")
    if file.mode == "P":
        assert file.palette is not None  # its bytes are faster than getpalette(), which makes a list
        palette = np.frombuffer(bytes(file.palette.palette), np.uint8).reshape(-1, len(file.palette.mode))[:, :3]
        return StoredMask(pixels, False, palette, _transparent_ids(pixels, transparency), lossy)
    if pixels.ndim == 2:
        if ";" in rawmode and file.mode == "L" and file.format == "PNG":  # Pillow spreads 2 and 4 bits over 0..255
            pixels = pixels // np.uint8(255 // (2 ** int(rawmode[-1]) - 1))
        hidden = None
        if isinstance(transparency, int):  # Pillow's 255 is 1 in a file of 1 bit
            hidden = pixels == (transparency > 0 if pixels.dtype == np.bool_ else transparency)
        return StoredMask(pixels, transparent=hidden, lossy=lossy)
    transparent = None
    if file.mode in ("LA", "RGBA"):
        pixels, transparent = pixels[..., :-1], pixels[..., -1] == 0
    elif isinstance(transparency, tuple):
        transparent = (pixels == transparency).all(axis=2)
    pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    return StoredMask(pixels, file.mode in ("RGB", "RGBA"), None, transparent, lossy)


def _transparent_ids(pixels: Array, transparency: int | bytes | None) -> Array | None:
    if transparency is None:
        return None
    if isinstance(transparency, int):
        return np.equal(pixels, transparency)
    clear = np.zeros(256, np.bool_)
    clear[: len(transparency)] = np.frombuffer(transparency, np.uint8) == 0
    return clear[pixels] if clear.any() else None


def _lossy(file: PILImage.Image, path: str | Path) -> str:
    """Return the name of the file's compression if it changes values, or may do so."""
    if file.format in ("JPEG", "MPO"):
        return "JPEG"
    if file.format in ("AVIF", "HEIF"):
        return file.format
    if file.format == "WEBP":
        return "" if _is_lossless_webp(path) else "lossy WebP"
    if file.format == "JPEG2000":  # a reversible file may be cut off at a rate, which nothing in it says
        return "JPEG 2000, which may have changed them"
    return ""


def _is_lossless_webp(path: str | Path) -> bool:
    """Tell whether the first chunk with pixels is a lossless one; others may precede it, such as a color profile."""
    with open(path, "rb") as file:
        file.seek(12)
        while (head := file.read(8)) and head[:4] not in (b"VP8L", b"VP8 ", b"ANMF"):
            file.seek(int.from_bytes(head[4:], "little") + 1 & ~1, os.SEEK_CUR)  # padded to an even size
    return head[:4] == b"VP8L"


def _read_tiff(path: str | Path, apply_orientation: bool, window: Window | None) -> StoredMask:
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            page: Any = series.keyframe
            if window is None or page.compression in _LOSSY_TIFF:
                require_max_pixels(series.size, path)
            else:
                require_upright(page, apply_orientation, path)
            if page.compression in _LOSSY_TIFF:
                return StoredMask(_load_pillow(path, page, apply_orientation), lossy="JPEG or another lossy TIFF")
            turn = TURNS.get(page.tags[274].value if 274 in page.tags else 1) if apply_orientation else None
            try:
                pixels = series.asarray() if window is None else read_window(file, window, path, MAX_PIXELS)
                pixels = channels_last(pixels, series.axes, path)
            except Exception as error:
                if not lacks_codec(error) or window is not None:
                    raise
                pixels, turn = _load_pillow(path, page, apply_orientation), None
            colormap = page.colormap
            extra = set(page.extrasamples)
    except (UserError, *_PIL_ERRORS):
        raise
    except Exception as error:  # a damaged file makes tifffile raise nearly anything
        raise UserError(
            f"cannot read the mask {path} ({' '.join(str(error).split())}); replace or remove it"
        ) from error
    if turn:
        pixels = turn(pixels)
    transparent = None
    if ALPHA & extra and pixels.ndim == 3:
        pixels, transparent = pixels[..., :-1], pixels[..., -1] == 0
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    palette = None
    if page.photometric == _PALETTE and colormap is not None:
        palette = (np.asarray(colormap).T >> 8).astype(np.uint8)
    is_color = page.photometric == _RGB and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
    return StoredMask(np.ascontiguousarray(pixels), is_color, palette, transparent)


def _load_pillow(path: str | Path, page: Any, apply_orientation: bool) -> Array:
    """Read a file whose compression tifffile lacks, and undo the changes that Pillow makes for display."""
    try:
        with PILImage.open(path) as file:
            if (pages := getattr(file, "n_frames", 1)) > 1:
                raise UserError(f"expected a mask with one page, but {path} has {pages}; save one page")
            pixels, mode = pillow_pixels(file, apply_orientation), file.mode
    except UserError:
        raise
    except _PIL_ERRORS as error:
        raise UserError(
            f"cannot read the mask {path}, because its compression needs another package; pip install imagecodecs, or "
            "save it with deflate or without compression"
        ) from error
    if page.photometric == _MIN_IS_WHITE and pixels.dtype in (np.bool_, np.uint8):
        pixels = ~pixels
    if mode == "L" and page.bitspersample in (2, 4):
        pixels = pixels // np.uint8(255 // (2**page.bitspersample - 1))
    return pixels
