"""What an evaluation writes: tables, pictures and metrics.json."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from mlpmatch_pl.commands.evaluate.loop import Counts, Evaluator
from mlpmatch_pl.data.base import SegmentationData
from mlpmatch_pl.data.dataset import EvalDataset
from mlpmatch_pl.predictor import Predictor
from mlpmatch_pl.visualization.panels import IGNORED_COLOR, Array, colorize, sheet_of, to_rgb
from mlpmatch_pl.visualization.plots import confusion_matrix_plot

METRICS, WORST = "metrics.json", "worst.png"
FILES = (METRICS, "classes.csv", "confusion.csv", "confusion.png", "images.csv", WORST)
LONGEST_SIDE = 640  # of the images in the picture of the worst, in pixels
LONGEST_NAME = 32  # characters of an image's name there
RIGHT_COLOR, WRONG_COLOR = (190, 190, 190), (200, 30, 30)


def write_tables(folder: Path, result: dict[str, Any], counts: Counts, names: Sequence[str]) -> None:
    """Write metrics.json, the classes, the confusion matrix (also as a picture) and each image's mean IoU.

    Args:
        folder: Where to; it is created.
        result: What metrics.json holds.
        counts: What was counted.
        names: The images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    classes = result["classes"]
    confusion_CC = counts.confusion_CC.numpy()
    fields = list(next(iter(classes.values())))
    _write_csv(folder / "classes.csv", ["class", *fields], ([name, *row.values()] for name, row in classes.items()))
    rows = ([name, *row] for name, row in zip(classes, confusion_CC.tolist(), strict=True))
    _write_csv(folder / "confusion.csv", ["true \\ predicted", *classes], rows)
    scores = (None if miou != miou else miou for miou in counts.miou_N.tolist())
    _write_csv(folder / "images.csv", ["image", "miou"], zip(names, scores, strict=True))
    confusion_matrix_plot(confusion_CC, list(classes)).save(folder / "confusion.png")
    (folder / METRICS).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def worst_images(counts: Counts, number: int) -> list[int]:
    """Return the images with the lowest mean IoU, the lowest first; those where nothing counts are left out.

    Example:
        >>> import torch
        >>> worst_images(Counts(torch.zeros(2, 2), None, torch.tensor([0.5, float("nan"), 0.1, 0.9])), 2)
        [2, 0]
    """
    order = np.argsort(counts.miou_N.numpy(), kind="stable")  # NaN comes last
    return [int(index) for index in order[:number] if counts.miou_N[index] == counts.miou_N[index]]


def draw_worst(
    predictor: Predictor,
    evaluator: Evaluator,
    images: EvalDataset,
    data: SegmentationData,
    indices: Sequence[int],
    counts: Counts,
) -> PILImage.Image:
    """Draw images with truth, prediction and what is wrong in it, a row each.

    Args:
        predictor: Has the network, which predicts them once more.
        evaluator: How it does.
        images: The data set's part.
        data: Where classes and colors come from.
        indices: Which images.
        counts: Their mean IoU.
    """
    rows = []
    for index in indices:
        sample = images[index]
        label_HW = (
            evaluator.label(predictor.segmentor, sample["image"][None].to(predictor.module.device))[0].cpu().numpy()
        )
        truth_HW, name = sample["mask"].numpy(), images.source.name(index)
        shown = name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
        panels = {
            "image": to_rgb(sample["image"].permute(1, 2, 0).numpy()),
            f"truth of {shown}": colorize(truth_HW, data.colors),
            f"prediction: mIoU {100 * float(counts.miou_N[index]):.2f} %": colorize(label_HW, data.colors),
            "wrong pixels (red)": _wrong(label_HW, truth_HW, len(data.class_names)),
        }
        rows.append({title: _shrunk(pixels, smooth=title == "image") for title, pixels in panels.items()})
    return sheet_of(rows, data.class_names, data.colors)


def _wrong(label_HW: Array, truth_HW: Array, num_classes: int) -> Array:
    kind_HW = np.where(truth_HW < num_classes, label_HW != truth_HW, 2)
    pixels: Array = np.array([RIGHT_COLOR, WRONG_COLOR, IGNORED_COLOR], np.uint8)[kind_HW]
    return pixels


def _shrunk(pixels: Array, smooth: bool) -> Array:
    height, width = pixels.shape[:2]
    factor = LONGEST_SIDE / max(height, width)
    if factor >= 1:
        return pixels
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    method = PILImage.Resampling.BICUBIC if smooth else PILImage.Resampling.NEAREST
    return np.asarray(PILImage.fromarray(pixels).resize(size, method))


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
