"""Pictures of what the network predicts: image, truth, prediction, confidence, and a legend of the classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from mlpmatch_pl.data.samples import WholeImages
from mlpmatch_pl.evaluation import confidence_and_class

Array = NDArray[Any]
Colors = Sequence[tuple[int, int, int]]
IGNORED_COLOR = (255, 255, 255)
PANEL_WIDTH = 320  # small images are enlarged to it, so that titles are readable
MARGIN, TITLE, FONT_SIZE = 8, 22, 14  # pixels
PAPER, INK = (250, 250, 250), (0, 0, 0)


class PredictionSheets(Callback):
    """Writes a sheet for some fixed evaluation images, once they have been validated or tested.

    The images are spread evenly over the test set, or the validation set where there is no other. Sheets are written
    at the end of testing, by the first process alone, with the weights that were tested.

    Args:
        dirpath: Folder to write to.
        num_images: Number of images.
    """

    def __init__(self, dirpath: str, num_images: int = 8) -> None:
        self.dirpath, self.num_images = Path(dirpath), num_images

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the sheets."""
        data = getattr(getattr(trainer, "datamodule", None), "data", None)
        if data is None or not trainer.is_global_zero or not self.num_images:
            return
        source = data.test or data.val
        indices = np.linspace(0, len(source) - 1, min(self.num_images, len(source))).round().astype(int)
        self.dirpath.mkdir(parents=True, exist_ok=True)
        for index in indices.tolist():
            sample = WholeImages(source)[index]
            sheet = self._sheet(pl_module, sample, data.class_names, data.colors)
            sheet.save(self.dirpath / f"{source.name(index).replace('/', '_').rsplit('.', 1)[0]}.png")

    @staticmethod
    def _sheet(
        module: LightningModule, sample: dict[str, Any], class_names: Sequence[str], colors: Colors
    ) -> PILImage.Image:
        with torch.no_grad():
            confidence_BHW, label_BHW = confidence_and_class(module(sample["image"][None].to(module.device)))
        return prediction_sheet(
            sample["image"].permute(1, 2, 0).numpy(),
            sample["mask"].numpy(),
            label_BHW[0].cpu().numpy(),
            confidence_BHW[0].cpu().numpy(),
            class_names,
            colors,
        )


def prediction_sheet(
    image_HW3: Array, truth_HW: Array, label_HW: Array, confidence_HW: Array, class_names: Sequence[str], colors: Colors
) -> PILImage.Image:
    """Draw one image's sheet.

    Args:
        image_HW3: RGB, uint8.
        truth_HW: Classes; other values are drawn as ignored.
        label_HW: Predicted classes.
        confidence_HW: Probability of the predicted class, 0..1; black is unsure.
        class_names: Names for the legend.
        colors: RGB colour of each class.

    Example:
        >>> flat = np.zeros((20, 40), np.uint8)
        >>> image, confidence = np.zeros((20, 40, 3), np.uint8), flat / 1.0
        >>> sheet = prediction_sheet(image, flat, flat, confidence, ["a", "b"], [(0, 0, 0), (9, 9, 9)])
        >>> sheet.mode
        'RGB'
    """
    gray = (confidence_HW * 255).astype(np.uint8)
    panels = {
        "image": image_HW3,
        "truth": colorize(truth_HW, colors),
        "prediction": colorize(label_HW, colors),
        "confidence (white = 1)": np.repeat(gray[..., None], 3, axis=2),
    }
    row = _panel_row(panels)
    legend = _legend([*zip(class_names, colors, strict=True), ("ignored", IGNORED_COLOR)], row.width)
    sheet = PILImage.new("RGB", (row.width, row.height + legend.height), PAPER)
    sheet.paste(row, (0, 0))
    sheet.paste(legend, (0, row.height))
    return sheet


def _panel_row(panels: dict[str, Array]) -> PILImage.Image:
    """Put pictures of one size side by side, each below its title."""
    height, width = panels["image"].shape[:2]
    factor = max(PANEL_WIDTH / width, 1.0)
    width, height = round(width * factor), round(height * factor)
    row = PILImage.new("RGB", (len(panels) * (width + MARGIN) + MARGIN, TITLE + height + MARGIN), PAPER)
    for column, (title, pixels) in enumerate(panels.items()):
        x = MARGIN + column * (width + MARGIN)
        smooth = PILImage.Resampling.BICUBIC if title == "image" else PILImage.Resampling.NEAREST
        ImageDraw.Draw(row).text((x, 3), title, fill=INK, font=ImageFont.load_default(FONT_SIZE))
        row.paste(PILImage.fromarray(pixels).resize((width, height), smooth), (x, TITLE))
    return row


def _legend(entries: Sequence[tuple[str, tuple[int, int, int]]], width: int) -> PILImage.Image:
    """Draw a colour and a name for each class, in as many rows as the width needs."""
    font = ImageFont.load_default(FONT_SIZE)
    rows = _legend_rows([name for name, _ in entries], width, font)
    legend = PILImage.new("RGB", (width, TITLE * len(rows) + MARGIN), PAPER)
    draw = ImageDraw.Draw(legend)
    for number, row in enumerate(rows):
        for index, x in row:
            name, color = entries[index]
            draw.rectangle((x, number * TITLE + 2, x + 14, number * TITLE + 16), fill=color, outline=(90, 90, 90))
            draw.text((x + 20, number * TITLE), name, fill=INK, font=font)
    return legend


def colorize(label_HW: Array, colors: Colors) -> Array:
    """Turn classes into RGB, uint8, (H, W, 3); values that are no class become white.

    Example:
        >>> colorize(np.array([[0, 255]]), [(1, 2, 3)]).tolist()
        [[[1, 2, 3], [255, 255, 255]]]
    """
    table = np.full((256, 3), IGNORED_COLOR, np.uint8)
    table[: len(colors)] = colors
    colored: Array = table[label_HW]
    return colored


def _legend_rows(names: Sequence[str], width: int, font: Any) -> list[list[tuple[int, int]]]:
    """Lay the legend out: rows of (entry, x)."""
    rows: list[list[tuple[int, int]]] = [[]]
    x = MARGIN
    for index, name in enumerate(names):
        needed = 20 + round(font.getlength(name)) + 18
        if x + needed > width and rows[-1]:
            rows.append([])
            x = MARGIN
        rows[-1].append((index, x))
        x += needed
    return rows
