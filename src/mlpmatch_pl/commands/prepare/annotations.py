"""Masks for your own images, drawn from what an annotation tool exports.

Writes ``masks/`` and ``labelmap.txt`` into the folder of the images, which ``dataset=folder`` then reads without
further options. Pixels in no region are background, class 0; the other classes follow in the order of the export.
"""

from __future__ import annotations

import io
import math
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpmatch_pl.commands.prepare.exports import FORMATS, OTHER, Entry, Export, read_export
from mlpmatch_pl.commands.prepare.files import convert, name_some, write_new
from mlpmatch_pl.commands.prepare.regions import Region, draw_mask
from mlpmatch_pl.data.files import image_files
from mlpmatch_pl.data.layout import CLASSES_CSV, LABELMAP, find_layout, is_ignored, labelmap, read_classes
from mlpmatch_pl.data.pairing import nearest, normalized
from mlpmatch_pl.data.readers.image import IMAGE_SUFFIXES, require_max_pixels
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.palette import default_palette
from mlpmatch_pl.utils.progress import say

MASKS, IGNORED = "masks", 255
_BACKGROUND_NAMES = ("background", "_background_")
_PARTS = {"val": re.compile(r"val(id|idation)?\d*"), "test": re.compile(r"test\d*")}


class Annotated(NamedTuple):
    """An image and what to draw for it.

    Attributes:
        image: Its path relative to the root.
        entry: The export's.
        size: Height and width of the mask.
    """

    image: str
    entry: Entry
    size: tuple[int, int]


def draw_annotations(root: Path, annotations: Path | None, other_shapes: str, empty: str, workers: int | None) -> None:
    """Draw the masks of an export.

    Args:
        root: Folder of the images.
        annotations: File or folder of the export; None for the root.
        other_shapes: Whether to ``refuse`` boxes, ellipses, lines and points, or ``ignore`` the pixels in their boxes.
        empty: Whether images that the export lists without a region are ``unlabeled`` or ``background``.
        workers: Number of processes; see `convert`.

    Raises:
        UserError: If the export is wrong, of an unknown format or of other images.
    """
    source = annotations or root
    files = _files(source, root)
    export = read_export(source, files)
    if export is None:
        if read_classes([root]) is None:
            raise UserError(f"expected {FORMATS} in {source}, but found none; see Data in the documentation")
        say(f"{root} has masks already; their classes are read with them")
        _say_next(root, _class_parts(root))
        return
    if not export.entries:
        raise UserError(f"expected annotated images in {source}, but {export.title} has none; annotate some")
    _require_pycocotools()
    found, folder = _find_images(root, source, export)
    found = [one._replace(entry=_without_others(one.entry, other_shapes)) for one in found]
    labeled = [one for one in found if one.entry.is_annotated or empty == "background"]
    if not labeled:
        raise UserError(f"expected annotated images in {source}, but all {len(found)} have no region; annotate some")
    classes, labels = _classes(export, source)
    palette = default_palette(IGNORED + 1)  # first, because masks drawn with other classes must not be mixed
    write_new(root / LABELMAP, labelmap(classes, palette[: len(classes)], palette[IGNORED]).encode())
    task = partial(_draw_png, labels=labels, by_size=export.by_size)
    masks = {
        one.image: f"{MASKS}/{PurePosixPath(one.image).relative_to(folder).with_suffix('.png')}" for one in labeled
    }
    convert(f"drawing {MASKS}", task, [(root / masks[one.image], one) for one in labeled], workers)
    parts = _write_parts(root, labeled, masks)
    say(f"{export.title}: {len(labeled):,} masks in {root / MASKS}, {len(classes)} classes: {', '.join(classes)}")
    if len(found) > len(labeled):
        say(f"{len(found) - len(labeled):,} images without a region are unlabeled (empty=background: they show none)")
    layout = [] if find_layout(root) == (folder, MASKS) else [f"dataset.images={folder}", f"dataset.masks={MASKS}"]
    _say_next(root, [*layout, *parts])


