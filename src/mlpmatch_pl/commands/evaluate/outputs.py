"""The files of an evaluation: tables, images and metrics.json."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from torch import Tensor

from mlpmatch_pl.commands.evaluate.dataset import EvaluatedPart
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.visualization.panels import IGNORED_COLOR, Array, colorize, sheet_of, to_rgb
from mlpmatch_pl.visualization.plots import confusion_matrix_plot

FILES = ("metrics.json", "classes.csv", "confusion.csv", "confusion.png", "images.csv", "worst.png", "reliability.png")
LONGEST_SIDE = 640  # pixels of an image in worst.png
LONGEST_NAME = 32  # characters of an image's name there
RIGHT_COLOR, WRONG_COLOR = (190, 190, 190), (200, 30, 30)


def write_results(
    folder: Path,
    result: dict[str, Any],
    confusion_CC: Tensor,
    image_miou: Iterable[tuple[str, float | None]],
    pictures: Mapping[str, PILImage.Image | None],
) -> None:
    """Write metrics.json, the classes, the confusion matrix (also as an image), and the mean IoU of each image.

    Args:
        folder: Created if missing.
        result: Content of metrics.json.
        confusion_CC: The confusion matrix.
        image_miou: Name and mean IoU of each image.
        pictures: Further pictures by name; None is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    classes = result["classes"]
    fields = list(next(iter(classes.values())))
    _write_csv(folder / "classes.csv", ["class", *fields], ([name, *row.values()] for name, row in classes.items()))
    rows = ([name, *row] for name, row in zip(classes, confusion_CC.tolist(), strict=True))
    _write_csv(folder / "confusion.csv", ["true \\ predicted", *classes], rows)
    _write_csv(folder / "images.csv", ["image", "miou"], image_miou)
    confusion_matrix_plot(confusion_CC.numpy(), list(classes)).save(folder / "confusion.png")
    for name, picture in pictures.items():
        if picture is not None:
            picture.save(folder / f"{name}.png")
    (folder / "metrics.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def draw_worst(module: MLPMatch, part: EvaluatedPart, indices: Sequence[int], miou_N: Tensor) -> PILImage.Image:
    """Draw one row per image: the image, its truth, the prediction, and the wrong pixels.

    Args:
        module: Predicts the images again.
        part: Images, classes and colors.
        indices: The images to draw.
        miou_N: Mean IoU of each image.
    """
    rows, labels, images, data = [], list[Array](), part.images(), part.data
    for index in indices:
        sample, name = images[index], images.source.name(index)
        label_1HW = module.inference.label(module.segmentor, sample["image"][None].to(module.device))
        label_HW, truth_HW = label_1HW[0].cpu().numpy(), sample["mask"].numpy()
        shown = name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
        kind_HW = np.where(truth_HW < len(data.class_names), label_HW != truth_HW, 2)
        panels = {
            "image": to_rgb(sample["image"].permute(1, 2, 0).numpy()),
            f"truth of {shown}": colorize(truth_HW, data.colors),
            f"prediction: mIoU {100 * float(miou_N[index]):.2f} %": colorize(label_HW, data.colors),
            "wrong pixels (red)": np.array([RIGHT_COLOR, WRONG_COLOR, IGNORED_COLOR], np.uint8)[kind_HW],
        }
        rows.append({title: _shrink(pixels, smooth=title == "image") for title, pixels in panels.items()})
        labels += [truth_HW, label_HW]
    return sheet_of(rows, data.class_names, data.colors, labels=labels)


def _shrink(pixels: Array, smooth: bool) -> Array:
    height, width = pixels.shape[:2]
    factor = LONGEST_SIDE / max(height, width)
    if factor >= 1:
        return pixels
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    method = PILImage.Resampling.BICUBIC if smooth else PILImage.Resampling.NEAREST
    return np.asarray(PILImage.fromarray(pixels).resize(size, method))


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    # Names of files that are not valid UTF-8 keep their bytes.
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
