"""From measured seconds to the figures that are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlpmatch_pl.commands.benchmark.clock import PARTS


@dataclass(frozen=True)
class Spread:
    """Seconds of one part over all measured batches: mean, median, and where the middle 80 % lie."""

    mean: float
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Summarize.

        Example:
            >>> Spread.of([1.0, 2.0, 3.0, 4.0, 10.0]).mean, Spread.of([1.0, 2.0, 3.0, 4.0, 10.0]).median
            (4.0, 3.0)
        """
        low, median, high = np.percentile(seconds, [10, 50, 90])
        return cls(float(np.mean(seconds)), float(median), float(low), float(high))


def spread_of_parts(rows: Sequence[Sequence[float]]) -> dict[str, Spread]:
    """Summarize the parts and their sum, ``batch``, over the measured batches.

    Shares come from means, since workers deliver in bursts: with a median of 0, waiting may take half of the time.
    """
    columns = dict(zip(PARTS, zip(*rows, strict=True), strict=True))
    return {name: Spread.of(seconds) for name, seconds in (columns | {"batch": tuple(map(sum, rows))}).items()}


@dataclass(frozen=True)
class Schedule:
    """The seconds of a whole training."""

    epochs: int
    batches: int
    validations: int
    training: float
    validation: float

    @property
    def total(self) -> float:
        """Return training and validation."""
        return self.training + self.validation

    @property
    def validation_share(self) -> float:
        """Return the share of validation, 0..1."""
        return self.validation / self.total

    def as_dict(self) -> dict[str, Any]:
        """Return all as plain data."""
        return {**asdict(self), "total": self.total, "validation_share": self.validation_share}


def whole_schedule(
    epochs: int, batches_per_epoch: int, every: int, batch: float, validation_batches: int, validation_batch: float
) -> Schedule:
    """Add up a training.

    Args:
        epochs: Number of epochs.
        batches_per_epoch: Batches of one.
        every: Epochs from validation to validation.
        batch: Seconds of a training batch.
        validation_batches: Batches of a validation.
        validation_batch: Seconds of one.

    Example:
        >>> plan = whole_schedule(10, 100, every=4, batch=0.5, validation_batches=50, validation_batch=1.0)
        >>> plan.training, plan.validations, plan.validation, plan.total
        (500.0, 2, 100.0, 600.0)
    """
    validations = epochs // every
    return Schedule(
        epochs, epochs * batches_per_epoch, validations, epochs * batches_per_epoch * batch,
        validations * validation_batches * validation_batch,
    )  # fmt: skip


def reaching_accumulation(images_per_batch: int, reference: int) -> int:
    """Return for how many batches gradients must be accumulated to see at least the reference number of images.

    Example:
        >>> reaching_accumulation(4, 16), reaching_accumulation(6, 16), reaching_accumulation(32, 16)
        (4, 3, 1)
    """
    return max(math.ceil(reference / images_per_batch), 1)
