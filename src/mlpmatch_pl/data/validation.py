"""Validate a dataset: read files in parallel, and look for problems."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mlpmatch_pl.data.base import (
    SWAPPED,
    FileFacts,
    Image,
    ImageSource,
    Mask,
    SegmentationData,
    file_facts,
    require_classes,
    require_same_size,
)
from mlpmatch_pl.utils.cpu import reader_threads
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.prefetch import ordered_map
from mlpmatch_pl.utils.seeding import evenly_spaced

log = logging.getLogger(__name__)

PARTS = ("labeled", "val", "test", "unlabeled")
MAX_FILES = 2000  # read at the start of a training
# Correlation of thumbnails of 16 x 16 pixels, and share of the evaluation images. Of 400 photos of VOC, 1 % have a
# neighbor that is as similar; of CamVid's frames, every second one.
SIMILAR, SIMILAR_SHARE, FEWEST_SIMILAR, THUMBNAIL = 0.92, 0.2, 3, 16


@dataclass(frozen=True)
class Job:
    """An image to read: its part of the dataset, and its position in a source."""

    part: str
    source: ImageSource
    index: int


@dataclass(frozen=True)
class ScannedFile:
    """The content of an image and, unless it is unlabeled, its mask.

    Attributes:
        part: ``labeled``, ``unlabeled``, ``val`` or ``test``.
        name: The image's name.
        problem: Why training cannot use it, as a sentence. If set, the other attributes are empty.
        size: Height and width.
        digest: Hash of the decoded image, if requested: equal for copies under other names or formats.
        pixels_C1: Number of pixels of each class, and of ignored pixels at the end; None for unlabeled images.
        facts: What the files say about their pixels.
        channel_sums: Sum and sum of squares of each channel, if requested, (2, channels).
        thumbnail: Gray levels of the shrunk image with mean 0 and norm 1, if requested, float16, (256,).
    """

    part: str
    name: str
    problem: str | None = None
    size: tuple[int, int] = (0, 0)
    digest: str = ""
    pixels_C1: NDArray[np.int64] | None = None
    channel_sums: NDArray[np.float64] | None = None
    facts: FileFacts = field(default_factory=FileFacts)
    thumbnail: NDArray[np.float16] | None = None


def all_jobs(data: SegmentationData) -> list[Job]:
    """List all images of a dataset, those with masks first, as they are more likely to have errors."""
    jobs = [Job("labeled", data.train, index) for index in data.labeled_indices]
    jobs += [Job("val", data.val, index) for index in range(len(data.val))]
    if data.test is not None:
        jobs += [Job("test", data.test, index) for index in range(len(data.test))]
    return jobs + [Job("unlabeled", data.train, index) for index in data.unlabeled]


def sample(jobs: Sequence[Job], limit: int) -> list[Job]:
    """Take at most ``limit`` jobs: equally many of each part, evenly spaced.

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
        taken += evenly_spaced(part, count)
    return sorted(taken, key=lambda job: (PARTS.index(job.part), job.index))


def scan_files(data: SegmentationData, jobs: Sequence[Job], thorough: bool) -> Iterator[ScannedFile]:
    """Read images and masks in parallel, and yield their content in the order of the jobs.

    Args:
        data: The dataset.
        jobs: Which images.
        thorough: Whether to also hash and shrink images, and sum their channels.
    """
    return ordered_map(_scanner(data, thorough), jobs, reader_threads(), in_flight=256)  # decoding releases the GIL


def _scanner(data: SegmentationData, thorough: bool) -> Callable[[Job], ScannedFile]:
    def look(job: Job) -> ScannedFile:
        name = job.source.name(job.index)
        try:
            image = job.source.image(job.index)
            pixels = None if job.part == "unlabeled" else _count(data, job, image, job.source.mask(job.index))
        except UserError as error:
            return ScannedFile(job.part, name, str(error))
        details: dict[str, Any] = {} if job.part == "unlabeled" else {"facts": file_facts(job.source, job.index)}
        if thorough:
            details |= {
                "digest": _digest(image),
                "channel_sums": _channel_sums(image),
                "thumbnail": _thumbnail(image),
            }
        return ScannedFile(job.part, name, None, (image.shape[0], image.shape[1]), pixels_C1=pixels, **details)

    return look


