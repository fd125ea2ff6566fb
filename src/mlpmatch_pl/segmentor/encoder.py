"""timm backbones as encoders whose residual blocks can be deactivated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mlpmatch_pl.perturbation.network import has_shortcut
from mlpmatch_pl.segmentor.blocks import BlockRunner, block_runner
from mlpmatch_pl.segmentor.weights import load_pretrained
from mlpmatch_pl.utils.errors import UserError, suggest


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
        return Features(tuple(level[images] for level in self.levels))

    @staticmethod
    def cat(parts: Sequence[Features]) -> Features:
        """Concatenate batches of features."""
        return Features(tuple(torch.cat(levels) for levels in zip(*(part.levels for part in parts), strict=True)))


OUTPUT_STRIDES = (8, 16, 32)


@dataclass(frozen=True)
class Family:
    """A family of timm models.

    Attributes:
        stem: Runs the layers before the first block.
        stages: Returns the names of the modules that hold the blocks.
        unused: Names of the modules after the last block.
    """

    stem: Callable[[Any, Tensor], Tensor]
    stages: Callable[[Any], list[str]]
    unused: tuple[str, ...]


def _resnet_stem(model: Any, x: Tensor) -> Tensor:
    return model.maxpool(model.act1(model.bn1(model.conv1(x))))  # type: ignore[no-any-return]


def _resnet_stages(model: Any) -> list[str]:
    return ["layer1", "layer2", "layer3", "layer4"]


def _efficientnet_stages(model: Any) -> list[str]:
    return [f"blocks.{index}" for index in range(len(model.blocks))]


def _efficientnet_stem(model: Any, x: Tensor) -> Tensor:
    return model.bn1(model.conv_stem(x))  # type: ignore[no-any-return]


FAMILIES: dict[str, Family] = {  # by module in timm.models
    "resnet": Family(_resnet_stem, _resnet_stages, ("global_pool", "fc")),
    "efficientnet": Family(  # MobileNetV2 and EfficientNet-Lite too
        _efficientnet_stem,
        _efficientnet_stages,
        ("conv_head", "bn2", "global_pool", "classifier"),
    ),
}


class Encoder(nn.Module):
    """A timm backbone that returns features at stride 4 and at the output stride, plain or with deactivated blocks.

    Args:
        backbone: Name of a timm model of the ResNet family (``resnet50``, ``resnet101s``, ...) or of an
            inverted-residual family (``mobilenetv2_100``, ``efficientnet_lite0``, ...).
        pretrained: True to download timm's weights, or the path of a local state dict.
        in_chans: Number of image channels, to which a pretrained first convolution is adapted.
        output_stride: 8, 16 or 32.
        compile_blocks: Compile each block for training.
        activation_checkpointing: Keep only the blocks' inputs for the backward pass.

    Raises:
        UserError: If the backbone is unknown or not supported, or cannot have the output stride.

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
        low_stages = self._stages[: self._stages.index(low["module"]) + 1]
        self._last_low_block = sum(len(self._stage(name)) for name in low_stages) - 1
        if pretrained:
            load_pretrained(self.model, backbone, pretrained, in_chans, skip=self._family.unused)
        for name in self._family.unused:  # DDP refuses parameters without gradient
            delattr(self.model, name)
        self._training_runner = block_runner(compile_blocks, activation_checkpointing)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in the order they run."""
        return [block for name in self._stages for block in self._stage(name)]

    @property
    def stages(self) -> list[list[int]]:
        """Indices of the `blocks` that can be deactivated, grouped by stage, without empty stages."""
        stages, first = [], 0
        for name in self._stages:
            blocks = self._stage(name)
            stages.append([first + i for i, block in enumerate(blocks) if has_shortcut(block)])
            first += len(blocks)
        return [stage for stage in stages if stage]

    def forward(self, image_BCHW: Tensor, deactivated: frozenset[int] = frozenset()) -> Features:
        """Run a full pass.

        Args:
            image_BCHW: Normalized images, (B, in_chans, H, W), H and W at least 33.
            deactivated: Indices of the blocks to bypass.

        Returns:
            Features at stride 4 and at the output stride.
        """
        stem = self._family.stem(self.model, image_BCHW)
        return Features(self._run((stem,), range(len(self.blocks)), deactivated))

    def forward_forked(
        self,
        image_BCHW: Tensor,
        deactivated: frozenset[int],
        perturbed_context: AbstractContextManager[None] | None = None,
    ) -> tuple[Features, Features]:
        """Run a plain and a perturbed pass that share everything before the first deactivated block.

        Features and gradients equal those of two calls of `forward`, to rounding; only BatchNorm's running statistics
        are updated once instead of twice in the shared part. With no deactivated block both are the same object.

        Args:
            image_BCHW: Normalized images, (B, in_chans, H, W).
            deactivated: Indices of the blocks to bypass in the perturbed pass.
            perturbed_context: Context manager around the unshared part of the perturbed pass.

        Returns:
            Plain and perturbed features.
        """
        fork, end = min(deactivated, default=len(self.blocks)), len(self.blocks)
        shared = self._run((self._family.stem(self.model, image_BCHW),), range(fork))
        plain = Features(self._run(shared, range(fork, end)))
        if not deactivated:
            return plain, plain
        with perturbed_context or nullcontext():
            return plain, Features(self._run(shared, range(fork, end), deactivated))

    def _run(
        self, levels: tuple[Tensor, ...], indices: range, deactivated: frozenset[int] = frozenset()
    ) -> tuple[Tensor, ...]:
        """Run blocks on the last level, which their output replaces; the low-level features are inserted before it."""
        # Evaluation has images of many sizes and no backward pass.
        runner = self._training_runner if self.training else BlockRunner()
        blocks, (*low, x) = self.blocks, levels
        for index in indices:
            x = (runner.bypass if index in deactivated else runner.run)(blocks[index], x)
            if index == self._last_low_block:
                low.append(x)
        return (*low, x)

    def _stage(self, name: str) -> nn.Sequential:
        stage: nn.Sequential = self.model.get_submodule(name)
        return stage


def _create(backbone: str, in_chans: int, output_stride: int) -> Any:
    if not timm.is_model(backbone):
        supported = [name for module in FAMILIES for name in timm.list_models(module=module)]
        raise UserError(
            f"expected the name of a timm model as backbone, but got {backbone!r}." + suggest(backbone, supported)
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
        f"expected a backbone of the ResNet or inverted-residual families, but got {backbone}; "
        "try resnet50, resnet101s, mobilenetv2_100 or efficientnet_lite0"
    )
