"""timm backbones as encoders whose residual blocks can be deactivated."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlpmatch_pl.perturbation.network import Branch, Unit, block_of, bypass_branch, has_shortcut
from mlpmatch_pl.segmentor.blocks import BlockRunner, block_runner
from mlpmatch_pl.segmentor.families import family_of
from mlpmatch_pl.segmentor.weights import load_pretrained


@dataclass(frozen=True)
class Features:
    """Feature maps of a batch, from low to high level.

    Attributes:
        levels: A map per level, (B, D, H, W), each with its own D, H and W.

    Example:
        >>> features = Features((torch.ones(3, 4, 8, 8), torch.ones(3, 6, 2, 2)))
        >>> [tuple(level.shape) for level in Features.cat([features, features[1:]]).levels]
        [(5, 4, 8, 8), (5, 6, 2, 2)]
    """

    levels: tuple[Tensor, ...]

    def __getitem__(self, images: slice) -> Features:
        """Return the features of some images of the batch."""
        if images == slice(None):
            return self
        return Features(tuple(level[images] for level in self.levels))

    @staticmethod
    def cat(parts: Sequence[Features]) -> Features:
        """Concatenate batches of features."""
        return Features(tuple(torch.cat(levels) for levels in zip(*(part.levels for part in parts), strict=True)))


class Encoder(nn.Module):
    """A timm backbone that returns feature maps of several levels, plain or with deactivated blocks.

    Args:
        backbone: Name of a timm model of a family in `mlpmatch_pl.segmentor.families` (``resnet50``,
            ``mobilenetv2_100``, ``convnext_tiny``, ``vit_small_patch14_dinov2``, ``vit_small_patch16_dinov3``, ...).
        pretrained: True to download timm's weights, ``auto`` to do so if there is a connection, or the path of a local
            state dict.
        in_chans: Number of image channels, to which a pretrained first convolution is adapted.
        output_stride: 8, 16 or 32; transformers have their patch size instead.
        pos_embed: Position embedding of transformers at other sizes than that of their pretraining: resized as in
            ``timm``, or as by the authors of ``dinov2``, see `mlpmatch_pl.segmentor.families.dinov2_positions`.
        levels: Which of the four feature maps to return, from low to high level.
        frozen: Keep the weights and statistics, and no intermediate results for a backward pass.
        compile_blocks: Compile each block for training.
        activation_checkpointing: Keep only the blocks' inputs for the backward pass.

    Attributes:
        channels: Number of channels of each returned map.
        strides: Pixels of the image per pixel of each map.
        multiple: Images are padded to a height and width that are multiples of this number.

    Raises:
        UserError: If the backbone is unknown or not supported, or cannot have the output stride.

    Example:
        >>> import torch
        >>> encoder = Encoder("test_resnet", output_stride=16)
        >>> [tuple(level.shape) for level in encoder(torch.rand(2, 3, 65, 65)).levels]
        [(2, 32, 17, 17), (2, 96, 5, 5)]
        >>> [tuple(level.shape) for level in Encoder("test_vit", levels=range(4))(torch.rand(2, 3, 65, 65)).levels]
        [(2, 64, 5, 5), (2, 64, 5, 5), (2, 64, 5, 5), (2, 64, 5, 5)]
    """

    def __init__(
        self,
        backbone: str,
        pretrained: bool | str = False,
        in_chans: int = 3,
        output_stride: int = 16,
        pos_embed: str = "timm",
        levels: Sequence[int] = (0, -1),
        frozen: bool = False,
        compile_blocks: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self._family = family_of(backbone, pos_embed)
        self.model = self._family.create(backbone, in_chans, output_stride)
        chosen = [self._family.levels(self.model)[level] for level in levels]
        self._read_after = {self.blocks[level.block] for level in chosen}
        self.channels = tuple(level.channels for level in chosen)
        self.strides = tuple(level.stride for level in chosen)
        self.multiple = self._family.multiple(self.model)
        if pretrained:
            load_pretrained(self.model, backbone, pretrained, in_chans, skip=self._family.unused)
        for name in self._family.unused:  # DDP refuses parameters without gradient
            if hasattr(self.model, name):
                delattr(self.model, name)
        self._training_runner = block_runner(compile_blocks, activation_checkpointing)
        self.frozen = frozen
        if frozen:
            self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Encoder:
        """Set the mode; a frozen encoder stays in eval mode, which keeps the statistics of BatchNorm."""
        return super().train(mode and not self.frozen)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in the order they run."""
        return [block for stage in self._family.stages(self.model) for block in stage]

    @property
    def stages(self) -> list[list[int]]:
        """Indices of the `blocks` that can be deactivated, grouped by stage, without empty stages."""
        stages, first = [], 0
        for blocks in self._family.stages(self.model):
            stages.append([first + i for i, block in enumerate(blocks) if has_shortcut(block)])
            first += len(blocks)
        return [stage for stage in stages if stage]

    def padded(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the height and width to which images of a size are padded."""
        return tuple((side + self.multiple - 1) // self.multiple * self.multiple for side in size)

    def forward(self, image_BCHW: Tensor, deactivated: frozenset[Unit] = frozenset()) -> Features:
        """Run a full pass.

        Args:
            image_BCHW: Normalized images, (B, in_chans, H, W), H and W at least 33.
            deactivated: Blocks to bypass, by index, or branches of them.

        Returns:
            Feature maps of the chosen levels.
        """
        with self._gradients():
            start = self._start(image_BCHW)
            return Features(self._run(start, range(len(self.blocks)), deactivated).levels)

    def forward_forked(
        self,
        image_BCHW: Tensor,
        deactivated: frozenset[Unit],
        perturbed_context: AbstractContextManager[None] | None = None,
        perturbed_images: slice = slice(None),
    ) -> tuple[Features, Features]:
        """Run a plain and a perturbed pass that share everything before the first deactivated block.

        Features and gradients equal those of two calls of `forward`, to rounding; only BatchNorm's running statistics
        are updated once instead of twice in the shared part. With no deactivated block both are the same.

        Args:
            image_BCHW: Normalized images, (B, in_chans, H, W).
            deactivated: Blocks to bypass in the perturbed pass, by index, or branches of them.
            perturbed_context: Context manager around the unshared part of the perturbed pass.
            perturbed_images: The images of the batch that the perturbed pass gets.

        Returns:
            Plain and perturbed features.
        """
        fork, end = min(map(block_of, deactivated), default=len(self.blocks)), len(self.blocks)
        with self._gradients():
            shared = self._run(self._start(image_BCHW), range(fork))
            plain = Features(self._run(shared, range(fork, end)).levels)
            if not deactivated:
                return plain, plain[perturbed_images]
            with perturbed_context or nullcontext():
                perturbed = self._run(shared.of(perturbed_images), range(fork, end), deactivated)
                return plain, Features(perturbed.levels)

    def _gradients(self) -> AbstractContextManager[Any]:
        return torch.no_grad() if self.frozen else nullcontext()

    def _start(self, image_BCHW: Tensor) -> _State:
        if self.multiple > 1:  # for any size, since an exported graph has no conditions
            height, width = image_BCHW.shape[2:]
            padded_height, padded_width = self.padded((height, width))
            image_BCHW = F.pad(image_BCHW, (0, padded_width - width, 0, padded_height - height), mode="replicate")
        return _State(*self._family.stem(self.model, image_BCHW))

    def _run(self, state: _State, indices: range, deactivated: frozenset[Unit] = frozenset()) -> _State:
        """Run blocks, and read the levels that lie among them."""
        # Evaluation has images of many sizes and no backward pass.
        runner = self._training_runner if self.training else BlockRunner()
        blocks, branches = self.blocks, {unit.block: unit.name for unit in deactivated if isinstance(unit, Branch)}
        x, context, grid, levels = state
        for index in indices:
            if index in deactivated:
                x = runner.bypass(blocks[index], x)
            elif index in branches:
                x = bypass_branch(blocks[index], x, branches[index], *context)
            else:
                x = runner.run(blocks[index], x, *context)
            if blocks[index] in self._read_after:
                levels = (*levels, self._family.read(self.model, x, grid))
        return _State(x, context, grid, levels)


class _State(NamedTuple):
    """An encoder between two blocks.

    Attributes:
        x: Input of the next block.
        context: What all blocks get beside their input.
        grid: Height and width in tokens, if the input consists of tokens.
        levels: The feature maps read so far.
    """

    x: Tensor
    context: tuple[Any, ...]
    grid: Sequence[int]
    levels: tuple[Tensor, ...] = ()

    def of(self, images: slice) -> _State:
        """Return the state of some images of the batch."""
        if images == slice(None):
            return self
        levels = tuple(level[images] for level in self.levels)
        return _State(self.x[images], self.context, self.grid, levels)
