"""Network perturbation: deactivate residual blocks (MLPMatch, arXiv 2411.05307).

A residual block computes ``act(shortcut(x) + residual(x))``. Deactivating it drops the residual branch, which leaves
``act(shortcut(x))``: stochastic depth with one draw for the whole batch. A transformer block has two residual branches,
attention and MLP; deactivated, it returns its input.

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
from typing import Any, NamedTuple

from timm.models._efficientnet_blocks import DepthwiseSeparableConv, EdgeResidual, InvertedResidual
from timm.models.convnext import ConvNeXtBlock
from timm.models.eva import EvaBlock
from timm.models.regnet import Bottleneck as RegNetBottleneck
from timm.models.res2net import Bottle2neck
from timm.models.resnest import ResNestBottleneck
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.sknet import SelectiveKernelBasic, SelectiveKernelBottleneck
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torchvision.models import convnext, efficientnet, mnasnet, mobilenetv2, mobilenetv3, regnet, swin_transformer
from torchvision.models import resnet as torchvision_resnet
from torchvision.models.vision_transformer import EncoderBlock

from mlpmatch_pl.utils.errors import UserError, suggest
from mlpmatch_pl.utils.seeding import derive_seed

Stages = Sequence[Sequence[int]]
"""Indices of the blocks that can be deactivated, grouped by encoder stage."""
BRANCHES = ("attn", "mlp")


class Branch(NamedTuple):
    """A residual branch of a transformer block.

    Attributes:
        block: Index of the block.
        name: One of `BRANCHES`.
    """

    block: int
    name: str


Unit = int | Branch
"""What can be deactivated: a block, by its index, or one of its branches."""


def block_of(unit: Unit) -> int:
    """Return the index of the block."""
    return unit.block if isinstance(unit, Branch) else unit


@singledispatch
def bypass(block: nn.Module, x: Tensor) -> Tensor:
    """Run a residual block without its residual branches.

    Args:
        block: The residual block.
        x: Its input, (B, D, H, W) or (B, N, D). It is not modified, because the active block reads it too.

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
    identity = block.downsample is None or isinstance(block.downsample, nn.Identity)
    shortcut = x_BDHW.clone() if identity else block.downsample(x_BDHW)
    return getattr(block, activation)(shortcut)  # type: ignore[no-any-return]


for _block, _activation in (
    (BasicBlock, "act2"),
    (Bottleneck, "act3"),
    (RegNetBottleneck, "act3"),
    (Bottle2neck, "relu"),
    (ResNestBottleneck, "act3"),
    (SelectiveKernelBasic, "act"),
    (SelectiveKernelBottleneck, "act"),
    (torchvision_resnet.BasicBlock, "relu"),
    (torchvision_resnet.Bottleneck, "relu"),
):
    bypass.register(_block, partial(_bypass_resnet, activation=_activation))


@bypass.register(convnext.CNBlock)
@bypass.register(efficientnet.FusedMBConv)
@bypass.register(efficientnet.MBConv)
@bypass.register(mnasnet._InvertedResidual)
@bypass.register(mobilenetv2.InvertedResidual)
@bypass.register(mobilenetv3.InvertedResidual)
@bypass.register(swin_transformer.SwinTransformerBlock)
@bypass.register(EncoderBlock)
@bypass.register(SwinTransformerBlock)
@bypass.register(SwinTransformerV2Block)
@bypass.register(DepthwiseSeparableConv)
@bypass.register(EdgeResidual)
@bypass.register(InvertedResidual)
@bypass.register(Block)
@bypass.register(EvaBlock)
def _(block: nn.Module, x: Tensor) -> Tensor:
    return x


@bypass.register
def _(block: ConvNeXtBlock, x_BDHW: Tensor) -> Tensor:
    return block.shortcut(x_BDHW)  # type: ignore[no-any-return]


@bypass.register
def _(block: regnet.ResBottleneckBlock, x_BDHW: Tensor) -> Tensor:
    return block.activation(x_BDHW.clone() if block.proj is None else block.proj(x_BDHW))  # type: ignore[no-any-return]


@has_shortcut.register(DepthwiseSeparableConv)
@has_shortcut.register(EdgeResidual)
@has_shortcut.register(InvertedResidual)
def _(block: Any) -> bool:
    return bool(block.has_skip)


@has_shortcut.register
def _(block: RegNetBottleneck) -> bool:
    return block.downsample is not None  # despite its name, the shortcut


@singledispatch
def bypass_branch(block: nn.Module, x_BND: Tensor, branch: str, *context: Any) -> Tensor:
    """Run a transformer block without one of its two residual branches.

    Args:
        block: The block.
        x_BND: Its input, (B, N, D).
        branch: One of `BRANCHES`.
        context: What the block gets beside its input, such as rotary positions.

    Raises:
        TypeError: If no rule is registered for the type of block.

    Example:
        >>> import torch
        >>> block, x = Block(8, num_heads=2), torch.rand(1, 5, 8)
        >>> torch.equal(bypass_branch(block, x, "attn"), x + block.mlp(block.norm2(x)))
        True
    """
    raise TypeError(f"{type(block).__name__} has no attention and MLP branches; register a rule with @bypass_branch")


