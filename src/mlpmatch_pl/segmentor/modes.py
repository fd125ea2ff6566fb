"""How a pass leaves the network as it was: in eval mode for a while, or without moving BatchNorm's statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode, and every part of it back into its own mode afterwards, also after an error."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


@contextmanager
def frozen_batchnorm_statistics(module: nn.Module) -> Iterator[None]:
    """Normalize by the batch, but leave the running mean and variance, and the number of batches, as they are.

    Example:
        >>> norm = nn.BatchNorm2d(2)
        >>> with frozen_batchnorm_statistics(norm):
        ...     _ = norm(torch.rand(4, 2, 3, 3))
        >>> norm.running_mean.tolist(), norm.num_batches_tracked.item()
        ([0.0, 0.0], 0)
    """
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm, (_, counted) in zip(norms, kept, strict=True):
            norm.momentum = 0.0
            # SyncBatchNorm insists on a counter: it gets one to waste, which takes no operation to make.
            norm.num_batches_tracked = None if counted is None else torch.empty_like(counted)
        yield
    finally:
        for norm, (momentum, counted) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counted
