"""When the parts of a training step begin and end."""

from __future__ import annotations

from itertools import pairwise, starmap
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mlpmatch_pl.utils.timing import Moment, now, seconds_between

PARTS = ("data wait", "transfer", "forward", "backward", "optimizer")


class StepClock(Callback):
    """Measures the parts of each batch, and stops the training after so many.

    The parts follow on each other without a gap, so that their sum is the time of a batch. Logging, the learning
    rate's schedule and clipping belong to the optimizer, the loss to the forward pass.

    Args:
        batches: Batches after which the training stops.

    Attributes:
        marks: The moments of every batch, one more than there are parts.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.marks: list[list[Moment]] = []

    def seconds(self, warmup: int) -> list[list[float]]:
        """Return the seconds of the parts, a row a batch, without the first ``warmup`` batches."""
        return [list(starmap(seconds_between, pairwise(row))) for row in self.marks[warmup:]]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Mark the moment between data wait and transfer, for which Lightning has no hook of callbacks."""
        self._device = trainer.strategy.root_device
        transfer = trainer.strategy.batch_to_device

        def marked(batch: Any, *args: Any, **kwargs: Any) -> Any:
            self._mark()
            return transfer(batch, *args, **kwargs)

        trainer.strategy.batch_to_device = marked  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to wait for the first batch."""
        self.marks = [[now(self._device)]]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is on the device."""
        self._mark()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The loss is known."""
        self._mark()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The gradients are known."""
        self._mark()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch is done, and the next one is waited for, over the end of an epoch too."""
        self._mark()
        if len(self.marks) >= self.batches:
            trainer.should_stop = True
        else:
            self.marks.append(self.marks[-1][-1:])

    def _mark(self) -> None:
        self.marks[-1].append(now(self._device))


class ValidationClock(Callback):
    """Measures validation batches from the end of the first one on, loading included."""

    def __init__(self) -> None:
        self.ends: list[Moment] = []

    @property
    def seconds_a_batch(self) -> float:
        """Return the mean; with a single batch, the seconds of that one."""
        return seconds_between(self.ends[0], self.ends[-1]) / (len(self.ends) - 1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A single batch is measured from here."""
        if trainer.num_val_batches == [1]:
            self.ends.append(now(trainer.strategy.root_device))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A batch is done."""
        self.ends.append(now(trainer.strategy.root_device))
