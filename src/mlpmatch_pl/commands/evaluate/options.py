"""What the command can be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmatch_pl.commands.evaluate.dataset import Part
from mlpmatch_pl.commands.evaluate.loop import Evaluator
from mlpmatch_pl.evaluation.confusion import Absent
from mlpmatch_pl.evaluation.sliding_window import SlidingWindowInference
from mlpmatch_pl.utils.errors import UserError


@dataclass(frozen=True)
class Scoring:
    """How is counted.

    Attributes:
        absent: What becomes of classes in neither truth nor prediction; None for the rule of the training.
        boundary: Distance of the boundary IoU, as a share of the diagonal; None for none.
    """

    absent: Absent | None
    boundary: float | None


@dataclass(frozen=True)
class Options:
    """The configuration of ``python -m mlpmatch_pl.evaluate``.

    Attributes:
        checkpoint: Checkpoint of a training.
        dataset: See `mlpmatch_pl.commands.evaluate.dataset.open_part`.
        part: Likewise.
        output: Folder to write to.
        overwrite: Whether existing files may be replaced.
        device: See `mlpmatch_pl.predictor.load`.
        inference: How probabilities are inferred.
        evaluation: How is counted.
        worst: Number of images in the picture of the worst.
        batch_size: See `mlpmatch_pl.commands.evaluate.loop.Evaluator`.
        num_workers: Likewise.

    Raises:
        UserError: If a number is out of range.
    """

    checkpoint: Path
    dataset: Mapping[str, Any] | None
    part: Part | None
    output: Path
    overwrite: bool
    device: str
    inference: SlidingWindowInference
    evaluation: Scoring
    worst: int
    batch_size: int | None
    num_workers: int | None

    def __post_init__(self) -> None:
        if self.worst < 0:
            raise UserError(f"expected worst as a number of images from 0, but got {self.worst}")
        _ = self.evaluator

    @property
    def evaluator(self) -> Evaluator:
        """What evaluates."""
        return Evaluator(self.inference, self.evaluation.boundary, self.batch_size, self.num_workers)
