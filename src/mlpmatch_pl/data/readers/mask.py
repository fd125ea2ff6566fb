"""Read mask files as classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpmatch_pl.data.base import Mask
from mlpmatch_pl.data.readers.image import ORIENTATIONS
from mlpmatch_pl.data.readers.stored import StoredMask, read_stored
from mlpmatch_pl.data.readers.windows import Window
from mlpmatch_pl.utils.errors import UserError, require_choice
from mlpmatch_pl.utils.palette import require_colors

OTHER = "other"  # key of `mask_values` for all values that are not listed
_UNKNOWN = 256  # no class and no ignore index
_SMALL = 1 << 16  # ids below it are mapped by a table
_MAX_INT = 2.0**62  # of ids in floating-point files; larger ones stay floats
Array = NDArray[Any]


class MaskReader:
    """Reads mask files into classes.

    Files with one channel contain ids, the numbers stored in the file: the classes, or values that ``values`` maps to
    classes. Files with three or four channels, and palette files unless ``values`` is given, contain colors, if
    ``colors`` maps these to classes. Transparent pixels are ignored.

    Args:
        values: Class (or the ignore index) of each id in the files, any whole number. The key ``other`` matches all
            other ids.
        colors: RGB color of each class.
        ignore_colors: RGB colors of pixels to ignore.
        ignore_index: Mask value of pixels to ignore.
        orientation: Whether to ``apply`` or ``ignore`` the orientation tag of a file.
        class_channels: Whether a file has a page or channel for each class, which is not 0 where the class is. If the
            first class has none, it is everywhere else; otherwise pixels without class are ignored.
        num_classes: Number of classes, which ``class_channels`` needs.

    Raises:
        UserError: If a value or a color is out of range, or two classes have the same color.

    Example:
        >>> MaskReader({0: 0, 255: 1}).describe()
        "values={0: 0, 255: 1} colors=[] ignore=255 orientation='apply' class_channels=False"
    """

    def __init__(
        self,
        values: Mapping[int | float | str, int] | None = None,
        colors: Sequence[Sequence[int]] = (),
        ignore_colors: Sequence[Sequence[int]] = (),
        ignore_index: int = 255,
        orientation: str = "apply",
        class_channels: bool = False,
        num_classes: int | None = None,
    ) -> None:
        if not isinstance(values or {}, Mapping):
            raise UserError(f"expected dataset.mask_values as {{value in the files: class}}, but got {values}")
        require_colors("dataset.palette", colors)
        require_colors("dataset.ignore_colors", ignore_colors)
        self.ignore_index, self.class_channels, self.num_classes = ignore_index, class_channels, num_classes
        self.orientation = require_choice("dataset.orientation", orientation, ORIENTATIONS)
        # A nodata value such as -3.4e38 is only written as a float.
        self._values = {int(key) if _is_whole(key) else key: label for key, label in dict(values or {}).items()}
        _require_mapping(self._values)
        self._ids = _id_table(self._values) if values else None
        # Checked when a mask has colors: in a palette for visualization only, two classes may share one.
        self._colors = [*enumerate(map(tuple, colors)), *((ignore_index, tuple(color)) for color in ignore_colors)]
        self._table: Array | None = None
        self._palettes: dict[bytes, tuple[Array, np.uint8 | None, np.uint8]] = {}

    @property
    def trusts_palette_ids(self) -> bool:
        """Whether the numbers in palette files are classes although nothing says so."""
        return not self._values and not self._colors and not self.class_channels

    def __call__(self, path: str | Path, window: Window | None = None) -> Mask:
        """Read a mask: (H, W) uint8, classes and the ignore index.

        Args:
            path: The file.
            window: The part to read; the rest of a TIFF file is not decoded.

        Raises:
            UserError: If the file cannot be read, or has ids or colors without a class.
        """
        stored = read_stored(path, self.orientation == "apply", window)
        if stored.lossy:
            raise UserError(
                f"expected a mask whose compression keeps its values, but {path} is {stored.lossy}"
                f"{self._share_unlisted(stored)}; save masks as PNG or TIFF from their source"
            )
        classes: Array = self._classes(stored, path)
        if stored.transparent is not None:
            classes = np.where(stored.transparent, classes.dtype.type(self.ignore_index), classes)
        if classes.dtype != np.uint8 and (unknown := classes == _UNKNOWN).any():
            raise UserError(self._unlisted(stored, unknown, path))
        labels: Mask = classes.astype(np.uint8, copy=False)
        return labels

    def describe(self) -> str:
        """Return the options as a string: what decoded masks depend on beside the file."""
        return (
            f"values={self._values} colors={self._colors} ignore={self.ignore_index} "
            f"orientation={self.orientation!r} class_channels={self.class_channels}"
        )

    def _classes(self, stored: StoredMask, path: str | Path) -> Array:
        """Return uint8, or uint16 if some pixels may have no class."""
        pixels = stored.pixels
        if self.class_channels:
            return self._combine(pixels if pixels.ndim == 3 else pixels[..., None], path)
        if stored.is_color and self._colors:
            red, green, blue = (pixels[..., channel].astype(np.uint32) for channel in range(3))
            classes: Array = self._color_table()[red << 16 | green << 8 | blue]
            return classes
        if pixels.ndim != 2:
            raise UserError(
                f"expected a mask with one channel of class ids, but {path} has {_axes(stored)}; save class ids as a "
                "gray or palette PNG, or set dataset.palette to the color of each class, or dataset.class_channels="
                "true if it has a channel for each class"
            )
        if stored.palette is not None and self._colors and not self._values and pixels.dtype == np.uint8:
            return self._from_palette(pixels, stored.palette)
        pixels = _integers(pixels, stored.transparent, path)
        return self._as_ids(pixels, path, stored.transparent) if self._ids is None else self._from_ids(pixels)

    def _from_ids(self, pixels: Array) -> Array:
        assert self._ids is not None
        if pixels.dtype in (np.bool_, np.uint8, np.uint16) or (pixels.min() >= 0 and pixels.max() < _SMALL):
            return self._ids[pixels.astype(np.uint16, copy=False)]
        ids, positions = np.unique(pixels, return_inverse=True)
        other, known = self._values.get(OTHER, _UNKNOWN), self._values
        if ids.dtype.kind == "f":  # keys as precise as the file
            with np.errstate(over="ignore"):
                known = {ids.dtype.type(key): label for key, label in known.items() if key != OTHER}
        labels = np.array([known.get(value, other) for value in ids], np.uint16)
        return labels[positions].reshape(pixels.shape)

    def _as_ids(self, pixels: Array, path: str | Path, transparent: Array | None) -> Mask:
        if pixels.dtype != np.uint8:
            counted = pixels if transparent is None else pixels[~transparent]
            low, high = (counted.min(), counted.max()) if counted.size else (0, 0)
            if low < 0 or high > 255:
                wrong = _shown(low if low < 0 else high)
                raise UserError(
                    f"expected class ids from 0 to 255, but {path} has the value {wrong}; map the values to classes, "
                    f"as in 'dataset.mask_values={{{wrong}:{self.ignore_index},0:0,1:1}}'"
                )
        ids: Mask = pixels.astype(np.uint8, copy=False)
        return ids

    def _from_palette(self, pixels: Mask, palette: Array) -> Array:
        """Map the ids of a palette file by their colors."""
        key = palette.tobytes()
        if key not in self._palettes:
            if len(self._palettes) > 64:
                self._palettes.clear()
            self._palettes[key] = self._palette_table(palette)
        table, first, last = self._palettes[key]
        # A fast way for files whose ids are the classes, as those of VOC: no id is between the first and last unknown.
        if first is not None and not (pixels - first <= last - first).any():
            return pixels
        if (palette == np.arange(len(palette))[:, None]).all() and (table[pixels] == _UNKNOWN).any():
            return pixels  # the palette shows ids as gray levels, as a gray file does
        return table[pixels]

    def _palette_table(self, palette: Array) -> tuple[Array, np.uint8 | None, np.uint8]:
        """Return the class of each id, and, if ids are their own classes, the first and last id without class."""
        table = np.full(256, _UNKNOWN, np.uint16)
        by_color: dict[tuple[int, ...], set[int]] = {}
        for label, color in self._colors:
            by_color.setdefault(color, set()).add(label)
        for index, color in enumerate(map(tuple, palette.tolist())):
            labels = by_color.get(color, {_UNKNOWN})
            if len(labels) > 1 and index not in labels:
                self._color_table()  # raises: two classes have this color
            table[index] = index if index in labels else next(iter(labels))
        unknown = np.flatnonzero(table == _UNKNOWN)
        is_identity = len(unknown) and (np.delete(table, unknown) == np.delete(np.arange(256), unknown)).all()
        return table, np.uint8(unknown[0]) if is_identity else None, np.uint8(unknown[-1] if len(unknown) else 0)

    def _combine(self, pixels: Array, path: str | Path) -> Mask:
        """Combine a channel for each class."""
        assert self.num_classes is not None
        first = self.num_classes - pixels.shape[2]
        if first not in (0, 1):
            raise UserError(
                f"expected {self.num_classes} pages or channels, one for each class (or one less, without the first "
                f"class), but {path} has {pixels.shape[2]}; correct the mask or dataset.classes"
            )
        present = pixels != 0
        count = present.sum(axis=2)
        if (count > 1).any():
            row, column = np.argwhere(count > 1)[0].tolist()
            raise UserError(
                f"expected one class at each pixel, but {path} has {count[row, column]} at row {row}, column {column} "
                f"({(count > 1).mean():.1%} of the pixels have several); correct the mask"
            )
        empty = 0 if first else self.ignore_index
        classes: Mask = np.where(count == 0, empty, present.argmax(axis=2) + first).astype(np.uint8)
        return classes

    def _color_table(self) -> Array:
        if self._table is None:
            self._table = _color_table(self._colors)
        return self._table

    def _unlisted(self, stored: StoredMask, unknown: Array, path: str | Path) -> str:
        """Return the message about the first pixel without class."""
        value = stored.pixels[unknown][0]
        if stored.is_color or (stored.palette is not None and not self._values):
            color = value.tolist() if stored.is_color else stored.palette[int(value)].tolist()  # type: ignore[index]
            return (
                f"expected the colors of dataset.palette, but the mask {path} has {color}; add it to dataset.palette "
                "or dataset.ignore_colors"
            )
        return (
            f"expected the mask values {', '.join(map(str, self._values))} of dataset.mask_values, but {path} has "
            f"{_shown(value)}; add it, or 'other: {self.ignore_index}' for all others"
        )

    def _share_unlisted(self, stored: StoredMask) -> str:
        """Return the share of the pixels that have no class, if that is known."""
        pixels = stored.pixels
        if pixels.ndim == 3 and stored.is_color and self._colors:
            known = self._classes(stored, "") != _UNKNOWN
        elif self._values or self.num_classes:
            listed = list(self._values) or [*range(self.num_classes or 0), self.ignore_index]
            levels = np.atleast_3d(pixels)  # in colors, ids are levels of gray
            known = np.isin(levels[..., 0], [value for value in listed if value != OTHER])
            known &= (levels == levels[..., :1]).all(2)
        else:
            return ""
        return f", and {1 - known.mean():.1%} of its pixels have values that are not listed"


def _axes(stored: StoredMask) -> str:
    if stored.pixels.ndim != 3:
        return f"the shape {stored.pixels.shape}"
    return f"{stored.pixels.shape[2]} {'color channels' if stored.is_color else 'pages or channels'}"


def _integers(pixels: Array, transparent: Array | None, path: str | Path) -> Array:
    """Return ids; those in floating-point files must be whole numbers."""
    if pixels.dtype.kind in "biu":
        return pixels
    if pixels.dtype.kind != "f":
        raise UserError(f"expected class ids, but {path} has {pixels.dtype} values; save it as a gray PNG")
    ids = pixels if transparent is None else np.where(transparent, pixels.dtype.type(0), pixels)
    wrong = ~(np.isfinite(ids) & (ids == np.rint(ids)))
    if wrong.any():
        hint = "; set it to a number" if np.isnan(ids[wrong]).any() else ""
        raise UserError(
            f"expected whole numbers as class ids, but {path} has {ids[wrong][0]} ({ids.dtype}){hint}; save it "
            "as a gray PNG"
        )
    return ids.astype(np.int64) if float(np.abs(ids).max(initial=0)) < _MAX_INT else ids


def _is_whole(key: object) -> bool:
    return isinstance(key, float) and key.is_integer()


def _shown(value: Any) -> str:
    """Write an id as a key of `mask_values`: without a fraction, but not with 39 digits."""
    return str(int(value) if abs(value) < _MAX_INT else value)


def _require_mapping(values: Mapping[Any, Any]) -> None:
    for key, label in values.items():
        if (key != OTHER and not isinstance(key, int)) or not isinstance(label, int) or not 0 <= label <= 255:
            raise UserError(
                "expected dataset.mask_values as {value in the files: class}, with integers (or other) as values and "
                f"classes from 0 to 255, but got {{{key}: {label}}}"
            )


def _id_table(values: Mapping[int | float | str, int]) -> Array:
    """Return the class of each id from 0 to 65535."""
    table = np.full(_SMALL, values.get(OTHER, _UNKNOWN), np.uint16)
    for key, label in values.items():
        if isinstance(key, int) and 0 <= key < _SMALL:
            table[key] = label
    return table


def _color_table(colors: Sequence[tuple[int, tuple[int, ...]]]) -> Array:
    """Return the class of each 24-bit color."""
    table = np.full(1 << 24, _UNKNOWN, np.uint16)
    for label, (red, green, blue) in colors:
        code = red << 16 | green << 8 | blue
        if table[code] not in (_UNKNOWN, label):
            raise UserError(
                f"expected a different color for each class, but classes {table[code]} and {label} have "
                f"{[red, green, blue]}; correct dataset.palette or dataset.ignore_colors"
            )
        table[code] = label
    return table
