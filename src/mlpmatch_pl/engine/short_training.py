"""Some steps of a training, timed: for the benchmark, and for a training whose length is given in minutes."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mlpmatch_pl.callbacks.progress import DataWait, duration
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.engine.build import build_module
from mlpmatch_pl.engine.resume import Start
from mlpmatch_pl.engine.trainer import build_trainer, length_of_training
from mlpmatch_pl.methods.method import Method, resolve_method
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.timing import Moment, now, seconds_between

log = logging.getLogger(__name__)

WARMUP, TIMED, VALIDATED = 2, 6, 3  # batches: before the timed ones, timed, and timed in validation
SHARE = 0.1  # of the minutes that a training is given: steps are timed no longer, but at least one
FEW_STEPS = 100


class StepTimer(Callback):
    """Times the batches of a training, records its peak memory, and stops it.

    Args:
        batches: Batches after which the training stops.
        max_seconds: Time after which it stops, too.
        min_batches: Batches before which it doesn't, however long they take.

    Attributes:
        peak_bytes: The most memory allocated on a GPU at once; on a CPU, the peak resident memory of the process.
    """

    def __init__(self, batches: int, max_seconds: float = math.inf, min_batches: int = 1) -> None:
        self.batches, self.max_seconds, self.min_batches = batches, max_seconds, min_batches
        self.peak_bytes = 0
        self._marks: list[Moment] = []
        self._started = 0.0

    def seconds(self, warmup: int) -> tuple[float, float]:
        """Return the mean seconds per batch of waiting for data and of computing, after ``warmup`` batches."""
        marks = self._marks[2 * warmup :]
        spans = [seconds_between(start, end) for start, end in pairwise(marks)]
        count = len(spans) // 2
        return sum(spans[::2]) / count, sum(spans[1::2]) / count

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to wait for the first batch."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._marks, self._started = [now(pl_module.device)], time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is on the device."""
        self._marks.append(now(pl_module.device))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the training after the last batch."""
        self._marks.append(now(pl_module.device))
        done, is_late = len(self._marks) // 2, time.monotonic() - self._started > self.max_seconds
        trainer.should_stop = done >= self.batches or (is_late and done >= self.min_batches)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the peak memory."""
        if pl_module.device.type == "cuda":
            self.peak_bytes = int(torch.cuda.max_memory_allocated(pl_module.device))
        elif sys.platform != "win32":
            import resource  # not on Windows

            unit = 1 if sys.platform == "darwin" else 1024
            self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class ValidationTimer(Callback):
    """Times validation batches, loading included, without the first one if there are several."""

    def __init__(self) -> None:
        self._marks: list[Moment] = []

    @property
    def seconds_per_batch(self) -> float:
        """Return the mean."""
        marks = self._marks[1:] if len(self._marks) > 2 else self._marks
        return seconds_between(marks[0], marks[-1]) / (len(marks) - 1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._marks = [now(pl_module.device)]

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Mark the end of a batch."""
        self._marks.append(now(pl_module.device))


class ShortTraining:
    """A training that stops after some batches.

    Args:
        config: The whole configuration.
        output_dir: The folder of the training; nothing is written to it.
        datamodule: The data.
    """

    def __init__(self, config: dict[str, Any], output_dir: Path, datamodule: SemiSupervisedDataModule) -> None:
        # Callbacks, loggers and checkpoints are not timed.
        silent = {"enable_progress_bar": False, "enable_checkpointing": False, "fast_dev_run": False}
        self.config, self._output_dir = {**config, "trainer": {**config["trainer"], **silent}}, output_dir
        self.datamodule = datamodule

    def trainer(self, *callbacks: Callback) -> Trainer:
        """Build the trainer of the training.

        Raises:
            UserError: If the configuration asks for several processes, or for a device that cannot be timed.
        """
        trainer = build_trainer(self.config, self._output_dir, self.datamodule, list(callbacks))
        if trainer.world_size > 1:
            raise UserError(
                f"expected one device, but got {trainer.world_size} processes; use trainer.devices=1 and "
                "trainer.num_nodes=1"
            )
        if trainer.strategy.root_device.type not in ("cpu", "cuda"):
            raise UserError(
                f"expected a CPU or a CUDA device, but got {trainer.strategy.root_device}; use trainer.accelerator=cpu"
            )
        # It would advise to run this very command.
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, DataWait)]  # type: ignore[attr-defined]
        return trainer

    def fit(
        self,
        module: MLPMatch,
        batches: int,
        burn_in: bool = False,
        max_seconds: float = math.inf,
        min_batches: int = 1,
    ) -> StepTimer | None:
        """Train for some batches of the burn-in, or after it; returns None if they do not fit into memory.

        Args:
            module: The module.
            batches: See `StepTimer`.
            burn_in: Whether the batches are those of the burn-in.
            max_seconds: See `StepTimer`.
            min_batches: Likewise.
        """
        timer = StepTimer(batches, max_seconds, min_batches)
        method = resolve_method("supervised") if burn_in else replace(self.datamodule.method, burn_in=0.0)
        trainer = self.trainer(timer)
        trainer.limit_val_batches = 0
        max_batches, self.datamodule.max_batches = self.datamodule.max_batches, None  # epochs as long as possible
        epochs = math.ceil(batches / self.datamodule.steps_per_epoch())
        trainer.fit_loop.max_epochs = max(trainer.max_epochs or 1, epochs)
        try:
            with using_method(self.datamodule, method):
                trainer.fit(module, datamodule=self.datamodule)
        except torch.OutOfMemoryError:
            return None
        finally:
            self.datamodule.max_batches = max_batches
        return timer

    def validate(self, module: MLPMatch, batches: int) -> float:
        """Return the seconds per validation batch, measured on some batches after a first one."""
        timer = ValidationTimer()
        trainer = self.trainer(timer)
        trainer.limit_val_batches = batches + 1
        trainer.validate(module, datamodule=self.datamodule, verbose=False)
        return timer.seconds_per_batch


@contextmanager
def using_method(datamodule: SemiSupervisedDataModule, method: Method) -> Iterator[None]:
    """Load batches for another method."""
    before, datamodule.method = datamodule.method, method
    try:
        yield
    finally:
        datamodule.method = before


def set_steps(
    config: dict[str, Any], output_dir: Path, datamodule: SemiSupervisedDataModule, start: Start
) -> dict[str, Any]:
    """Return a configuration whose ``schedule.steps`` fit into ``schedule.minutes``; unchanged without minutes.

    Some steps of both phases and some validation batches are timed with a network that is thrown away. A resumed
    training keeps its number of steps. The test of the best checkpoint is not part of the minutes.

    Raises:
        UserError: If the minutes are not positive, or another length is given, or there are several devices.
    """
    schedule = config["schedule"]
    minutes = schedule["minutes"]
    if minutes is None:
        return config
    if minutes <= 0 or schedule["epochs"] is not None or schedule["steps"] is not None:
        raise UserError(
            f"expected schedule.minutes above 0 and no other length, but got minutes={minutes}, "
            f"epochs={schedule['epochs']}, steps={schedule['steps']}; set the others to null"
        )
    steps = start.length.get("steps") if start.length.get("minutes") == minutes else None
    if steps is None:
        datamodule.prepare_data()
        steps = _steps_in(60 * minutes, _with_steps(config, 1), output_dir, datamodule)
    return _with_steps(config, steps)


def _with_steps(config: dict[str, Any], steps: int) -> dict[str, Any]:
    return {**config, "schedule": {**config["schedule"], "steps": steps}}


def _steps_in(seconds: float, config: dict[str, Any], output_dir: Path, datamodule: SemiSupervisedDataModule) -> int:
    training = ShortTraining(config, output_dir, datamodule)
    trainer, method = training.trainer(), datamodule.method
    accumulate = trainer.accumulate_grad_batches
    module = build_module(config, method, datamodule, trainer)

    def time_step(burn_in: bool) -> float:
        most, least = ((WARMUP + timed) * accumulate for timed in (TIMED, 1))
        timer = training.fit(module, most, burn_in, max_seconds=SHARE * seconds, min_batches=least)
        if timer is None:
            raise UserError(
                f"expected batches of loader.batch_size={datamodule.batch_size} to fit into memory, but they do not; "
                "'python -m mlpmatch_pl.benchmark' finds one that does"
            )
        return accumulate * sum(timer.seconds(WARMUP * accumulate))

    main = time_step(burn_in=False)
    burning_in = time_step(burn_in=True) if method.burn_in else main
    validation = training.validate(module, VALIDATED) * len(datamodule.val_dataloader())
    step = method.burn_in * burning_in + (1 - method.burn_in) * main
    datamodule.max_batches = None
    per_epoch = math.ceil(datamodule.steps_per_epoch() / accumulate)
    length, given = {"epochs": None, "steps": math.ceil(seconds / step)}, config["trainer"]["check_val_every_n_epoch"]
    epochs, every = length_of_training(length, per_epoch, every=given)
    # Validation takes at most half of the time; more would leave too little to train.
    training_seconds = max(seconds - epochs // every * validation, seconds / 2)
    steps = max(int(training_seconds / step), 1)
    log.info(
        "%s: %d steps of %.2f s%s; a validation takes %.1f s",
        duration(seconds), steps, main, f" ({burning_in:.2f} s during burn-in)" if method.burn_in else "", validation,
    )  # fmt: skip
    if steps < FEW_STEPS:
        log.warning(
            "note: %d steps are few; lower loader.batch_size=%d or loader.crop_size=%d for shorter ones, or raise "
            "schedule.minutes",
            steps, datamodule.batch_size, datamodule.crop_size,
        )  # fmt: skip
    return steps