def _count(data: SegmentationData, job: Job, image: Image, mask: Mask) -> NDArray[np.int64]:
    """Count the pixels of each class and the ignored ones."""
    num_classes, name = len(data.class_names), job.source.name(job.index)
    require_same_size(image, mask, job.source, job.index)
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


def _thumbnail(image: Image) -> NDArray[np.float16]:
    channels = np.ascontiguousarray(image[..., : min(image.shape[2], 4)])  # OpenCV resizes no more
    small = cv2.resize(channels, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    gray = small.reshape(THUMBNAIL**2, -1).astype(np.float32).mean(1)
    gray -= gray.mean()
    thumbnail: NDArray[np.float16] = (gray / max(float(np.linalg.norm(gray)), 1e-6)).astype(np.float16)
    return thumbnail


@dataclass(frozen=True)
class Finding:
    """A problem of a dataset, or a note about it.

    Attributes:
        is_error: Whether training refuses the dataset.
        message: A sentence.
    """

    is_error: bool
    message: str


def validate_dataset(data: SegmentationData, crop_size: int, skip_bad: bool = False) -> set[tuple[int, int]]:
    """Read the images and masks of a dataset, or 2,000 evenly spaced ones, log notes and raise for errors.

    Args:
        data: The dataset.
        crop_size: Height and width of the training views.
        skip_bad: Whether training images that cannot be read are notes instead of errors.

    Returns:
        The sizes of the evaluation images that were read, (height, width).

    Raises:
        UserError: For the first error.
    """
    require_images(data)
    jobs = all_jobs(data)
    chosen = jobs if len(jobs) <= MAX_FILES else sample(jobs, MAX_FILES)
    if len(chosen) < len(jobs):
        log.info("read %d of %d files; python -m mlpmatch_pl.check reads all", len(chosen), len(jobs))
    inspected = []
    for item in scan_files(data, chosen, thorough=False):
        if item.problem is None:
            inspected.append(item)
        elif skip_bad and item.part in ("labeled", "unlabeled"):
            log.warning("note: %s; it will be skipped", item.problem)
        else:
            raise UserError(item.problem)
    whole = {part for part in PARTS if _number(jobs, part) == _number(chosen, part)}
    for finding in find_problems(data, inspected, crop_size, whole):
        if finding.is_error:
            raise UserError(finding.message)
        log.warning("note: %s", finding.message)
    return {item.size for item in inspected if item.part in ("val", "test")}


def require_images(data: SegmentationData) -> None:
    """Raise a `UserError` for a dataset without labeled or validation images."""
    if not data.labeled.names:
        found = f"none of the {len(data.train)} training images has one" if len(data.train) else "there are none"
        raise UserError(
            f"expected training images with a mask beside those of dataset.val and dataset.test, but {found}; choose "
            "fewer images for these, or add masks with the paths and names of their images"
        )
    if not len(data.val):
        raise UserError("expected at least 1 validation image, but found none; set dataset.val")


def _number(jobs: Iterable[Job], part: str) -> int:
    return sum(job.part == part for job in jobs)


def find_problems(
    data: SegmentationData, inspected: Sequence[ScannedFile], crop_size: int, whole: Collection[str] = PARTS
) -> list[Finding]:
    """Find the problems of a dataset, errors first.

    Args:
        data: The dataset.
        inspected: Content of its files.
        crop_size: Height and width of the training views.
        whole: The parts of which every file was read. Only these can be found to lack a class.

    Example:
        >>> from mlpmatch_pl.data.datasets.shapes import shapes
        >>> data = shapes(labeled=4, train=8, val=2, test=2)
        >>> find_problems(data, list(scan_files(data, all_jobs(data), thorough=True)), crop_size=64)
        []
    """
    good = [item for item in inspected if item.problem is None]
    findings = [Finding(True, item.problem) for item in inspected if item.problem is not None]
    bad = {item.part for item in inspected if item.problem is not None}  # their classes are unknown
    findings += [
        *_classes(data, good, set(whole) - bad),
        *_shifted(data, good),
        *_palettes(good),
        *_orientations(good),
        *_copies(good),
        *_neighbors(good),
        *_sizes(good, crop_size),
    ]
    return sorted(findings, key=lambda finding: not finding.is_error)


def pixels_by_class(inspected: Iterable[ScannedFile], part: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of pixels and of images of each class in a part; the last entry counts ignored pixels."""
    counts = [item.pixels_C1 for item in inspected if item.part == part and item.pixels_C1 is not None]
    table = np.stack(counts) if counts else np.zeros((0, num_classes + 1), np.int64)
    return table.sum(0), (table > 0).sum(0)


def _classes(data: SegmentationData, inspected: Sequence[ScannedFile], whole: Collection[str]) -> Iterator[Finding]:
    names = data.class_names
    labeled, _ = pixels_by_class(inspected, "labeled", len(names))
    hidden = [item.name for item in inspected if item.part == "labeled" and item.facts.transparent]
    advice = ""
    if hidden:
        advice = (
            f"; transparent pixels are ignored, as in {hidden[0]} ({len(hidden)} such files in total): remove the "
            "transparency of images and masks where they show a class"
        )
    found = [name for name, pixels in zip(names, labeled[:-1], strict=True) if pixels]
    if len(found) < 2 and "labeled" in whole:
        ignored = f" and {data.ignore_index} (ignore)" if labeled[-1] else ""
        yield Finding(
            True,
            f"expected at least two classes in the labeled masks, but they have only {', '.join(found) or 'no class'}"
            f"{ignored}; if other values in your files are classes, map them, as in "
            f"'dataset.mask_values={{0:0,255:1}}', else label images that show other classes{advice}",
        )
        return
    evaluated, _ = pixels_by_class(inspected, "val", len(names))
    for part, word, pixels in (("labeled", "labeled", labeled), ("val", "validation", evaluated)):
        missing = [name for name, count in zip(names, pixels[:-1], strict=True) if not count]
        if missing and part in whole:
            noun = "class" if len(missing) == 1 else "classes"
            message = f"no {word} mask has the {noun} {', '.join(missing)}"
            if part == "labeled" and data.labeled.label.endswith(")") and "every class" not in data.labeled.label:
                message += "; dataset.cover_classes=true chooses labeled images that have every class"
            if part == "labeled":
                message += advice
            yield Finding(False, message)
    empty = [item.name for item in inspected if item.pixels_C1 is not None and not item.pixels_C1[:-1].any()]
    if empty:
        message = f"every pixel of the mask of {empty[0]} is ignored ({len(empty)} such masks in total)"
        yield Finding(False, message)


def _shifted(data: SegmentationData, inspected: Sequence[ScannedFile]) -> Iterator[Finding]:
    """Find masks whose first class is 0 although the dataset's is background, as those of COCO-Stuff."""
    names, counts = data.class_names, [item.pixels_C1 for item in inspected if item.pixels_C1 is not None]
    if not counts or "background" not in names[0].lower():
        return
    pixels = np.sum(counts, axis=0)
    if pixels[-1] > pixels[0] and not pixels[-2]:
        yield Finding(
            False,
            f"more pixels have {data.ignore_index} (ignored) than 0 ({names[0]}), and none has {len(names) - 1} "
            f"({names[-1]}): if 0 is {names[1]} in your files, all ids are shifted by one, and dataset=folder maps "
            f"them, as in 'dataset.mask_values={{{data.ignore_index}:0,0:1,1:2}}'",
        )


def _palettes(inspected: Sequence[ScannedFile]) -> Iterator[Finding]:
    """Find masks whose palettes give one number two colors, or one color two numbers."""
    advice = (
        "set dataset.palette to the color of each class to read masks by color, or dataset.mask_values, as in "
        "{0:0,1:1}, to read them by number"
    )
    colors: dict[int, tuple[bytes, str]] = {}
    numbers: dict[bytes, tuple[int, str]] = {}
    for item in inspected:
        palette = item.facts.palette
        if not palette or item.pixels_C1 is None:
            continue
        for number in map(int, np.flatnonzero(item.pixels_C1[:-1])):
            color = palette[3 * number : 3 * number + 3]
            known, first = colors.setdefault(number, (color, item.name))
            other, second = numbers.setdefault(color, (number, item.name))
            if known != color:
                found = f"{number} is {list(known)} in the mask of {first} and {list(color)} in that of {item.name}"
            elif other != number and palette[3 * other : 3 * other + 3] != color:  # two classes may share a color
                found = f"{list(color)} is {other} in the mask of {second} and {number} in that of {item.name}"
            else:
                continue
            yield Finding(True, f"expected masks with the same palette, but {found}; {advice}")
            return


def require_same_palettes(data: SegmentationData, part: str) -> None:
    """Refuse masks of one part whose palettes differ, as `find_problems` does; files are read only if they do.

    Raises:
        UserError: If they give one number two colors, or one color two numbers.
    """
    jobs = [job for job in all_jobs(data) if job.part == part]
    palettes = {file_facts(job.source, job.index).palette for job in jobs}
    if len(palettes - {b""}) > 1:
        for finding in _palettes(list(scan_files(data, jobs, thorough=False))):
            raise UserError(finding.message)


def _orientations(inspected: Sequence[ScannedFile]) -> Iterator[Finding]:
    """Find images turned by their orientation tag whose size cannot tell whether their masks are turned too."""
    turned = [
        item
        for item in inspected
        if item.pixels_C1 is not None
        and item.facts.orientation != 1
        and (item.facts.orientation not in SWAPPED or item.size[0] == item.size[1])
    ]
    if turned:
        first = turned[0].name
        message = (
            f"{len(turned)} images with masks are turned by their orientation tag (EXIF), the first is {first}; "
            "set dataset.orientation=ignore if masks were drawn on the stored pixels"
        )
        yield Finding(False, message)


def _copies(inspected: Sequence[ScannedFile]) -> Iterator[Finding]:
    """Find identical images under different names."""
    by_content: dict[str, list[ScannedFile]] = defaultdict(list)
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
        advice = "; remove them from one of them" if is_error else ""
        where = f"{one_part} images" if one_part == two_part else f"{one_part} and {two_part} images"
        message = (
            f"expected {where} to differ, but {pairs[0][0]} and {pairs[0][1]} are the same image "
            f"({len(pairs)} in total){advice}"
        )
        yield Finding(is_error, message)


def _neighbors(inspected: Sequence[ScannedFile]) -> Iterator[Finding]:
    """Find evaluation images that look nearly like a training image, such as neighboring frames of a video."""
    seen = [item for item in inspected if item.thumbnail is not None]
    training = [item for item in seen if item.part in ("labeled", "unlabeled")]
    for part, word in (("val", "validation"), ("test", "test")):
        held_out = [item for item in seen if item.part == part]
        if not held_out or not training:
            continue
        training_ND = _thumbnails(training)
        nearest = []
        for item, thumbnail_D in zip(held_out, _thumbnails(held_out), strict=True):
            similar_N = training_ND @ thumbnail_D
            nearest.append((float(similar_N.max()), item.name, training[int(similar_N.argmax())].name))
        found = [one for one in nearest if one[0] >= SIMILAR]
        if len(found) >= max(SIMILAR_SHARE * len(held_out), min(FEWEST_SIMILAR, len(held_out))):
            _, name, other = max(found)
            advice = "dataset.group_by=folder or a pattern" if part == "val" else "another dataset.test"
            yield Finding(
                False,
                f"{len(found)} of {len(held_out)} {word} images look nearly the same as a training image ({name} and "
                f"{other}); if they are frames or tiles of one scene, the scores are too high: keep scenes together by "
                f"{advice}",
            )


def _thumbnails(items: Iterable[ScannedFile]) -> NDArray[np.float32]:
    return np.stack([item.thumbnail for item in items if item.thumbnail is not None], dtype=np.float32)


def _sizes(inspected: Sequence[ScannedFile], crop_size: int) -> Iterator[Finding]:
    sizes = Counter(item.size for item in inspected if item.part in ("labeled", "unlabeled"))
    small = {size: count for size, count in sizes.items() if min(size) < crop_size}
    if small:
        height, width = min(small)
        message = (
            f"{sum(small.values())} of {sum(sizes.values())} training images read are smaller than the crop of "
            f"{crop_size} pixels (the smallest {width} x {height}); their views are padded, or lower loader.crop_size"
        )
        yield Finding(False, message)
