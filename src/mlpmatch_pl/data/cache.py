"""Decoded images and masks in one memory-mapped file, shared by all workers and ranks of a machine.

A run that reads the same files again and again decodes them once. Decoded images take much room: VOC's 10,582 about
6 GB, Cityscapes' 2,975 about 19 GB; what fits into memory stays there, the rest is read from the disk.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from mlpmatch_pl.data.base import Image, ImageSource, Mask, SegmentationData, has_mask
from mlpmatch_pl.data.cache_file import ALIGNMENT, ArrayFile, write_arrays
from mlpmatch_pl.utils.cpu import reader_threads
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.prefetch import ordered_map

SAMPLED = 32  # images that are decoded to estimate the room that all need
_GB = 1e9
_ADVICE = "make room, choose another folder by loader.cache, or set loader.cache=null"
_Job = tuple[int, bool]  # an image's index, and whether its mask is meant

log = logging.getLogger(__name__)


class StampedImageSource(ImageSource, Protocol):
    """A source that can tell whether an image or its mask has changed."""

    def stamp(self, index: int) -> str:
        """Return what changes with the image and its mask: names, sizes, times of change, and the reader's options."""


class CachedSource:
    """A source whose images are decoded once, see `mlpmatch_pl.data.base.ImageSource`.

    The file is made when the object is: at the first time, or again if a file, an option or the choice of images has
    changed since, or the file is incomplete. The images that it gives out cannot be written to. The object pickles
    to worker processes without its images.

    Args:
        source: The images; it must have ``stamp(index)``, see `StampedImageSource`.
        path: The cache file. Its folder is created.
        indices: The images to keep, all of them if left out. Others are read from the source.
        masked: The images whose masks are kept, none if left out.

    Raises:
        UserError: If the source has no stamps, or the disk has too little room.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> class Squares:
        ...     def __len__(self): return 2
        ...     def name(self, index): return f"square {index}"
        ...     def stamp(self, index): return self.name(index)
        ...     def image(self, index): return np.full((2, 2, 3), index, np.uint8)
        ...     def mask(self, index): return np.zeros((2, 2), np.uint8)
        >>> folder = TemporaryDirectory()
        >>> cached = CachedSource(Squares(), Path(folder.name, "squares.cache"))
        >>> cached.image(1)[0, 0].tolist(), cached.image(1).flags.writeable
        ([1, 1, 1], False)
    """

    def __init__(
        self, source: ImageSource, path: Path, indices: Iterable[int] | None = None, masked: Iterable[int] = ()
    ) -> None:
        if not hasattr(source, "stamp"):
            raise UserError(
                f"expected files for loader.cache, but {type(source).__name__} has no stamps to tell whether an image "
                "has changed; set loader.cache=null, or give the source a method stamp(index)"
            )
        self.source, self.path = cast(StampedImageSource, source), Path(path)
        jobs = [(index, False) for index in sorted(set(range(len(source)) if indices is None else indices))]
        jobs += [(index, True) for index in sorted(set(masked))]
        self._images = _places(jobs, False, len(source))
        self._masks = _places(jobs, True, len(source))
        self._key = _key(self.source, jobs)
        self._arrays: ArrayFile | None = self._ready(jobs)

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Return the source's name of an image."""
        return self.source.name(index)

    def stamp(self, index: int) -> str:
        """Return the source's stamp of an image."""
        return self.source.stamp(index)

    def has_mask(self, index: int) -> bool:
        """Tell whether an image has a mask, as the source does."""
        return has_mask(self.source, index)

    def image(self, index: int) -> Image:
        """Return an image, (H, W, C), read-only if it comes from the cache."""
        place = int(self._images[index])
        return self.source.image(index) if place < 0 else self._file()[place]

    def mask(self, index: int) -> Mask:
        """Return a mask, (H, W), read-only if it comes from the cache."""
        place = int(self._masks[index])
        return self.source.mask(index) if place < 0 else self._file()[place][..., 0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}  # a worker opens the file anew

    def _file(self) -> ArrayFile:
        if self._arrays is None:
            try:
                self._arrays = ArrayFile(self.path, self._key)
            except ValueError as error:
                raise UserError(
                    f"expected the cache {self.path} as this run made it, but {error}; start the run again"
                ) from error
        return self._arrays

    def _ready(self, jobs: Sequence[_Job]) -> ArrayFile:
        try:
            return ArrayFile(self.path, self._key)
        except ValueError as error:
            log.info("building the cache %s: %s", self.path, error)
        started = time.perf_counter()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _check_room(self.source, jobs, self.path)
            write_arrays(self.path, _decoded(self.source, jobs), self._key)
        except OSError as error:
            raise UserError(f"cannot write the cache {self.path} ({error.strerror}); {_ADVICE}") from error
        size, seconds = self.path.stat().st_size / _GB, time.perf_counter() - started
        log.info("built the cache %s: %d arrays, %.2f GB, %.0f s", self.path, len(jobs), size, seconds)
        return ArrayFile(self.path, self._key)


