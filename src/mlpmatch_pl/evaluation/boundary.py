"""Boundary IoU: how well the outlines of the classes fit, for large and small objects alike.

Cheng, Girshick, Dollár, Berg, Kirillov: "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation" (CVPR
2021, arXiv 2103.16562). For each class, only pixels within a distance of the class's own outline count, in truth and
prediction; intersection and union are summed over the whole dataset, as for the mIoU.

Choices made here:

- The distance is 2 % of the image's diagonal, rounded, and at least 1 pixel, as in the paper. It is measured as in the
  authors' code, which erodes by a 3 x 3 square: the larger of the distances along x and y.
- The border of the image is an outline, as in the authors' code.
- Pixels that the truth ignores are ignored in the prediction before outlines are computed. A perfect prediction thus
  scores 1 even if a band of ignored pixels surrounds every object, as in PASCAL VOC.

Letters: B images, C classes, H and W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mlpmatch_pl.utils.errors import UserError

DISTANCE = 0.02  # of the diagonal


def boundary_counts(prediction_BHW: Tensor, mask_BHW: Tensor, num_classes: int, distance: float = DISTANCE) -> Tensor:
    """Count the pixels near the outlines of each class.

    Args:
        prediction_BHW: Classes 0..C-1, (B, H, W).
        mask_BHW: True classes, (B, H, W); every value outside 0..C-1 is ignored.
        num_classes: C.
        distance: Distance from the outline as a share of the image's diagonal.

    Returns:
        int64, (3, C): pixels near an outline of the truth, of the prediction, and of both for the same class.

    Raises:
        UserError: If the distance is not between 0 and 1.

    Example:
        >>> mask = torch.zeros(1, 9, 9, dtype=torch.long)
        >>> boundary_counts(mask, mask, 2).tolist()  # the border of the image, 1 pixel wide
        [[32, 0], [32, 0], [32, 0]]
    """
    counted_BHW = (mask_BHW >= 0) & (mask_BHW < num_classes)
    truth_BHW = torch.where(counted_BHW, mask_BHW.long(), num_classes)
    label_BHW = torch.where(counted_BHW, prediction_BHW.long(), num_classes)
    pixels = boundary_width(truth_BHW.shape[1], truth_BHW.shape[2], distance)
    # Pixels that do not count go to an extra bin, as in `confusion_matrix`.
    truth_BHW = torch.where(near_outline(truth_BHW, pixels), truth_BHW, num_classes)
    label_BHW = torch.where(near_outline(label_BHW, pixels), label_BHW, num_classes)
    both_BHW = torch.where(truth_BHW == label_BHW, truth_BHW, num_classes)
    kinds = [torch.bincount(kind.flatten(), minlength=num_classes + 1) for kind in (truth_BHW, label_BHW, both_BHW)]
    return torch.stack(kinds)[:, :num_classes]


def boundary_iou(counts_3C: Tensor) -> Tensor:
    """Return the boundary IoU per class, float64, (C,); NaN for a class that is absent from truth and prediction.

    Example:
        >>> boundary_iou(torch.tensor([[4, 0], [3, 0], [2, 0]])).tolist()
        [0.4, nan]
    """
    truth_C, predicted_C, both_C = counts_3C.double()
    iou_C: Tensor = both_C / (truth_C + predicted_C - both_C)
    return iou_C


def boundary_width(height: int, width: int, distance: float = DISTANCE) -> int:
    """Return the distance from the outline in pixels.

    Example:
        >>> boundary_width(375, 500), boundary_width(1024, 2048), boundary_width(10, 10)
        (12, 46, 1)
    """
    if not 0 < distance < 1:
        raise UserError(f"expected evaluation.boundary as a share of the diagonal, between 0 and 1, but got {distance}")
    return max(1, round(distance * math.hypot(height, width)))


def near_outline(label_BHW: Tensor, pixels: int) -> Tensor:
    """Return which pixels are within a distance of an outline of their own class, or of the image's border.

    A pixel is far from outlines if the square around it, with sides of ``2 * pixels + 1``, contains one class only,
    that is, if no two neighbors in the square differ. Pairs of neighbors that differ are counted per square as
    differences of running sums, so the cost depends neither on the distance nor on the number of classes.

    Args:
        label_BHW: Classes from 0, int64, (B, H, W).
        pixels: The distance.

    Returns:
        bool, (B, H, W).

    Example:
        >>> near_outline(torch.tensor([[[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]]), 1)[0, 1].tolist()
        [True, False, False, False, True]
    """
    padded = F.pad(label_BHW, (1, 1, 1, 1), value=-1)  # outside counts as another class
    height, width = padded.shape[1:]
    top, bottom = _window(height, pixels, label_BHW.device)
    left, right = _window(width, pixels, label_BHW.device)
    beside = _sums(padded[:, :, 1:] != padded[:, :, :-1])
    below = _sums(padded[:, 1:] != padded[:, :-1])
    # A window of n columns holds n - 1 pairs of neighbors in a row.
    different = _in_window(beside, top, bottom + 1, left, right) + _in_window(below, top, bottom, left, right + 1)
    return different > 0


def _window(size: int, pixels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first and the last position of the window around each pixel inside the padding."""
    position = torch.arange(1, size - 1, device=device)
    return (position - pixels).clamp_min(0), (position + pixels).clamp_max(size - 1)


def _sums(differs_BHW: Tensor) -> Tensor:
    """Return the sums over all positions above and to the left, with a first row and column of zeros."""
    return F.pad(differs_BHW.int().cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32), (1, 0, 1, 0))


def _in_window(sums: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the sums over rows ``top..bottom - 1`` and columns ``left..right - 1``."""
    rows = sums.index_select(1, bottom) - sums.index_select(1, top)
    return rows.index_select(2, right) - rows.index_select(2, left)
