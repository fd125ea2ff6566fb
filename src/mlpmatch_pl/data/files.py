"""Find and pair image and mask files, and read them as a source."""

from __future__ import annotations

import csv
import os
import posixpath
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlpmatch_pl.data.base import Image, Mask
from mlpmatch_pl.data.readers.image import IMAGE_SUFFIXES, MASK_SUFFIXES, ImageReader
from mlpmatch_pl.data.readers.mask import MaskReader
from mlpmatch_pl.utils.errors import UserError


class Pair(NamedTuple):
    """An image and its mask, if it has one, as paths relative to a root, or absolute outside of it."""

    image: str
    mask: str | None


class FileIndex:
    """Finds and pairs the files below one or several roots.

    Args:
        roots: Folders with ``images`` and ``masks``.
        images: Folder with the images, below each root, with any subfolders.
        masks: Folder with the masks, below each root.
        known: All pairs, if the dataset's own layout determines them; they are not searched for.
        find_mask: Maps a mask's path in a list to that of the file to read, if they differ.

    Raises:
        UserError: If a root is not a folder.
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
        """Pair all images with the masks that have the same relative path without suffix."""
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
        """Return the pairs of a list file, a CSV file or a folder, relative to the root or the working directory.

        Args:
            name: A list with ``image mask`` or ``image`` lines, a CSV file with the columns image and mask, a folder
                with images and masks as subfolders, a folder below that of the images, or any folder with images.
            with_masks: Whether masks are needed. If not, those in a list need not exist.

        Raises:
            UserError: If the file or folder does not exist or is empty, or a file in a list does not exist.
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
        """Add masks to pairs without one: from known pairs, or else by path in the mask folder."""
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
            "write a fraction as 1/8 or a count as 92"
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
        labels = {} if masks is None else self._by_stem(masks, MASK_SUFFIXES)
        if not found:
            raise UserError(f"expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {images}, but found none")
        if lonely := sorted(set(labels) - set(found)):
            raise UserError(
                f"expected an image for every mask, but {labels[lonely[0]]} has none ({len(lonely)} in total); "
                "an image and its mask have the same path below their folders, without suffix"
            )
        return [Pair(image, labels.get(stem)) for stem, image in found.items()]

    def _by_stem(self, folder: Path, suffixes: Collection[str] = IMAGE_SUFFIXES) -> dict[str, str]:
        """Return the image files below a folder by their path in it without suffix, sorted."""
        found: dict[str, str] = {}
        for path in sorted(image_files(str(folder), suffixes)):
            stem = posixpath.splitext(os.path.relpath(path, folder).replace(os.sep, "/"))[0]
            if stem in found:
                raise UserError(
                    f"expected one file named {stem} in {folder}, but found {found[stem]} and {os.path.basename(path)}"
                )
            found[stem] = self._named(path)
        return found

    def _named(self, path: str) -> str:
        """Return a unique name of a file: its path relative to the base, or absolute outside of it."""
        real = os.path.realpath(path)
        for absolute, base in ((os.path.abspath(path), os.path.abspath(self.base)), (real, self._real_base)):
            prefix = base.rstrip(os.sep) + os.sep
            if absolute.startswith(prefix):
                return absolute.removeprefix(prefix).replace(os.sep, "/")
        return real.replace(os.sep, "/")

    def _read_list(self, path: Path, with_masks: bool) -> list[Pair]:
        content = path.read_bytes()
        if b"\0" in content:
            raise UserError(f"expected a list in UTF-8, but {path} is not; save it in UTF-8, or use a folder")
        text = content.decode("utf-8-sig", errors="surrogateescape")  # names may be any bytes
        lines = text.replace("\r", "\n").split("\n")
        rows = _csv_rows(lines, path) if path.suffix.lower() == ".csv" else self._list_rows(lines, path)
        pairs = [self._pair(row, path, with_masks) for row in rows]
        if not pairs:
            raise UserError(f"expected at least one image in the list {path}, but it is empty")
        if twice := next((name for name, count in Counter(pair.image for pair in pairs).items() if count > 1), None):
            raise UserError(f"expected every image once in the list {path}, but {twice} occurs more than once")
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
        image = self._existing(row[0], path)
        mask = row[1] if with_masks and len(row) > 1 else ""
        if mask and self._find_mask:
            mask = self._find_mask(mask)
        return Pair(image, self._existing(mask, path) if mask else None)

    def _existing(self, name: str, path: Path) -> str:
        """Return the unique name of a listed file, so that overlaps of lists are found."""
        if ".." in name.split("/"):
            raise UserError(f"expected paths below {self.base} in {path}, but found {name!r}")
        if not os.path.isfile(os.path.join(self.base, name)):
            if not name.isprintable():
                raise UserError(f"expected the list {path} in UTF-8, but it is not; save it in UTF-8")
            raise UserError(f"expected the file {self.base / name}, which {path} lists, but it does not exist")
        return self._named(name) if name.startswith("/") else posixpath.normpath(name)


def image_files(folder: str, suffixes: Collection[str] = IMAGE_SUFFIXES) -> Iterator[str]:
    """Yield the files with these suffixes below a folder, without hidden files and pipes; links are followed once."""
    visited = set()  # links may lead back to a parent folder
    for directory, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        for name in names:
            path = os.path.join(directory, name)
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith(".") and _is_readable(path):
                yield path


def _is_readable(path: str) -> bool:
    """Tell whether a path is a regular file; reading a pipe or a device may never end."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # reading a broken link raises an error that names it
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
        # Forked workers share an array's memory; a list of strings is copied, as Python counts references.
        self._images = np.array([os.fsencode(pair.image) for pair in pairs], np.bytes_)
        self._masks = np.array([os.fsencode(pair.mask or "") for pair in pairs], np.bytes_)

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """Return the image's path relative to the root."""
        return os.fsdecode(self._images[index])

    def pair(self, index: int) -> Pair:
        """Return the paths of an image and its mask."""
        return Pair(self.name(index), os.fsdecode(self._masks[index]) or None)

    def has_mask(self, index: int) -> bool:
        """Tell whether an image has a mask."""
        return bool(self._masks[index])

    def listing(self, index: int) -> str:
        """Return the image's line in a list file: its path, and that of the mask if it has one."""
        image, mask = self.pair(index)
        return f"{image}\t{mask}" if mask else image

    def image(self, index: int) -> Image:
        """Read an image, (H, W, channels)."""
        return self.read_image(os.path.join(self.root, self.name(index)))

    def mask(self, index: int) -> Mask:
        """Read a mask, (H, W).

        Raises:
            UserError: If the image has none, or it cannot be read.
        """
        image, mask = self.pair(index)
        if mask is None:
            raise UserError(f"expected a mask for the image {image}, but it has none")
        return self.read_mask(os.path.join(self.root, mask))

    def stamp(self, index: int) -> str:
        """Return a string that changes when the image, its mask, or the way they are read changes."""
        image, mask = self.pair(index)
        path = os.path.join(self.root, image)
        parts = [os.path.realpath(path), _size_and_time(path), self.read_image.describe()]
        if mask:
            parts += [mask, _size_and_time(os.path.join(self.root, mask)), self.read_mask.describe()]
        return " ".join(parts)


def _size_and_time(path: str) -> str:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return "missing"
    return f"{status.st_size}:{status.st_mtime_ns}"
