"""DPT decoder without BatchNorm, as Depth Anything and UniMatch V2 configure it.

Ranftl et al., "Vision Transformers for Dense Prediction" (ICCV 2021, arXiv 2103.13413).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mlpmatch_pl.segmentor.decoder import Decoder, require_channels
from mlpmatch_pl.segmentor.encoder import Features
from mlpmatch_pl.utils.errors import UserError

# UniMatch V2's widths by that of the transformer: of the fusions, and of the four maps.
WIDTHS = {
    384: (64, (48, 96, 192, 384)),
    768: (128, (96, 192, 384, 768)),
    1024: (256, (256, 512, 1024, 1024)),
    1536: (384, (1536, 1536, 1536, 1536)),
}


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        """Map (B, channels, H, W) to the same shape."""
        return x_BDHW + self.conv2(F.relu(self.conv1(F.relu(x_BDHW))))  # type: ignore[no-any-return]


class Fusion(nn.Module):
    """Adds a map to the fusion of the deeper ones, refines the sum and resizes it.

    Args:
        channels: Number of channels.
        deepest: Whether there are no deeper maps. Its ``lateral`` unit is never run; as in the published weights it
            exists all the same, but without gradients.
    """

    def __init__(self, channels: int, deepest: bool) -> None:
        super().__init__()
        self.lateral, self.refine = ResidualUnit(channels), ResidualUnit(channels)
        self.lateral.requires_grad_(not deepest)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BDHW: Tensor, deeper_BDHW: Tensor | None, size: Sequence[int]) -> Tensor:
        """Return the fused map, (B, channels, *size)."""
        if deeper_BDHW is not None:
            x_BDHW = deeper_BDHW + self.lateral(x_BDHW)
        resized_BDHW = F.interpolate(self.refine(x_BDHW), size=tuple(size), mode="bilinear", align_corners=True)
        return self.out(resized_BDHW)  # type: ignore[no-any-return]


class DPT(Decoder):
    """Decoder from four feature maps to logits at twice the size of the first.

    The maps of a transformer, which are of one size, are resized by 4, 2, 1 and 1/2 before; those of a convolutional
    network stay as they are.

    Args:
        in_channels: Number of channels of each map.
        num_classes: Number of classes.
        channels: Width of the fusions; by default UniMatch V2's, or up to 256 for a width that it does not have.
        level_channels: Width of the maps of a transformer; by default UniMatch V2's.

    Raises:
        UserError: If a value is out of range.

    Example:
        >>> import torch
        >>> maps = Features(tuple(torch.rand(1, 64, 5, 6) for _ in range(4)))
        >>> tuple(DPT((64, 64, 64, 64), num_classes=3)(maps).shape)
        (1, 3, 40, 48)
    """

    levels = (0, 1, 2, 3)

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int | None = None,
        level_channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        plain, width = len(set(in_channels)) == 1, in_channels[-1]
        default = (width // 8, width // 4, width // 2, width) if plain else tuple(in_channels)
        known_channels, known_widths = WIDTHS.get(width if plain else 0, (min(max(width // 6, 1), 256), default))
        channels, widths = channels or known_channels, tuple(level_channels or known_widths)
        require_channels("decoder.channels", channels)
        if len(widths) != len(in_channels):
            raise UserError(f"expected decoder.level_channels as {len(in_channels)} numbers, but got {len(widths)}")
        require_channels("decoder.level_channels", *widths)
        self.project = nn.ModuleList(nn.Conv2d(*pair, 1) for pair in zip(in_channels, widths, strict=True))
        self.resize = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
                nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1),
            ]
            if plain
            else [nn.Identity() for _ in widths]
        )
        self.reduce = nn.ModuleList(nn.Conv2d(width, channels, 3, padding=1, bias=False) for width in widths)
        self.fuse = nn.ModuleList(Fusion(channels, deepest=level == 3) for level in range(4))
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Features) -> Tensor:
        """See `Decoder`."""
        parts = zip(features.levels, self.project, self.resize, self.reduce, strict=True)
        maps = [reduce(resize(project(level_BDHW))) for level_BDHW, project, resize, reduce in parts]
        height, width = maps[0].shape[2:]
        sizes = [(2 * height, 2 * width), *(x_BDHW.shape[2:] for x_BDHW in maps[:-1])]
        fused_BDHW = None
        for x_BDHW, fuse, size in reversed(list(zip(maps, self.fuse, sizes, strict=True))):
            fused_BDHW = fuse(x_BDHW, fused_BDHW, size)
        return self.classify(F.relu(self.smooth(fused_BDHW)))
