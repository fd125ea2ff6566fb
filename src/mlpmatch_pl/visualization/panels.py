"""Images, masks and predictions side by side, with a legend of the classes."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

Array = NDArray[Any]
Colors = Sequence[tuple[int, int, int]]
IGNORED_COLOR = (255, 255, 255)
PANEL_WIDTH = 320  # smaller images are enlarged, so that titles are readable
MARGIN, TITLE, FONT_SIZE = 8, 22, 14  # pixels
PAPER, INK, FRAME = (250, 250, 250), (0, 0, 0), (150, 150, 150)
DARK = 64  # colors with less in every channel would only darken an overlay
LISTED = 21  # with more classes, a legend lists only those in the picture


def prediction_panels(
    image_HWC: Array,
    truth_HW: Array,
    label_HW: Array,
    confidence_HW: Array,
    class_names: Sequence[str],
    colors: Colors,
    threshold: float | None = None,
) -> PILImage.Image:
    """Draw an image, its ground truth, the prediction and its confidence.

    Args:
        image_HWC: The image, uint8 or uint16, any number of channels.
        truth_HW: Ground truth; values that are no class are drawn as ignored.
        label_HW: Predicted classes.
        confidence_HW: Probability of the predicted class, 0..1, drawn from black to white.
        class_names: Names for the legend.
        colors: RGB color of each class.
        threshold: Confidence threshold of pseudo-labels; if given, a further panel shows the predictions that reach it.

    Example:
        >>> flat = np.zeros((20, 40), np.uint8)
        >>> image, confidence = np.zeros((20, 40, 3), np.uint8), flat / 1.0
        >>> sheet = prediction_panels(image, flat, flat, confidence, ["a", "b"], [(0, 0, 0), (9, 9, 9)])
        >>> sheet.mode
        'RGB'
    """
    gray = (confidence_HW * 255).astype(np.uint8)
    panels = {
        "image": to_rgb(image_HWC),
        "truth": colorize(truth_HW, colors),
        "prediction": colorize(label_HW, colors),
        "confidence (white = 1)": np.repeat(gray[..., None], 3, axis=2),
    }
    if threshold is not None:
        confident_HW = np.where(confidence_HW >= threshold, label_HW, 255)  # 255 is drawn as ignored
        panels[f"pseudo-label (confidence >= {threshold:g})"] = colorize(confident_HW, colors)
    sheet = sheet_of([panels], class_names, colors, labels=(truth_HW, label_HW))
    width, height = _panel_size(image_HWC, PANEL_WIDTH)
    lefts = range(MARGIN, sheet.width, width + MARGIN)
    boxes = {title: (left, TITLE, left + width, TITLE + height) for title, left in zip(panels, lefts, strict=True)}
    entries = _listed(class_names, colors, (truth_HW, label_HW))
    classes = {name: f"#{red:02x}{green:02x}{blue:02x}" for name, (red, green, blue) in entries}
    sheet.info["panels"] = json.dumps({"boxes": boxes, "classes": classes})
    return sheet


def sheet_of(
    rows: Sequence[Mapping[str, Array]],
    class_names: Sequence[str],
    colors: Colors,
    width: int = PANEL_WIDTH,
    labels: Sequence[Array] = (),
) -> PILImage.Image:
    """Stack rows of panels, with a legend of the classes below.

    Args:
        rows: The panels of each row by title, (H, W, 3) uint8; all panels of a row have the same size.
        class_names: Names for the legend.
        colors: RGB color of each class.
        width: Minimum width of a panel in pixels; smaller ones are enlarged.
        labels: The classes in the panels, (H, W) each; with more than 21 class names, the legend lists only these.
    """
    drawn = [_panel_row(row, width) for row in rows]
    total = max(row.width for row in drawn)
    drawn.append(_legend([*_listed(class_names, colors, labels), ("ignored", IGNORED_COLOR)], total))
    sheet = PILImage.new("RGB", (total, sum(row.height for row in drawn)), PAPER)
    y = 0
    for row in drawn:
        sheet.paste(row, (0, y))
        y += row.height
    return sheet


def contact_sheet(panels: Iterable[tuple[str, Array]], columns: int = 5, side: int = 240) -> PILImage.Image:
    """Draw images in rows, each below its title.

    Args:
        panels: Titles and images, (H, W, 3) uint8, of any sizes; one of them is in memory at a time.
        columns: Images in a row.
        side: Longer side of the images in pixels.

    Example:
        >>> contact_sheet([("1  a.jpg", np.zeros((30, 60, 3), np.uint8))], columns=1, side=100).size
        (116, 80)
    """
    font = ImageFont.load_default(FONT_SIZE)
    rows: list[list[tuple[str, PILImage.Image]]] = []
    for number, (title, pixels) in enumerate(panels):
        factor = side / max(pixels.shape[:2])
        size = [max(round(length * factor), 1) for length in pixels.shape[1::-1]]
        if number % columns == 0:
            rows.append([])
        rows[-1].append((title, PILImage.fromarray(pixels).resize((size[0], size[1]), PILImage.Resampling.LANCZOS)))
    heights = [TITLE + max(image.height for _, image in row) + MARGIN for row in rows]
    width = max(len(row) for row in rows) * (side + MARGIN) + MARGIN
    sheet = PILImage.new("RGB", (width, sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, top in zip(rows, itertools.accumulate(heights, initial=0), strict=False):
        for column, (title, image) in enumerate(row):
            x = MARGIN + column * (side + MARGIN)
            draw.text((x, top + 3), _shortened(title, side, font), fill=INK, font=font)
            sheet.paste(image, (x, top + TITLE))
    return sheet


def _shortened(title: str, width: int, font: Any) -> str:
    """Cut the middle of a title that is too long; names of files differ at their end."""
    cut = title
    for kept in range(len(title) - 1, 0, -1):
        if font.getlength(cut) <= width:
            break
        cut = f"{title[: kept // 3]}…{title[len(title) - (kept - kept // 3) :]}"
    return cut


def _listed(
    class_names: Sequence[str], colors: Colors, labels: Sequence[Array]
) -> list[tuple[str, tuple[int, int, int]]]:
    """Return name and color of the classes for a legend."""
    entries = list(zip(class_names, colors, strict=True))
    if not labels or len(entries) <= LISTED:
        return entries
    present = np.unique(np.concatenate([np.ravel(label_HW) for label_HW in labels]))
    return [entry for number, entry in enumerate(entries) if number in present]


def save_panels(sheet: PILImage.Image, path: Path) -> None:
    """Save a sheet of `prediction_panels` as a PNG file that `read_panels` can split."""
    info = PngInfo()
    info.add_text("panels", sheet.info["panels"])
    sheet.save(path, pnginfo=info)


def read_panels(path: Path) -> tuple[dict[str, PILImage.Image], dict[str, str]]:
    """Split a file written by `save_panels` into its panels.

    Returns:
        The panels by title, including ``image``, ``truth`` and ``prediction``, and the color of each class by name, as
        ``#rrggbb``; both are empty for other PNG files.

    Raises:
        OSError, SyntaxError, ValueError, TypeError, AttributeError: If the file is broken.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> flat = np.zeros((20, 640), np.uint8)
        >>> image, confidence = np.zeros((20, 640, 3), np.uint8), flat / 1.0
        >>> with TemporaryDirectory() as folder:
        ...     save_panels(prediction_panels(image, flat, flat, confidence, ["a"], [(9, 9, 9)]), Path(folder, "a.png"))
        ...     panels, classes = read_panels(Path(folder, "a.png"))
        >>> panels["truth"].size, panels["truth"].getpixel((0, 0)), classes
        ((640, 20), (9, 9, 9), {'a': '#090909'})
    """
    with PILImage.open(path) as sheet:
        info = json.loads(sheet.info.get("panels", '{"boxes": {}, "classes": {}}'))
        pixels = sheet.convert("RGB")
    panels = {}
    for title, box in info["boxes"].items():
        left, top, right, bottom = map(int, box)
        if not (0 <= left < right <= pixels.width and 0 <= top < bottom <= pixels.height):
            raise ValueError(f"panel {title!r} is outside the sheet")
        panels[str(title)] = pixels.crop((left, top, right, bottom))
    if wrong := [color for color in info["classes"].values() if not re.fullmatch("#[0-9a-f]{6}", color)]:
        raise ValueError(f"{wrong[0]!r} is not a color")
    return panels, info["classes"]


def to_rgb(image_HWC: Array, limits: tuple[float, float] | None = None) -> Array:
    """Convert an image of any bit depth and number of channels to RGB, (H, W, 3) uint8.

    The first three channels are shown; of two, the first.

    Args:
        image_HWC: The image, uint8 or uint16, any number of channels.
        limits: Values that become black and white. By default, 8-bit RGB is returned unchanged, and other images are
            stretched from their 1st to their 99th percentile.

    Example:
        >>> to_rgb(np.array([[[0], [1000]]], np.uint16)).tolist()
        [[[0, 0, 0], [255, 255, 255]]]
    """
    if image_HWC.dtype == np.uint8 and image_HWC.shape[2] == 3 and limits is None:
        return image_HWC
    shown = image_HWC[..., :3] if image_HWC.shape[2] >= 3 else image_HWC[..., :1]
    values = shown.astype(np.float32)
    low, high = limits or np.percentile(values, (1, 99))
    stretched = ((values - low) / max(high - low, 1e-6)).clip(0, 1) * 255
    pixels: Array = np.repeat(stretched, 3 // shown.shape[2], axis=2).astype(np.uint8)
    return pixels


def _panel_row(panels: Mapping[str, Array], min_width: int) -> PILImage.Image:
    """Put panels side by side, each below its title."""
    width, height = _panel_size(next(iter(panels.values())), min_width)
    row = PILImage.new("RGB", (len(panels) * (width + MARGIN) + MARGIN, TITLE + height + MARGIN), PAPER)
    for column, (title, pixels) in enumerate(panels.items()):
        x = MARGIN + column * (width + MARGIN)
        smooth = PILImage.Resampling.BICUBIC if title == "image" else PILImage.Resampling.NEAREST
        draw = ImageDraw.Draw(row)
        draw.text((x, 3), title, fill=INK, font=ImageFont.load_default(FONT_SIZE))
        draw.rectangle((x - 1, TITLE - 1, x + width, TITLE + height), outline=FRAME)  # white panels on white paper
        row.paste(PILImage.fromarray(pixels).resize((width, height), smooth), (x, TITLE))
    return row


def _panel_size(pixels_HWC: Array, min_width: int) -> tuple[int, int]:
    height, width = pixels_HWC.shape[:2]
    factor = max(min_width / width, 1.0)
    return round(width * factor), round(height * factor)


def _legend(entries: Sequence[tuple[str, tuple[int, int, int]]], width: int) -> PILImage.Image:
    """Draw color and name of each class, in as many rows as needed."""
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
    """Convert classes to colors, (H, W, 3) uint8; values that are no class become white.

    Example:
        >>> colorize(np.array([[0, 255]]), [(1, 2, 3)]).tolist()
        [[[1, 2, 3], [255, 255, 255]]]
    """
    table = np.full((256, 3), IGNORED_COLOR, np.uint8)
    table[: len(colors)] = colors
    colored: Array = table[label_HW]
    return colored


def overlay(image_HWC: Array, label_HW: Array, colors: Colors, opacity: float = 0.5) -> Array:
    """Blend an image with the colors of its classes, (H, W, 3) uint8.

    Pixels of a nearly black class, as backgrounds often are, and pixels without a class keep the image.

    Args:
        image_HWC: The image, uint8 or uint16, any number of channels.
        label_HW: Its classes.
        colors: RGB color of each class.
        opacity: Share of the color, 0..1.

    Example:
        >>> image = np.full((1, 3, 3), 100, np.uint8)
        >>> overlay(image, np.array([[0, 1, 255]]), [(40, 40, 40), (200, 0, 0)])[0].tolist()
        [[100, 100, 100], [150, 50, 50], [100, 100, 100]]
    """
    shares = np.zeros((256, 1), np.float32)
    shares[: len(colors), 0] = [opacity * (max(color) >= DARK) for color in colors]
    share_HW1 = shares[label_HW]
    blended: Array = (1 - share_HW1) * to_rgb(image_HWC) + share_HW1 * colorize(label_HW, colors)
    return blended.round().astype(np.uint8)


def _legend_rows(names: Sequence[str], width: int, font: Any) -> list[list[tuple[int, int]]]:
    """Return the rows of the legend as (index of the class, x position)."""
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
