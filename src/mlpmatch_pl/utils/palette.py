"""The colors of classes."""

from collections.abc import Sequence

from mlpmatch_pl.utils.errors import UserError


def default_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Return distinct colors, the first black: PASCAL VOC's bit-interleaved color map.

    Example:
        >>> default_palette(3)
        ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    """
    return tuple(_voc_color(index) for index in range(count))


def _voc_color(index: int) -> tuple[int, int, int]:
    red, green, blue = (sum((index >> 3 * bit + channel & 1) << 7 - bit for bit in range(8)) for channel in range(3))
    return red, green, blue


def require_colors(key: str, colors: Sequence[Sequence[int]]) -> None:
    """Refuse anything but a list of RGB colors.

    Raises:
        UserError: With the key of the configuration and the wrong color.

    Example:
        >>> require_colors("dataset.palette", [[0, 0, 256]])
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected colors as [red, green, blue] from 0 to 255 in dataset.palette, ...
    """
    for color in colors:
        if (
            not isinstance(color, Sequence)
            or len(color) != 3
            or not all(isinstance(value, int) and 0 <= value <= 255 for value in color)
        ):
            raise UserError(f"expected colors as [red, green, blue] from 0 to 255 in {key}, but got {color}")


def check_palette(palette: Sequence[Sequence[int]], num_classes: int) -> None:
    """Refuse a palette that does not have one RGB color per class; an empty one is allowed.

    Raises:
        UserError: If a color is invalid, or there are more or fewer colors than classes.
    """
    require_colors("palette", palette)
    if palette and len(palette) != num_classes:
        raise UserError(f"expected {num_classes} colors in palette, one per class, but got {len(palette)}")
