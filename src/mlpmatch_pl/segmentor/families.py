"""Families of timm models: how to run one block by block. A new family is one entry in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlpmatch_pl.utils.errors import UserError, require_choice, suggest

OUTPUT_STRIDES = (8, 16, 32)
LEVELS = 4


class Level(NamedTuple):
    """A feature map that an encoder can return.

    Attributes:
        block: Index of the block after which it is read.
        channels: Number of channels.
        stride: Pixels of the image per pixel of the map.
    """

    block: int
    channels: int
    stride: int


class Family(Protocol):
    """What `Encoder` needs to know of a timm model."""

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the modules after the last block, if the model has them."""

    def create(self, backbone: str, in_chans: int, output_stride: int) -> Any:
        """Create the timm model with random weights."""

    def stages(self, model: Any) -> list[list[nn.Module]]:
        """Return the blocks, in the order they run, grouped by stage."""

    def levels(self, model: Any) -> list[Level]:
        """Return the four feature maps, from low to high level."""

    def multiple(self, model: Any) -> int:
        """Return the number of which the height and width of images must be multiples."""

    def stem(self, model: Any, image_BCHW: Tensor) -> tuple[Tensor, tuple[Any, ...], Sequence[int]]:
        """Run what comes before the first block.

        Returns:
            The input of the first block, what all blocks get beside their input, and the height and width in tokens.
        """

    def read(self, model: Any, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Turn the output of a block into a feature map (B, D, H, W), of the grid's size if it consists of tokens."""


@dataclass(frozen=True)
class ConvNet:
    """A convolutional network with four stages of residual blocks, at strides 4 to 32.

    Attributes:
        run_stem: Runs the layers before the first block.
        list_stages: Returns the blocks by stage.
        unused: See `Family`.
        floors: Whether its layers crop what is left of a size that the output stride does not divide.
    """

    run_stem: Callable[[Any, Tensor], Tensor]
    list_stages: Callable[[Any], list[list[nn.Module]]]
    unused: tuple[str, ...]
    floors: bool = False

    def create(self, backbone: str, in_chans: int, output_stride: int) -> Any:
        """See `Family`.

        Raises:
            UserError: If the model cannot have the output stride.
        """
        if output_stride not in OUTPUT_STRIDES:
            raise UserError(f"expected an output stride of 8, 16 or 32, but got {output_stride}")
        model = timm.create_model(backbone, in_chans=in_chans, output_stride=output_stride)
        reached = model.feature_info[-1]["reduction"]
        if reached != output_stride:
            raise UserError(f"backbone {backbone} cannot have output stride {output_stride}, only {reached}")
        return model

    def stages(self, model: Any) -> list[list[nn.Module]]:
        """See `Family`."""
        return self.list_stages(model)

    def levels(self, model: Any) -> list[Level]:
        """See `Family`."""
        last, count = {}, 0
        for stage in self.stages(model):
            count += len(stage)
            last[stage[-1]] = count - 1
        levels = []
        for info in model.feature_info[-LEVELS:]:
            blocks = set(model.get_submodule(info["module"]).modules())
            block = next(index for module, index in last.items() if module in blocks)
            levels.append(Level(block, info["num_chs"], info["reduction"]))
        return levels

    def multiple(self, model: Any) -> int:
        """See `Family`."""
        return int(model.feature_info[-1]["reduction"]) if self.floors else 1

    def stem(self, model: Any, image_BCHW: Tensor) -> tuple[Tensor, tuple[Any, ...], Sequence[int]]:
        """See `Family`."""
        return self.run_stem(model, image_BCHW), (), ()

    def read(self, model: Any, x: Tensor, grid: Sequence[int]) -> Tensor:
        """See `Family`."""
        return x


class Transformer:
    """A plain vision transformer: blocks of one width on patches, four of which are read through the final norm."""

    unused = ("attn_pool", "fc_norm", "head_drop", "head")

    def create(self, backbone: str, in_chans: int, output_stride: int) -> Any:
        """See `Family`; the patch size takes the place of the output stride.

        Raises:
            UserError: If the model has too few blocks, or a position embedding for each.
        """
        model = timm.create_model(backbone, in_chans=in_chans, dynamic_img_size=True)
        if len(model.blocks) < LEVELS or getattr(model, "rope_mixed", False):
            raise UserError(
                f"expected a transformer with at least {LEVELS} blocks that share a position embedding, but got "
                f"{backbone}; try vit_small_patch14_dinov2 or vit_small_patch16_dinov3"
            )
        return model

    def stages(self, model: Any) -> list[list[nn.Module]]:
        """See `Family`; a stage ends with a block that is read."""
        ends = [0, *(level.block + 1 for level in self.levels(model))]
        return [list(model.blocks[start:end]) for start, end in pairwise(ends)]

    def levels(self, model: Any) -> list[Level]:
        """See `Family`."""
        depth, stride = len(model.blocks), self.multiple(model)
        # Of the 24 blocks of ViT-L, DINOv2 and UniMatch V2 read these.
        read = (4, 11, 17, 23) if depth == 24 else [depth * (level + 1) // LEVELS - 1 for level in range(LEVELS)]
        return [Level(block, model.embed_dim, stride) for block in read]

    def multiple(self, model: Any) -> int:
        """See `Family`; the patch size."""
        return int(model.patch_embed.patch_size[0])

    def stem(self, model: Any, image_BCHW: Tensor) -> tuple[Tensor, tuple[Any, ...], Sequence[int]]:
        """See `Family`."""
        patches_BHWD = model.patch_embed(image_BCHW)
        x_BND, *context = self.embed(model, patches_BHWD)
        return model.norm_pre(x_BND), tuple(context), patches_BHWD.shape[1:3]

    def embed(self, model: Any, x_BHWD: Tensor) -> tuple[Any, ...]:
        """Return tokens with their positions, and what all blocks get beside them."""
        return (model._pos_embed(x_BHWD),)

    def read(self, model: Any, x: Tensor, grid: Sequence[int]) -> Tensor:
        """See `Family`."""
        patches_BND = model.norm(x)[:, model.num_prefix_tokens :]
        return patches_BND.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)  # type: ignore[no-any-return]


class RotaryTransformer(Transformer):
    """A transformer whose attention gets rotary positions, as DINOv3."""

    def embed(self, model: Any, x_BHWD: Tensor) -> tuple[Any, ...]:
        """See `Transformer`."""
        positioned: tuple[Any, ...] = model._pos_embed(x_BHWD)
        return positioned


class DINOv2(Transformer):
    """A transformer that resizes its position embedding as the authors of DINOv2 do, see `dinov2_positions`."""

    def create(self, backbone: str, in_chans: int, output_stride: int) -> Any:
        """See `Transformer`.

        Raises:
            UserError: If the model has no such position embedding.
        """
        model = super().create(backbone, in_chans, output_stride)
        if model.pos_embed is None or model.cls_token is None or model.reg_token is not None or model.no_embed_class:
            raise UserError(
                "expected a transformer without registers, such as vit_small_patch14_dinov2, for "
                f"backbone.pos_embed=dinov2, but got {backbone}; use backbone.pos_embed=timm"
            )
        return model

    def embed(self, model: Any, x_BHWD: Tensor) -> tuple[Any, ...]:
        """See `Transformer`."""
        class_B1D = model.cls_token.expand(x_BHWD.shape[0], -1, -1)
        tokens_BND = torch.cat([class_B1D, x_BHWD.flatten(1, 2)], dim=1)
        return (tokens_BND + dinov2_positions(model.pos_embed, *x_BHWD.shape[1:3]),)


def dinov2_positions(pos_embed_1ND: Tensor, height: int, width: int) -> Tensor:
    """Resize DINOv2's position embedding as its authors' code does, and UniMatch V2's.

    It scales by ``(height + 0.1) / side`` without antialiasing; timm scales to the exact size with antialiasing.

    Args:
        pos_embed_1ND: Position of the class token, then of the patches of a square, (1, 1 + side * side, D).
        height: Patches in a column.
        width: Patches in a row.

    Returns:
        Positions of the class token and of the patches, (1, 1 + height * width, D).
    """
    side = int((pos_embed_1ND.shape[1] - 1) ** 0.5)
    exporting = torch.compiler.is_exporting()  # height and width are no constants then
    if not exporting and (height, width) == (side, side):
        return pos_embed_1ND
    square_1DHW = pos_embed_1ND[:, 1:].transpose(1, 2).reshape(1, -1, side, side).float()
    if exporting:
        resized_1DHW = _sample_positions(square_1DHW, height, width)
    else:
        factors = [(height + 0.1) / side, (width + 0.1) / side]
        resized_1DHW = F.interpolate(square_1DHW, scale_factor=factors, mode="bicubic")
    resized_1ND = resized_1DHW.to(pos_embed_1ND.dtype).flatten(2).transpose(1, 2)
    return torch.cat([pos_embed_1ND[:, :1], resized_1ND], dim=1)


def _sample_positions(square_1DHW: Tensor, height: int, width: int) -> Tensor:
    """Resize as `dinov2_positions` without conditions on the size and without numbers computed from it."""
    sizes = [torch.full((), size, dtype=torch.float32) for size in (height, width)]
    native = (sizes[0] == square_1DHW.shape[2]) & (sizes[1] == square_1DHW.shape[3])
    y_H, x_W = (
        2 * (torch.arange(count) + 0.5) / (size + torch.where(native, 0.0, 0.1)) - 1
        for count, size in zip((height, width), sizes, strict=True)
    )
    grid_HW2 = torch.stack(torch.meshgrid(x_W, y_H, indexing="xy"), dim=-1)
    return F.grid_sample(square_1DHW, grid_HW2[None], mode="bicubic", padding_mode="border", align_corners=False)


def _resnet_stem(model: Any, x: Tensor) -> Tensor:
    return model.maxpool(model.act1(model.bn1(model.conv1(x))))  # type: ignore[no-any-return]


def _efficientnet_stem(model: Any, x: Tensor) -> Tensor:
    return model.bn1(model.conv_stem(x))  # type: ignore[no-any-return]


def _children(names: tuple[str, ...], model: Any) -> list[list[nn.Module]]:
    return [list(model.get_submodule(name).children()) for name in names]


def _inverted_stages(model: Any) -> list[list[nn.Module]]:
    return [list(stage) for stage in model.blocks]


def _only_stem(model: Any, x: Tensor) -> Tensor:
    return model.stem(x)  # type: ignore[no-any-return]


def _convnext_stages(model: Any) -> list[list[nn.Module]]:
    """Return blocks; the first of a stage, except the first one, downsamples and cannot be deactivated."""
    return [[*([] if i == 0 else [stage.downsample]), *stage.blocks] for i, stage in enumerate(model.stages)]


_resnet = ConvNet(_resnet_stem, partial(_children, ("layer1", "layer2", "layer3", "layer4")), ("global_pool", "fc"))
_inverted = ConvNet(
    _efficientnet_stem,
    _inverted_stages,
    ("conv_head", "bn2", "global_pool", "classifier"),
)
FAMILIES: dict[str, Family] = {  # by module in timm.models
    "resnet": _resnet,
    "res2net": _resnet,
    "efficientnet": _inverted,  # MobileNetV2 and EfficientNet-Lite too
    "regnet": ConvNet(_only_stem, partial(_children, ("s1", "s2", "s3", "s4")), ("final_conv", "head")),
    "convnext": ConvNet(_only_stem, _convnext_stages, ("norm_pre", "head"), floors=True),
    "vision_transformer": Transformer(),
    "eva": RotaryTransformer(),  # DINOv3
}


def family_of(backbone: str, pos_embed: str = "timm") -> Family:
    """Return the family of a timm model.

    Args:
        backbone: Name of the model.
        pos_embed: ``timm``, or ``dinov2`` for position embeddings as the authors of DINOv2 resize them.

    Raises:
        UserError: If timm has no such model, or its family is not supported.
    """
    require_choice("backbone.pos_embed", pos_embed, ("timm", "dinov2"))
    if not timm.is_model(backbone):
        supported = [name for module in FAMILIES for name in timm.list_models(module=module)]
        raise UserError(
            f"expected the name of a timm model as backbone, but got {backbone!r}." + suggest(backbone, supported)
        )
    for module, family in FAMILIES.items():
        if timm.models.is_model_in_modules(backbone, [module]):
            if pos_embed == "timm":
                return family
            if module == "vision_transformer":
                return DINOv2()
            raise UserError(
                f"expected a vision transformer for backbone.pos_embed=dinov2, but got {backbone}; use "
                "backbone.pos_embed=timm"
            )
    raise UserError(
        f"expected a backbone of timm's modules {', '.join(FAMILIES)}, but got {backbone}; try resnet50, "
        "mobilenetv2_100, convnext_tiny or vit_small_patch14_dinov2"
    )
