"""Where a training begins: at its first step, or where a checkpoint was written."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlpmatch_pl.callbacks.checkpoints import LENGTH, METRICS
from mlpmatch_pl.engine.loggers import ROWS
from mlpmatch_pl.engine.place import DATA
from mlpmatch_pl.utils.checkpoint import BEST, LAST, PREVIOUS, read_checkpoint, write_anew
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import set_aside

log = logging.getLogger(__name__)


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
        rows: Rows of metrics.csv when it was written; None if it does not say.
        length: The length of the training, as `mlpmatch_pl.callbacks.checkpoints.Resuming` saves it; empty if unknown.
    """

    checkpoint: Path | None = None
    epoch: int = 0
    fraction: float = 0.0
    step: int = 0
    hparams: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    rows: int | None = None
    length: Mapping[str, Any] = field(default_factory=dict)

    def is_before(self, other: Start) -> bool:
        """Tell whether another one is further; not by steps, since epochs may have had another number of them."""
        return (self.epoch, self.fraction) < (other.epoch, other.fraction)


def read_start(path: Path) -> Start:
    """Read where a checkpoint was written.

    Raises:
        UserError: If it is broken, or no checkpoint of a training with this package's data module.
    """
    content = read_checkpoint(path)
    try:
        epoch, batch, batches = (content[DATA][key] for key in ("epoch", "batch", "batches"))
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
        content.get(ROWS),
        _length(content),
    )


def _length(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the training's length, unless it is nonsense: checkpoints may come from anybody."""
    length = content.get(LENGTH)
    if not isinstance(length, dict) or not {"steps", "epochs", "every"} <= length.keys():
        return {}
    sound = all(isinstance(length[key], int) and length[key] > 0 for key in ("epochs", "every"))
    return length if sound else {}


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

    A metrics.json is set aside when a training goes on, so it is that of the last training or none.

    Raises:
        UserError: If all epochs are trained, and the results are written or another run folder is meant; or if more
            epochs have begun than there are to be.
    """
    if start.checkpoint is None or start.epoch < epochs:
        return
    if (start.epoch, start.fraction) > (epochs, 0):
        raise UserError(
            f"expected a checkpoint within the schedule's {epochs} epochs, but {start.checkpoint} has trained "
            f"{start.epoch + start.fraction:.3g}; raise schedule.epochs or schedule.steps"
        )
    inside = start.checkpoint.resolve().is_relative_to(output_dir)
    if not inside or (output_dir / "metrics.json").exists():
        raise UserError(
            f"expected epochs left to train, but {start.checkpoint} has finished all {epochs}; raise schedule.epochs"
        )
    log.info("all %d epochs are trained; evaluating the best checkpoint", epochs)


def check_classes(start: Start, names: Sequence[str]) -> None:
    """Refuse to go on with other classes, or in another order: each output of the network has learned one of them.

    Raises:
        UserError: If they differ.
    """
    before = start.hparams.get("class_names")
    if before is not None and list(before) != list(names):
        raise UserError(
            f"expected the classes {', '.join(map(str, before))} of {start.checkpoint}, in this order, but got "
            f"{', '.join(names)}; resume with the dataset options of the run that wrote it"
        )


def make_last(start: Start, output_dir: Path) -> None:
    """Make the checkpoint that a training goes on from the last.ckpt of its folder.

    So a training that is killed before its first checkpoint goes on from the same place with ``resume=auto``. Broken
    checkpoints, and those of a training that has been further, are set aside under another name. Killed at any moment,
    this does the rest when it is called again.

    Args:
        start: Where the training begins.
        output_dir: The run folder.
    """
    if start.checkpoint is None:
        return
    chosen, last = start.checkpoint.resolve(), output_dir / "checkpoints" / LAST
    if chosen != last.resolve():
        content = read_checkpoint(chosen)
        if not chosen.is_relative_to(output_dir):
            content.pop(ROWS, None)  # of another metrics.csv
        write_anew(content, last)
    for path in (last.with_name(PREVIOUS), last.with_name(BEST)):
        if path.exists() and path.resolve() != chosen and (reason := _no_use(path, start)):
            aside = set_aside(path, "_aside")
            log.warning("%s is %s; it is %s now", path, reason, aside.name if aside else "gone")


def _no_use(path: Path, start: Start) -> str | None:
    """Return why a training that begins there must not use a checkpoint; None if it may."""
    try:
        return "from after the checkpoint to go on from" if start.is_before(read_start(path)) else None
    except UserError:
        return "broken or not a checkpoint of a training"


def _existing(output_dir: Path) -> list[Path]:
    return [*sorted((output_dir / "checkpoints").glob("*.ckpt")), *output_dir.glob("metrics.*")]


def _find_last(output_dir: Path, first: bool) -> Start:
    candidates = [path for name in (LAST, PREVIOUS, BEST) if (path := output_dir / "checkpoints" / name).is_file()]
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
