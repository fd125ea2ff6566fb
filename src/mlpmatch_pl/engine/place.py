"""The place of a training in a checkpoint, moved to where it is when epochs have another number of steps."""

from __future__ import annotations

import math
from typing import Any

from mlpmatch_pl.callbacks.checkpoints import ACCUMULATED

DATA = "SemiSupervisedDataModule"
"""The checkpoint's key for the place in the data."""


def move_place(content: dict[str, Any], batches: int, accumulate: int) -> None:
    """Move a checkpoint to the same epoch and part of it, where epochs have another number of steps now.

    That is the case with another number of devices, batch size or accumulation. Steps are counted as if the training
    had had the present number from its beginning, so the schedule of the learning rate goes on at the same place.

    Args:
        content: The checkpoint, which is changed.
        batches: Batches in an epoch now.
        accumulate: Batches in an optimizer step now.
    """
    data, loops = content[DATA], content["loops"]["fit_loop"]
    before, accumulated = data["batches"], content.get(ACCUMULATED, accumulate)
    if (before, accumulated) == (batches, accumulate):
        return
    ended = data["batch"] >= before
    batch = batches if ended else data["batch"] * batches // before
    batch = batches if ended else max(batch - batch % accumulate, min(accumulate, batches))
    steps, step = math.ceil(batches / accumulate), math.ceil(batch / accumulate)
    data.update(batch=batch, batches=batches)
    total = data["epoch"] * steps + step
    shift = total - content["global_step"]
    content["global_step"] = total
    _set_progress(loops["epoch_loop.batch_progress"], batch, data["epoch"] * batches + batch)
    optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for progress in (optimizer["step"], optimizer["zero_grad"], loops["epoch_loop.scheduler_progress"]):
        _set_progress(progress, step, total)
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] += shift
    for scheduler in content["lr_schedulers"]:
        scheduler.update(last_epoch=total, _step_count=total + 1)


def _set_progress(progress: dict[str, Any], current: int, total: int) -> None:
    """Set counters to new values; those that lag behind by one, since the step was not yet over, still do."""
    for part, value in (("current", current), ("total", total)):
        ready = progress[part]["ready"]
        progress[part].update({key: value - (ready - count) for key, count in progress[part].items()})
