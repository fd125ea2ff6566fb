"""The images to predict, and the files written for each of them."""

from __future__ import annotations

import glob
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from mlpmatch_pl.data.base import Image
from mlpmatch_pl.data.files import count_suffixes, image_files, is_left_out
from mlpmatch_pl.data.readers.image import IMAGE_SUFFIXES
from mlpmatch_pl.data.readers.windows import TiffFacts, tiff_facts
from mlpmatch_pl.evaluation.sliding_window import Block, SlidingWindowInference
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.visualization.panels import IGNORED_COLOR, Colors, colorize, overlay

Array = NDArray[Any]
PNG_LEVEL = 1  # the default, 6, is 3.5 times slower for an overlay of a photograph, and the file is not smaller

Kind = Literal["index", "color", "overlay", "confidence", "probabilities"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What can be written for an image, each in its own folder, so that ``index`` can be used as a mask folder."""
TILE = 256  # side of the tiles of TIFF files


@dataclass(frozen=True)
class ImageFile:
    """An image to predict.

    Attributes:
        path: The file.
        name: Its path relative to the input folder, without suffix.
        tiff: Size and place on the map of a GeoTIFF or large TIFF file, whose predictions are TIFF files too.
        blocks: The blocks in which a large TIFF file is predicted.

    Example:
        >>> ImageFile(Path("photos/day/a.b.jpg"), "day/a.b").output(Path("out"), "index").as_posix()
        'out/index/day/a.b.png'
    """

    path: Path
    name: str
    tiff: TiffFacts | None = None
    blocks: Sequence[Block] = ()

    def output(self, folder: Path, kind: str) -> Path:
        """Return the path for one of the `KINDS` in the output folder."""
        suffix = ".npz" if kind == "probabilities" else ".tif" if self.tiff else ".png"
        return folder / kind / f"{self.name}{suffix}"

    def with_head(self, inference: SlidingWindowInference) -> ImageFile:
        """Return the image with what the head of a TIFF file says, if it matters."""
        tiff = tiff_facts(self.path)
        blocks = inference.blocks(*tiff.size) if tiff else ()
        return replace(self, tiff=tiff, blocks=blocks) if tiff and (tiff.geo_tags or blocks) else self


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
    """Return the content of the PNG or NPZ file for one of the `KINDS`."""
    buffer = io.BytesIO()
    if kind == "probabilities":
        np.savez(buffer, probabilities=prediction.probability_CHW)  # type: ignore[arg-type]
    else:
        picture = PILImage.fromarray(draw(prediction, kind, colors, opacity))
        if kind == "index":
            picture.putpalette(_palette(colors).tobytes())  # L becomes P; the values stay
        picture.save(buffer, format="PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def draw(prediction: Prediction, kind: str, colors: Colors, opacity: float) -> Array:
    """Return the pixels of one of the `KINDS`, uint8, (H, W) or (H, W, 3)."""
    if kind == "index":
        return prediction.label_HW
    if kind == "confidence":
        confidence: Array = (prediction.confidence_HW * 255).round().astype(np.uint8)
        return confidence
    if kind == "overlay":
        return overlay(prediction.image_HWC, prediction.label_HW, colors, opacity)
    return colorize(prediction.label_HW, colors)


def _palette(colors: Colors) -> Array:
    table = np.full((256, 3), IGNORED_COLOR, np.uint8)
    table[: len(colors)] = colors
    return table


def write_file(path: Path, content: bytes) -> None:
    """Write a file completely or not at all, so that an interruption leaves no partial file.

    Unlike `mlpmatch_pl.utils.files.atomic_write`, this does not wait for the disk: predictions can be repeated.

    Raises:
        UserError: If the file cannot be written.
    """
    with _replacing(path) as part:
        part.write_bytes(content)


def write_tiff(
    path: Path, bands: Iterable[Array], tiff: TiffFacts, channels: int = 1, colors: Colors | None = None
) -> None:
    """Write a tiled TIFF file that lies at the same place on the map as another one.

    Args:
        path: The file.
        bands: Its pixels from top to bottom, uint8, (rows, W) or (rows, W, channels). All but the last have a multiple
            of `TILE` rows.
        tiff: Size and place.
        channels: Number of channels.
        colors: The colors of a palette file.

    Raises:
        UserError: If the file cannot be written.
    """
    import tifffile

    with _replacing(path) as part:
        tifffile.imwrite(
            part,
            _tiles(bands),
            shape=(*tiff.size, channels)[: 2 + (channels > 1)],
            dtype=np.uint8,
            tile=(TILE, TILE),
            photometric="palette" if colors else "rgb" if channels == 3 else "minisblack",
            planarconfig="contig" if channels > 1 else None,
            colormap=_palette(colors).T.astype(np.uint16) * 257 if colors else None,
            compression="zlib",
            compressionargs={"level": PNG_LEVEL},
            buffersize=2**24,
            extratags=tiff.geo_tags,
            metadata=None,
        )


def _tiles(bands: Iterable[Array]) -> Iterator[Array]:
    for band in bands:
        for top in range(0, band.shape[0], TILE):
            for left in range(0, band.shape[1], TILE):
                tile = band[top : top + TILE, left : left + TILE]
                missing = [(0, TILE - side) for side in tile.shape[:2]]
                # A copy: tifffile collects some tiles before it writes them, and the band may be used again.
                yield np.pad(tile, [*missing, (0, 0)][: tile.ndim])


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield the path to write to, and give the file its name when it is complete."""
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise UserError(
            f"expected to write {path}, but {error.strerror or error}; fix that, or choose another output"
        ) from error


def _image_file(path: Path, base: Path) -> ImageFile:
    return ImageFile(path, os.path.splitext(os.path.relpath(path, base))[0])
