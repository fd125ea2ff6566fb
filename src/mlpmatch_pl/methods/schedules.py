"""What changes during training: the weight of volatile learning and the learning rate."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mlpmatch_pl.utils.errors import UserError, suggest

SCHEDULES = ("linear_epoch", "linear_step", "constant", "off")
"""Schedules of lambda. The paper's is ``linear_epoch``: lambda = lambda_max * e / E."""

DECAYS = ("poly", "cosine")
"""How the learning rate falls to 0. The paper's is ``poly``."""

_LENGTHS = ("total_steps", "T_max", "total_iters", "t_initial")
"""How schedulers of torch and timm call the number of steps."""


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


def lr_schedule(
    steps: int, decay: str | Mapping[str, Any], power: float = 0.9, warmup_steps: int = 0, late: bool = False
) -> Callable[[int], float]:
    """Return the factor of the learning rates as a function of the optimizer step, counted from 0.

    Args:
        steps: Total number of steps.
        decay: One of `DECAYS`: ``poly`` is ``(1 - step / steps) ** power``, ``cosine`` is half a period of the cosine,
            and both are 0 after the last step. Or the name of a class of ``torch.optim.lr_scheduler`` or
            ``timm.scheduler``, or a mapping of its ``name`` and its arguments, in steps; the total number of steps may
            be left out. Learning rates among them are factors: ``max_lr: 1`` is the learning rate of the optimizer.
        power: Exponent of ``poly``, 0.9 in the paper; 0 for a constant factor.
        warmup_steps: Number of first steps in which the factor rises linearly to that of the decay.
        late: Use the value of the previous step, as the authors' code does.

    Raises:
        UserError: If the scheduler is unknown, refuses its arguments, or needs a metric.

    Example:
        >>> factor = lr_schedule(10, "poly", late=True)
        >>> [round(factor(step), 4) for step in range(4)]
        [1.0, 1.0, 0.9095, 0.8181]
        >>> factor = lr_schedule(10, "cosine", warmup_steps=2)
        >>> [round(factor(step), 4) for step in (0, 2, 5, 10)]
        [0.5, 0.9045, 0.5, 0.0]
        >>> factor = lr_schedule(4, {"name": "StepLR", "step_size": 2})
        >>> [round(factor(step), 4) for step in range(4)]
        [1.0, 1.0, 0.1, 0.1]
    """
    decayed: Callable[[int], float]
    if decay in DECAYS:
        decayed = partial(_decayed, steps=max(steps, 1), power=power if decay == "poly" else None)
    else:
        decayed = _scheduler_values({"name": decay} if isinstance(decay, str) else decay, steps).__getitem__

    def factor(step: int) -> float:
        step = max(step - late, 0)
        return decayed(min(step, steps)) * min((step + 1) / max(warmup_steps, 1), 1.0)

    return factor


def check_decay(decay: str | Mapping[str, Any]) -> None:
    """Refuse a decay whose name `lr_schedule` does not know."""
    if decay not in DECAYS:
        _find_scheduler(decay if isinstance(decay, str) else decay.get("name"))


def _decayed(step: int, steps: int, power: float | None) -> float:
    """Return the factor of the polynomial decay, or of the cosine without a power."""
    left = 1 - step / steps
    return (1 - math.cos(math.pi * left)) / 2 if power is None else float(left**power)


def _scheduler_values(spec: Mapping[str, Any], steps: int) -> list[float]:
    """Return the ``steps + 1`` learning rates that a scheduler of torch or timm gives an optimizer that starts with 1.

    Values known in advance need no state in checkpoints, and a resumed training may have another learning rate.
    """
    arguments = dict(spec)
    name = arguments.pop("name", None)
    scheduler_class = _find_scheduler(name)
    taken = inspect.signature(scheduler_class).parameters
    steps_as = dict.fromkeys(_LENGTHS, steps) | {"t_in_epochs": False}  # timm counts epochs otherwise
    arguments = {key: value for key, value in steps_as.items() if key in taken} | arguments
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    values = []
    try:
        scheduler = scheduler_class(optimizer, **arguments)
        step_update = getattr(scheduler, "step_update", lambda _: scheduler.step())  # timm's method
        for step in range(steps):
            values.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()  # torch warns without it
            step_update(step + 1)
    except Exception as error:  # each checks its arguments in its own way
        reason = " ".join(str(error).split()).removesuffix(".")
        raise UserError(f"expected a scheduler with arguments that it takes, but {name} refuses: {reason}") from error
    return [*values, float(optimizer.param_groups[0]["lr"])]


def _find_scheduler(name: Any) -> Any:
    import timm.scheduler

    base = torch.optim.lr_scheduler.LRScheduler
    known = {key: value for key, value in vars(timm.scheduler).items() if key.endswith("LRScheduler")}
    for key, value in vars(torch.optim.lr_scheduler).items():
        if isinstance(value, type) and issubclass(value, base) and value is not base and not key.startswith("_"):
            known[key] = value
    for key in ("ReduceLROnPlateau", "PlateauLRScheduler"):  # need a metric, so their values are not known in advance
        known.pop(key)
    if name not in known:
        raise UserError(
            "expected schedule.decay as poly, cosine or {name: ...} with a class of torch.optim.lr_scheduler or "
            f"timm.scheduler that needs no metric, but got {name!r}." + suggest(str(name), known)
        )
    return known[name]


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
