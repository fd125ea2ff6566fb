"""Bad data is found at the door: what is wrong with a data set, in sentences.

An error is what training would stumble over or what would make its result worthless; a warning is what a user should
know. `check_data` runs at the start of every training; the command ``check`` reads everything.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlpmatch_pl.data.inspection import PARTS, Inspected, Job, all_jobs, inspect, sample
from mlpmatch_pl.data.sources import SegmentationData
from mlpmatch_pl.errors import UserError

log = logging.getLogger(__name__)
MOST_FILES = 2000  # that are read at the start of a training


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or that a user should know.

    Attributes:
        is_error: Whether training refuses it.
        message: A sentence.
    """

    is_error: bool
    message: str


def check_data(data: SegmentationData, crop_size: int, skip_bad: bool = False) -> set[tuple[int, int]]:
    """Read the files that will be used, or 2,000 of them spread over all sets, and refuse what is an error.

    Args:
        data: The data set.
        crop_size: Height and width of the training views.
        skip_bad: Whether training images that cannot be read are named only, as training will leave them out.

    Returns:
        The sizes of the evaluation images that were read, (height, width).

    Raises:
        UserError: For the first error.
    """
    require_validation(data)
    jobs = all_jobs(data)
    chosen = jobs if len(jobs) <= MOST_FILES else sample(jobs, MOST_FILES)
    if len(chosen) < len(jobs):
        log.info("read %d of %d files; python -m mlpmatch_pl.check reads all", len(chosen), len(jobs))
    inspected = []
    for item in inspect(data, chosen, thorough=False):
        if item.problem is None:
            inspected.append(item)
        elif skip_bad and item.part in ("labeled", "unlabeled"):
            log.warning("note: %s; it will be left out", item.problem)
        else:
            raise UserError(item.problem)
    whole = {part for part in PARTS if _number(jobs, part) == _number(chosen, part)}
    for finding in find(data, inspected, crop_size, whole):
        if finding.is_error:
            raise UserError(finding.message)
        log.warning("note: %s", finding.message)
    return {item.size for item in inspected if item.part in ("val", "test")}


def require_validation(data: SegmentationData) -> None:
    """Refuse a data set without validation images."""
    if not len(data.val):
        raise UserError("expected at least 1 validation image, but there is none; set dataset.val")


def _number(jobs: Iterable[Job], part: str) -> int:
    return sum(job.part == part for job in jobs)


def find(
    data: SegmentationData, inspected: Sequence[Inspected], crop_size: int, whole: Collection[str] = PARTS
) -> list[Finding]:
    """Say what is wrong with a data set, given what was found in its files; errors first.

    Args:
        data: The data set.
        inspected: What was found.
        crop_size: Height and width of the training views.
        whole: The parts of which every file was read; of the others nothing is concluded from what was not found.

    Example:
        >>> from mlpmatch_pl.data.shapes import shapes
        >>> data = shapes(labeled=4, train=8, val=2, test=2)
        >>> find(data, list(inspect(data, all_jobs(data), thorough=True)), crop_size=64)
        []
    """
    good = [item for item in inspected if item.problem is None]
    # One a file: each has its own remedy.
    findings = [Finding(True, item.problem) for item in inspected if item.problem is not None]
    findings += [*_classes(data, good, whole), *_copies(good), *_sizes(good, crop_size)]
    return sorted(findings, key=lambda finding: not finding.is_error)


def pixels_by_class(inspected: Iterable[Inspected], part: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels and the images of each class in a part, and last of what does not count."""
    counts = [item.pixels_C1 for item in inspected if item.part == part and item.pixels_C1 is not None]
    table = np.stack(counts) if counts else np.zeros((0, num_classes + 1), np.int64)
    return table.sum(0), (table > 0).sum(0)


def _classes(data: SegmentationData, inspected: Sequence[Inspected], whole: Collection[str]) -> Iterator[Finding]:
    names = data.class_names
    labeled, _ = pixels_by_class(inspected, "labeled", len(names))
    found = [name for name, pixels in zip(names, labeled[:-1], strict=True) if pixels]
    if len(found) < 2 and "labeled" in whole:
        ignored = f" and {data.ignore_index} (ignore)" if labeled[-1] else ""
        yield Finding(
            True,
            f"expected at least two classes in the labeled masks, but they hold only {', '.join(found) or 'no class'}"
            f"{ignored}; if other values stand for classes in your files, map them, as in "
            "'dataset.mask_values={0:0,255:1}', else label images that show them",
        )
        return
    evaluated, _ = pixels_by_class(inspected, "val", len(names))
    for part, word, pixels in (("labeled", "labeled", labeled), ("val", "validation", evaluated)):
        missing = [name for name, count in zip(names, pixels[:-1], strict=True) if not count]
        if missing and part in whole:
            noun = "class" if len(missing) == 1 else "classes"
            yield Finding(False, f"no {word} mask holds the {noun} {', '.join(missing)}")
    empty = [item.name for item in inspected if item.pixels_C1 is not None and not item.pixels_C1[:-1].any()]
    if empty:
        message = f"every pixel of the mask of {empty[0]} is ignored ({len(empty)} such masks in all)"
        yield Finding(False, message)


def _copies(inspected: Sequence[Inspected]) -> Iterator[Finding]:
    """Find images that are there twice, under whatever name."""
    by_content: dict[str, list[Inspected]] = defaultdict(list)
    for item in inspected:
        if item.digest:
            by_content[item.digest].append(item)
    shared: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for items in by_content.values():
        first = items[0]
        for other in items[1:]:
            one, two = sorted((first, other), key=lambda item: PARTS.index(item.part))
            shared[one.part, two.part].append((one.name, two.name))
    for (one_part, two_part), pairs in sorted(shared.items()):
        is_error = one_part == "labeled" and two_part in ("val", "test")
        advice = "; remove them from one of the two" if is_error else ""
        where = f"{one_part} images" if one_part == two_part else f"{one_part} and {two_part} images"
        message = (
            f"expected {where} to differ, but {pairs[0][0]} and {pairs[0][1]} hold the same picture "
            f"({len(pairs)} in all){advice}"
        )
        yield Finding(is_error, message)


def _sizes(inspected: Sequence[Inspected], crop_size: int) -> Iterator[Finding]:
    sizes = Counter(item.size for item in inspected if item.part in ("labeled", "unlabeled"))
    small = {size: count for size, count in sizes.items() if min(size) < crop_size}
    if small:
        height, width = min(small)
        message = (
            f"{sum(small.values())} of {sum(sizes.values())} training images read are smaller than the crop of "
            f"{crop_size} pixels (the smallest {width} x {height}); their views are padded, or lower loader.crop_size"
        )
        yield Finding(False, message)
