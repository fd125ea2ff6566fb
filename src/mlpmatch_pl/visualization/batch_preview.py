"""A picture of a training batch as the network sees it, CutMix included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from mlpmatch_pl.data.base import SegmentationData
from mlpmatch_pl.perturbation.input import inside_boxes, partner_shift
from mlpmatch_pl.visualization.panels import Array, colorize, overlay, sheet_of, to_rgb

ROWS, WIDTH = 4, 224  # labeled and unlabeled images; minimum width of a view in pixels
LABELED = 3  # panels of a labeled image
Limits = tuple[float, float] | None


def batch_preview(batch: Mapping[str, Any], data: SegmentationData, seed: int) -> PILImage.Image:
    """Draw the first images of a batch: labeled views with masks, and weak and strong views, with and without CutMix.

    Args:
        batch: A training batch, see `mlpmatch_pl.methods.step`.
        data: The dataset, for class names and colors.
        seed: Seed that the training step draws CutMix partners with.
    """
    limits, labeled, unlabeled = _limits(batch["labeled"]["image"]), batch["labeled"], list[dict[str, Array]]()
    if "unlabeled" in batch:
        unlabeled = _unlabeled_rows(batch["unlabeled"], _mixed(batch["unlabeled"], seed), limits)
    images = _labeled_images(labeled, data, limits)
    columns = max(map(len, unlabeled), default=2 * LABELED)
    side = max(columns // LABELED, 1)  # labeled images in a row, so that it is as long as the others
    rows = [_merged(images[start : start + side]) for start in range(0, len(images), side)]
    return sheet_of(rows + unlabeled, data.class_names, data.colors, WIDTH, [labeled["mask"][:ROWS].numpy()])


def _limits(image_BCHW: Tensor) -> Limits:
    """Return the values drawn black and white in all views, so that changes of brightness show."""
    if image_BCHW.dtype == torch.uint8:
        return None if image_BCHW.shape[1] == 3 else (0.0, 255.0)
    low, high = np.percentile(image_BCHW.numpy(), (1, 99))
    return float(low), float(high)


def _labeled_images(labeled: Mapping[str, Tensor], data: SegmentationData, limits: Limits) -> list[dict[str, Array]]:
    images = []
    for number in range(min(ROWS, len(labeled["image"]))):
        image, mask = _picture(labeled["image"][number], limits), labeled["mask"][number].numpy()
        views = (image, colorize(mask, data.colors), overlay(image, mask, data.colors))
        names = (f"labeled {number + 1}", f"mask {number + 1}", f"overlay {number + 1}")
        images.append(dict(zip(names, views, strict=True)))
    return images


def _merged(panels: list[dict[str, Array]]) -> dict[str, Array]:
    return {title: pixels for part in panels for title, pixels in part.items()}


def _unlabeled_rows(unlabeled: Mapping[str, Tensor], mixed_BVCHW: Tensor, limits: Limits) -> list[dict[str, Array]]:
    rows = []
    for number in range(min(ROWS, len(mixed_BVCHW))):
        row = {f"unlabeled {number + 1}, weak": _picture(unlabeled["weak"][number], limits)}
        for view in range(mixed_BVCHW.shape[1]):
            row[f"strong {view + 1}"] = _picture(unlabeled["strong"][number, view], limits)
            row[f"strong {view + 1}, CutMix"] = _picture(mixed_BVCHW[number, view], limits)
        valid = unlabeled["valid"][number].numpy()
        rows.append({**row, "valid (black: padding)": np.repeat(valid[..., None] * np.uint8(255), 3, axis=2)})
    return rows


def _mixed(unlabeled: Mapping[str, Any], seed: int) -> Tensor:
    """Apply CutMix to the strong views as the training step does."""
    strong = unlabeled["strong"]
    if "partner" in unlabeled:
        partner = unlabeled["partner"]["strong"]
    elif len(strong) > 1:
        partner = strong.roll(partner_shift(len(strong), seed, step=0), 0)
    else:  # the training step refuses such a batch
        partner = strong
    views = []
    for view in range(strong.shape[1]):
        inside = inside_boxes(unlabeled["boxes"][:, view], *strong.shape[3:])
        views.append(torch.where(inside[:, None], partner[:, view], strong[:, view]))
    return torch.stack(views, 1)


def _picture(image_CHW: Tensor, limits: Limits) -> Array:
    return to_rgb(image_CHW.permute(1, 2, 0).numpy(), limits)
