"""The images to predict, and the files written for each of them."""

from __future__ import annotations

import glob
import io
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from mlpmatch_pl.data.base import Image
from mlpmatch_pl.data.files import count_suffixes, image_files, is_left_out
from mlpmatch_pl.data.readers.image import IMAGE_SUFFIXES
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.visualization.panels import IGNORED_COLOR, Colors, colorize, overlay

Array = NDArray[Any]
PNG_LEVEL = 1  # the default, 6, is 3.5 times slower for an overlay of a photograph, and the file is not smaller

Kind = Literal["index", "color", "overlay", "confidence", "probabilities"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What can be written for an image, each in its own folder, so that ``index`` can be used as a mask folder."""


@dataclass(frozen=True)
class ImageFile:
    """An image to predict.

    Attributes:
        path: The file.
        name: Its path relative to the input folder, without suffix.

    Example:
        >>> ImageFile(Path("photos/day/a.b.jpg"), "day/a.b").output(Path("out"), "index").as_posix()
        'out/index/day/a.b.png'
    """

    path: Path
    name: str

    def output(self, folder: Path, kind: str) -> Path:
        """Return the path for one of the `KINDS` in the output folder."""
        return folder / kind / f"{self.name}{'.npz' if kind == 'probabilities' else '.png'}"


def find_images(pattern: str, output: Path, unread: list[str] | None = None) -> list[ImageFile]:
    """Return the images of a file, a folder (with subfolders) or a glob pattern, sorted.

    Args:
        pattern: The file, folder or pattern; ``**`` matches any folders.
        output: Folder to write to; files that an earlier run wrote there are not input.
        unread: Receives the files with a suffix that is not read.

    Raises:
        UserError: If there are none.
    """
    path, other = Path(pattern), list[str]()
    if path.is_file():
        return [_image_file(path, path.parent)]
    if path.is_dir():
        found, base = list(map(Path, image_files(str(path), unread=other))), path
    elif glob.has_magic(pattern):
        found = [name for name in map(Path, glob.glob(pattern, recursive=True)) if name.is_file()]
        other = [str(name) for name in found if is_left_out(name.name)]
        base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    else:
        raise UserError(f"expected input as an image file, a folder or a glob pattern, but {pattern} does not exist")
    written = tuple(os.path.abspath(output / kind) + os.sep for kind in KINDS)
    images = [
        _image_file(path, base)
        for path in sorted(found)
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not os.path.abspath(path).startswith(written)
    ]
    other = [name for name in other if not os.path.abspath(name).startswith(written)]
    if unread is not None:
        unread += other
    if not images:
        instead = f"only {count_suffixes(other)}" if other else "none"
        raise UserError(
            f"expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) in input={pattern}, but found {instead}; name "
            f"another file, folder or pattern, outside of the predictions in {output}"
        )
    return images


def refuse_same_outputs(images: Iterable[ImageFile]) -> None:
    """Refuse two images that would write one file.

    Raises:
        UserError: With the names of the first two.
    """
    first: dict[str, Path] = {}
    for image in images:
        if image.name in first:
            raise UserError(
                f"expected images whose names differ without suffix, but {first[image.name]} and {image.path} would "
                "write one file; rename one, or predict them into different folders"
            )
        first[image.name] = image.path


@dataclass(frozen=True)
class Prediction:
    """An image and its prediction.

    Attributes:
        image_HWC: The image as stored.
        label_HW: Classes, uint8.
        confidence_HW: Probability of these classes, float32.
        probability_CHW: Probability of all classes, float32; None if it is not saved.
    """

    image_HWC: Image
    label_HW: Array
    confidence_HW: Array
    probability_CHW: Array | None


def encode(prediction: Prediction, kind: str, colors: Colors, opacity: float) -> bytes:
    """Return the content of the file for one of the `KINDS`."""
    buffer = io.BytesIO()
    if kind == "probabilities":
        np.savez(buffer, probabilities=prediction.probability_CHW)  # type: ignore[arg-type]
    else:
        _draw(prediction, kind, colors, opacity).save(buffer, format="PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def _draw(prediction: Prediction, kind: str, colors: Colors, opacity: float) -> PILImage.Image:
    if kind == "index":
        picture = PILImage.fromarray(prediction.label_HW)
        table = np.full((256, 3), IGNORED_COLOR, np.uint8)
        table[: len(colors)] = colors
        picture.putpalette(table.tobytes())  # L becomes P; the values stay
        return picture
    if kind == "confidence":
        return PILImage.fromarray((prediction.confidence_HW * 255).round().astype(np.uint8))
    if kind == "overlay":
        return PILImage.fromarray(overlay(prediction.image_HWC, prediction.label_HW, colors, opacity))
    return PILImage.fromarray(colorize(prediction.label_HW, colors))


def write_file(path: Path, content: bytes) -> None:
    """Write a file completely or not at all, so that an interruption leaves no partial file.

    Unlike `mlpmatch_pl.utils.files.atomic_write`, this does not wait for the disk: predictions can be repeated.

    Raises:
        UserError: If the file cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        raise UserError(
            f"expected to write {path}, but {error.strerror or error}; fix that, or choose another output"
        ) from error


def _image_file(path: Path, base: Path) -> ImageFile:
    return ImageFile(path, os.path.splitext(os.path.relpath(path, base))[0])
