"""Network perturbation: deactivate residual blocks (MLPMatch, arXiv 2411.05307).

A residual block computes ``act(shortcut(x) + residual(x))``. Deactivating it drops the residual branch, which leaves
``act(shortcut(x))``: stochastic depth with one draw for the whole batch.

Register a rule for your own residual blocks with::

    @bypass.register
    def _(block: MyBlock, x):
        return x

and use `deactivate` to bypass blocks inside any model.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, singledispatch
from typing import Any

from timm.models._efficientnet_blocks import DepthwiseSeparableConv, EdgeResidual, InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from mlpmatch_pl.utils.errors import UserError, suggest
from mlpmatch_pl.utils.seeding import derive_seed

Stages = Sequence[Sequence[int]]
"""Indices of the blocks that can be deactivated, grouped by encoder stage."""


@singledispatch
def bypass(block: nn.Module, x_BDHW: Tensor) -> Tensor:
    """Run a residual block without its residual branch.

    Args:
        block: The residual block.
        x_BDHW: Its input, (B, D, H, W). It is not modified, because the active block reads it too.

    Raises:
        TypeError: If no rule is registered for the type of block.

    Example:
        >>> import torch
        >>> block = BasicBlock(8, 8)
        >>> x = torch.rand(1, 8, 4, 4)
        >>> torch.equal(bypass(block, x), x)
        True
    """
    raise TypeError(f"no bypass is registered for {type(block).__name__}; register one with @bypass.register")


@singledispatch
def has_shortcut(block: nn.Module) -> bool:
    """Return whether a block has an identity or projected shortcut, so that it can be deactivated.

    True for every type with a registered `bypass`, unless a rule registered here decides otherwise.
    """
    return bypass.dispatch(type(block)) is not bypass.dispatch(object)


def _bypass_resnet(block: Any, x_BDHW: Tensor, activation: str) -> Tensor:
    # Cloned because timm's activations work in place, and the active block reads the same input.
    shortcut = x_BDHW.clone() if block.downsample is None else block.downsample(x_BDHW)
    return getattr(block, activation)(shortcut)  # type: ignore[no-any-return]


@bypass.register
def _(block: BasicBlock, x_BDHW: Tensor) -> Tensor:
    return _bypass_resnet(block, x_BDHW, "act2")


@bypass.register
def _(block: Bottleneck, x_BDHW: Tensor) -> Tensor:
    return _bypass_resnet(block, x_BDHW, "act3")


@bypass.register(DepthwiseSeparableConv)
@bypass.register(EdgeResidual)
@bypass.register(InvertedResidual)
def _(block: nn.Module, x_BDHW: Tensor) -> Tensor:
    return x_BDHW


@has_shortcut.register(DepthwiseSeparableConv)
@has_shortcut.register(EdgeResidual)
@has_shortcut.register(InvertedResidual)
def _(block: Any) -> bool:
    return bool(block.has_skip)


@contextmanager
def deactivate(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Context manager that bypasses residual blocks of any model.

    The encoders of this package take deactivated blocks as an argument instead, which lets them share the part before.

    Args:
        blocks: Blocks of the model that take one tensor each.

    Raises:
        TypeError: If a block has no shortcut, or no `bypass` is registered for its type.

    Example:
        >>> import torch
        >>> model, x = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8)), torch.rand(1, 8, 4, 4)
        >>> with deactivate(model):
        ...     same = torch.equal(model(x), x)
        >>> same, torch.equal(model(x), x)
        (True, False)
    """
    chosen = list(dict.fromkeys(blocks))
    for block in chosen:
        if not has_shortcut(block):
            raise TypeError(
                f"expected blocks with a shortcut and a registered bypass, but got {type(block).__name__}; register a "
                "bypass with @bypass.register, or leave the block out"
            )
    patched = [vars(block).get("forward") for block in chosen]  # by an outer context or another library
    try:
        for block in chosen:
            block.forward = partial(bypass, block)
        yield
    finally:
        for block, forward in zip(chosen, patched, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _single_block(stages: Stages, rng: random.Random) -> frozenset[int]:
    return frozenset({rng.choice(_flatten(stages))})


def _single_stage(stages: Stages, rng: random.Random) -> frozenset[int]:
    return frozenset(rng.choice(stages))


def _stage_bernoulli(stages: Stages, rng: random.Random, p: float = 0.25) -> frozenset[int]:
    return frozenset(_flatten([stage for stage in stages if rng.random() < p]))


def _n_blocks(stages: Stages, rng: random.Random, k: int = 2) -> frozenset[int]:
    blocks = _flatten(stages)
    return frozenset(rng.sample(blocks, min(k, len(blocks))))


def _block_bernoulli(stages: Stages, rng: random.Random, p: float = 0.1) -> frozenset[int]:
    return frozenset(block for block in _flatten(stages) if rng.random() < p)


def _flatten(stages: Stages) -> list[int]:
    return [block for stage in stages for block in stage]


SAMPLERS: Mapping[str, Callable[..., frozenset[int]]] = {
    "single_block": _single_block,  # paper: one bottleneck layer in the entire encoder
    "single_stage": _single_stage,  # the other reading of "layer"
    "stage_bernoulli": _stage_bernoulli,  # the authors' code; 0.75**4 = 31.6% of the draws are empty
    "n_blocks": _n_blocks,  # ablation; worse with more than one, says the paper
    "block_bernoulli": _block_bernoulli,  # ablation
}


class NetworkPerturbation:
    """Draws the blocks to deactivate as a function of (seed, step).

    Every rank draws the same blocks without communication (with SyncBatchNorm, ranks that skip different layers would
    deadlock), and a resumed run repeats the draws of an uninterrupted one.

    Args:
        sampler: One of `SAMPLERS`.
        seed: Seed of all random draws.
        options: ``k`` for ``n_blocks``, ``p`` for the two Bernoulli samplers.

    Raises:
        UserError: If the sampler or its options are unknown or out of range.

    Example:
        >>> perturbation = NetworkPerturbation("single_block", seed=0)
        >>> stages = [[0, 1, 2], [3, 4, 5, 6]]
        >>> perturbation.draw(stages, step=7) == perturbation.draw(stages, step=7)
        True
        >>> len(perturbation.draw(stages, step=7))
        1
    """

    def __init__(self, sampler: str = "single_block", seed: int = 0, **options: float) -> None:
        if sampler not in SAMPLERS:
            raise UserError(
                f"expected a network perturbation sampler of {', '.join(SAMPLERS)}, but got {sampler!r}."
                + suggest(sampler, SAMPLERS)
            )
        known = {"n_blocks": {"k"}, "stage_bernoulli": {"p"}, "block_bernoulli": {"p"}}.get(sampler, set())
        if unknown := sorted(set(options) - known):
            raise UserError(
                f"sampler {sampler!r} takes {', '.join(sorted(known)) or 'no options'}, but got {', '.join(unknown)}"
            )
        if not 0 <= options.get("p", 0) <= 1:
            raise UserError(f"expected the sampler's p between 0 and 1, but got {options['p']}")
        if "k" in options:
            if options["k"] < 1 or options["k"] != int(options["k"]):
                raise UserError(f"expected the sampler's k as an integer of at least 1, but got {options['k']}")
            options["k"] = int(options["k"])
        self.seed = seed
        self._sample = partial(SAMPLERS[sampler], **options)

    def draw(self, stages: Stages, step: int, *view: int) -> frozenset[int]:
        """Return the indices of the blocks to deactivate in a step; Bernoulli samplers may draw none.

        Args:
            stages: Indices of the blocks that can be deactivated, by stage.
            step: Number of the step.
            view: Number of the strong view, for draws of its own.
        """
        return self._sample(stages, random.Random(derive_seed(self.seed, "network", step, *view)))