def _write_parts(root: Path, labeled: Collection[Annotated], masks: Mapping[str, str]) -> list[str]:
    """Write the lists of validation and test images, if the export has such parts; returns the options for them."""
    lines = defaultdict(list)
    for one in labeled:
        words = [word.lower() for word in (*PurePosixPath(one.image).parent.parts, *one.entry.words)]
        for part, pattern in _PARTS.items():
            if any(map(pattern.fullmatch, words)):
                lines[part].append(f"{one.image}\t{masks[one.image]}\n")
    if sum(map(len, lines.values())) == len(labeled):
        return []  # nothing would be left for training
    for part, content in lines.items():
        write_new(root / f"{MASKS}/{part}.txt", "".join(sorted(content)).encode("utf-8", "surrogateescape"))
    return [f"dataset.{part}={MASKS}/{part}.txt" for part in _PARTS if part in lines]


def _files(source: Path, root: Path) -> list[Path]:
    """Return the files of an export, without those that this command writes."""
    if source.is_file():
        if source.suffix.lower() in (".zip", ".gz", ".tar", ".tgz"):
            raise UserError(f"expected an unpacked export, but {source} is an archive; unpack it, and name its folder")
        return [source]
    if not source.is_dir():
        raise UserError(f"expected annotations as a file or folder, but {source} does not exist")
    found = []
    for folder, folders, names in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        if Path(folder) == root:
            folders[:] = [name for name in folders if name != MASKS]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return found


def _require_pycocotools() -> None:
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise UserError(
            "expected the package pycocotools, which draws regions, but it is not installed; "
            "run: pip install 'mlpmatch_pl[prepare]'"
        ) from error


def _find_images(root: Path, source: Path, export: Export) -> tuple[list[Annotated], str]:
    """Find the images of an export below the root.

    Returns:
        Them, and the folder that contains them all, ``images`` or the root itself.
    """
    index: dict[str, list[str]] = defaultdict(list)
    for path in image_files(str(root)):
        relative = os.path.relpath(path, root).replace(os.sep, "/")
        if not relative.startswith(f"{MASKS}/"):
            stem = normalized(_stem(relative))
            index[stem].append(relative)
            index[f"\0{_uploaded(stem)}"].append(relative)
    found: dict[str, Annotated] = {}
    missing = []
    for entry in export.entries:
        image = _find_image(entry, index, root)
        if image is None:
            missing.append(entry.image)
            continue
        if image in found:
            raise UserError(
                f"expected each image once in {source}, but {image} is in {found[image].entry.source} and in "
                f"{entry.source}; name one export by annotations="
            )
        found[image] = Annotated(image, entry, _size(root / image, entry))
    if not found:
        near = missing and nearest(normalized(_stem(missing[0])), index)
        raise UserError(
            f"expected the images of {source} in {root}, but found none of them"
            + (f", such as {missing[0]}" if missing else "")
            + (f"; the nearest is {index[near][0]}" if near else "")
            + "; set root to the folder with the images"
        )
    if missing:
        say(f"note: {len(missing):,} images of {source} are not in {root}: {name_some(missing)}")
    return list(found.values()), "images" if all(image.startswith("images/") for image in found) else "."


def _stem(name: str) -> str:
    """Return the last part of a path without the suffix of an image."""
    last = name.rpartition("/")[2]
    stem, dot, suffix = last.rpartition(".")
    return stem if f"{dot}{suffix}".lower() in IMAGE_SUFFIXES else last


def _uploaded(stem: str) -> str:
    """Return the name of an uploaded file in Label Studio: as Django's storage changes it."""
    return re.sub(r"[^-\w.]", "", stem.replace(" ", "_"))


def _find_image(entry: Entry, index: dict[str, list[str]], root: Path) -> str | None:
    """Return the file whose path has most in common with the name of an image in an export."""
    name = normalized(entry.image.replace("\\", "/"))
    stem = _stem(name)
    short = re.sub(r"^[0-9a-f]{8}-", "", stem)  # Label Studio puts eight digits before the names of uploaded files
    candidates = index.get(stem) or index.get(short) or index.get(f"\0{short}", [])
    same = [path for path in candidates if normalized(path).lower().endswith(Path(name).suffix.lower())]
    beside = os.path.relpath(entry.source.parent / name, root).replace(os.sep, "/")

    def common(path: str) -> int:
        return max(_common_parts(normalized(path), other) for other in (name, normalized(beside)))

    ranked = sorted(same or candidates, key=common, reverse=True)
    if len(ranked) > 1 and common(ranked[0]) == common(ranked[1]):
        raise UserError(
            f"expected one image {entry.image} of {entry.source} in {root}, but found {ranked[0]} and {ranked[1]}; "
            "remove one, or set root to a folder with one of them"
        )
    return ranked[0] if ranked else None


