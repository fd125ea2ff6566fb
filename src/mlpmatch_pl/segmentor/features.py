"""What an encoder hands to a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Feature maps of one batch, from low to high level.

    Attributes:
        levels: A map for each level, (B, D, H, W) with its own D, H and W.

    Example:
        >>> features = Features((torch.ones(3, 4, 8, 8), torch.ones(3, 6, 2, 2)))
        >>> [tuple(level.shape) for level in Features.cat([features, features[1:]]).levels]
        [(5, 4, 8, 8), (5, 6, 2, 2)]
    """

    levels: tuple[Tensor, ...]

    def __getitem__(self, images: slice) -> Features:
        """Select images of the batch."""
        return Features(tuple(level[images] for level in self.levels))

    @staticmethod
    def cat(parts: Sequence[Features]) -> Features:
        """Concatenate batches."""
        return Features(tuple(torch.cat(levels) for levels in zip(*(part.levels for part in parts), strict=True)))
