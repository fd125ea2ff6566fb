"""How the encoder's blocks run while training: as they are, compiled, or with checkpointed activations.

A block is compiled or checkpointed by itself, so that which blocks are deactivated stays in Python: a compiled encoder
would be compiled anew for every draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mlpmatch_pl.perturbation.network import bypass

BlockFunction = Callable[[nn.Module, Tensor], Tensor]

GRAPHS = 1024  # at most, for all kinds of blocks and sizes of input of a process


@dataclass(frozen=True)
class BlockRunner:
    """What runs a block.

    Attributes:
        run: Runs it as it is.
        bypass: Runs it deactivated.
    """

    run: BlockFunction
    bypass: BlockFunction


def block_runner(compiled: bool, checkpointed: bool, backend: str | Callable[..., Any] = "inductor") -> BlockRunner:
    """Return what runs a block in training.

    Args:
        compiled: Compile blocks with torch.compile, when they first run; the names of their weights stay. The result
            differs by rounding.
        checkpointed: Keep a block's input alone, and compute the block again in the backward pass: less memory for
            more time. The result is the same, and BatchNorm's running statistics are moved once.
        backend: Compiler.

    Example:
        >>> runner, x = block_runner(compiled=False, checkpointed=True), torch.rand(3, 2, 4, 4, requires_grad=True)
        >>> norm = nn.BatchNorm2d(2)
        >>> runner.run(norm, x).sum().backward()
        >>> norm.num_batches_tracked.item()
        1
    """
    # Deactivated blocks are compiled too: of those with a projection the BatchNorm runs either way, and the running
    # statistics that an eager pass keeps for its backward pass must not be written by a compiled one after it.
    plain = BlockRunner(Compiled(run_block, backend), Compiled(bypass, backend)) if compiled else PLAIN
    return BlockRunner(partial(_checkpoint, plain.run), plain.bypass) if checkpointed else plain


def run_block(block: nn.Module, x_BDHW: Tensor) -> Tensor:
    """Run a block as it is."""
    return block(x_BDHW)  # type: ignore[no-any-return]


PLAIN = BlockRunner(run_block, bypass)


class Compiled:
    """A function of a block and its input, compiled when it first runs; blocks of one kind share their graph.

    Args:
        function: What to compile.
        backend: Compiler.
    """

    def __init__(self, function: BlockFunction, backend: str | Callable[..., Any]) -> None:
        self.function, self.backend = function, backend

    def __call__(self, block: nn.Module, x_BDHW: Tensor) -> Tensor:
        """Run a block."""
        # torch compiles a function 8 times and then runs it uncompiled, which is meant to catch sizes without end;
        # ResNet-50 alone has 8 kinds of blocks. The names are those that torch 2.6 has too. They hold for a thread, and
        # on a GPU checkpointed blocks are computed again in another one: so they are set in every call.
        with torch._dynamo.config.patch(cache_size_limit=GRAPHS, accumulated_cache_size_limit=GRAPHS):
            return self._compiled(block, x_BDHW)

    @cached_property
    def _compiled(self) -> BlockFunction:
        return torch.compile(self.function, dynamic=False, backend=self.backend)

    def __reduce__(self) -> tuple[type[Compiled], tuple[BlockFunction, str | Callable[..., Any]]]:
        return Compiled, (self.function, self.backend)


def _checkpoint(run: BlockFunction, block: nn.Module, x_BDHW: Tensor) -> Tensor:
    # Blocks draw nothing, so the generators' state need not be kept (on a GPU that would wait for the device).
    return checkpoint(
        partial(run, block), x_BDHW, use_reentrant=False, preserve_rng_state=False, context_fn=partial(_contexts, block)
    )


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), frozen_batchnorm_statistics(block)


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
