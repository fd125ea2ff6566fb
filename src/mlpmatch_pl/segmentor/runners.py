"""How the encoder's blocks run while training: as they are, compiled, or with checkpointed activations.

A block is compiled or checkpointed by itself, so that which blocks are deactivated stays in Python: a compiled encoder
would be compiled anew for every draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

BlockRunner = Callable[[nn.Module, Tensor], Tensor]


def block_runner(compiled: bool, checkpointed: bool, backend: str = "inductor") -> BlockRunner:
    """Return what runs a block in training.

    Args:
        compiled: Compile each block with torch.compile, when it first runs; the names of its weights stay. The result
            differs by rounding.
        checkpointed: Keep a block's input alone, and compute the block again in the backward pass: less memory for
            more time. The result is the same, and BatchNorm's running statistics are moved once.
        backend: Compiler.

    Example:
        >>> run, x = block_runner(compiled=False, checkpointed=True), torch.rand(3, 2, 4, 4, requires_grad=True)
        >>> norm = nn.BatchNorm2d(2)
        >>> run(norm, x).sum().backward()
        >>> norm.num_batches_tracked.item()
        1
    """
    run: BlockRunner = CompiledBlocks(backend) if compiled else run_block
    return partial(_checkpoint, run) if checkpointed else run


def run_block(block: nn.Module, x_BDHW: Tensor) -> Tensor:
    """Run a block as it is."""
    return block(x_BDHW)  # type: ignore[no-any-return]


class CompiledBlocks:
    """Compiles each block when it first runs. A copy compiles anew, for its own blocks.

    Args:
        backend: Compiler.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._compiled: dict[nn.Module, Callable[[Tensor], Tensor]] = {}

    def __call__(self, block: nn.Module, x_BDHW: Tensor) -> Tensor:
        """Run a block."""
        if block not in self._compiled:
            self._compiled[block] = torch.compile(block, dynamic=False, backend=self.backend)
        return self._compiled[block](x_BDHW)

    def __reduce__(self) -> tuple[type[CompiledBlocks], tuple[str]]:
        return CompiledBlocks, (self.backend,)


def _checkpoint(run: BlockRunner, block: nn.Module, x_BDHW: Tensor) -> Tensor:
    # Blocks draw nothing, so the generators' state need not be kept (on a GPU that would wait for the device).
    return checkpoint(
        partial(run, block), x_BDHW, use_reentrant=False, preserve_rng_state=False, context_fn=partial(_contexts, block)
    )


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), _untracked(block)


@contextmanager
def _untracked(block: nn.Module) -> Iterator[None]:
    """Normalise by the batch without moving running statistics, or counting the batch."""
    norms = [child for child in block.modules() if isinstance(child, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, counted) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counted
