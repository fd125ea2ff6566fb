"""What decoders have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from mlpmatch_pl.segmentor.encoder import Features
from mlpmatch_pl.utils.errors import UserError

MAX_CHANNELS = 4096  # keeps a typo or an untrusted checkpoint from filling the memory


class Decoder(nn.Module, ABC):
    """Base class of decoders, from feature maps to logits.

    Attributes:
        levels: Which of the encoder's four feature maps it takes, from low to high level.
        classifier: The last layer, a 1x1 convolution to the classes.
    """

    levels: tuple[int, ...]
    classifier: nn.Conv2d

    @abstractmethod
    def forward(self, features: Features) -> Tensor:
        """Return logits, (B, num_classes, H, W), which the segmentor resizes."""

    def classify(self, x_BDHW: Tensor) -> Tensor:
        """Run the classifier in the dtype of its weights also under autocast."""
        # Rounding logits to 16 bits would move confidences across the threshold.
        with torch.autocast(x_BDHW.device.type, enabled=False):
            return self.classifier(x_BDHW.to(self.classifier.weight.dtype))  # type: ignore[no-any-return]


def require_channels(option: str, *values: int) -> None:
    """Refuse a number of channels that no decoder has.

    Raises:
        UserError: If a value is out of range.
    """
    for value in values:
        if not 1 <= value <= MAX_CHANNELS:
            raise UserError(f"expected {option} from 1 to {MAX_CHANNELS}, but got {value}")
