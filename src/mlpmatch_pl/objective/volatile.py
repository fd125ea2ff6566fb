"""The weight of volatile learning: how much the labeled loss comes from the deactivated network."""

from collections.abc import Callable, Mapping

SCHEDULES: Mapping[str, Callable[[float, float], float]] = {
    "linear_epoch": lambda epochs_done, steps_done: epochs_done,  # paper: lambda = lambda_max * e / E
    "linear_step": lambda epochs_done, steps_done: steps_done,
    "constant": lambda epochs_done, steps_done: 1.0,
    "off": lambda epochs_done, steps_done: 0.0,
}


def volatile_weight(schedule: str, maximum: float, *, epoch: int, epochs: int, step: int, steps: int) -> float:
    """Return lambda, the weight of the network-perturbed labeled term (MLPMatch).

    Args:
        schedule: One of `SCHEDULES`.
        maximum: lambda_max, 0.25 in the paper.
        epoch: Epoch from 0.
        epochs: Number of epochs in all.
        step: Optimizer step from 0.
        steps: Number of optimizer steps in all.

    Returns:
        A weight from 0 to ``maximum``; with ``linear_epoch`` it starts at 0 and ends just under ``maximum``.

    Example:
        >>> volatile_weight("linear_epoch", 0.25, epoch=79, epochs=80, step=0, steps=1)
        0.246875
    """
    done = SCHEDULES[schedule](epoch / max(epochs, 1), step / max(steps, 1))
    return maximum * min(done, 1.0)
