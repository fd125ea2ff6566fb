"""Some batches of the real training, and how large they may be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from mlpmatch_pl.callbacks.progress import DataWait
from mlpmatch_pl.commands.benchmark.clock import StepClock, ValidationClock
from mlpmatch_pl.commands.benchmark.memory import MemoryLine, device_bytes, peak, start_peak
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.engine.trainer import build_trainer
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.errors import UserError

_FOR_MEMORY = 2  # optimizer steps after which the peak does not rise any more: momentum comes with the first
_SMALLEST = 2  # BatchNorm and CutMix need two images


class Training:
    """A training of which only parts are run.

    Args:
        config: The whole configuration.
        output_dir: Where Lightning would write, if it had something to write.
        datamodule: The data.
    """

    def __init__(self, config: dict[str, Any], output_dir: Path, datamodule: SemiSupervisedDataModule) -> None:
        # The clock and nothing else: what callbacks, loggers and checkpoints take is not measured.
        silent = {"enable_progress_bar": False, "enable_checkpointing": False, "fast_dev_run": False}
        self._config, self._output_dir = {**config, "trainer": {**config["trainer"], **silent}}, output_dir
        self._accumulated = config["trainer"]["accumulate_grad_batches"]
        self.datamodule = datamodule

    def trainer(self, *callbacks: Any) -> Trainer:
        """Build the trainer that the training would have.

        Raises:
            UserError: If the configuration asks for several processes, or for a device without a clock.
        """
        trainer = build_trainer(self._config, self._output_dir, self.datamodule, list(callbacks))
        if trainer.world_size > 1:
            raise UserError(
                f"expected one device to measure on, but got {trainer.world_size} processes; use trainer.devices=1 and "
                "trainer.num_nodes=1: each of several devices takes the time of one, and that of exchanging gradients"
            )
        if trainer.strategy.root_device.type not in ("cpu", "cuda"):
            raise UserError(
                f"expected a CPU or a CUDA device to measure on, but got {trainer.strategy.root_device}; "
                "use trainer.accelerator=cpu"
            )
        # It would advise to run the very command that runs.
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, DataWait)]  # type: ignore[attr-defined]
        return trainer

    def fit(self, module: MLPMatch, batches: int) -> tuple[StepClock, int] | None:
        """Train for so many batches.

        Returns:
            The clock and the peak memory, or None if the batches do not fit in the memory.
        """
        clock = StepClock(batches)
        trainer = self.trainer(clock)
        trainer.limit_val_batches = 0
        trainer.fit_loop.max_epochs = max(
            trainer.max_epochs or 1, math.ceil(batches / self.datamodule.steps_per_epoch())
        )
        started = start_peak(trainer.strategy.root_device)
        try:
            trainer.fit(module, datamodule=self.datamodule)
        except torch.OutOfMemoryError:
            return None
        return clock, peak(trainer.strategy.root_device, started)

    def validate(self, module: MLPMatch, batches: int) -> float:
        """Return the seconds of a validation batch, measured on so many."""
        clock = ValidationClock()
        trainer = self.trainer(clock)
        trainer.limit_val_batches = batches + 1
        trainer.validate(module, datamodule=self.datamodule, verbose=False)
        return clock.seconds_a_batch

    def memory_line(self, module: MLPMatch, batch: int, used: int) -> MemoryLine | None:
        """Measure the memory of a second batch size, and draw the line through both; None if it does not fit.

        Args:
            module: What is trained.
            batch: Labeled images in a batch that was measured.
            used: Bytes that it took at most.
        """
        other = second_size(batch)
        with resized(self.datamodule, other):
            measured = self.fit(module, _FOR_MEMORY * self._accumulated)
        return None if measured is None else MemoryLine.through((batch, used), (other, measured[1]))

    def refuse_batch(self, module: MLPMatch) -> UserError:
        """Say which batch size fits, after one that did not."""
        wanted = self.datamodule.batch_size
        device = self.trainer().strategy.root_device
        where = f"{device_bytes(device) / 1e9:.0f} GB of {device}" if device.type == "cuda" else "memory"
        message = f"expected batches of loader.batch_size={wanted} to fit in the {where}, but they do not; "
        fits = wanted // 2
        while fits >= _SMALLEST:
            with resized(self.datamodule, fits):
                if self.fit(module, _FOR_MEMORY * self._accumulated) is not None:
                    batches = math.ceil(wanted * self._accumulated / fits)
                    return UserError(f"{message}use loader.batch_size={fits} trainer.accumulate_grad_batches={batches}")
            fits //= 2
        return UserError(f"{message}not even {_SMALLEST} do: lower loader.crop_size, or take a smaller backbone")


def second_size(batch: int) -> int:
    """Return the batch size whose memory is measured beside that of ``batch``: the smaller one, where there is one.

    Example:
        >>> second_size(8), second_size(3)
        (4, 6)
    """
    return batch // 2 if batch >= 2 * _SMALLEST else 2 * batch


@contextmanager
def resized(datamodule: SemiSupervisedDataModule, batch: int) -> Iterator[None]:
    """Use another number of labeled images in a batch, and as many unlabeled ones in proportion."""
    labeled, unlabeled = datamodule.batch_size, datamodule.unlabeled_batch_size
    datamodule.batch_size = batch
    datamodule.unlabeled_batch_size = max(round(unlabeled * batch / labeled), min(unlabeled, _SMALLEST))
    try:
        yield
    finally:
        datamodule.batch_size, datamodule.unlabeled_batch_size = labeled, unlabeled
