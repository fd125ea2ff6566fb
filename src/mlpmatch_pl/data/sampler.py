"""The order of images: pure functions of (seed, epoch), the same for any number of workers and after a resume.

Both samplers are DistributedSamplers, because Lightning replaces any other sampler in distributed training.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import distributed
from torch.utils.data import DistributedSampler

from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.seeding import derive_seed


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes; (0, 1) before torch.distributed is initialized.

    Example:
        >>> rank_and_world_size()
        (0, 1)
    """
    started = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if started else (0, 1)


class _ShardedSampler(DistributedSampler[int]):
    """Samples for a given rank, or for the current one, which must not change before iteration."""

    def __init__(self, size: int, rank: int | None, world_size: int | None, shuffle: bool, seed: int = 0) -> None:
        here = rank_and_world_size()
        self._assumed = rank is None or world_size is None
        rank, world_size = here if rank is None or world_size is None else (rank, world_size)
        super().__init__(range(size), world_size, rank, shuffle, seed)  # type: ignore[arg-type]

    def _check_world_size(self) -> None:
        """Refuse a loader that was created before torch.distributed: all ranks would get the same images."""
        here = rank_and_world_size()
        if self._assumed and here != (self.rank, self.num_replicas):
            raise UserError(
                f"expected loaders for {here[1]} processes, but they were created for {self.num_replicas}, before the "
                "others were started; pass datamodule=... to the Trainer, not its loaders"
            )


@dataclass(frozen=True)
class BurnIn:
    """Which draws of a stream are loaded: other numbers per batch during burn-in than after it.

    Attributes:
        steps: Number of batches of the burn-in.
        batch_size: Draws of a batch, loaded or not.
        during: Images of a batch during burn-in.
        after: Images of a batch after it.

    Example:
        >>> burn_in = BurnIn(steps=1, batch_size=2, during=2, after=1)
        >>> [burn_in.loads(number) for number in range(4)]
        [True, True, True, False]
    """

    steps: int
    batch_size: int
    during: int
    after: int

    def loads(self, number: int) -> bool:
        """Tell whether a draw of this rank is loaded; draws are counted from the start of the training."""
        step, slot = divmod(number, self.batch_size)
        return slot < (self.during if step < self.steps else self.after)


class StreamSampler(_ShardedSampler):
    """An endless stream of shuffled passes over the images, cut into epochs and divided among the ranks.

    Every pass over the ``size`` images has its own permutation, also within an epoch. The ranks take turns, so a global
    batch is the same set of draws for any number of ranks, and every rank gets every image.

    Args:
        size: Number of images.
        num_samples: Number of draws per rank and epoch.
        rank: Rank of this process. Default: that of torch.distributed.
        world_size: Number of processes. Default: that of torch.distributed.
        seed: Seed of the permutations. The labeled and the unlabeled stream need different seeds.
        burn_in: Which draws are loaded. Default: all.

    Raises:
        UserError: When iterated, if rank and world size were left out and have changed since.

    Yields:
        ``(index, draw)``: the image, and the number of the draw over all ranks and epochs, which seeds the views. The
        index is None for a draw that is not loaded.

    Example:
        >>> sampler = StreamSampler(size=3, num_samples=6, seed=1)
        >>> sorted(index for index, _ in sampler), [draw for _, draw in sampler]
        ([0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5])
    """

    def __init__(
        self,
        size: int,
        num_samples: int,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        burn_in: BurnIn | None = None,
    ) -> None:
        super().__init__(size, rank, world_size, shuffle=True, seed=seed)
        self.size, self.num_samples, self.burn_in = size, num_samples, burn_in
        self.start = 0

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[tuple[int | None, int]]:  # type: ignore[override]
        self._check_world_size()
        total = self.num_samples * self.num_replicas
        passes = -(-total // self.size)
        order = torch.cat([self._permutation(self.epoch * passes + number) for number in range(passes)])[:total]
        start, self.start = self.start, 0  # applies to the resumed epoch only
        for number in range(start, self.num_samples):
            position = self.rank + number * self.num_replicas
            loaded = self.burn_in is None or self.burn_in.loads(self.epoch * self.num_samples + number)
            yield int(order[position]) if loaded else None, self.epoch * total + position

    def _permutation(self, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "permutation", number))
        return torch.randperm(self.size, generator=generator)


class ShardSampler(_ShardedSampler):
    """Divides images among the ranks in order, each exactly once: no image is repeated to make the shares equal.

    Args:
        size: Number of images.
        rank: Rank of this process. Default: that of torch.distributed.
        world_size: Number of processes. Default: that of torch.distributed.

    Raises:
        UserError: When iterated, if rank and world size were left out and have changed since.

    Example:
        >>> [list(ShardSampler(5, rank, world_size=2)) for rank in range(2)]
        [[0, 2, 4], [1, 3]]
    """

    def __init__(self, size: int, rank: int | None = None, world_size: int | None = None) -> None:
        super().__init__(size, rank, world_size, shuffle=False)
        self.indices = range(self.rank, size, self.num_replicas)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        self._check_world_size()
        return iter(self.indices)
