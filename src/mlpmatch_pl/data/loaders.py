"""Loaders of a data set, and how many processes load for each."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from mlpmatch_pl.cores import usable_cores
from mlpmatch_pl.data.sources import Source
from mlpmatch_pl.data.worker_signals import outlive_signals
from mlpmatch_pl.errors import UserError

MOST_WORKERS = 16  # more seldom load faster, and each costs memory


def build_loader(
    dataset: Dataset[Any],
    batch_size: int,
    sampler: Sampler[Any],
    workers: int,
    context: str | None = None,
    *,
    pinned: bool = False,
    **options: Any,
) -> DataLoader[Any]:
    """Build a loader whose processes stay, and do not end before the main process.

    Args:
        dataset: Samples.
        batch_size: Samples in a batch.
        sampler: Which samples, and when.
        workers: Processes; 0 loads in the main process.
        context: How processes are started; the platform's default if left out.
        pinned: Whether batches go to memory that a GPU reads directly.
        options: Further ones of torch's DataLoader.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context=context if workers else None,
        pin_memory=pinned,
        worker_init_fn=outlive_signals(),
        **options,
    )


def free_workers(processes: int) -> int:
    """Return how many workers each of the training processes on this machine may have, so that cores are left."""
    return min(max(usable_cores() // processes - 1, 0), MOST_WORKERS)


def share_workers(total: int, loaders: int) -> dict[str, int]:
    """Share workers out to one or two loaders: an unlabeled sample costs about three times a labeled one.

    Example:
        >>> share_workers(8, 2), share_workers(1, 2), share_workers(8, 1)
        ({'labeled': 2, 'unlabeled': 6}, {'labeled': 0, 'unlabeled': 1}, {'labeled': 8})
    """
    if loaders == 1:
        return {"labeled": total}
    labeled = max(total // 4, 1) if total > 1 else 0
    return {"labeled": labeled, "unlabeled": total - labeled}


def check_share(name: str, source: Source, world_size: int) -> None:
    """Refuse fewer images to evaluate than there are processes.

    Raises:
        UserError: With the name of the set.
    """
    if len(source) < world_size:
        raise UserError(
            f"expected at least {world_size} {name} images, one a process, but got {len(source)}; use fewer devices"
        )
