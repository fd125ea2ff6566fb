"""DeepLabV3+ decoder, as UniMatch and MLPMatch configure it.

Chen et al., "Encoder-Decoder with Atrous Separable Convolution" (ECCV 2018), but with ordinary convolutions: ASPP on
the high-level features, low-level features reduced to 48 channels, two 3x3 convolutions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlpmatch_pl.segmentor.decoder import Decoder, require_channels
from mlpmatch_pl.segmentor.encoder import Features
from mlpmatch_pl.utils.errors import UserError

LOW_LEVEL_CHANNELS = 48
MAX_RATES, MAX_RATE = 16, 1024  # keep a typo or an untrusted checkpoint from filling the memory


class AtrousConv2d(nn.Conv2d):
    """A dilated 3x3 convolution that skips the part of its kernel that sees only padding, in training on small crops.

    If the dilation is at least the height (or width) of the map, only the middle row (or column) of the kernel overlaps
    the map. Output and gradients stay the same. Training steps of ResNet-50 at 160 to 256 px take about 10% less time.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        dilation: Dilation, and the padding that keeps the size of the map.

    Example:
        >>> convolution, x = AtrousConv2d(3, 4, dilation=12), torch.rand(2, 3, 9, 9)
        >>> torch.allclose(convolution.train()(x), convolution.eval()(x), atol=1e-6)
        True
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W)."""
        if not self.training:  # whole images are larger, and exported graphs take any size
            return super().forward(x_BDHW)
        reached = [rate < size for rate, size in zip(self.dilation, x_BDHW.shape[2:], strict=True)]
        rows, columns = (slice(None) if reach else slice(1, 2) for reach in reached)
        padding = [rate * reach for rate, reach in zip(self.dilation, reached, strict=True)]
        return F.conv2d(x_BDHW, self.weight[:, :, rows, columns], self.bias, padding=padding, dilation=self.dilation)


def _conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        AtrousConv2d(in_channels, out_channels, dilation)
        if dilation > 1
        else nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1, three dilated 3x3 and an image-pooling branch."""

    def __init__(self, in_channels: int, out_channels: int, atrous_rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [_conv_bn_relu(in_channels, out_channels, 1)]
            + [_conv_bn_relu(in_channels, out_channels, 3, rate) for rate in atrous_rates]
        )
        self.pooling = _conv_bn_relu(in_channels, out_channels, 1)
        self.project = _conv_bn_relu((len(atrous_rates) + 2) * out_channels, out_channels, 1)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W)."""
        pooled = self.pooling(x_BDHW.mean((2, 3), keepdim=True)).expand(-1, -1, *x_BDHW.shape[2:])
        return self.project(torch.cat([*(branch(x_BDHW) for branch in self.branches), pooled], dim=1))  # type: ignore[no-any-return]


class DeepLabV3Plus(Decoder):
    """Decoder from features at stride 4 and at the output stride to logits at stride 4.

    On a transformer, both are at the stride of its patches, and so are the logits.

    Args:
        in_channels: Number of channels of the low-level and of the high-level features.
        num_classes: Number of classes.
        channels: Width of the decoder.
        atrous_rates: Dilations of the ASPP branches; 6, 12, 18 for output stride 16.

    Raises:
        UserError: If a value is out of range.

    Example:
        >>> decoder = DeepLabV3Plus((32, 96), num_classes=5, channels=16).eval()
        >>> tuple(decoder(Features((torch.rand(1, 32, 17, 17), torch.rand(1, 96, 5, 5)))).shape)
        (1, 5, 17, 17)
    """

    levels = (0, -1)

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 256,
        atrous_rates: Sequence[int] = (6, 12, 18),
    ) -> None:
        super().__init__()
        require_channels("decoder.channels", channels)
        if not 1 <= len(atrous_rates) <= MAX_RATES or not all(1 <= rate <= MAX_RATE for rate in atrous_rates):
            raise UserError(
                f"expected decoder.atrous_rates as 1 to {MAX_RATES} numbers from 1 to {MAX_RATE}, but got "
                f"{len(atrous_rates)}: {list(atrous_rates[:MAX_RATES])}"
            )
        low_channels, high_channels = in_channels
        self.aspp = ASPP(high_channels, channels, atrous_rates)
        self.reduce = _conv_bn_relu(low_channels, LOW_LEVEL_CHANNELS, 1)
        self.fuse = nn.Sequential(
            *_conv_bn_relu(channels + LOW_LEVEL_CHANNELS, channels, 3), *_conv_bn_relu(channels, channels, 3)
        )
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Features) -> Tensor:
        """Return logits (B, num_classes, H / 4, W / 4)."""
        low_BDHW, high_BDHW = features.levels
        high_BDHW = _resize(self.aspp(high_BDHW), low_BDHW.shape[2:])
        fused_BDHW = self.fuse(torch.cat([self.reduce(low_BDHW), high_BDHW], dim=1))
        return self.classify(fused_BDHW)
