"""The weight of volatile learning: how much the labeled loss comes from the deactivated network."""

from mlpmatch_pl.errors import UserError

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
