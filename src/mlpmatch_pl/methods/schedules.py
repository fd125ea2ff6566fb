"""What changes over a training: the weight of volatile learning, the learning rate, and its length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlpmatch_pl.utils.errors import UserError

SCHEDULES = ("linear_epoch", "linear_step", "constant", "off")
"""How lambda grows; in the paper by epoch, lambda = lambda_max * e / E."""


def volatile_weight(
    schedule: str, maximum: float, *, epoch: int, epochs: int | None, step: int, steps: int | None
) -> float:
    """Return lambda, the weight of the network-perturbed labeled term (MLPMatch).

    Args:
        schedule: One of `SCHEDULES`.
        maximum: lambda_max, 0.25 in the paper.
        epoch: Epoch from 0.
        epochs: Number of epochs in all; None if nobody knows.
        step: Optimizer step from 0.
        steps: Number of optimizer steps in all; None if nobody knows.

    Returns:
        A weight from 0 to ``maximum``; with ``linear_epoch`` it starts at 0 and ends just under ``maximum``.

    Raises:
        UserError: If the schedule needs a length that nobody knows.

    Example:
        >>> volatile_weight("linear_epoch", 0.25, epoch=79, epochs=80, step=0, steps=1)
        0.246875
    """
    if schedule == "linear_epoch":
        done = _share(schedule, "epochs", epoch, epochs)
    elif schedule == "linear_step":
        done = _share(schedule, "steps", step, steps)
    else:
        done = {"constant": 1.0, "off": 0.0}[schedule]
    return maximum * done


def _share(schedule: str, unit: str, done: int, in_all: int | None) -> float:
    if in_all is None:
        raise UserError(
            f"expected to know the number of training {unit} for method.lambda_schedule={schedule}, but nothing says "
            f"it; set max_{unit} of the Trainer, and limit_train_batches where the loader has no length, or call the "
            "module's set_length where there is no Trainer, or use method.lambda_schedule=constant"
            + (" or linear_step" if unit == "epochs" else "")
        )
    return min(done / max(in_all, 1), 1.0)


def build_sgd(encoder: nn.Module, decoder: nn.Module, hparams: Mapping[str, Any]) -> torch.optim.SGD:
    """Build the optimizer.

    Args:
        encoder: Learns at ``lr``.
        decoder: Learns at ``lr * lr_multi``.
        hparams: These two, ``momentum``, ``weight_decay`` and ``fused_optimizer``, as `mlpmatch_pl.module.MLPMatch`
            takes them.
    """
    groups = [
        {"params": encoder.parameters(), "lr": hparams["lr"], "name": "encoder"},
        {"params": decoder.parameters(), "lr": hparams["lr"] * hparams["lr_multi"], "name": "decoder"},
    ]
    return torch.optim.SGD(
        groups,
        momentum=hparams["momentum"],
        weight_decay=hparams["weight_decay"],
        fused=hparams["fused_optimizer"] or None,
    )


def poly_decay(step: int, steps: int, power: float, late: bool) -> float:
    """Return the factor of the learning rate, ``(1 - step / steps) ** power``.

    Args:
        step: Optimizer step from 0.
        steps: Number of steps in all; beyond it the factor stays 0.
        power: Exponent, 0.9 in the paper.
        late: Use the value of the step before, as the authors' code does.

    Example:
        >>> [round(poly_decay(step, 10, 0.9, late=True), 4) for step in range(4)]
        [1.0, 1.0, 0.9095, 0.8181]
    """
    return float(max(1 - max(step - late, 0) / max(steps, 1), 0.0) ** power)


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
    def of(cls, trainer: Any) -> Length:
        """Read it from a Lightning Trainer; its loader may have no length, and its training no end."""
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
