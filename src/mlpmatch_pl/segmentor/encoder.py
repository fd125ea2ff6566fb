"""What an encoder hands to a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mlpmatch_pl.perturbation.network import has_shortcut
from mlpmatch_pl.segmentor.blocks import PLAIN, BlockRunner, block_runner
from mlpmatch_pl.segmentor.weights import load_pretrained
from mlpmatch_pl.utils.errors import UserError, suggest


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


OUTPUT_STRIDES = (8, 16, 32)
NOTHING: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Family:
    """Where a family of timm models keeps its parts."""

    stem: Callable[[Any, Tensor], Tensor]
    stages: Callable[[Any], list[str]]
    unused: tuple[str, ...]  # would be parameters without gradient, which DDP refuses


def _resnet_stem(model: Any, x: Tensor) -> Tensor:
    return model.maxpool(model.act1(model.bn1(model.conv1(x))))  # type: ignore[no-any-return]


def _efficientnet_stem(model: Any, x: Tensor) -> Tensor:
    return model.bn1(model.conv_stem(x))  # type: ignore[no-any-return]


FAMILIES: dict[str, Family] = {  # by timm's module
    "resnet": Family(_resnet_stem, lambda model: ["layer1", "layer2", "layer3", "layer4"], ("global_pool", "fc")),
    "efficientnet": Family(  # MobileNetV2 and EfficientNet-Lite are of this class in timm
        _efficientnet_stem,
        lambda model: [f"blocks.{i}" for i in range(len(model.blocks))],
        ("conv_head", "bn2", "global_pool", "classifier"),
    ),
}


class Encoder(nn.Module):
    """Image to features at stride 4 and at the output stride, plain or with deactivated blocks.

    Args:
        backbone: Name of a timm model of the ResNet family (``resnet50``, ``resnet101s`` ...) or of an
            inverted-residual family (``mobilenetv2_100``, ``efficientnet_lite0`` ...).
        pretrained: True downloads timm's weights; a path reads a state dict from a local file.
        in_chans: Number of image channels; a pretrained first convolution is adapted to it.
        output_stride: 8, 16 or 32.
        compile_blocks: Compile each block for training, see `block_runner`.
        activation_checkpointing: Keep only the blocks' inputs for the backward pass, see `block_runner`.

    Raises:
        UserError: If the backbone is unknown or of another family, or cannot have the output stride.

    Example:
        >>> import torch
        >>> encoder = Encoder("test_resnet", output_stride=16)
        >>> [tuple(level.shape) for level in encoder(torch.rand(2, 3, 65, 65)).levels]
        [(2, 32, 17, 17), (2, 96, 5, 5)]
    """

    def __init__(
        self,
        backbone: str,
        pretrained: bool | str = False,
        in_chans: int = 3,
        output_stride: int = 16,
        compile_blocks: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model = _create(backbone, in_chans, output_stride)
        self._family = _family(backbone)
        self._stages = self._family.stages(self.model)
        info = self.model.feature_info
        low = next(stage for stage in info if stage["reduction"] == 4)
        self.channels: tuple[int, int] = (low["num_chs"], info[-1]["num_chs"])
        self._low_tap = sum(len(self._stage(name)) for name in self._stages[: self._stages.index(low["module"]) + 1])
        if pretrained:
            load_pretrained(self.model, backbone, pretrained, in_chans, skip=self._family.unused)
        for name in self._family.unused:
            delattr(self.model, name)
        self._run_in_training = block_runner(compile_blocks, activation_checkpointing)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in the order in which they run."""
        return [block for name in self._stages for block in self._stage(name)]

    @property
    def stages(self) -> list[list[int]]:
        """Indices into `blocks` of those that may be deactivated, grouped by stage; stages without any are left out."""
        stages, first = [], 0
        for name in self._stages:
            blocks = self._stage(name)
            stages.append([first + i for i, block in enumerate(blocks) if has_shortcut(block)])
            first += len(blocks)
        return [stage for stage in stages if stage]

    def forward(self, image_BCHW: Tensor, deactivated: frozenset[int] = NOTHING) -> Features:
        """Run one full pass.

        Args:
            image_BCHW: Normalized images, (B, in_chans, H, W), H and W at least 33.
            deactivated: Indices of the blocks to bypass.

        Returns:
            Features at stride 4 and at the output stride.
        """
        return self._run(self._family.stem(self.model, image_BCHW), 0, (), deactivated)

    def forward_forked(
        self,
        image_BCHW: Tensor,
        deactivated: frozenset[int],
        perturbed_context: AbstractContextManager[None] | None = None,
    ) -> tuple[Features, Features]:
        """Run the plain and the perturbed pass, sharing everything before the first deactivated block.

        Loss and gradients equal those of two calls of `forward` (to rounding); only BatchNorm's running
        statistics see the shared prefix once instead of twice. With nothing deactivated both are the same.

        Args:
            image_BCHW: Normalized images, (B, in_chans, H, W).
            deactivated: Indices of the blocks to bypass in the perturbed pass.
            perturbed_context: Entered around the part that only the perturbed pass runs.

        Returns:
            Plain and perturbed features.
        """
        fork = min(deactivated, default=len(self.blocks))
        x = self._family.stem(self.model, image_BCHW)
        levels: tuple[Tensor, ...] = ()
        runner = self._runner()
        for index, block in enumerate(self.blocks[:fork]):
            x = runner.run(block, x)
            levels = (*levels, x) if index + 1 == self._low_tap else levels
        plain = self._run(x, fork, levels, NOTHING)
        if not deactivated:
            return plain, plain
        with perturbed_context or nullcontext():
            return plain, self._run(x, fork, levels, deactivated)

    def _run(self, x: Tensor, start: int, levels: tuple[Tensor, ...], deactivated: frozenset[int]) -> Features:
        runner = self._runner()
        for index, block in enumerate(self.blocks[start:], start):
            x = (runner.bypass if index in deactivated else runner.run)(block, x)
            levels = (*levels, x) if index + 1 == self._low_tap else levels
        return Features((*levels, x))

    def _runner(self) -> BlockRunner:
        # Evaluation sees images of many sizes, and keeps nothing for a backward pass.
        return self._run_in_training if self.training else PLAIN

    def _stage(self, name: str) -> nn.Sequential:
        stage: nn.Sequential = self.model.get_submodule(name)
        return stage


def _create(backbone: str, in_chans: int, output_stride: int) -> Any:
    if not timm.is_model(backbone):
        raise UserError(
            f"expected the name of a timm model as backbone, but got {backbone!r}." + suggest(backbone, _supported())
        )
    _family(backbone)
    if output_stride not in OUTPUT_STRIDES:
        raise UserError(f"expected an output stride of 8, 16 or 32, but got {output_stride}")
    model = timm.create_model(backbone, in_chans=in_chans, output_stride=output_stride)
    reached = model.feature_info[-1]["reduction"]
    if reached != output_stride:
        raise UserError(f"backbone {backbone} cannot have output stride {output_stride}, only {reached}")
    return model


def _family(backbone: str) -> Family:
    for module, family in FAMILIES.items():
        if timm.models.is_model_in_modules(backbone, [module]):
            return family
    raise UserError(
        f"expected a backbone of the ResNet or inverted-residual families, but {backbone} is of another; "
        "try resnet50, resnet101s, mobilenetv2_100 or efficientnet_lite0"
    )


def _supported() -> Iterable[str]:
    return [*timm.list_models(module="resnet"), *timm.list_models(module="efficientnet")]