def _common_parts(one: str, two: str) -> int:
    """Count the last folders that two paths share, and the whole path once more."""
    parts = zip(reversed(PurePosixPath(one).parts[:-1]), reversed(PurePosixPath(two).parts[:-1]), strict=False)
    count = 0
    for left, right in parts:
        if left != right:
            return count
        count += 1
    return count + (PurePosixPath(one).parent == PurePosixPath(two).parent)


def _size(path: Path, entry: Entry) -> tuple[int, int]:
    """Return height and width of an image's mask: the export's, if the image has them, turned by its tag or not."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            width, height = image.size
            tag = image.getexif().get(274, 1)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        if entry.size:
            require_max_pixels(math.prod(entry.size), path)
            return entry.size  # check compares the sizes of image and mask
        raise UserError(f"cannot read the size of {path} ({error}), and {entry.source} does not say it") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error}); replace or remove it") from error
    shown = (width, height) if tag in (5, 6, 7, 8) else (height, width)
    if entry.size not in (None, shown, (height, width)):
        assert entry.size
        raise UserError(
            f"expected {path} of {entry.size[1]} x {entry.size[0]} pixels, as {entry.source} says, but it is "
            f"{shown[1]} x {shown[0]}; use the images that were annotated"
        )
    return entry.size or shown


def _without_others(entry: Entry, other_shapes: str) -> Entry:
    """Refuse shapes that are no regions, or turn them into ignored boxes."""
    others = [region.data for region in entry.regions if region.kind == OTHER]
    if others and other_shapes == "refuse":
        raise UserError(
            f"expected polygons or masks, but {entry.image} in {entry.source} has {len(others)} other shapes, the "
            f"first is a {others[0][0]}; draw its outline, or ignore the pixels in the boxes of all such shapes by "
            "other_shapes=ignore"
        )
    boxes = [Region(None, kind, [box]) for _, box, kind in others if box is not None]
    return entry._replace(regions=[*boxes, *(region for region in entry.regions if region.kind != OTHER)])


def _classes(export: Export, source: Path) -> tuple[list[str], dict[str | None, int]]:
    """Return the classes, and the mask value of each label; None is the ignored one."""
    special = {name for name in export.classes if name.lower() in _BACKGROUND_NAMES or is_ignored(name)}
    classes = ["background", *(name for name in export.classes if name not in special)]
    if not 1 < len(classes) <= IGNORED:
        raise UserError(f"expected 1 to {IGNORED - 1} classes in {source}, but found {len(classes) - 1}")
    values = {name: IGNORED if is_ignored(name) else 0 for name in special} | {
        name: value for value, name in enumerate(classes)
    }
    used = {region.label for entry in export.entries for region in entry.regions}
    return classes, {None: IGNORED} | {label: values[" ".join(label.split())] for label in used if label is not None}


def _draw_png(task: tuple[Path, Annotated], labels: dict[str | None, int], by_size: bool) -> tuple[Path, bytes]:
    """Draw a mask; returns path and content of a palette PNG."""
    from PIL import Image

    path, (image, entry, size) = task
    try:
        mask: NDArray[np.uint8] = draw_mask(entry.regions, labels, size, by_size)
    except UserError as error:
        raise UserError(f"cannot draw a region of {image} from {entry.source}: {error}; correct it there") from error
    picture = Image.fromarray(mask)
    picture.putpalette(np.array(default_palette(256), np.uint8).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return path, buffer.getvalue()


def _class_parts(root: Path) -> list[str]:
    """Return options for the folders of Roboflow's masks."""
    folders = sorted(path.parent.name for path in root.glob(f"*/{CLASSES_CSV}"))
    parts = {"train": re.compile("train")} | _PARTS
    return [f"dataset.{part}={name}" for part, pattern in parts.items() for name in folders if pattern.fullmatch(name)]


def _say_next(root: Path, options: Iterable[str]) -> None:
    overrides = " ".join(["dataset=folder", f"dataset.root={shlex.quote(str(root.absolute()))}", *options])
    say(f"\nnext:\n  python -m mlpmatch_pl.check {overrides}\n  python -m mlpmatch_pl.train {overrides}")
