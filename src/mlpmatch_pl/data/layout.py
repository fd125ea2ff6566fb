"""Where a folder of images and masks has them, and the classes that a file beside them names.

Annotation tools write the classes of their masks into ``labelmap.txt`` (CVAT: ``name:red,green,blue:parts:actions``) or
``_classes.csv`` (Roboflow: the columns Pixel Value and Class).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlpmatch_pl.utils.errors import UserError

LABELMAP, CLASSES_CSV = "labelmap.txt", "_classes.csv"
_IGNORED_NAMES = ("ignore", "ignored", "void", "__ignore__")
Color = tuple[int, int, int]


class ClassFile(NamedTuple):
    """The classes that a file names.

    Attributes:
        names: Their names.
        palette: The color of each class in the masks; empty if masks have ids.
        ignore_colors: Colors of pixels to ignore.
        mask_values: Class of each id in the masks; None if masks have colors.
    """

    names: tuple[str, ...]
    palette: tuple[Color, ...] = ()
    ignore_colors: tuple[Color, ...] = ()
    mask_values: dict[int | float | str, int] | None = None


def is_ignored(name: str) -> bool:
    """Tell whether the pixels of a class are to be ignored, by its name: ``ignore``, ``ignored`` or ``void``.

    Example:
        >>> is_ignored("Void"), is_ignored("road")
        (True, False)
    """
    return name.strip().lower() in _IGNORED_NAMES


def find_layout(root: Path) -> tuple[str, str]:
    """Return the folders of images and masks below a root."""
    has_images = (root / "images").is_dir()
    if (root / "SegmentationClass").is_dir() and not (root / "masks").is_dir():
        return "images" if has_images else "JPEGImages", "SegmentationClass"
    if has_images or not ((root / "masks").is_dir() or _class_file(root)):
        return "images", "masks"
    return ".", "masks" if (root / "masks").is_dir() else "."


def read_classes(roots: Sequence[Path]) -> ClassFile | None:
    """Read the classes of a dataset from the file beside its masks, or below in ``train`` and similar folders.

    Returns:
        The classes, or None if there is no such file.

    Raises:
        UserError: If a file is wrong, or two of them differ.
    """
    found = [path for root in roots if (path := _class_file(root))]
    contents = [_read_labelmap(path) if path.name == LABELMAP else _read_csv(path) for path in found]
    for path, content in zip(found, contents, strict=True):
        if content != contents[0]:
            raise UserError(f"expected the same classes in {found[0]} and {path}, but they differ; set dataset.classes")
    return contents[0] if contents else None


def labelmap(names: Sequence[str], palette: Sequence[Color], ignored: Color) -> str:
    """Return the content of a ``labelmap.txt``.

    Example:
        >>> print(labelmap(["background", "road"], [(0, 0, 0), (128, 0, 0)], (224, 224, 192)), end="")
        # label:color_rgb:parts:actions
        background:0,0,0::
        road:128,0,0::
        ignored:224,224,192::
    """
    rows = [*zip(names, palette, strict=True), ("ignored", ignored)]
    lines = [f"{name}:{','.join(map(str, color))}::\n" for name, color in rows]
    return "# label:color_rgb:parts:actions\n" + "".join(lines)


def _class_file(root: Path) -> Path | None:
    """Return the file with the classes in a folder, or else in its subfolders."""
    choices = (root / LABELMAP, root / CLASSES_CSV, *sorted(root.glob(f"*/{CLASSES_CSV}")))
    return next((path for path in choices if path.is_file()), None)


def _read_labelmap(path: Path) -> ClassFile:
    classes: dict[str, Color] = {}
    ignored = []
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        name, *fields = line.rsplit(":", 3)
        try:
            red, green, blue = map(int, fields[0].split(","))
        except (ValueError, IndexError) as error:
            if not line.strip() or line.startswith("#"):
                continue
            raise UserError(
                f"expected lines name:red,green,blue:parts:actions in {path}, but found {line!r}; correct it, or set "
                "dataset.classes and dataset.palette"
            ) from error
        if name in classes:
            raise UserError(f"expected each class once in {path}, but {name} occurs more than once; correct it")
        if is_ignored(name):
            ignored.append((red, green, blue))
        else:
            classes[name] = (red, green, blue)
    return ClassFile(tuple(classes), tuple(classes.values()), tuple(ignored))


def _read_csv(path: Path) -> ClassFile:
    rows = [row for row in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()) if row]
    try:
        found = sorted((int(value), name.strip()) for value, name in rows[1:])
    except ValueError as error:
        raise UserError(
            f"expected the columns Pixel Value and Class in {path}, but found {rows[:2]}; correct it, or set "
            "dataset.classes"
        ) from error
    kept = [(value, name) for value, name in found if not is_ignored(name)]
    values: dict[int | float | str, int] = {value: label for label, (value, _) in enumerate(kept)}
    values |= {value: 255 for value, name in found if is_ignored(name)}
    return ClassFile(tuple(name for _, name in kept), mask_values=values)
