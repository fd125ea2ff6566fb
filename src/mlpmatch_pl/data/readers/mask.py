"""Read mask files as classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageOps

from mlpmatch_pl.data.base import Mask
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.palette import require_colors

OTHER = "other"  # key of `mask_values` for all values that are not listed
_UNKNOWN = 256  # no class and no ignore index
Array = NDArray[Any]


class MaskReader:
    """Reads mask files into classes.

    Files with one channel, including palette files, contain ids: the classes, or values that ``values`` maps to
    classes. Files with three or four channels contain colors, which ``colors`` maps to classes.

    Args:
        values: Class (or the ignore index) of each id in the files. The key ``other`` matches all other ids.
        colors: RGB color of each class.
        ignore_colors: RGB colors of pixels to ignore.
        ignore_index: Mask value of pixels to ignore.

    Raises:
        UserError: If a value or a color is out of range, or two classes have the same color.

    Example:
        >>> MaskReader({0: 0, 255: 1}).describe()
        'values={0: 0, 255: 1} colors=[] ignore=255'
    """

    def __init__(
        self,
        values: Mapping[int | str, int] | None = None,
        colors: Sequence[Sequence[int]] = (),
        ignore_colors: Sequence[Sequence[int]] = (),
        ignore_index: int = 255,
    ) -> None:
        if not isinstance(values or {}, Mapping):
            raise UserError(f"expected dataset.mask_values as {{value in the files: class}}, but got {values}")
        require_colors("dataset.palette", colors)
        require_colors("dataset.ignore_colors", ignore_colors)
        self.ignore_index = ignore_index
        self._values = dict(values or {})
        self._ids = _id_table(self._values) if values else None
        # Checked when a mask has colors: in a palette for visualization only, two classes may share one.
        self._colors = [*enumerate(map(tuple, colors)), *((ignore_index, tuple(color)) for color in ignore_colors)]
        self._table: Array | None = None

    def __call__(self, path: str | Path) -> Mask:
        """Read a mask: (H, W) uint8, classes and the ignore index.

        Raises:
            UserError: If the file cannot be read, or has ids or colors without a class.
        """
        try:
            with PILImage.open(path) as file:
                ImageOps.exif_transpose(file, in_place=True)
                pixels = np.array(file)  # a copy: PIL's memory is read-only
                mode = file.mode
        except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
            raise UserError(f"cannot read the mask {path} ({error}); replace or remove it") from error
        if pixels.ndim == 3:
            return self._from_colors(pixels, mode, path)
        if pixels.dtype.kind not in "biu":
            raise UserError(f"expected integer class ids, but {path} has {pixels.dtype} values; save it as a gray PNG")
        return _as_ids(pixels, path) if self._ids is None else self._from_ids(pixels, path)

    def describe(self) -> str:
        """Return the options as a string: what decoded masks depend on beside the file."""
        return f"values={self._values} colors={self._colors} ignore={self.ignore_index}"

    def _from_ids(self, pixels: Array, path: str | Path) -> Mask:
        assert self._ids is not None
        if (wrong := _outside(pixels, len(self._ids) - 1)) is not None:
            raise UserError(f"expected mask values from 0 to 65535, but {path} has the value {wrong}; correct the mask")
        classes = self._ids[pixels.astype(np.uint16, copy=False)]
        if (unknown := classes == _UNKNOWN).any():
            raise UserError(
                f"expected the mask values {', '.join(map(str, self._values))} of dataset.mask_values, but {path} has "
                f"{int(pixels[unknown][0])}; add it, or 'other: {self.ignore_index}' for all others"
            )
        labels: Mask = classes.astype(np.uint8)
        return labels

    def _from_colors(self, pixels: Array, mode: str, path: str | Path) -> Mask:
        if not self._colors or pixels.shape[2] < 3:
            raise UserError(
                f"expected a mask with one channel of class ids, but {path} has {pixels.shape[2]} channels (mode "
                f"{mode}); save class ids as a gray or palette PNG, or set dataset.palette to the color of each class"
            )
        if self._table is None:
            self._table = _color_table(self._colors)
        red, green, blue = (pixels[..., channel].astype(np.uint32) for channel in range(3))
        classes = self._table[red << 16 | green << 8 | blue]
        if (unknown := classes == _UNKNOWN).any():
            color = pixels[unknown][0, :3].tolist()
            raise UserError(
                f"expected the colors of dataset.palette, but the mask {path} has {color}; add it to dataset.palette "
                "or dataset.ignore_colors"
            )
        labels: Mask = classes.astype(np.uint8)
        return labels


def _as_ids(pixels: Array, path: str | Path) -> Mask:
    if pixels.dtype != np.uint8 and (wrong := _outside(pixels, 255)) is not None:  # 16-bit files
        advice = "map the values to classes by dataset.mask_values" if wrong > 0 else "correct the mask"
        raise UserError(f"expected class ids from 0 to 255, but {path} has the value {wrong}; {advice}")
    ids: Mask = pixels.astype(np.uint8, copy=False)
    return ids


def _outside(pixels: Array, maximum: int) -> int | None:
    """Return a value below 0 or above the maximum, or None."""
    low, high = int(pixels.min()), int(pixels.max())
    return low if low < 0 else high if high > maximum else None


def _id_table(values: Mapping[int | str, int]) -> Array:
    """Return the class of each id from 0 to 65535."""
    table = np.full(1 << 16, _UNKNOWN, np.uint16)
    for key, label in sorted(values.items(), key=lambda item: item[0] != OTHER):  # "other" first
        ids = slice(None) if key == OTHER else key
        known = isinstance(ids, slice) or (isinstance(ids, int) and 0 <= ids < len(table))
        if not known or not isinstance(label, int) or not 0 <= label <= 255:
            raise UserError(
                "expected dataset.mask_values as {value in the files: class}, with values from 0 to 65535 (or other) "
                f"and classes from 0 to 255, but got {{{key}: {label}}}"
            )
        table[ids] = label  # type: ignore[index]
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
