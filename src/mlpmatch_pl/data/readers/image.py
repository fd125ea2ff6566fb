"""Read image files as arrays."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from mlpmatch_pl.data.base import Image
from mlpmatch_pl.data.readers.windows import Window, read_window
from mlpmatch_pl.utils.errors import UserError, require_choice

try:
    import pyspng
except ImportError:  # it has no wheels for some platforms
    pyspng = None

HEIF_SUFFIXES = frozenset({".heic", ".heif"})
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}) | (
    HEIF_SUFFIXES if find_spec("pillow_heif") else frozenset()
)
MASK_SUFFIXES = IMAGE_SUFFIXES | {".npy"}
ORIENTATIONS = ("apply", "ignore")
DTYPES = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16)}
# Pillow's own limit, about 13,000 x 13,000: a file of a few kilobytes can unpack to any size.
MAX_PIXELS = 2 * (PILImage.MAX_IMAGE_PIXELS or 2**26)
_MAX_BAND = 1 << 16
MAX_LARGE_CHANNELS = 64  # of a TIFF file with MAX_PIXELS; smaller ones may have more
Array = NDArray[Any]

_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH
_PIL_ERRORS = (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError)
# Values of TIFF tags
_MIN_IS_WHITE, _CONVERTED = 0, (3, 5, 6, 8)  # photometric; _CONVERTED: palette, CMYK, YCbCr, CIE L*a*b*
ALPHA = {1, 2}  # extra samples
_NEEDS_CODEC = (
    "its compression needs another package: pip install imagecodecs, or save it with deflate or without compression"
)
_UNNAMED = "QIZT"  # axes of tifffile for pages, or for a dimension without a name
TURNS: dict[int, Callable[[Array], Array]] = {  # orientation
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


class ImageReader:
    """Reads image files with a given number of channels and bit depth.

    Args:
        in_chans: Channels of an image. With 3, gray files are read as RGB and an alpha channel is dropped. Any other
            number must be that of the files, and more than 4 channels are read from TIFF files only.
        bit_depth: Bits per channel of the files, 8 or 16.
        orientation: Whether to ``apply`` or ``ignore`` the orientation tag of a file.
        bands: Numbers of the channels to read, counted from 1, in this order. Default: all.
        channel_axis: Whether the ``first`` or ``last`` of three axes is that of the channels in TIFF files that don't
            say it. ``auto`` takes pages as channels, and refuses files that look otherwise.

    Raises:
        UserError: If an argument is out of range.

    Example:
        >>> ImageReader().describe()
        'in_chans=3 bit_depth=8 {}'
    """

    def __init__(
        self,
        in_chans: int = 3,
        bit_depth: int = 8,
        orientation: str = "apply",
        bands: Sequence[int] | None = None,
        channel_axis: str = "auto",
    ) -> None:
        if in_chans < 1 or bit_depth not in DTYPES:
            raise UserError(
                "expected dataset.in_chans of at least 1 and dataset.bit_depth of 8 or 16, but got "
                f"{in_chans} and {bit_depth}"
            )
        if bands is not None and (
            isinstance(bands, str)
            or len(bands) != in_chans
            or not all(isinstance(band, int) and 0 < band <= _MAX_BAND for band in bands)
        ):
            raise UserError(
                f"expected dataset.bands as {in_chans} numbers from 1 (dataset.in_chans={in_chans}), as in "
                f"{list(range(1, in_chans + 1))}, but got {bands}"
            )
        self.in_chans, self.bit_depth, self.bands = in_chans, bit_depth, tuple(bands or ())
        self.orientation = require_choice("dataset.orientation", orientation, ORIENTATIONS)
        self.channel_axis = require_choice("dataset.channel_axis", channel_axis, ("auto", "first", "last"))

    def __call__(self, path: str | Path, window: Window | None = None) -> Image:
        """Read an image: (H, W, in_chans), uint8 or uint16, RGB if there are three channels.

        Args:
            path: The file.
            window: The part of a TIFF file to read, without decoding the rest.

        Raises:
            UserError: If the file cannot be read, or has another number of channels or bit depth.
        """
        pixels = self._read(path, window)
        if self.bands:
            pixels = self._select(pixels, path)
        image: Image = pixels[..., None] if pixels.ndim == 2 else pixels
        self._require_format(image, path)
        return image

    @property
    def options(self) -> dict[str, Any]:
        """The options other than channels and bit depth that are not the default, as plain data."""
        values = {"orientation": self.orientation, "bands": list(self.bands), "channel_axis": self.channel_axis}
        return {key: value for key, value in values.items() if value not in ("apply", [], "auto")}

    def _read(self, path: str | Path, window: Window | None) -> Array:
        turned = self.orientation == "apply"
        suffix = os.path.splitext(path)[1].lower()
        if suffix in (".tif", ".tiff"):
            expected = 0 if self.bands else self.in_chans
            pixels = _read_tiff(path, expected, turned, self.channel_axis, window)
        elif suffix == ".gif" or suffix in HEIF_SUFFIXES:
            pixels = _read_pillow(path, turned, as_rgb=True)
        elif self.in_chans == 2 and not self.bands:  # OpenCV reads gray with alpha as four channels
            pixels = _read_pillow(path, turned)
        elif self.in_chans in (1, 3) and not self.bands:
            flags = _RGB if self.in_chans == 3 else cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH
            pixels = _read_opencv(path, flags if turned else flags | cv2.IMREAD_IGNORE_ORIENTATION)
        else:  # OpenCV does not turn such images
            pixels = _read_opencv(path, cv2.IMREAD_UNCHANGED)
            if turned and (turn := TURNS.get(read_orientation(path))):
                pixels = np.ascontiguousarray(turn(pixels))
        if self.in_chans == 1 and pixels.ndim == 3 and _is_gray_palette(pixels, path):
            pixels = np.ascontiguousarray(pixels[..., 0])
        return pixels

    def _select(self, pixels: Array, path: str | Path) -> Array:
        """Take the configured bands."""
        channels = 1 if pixels.ndim == 2 else pixels.shape[2]
        if max(self.bands) > channels:
            raise UserError(f"expected the bands {list(self.bands)} of dataset.bands, but {path} has {channels}")
        indices = [band - 1 for band in self.bands]
        return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], channels)[..., indices])

    def transparent(self, path: str | Path, window: Window | None = None) -> NDArray[np.bool_] | None:
        """Return the wholly transparent pixels of a file whose alpha channel is dropped, (H, W); None if it has none.

        Files without an alpha channel are told by what precedes their pixels.
        """
        suffix = os.path.splitext(path)[1].lower()
        if self.in_chans != 3 or self.bands or suffix in (".jpg", ".jpeg", ".bmp", ".jp2"):
            return None
        try:
            if window is not None:
                return _transparent_window(path, window)
            return _transparent(path, self.orientation == "apply")
        except Exception:  # reading the image gives the message
            return None

    def describe(self) -> str:
        """Return the options as a string: what decoded images depend on beside the file."""
        return f"in_chans={self.in_chans} bit_depth={self.bit_depth} {self.options}"

    def _require_format(self, image: Image, path: str | Path) -> None:
        if image.dtype != DTYPES[self.bit_depth]:
            known = [depth for depth, dtype in DTYPES.items() if dtype == image.dtype]
            advice = f"set dataset.bit_depth={known[0]}, or " if known else ""
            raise UserError(
                f"expected {DTYPES[self.bit_depth]} pixels (dataset.bit_depth={self.bit_depth}), but {path} has "
                f"{image.dtype}; {advice}convert it to {self.bit_depth}-bit integers"
            )
        if image.shape[2] != self.in_chans:
            found = _count_channels(path) or image.shape[2]
            example = str(list(range(1, self.in_chans + 1))).replace(" ", "")
            choice = f"choose bands, as in 'dataset.bands={example}', " if found > self.in_chans else ""
            raise UserError(
                f"expected an image of {_number(self.in_chans)}, but {path} has {found}; set "
                f"dataset.in_chans={found}, {choice}or convert it"
            )


def _transparent(path: str | Path, turned: bool) -> NDArray[np.bool_] | None:
    with PILImage.open(path) as file:
        if "A" not in file.getbands() and "transparency" not in file.info:
            return None
        alpha = pillow_pixels(file, turned, mode="RGBA")[..., 3]
    hidden = alpha == 0
    return hidden if hidden.any() else None


def _transparent_window(path: str | Path, window: Window) -> NDArray[np.bool_] | None:
    import tifffile

    with tifffile.TiffFile(path) as file:
        series: Any = file.series[0]
        if not ALPHA & set(series.keyframe.extrasamples):
            return None
        pixels = channels_last(read_window(file, window, path, MAX_PIXELS), series.axes, path)
    hidden: NDArray[np.bool_] = pixels[..., -1] == 0
    return hidden


def _number(channels: int) -> str:
    return f"{channels} channel{'s' * (channels != 1)}"


def _read_opencv(path: str | Path, flags: int) -> Array:
    """Read a file with OpenCV, or with pyspng where that is faster; RGB order."""
    try:  # cv2.imread cannot open every Unicode path
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"cannot read the image {path} ({error.strerror}); replace or remove it") from error
    _require_max_pixels_of(content, path)
    if flags & ~cv2.IMREAD_IGNORE_ORIENTATION == _RGB and (fast := _read_rgb_png(content)) is not None:
        return fast
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the error below says it
    try:
        pixels: Array | None = cv2.imdecode(content, flags) if len(content) else None
    except cv2.error:  # such as for a size beyond OpenCV's limits
        pixels = None
    finally:
        cv2.utils.logging.setLogLevel(level)
    if pixels is None:
        raise UserError(f"cannot read the image {path}: it is damaged or not an image; replace or remove it")
    if pixels.ndim == 3 and (flags == cv2.IMREAD_UNCHANGED or not flags & cv2.IMREAD_COLOR_RGB):
        pixels = cv2.cvtColor(pixels, {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGBA}[pixels.shape[2]])
    return pixels


def _require_max_pixels_of(content: NDArray[np.uint8], path: str | Path) -> None:
    try:
        with PILImage.open(io.BytesIO(content.data)) as file:  # reads the header only, 0.03 ms
            require_max_pixels(file.width * file.height, path)
    except PILImage.DecompressionBombError:
        require_max_pixels(MAX_PIXELS + 1, path)
    except _PIL_ERRORS:  # not an image, or of a format that Pillow does not know
        return


def require_max_pixels(pixels: int, path: str | Path) -> None:
    """Raise a `UserError` for a file with more than `MAX_PIXELS` pixels."""
    if pixels > MAX_PIXELS:
        windows = ""
        if str(path).lower().endswith((".tif", ".tiff")):
            windows = "; evaluate and predict read windows of it with inference.mode=slide and inference.window, or"
        raise UserError(
            f"expected an image of at most {MAX_PIXELS:,} pixels, but {path} has more{windows or ';'} cut it into tiles"
        )


def _read_rgb_png(content: NDArray[np.uint8]) -> Array | None:
    """Decode an 8-bit RGB PNG without orientation tag faster than OpenCV does; None for anything else."""
    head = content[:26].tobytes()
    is_rgb = head[:8] == b"\x89PNG\r\n\x1a\n" and head[24:] == b"\x08\x02"  # bit depth and color type
    if pyspng is None or not is_rgb or b"eXIf" in (data := content.tobytes()):
        return None
    try:
        pixels: Array = pyspng.load(data)
    except RuntimeError:  # damaged
        return None
    return pixels if pixels.ndim == 3 and pixels.shape[2] == 3 else None


def read_orientation(path: str | Path) -> int:
    """Return the orientation tag of a file, 1 to 8; 1 (upright) if it has none or cannot be read."""
    try:
        with PILImage.open(path) as file:
            if file.format == "PNG" and b"eXIf" not in Path(path).read_bytes():
                return 1  # otherwise Pillow decodes the whole file to look for the tag behind the pixels
            return int(file.getexif().get(274, 1))
    except (*_PIL_ERRORS, TypeError):
        return 1


def pillow_pixels(file: PILImage.Image, turned: bool, mode: str | None = None) -> Array:
    """Return the pixels of a file that Pillow has opened, with the orientation tag applied or not."""
    stored = int(file.getexif().get(274, 1)) if file.format == "TIFF" else 1
    if turned:
        ImageOps.exif_transpose(file, in_place=True)
    pixels = np.array(file.convert(mode) if mode else file)  # a copy: Pillow's memory is read-only
    if not turned and stored != 1 and 274 not in file.getexif():  # Pillow turns TIFF files when it loads them
        pixels = TURNS[{6: 8, 8: 6}.get(stored, stored)](pixels)
    return pixels


def _read_pillow(path: str | Path, turned: bool, as_rgb: bool = False) -> Array:
    if str(path).lower().endswith(tuple(HEIF_SUFFIXES)):
        import pillow_heif

        pillow_heif.register_heif_opener()
    try:
        with PILImage.open(path) as file:
            return pillow_pixels(file, turned, "RGB" if as_rgb else None)
    except UnidentifiedImageError as error:
        raise UserError(f"cannot read the image {path}: it is damaged or not an image; replace or remove it") from error
    except _PIL_ERRORS as error:
        raise UserError(f"cannot read the image {path} ({error}); replace or remove it") from error


def _is_gray_palette(pixels: Array, path: str | Path) -> bool:
    """Tell whether colors from a palette are levels of gray."""
    if pixels.shape[2] != 3 or _count_channels(path):
        return False
    return bool((pixels == pixels[..., :1]).all())


def _count_channels(path: str | Path) -> int:
    """Return the number of channels in a file, which OpenCV may change; 0 for palette, TIFF and unknown files."""
    try:
        with PILImage.open(path) as file:
            return 0 if file.format in ("TIFF", "GIF") or file.mode == "P" else len(file.getbands())
    except _PIL_ERRORS:
        return 0


def _read_tiff(path: str | Path, expected: int, turned: bool, channel_axis: str, window: Window | None) -> Array:
    """Read a TIFF file whose channels are interleaved, planar, or a page each.

    Args:
        path: The file.
        expected: Number of channels. 3: gray files become RGB, and alpha is dropped; 0: unknown.
        turned: Whether the orientation tag is applied.
        channel_axis: See `ImageReader`.
        window: The part to read; None for all of it.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            page: Any = series.keyframe
            if window is not None:
                _require_readable_in_windows(page, turned, path)
                pixels = read_window(file, window, path, MAX_PIXELS)
            elif page.photometric in _CONVERTED:
                return _read_pillow(path, turned, as_rgb=True)
            else:
                require_max_pixels(max(page.imagewidth * page.imagelength, series.size // MAX_LARGE_CHANNELS), path)
                pixels = series.asarray()
            if pixels.ndim == 3 and series.axes[0] in _UNNAMED:
                last = channel_axis == "last" or (
                    channel_axis == "auto" and _ask_for_axis(series.shape, expected, path)
                )
                pixels = pixels if last else np.moveaxis(pixels, 0, -1)
            else:
                pixels = channels_last(pixels, series.axes, path)
            tags = page.tags
    except UserError:
        raise
    except Exception as error:  # a damaged file makes tifffile raise nearly anything
        if lacks_codec(error):
            if window is not None:
                raise UserError(f"cannot read windows of the image {path}; {_NEEDS_CODEC}") from error
            return _read_tiff_without_codec(path, page, expected == 3, turned, error)
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the image {path} ({reason}); replace or remove it") from error
    if page.photometric == _MIN_IS_WHITE and pixels.dtype.kind == "u":
        pixels = np.iinfo(pixels.dtype).max - pixels
    if expected == 3:
        pixels = _as_rgb(pixels, has_alpha=bool(ALPHA & set(page.extrasamples)))
    turn = TURNS.get(tags[274].value if 274 in tags else 1) if turned else None
    return np.ascontiguousarray(turn(pixels) if turn else pixels)


def _require_readable_in_windows(page: Any, turned: bool, path: str | Path) -> None:
    if page.photometric in _CONVERTED:
        raise UserError(
            f"expected a gray, RGB or multi-channel file to read windows from, but {path} has other colors "
            f"({page.photometric.name}); convert it"
        )
    require_upright(page, turned, path)


def require_upright(page: Any, turned: bool, path: str | Path) -> None:
    """Raise a `UserError` for a TIFF file that its orientation tag turns."""
    if turned and 274 in page.tags and page.tags[274].value != 1:
        raise UserError(
            f"expected an upright file to read windows from, but the orientation tag of {path} is "
            f"{page.tags[274].value}; save it upright"
        )


def lacks_codec(error: Exception) -> bool:
    """Tell whether tifffile cannot read a file because a package for its compression is missing."""
    return "imagecodecs" in str(error) or isinstance(error, ModuleNotFoundError)


def _ask_for_axis(shape: tuple[int, ...], expected: int, path: str | Path) -> bool:
    """Return False for pages that are channels; raise for a file that rather has its rows there."""
    pages, rows, columns = shape
    if pages != expected and columns < pages and (columns == expected or pages > MAX_LARGE_CHANNELS):
        raise UserError(
            f"expected to know which axis of {path} is that of the channels, but it only says {pages} x {rows} x "
            f"{columns}; set dataset.channel_axis=last ({_number(columns)}) or first ({_number(pages)})"
        )
    return False


def channels_last(pixels: Array, axes: str, path: str | Path) -> Array:
    """Move the channels or pages of a TIFF series to the end, as tifffile names the axes."""
    if pixels.ndim > 3:
        kept = [axis for axis, length in enumerate(pixels.shape) if length > 1 or axes[axis] in "YX"]
        pixels, axes = pixels.reshape([pixels.shape[axis] for axis in kept]), "".join(axes[axis] for axis in kept)
    if pixels.ndim == 3 and "Y" in axes and "X" in axes:
        channel = next(axis for axis, name in enumerate(axes) if name not in "YX")
        pixels = np.moveaxis(pixels, channel, -1)
    if pixels.ndim not in (2, 3):
        raise UserError(
            f"expected an image with height, width and channels, but {path} has the axes {axes}; convert it"
        )
    return pixels


def _as_rgb(pixels: Array, has_alpha: bool) -> Array:
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if channels == 1 or (channels == 2 and has_alpha):
        return np.repeat(pixels.reshape(*pixels.shape[:2], channels)[..., :1], 3, axis=2)
    return pixels[..., :3] if channels == 4 and has_alpha else pixels


def _read_tiff_without_codec(path: str | Path, page: Any, as_rgb: bool, turned: bool, error: Exception) -> Array:
    """Read gray and RGB files with Pillow or OpenCV if tifffile lacks the codec, as for LZW compression."""
    channels, bits = page.samplesperpixel, page.bitspersample
    pixels = None
    if (channels, bits) in ((1, 8), (1, 16), (3, 8)) and not (page.photometric == _MIN_IS_WHITE and bits == 16):
        pixels = _read_pillow(path, turned)
    elif channels == 3 and read_orientation(path) == 1:  # Pillow has no 16-bit RGB; OpenCV multiplies colors by alpha
        pixels = _read_opencv(path, cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise UserError(f"cannot read the image {path}; {_NEEDS_CODEC}") from error
    return _as_rgb(pixels, has_alpha=False) if as_rgb else pixels
