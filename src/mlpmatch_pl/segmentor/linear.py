"""Linear decoder: a classifier on each position of the last feature map."""

from collections.abc import Sequence

from torch import Tensor, nn

from mlpmatch_pl.segmentor.decoder import Decoder, require_channels
from mlpmatch_pl.segmentor.encoder import Features


class Linear(Decoder):
    """A 1x1 convolution from the last feature map to logits, or two of them with a ReLU between.

    Args:
        in_channels: Number of channels of the map, as a sequence of one.
        num_classes: Number of classes.
        channels: Width of the hidden layer; None for none.

    Raises:
        UserError: If a value is out of range.

    Example:
        >>> import torch
        >>> tuple(Linear([64], num_classes=3)(Features((torch.rand(1, 64, 5, 6),))).shape)
        (1, 3, 5, 6)
    """

    levels = (-1,)

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int | None = None) -> None:
        super().__init__()
        (width,) = in_channels
        self.hidden: nn.Module = nn.Identity()
        if channels is not None:
            require_channels("decoder.channels", channels)
            self.hidden, width = nn.Sequential(nn.Conv2d(width, channels, 1), nn.ReLU(inplace=True)), channels
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: Features) -> Tensor:
        """See `Decoder`."""
        return self.classify(self.hidden(features.levels[0]))