def with_cache(data: SegmentationData, folder: Path, unlabeled: bool = True) -> SegmentationData:
    """Return a data set whose images, and the masks that are used, are decoded once.

    Images and labeled masks have a file each, so that another choice of labels does not decode all images anew. The
    files are named after the images in them; several data sets can share a folder.

    Args:
        data: The data set.
        folder: Where the files are, or will be built.
        unlabeled: Whether unlabeled images are used.

    Raises:
        UserError: If the source has no stamps, or the disk has too little room.
    """
    used = sorted({*data.labeled_indices, *(data.unlabeled if unlabeled else ())})
    images = CachedSource(data.train, folder / f"images_{_hash(data.train, used)}.cache", used)
    labeled = data.labeled_indices
    train = CachedSource(images, folder / f"masks_{_hash(data.train, labeled)}.cache", (), labeled)
    val, test = (None if source is None else _whole(source, folder) for source in (data.val, data.test))
    return replace(data, train=train, val=cast(ImageSource, val), test=test)


def _whole(source: ImageSource, folder: Path) -> CachedSource:
    indices = range(len(source))
    return CachedSource(source, folder / f"evaluation_{_hash(source, indices)}.cache", indices, indices)


def _hash(source: ImageSource, indices: Iterable[int]) -> str:
    names = "\n".join(source.name(index) for index in indices)
    place = getattr(source, "root", "")  # two data sets may have equal names
    return hashlib.sha256(f"{os.path.realpath(place)}\n{names}".encode(errors="surrogateescape")).hexdigest()[:12]


def _places(jobs: Sequence[_Job], masks: bool, count: int) -> NDArray[np.int32]:
    """Return where the image (or the mask) of each index is in the file, -1 for those that are not."""
    places = np.full(count, -1, np.int32)
    for place, (index, is_mask) in enumerate(jobs):
        if is_mask == masks:
            places[index] = place
    return places


def _key(source: StampedImageSource, jobs: Iterable[_Job]) -> bytes:
    digest = hashlib.sha256()
    for index, is_mask in jobs:
        digest.update(f"{is_mask} {source.name(index)}\0{source.stamp(index)}\n".encode())
    return digest.digest()


def _decode(source: ImageSource, job: _Job) -> NDArray[Any]:
    index, is_mask = job
    try:
        return source.mask(index)[..., None] if is_mask else source.image(index)
    except OSError as error:  # not to be taken for one of the cache file
        raise UserError(f"cannot read {source.name(index)} for the cache ({error}); replace or remove it") from error


def _decoded(source: ImageSource, jobs: Sequence[_Job]) -> Iterator[NDArray[Any]]:
    """Decode in threads, in order, and not much further ahead than the disk writes."""
    return ordered_map(partial(_decode, source), jobs, reader_threads())


def _check_room(source: ImageSource, jobs: Sequence[_Job], path: Path) -> None:
    """Refuse a disk that is too small, by the size of some images.

    Raises:
        UserError: If there is less room than all the images will need.
    """
    needed = sum(_estimate(source, [job for job in jobs if job[1] is masks]) for masks in (False, True))
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"expected {needed / _GB:.2f} GB of free disk for the cache {path}, but {free / _GB:.2f} GB are free; "
            f"{_ADVICE}"
        )


def _estimate(source: ImageSource, jobs: Sequence[_Job]) -> int:
    sampled = jobs[:: max(len(jobs) // SAMPLED, 1)]
    size = sum(_decode(source, job).nbytes + ALIGNMENT for job in sampled)
    return size * len(jobs) // max(len(sampled), 1)
