"""From images to class maps at the images' own size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 33  # the smallest side that every encoder and decoder here accepts


def predict_logits(segmentor: nn.Module, image_BCHW: Tensor) -> Tensor:
    """Predict whole images in one pass.

    Args:
        segmentor: Maps (B, C, H, W) images to logits; in eval mode.
        image_BCHW: Images of any size from 1 x 1, values 0..255. Small ones are padded by their border.

    Returns:
        Logits at the images' size, (B, num_classes, H, W).

    Example:
        >>> predict_logits(nn.Conv2d(3, 5, 1), torch.rand(1, 3, 20, 40)).shape
        torch.Size([1, 5, 20, 40])
    """
    height, width = image_BCHW.shape[2:]
    padding = (0, max(SMALLEST - width, 0), 0, max(SMALLEST - height, 0))
    if any(padding):
        image_BCHW = F.pad(image_BCHW.float(), padding, mode="replicate")
    logits: Tensor = segmentor(image_BCHW)
    return logits[..., :height, :width]


@torch.no_grad()
def confidence_and_class(logits_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest softmax probability and its class, each (B, H, W)."""
    probability, label = logits_BCHW.float().softmax(dim=1).max(dim=1)
    return probability, label
