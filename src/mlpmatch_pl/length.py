"""How long a training will be, as far as anybody knows: the learning rate and lambda follow it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlpmatch_pl.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


@dataclass(frozen=True)
class Length:
    """The length of a training.

    Attributes:
        steps: Optimizer steps in all; None if nobody knows.
        epochs: Epochs in all; None if nobody knows.
    """

    steps: int | None = None
    epochs: int | None = None

    @classmethod
    def of(cls, trainer: Trainer) -> Length:
        """Read it from a trainer, whose loader may have no length, and which may go on until somebody stops it."""
        estimated = trainer.estimated_stepping_batches
        steps = max(int(estimated), 1) if 0 <= estimated < math.inf else None  # Lightning has -1 and infinity
        batches, epochs = trainer.num_training_batches, trainer.max_epochs or -1
        if steps is not None and batches < math.inf:
            return cls(steps, math.ceil(steps / math.ceil(max(batches, 1) / trainer.accumulate_grad_batches)))
        return cls(steps, epochs if epochs > 0 else None)

    def required_steps(self) -> int:
        """Return the number of optimizer steps.

        Raises:
            UserError: If nobody knows it.

        Example:
            >>> Length(steps=10).required_steps()
            10
        """
        if self.steps is None:
            raise UserError(
                "expected to know the number of training steps, over which the learning rate decays, but nothing says "
                "it; set max_steps of the Trainer, or max_epochs with a loader that has a length (or "
                "limit_train_batches), call the module's set_length where there is no Trainer, or use power=0 for a "
                "constant learning rate"
            )
        return self.steps
