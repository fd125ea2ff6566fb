"""Where a training starts: at its first step, or at a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlpmatch_pl.callbacks.checkpoints import DATA, LENGTH, METRICS
from mlpmatch_pl.methods.optimizers import PAPER_OPTIMIZER
from mlpmatch_pl.utils.checkpoint import BEST, LAST, PREVIOUS, read_checkpoint, write_checkpoint
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import free_name, set_aside

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a training starts.

    Args:
        checkpoint: The file to resume from; None for a new training.
        epoch: The epoch to start with, from 0.
        fraction: How much of it is trained, 0..1.
        step: Optimizer steps done.
        hparams: The module's arguments in the checkpoint.
        metrics: The metrics when the checkpoint was written.
        length: The length of the training, as `mlpmatch_pl.callbacks.checkpoints.Resume` saves it; empty if unknown.
    """

    checkpoint: Path | None = None
    epoch: int = 0
    fraction: float = 0.0
    step: int = 0
    hparams: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    length: Mapping[str, Any] = field(default_factory=dict)


def read_start(path: Path) -> Start:
    """Read where a checkpoint was written.

    Raises:
        UserError: If it is damaged, or not a checkpoint of a training with this package's data module.
    """
    content = read_checkpoint(path)
    try:
        epoch, batch, batches = (content[DATA][key] for key in ("epoch", "batch", "batches"))
    except KeyError as error:
        raise UserError(
            f"expected a checkpoint with its position in the dataset, but {path} has none; load its weights with "
            "init_weights"
        ) from error
    ended = batch >= batches
    return Start(
        path,
        epoch + ended,
        0.0 if ended else batch / batches,
        content["global_step"],
        content["hyper_parameters"],
        content.get(METRICS, {}),
        _length(content),
    )


