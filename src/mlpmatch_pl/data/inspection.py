"""Reading files once, in parallel, and what was found in each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpmatch_pl.cores import reader_threads
from mlpmatch_pl.data.sources import Image, Mask, SegmentationData, Source, require_classes, require_same_size
from mlpmatch_pl.errors import UserError
from mlpmatch_pl.spread import spread

PARTS = ("labeled", "val", "test", "unlabeled")
IN_FLIGHT = 256  # files read ahead of their results being taken


@dataclass(frozen=True)
class Job:
    """A file to read: which part it belongs to, and where it is."""

    part: str
    source: Source
    index: int


@dataclass(frozen=True)
class Inspected:
    """What was found in an image and, unless it is unlabeled, its mask.

    Attributes:
        part: labeled, unlabeled, val or test.
        name: The image's name.
        problem: What training would stumble over, as a sentence; the rest is empty then.
        size: Height and width.
        digest: Hash of the decoded image, if it was asked for: equal for copies under other names or formats.
        pixels_C1: Pixels of each class, and last those that do not count; None for unlabeled images.
        channel_sums: Sum and sum of squares of each channel, if asked for, (2, channels).
    """

    part: str
    name: str
    problem: str | None = None
    size: tuple[int, int] = (0, 0)
    digest: str = ""
    pixels_C1: NDArray[np.int64] | None = None
    channel_sums: NDArray[np.float64] | None = None


def all_jobs(data: SegmentationData) -> list[Job]:
    """List every file that training and evaluation will read: those with masks first, so that errors are found soon."""
    jobs = [Job("labeled", data.train, index) for index in data.labeled_indices]
    jobs += [Job("val", data.val, index) for index in range(len(data.val))]
    if data.test is not None:
        jobs += [Job("test", data.test, index) for index in range(len(data.test))]
    return jobs + [Job("unlabeled", data.train, index) for index in data.unlabeled]


def sample(jobs: Sequence[Job], limit: int) -> list[Job]:
    """Take at most ``limit`` jobs: of every part alike, spread evenly over it.

    Example:
        >>> jobs = [Job("val", None, index) for index in range(9)]
        >>> [job.index for job in sample(jobs, 3)]
        [0, 4, 8]
    """
    parts = [[job for job in jobs if job.part == part] for part in PARTS]
    taken: list[Job] = []
    for number, part in enumerate(sorted(filter(None, parts), key=len), 1):
        left = sum(bool(other) for other in parts) - number + 1
        count = min(len(part), (limit - len(taken)) // left)
        taken += spread(part, count)
    return sorted(taken, key=lambda job: (PARTS.index(job.part), job.index))


def inspect(data: SegmentationData, jobs: Sequence[Job], thorough: bool) -> Iterator[Inspected]:
    """Read files in parallel, and yield what was found in the order of the jobs.

    Args:
        data: The data set.
        jobs: Which files.
        thorough: Whether to hash images and add up their channels, too.
    """
    look = _inspector(data, thorough)
    with ThreadPoolExecutor(reader_threads()) as pool:  # decoding releases the interpreter lock
        try:
            for start in range(0, len(jobs), IN_FLIGHT):
                yield from pool.map(look, jobs[start : start + IN_FLIGHT])
        finally:  # the caller may stop at the first problem
            pool.shutdown(cancel_futures=True)


def _inspector(data: SegmentationData, thorough: bool) -> Callable[[Job], Inspected]:
    def look(job: Job) -> Inspected:
        name = job.source.name(job.index)
        try:
            image = job.source.image(job.index)
            pixels = None if job.part == "unlabeled" else _count(data, name, image, job.source.mask(job.index))
        except UserError as error:
            return Inspected(job.part, name, str(error))
        details: dict[str, Any] = {}
        if thorough:
            details = {"digest": _digest(image), "channel_sums": _channel_sums(image)}
        return Inspected(job.part, name, None, (image.shape[0], image.shape[1]), pixels_C1=pixels, **details)

    return look


def _count(data: SegmentationData, name: str, image: Image, mask: Mask) -> NDArray[np.int64]:
    """Count the pixels of each class, and those that do not count."""
    num_classes = len(data.class_names)
    require_same_size(image, mask, name)
    require_classes(mask, name, num_classes, data.ignore_index)
    counts = np.bincount(mask.ravel(), minlength=256)
    return np.append(counts[:num_classes], counts[data.ignore_index])


def _digest(image: Image) -> str:
    hashed = hashlib.blake2b(str((image.shape, image.dtype)).encode(), digest_size=16)
    hashed.update(np.ascontiguousarray(image).data)
    return hashed.hexdigest()


def _channel_sums(image: Image) -> NDArray[np.float64]:
    pixels = image.reshape(-1, image.shape[2])
    if image.dtype != np.uint8:
        values = pixels.astype(np.float64)
        return np.stack([values.sum(0), (values**2).sum(0)])
    counts = np.stack([np.bincount(channel, minlength=256) for channel in pixels.T])  # exact, and faster than floats
    levels = np.arange(256, dtype=np.float64)
    return np.stack([counts @ levels, counts @ levels**2])
