"""How encoder blocks run: as they are, bypassed, compiled or checkpointed; and BatchNorm modes.

Blocks are compiled or checkpointed one by one, so that Python decides which ones are deactivated. A compiled encoder
would be recompiled for every draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mlpmatch_pl.perturbation.network import bypass

BlockFunction = Callable[..., Tensor]
"""Runs a block on its input, with what the encoder gives all blocks beside it, such as rotary positions."""

MAX_GRAPHS = 1024  # per process, for all kinds of blocks and input sizes


def run_block(block: nn.Module, x: Tensor, *context: Any) -> Tensor:
    """Run a block as it is."""
    return block(x, *context)  # type: ignore[no-any-return]


class BlockRunner(NamedTuple):
    """Functions that run a block as it is (``run``) or deactivated (``bypass``)."""

    run: BlockFunction = run_block
    bypass: BlockFunction = bypass


def block_runner(compiled: bool, checkpointed: bool, backend: str | Callable[..., Any] = "inductor") -> BlockRunner:
    """Return the functions that run blocks during training.

    Args:
        compiled: Compile each block with torch.compile on its first run. Parameter names stay the same; results differ
            by rounding.
        checkpointed: Keep only a block's input and recompute the block in the backward pass: less memory, more time.
            Results are the same, and BatchNorm's running statistics are updated once.
        backend: Backend of torch.compile.

    Example:
        >>> runner, x = block_runner(compiled=False, checkpointed=True), torch.rand(3, 2, 4, 4, requires_grad=True)
        >>> norm = nn.BatchNorm2d(2)
        >>> runner.run(norm, x).sum().backward()
        >>> norm.num_batches_tracked.item()
        1
    """
    # Deactivated blocks are compiled too: the BatchNorm of their projection runs either way, and a compiled pass must
    # not overwrite the running statistics that an eager pass has saved for its backward pass.
    plain = BlockRunner(Compiled(run_block, backend), Compiled(bypass, backend)) if compiled else BlockRunner()
    return BlockRunner(partial(_checkpoint, plain.run), plain.bypass) if checkpointed else plain


class Compiled:
    """A block function that is compiled on its first run; blocks of one kind share a graph. Can be copied and pickled.

    Args:
        function: The function to compile.
        backend: Backend of torch.compile.
    """

    def __init__(self, function: BlockFunction, backend: str | Callable[..., Any]) -> None:
        self.function, self.backend = function, backend

    def __call__(self, block: nn.Module, x: Tensor, *context: Any) -> Tensor:
        """Run a block."""
        # torch falls back to eager after 8 graphs of a function, but ResNet-50 alone has 8 kinds of blocks. The limits
        # (by their names in torch 2.6) are per thread, and on a GPU checkpointed blocks are recomputed in another one.
        with torch._dynamo.config.patch(cache_size_limit=MAX_GRAPHS, accumulated_cache_size_limit=MAX_GRAPHS):
            return self._compiled(block, x, *context)

    @cached_property
    def _compiled(self) -> BlockFunction:
        return torch.compile(self.function, dynamic=False, backend=self.backend)

    def __reduce__(self) -> tuple[type[Compiled], tuple[BlockFunction, str | Callable[..., Any]]]:
        return Compiled, (self.function, self.backend)


def _checkpoint(run: BlockFunction, block: nn.Module, x: Tensor, *context: Any) -> Tensor:
    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), frozen_batchnorm_statistics(block)

    # Blocks draw no random numbers, and saving the generators' state would synchronize with a GPU.
    return checkpoint(run, block, x, *context, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Context manager that puts a module in eval mode, then restores the mode of each submodule."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


@contextmanager
def frozen_batchnorm_statistics(module: nn.Module) -> Iterator[None]:
    """Context manager in which BatchNorm normalizes by the batch, but does not update its running statistics.

    Example:
        >>> norm = nn.BatchNorm2d(2)
        >>> with frozen_batchnorm_statistics(norm):
        ...     _ = norm(torch.rand(4, 2, 3, 3))
        >>> norm.running_mean.tolist(), norm.num_batches_tracked.item()
        ([0.0, 0.0], 0)
    """
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm, (_, counter) in zip(norms, saved, strict=True):
            norm.momentum = 0.0
            # SyncBatchNorm needs a counter; an uninitialized one costs no operation.
            norm.num_batches_tracked = None if counter is None else torch.empty_like(counter)
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, saved, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter
