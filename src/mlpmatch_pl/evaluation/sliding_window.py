"""From images to class maps at the images' own size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlpmatch_pl.utils.errors import UserError, suggest

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


MODES = ("whole", "slide")
LARGEST_SCALE = 16


@dataclass(frozen=True)
class SlidingWindowInference:
    """How the probabilities of an image are inferred: plain data, and a function of a segmentor and its images.

    Softmax is averaged: over the windows that cover a pixel, over the scales, and over the image and its mirror image.
    The authors evaluate Cityscapes with ``SlidingWindowInference("slide", window=801)``; they cut the windows at the
    right and lower border, while here the last one is moved inside the image, so that all have one size.

    Args:
        mode: ``whole`` for the image in one pass, ``slide`` for overlapping windows.
        window: Side of the square windows in pixels (of the scaled image); clipped to the size of a smaller image.
        stride: Pixels from window to window; two thirds of the window, if left out.
        window_batch: Windows that go through the network in one pass.
        scales: Factors by which the image is resized before it goes in; shrinking is antialiased, as in training.
        flip: Whether the mirror image counts as well.

    Raises:
        UserError: If a value is out of range, or windows are described but not used.

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
        _require_count("window_batch", self.window_batch)
        object.__setattr__(self, "scales", _checked_scales(self.scales))
        if self.mode == "slide":
            self._check_window()
        elif self.window is not None or self.stride is not None:
            raise UserError(
                f"expected windows with inference.mode=slide only, but got inference.mode=whole with "
                f"window={self.window} and stride={self.stride}; set inference.mode=slide, or leave them out"
            )

    def _check_window(self) -> None:
        if self.window is None:
            raise UserError(
                "expected inference.window with inference.mode=slide, but it is not set; choose the crop size of the "
                "training, as in inference.window=513"
            )
        _require_count("window", self.window)
        if self.stride is None:
            object.__setattr__(self, "stride", max(self.window * 2 // 3, 1))
        _require_count("stride", self.stride)
        if self.stride > self.window:  # type: ignore[operator]
            raise UserError(
                f"expected inference.stride up to the window's {self.window} pixels, but got {self.stride}, which "
                "leaves gaps; lower it"
            )

    @torch.no_grad()
    def __call__(self, segmentor: nn.Module, image_BCHW: Tensor) -> Tensor:
        """Return the probability of each class at each pixel.

        Args:
            segmentor: Maps (B, C, H, W) images to logits of their size; in eval mode.
            image_BCHW: Images of any size from 1 x 1, values as stored, of any dtype that the segmentor takes.

        Returns:
            float32, (B, num_classes, H, W), sums to 1 over the classes.
        """
        size = image_BCHW.shape[2:]
        total: Tensor | None = None
        for scale in self.scales:
            scaled_BCHW = _resize(image_BCHW, [max(round(side * scale), 1) for side in size])
            views = [self._infer_view(segmentor, scaled_BCHW)]
            if self.flip:
                views.append(self._infer_view(segmentor, scaled_BCHW.flip(-1)).flip(-1))
            for view in views:
                probability_BCHW = _resize(view, size)
                total = probability_BCHW if total is None else total.add_(probability_BCHW)
        assert total is not None  # there is at least one scale
        return total.div_(len(self.scales) * (1 + self.flip))

    def _infer_view(self, segmentor: nn.Module, image_BCHW: Tensor) -> Tensor:
        if self.window is None or self.stride is None:
            return _probabilities(segmentor, image_BCHW)
        return self._slide(segmentor, image_BCHW, self.window, self.stride)

    def _slide(self, segmentor: nn.Module, image_BCHW: Tensor, window: int, stride: int) -> Tensor:
        """Return the mean over the windows that cover a pixel; windows of several images share a pass."""
        height, width = image_BCHW.shape[2:]
        places = [
            (index, slice(None), slice(top, top + window), slice(left, left + window))
            for index in range(len(image_BCHW))
            for top in _window_starts(height, window, stride)
            for left in _window_starts(width, window, stride)
        ]
        count_B1HW = torch.zeros(len(image_BCHW), 1, height, width, device=image_BCHW.device)
        total: Tensor | None = None
        for first in range(0, len(places), self.window_batch):
            group = places[first : first + self.window_batch]
            probability_BCHW = _probabilities(segmentor, torch.stack([image_BCHW[place] for place in group]))
            if total is None:
                total = probability_BCHW.new_zeros(len(image_BCHW), probability_BCHW.shape[1], height, width)
            for place, probability_CHW in zip(group, probability_BCHW, strict=True):
                total[place] += probability_CHW
                count_B1HW[place] += 1
        assert total is not None  # there is at least one window
        return total.div_(count_B1HW)


def _probabilities(segmentor: nn.Module, image_BCHW: Tensor) -> Tensor:
    return predict_logits(segmentor, image_BCHW).float().softmax(dim=1)


def _window_starts(size: int, window: int, stride: int) -> list[int]:
    """Return the first pixels of the windows on an axis; the last one ends with the axis.

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


def _require_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"expected inference.{name} as a whole number from 1, but got {value!r}")


def _checked_scales(scales: Any) -> tuple[float, ...]:
    values = tuple(scales) if isinstance(scales, Sequence) and not isinstance(scales, str) else (scales,)
    if not values or not all(isinstance(scale, int | float) and 0 < scale <= LARGEST_SCALE for scale in values):
        raise UserError(
            f"expected inference.scales as positive numbers up to {LARGEST_SCALE}, as in [0.75,1.0,1.25], but got "
            f"{scales!r}"
        )
    return tuple(float(scale) for scale in values)
