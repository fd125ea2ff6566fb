"""What changes during training: the weight of volatile learning and the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mlpmatch_pl.utils.errors import UserError

SCHEDULES = ("linear_epoch", "linear_step", "constant", "off")
"""Schedules of lambda. The paper's is ``linear_epoch``: lambda = lambda_max * e / E."""

DECAYS = ("poly", "cosine")
"""How the learning rate falls to 0. The paper's is ``poly``."""


def volatile_weight(
    schedule: str, maximum: float, *, epoch: int, epochs: int | None, step: int, steps: int | None
) -> float:
    """Return lambda, the weight of the network-perturbed labeled term (MLPMatch).

    Args:
        schedule: One of `SCHEDULES`.
        maximum: lambda_max, 0.25 in the paper.
        epoch: Current epoch, from 0.
        epochs: Total number of epochs; None if unknown.
        step: Current optimizer step, from 0.
        steps: Total number of optimizer steps; None if unknown.

    Returns:
        A weight from 0 to ``maximum``; with ``linear_epoch`` it starts at 0 and ends just below ``maximum``.

    Raises:
        UserError: If the schedule needs a length that is unknown.

    Example:
        >>> volatile_weight("linear_epoch", 0.25, epoch=79, epochs=80, step=0, steps=1)
        0.246875
    """
    if schedule in ("constant", "off"):
        return maximum if schedule == "constant" else 0.0
    unit, done, total = ("epochs", epoch, epochs) if schedule == "linear_epoch" else ("steps", step, steps)
    if total is None:
        raise UserError(
            f"expected a known number of training {unit} for method.lambda_schedule={schedule}, but it is unknown; set "
            f"max_{unit} of the Trainer, and limit_train_batches if the loader has no length, call the module's "
            "set_length if there is no Trainer, or use method.lambda_schedule=constant"
            + (" or linear_step" if unit == "epochs" else "")
        )
    return maximum * min(done / max(total, 1), 1.0)


def lr_factor(step: int, *, steps: int, decay: str, power: float, warmup_steps: int = 0, late: bool = False) -> float:
    """Return the factor of the learning rate at a step.

    Args:
        step: Optimizer step, from 0.
        steps: Total number of steps, after which the factor is 0.
        decay: One of `DECAYS`: ``poly`` is ``(1 - step / steps) ** power``, ``cosine`` is half a period of the cosine.
        power: Exponent of ``poly``, 0.9 in the paper; 0 for a constant factor.
        warmup_steps: Number of first steps in which the factor rises linearly to that of the decay.
        late: Use the value of the previous step, as the authors' code does.

    Example:
        >>> [round(lr_factor(step, steps=10, decay="poly", power=0.9, late=True), 4) for step in range(4)]
        [1.0, 1.0, 0.9095, 0.8181]
        >>> [round(lr_factor(step, steps=10, decay="cosine", power=0.9, warmup_steps=2), 4) for step in (0, 2, 5, 10)]
        [0.5, 0.9045, 0.5, 0.0]
    """
    step = max(step - late, 0)
    left = max(1 - step / max(steps, 1), 0.0)
    factor = left**power if decay == "poly" else (1 - math.cos(math.pi * left)) / 2
    return float(factor * min((step + 1) / max(warmup_steps, 1), 1.0))


@dataclass(frozen=True)
class TrainingLength:
    """The length of a training run.

    Attributes:
        steps: Total number of optimizer steps; None if unknown.
        epochs: Total number of epochs; None if unknown.
    """

    steps: int | None = None
    epochs: int | None = None

    @classmethod
    def of(cls, trainer: Any) -> TrainingLength:
        """Read the length from a Lightning Trainer, whose loader may have no length and whose run may be endless."""
        estimated = trainer.estimated_stepping_batches  # -1 or infinity if Lightning does not know
        steps = max(int(estimated), 1) if 0 <= estimated < math.inf else None
        batches, epochs = trainer.num_training_batches, trainer.max_epochs or -1
        if steps is not None and batches < math.inf:
            return cls(steps, math.ceil(steps / math.ceil(max(batches, 1) / trainer.accumulate_grad_batches)))
        return cls(steps, epochs if epochs > 0 else None)

    def required_steps(self) -> int:
        """Return the number of optimizer steps.

        Raises:
            UserError: If it is unknown.
        """
        if self.steps is None:
            raise UserError(
                "expected a known number of training steps for the decay of the learning rate, but it is unknown; set "
                "max_steps of the Trainer, or max_epochs with a loader that has a length (or limit_train_batches), "
                "call the module's set_length if there is no Trainer, or use power=0 for a constant learning rate"
            )
        return self.steps
