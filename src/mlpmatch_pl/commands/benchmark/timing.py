"""Time and memory of a training step, of validation and of loading."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from mlpmatch_pl.callbacks.progress import MAX_DATA_WAIT
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule, share_workers

MOST_WORKERS = 64
MEMORY_MARGIN = 0.1  # share of the device that stays free: fragmentation, larger validation images, other processes


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
