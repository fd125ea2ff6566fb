"""Decoded images and masks on disk, one `.npy` file each, memory-mapped by all workers and ranks of a machine.

Decoded images need space: about 6 GB for VOC's 10,582 images, 19 GB for Cityscapes' 2,975. What fits into memory stays
in the operating system's page cache.
"""

from __future__ import annotations

import hashlib
import logging
import random
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from mlpmatch_pl.data.base import (
    FileFacts,
    Image,
    ImageSource,
    Mask,
    SegmentationData,
    file_facts,
    has_mask,
    transparent_pixels,
)
from mlpmatch_pl.utils.cpu import reader_threads
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.prefetch import ordered_map
from mlpmatch_pl.utils.progress import progress

ESTIMATE_SAMPLES = 32  # images decoded to estimate the disk space
_ADVICE = "free some space, choose another folder with loader.cache, or set loader.cache=null"
Kind = Literal["image", "mask"]
Job = tuple["CachedSource", int, Kind]

log = logging.getLogger(__name__)


class StampedImageSource(ImageSource, Protocol):
    """A source that can tell whether an image or its mask has changed."""

    def stamp(self, index: int) -> str:
        """Return a string that changes with the image and its mask: path, size, modification time, reader options."""


class CachedSource:
    """Images and masks that are decoded once, see `mlpmatch_pl.data.base.ImageSource`.

    The name of a cached file is a hash of the image's stamp when the object is created. An image that changes therefore
    gets a new file in the next run, and several datasets can share a folder. Arrays from the cache are read-only.

    Args:
        source: The images. It must have ``stamp(index)``, see `StampedImageSource`.
        folder: Folder with the cached files.

    Raises:
        UserError: If the source has no stamps.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> class Squares:
        ...     def __len__(self): return 2
        ...     def name(self, index): return f"square {index}"
        ...     def stamp(self, index): return self.name(index)
        ...     def image(self, index): return np.full((2, 2, 3), index, np.uint8)
        ...     def mask(self, index): return np.zeros((2, 2), np.uint8)
        >>> folder = TemporaryDirectory()
        >>> cached = CachedSource(Squares(), Path(folder.name))
        >>> _ = cached.image(1)  # decoded and stored
        >>> cached.image(1)[0, 0].tolist(), cached.image(1).flags.writeable
        ([1, 1, 1], False)
    """

    def __init__(self, source: ImageSource, folder: Path) -> None:
        if not hasattr(source, "stamp"):
            raise UserError(
                f"expected files for loader.cache, but {type(source).__name__} cannot tell whether an image has "
                "changed; set loader.cache=null, or give the source a method stamp(index)"
            )
        self.source, self.folder = cast(StampedImageSource, source), Path(folder)
        self._keys = np.array([self._key(index) for index in range(len(source))], "S32")  # shared with forked workers

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Return the source's name of an image."""
        return self.source.name(index)

    def has_mask(self, index: int) -> bool:
        """Tell whether an image has a mask."""
        return has_mask(self.source, index)

    def transparent(self, index: int) -> NDArray[np.bool_] | None:
        """Return an image's transparent pixels, (H, W), which are not cached."""
        return transparent_pixels(self.source, index)

    def file_facts(self, index: int) -> FileFacts:
        """Return what the files say about their pixels."""
        return file_facts(self.source, index)

    def image(self, index: int) -> Image:
        """Return an image, (H, W, C)."""
        return self._read(index, "image")

    def mask(self, index: int) -> Mask:
        """Return a mask, (H, W)."""
        return self._read(index, "mask")

    def path(self, index: int, kind: Kind) -> Path:
        """Return the cached file of an image or a mask, whether or not it exists."""
        return self.folder / f"{self._keys[index].decode()}_{kind}.npy"

    def store(self, index: int, kind: Kind) -> NDArray[Any]:
        """Decode an image or a mask, and write its cached file, which appears under its name only when complete."""
        path = self.path(index, kind)
        pixels = self._decode(index, kind)
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # others may write the same file
        try:
            with part.open("xb") as file:
                np.save(file, np.ascontiguousarray(pixels))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return pixels

    def _read(self, index: int, kind: Kind) -> NDArray[Any]:
        path = self.path(index, kind)
        try:
            # np.load checks for zip files and pickles first, which takes longer.
            mapped = np.lib.format.open_memmap(path, mode="r")
            if mapped.offset + mapped.nbytes == path.stat().st_size:
                return np.asarray(mapped)
        except Exception as error:  # a damaged file makes NumPy raise nearly anything
            log.debug("cannot read %s from the cache: %s", path, error)
        try:
            return self.store(index, kind)
        except OSError:  # the cache may be read-only by now, or its disk full
            return self._decode(index, kind)

    def _decode(self, index: int, kind: Kind) -> NDArray[Any]:
        try:
            return self.source.image(index) if kind == "image" else self.source.mask(index)
        except OSError as error:  # must not be mistaken for an error of the cache's disk
            raise UserError(f"cannot read {self.name(index)} ({error}); replace or remove it") from error

    def _key(self, index: int) -> str:
        text = f"{self.source.name(index)}\0{self.source.stamp(index)}"
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]


def with_cache(data: SegmentationData, folder: Path) -> SegmentationData:
    """Return a dataset whose images and masks are cached in a folder, see `CachedSource`.

    Raises:
        UserError: If a source has no stamps.
    """
    train, val = CachedSource(data.train, folder), CachedSource(data.val, folder)
    return replace(data, train=train, val=val, test=None if data.test is None else CachedSource(data.test, folder))


def fill_cache(data: SegmentationData, folder: Path, unlabeled: bool = True, skip_bad: bool = False) -> None:
    """Decode the images and masks that a training reads, where their cached files are missing.

    Args:
        data: The dataset.
        folder: Folder of the cached files. It is created.
        unlabeled: Whether unlabeled images are used.
        skip_bad: Whether to ignore files that cannot be read.

    Raises:
        UserError: If a source has no stamps, a file cannot be read, or the disk has too little space.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [job for job in _jobs(with_cache(data, folder), unlabeled) if not job[0].path(*job[1:]).exists()]
        if jobs:
            _store_all(jobs, folder, skip_bad)
    except OSError as error:
        raise UserError(f"cannot write the cache {folder} ({error.strerror}); {_ADVICE}") from error


def _jobs(data: SegmentationData, unlabeled: bool) -> Iterator[Job]:
    train = cast(CachedSource, data.train)
    yield from ((train, index, "mask") for index in data.labeled_indices)
    yield from ((train, index, "image") for index in (*data.labeled_indices, *(data.unlabeled if unlabeled else ())))
    for source in filter(None, (data.val, data.test)):
        for index in range(len(source)):
            yield from ((cast(CachedSource, source), index, "image"), (cast(CachedSource, source), index, "mask"))


def _store_all(jobs: list[Job], folder: Path, skip_bad: bool) -> None:
    """Store arrays in threads; stop after the first few if the rest would not fit on the disk."""

    def store(job: Job) -> int:
        source, index, kind = job
        try:
            return source.store(index, kind).nbytes
        except UserError:
            if skip_bad:
                return 0
            raise

    random.Random(0).shuffle(jobs)  # the first ones estimate the size of all
    sizes = []
    with progress(f"decoding into the cache {folder}", len(jobs)) as advance:
        for size in ordered_map(store, jobs, reader_threads()):  # decoding releases the GIL
            sizes.append(size)
            advance(1)
            if len(sizes) == ESTIMATE_SAMPLES:
                _require_space(sum(sizes) / len(sizes) * (len(jobs) - len(sizes)), folder)


def _require_space(needed: float, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"expected {needed / 1e9:.2f} GB of free disk space for the cache {folder}, but {free / 1e9:.2f} GB "
            f"are free; {_ADVICE}"
        )
