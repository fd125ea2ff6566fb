"""From images to class maps at the images' own size: in one pass, in sliding windows, over scales and flips."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlpmatch_pl.utils.errors import UserError, require_choice, suggest

SMALLEST = 33  # the smallest side that every encoder and decoder here accepts
LARGEST_SCALE = 16
MODES = ("whole", "slide")
BLOCK = 2560  # side of the blocks of large images


def predict_logits(segmentor: Callable[[Tensor], Tensor], image_BCHW: Tensor) -> Tensor:
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
class Block:
    """A part of a large image that is inferred by itself, with the same windows as in the whole image.

    Attributes:
        rows: Its rows.
        columns: Its columns.
        read_rows: The rows of all windows that cover it.
        read_columns: Likewise.
    """

    rows: slice
    columns: slice
    read_rows: slice
    read_columns: slice

    @property
    def inner(self) -> tuple[int, int, int, int]:
        """First and last row (excluded) and column of the block in what is read."""
        top, left = self.read_rows.start, self.read_columns.start
        return self.rows.start - top, self.rows.stop - top, self.columns.start - left, self.columns.stop - left


@dataclass(frozen=True)
class SlidingWindowInference:
    """Inference of class probabilities: whole images or sliding windows, optionally over several scales and flips.

    Softmax probabilities are averaged over the windows that cover a pixel, over the scales, and over the image and its
    mirror image. The authors of UniMatch evaluate Cityscapes with
    ``SlidingWindowInference("slide", window=801, windows="cut")``.

    Args:
        mode: ``whole`` for the image in one pass, ``slide`` for overlapping windows.
        window: Side of the square windows in pixels of the scaled image; clipped to the size of a smaller image.
        stride: Pixels from window to window; two thirds of the window if omitted.
        window_batch: Windows per forward pass.
        scales: Factors by which the image is resized; downsampling is antialiased, as in training.
        flip: Whether to include the mirror image.
        windows: ``inside`` moves the last window of a row or column inside the image, so that all have the same size;
            ``cut`` cuts windows at the right and bottom border.

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
    windows: Literal["inside", "cut"] = "inside"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(
                f"expected inference.mode as whole or slide, but got {self.mode!r}." + suggest(str(self.mode), MODES)
            )
        if not isinstance(self.flip, bool):
            raise UserError(f"expected inference.flip as true or false, but got {self.flip!r}")
        require_choice("inference.windows", self.windows, ("inside", "cut"))
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
        if self.mode == "whole" and self.has_one_view:
            # Nothing is averaged, and softmax keeps the order.
            return predict_logits(segmentor, image_BCHW).argmax(dim=1)
        return self.confidence_and_label(segmentor, image_BCHW)[1].long()

    @torch.no_grad()
    def confidence_and_label(self, segmentor: nn.Module, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the highest probability at each pixel, float32, and its class, int16, both (B, H, W)."""
        if self.window is None or self.stride is None or not self.has_one_view:
            confidence_BHW, label_BHW = self(segmentor, image_BCHW).max(dim=1)
            return confidence_BHW, label_BHW.short()
        # The probabilities of all classes are never in memory for the whole image.
        confidence_BHW = torch.empty(image_BCHW[:, 0].shape, dtype=torch.float32, device=image_BCHW.device)
        label_BHW, top = torch.empty_like(confidence_BHW, dtype=torch.short), 0
        for band_BCHW in self._bands(segmentor, image_BCHW, self.window, self.stride):
            rows = slice(top, top + band_BCHW.shape[2])
            confidence_BHW[:, rows], label_BHW[:, rows] = band_BCHW.max(dim=1)
            top = rows.stop
        return confidence_BHW, label_BHW

    def blocks(self, height: int, width: int, side: int = BLOCK) -> list[Block]:
        """Divide a large image into blocks, row by row; none if it is not large, or needs to be in memory as a whole.

        Example:
            >>> blocks = SlidingWindowInference("slide", window=6).blocks(8, 20, side=10)
            >>> [(block.columns.stop, block.read_columns) for block in blocks]
            [(10, slice(0, 14, None)), (20, slice(8, 20, None))]
        """
        if self.window is None or self.stride is None or not self.has_one_view or height * width <= side**2:
            return []
        window, stride = self.window, self.stride

        def parts(size: int) -> Iterator[tuple[slice, slice]]:
            starts = self._starts(size, window, stride)
            for first in range(0, size, side):
                last = min(first + side, size)
                covering = [start for start in starts if start < last and start + window > first]
                yield slice(first, last), slice(covering[0], min(covering[-1] + window, size))

        columns = list(parts(width))
        return [Block(row[0], column[0], row[1], column[1]) for row in parts(height) for column in columns]

    @property
    def has_one_view(self) -> bool:
        """Whether the image is inferred at its own scale only, and not mirrored."""
        return self.scales == (1.0,) and not self.flip

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
        total_BCHW: Tensor | None = None
        top = 0
        for band_BCHW in self._bands(segmentor, image_BCHW, self.window, self.stride):
            if total_BCHW is None:
                total_BCHW = band_BCHW.new_empty(*band_BCHW.shape[:2], *image_BCHW.shape[2:])
            total_BCHW[:, :, top : top + band_BCHW.shape[2]] = band_BCHW
            top += band_BCHW.shape[2]
        assert total_BCHW is not None  # there is at least one window
        return total_BCHW

    def _bands(self, segmentor: nn.Module, image_BCHW: Tensor, window: int, stride: int) -> Iterator[Tensor]:
        """Average over the windows that cover a pixel, and yield the rows that no later window covers, top to bottom.

        Windows of several images share a forward pass.
        """
        batch, _, height, width = image_BCHW.shape
        tops, lefts = self._starts(height, window, stride), self._starts(width, window, stride)
        count_H1, count_W = _coverage(tops, window, height)[:, None], _coverage(lefts, window, width)
        count_HW = (count_H1 * count_W).to(image_BCHW.device)
        crops = [(index, left) for left in lefts for index in range(batch)]
        rest_BCHW: Tensor | None = None  # sums of the rows that these windows share with those above
        for top, following in zip(tops, [*tops[1:], height], strict=True):
            total_BCHW: Tensor | None = None
            for group in self._groups(crops, window, width):
                windows = [image_BCHW[i, :, top : top + window, left : left + window] for i, left in group]
                probability_BCHW = _probabilities(segmentor, torch.stack(windows))
                if total_BCHW is None:
                    channels, rows = probability_BCHW.shape[1:3]
                    total_BCHW = probability_BCHW.new_zeros(batch, channels, rows, width)
                    if rest_BCHW is not None:
                        total_BCHW[:, :, : rest_BCHW.shape[2]] = rest_BCHW
                for (index, left), probability_CHW in zip(group, probability_BCHW, strict=True):
                    total_BCHW[index, :, :, left : left + window] += probability_CHW
            assert total_BCHW is not None  # there is at least one window
            yield total_BCHW[:, :, : following - top] / count_HW[top:following]
            rest_BCHW = total_BCHW[:, :, following - top :]

    def _groups(self, crops: list[tuple[int, int]], window: int, width: int) -> Iterator[list[tuple[int, int]]]:
        """Group the windows of a forward pass, which have one width."""
        for _, same in groupby(crops, key=lambda crop: min(window, width - crop[1])):
            equal = list(same)
            for first in range(0, len(equal), self.window_batch):
                yield equal[first : first + self.window_batch]

    def _starts(self, size: int, window: int, stride: int) -> list[int]:
        """Return the first pixel of each window on an axis."""
        if self.windows == "cut":
            return list(range(0, size, stride))
        last = max(size - window, 0)
        return [*range(0, last, stride), last]


def _probabilities(segmentor: nn.Module, image_BCHW: Tensor) -> Tensor:
    return predict_logits(segmentor, image_BCHW).float().softmax(dim=1)


def _coverage(starts: Sequence[int], window: int, size: int) -> Tensor:
    """Return the number of windows that cover each pixel on an axis, float32, (size,)."""
    pixels_N = torch.arange(size)
    starts_W1 = torch.tensor(starts)[:, None]
    return ((starts_W1 <= pixels_N) & (pixels_N < starts_W1 + window)).sum(dim=0).float()


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
