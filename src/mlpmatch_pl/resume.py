"""Where a training begins: at its first step, or where a checkpoint was written."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlpmatch_pl.callbacks.checkpoints import ACCUMULATED, METRICS
from mlpmatch_pl.checkpoint_files import BEST, LAST, PREVIOUS, read_checkpoint
from mlpmatch_pl.errors import UserError

log = logging.getLogger(__name__)
_DATA = "SemiSupervisedDataModule"


@dataclass(frozen=True)
class Start:
    """Where a training begins.

    Args:
        checkpoint: The file to go on from; None for a new training.
        epoch: The epoch to begin with, from 0.
        fraction: How much of it has been trained, 0..1.
        step: Optimizer steps done.
        hparams: The module's arguments in the checkpoint.
        metrics: The metrics when the checkpoint was written.
    """

    checkpoint: Path | None = None
    epoch: int = 0
    fraction: float = 0.0
    step: int = 0
    hparams: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def read_start(path: Path) -> Start:
    """Read where a checkpoint was written.

    Raises:
        UserError: If it is broken, or no checkpoint of a training with this package's data module.
    """
    content = read_checkpoint(path)
    try:
        epoch, batch, batches = (content[_DATA][key] for key in ("epoch", "batch", "batches"))
    except KeyError as error:
        raise UserError(
            f"expected a checkpoint with its place in the data, but {path} has none; load its weights by init_weights"
        ) from error
    ended = batch >= batches
    return Start(
        path,
        epoch + ended,
        0.0 if ended else batch / batches,
        content["global_step"],
        content["hyper_parameters"],
        content.get(METRICS, {}),
    )


def find_start(resume: str | None, output_dir: Path, first: bool = True) -> Start:
    """Find the checkpoint to go on from; refuse to write over a run.

    Args:
        resume: None, ``auto`` or a path.
        output_dir: The run folder.
        first: Whether this is the first process, which alone says what it finds: the others may look when it has begun
            to write. They all find the same checkpoint.

    Raises:
        UserError: If the run folder holds a run and nothing says to resume, or there is no checkpoint to resume.
    """
    if resume == "auto":
        return _find_last(output_dir, first)
    existing = _existing(output_dir)
    inside = resume is not None and Path(resume).resolve().is_relative_to(output_dir)
    if first and existing and not inside:
        raise UserError(
            f"expected a new run folder, but {existing[0]} exists; go on with resume=auto, or choose another "
            "hydra.run.dir"
        )
    if resume is None:
        return Start()
    if not Path(resume).is_file():
        raise UserError(
            f"expected a checkpoint to resume from, but {resume} does not exist; leave resume out to start anew"
        )
    return read_start(Path(resume))


def check_unfinished(start: Start, output_dir: Path, epochs: int) -> None:
    """Refuse to go on with a training that has ended; if only its evaluation is missing, that is done.

    Raises:
        UserError: If all epochs are trained, and the results are written or another run folder is meant.
    """
    if start.checkpoint is None or start.epoch < epochs:
        return
    evaluated = not start.checkpoint.resolve().is_relative_to(output_dir)
    with suppress(OSError, ValueError, KeyError):
        evaluated = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))["steps"] >= start.step
    if evaluated:
        raise UserError(
            f"expected epochs left to train, but {start.checkpoint} has finished all {epochs}; raise schedule.epochs"
        )
    log.info("all %d epochs are trained; evaluating the best checkpoint", epochs)


def _existing(output_dir: Path) -> list[Path]:
    return [*sorted((output_dir / "checkpoints").glob("*.ckpt")), *output_dir.glob("metrics.*")]


def _find_last(output_dir: Path, first: bool) -> Start:
    candidates = [path for name in (LAST, PREVIOUS, BEST) if (path := output_dir / "checkpoints" / name).exists()]
    warn = log.warning if first else log.debug
    for path in candidates:
        try:
            start = read_start(path)
        except UserError:
            warn("%s is broken or not a checkpoint of a training; looking for the one before", path)
            continue
        return start
    if candidates:
        raise UserError(
            f"expected a whole checkpoint in {output_dir / 'checkpoints'}, but "
            f"{', '.join(path.name for path in candidates)} are all broken; choose another hydra.run.dir to start anew"
        )
    if first and (output_dir / "metrics.json").exists():
        raise UserError(
            f"expected a checkpoint to resume from, but {output_dir} holds a finished run without one; choose another "
            "hydra.run.dir to start anew"
        )
    if first:
        log.info("resume=auto: no checkpoint in %s yet, starting at the first step", output_dir)
    return Start()


def move_place(content: dict[str, Any], batches: int, accumulate: int) -> None:
    """Move a checkpoint to the same epoch and part of it, where epochs have another number of steps now.

    That is the case with another number of devices, batch size or accumulation. Steps are counted as if the training
    had had the present number from its beginning, so the schedule of the learning rate goes on at the same place.

    Args:
        content: The checkpoint, which is changed.
        batches: Batches in an epoch now.
        accumulate: Batches in an optimizer step now.
    """
    data, loops = content[_DATA], content["loops"]["fit_loop"]
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