def _length(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the training's length, unless it is invalid: the checkpoint may come from anyone."""
    length = content.get(LENGTH)
    if not isinstance(length, dict) or not {"steps", "epochs", "every"} <= length.keys():
        return {}
    valid = all(isinstance(length[key], int) and length[key] > 0 for key in ("epochs", "every"))
    return length if valid else {}


def find_start(resume: str | None, output_dir: Path, first: bool = True) -> Start:
    """Find the checkpoint to resume from, and refuse to overwrite a run.

    Args:
        resume: None, ``auto`` or a path.
        output_dir: The run folder.
        first: Whether this is the first process. Only that one logs and checks for an existing run: the others may
            look when it has started to write. All find the same checkpoint.

    Raises:
        UserError: If the folder holds a run and ``resume`` is not set, or there is no checkpoint to resume from.
    """
    if resume == "auto":
        return _find_last(output_dir, first)
    existing = [*sorted((output_dir / "checkpoints").glob("*.ckpt")), *output_dir.glob("metrics.*")]
    inside = resume is not None and Path(resume).resolve().is_relative_to(output_dir)
    if first and existing and not inside:
        raise UserError(
            f"expected a new run folder, but {existing[0]} exists; continue that run with resume=auto, or choose "
            "another hydra.run.dir"
        )
    if resume is None:
        return Start()
    if not Path(resume).is_file():
        raise UserError(
            f"expected a checkpoint to resume from, but {resume} does not exist; use the path of a .ckpt file"
        )
    return read_start(Path(resume))


def _find_last(output_dir: Path, first: bool) -> Start:
    candidates = [path for name in (LAST, PREVIOUS, BEST) if (path := output_dir / "checkpoints" / name).is_file()]
    for path in candidates:
        try:
            return read_start(path)
        except UserError:
            (log.warning if first else log.debug)(
                "%s is damaged or not a training checkpoint; trying the previous one", path
            )
    if candidates:
        raise UserError(
            f"expected an undamaged checkpoint in {output_dir / 'checkpoints'}, but "
            f"{', '.join(path.name for path in candidates)} are all damaged; start again in another hydra.run.dir"
        )
    if first and (output_dir / "metrics.json").exists():
        raise UserError(
            f"expected a checkpoint to resume from, but {output_dir} holds a finished run without one; start again in "
            "another hydra.run.dir"
        )
    if first:
        log.info("resume=auto: no checkpoint in %s yet, starting from scratch", output_dir)
    return Start()


def check_unfinished(start: Start, output_dir: Path, epochs: int, schedule: Mapping[str, Any]) -> None:
    """Refuse to resume a finished run. If only its test is missing, that is done.

    Raises:
        UserError: If all epochs are trained and the results exist, or another run folder is used; or if the checkpoint
            is beyond the configured epochs.
    """
    if start.checkpoint is None or start.epoch < epochs:
        return
    key = next(key for key in ("epochs", "minutes", "steps") if schedule[key] is not None)
    longer = f"raise schedule.{key} above {schedule[key]}"
    if (start.epoch, start.fraction) > (epochs, 0):
        raise UserError(
            f"expected a checkpoint within the schedule's {epochs} epochs, but {start.checkpoint} has trained "
            f"{start.epoch + start.fraction:.3g}; {longer}"
        )
    inside = start.checkpoint.resolve().is_relative_to(output_dir)
    if not inside or (output_dir / "metrics.json").exists():
        raise UserError(f"expected epochs left to train, but {start.checkpoint} has finished all {epochs}; {longer}")
    log.info("all %d epochs are trained; testing the best checkpoint", epochs)


def check_classes(start: Start, names: Sequence[str]) -> None:
    """Refuse to resume with other classes, or in another order: each output of the network has learned one of them.

    Raises:
        UserError: If they differ.
    """
    before = start.hparams.get("class_names")
    if before is not None and list(before) != list(names):
        raise UserError(
            f"expected the classes {', '.join(map(str, before))} of {start.checkpoint}, in this order, but got "
            f"{', '.join(names)}; resume with the dataset options of the run that wrote it"
        )


def check_optimizer(start: Start, hparams: Mapping[str, Any]) -> None:
    """Refuse to resume with another optimizer, whose state the checkpoint lacks.

    Raises:
        UserError: If the optimizer, or its division of the network into layers, differs.
    """
    specs = [saved.get("optimizer", PAPER_OPTIMIZER) for saved in (start.hparams, hparams)]
    layers = [saved.get("layer_decay", 1.0) for saved in (start.hparams, hparams)]
    before, now = (spec if isinstance(spec, str) else spec["name"] for spec in specs)
    if start.checkpoint is not None and (before != now or (layers[0] == 1) != (layers[1] == 1)):
        raise UserError(
            f"expected the optimizer of {start.checkpoint}, {before} with schedule.layer_decay={layers[0]}, but got "
            f"{now} with {layers[1]}; load its weights with init_weights to train them with another one"
        )


def make_last(start: Start, output_dir: Path) -> None:
    """Copy the checkpoint to resume from to last.ckpt of the run folder.

    A run that is killed before its first checkpoint then resumes from the same point with ``resume=auto``. Damaged
    checkpoints, and those from a later point, are renamed. This can be killed and repeated at any moment.

    Args:
        start: Where the training starts.
        output_dir: The run folder.
    """
    if start.checkpoint is None:
        return
    chosen, last = start.checkpoint.resolve(), output_dir / "checkpoints" / LAST
    if chosen != last.resolve():
        keep_as = free_name(last, "_aside").name if last.exists() else None
        write_checkpoint(read_checkpoint(chosen), last, keep_as)
    for path in (last.with_name(PREVIOUS), last.with_name(BEST)):
        if path.exists() and path.resolve() != chosen and (reason := _unusable(path, start)):
            aside = set_aside(path, "_aside")
            log.warning("%s is %s; it is now called %s", path, reason, aside.name if aside else None)


def _unusable(path: Path, start: Start) -> str | None:
    """Return why a training that starts there must not use a checkpoint, or None."""
    try:
        other = read_start(path)
    except UserError:
        return "damaged or not a training checkpoint"
    later = (other.epoch, other.fraction) > (start.epoch, start.fraction)  # not by steps: an epoch may have had others
    return "from a later point than the checkpoint to resume from" if later else None
