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
from numpy.typing import NDArray

from mlpmatch_pl.data.base import FileFacts, Image, Mask
from mlpmatch_pl.data.pairing import (
    NameRule,
    find_rule,
    mask_pattern,
    nearest,
    normalized,
    pair_names,
    require_pattern,
    suggested_rule,
)
from mlpmatch_pl.data.readers.image import HEIF_SUFFIXES, IMAGE_SUFFIXES, MASK_SUFFIXES, ImageReader, read_orientation
from mlpmatch_pl.data.readers.mask import MaskReader
from mlpmatch_pl.data.readers.stored import has_transparent_pixels, read_palette
from mlpmatch_pl.data.readers.windows import Window, tiff_facts
from mlpmatch_pl.utils.errors import UserError

# Files that usually lie beside images: text, metadata, world files
_NOT_IMAGES = frozenset(
    {
        ".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".ini",
        ".html", ".pdf", ".log", ".db", ".py", ".ipynb", ".ovr", ".aux", ".prj", ".tfw", ".jgw",
        ".pgw", ".wld", ".zip", ".gz", ".tar", ".sha256", ".md5", ".part",
    }
)  # fmt: skip
_TWIN = "\0mask"  # marks the mask's name in a folder where it is also the image's


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
        image_name: Pattern of the images' names, such as ``*_sat``; None for any.
        mask_name: Pattern of the masks' names, such as ``*_mask``; None for the names of the images, or, if no mask
            has one, the only word that makes all masks' names of images' names.

    Attributes:
        notes: What was found without being configured, one sentence each.

    Raises:
        UserError: If a root is not a folder, or a pattern has no ``*``.
    """

    def __init__(
        self,
        roots: Sequence[Path],
        images: str,
        masks: str,
        known: Iterable[Pair] = (),
        find_mask: Callable[[str], str] | None = None,
        image_name: str | None = None,
        mask_name: str | None = None,
    ) -> None:
        require_pattern("dataset.image_name", image_name)
        require_pattern("dataset.mask_name", mask_name)
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
        self._rule = NameRule(image_name or "*", mask_name or "*") if image_name or mask_name else None
        self.notes: list[str] = []
        self._by_name: dict[str, dict[str, str]] = {}
        self._paired_by = self._rule or NameRule()

    def discover(self) -> list[Pair]:
        """Pair all images with their masks: with the same relative path without suffix, or named by a rule."""
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

    def held_out(self, name: str) -> list[Pair]:
        """Return the pairs of a validation or test part; if it is the whole root, only those with a mask."""
        pairs = self.with_masks(self.part(name), {})
        masked = [pair for pair in pairs if pair.mask]
        whole = os.path.realpath(self._find(name)) in map(os.path.realpath, self.roots)
        if not masked or len(masked) == len(pairs) or not whole:
            return pairs
        bare = next(pair.image for pair in pairs if not pair.mask)
        self.notes.append(
            f"{bare} has no mask ({len(pairs) - len(masked)} such images of {len(pairs)}); it is not scored"
        )
        return masked

    def require_masks(self, pairs: Sequence[Pair], what: str) -> None:
        """Raise a `UserError` that names the first image without mask, the rule of names, and the nearest mask."""
        bare = [pair.image for pair in pairs if not pair.mask]
        if not bare:
            return
        masks = {*self._names_below(self.masks).values(), *(pair.mask for pair in pairs if pair.mask)}
        by_stem = {posixpath.splitext(mask)[0]: mask for mask in masks}
        near = nearest(posixpath.splitext(bare[0])[0], by_stem)
        raise UserError(
            f"expected a mask for every {what}, but {bare[0]} has none ({len(bare)} in total); "
            f"{self._explain(self._paired_by)}" + (f"; the nearest mask is {by_stem[near]}" if near else "")
        )

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
        """Pair the images of a folder with the masks of another one, or of the same one; None for no masks."""
        together = masks is None or os.path.realpath(masks) == os.path.realpath(images)
        found = self._by_stem(images, None if together else masks, twins=masks is not None and together)
        if together:
            pattern = self._rule.mask if self._rule else mask_pattern(found, str(images))
            both = {name: file for name, file in found.items() if name.endswith(_TWIN)}
            if pattern and pattern != "*":
                rule = NameRule(mask=pattern)
                both |= {name: file for name, file in found.items() if rule.key(name, "mask") is not None}
            elif self._rule:
                both |= {name: file for name, file in found.items() if self._rule.key(name, "image") is None}
            labels = {name.removesuffix(_TWIN): file for name, file in both.items()}
            found = {name: file for name, file in found.items() if name not in both}
            if masks is not None and not labels:
                raise UserError(
                    f"expected names that tell masks from images, which are both in {images}, but found none; set the "
                    "pattern of the masks, as in 'dataset.mask_name=*_mask'"
                )
        else:
            labels = self._by_stem(masks, images, suffixes=MASK_SUFFIXES) if masks else {}
        if not found:
            others: list[str] = []
            list(image_files(str(images), unread=others))
            instead = f"only {count_suffixes(others)}; convert them" if others else "none"
            raise UserError(f"expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {images}, but found {instead}")
        self._paired_by = rule = self._rule or find_rule(found, labels) or NameRule()
        pairs, lonely = pair_names(found, labels, rule)
        if not pairs:
            raise UserError(f"expected images named {rule.image} in {images}, but found none; set dataset.image_name")
        if lonely and not (together and masks is None):
            raise UserError(
                f"expected an image for every mask, but {labels[min(lonely)]} has none ({len(lonely)} in total); "
                f"{self._explain(rule)}{self._near(min(lonely), found)}"
            )
        if rule != (self._rule or NameRule()) and labels:
            note = f"the masks in {masks or images} are paired by the names {rule.mask}, as {rule.options()} would do"
            self.notes += [note] if note not in self.notes else []
        return [Pair(image, mask) for image, mask in pairs.items()]

    def _explain(self, rule: NameRule) -> str:
        if rule == NameRule():
            return "an image and its mask have the same path below their folders, without suffix"
        return f"images are named {rule.image} and masks {rule.mask}, with the same path and * below their folders"

    def _near(self, mask: str, images: Mapping[str, str]) -> str:
        """Return a clause with the image whose name is nearest to a mask's, and the options that would pair them."""
        near = nearest(mask, images)
        if near is None:
            return ""
        rule = suggested_rule(near, mask)
        return f"; the nearest image is {images[near]}" + (f", paired by {rule.options()}" if rule else "")

    def _by_stem(
        self,
        folder: Path,
        other: Path | None = None,
        twins: bool = False,
        suffixes: Collection[str] = IMAGE_SUFFIXES,
    ) -> dict[str, str]:
        """Return the image files below a folder by their normalized path in it without suffix, sorted.

        Args:
            folder: The folder.
            other: A folder whose files don't count, if it is inside.
            twins: Whether a photo and a PNG or TIFF file may have the same name, because the latter is its mask. NPY
                files are masks anyway.
            suffixes: Suffixes of the files.
        """
        suffixes = MASK_SUFFIXES if twins else suffixes
        found: dict[str, str] = {}
        inside = os.path.join(os.path.realpath(other), "") if other else None
        if inside and not inside.startswith(os.path.join(os.path.realpath(folder), "")):
            inside = None
        unread: list[str] = []
        paths = sorted(image_files(str(folder), suffixes, unread))
        unread = [path for path in unread if not (inside and os.path.realpath(path).startswith(inside))]
        if unread:
            note = (
                f"{len(unread):,} files in {folder} are left out, because they cannot be read: {count_suffixes(unread)}"
            )
            self.notes += [note] if note not in self.notes else []
        for path in paths:
            if inside and os.path.realpath(path).startswith(inside):
                continue
            relative = os.path.relpath(path, folder).replace(os.sep, "/")
            stem, suffix = posixpath.splitext(normalized(relative))
            if suffix.lower() == ".npy" and twins:
                stem += _TWIN
            elif stem in found and twins and _is_lossy(found[stem]) != _is_lossy(suffix):
                if not _is_lossy(found[stem]):
                    found[stem], found[stem + _TWIN] = self._named(path), found[stem]
                    continue
                stem += _TWIN
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
            if "\t" not in line and len(parts) > 1 and self._is_one_name(line, parts[0]):
                parts = [line]
            if len(parts) > 2:
                raise UserError(
                    f"expected 'image mask' in {path}, but found {line!r}; separate names with spaces by a tab"
                )
            yield parts

    def _is_one_name(self, line: str, first: str) -> bool:
        """Tell whether a line is a name with spaces."""
        if (self.base / line).is_file():
            return True
        if (self.base / first).is_file():
            return False
        known = self._names_below(self.images)
        return normalized(line) in known or normalized(posixpath.splitext(line)[0]) in known

    def _pair(self, row: Sequence[str], path: Path, with_masks: bool) -> Pair:
        image = self._existing(row[0], path, self.images)
        mask = row[1] if with_masks and len(row) > 1 else ""
        if mask and self._find_mask:
            mask = self._find_mask(mask.replace("\\", "/").lstrip("/"))
        return Pair(image, self._existing(mask, path, self.masks) if mask else None)

    def _existing(self, name: str, path: Path, folder: str) -> str:
        """Return the unique name of a listed file, so that overlaps of lists are found.

        Lists are of many kinds: paths below the root, perhaps with a leading slash or Windows' backslashes, paths below
        the folder of the images or masks, and names without suffix.
        """
        slashed = name.replace("\\", "/")
        if ".." in slashed.split("/"):
            raise UserError(f"expected paths below {self.base} in {path}, but found {name!r}")
        for spelled in (name, slashed, slashed.lstrip("/")):
            if os.path.isfile(os.path.join(self.base, spelled)):
                return self._named(spelled) if spelled.startswith("/") else posixpath.normpath(spelled)
        if not name.isprintable():
            raise UserError(f"expected the list {path} in UTF-8, but it is not; save it in UTF-8")
        known = self._names_below(folder)
        wanted = normalized(posixpath.normpath(slashed.lstrip("/")))
        stem, suffix = posixpath.splitext(wanted)
        found = known.get(wanted) or known.get(stem)
        if found and (wanted in known or normalized(posixpath.splitext(found)[1]).lower() == suffix.lower()):
            return found
        near = nearest(wanted, known)
        raise UserError(
            f"expected the file {self.base / name}, which {path} lists, but it does not exist"
            + (f"; the nearest is {known[near]}" if near else "")
        )

    def _names_below(self, folder: str) -> dict[str, str]:
        """Return the files below a folder by their normalized path without suffix, below that folder or the base."""
        if folder not in self._by_name:
            found: dict[str, str] = {}
            if self.known:
                files = (pair.image if folder == self.images else pair.mask for pair in self.known.values())
                found = {posixpath.splitext(posixpath.basename(file))[0]: file for file in files if file}
            else:
                for root in self.roots:
                    suffixes = IMAGE_SUFFIXES if folder == self.images else MASK_SUFFIXES
                    for file in image_files(str(root / folder), suffixes):
                        relative = os.path.relpath(file, root / folder).replace(os.sep, "/")
                        found[normalized(posixpath.splitext(relative)[0])] = self._named(file)
            found |= {normalized(posixpath.splitext(file)[0]): file for file in found.values()}
            self._by_name[folder] = found
        return self._by_name[folder]


