"""Time and memory of a training step, of validation and of loading."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from itertools import islice, pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from mlpmatch_pl.callbacks.progress import MAX_DATA_WAIT
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule, share_workers
from mlpmatch_pl.utils.timing import Moment, now, seconds_between

MOST_WORKERS = 64
MEMORY_MARGIN = 0.1  # share of the device that stays free: fragmentation, larger validation images, other processes


class StepTimer(Callback):
    """Times the batches of a training, records its peak memory, and stops it.

    Args:
        batches: Batches after which the training stops.

    Attributes:
        peak_bytes: The most memory allocated on a GPU at once; on a CPU, the peak resident memory of the process.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.peak_bytes = 0
        self._marks: list[Moment] = []

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
        self._marks = [now(pl_module.device)]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is on the device."""
        self._marks.append(now(pl_module.device))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the training after the last batch."""
        self._marks.append(now(pl_module.device))
        trainer.should_stop = len(self._marks) > 2 * self.batches

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


def time_loading(datamodule: SemiSupervisedDataModule, batches: int) -> dict[str, float]:
    """Return the seconds that one process takes to load a batch, by stream.

    Args:
        datamodule: Ready to train.
        batches: Number of timed batches, after one that is not timed.
    """
    num_workers, threads = datamodule.num_workers, torch.get_num_threads()
    datamodule.num_workers = 0
    torch.set_num_threads(1)  # as in a worker
    try:
        streams: Mapping[str, DataLoader[Any]] = datamodule.train_dataloader().iterables
        seconds = {}
        for name, loader in streams.items():
            stream = _endless(loader)
            next(stream)
            started = time.perf_counter()
            for _ in islice(stream, batches):
                pass
            seconds[name] = (time.perf_counter() - started) / batches
        return seconds
    finally:
        datamodule.num_workers = num_workers
        torch.set_num_threads(threads)


def predicted_wait(loading: Mapping[str, float], workers: Mapping[str, int], step: float) -> float:
    """Return the seconds per batch that a long training waits for data.

    Streams with workers load during the step, streams without delay it.

    Args:
        loading: Seconds that one process takes to load a batch, by stream.
        workers: Processes of each stream; 0 loads in the main process.
        step: Seconds that a batch takes once it is loaded.

    Example:
        >>> predicted_wait({"labeled": 1.0, "unlabeled": 6.0}, {"labeled": 1, "unlabeled": 2}, step=2.0)
        1.0
        >>> predicted_wait({"labeled": 1.0, "unlabeled": 6.0}, {"labeled": 0, "unlabeled": 2}, step=2.5)
        1.0
    """
    in_step = sum(seconds for name, seconds in loading.items() if not workers[name])
    beside = max((seconds / workers[name] for name, seconds in loading.items() if workers[name]), default=0.0)
    return max(in_step, beside - step)


def workers_needed(loading: Mapping[str, float], step: float) -> int | None:
    """Return the smallest number of workers that keeps data wait below 5% of the time; None if `MOST_WORKERS` do not.

    Example:
        >>> workers_needed({"labeled": 0.9}, step=0.3)
        3
    """
    for total in range(MOST_WORKERS + 1):
        wait = predicted_wait(loading, share_workers(total, len(loading)), step)
        if wait <= MAX_DATA_WAIT * (step + wait):
            return total
    return None


def largest_batch(first: tuple[int, float], second: tuple[int, float], device_bytes: float) -> int | None:
    """Extrapolate the memory of two batch sizes to the largest one that leaves a tenth of the device free.

    Args:
        first: A batch size and its peak memory in bytes.
        second: Another one.
        device_bytes: Memory of the device.

    Returns:
        None if memory does not grow with the batch.

    Example:
        >>> largest_batch((4, 3e9), (8, 5e9), device_bytes=10e9)
        16
    """
    per_image = (second[1] - first[1]) / (second[0] - first[0])
    if per_image <= 0:
        return None
    return max(int(first[0] + ((1 - MEMORY_MARGIN) * device_bytes - first[1]) / per_image), 0)


def _endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader
