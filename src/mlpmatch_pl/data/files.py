"""Many file names in little memory: the names of a hundred thousand images as two tensors.

A list of strings is copied into every worker process, a page at a time, because Python counts references inside the
objects. Tensors are not: forked workers share their pages, and spawned ones get them as shared memory.
"""

from __future__ import annotations

import csv
import os
import posixpath
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mlpmatch_pl.data.base import Image, Mask
from mlpmatch_pl.data.readers.image import IMAGE_SUFFIXES, ImageReader, stamp
from mlpmatch_pl.data.readers.mask import MaskReader
from mlpmatch_pl.utils.errors import UserError


class PathTable:
    """An immutable sequence of strings.

    Args:
        paths: The strings, as the file system gives them.

    Example:
        >>> table = PathTable(["images/a.jpg", "", "images/b.jpg"])
        >>> len(table), table[2], list(table)
        (3, 'images/b.jpg', ['images/a.jpg', '', 'images/b.jpg'])
    """

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._text = torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy())
        self._ends = torch.from_numpy(np.cumsum([0, *map(len, encoded)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} paths")
        index %= len(self)
        start, end = self._ends[index : index + 2].tolist()
        return os.fsdecode(self._text[start:end].numpy().tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


class FileIndex:
    """Finds and pairs the files below one or several roots.

    Args:
        roots: Folders with ``images`` and ``masks``.
        images: Folder with the images, below each root, with any sub-folders.
        masks: Folder with the masks, below each root.
        known: All pairs, where the data set's own layout gives them; they are then not searched for.
        find_mask: Turns a mask's path in a list into that of the file to read, where it is another.

    Raises:
        UserError: If a root is no folder.
    """

    def __init__(
        self,
        roots: Sequence[Path],
        images: str,
        masks: str,
        known: Iterable[Pair] = (),
        find_mask: Callable[[str], str] | None = None,
    ) -> None:
        if not roots:
            raise UserError("expected dataset.root to be a folder or a list of folders, but the list is empty")
        for root in roots:
            if not root.is_dir():
                raise UserError(
                    f"expected dataset.root to be a folder, but {root} does not exist; set dataset.root=/path/to/data"
                )
        self.roots = list({os.path.realpath(root): root.absolute() for root in roots}.values())
        several = len(self.roots) > 1
        self.base = Path(os.path.commonpath([root.resolve() for root in self.roots])) if several else roots[0]
        self._real_base = os.path.realpath(self.base)
        self.images, self.masks, self._find_mask = images, masks, find_mask
        self.known = {pair.image: pair for pair in known}

    def discover(self) -> list[Pair]:
        """Pair all images with the masks of the same relative path without suffix."""
        found = list(self.known.values())
        for root in self.roots if not found else ():
            if not (root / self.images).is_dir():
                raise UserError(
                    f"expected a folder with images at {root / self.images}, but it does not exist; "
                    "set dataset.images, or give list files with dataset.train, dataset.labeled and dataset.val"
                )
            found += self._paired(root / self.images, root / self.masks)
        return found

    def part(self, name: str, with_masks: bool = True) -> list[Pair]:
        """Return what a list file, a CSV file or a folder holds, given relative to the root or the working directory.

        Args:
            name: A list with ``image mask`` or ``image`` lines, a CSV file with the columns image and mask, a folder
                with images and masks as sub-folders, a folder below that of the images, or any folder with images.
            with_masks: Whether masks are wanted; those that a list names need not exist otherwise.

        Raises:
            UserError: If there is no such file or folder, or it is empty, or what it names does not exist.
        """
        path = self._find(name)
        if not path.is_dir():
            return self._read_list(path, with_masks)
        pairs = self._folder(path.absolute())
        return pairs if with_masks else [Pair(pair.image, None) for pair in pairs]

    def is_folder(self, name: str) -> bool:
        """Tell whether a part is a folder rather than a list."""
        return self._find(name).is_dir()

    def with_masks(self, listed: list[Pair], known: Mapping[str, Pair]) -> list[Pair]:
        """Find the masks of bare names: among known pairs, or else by path in the mask folder."""
        if all(pair.mask for pair in listed):
            return listed
        known = {**self.known, **known}
        if not all(pair.mask or pair.image in known for pair in listed) and (self.roots[0] / self.images).is_dir():
            known = {**{pair.image: pair for pair in self.discover()}, **known}
        return [pair if pair.mask else known.get(pair.image, pair) for pair in listed]

    def _find(self, name: str) -> Path:
        for path in (self.base / name, Path(name).expanduser()):
            if path.exists():
                return path
        raise UserError(
            f"expected a list file or folder, but {name} exists neither in {self.base} nor in the working directory; "
            "a fraction is written 1/8, a count 92"
        )

    def _folder(self, path: Path) -> list[Pair]:
        if self.known:
            return [self.known.get(name, Pair(name, None)) for name in self._by_stem(path).values()]
        if (path / self.images).is_dir():
            return self._paired(path / self.images, path / self.masks)
        real = Path(os.path.realpath(path))
        for root in self.roots:
            images = Path(os.path.realpath(root / self.images))
            if real.is_relative_to(images):
                return self._paired(path, root / self.masks / real.relative_to(images))
        return self._paired(path, None)

    def _paired(self, images: Path, masks: Path | None) -> list[Pair]:
        found = self._by_stem(images)
        labels = {} if masks is None else self._by_stem(masks)
        if not found:
            raise UserError(f"expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {images}, but found none")
        if lonely := sorted(set(labels) - set(found)):
            raise UserError(
                f"expected an image for every mask, but {labels[lonely[0]]} has none ({len(lonely)} in all); "
                "an image and its mask have the same path below their folders, without suffix"
            )
        return [Pair(image, labels.get(stem)) for stem, image in found.items()]

    def _by_stem(self, folder: Path) -> dict[str, str]:
        """Return the image files below a folder by their path in it without suffix, sorted."""
        found: dict[str, str] = {}
        for path in sorted(image_files(str(folder))):
            stem = posixpath.splitext(os.path.relpath(path, folder).replace(os.sep, "/"))[0]
            if stem in found:
                raise UserError(
                    f"expected one file named {stem} in {folder}, but found {found[stem]} and {os.path.basename(path)}"
                )
            found[stem] = self._named(path)
        return found

    def _named(self, path: str) -> str:
        """Return one name for one file: its path relative to the base, or absolute if it is not below it."""
        places = (os.path.abspath(path), os.path.abspath(self.base)), (os.path.realpath(path), self._real_base)
        for place, base in places:
            inside = base.rstrip(os.sep) + os.sep
            if place.startswith(inside):
                return place.removeprefix(inside).replace(os.sep, "/")
        return places[1][0].replace(os.sep, "/")

    def _read_list(self, path: Path, with_masks: bool) -> list[Pair]:
        content = path.read_bytes()
        if b"\0" in content:
            raise UserError(f"expected a list in UTF-8, but {path} is none; save the list in UTF-8, or give a folder")
        lines = (
            content.decode("utf-8-sig", errors="surrogateescape").replace("\r", "\n").split("\n")
        )  # names may be any bytes
        rows = _csv_rows(lines, path) if path.suffix.lower() == ".csv" else self._list_rows(lines, path)
        pairs = [self._pair(row, path, with_masks) for row in rows]
        if not pairs:
            raise UserError(f"expected at least one image in the list {path}, but it is empty")
        if twice := next((name for name, count in Counter(pair.image for pair in pairs).items() if count > 1), None):
            raise UserError(f"expected every image once in the list {path}, but {twice} comes more than once")
        return pairs

    def _list_rows(self, lines: Sequence[str], path: Path) -> Iterator[list[str]]:
        for line in map(str.strip, lines):
            if not line:
                continue
            parts = [part.strip() for part in line.split("\t")] if "\t" in line else line.split()
            if "\t" not in line and len(parts) > 1 and (self.base / line).is_file():  # a bare name with spaces
                parts = [line]
            if len(parts) > 2:
                raise UserError(
                    f"expected 'image mask' in {path}, but found {line!r}; separate names with spaces by a tab"
                )
            yield parts

    def _pair(self, row: Sequence[str], path: Path, with_masks: bool) -> Pair:
        # One spelling for one file, so that overlaps are found.
        image = self._existing(row[0], path)
        mask = row[1] if with_masks and len(row) > 1 else ""
        if mask and self._find_mask:
            mask = self._find_mask(mask)
        return Pair(image, self._existing(mask, path) if mask else None)

    def _existing(self, name: str, path: Path) -> str:
        if ".." in name.split("/"):
            raise UserError(f"expected paths below {self.base} in {path}, but found {name!r}")
        if not os.path.isfile(os.path.join(self.base, name)):
            if not name.isprintable():
                raise UserError(f"expected the list {path} in UTF-8, but it is not; save it in UTF-8")
            raise UserError(f"expected the file {self.base / name}, which {path} lists, but it does not exist")
        return self._named(name) if name.startswith("/") else posixpath.normpath(name)


def image_files(folder: str) -> Iterator[str]:
    """Yield the image files below a folder, hidden ones and pipes left out; links are followed once."""
    visited = set()  # links may lead back to a folder above
    for directory, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        for name in names:
            path = os.path.join(directory, name)
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".") and _ends(path):
                yield path


def _ends(path: str) -> bool:
    """Tell whether reading a path comes to an end: a pipe would be waited for, a device read for ever."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # a link to nothing is an image that cannot be read, and named as such
        return True


def _csv_rows(lines: Sequence[str], path: Path) -> Iterator[list[str]]:
    header = next((line for line in lines if line.strip()), "")
    delimiter = next((mark for mark in ("\t", ";") if mark in header), ",")
    rows = csv.DictReader(filter(str.strip, lines), delimiter=delimiter)
    columns = [column.strip().lower() for column in rows.fieldnames or ()]
    if header and "image" not in columns:
        raise UserError(
            f"expected a first line with the columns image and mask in {path}, but found {header!r}; name the columns"
        )
    rows.fieldnames = columns
    for row in rows:
        if image := (row["image"] or "").strip():
            yield [image, (row.get("mask") or "").strip()]


class Pair(NamedTuple):
    """An image and its mask, if it has one, as paths relative to a root (or absolute, outside of it)."""

    image: str
    mask: str | None


class FileSource:
    """Pairs of files, see `mlpmatch_pl.data.base.ImageSource`.

    Args:
        root: Folder that the paths are relative to.
        pairs: The files.
        read_image: Reads an image.
        read_mask: Reads a mask.
    """

    def __init__(self, root: Path, pairs: Sequence[Pair], read_image: ImageReader, read_mask: MaskReader) -> None:
        self.root, self.read_image, self.read_mask = str(root), read_image, read_mask
        self._images = PathTable(pair.image for pair in pairs)
        self._masks = PathTable(pair.mask or "" for pair in pairs)

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """Return the image's path relative to the root."""
        return self._images[index]

    def pair(self, index: int) -> Pair:
        """Return the paths of an image and its mask."""
        return Pair(self._images[index], self._masks[index] or None)

    def has_mask(self, index: int) -> bool:
        """Tell whether an image has a mask."""
        return bool(self._masks[index])

    def listing(self, index: int) -> str:
        """Return the line that names an image, and its mask if it has one, in a list file."""
        image, mask = self.pair(index)
        return f"{image}\t{mask}" if mask else image

    def image(self, index: int) -> Image:
        """Read an image, (H, W, channels)."""
        return self.read_image(os.path.join(self.root, self._images[index]))

    def mask(self, index: int) -> Mask:
        """Read a mask, (H, W)."""
        return self.read_mask(self._mask_path(index))

    def stamp(self, index: int) -> str:
        """Return what changes when the image, its mask, or how they are read changes."""
        image = os.path.realpath(os.path.join(self.root, self._images[index]))
        parts = [image, stamp(image), self.read_image.describe()]
        if mask := self._masks[index]:
            parts += [mask, stamp(os.path.join(self.root, mask)), self.read_mask.describe()]
        return " ".join(parts)

    def _mask_path(self, index: int) -> str:
        if not (mask := self._masks[index]):
            raise UserError(f"expected a mask for the image {self.name(index)}, but it has none")
        return os.path.join(self.root, mask)
