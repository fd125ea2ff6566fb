"""Which image comes when: pure functions of (seed, epoch), the same for any number of workers and after a resume.

Both samplers are DistributedSamplers, because Lightning leaves those as they are; others it would replace.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import DistributedSampler

from mlpmatch_pl.seeding import mix


class StreamSampler(DistributedSampler[int]):
    """An endless stream of shuffled passes, cut into epochs and dealt to the ranks.

    Every pass over the ``size`` images has its own permutation, also within an epoch. The ranks take turns, so a
    global batch is the same set of draws for any number of ranks, and every rank meets every image.

    Args:
        size: Number of images.
        num_samples: Number of draws a rank and epoch.
        rank: This process.
        world_size: Number of processes.
        seed: Seed of the permutations; the labeled and the unlabeled stream need different ones.

    Yields:
        ``(index, draw)``: the image, and the number of the draw over all ranks and epochs, which seeds its views.

    Example:
        >>> sampler = StreamSampler(size=3, num_samples=6, seed=1)
        >>> sorted(index for index, _ in sampler), [draw for _, draw in sampler]
        ([0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5])
    """

    def __init__(self, size: int, num_samples: int, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        super().__init__(range(size), num_replicas=world_size, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.size, self.num_samples = size, num_samples
        self.start = 0

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        total = self.num_samples * self.num_replicas
        passes = -(-total // self.size)
        order = torch.cat([self._permutation(self.epoch * passes + number) for number in range(passes)])[:total]
        start, self.start = self.start, 0  # the start counts for the resumed epoch only
        for position in range(self.rank + start * self.num_replicas, total, self.num_replicas):
            yield int(order[position]), self.epoch * total + position

    def _permutation(self, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(mix(self.seed, "permutation", number))
        return torch.randperm(self.size, generator=generator)


class ShardSampler(DistributedSampler[int]):
    """Deals images to the ranks in order, each exactly once: no image is repeated to even out the ranks.

    Example:
        >>> [list(ShardSampler(5, rank, world_size=2)) for rank in range(2)]
        [[0, 2, 4], [1, 3]]
    """

    def __init__(self, size: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(size), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.indices = range(rank, size, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
