"""What loading a batch costs one process, and how many of them keep up with the step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from mlpmatch_pl.callbacks.progress import MOST_WAIT
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule, share_workers

MOST_WORKERS = 64  # nobody has more cores to spare, and each costs memory


def time_loading(datamodule: SemiSupervisedDataModule, batches: int) -> dict[str, float]:
    """Return the seconds that one process takes to load a batch, by stream.

    Args:
        datamodule: Ready to train.
        batches: How many to load, after one that does not count.
    """
    chosen, datamodule.num_workers = datamodule.num_workers, 0
    try:
        streams = datamodule.train_dataloader().iterables
    finally:
        datamodule.num_workers = chosen
    return {name: _seconds_a_batch(loader, batches) for name, loader in streams.items()}


def present_workers(datamodule: SemiSupervisedDataModule) -> dict[str, int]:
    """Return how many workers the streams of a training have."""
    return {name: loader.num_workers for name, loader in datamodule.train_dataloader().iterables.items()}


def predicted_wait(loading: Mapping[str, float], workers: Mapping[str, int], step: float) -> float:
    """Return the seconds a batch that a long training waits for data.

    Streams with workers load beside the step, streams without delay it.

    Args:
        loading: Seconds that one process takes to load a batch, by stream.
        workers: Processes of each stream; 0 loads in the main process.
        step: Seconds that a batch takes once it is there.

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
    """Return the least number of workers with which data is waited for in at most 5 % of the time.

    Args:
        loading: Seconds that one process takes to load a batch, by stream.
        step: Seconds that a batch takes once it is there.

    Returns:
        None if even `MOST_WORKERS` do not suffice.

    Example:
        >>> workers_needed({"labeled": 0.9}, step=0.3)
        3
    """
    for total in range(MOST_WORKERS + 1):
        wait = predicted_wait(loading, share_workers(total, len(loading)), step)
        if wait <= MOST_WAIT * (step + wait):
            return total
    return None


def _seconds_a_batch(loader: DataLoader[Any], batches: int) -> float:
    """Return the mean; a worker has a single thread, and so has this process meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stream = _endless(loader)
        next(stream)
        started = time.perf_counter()
        for _ in islice(stream, batches):
            pass
        return (time.perf_counter() - started) / batches
    finally:
        torch.set_num_threads(threads)


def _endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader
