"""Decoding image files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from mlpmatch_pl.utils.errors import UserError

try:
    import pyspng
except ImportError:  # it has no wheels for some platforms
    pyspng = None

RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH
# As Pillow has it, which reads the masks: about 13,000 x 13,000. A few kilobytes can claim any size, and unpack to it.
MOST_PIXELS = 2 * (PILImage.MAX_IMAGE_PIXELS or 2**26)
_PNG = b"\x89PNG\r\n\x1a\n"


def decode(path: str | Path, flags: int) -> NDArray[Any]:
    """Decode a file with OpenCV, or faster where it is an RGB PNG.

    Args:
        path: The file.
        flags: OpenCV's flags of `imdecode`.

    Returns:
        (H, W), or (H, W, channels) in the order RGB or RGBA.

    Raises:
        UserError: If the file cannot be read, or is too large.
    """
    try:  # cv2.imread cannot open every unicode path
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"cannot read the image {path} ({error.strerror}); replace or remove it") from error
    _refuse_bomb(content, path)
    if flags == RGB and (quick := _rgb_png(content)) is not None:
        return quick
    pixels = _decode_quietly(content, flags)
    if pixels is None:
        raise UserError(f"cannot read the image {path}: it is broken or no image; replace or remove it")
    is_rgb = flags != cv2.IMREAD_UNCHANGED and flags & cv2.IMREAD_COLOR_RGB
    if pixels.ndim == 3 and not is_rgb:
        pixels = cv2.cvtColor(pixels, {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGBA}[pixels.shape[2]])
    return pixels


def _decode_quietly(content: NDArray[np.uint8], flags: int) -> NDArray[Any] | None:
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what is wrong is said by `decode`
    try:
        pixels: NDArray[Any] | None = cv2.imdecode(content, flags) if len(content) else None
    except cv2.error:  # as for a size beyond all limits
        return None
    finally:
        cv2.utils.logging.setLogLevel(level)
    return pixels


def refuse_large(pixels: int, path: str | Path) -> None:
    """Refuse an image by what its header says, before memory is taken for it.

    Raises:
        UserError: If it has more pixels than `MOST_PIXELS`.
    """
    if pixels > MOST_PIXELS:
        raise UserError(f"expected an image of at most {MOST_PIXELS:,} pixels, but {path} has more; cut it into tiles")


def _refuse_bomb(content: NDArray[np.uint8], path: str | Path) -> None:
    try:
        with PILImage.open(io.BytesIO(content.data)) as file:  # the header only, 0.03 ms
            refuse_large(file.width * file.height, path)
    except PILImage.DecompressionBombError:
        refuse_large(MOST_PIXELS + 1, path)
    except (OSError, SyntaxError, ValueError):  # no image, or of a format that Pillow does not know: OpenCV decides
        return


def _rgb_png(content: NDArray[np.uint8]) -> NDArray[Any] | None:
    """Decode a PNG file of 8-bit RGB; None if it is no such file, or needs OpenCV's care."""
    if pyspng is None:
        return None
    head = content[:26].tobytes()
    if head[:8] != _PNG or head[24:] != b"\x08\x02":  # bits a channel, and color type
        return None
    data = content.tobytes()
    if b"eXIf" in data:  # it may have to be turned
        return None
    try:
        pixels: NDArray[Any] = pyspng.load(data)
    except RuntimeError:  # broken: OpenCV decides
        return None
    return pixels if pixels.ndim == 3 and pixels.shape[2] == 3 else None
