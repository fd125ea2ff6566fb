"""Bad data is found at the door: every file is read once, before the first step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mlpmatch_pl.data.sources import SegmentationData, Source
from mlpmatch_pl.errors import UserError


def check_data(data: SegmentationData) -> set[tuple[int, int]]:
    """Read every image and every mask that will be used, and refuse what training would stumble over.

    Args:
        data: The data set.

    Returns:
        The sizes of the evaluation images, (height, width).

    Raises:
        UserError: For the first file, in order, that is unreadable, differs in size from its image, or holds a value
            that is neither a class nor the ignore index; or if a set is empty.
    """
    if not len(data.val):
        raise UserError("expected at least 1 validation image, but there is none; set dataset.val")
    held_out = [source for source in (data.val, data.test) if source is not None]
    jobs: list[tuple[Source, int, bool]] = [(data.train, index, True) for index in data.labeled_indices]
    jobs += [(source, index, True) for source in held_out for index in range(len(source))]
    jobs += [(data.train, index, False) for index in data.unlabeled]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter lock
        sizes = list(pool.map(_checker(data), jobs))
    return {size for (source, _, _), size in zip(jobs, sizes, strict=True) if source is not data.train}


def _checker(data: SegmentationData) -> Callable[[tuple[Source, int, bool]], tuple[int, int]]:
    classes = range(len(data.class_names))
    allowed = np.zeros(256, dtype=bool)
    allowed[[*classes, data.ignore_index]] = True

    def check(job: tuple[Source, int, bool]) -> tuple[int, int]:
        source, index, with_mask = job
        image = source.image(index)
        size = (image.shape[0], image.shape[1])
        if not with_mask:
            return size
        mask = source.mask(index)
        if image.shape[:2] != mask.shape:
            raise UserError(
                f"expected image and mask of the same size, but {source.name(index)} is "
                f"{image.shape[1]} x {image.shape[0]} and its mask {mask.shape[1]} x {mask.shape[0]} pixels"
            )
        _refuse_values(mask[~allowed[mask]], source.name(index), len(classes), data.ignore_index)
        return size

    return check


def _refuse_values(wrong: Iterable[int], name: str, num_classes: int, ignore_index: int) -> None:
    values = sorted({int(value) for value in np.unique(np.asarray(wrong))})
    if values:
        raise UserError(
            f"expected mask values 0..{num_classes - 1} or {ignore_index} (ignore), but the mask of {name} has "
            f"{', '.join(map(str, values[:5]))}; correct the mask, dataset.classes or dataset.ignore_index"
        )