def _is_lossy(name: str) -> bool:
    """Tell whether a file's name is that of a photo rather than of a mask."""
    return posixpath.splitext(name)[1].lower() in (".jpg", ".jpeg", ".webp", ".jp2")


def image_files(
    folder: str, suffixes: Collection[str] = IMAGE_SUFFIXES, unread: list[str] | None = None
) -> Iterator[str]:
    """Yield the files with these suffixes below a folder, without hidden files and pipes; links are followed once.

    Args:
        folder: The folder.
        suffixes: Suffixes of the files.
        unread: Receives the files with other suffixes, except those of text and metadata.
    """
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
            suffix = os.path.splitext(name)[1].lower()
            if suffix in suffixes and not name.startswith(".") and _is_readable(path):
                yield path
            elif unread is not None and suffix not in suffixes and is_left_out(name) and _is_readable(path):
                unread.append(path)


def is_left_out(name: str) -> bool:
    """Tell whether a file may be an image that cannot be read: neither an image nor text, metadata or hidden.

    Example:
        >>> is_left_out("a.raw"), is_left_out("a.png"), is_left_out("notes.txt")
        (True, False, False)
    """
    suffix = os.path.splitext(name)[1].lower()
    return suffix not in _NOT_IMAGES | IMAGE_SUFFIXES and not name.startswith(".")