def has_branches(block: nn.Module) -> bool:
    """Return whether the branches of a block can be deactivated one by one."""
    return bypass_branch.dispatch(type(block)) is not bypass_branch.dispatch(object)


@bypass_branch.register
def _(block: Block, x_BND: Tensor, branch: str) -> Tensor:
    if branch == "attn":
        return x_BND + block.drop_path2(block.ls2(block.mlp(block.norm2(x_BND))))  # type: ignore[no-any-return]
    return x_BND + block.drop_path1(block.ls1(block.attn(block.norm1(x_BND))))  # type: ignore[no-any-return]


@bypass_branch.register
def _(block: EvaBlock, x_BND: Tensor, branch: str, rope: Tensor | None = None) -> Tensor:
    if branch == "attn":
        residual, scale, drop_path = block.mlp(block.norm2(x_BND)), block.gamma_2, block.drop_path2
    else:
        residual, scale, drop_path = block.attn(block.norm1(x_BND), rope=rope), block.gamma_1, block.drop_path1
    return x_BND + drop_path(residual if scale is None else scale * residual)  # type: ignore[no-any-return]


@has_shortcut.register
def _(block: mnasnet._InvertedResidual) -> bool:
    return bool(block.apply_residual)


@has_shortcut.register(efficientnet.FusedMBConv)
@has_shortcut.register(efficientnet.MBConv)
@has_shortcut.register(mobilenetv2.InvertedResidual)
@has_shortcut.register(mobilenetv3.InvertedResidual)
def _(block: Any) -> bool:
    return bool(block.use_res_connect)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of any model that may be deactivated, by name, in the order of their definition.

    Example:
        >>> from torchvision.models import resnet18
        >>> [*find_blocks(resnet18())][:3]
        ['layer1.0', 'layer1.1', 'layer2.0']
    """
    return {name: module for name, module in model.named_modules() if has_shortcut(module)}


@contextmanager
def deactivate(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Context manager that bypasses residual blocks of any model.

    The encoders of this package take deactivated blocks as an argument instead, which lets them share the part before.

    Args:
        blocks: Blocks of the model. Of their arguments the first is the input; others are ignored.

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
            block.forward = partial(_bypass_call, block)
        yield
    finally:
        for block, forward in zip(chosen, patched, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _bypass_call(block: nn.Module, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return bypass(block, x)


def _single_block(stages: Stages, rng: random.Random) -> frozenset[Unit]:
    return frozenset({rng.choice(_flatten(stages))})


def _single_stage(stages: Stages, rng: random.Random) -> frozenset[Unit]:
    return frozenset(rng.choice(stages))


def _stage_bernoulli(stages: Stages, rng: random.Random, p: float = 0.25) -> frozenset[Unit]:
    return frozenset(_flatten([stage for stage in stages if rng.random() < p]))


def _single_branch(stages: Stages, rng: random.Random) -> frozenset[Unit]:
    return frozenset({Branch(rng.choice(_flatten(stages)), rng.choice(BRANCHES))})


def _n_blocks(stages: Stages, rng: random.Random, k: int = 2) -> frozenset[Unit]:
    blocks = _flatten(stages)
    return frozenset(rng.sample(blocks, min(k, len(blocks))))


def _block_bernoulli(stages: Stages, rng: random.Random, p: float = 0.1) -> frozenset[Unit]:
    return frozenset(block for block in _flatten(stages) if rng.random() < p)


def _flatten(stages: Stages) -> list[int]:
    return [block for stage in stages for block in stage]


SAMPLERS: Mapping[str, Callable[..., frozenset[Unit]]] = {
    "single_block": _single_block,  # paper: one bottleneck layer in the entire encoder
    "single_branch": _single_branch,  # attention or MLP of a transformer block
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

    def draw(self, stages: Stages, step: int, *view: int) -> frozenset[Unit]:
        """Return what to deactivate in a step; Bernoulli samplers may draw nothing.

        Args:
            stages: Indices of the blocks that can be deactivated, by stage.
            step: Number of the step.
            view: Number of the strong view, for draws of its own.
        """
        return self._sample(stages, random.Random(derive_seed(self.seed, "network", step, *view)))

    def draw_views(self, stages: Stages, step: int, views: int) -> list[frozenset[Unit]]:
        """Return what to deactivate in each strong view: other blocks in each, unless there are not enough."""
        draws: list[frozenset[Unit]] = []
        for view in range(views):
            taken = {block_of(unit) for draw in draws for unit in draw}
            left = [[block for block in stage if block not in taken] for stage in stages]
            draws.append(self.draw([stage for stage in left if stage] or stages, step, view))
        return draws
