"""What becomes of an image or a mask that cannot be read, or does not fit, in the middle of training.

The files are validated before training (`mlpmatch_pl.data.validation`), but disks fail and files change during a run.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import default_collate

from mlpmatch_pl.utils.errors import UserError, suggest
from mlpmatch_pl.utils.seeding import derive_seed

MOST_TRIES = 20  # if half of all files were gone, one draw in a million would find none
SKIPPED = "skipped"  # the key under which samples and batches carry what was left out on the way to them

Draw = tuple[int, int]  # a place in a stream, and the number of the draw
Sample = dict[str, Any]
Skipped = tuple[str, str]  # an image's name, and what is wrong with it

log = logging.getLogger(__name__)


class Stream(Protocol):
    """Views of images, see `mlpmatch_pl.data.dataset`."""

    stream: str
    seed: int

    def __len__(self) -> int:
        """Return the number of images."""

    def name(self, place: int) -> str:
        """Return the name of an image."""

    def sample(self, place: int, number: int) -> Sample:
        """Read an image and make the views of a draw."""


Policy = Callable[[Stream, Draw], Sample]


def raise_bad(stream: Stream, draw: Draw) -> Sample:
    """Read a sample, or end the training with the name of the bad file.

    Raises:
        UserError: If the image or its mask is bad.
    """
    try:
        return stream.sample(*draw)
    except (UserError, OSError) as error:
        problem = _sentence(error, stream.name(draw[0]))
        joint = ", or" if ";" in problem else ";"
        raise UserError(f"{problem}{joint} set loader.on_bad_image=skip to train on without such files") from error


def skip_bad(stream: Stream, draw: Draw) -> Sample:
    """Read a sample; if its image is bad, another one, drawn by the seed and the number of the draw.

    So a replacement is the same for any number of workers, and after a resume. The sample says what it replaces
    under the key ``skipped``.

    Raises:
        UserError: If the image and 19 others, or all that there are, are bad.
    """
    skipped: list[Skipped] = []
    for place in _places(stream, draw):
        try:
            sample = stream.sample(place, draw[1])
        except (UserError, OSError) as error:
            skipped.append((stream.name(place), _sentence(error, stream.name(place))))
        else:
            return {**sample, SKIPPED: skipped} if skipped else sample
    raise UserError(
        f"expected readable {stream.stream} images, but {len(skipped)} of {len(stream)} drawn one after another are "
        f"none ({skipped[-1][1]}); see whether the folder of the data is still there"
    )


_POLICIES: dict[str, Policy] = {"raise": raise_bad, "skip": skip_bad}


def bad_image_policy(name: str) -> Policy:
    """Return what is done about a bad image.

    Args:
        name: ``raise`` or ``skip``.

    Raises:
        UserError: If it is neither.

    Example:
        >>> bad_image_policy("skip").__name__
        'skip_bad'
    """
    if name not in _POLICIES:
        raise UserError(
            f"expected loader.on_bad_image as {' or '.join(_POLICIES)}, but got {name!r}." + suggest(name, _POLICIES)
        )
    return _POLICIES[name]


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Make a batch of samples; what was left out on the way comes as one list, and only if there is something."""
    skipped = [entry for sample in samples for entry in sample.pop(SKIPPED, ())]
    batch: dict[str, Any] = default_collate(samples)
    return {**batch, SKIPPED: skipped} if skipped else batch


class SkippedImages:
    """Counts the draws that fell on bad images, and names each image once in the log.

    Attributes:
        counts: Draws by the name of the image.

    Example:
        >>> skipped = SkippedImages()
        >>> skipped.take({"image": 0, "skipped": [("a.png", "cannot read a.png"), ("a.png", "cannot read a.png")]})
        {'image': 0}
        >>> skipped.counts
        Counter({'a.png': 2})
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def take(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Count what a batch carries, and return the batch without it."""
        entries: Iterable[Skipped] = batch.get(SKIPPED, ())
        for name, problem in entries:
            if name not in self.counts:
                log.warning("left out (loader.on_bad_image=skip): %s", problem)
            self.counts[name] += 1
        return {key: value for key, value in batch.items() if key != SKIPPED}

    def report(self) -> dict[str, int]:
        """Return how many draws fell on bad images, and on how many of these, over all processes; log it if any."""
        counts = sum(_from_all_processes(self.counts), Counter[str]())
        if counts:
            log.warning(
                "%d draws fell on bad images and were replaced: %s",
                counts.total(), ", ".join(f"{name} ({count})" for name, count in counts.most_common()),
            )  # fmt: skip
        return {"draws": counts.total(), "images": len(counts)}


def _places(stream: Stream, draw: Draw) -> Iterator[int]:
    place, number = draw
    yield place
    rng = random.Random(derive_seed(stream.seed, stream.stream, "replacement", number))
    others = rng.sample(range(len(stream)), min(MOST_TRIES, len(stream)))
    yield from [other for other in others if other != place][: MOST_TRIES - 1]


def _from_all_processes(counts: Counter[str]) -> list[Counter[str]]:
    if not torch.distributed.is_initialized():
        return [counts]
    gathered: list[Counter[str]] = [Counter()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, counts)
    return gathered


def _sentence(error: Exception, name: str) -> str:
    """Say what is wrong; a source of one's own may raise an error of the system, which does not name the image."""
    return str(error) if isinstance(error, UserError) else f"cannot read {name} ({error}); replace or remove it"
