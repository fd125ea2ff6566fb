"""From images to class maps at the images' own size: in one pass, in sliding windows, over scales and flips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlpmatch_pl.utils.errors import UserError, suggest

SMALLEST = 33  # the smallest side that every encoder and decoder here accepts
LARGEST_SCALE = 16
MODES = ("whole", "slide")


def predict_logits(segmentor: nn.Module, image_BCHW: Tensor) -> Tensor:
    """Predict whole images in one pass.

    Args:
        segmentor: Maps (B, C, H, W) images to logits; in eval mode.
        image_BCHW: Images of any size from 1 x 1, values 0..255. Small images are padded by repeating their border.

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


@dataclass(frozen=True)
class SlidingWindowInference:
    """Inference of class probabilities: whole images or sliding windows, optionally over several scales and flips.

    Softmax probabilities are averaged over the windows that cover a pixel, over the scales, and over the image and its
    mirror image. For Cityscapes the authors use ``SlidingWindowInference("slide", window=801)``. They crop the windows
    at the right and bottom border; here the last window is moved inside the image, so that all have the same size.

    Args:
        mode: ``whole`` for the image in one pass, ``slide`` for overlapping windows.
        window: Side of the square windows in pixels of the scaled image; clipped to the size of a smaller image.
        stride: Pixels from window to window; two thirds of the window if omitted.
        window_batch: Windows per forward pass.
        scales: Factors by which the image is resized; downsampling is antialiased, as in training.
        flip: Whether to include the mirror image.

    Raises:
        UserError: If a value is out of range, or ``window`` or ``stride`` is given without ``mode="slide"``.

    Example:
        >>> inference = SlidingWindowInference("slide", window=30, scales=(0.75, 1.0), flip=True)
        >>> inference.stride
        20
        >>> probabilities = inference(nn.Conv2d(3, 5, 1), torch.rand(1, 3, 40, 70))
        >>> probabilities.shape, round(probabilities[0, :, 8, 8].sum().item(), 5)
        (torch.Size([1, 5, 40, 70]), 1.0)
    """

    mode: Literal["whole", "slide"] = "whole"
    window: int | None = None
    stride: int | None = None
    window_batch: int = 4
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(
                f"expected inference.mode as whole or slide, but got {self.mode!r}." + suggest(str(self.mode), MODES)
            )
        if not isinstance(self.flip, bool):
            raise UserError(f"expected inference.flip as true or false, but got {self.flip!r}")
        _check_count("window_batch", self.window_batch)
        object.__setattr__(self, "scales", _checked_scales(self.scales))
        if self.mode == "slide":
            self._check_window()
        elif self.window is not None or self.stride is not None:
            raise UserError(
                "expected inference.window and inference.stride with inference.mode=slide only, but got "
                f"window={self.window} and stride={self.stride}; set inference.mode=slide, or omit them"
            )

    def _check_window(self) -> None:
        if self.window is None:
            raise UserError(
                "expected inference.window with inference.mode=slide, but it is not set; use the crop size of the "
                "training, as in inference.window=513"
            )
        _check_count("window", self.window)
        if self.stride is None:
            object.__setattr__(self, "stride", max(self.window * 2 // 3, 1))
        _check_count("stride", self.stride)
        if self.stride > self.window:  # type: ignore[operator]
            raise UserError(
                f"expected inference.stride of at most the window's {self.window} pixels, but got {self.stride}, which "
                "leaves gaps; lower it"
            )

    @torch.no_grad()
    def __call__(self, segmentor: nn.Module, image_BCHW: Tensor) -> Tensor:
        """Return the probability of each class at each pixel.

        Args:
            segmentor: Maps (B, C, H, W) images to logits of their size; in eval mode.
            image_BCHW: Images of any size from 1 x 1, values as stored, of any dtype the segmentor accepts.

        Returns:
            float32, (B, num_classes, H, W), sums to 1 over the classes.
        """
        views = self._views(segmentor, image_BCHW)
        total_BCHW = next(views)
        for view_BCHW in views:
            total_BCHW += view_BCHW
        return total_BCHW.div_(len(self.scales) * (1 + self.flip))

    @torch.no_grad()
    def label(self, segmentor: nn.Module, image_BCHW: Tensor) -> Tensor:
        """Return the class of each pixel, int64, (B, H, W)."""
        if self.mode == "whole" and self.scales == (1.0,) and not self.flip:
            # Nothing is averaged, and softmax keeps the order.
            return predict_logits(segmentor, image_BCHW).argmax(dim=1)
        return self(segmentor, image_BCHW).argmax(dim=1)

    def _views(self, segmentor: nn.Module, image_BCHW: Tensor) -> Iterator[Tensor]:
        """Yield the probabilities of each scaled and flipped view at the image's size."""
        size = image_BCHW.shape[2:]
        for scale in self.scales:
            scaled_BCHW = _resize(image_BCHW, [max(round(side * scale), 1) for side in size])
            yield _resize(self._infer_view(segmentor, scaled_BCHW), size)
            if self.flip:
                yield _resize(self._infer_view(segmentor, scaled_BCHW.flip(-1)).flip(-1), size)

    def _infer_view(self, segmentor: nn.Module, image_BCHW: Tensor) -> Tensor:
        if self.window is None or self.stride is None:
            return _probabilities(segmentor, image_BCHW)
        return self._slide(segmentor, image_BCHW, self.window, self.stride)

    def _slide(self, segmentor: nn.Module, image_BCHW: Tensor, window: int, stride: int) -> Tensor:
        """Average over the windows that cover a pixel; windows of several images share a forward pass."""
        batch, _, height, width = image_BCHW.shape
        crops = [
            (index, slice(None), slice(top, top + window), slice(left, left + window))
            for index in range(batch)
            for top in _window_starts(height, window, stride)
            for left in _window_starts(width, window, stride)
        ]
        count_B1HW = torch.zeros(batch, 1, height, width, device=image_BCHW.device)
        total_BCHW: Tensor | None = None
        for first in range(0, len(crops), self.window_batch):
            group = crops[first : first + self.window_batch]
            probability_BCHW = _probabilities(segmentor, torch.stack([image_BCHW[crop] for crop in group]))
            if total_BCHW is None:
                total_BCHW = probability_BCHW.new_zeros(batch, probability_BCHW.shape[1], height, width)
            for crop, probability_CHW in zip(group, probability_BCHW, strict=True):
                total_BCHW[crop] += probability_CHW
                count_B1HW[crop] += 1
        assert total_BCHW is not None  # there is at least one window
        return total_BCHW.div_(count_B1HW)


def _probabilities(segmentor: nn.Module, image_BCHW: Tensor) -> Tensor:
    return predict_logits(segmentor, image_BCHW).float().softmax(dim=1)


def _window_starts(size: int, window: int, stride: int) -> list[int]:
    """Return the first pixel of each window on an axis; the last window ends with the axis.

    Example:
        >>> _window_starts(50, 30, 15), _window_starts(60, 30, 15), _window_starts(20, 30, 15)
        ([0, 15, 20], [0, 15, 30], [0])
    """
    last = max(size - window, 0)
    return [*range(0, last, stride), last]


def _resize(values_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    if list(values_BCHW.shape[2:]) == list(size):
        return values_BCHW
    return F.interpolate(values_BCHW.float(), list(size), mode="bilinear", align_corners=False, antialias=True)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"expected inference.{name} as a positive integer, but got {value!r}")


def _checked_scales(scales: Any) -> tuple[float, ...]:
    values = tuple(scales) if isinstance(scales, Sequence) and not isinstance(scales, str) else (scales,)
    if not values or not all(isinstance(scale, int | float) and 0 < scale <= LARGEST_SCALE for scale in values):
        raise UserError(
            f"expected inference.scales as positive numbers up to {LARGEST_SCALE}, as in [0.75,1.0,1.25], but got "
            f"{scales!r}"
        )
    return tuple(float(scale) for scale in values)