def count_suffixes(paths: Iterable[str]) -> str:
    """Count files by suffix, and say what would read them.

    Example:
        >>> count_suffixes(["a.jxl", "b.JXL", "c.raw"])
        '2 .jxl, 1 .raw'
    """
    counts = Counter(os.path.splitext(path)[1].lower() or "without suffix" for path in paths)
    text = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())
    return f"{text} (pip install 'mlpmatch_pl[heic]' to read .heic)" if HEIF_SUFFIXES & set(counts) else text


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

    def image(self, index: int, window: Window | None = None) -> Image:
        """Read an image, (H, W, channels), or a window of a TIFF file."""
        return self.read_image(os.path.join(self.root, self.name(index)), window)

    def tiff_size(self, index: int) -> tuple[int, int] | None:
        """Return height and width of a TIFF file, of which windows can be read; None for others."""
        facts = tiff_facts(os.path.join(self.root, self.name(index)))
        return facts and facts.size

    def mask(self, index: int, window: Window | None = None) -> Mask:
        """Read a mask, (H, W), or a window of it.

        Raises:
            UserError: If the image has none, or it cannot be read.
        """
        image, mask = self.pair(index)
        if mask is None:
            raise UserError(f"expected a mask for the image {image}, but it has none")
        labels = self.read_mask(os.path.join(self.root, mask), window)
        hidden = self.transparent(index, window)
        if hidden is not None and hidden.shape == labels.shape:
            labels = np.where(hidden, np.uint8(self.read_mask.ignore_index), labels)
        return labels

    def transparent(self, index: int, window: Window | None = None) -> NDArray[np.bool_] | None:
        """Return the wholly transparent pixels of an image, (H, W), or None; they are ignored in its mask."""
        return self.read_image.transparent(os.path.join(self.root, self.name(index)), window)

    def file_facts(self, index: int) -> FileFacts:
        """Return the orientation tag of the image, the palette of the mask, and the transparency of both."""
        image, mask = self.pair(index)
        image_path, mask_path = os.path.join(self.root, image), os.path.join(self.root, mask or "")
        return FileFacts(
            read_orientation(image_path) if self.read_image.orientation == "apply" else 1,
            read_palette(mask_path) if mask and self.read_mask.trusts_palette_ids else b"",
            self.transparent(index) is not None or (mask is not None and has_transparent_pixels(mask_path)),
        )

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
