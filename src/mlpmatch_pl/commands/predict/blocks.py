"""Predict large TIFF files in blocks: neither the image nor its prediction is ever in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mlpmatch_pl.commands.predict.outputs import TILE, ImageFile, Kind, Prediction, draw, write_tiff
from mlpmatch_pl.data.readers.image import MAX_PIXELS
from mlpmatch_pl.data.readers.windows import TiffFacts, Window, read_window
from mlpmatch_pl.predictor import Predictor
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.prefetch import ordered_map
from mlpmatch_pl.visualization.panels import to_rgb

if TYPE_CHECKING:
    from mlpmatch_pl.commands.predict.run import PredictOptions

SAMPLE = 2048  # side of the part in the center that sets black and white of overlays
Array = NDArray[np.uint8]


def predict_blocks(
    predictor: Predictor, image: ImageFile, options: PredictOptions, advance: Callable[[int], None]
) -> None:
    """Predict a large TIFF file in blocks and write tiled TIFF files.

    Args:
        predictor: The predictor, with sliding windows.
        image: The file.
        options: What to write, and where.
        advance: Called for each block.

    Raises:
        UserError: If probabilities are to be saved, or the file cannot be read.
    """
    assert image.tiff is not None
    if "probabilities" in options.save:
        raise UserError(
            f"expected save without probabilities for a TIFF file as large as {image.path}, which is predicted in "
            "blocks, but it has them; omit them"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".predict-", dir=options.output) as folder:
        work = Path(folder, "classes and confidence")
        write_tiff(work, _infer(predictor, image, advance), image.tiff, channels=2)
        for kind in options.save:
            write_tiff(
                image.output(options.output, kind),
                _draw(predictor, image, work, kind, options.opacity),
                image.tiff,
                channels=1 if kind in ("index", "confidence") else 3,
                colors=predictor.colors if kind == "index" else None,
            )


def _infer(predictor: Predictor, image: ImageFile, advance: Callable[[int], None]) -> Iterator[Array]:
    """Yield classes and confidence, 0..255, of each row of blocks, (rows, W, 2)."""
    assert image.tiff is not None
    size, blocks = image.tiff.size, image.blocks
    windows = [Window(block.read_rows, block.read_columns, size) for block in blocks]

    def read(window: Window) -> Tensor:
        return predictor.image_tensor(predictor.read_image(image.path, window))[None]

    band = np.empty((max(block.rows.stop - block.rows.start for block in blocks), size[1], 2), np.uint8)
    for block, image_1CHW in zip(blocks, ordered_map(read, windows, workers=1, in_flight=1), strict=True):
        image_1CHW = image_1CHW.to(predictor.module.device)
        confidence_1HW, label_1HW = predictor.inference.confidence_and_label(predictor.module.segmentor, image_1CHW)
        top, bottom, left, right = block.inner
        label_HW, confidence_HW = (value[0, top:bottom, left:right] for value in (label_1HW, confidence_1HW))
        band[: bottom - top, block.columns, 0] = label_HW.cpu().numpy()
        band[: bottom - top, block.columns, 1] = (confidence_HW * 255).round().cpu().numpy()
        advance(1)
        if block.columns.stop == size[1]:
            yield band[: bottom - top]


def _draw(predictor: Predictor, image: ImageFile, work: Path, kind: Kind, opacity: float) -> Iterator[Any]:
    """Yield the pixels of the file for one of the `KINDS`, one row of tiles after the other."""
    import tifffile

    assert image.tiff is not None
    height, width = image.tiff.size
    limits = _limits(predictor, image.path, image.tiff) if kind == "overlay" else None
    with tifffile.TiffFile(work) as file:
        for top in range(0, height, TILE):
            window = Window(slice(top, min(top + TILE, height)), slice(0, width), image.tiff.size)
            stored_HW2 = read_window(file, window, work, MAX_PIXELS)
            shown = predictor.read_image(image.path, window) if kind == "overlay" else stored_HW2
            parts = []
            for left in range(0, width, SAMPLE):  # blending takes several times the memory of the pixels
                columns = slice(left, left + SAMPLE)
                rgb = to_rgb(shown[:, columns], limits) if kind == "overlay" else shown
                label_HW, confidence_HW = stored_HW2[:, columns, 0], stored_HW2[:, columns, 1].astype(np.float32) / 255
                prediction = Prediction(rgb, label_HW, confidence_HW, None)
                parts.append(draw(prediction, kind, predictor.colors, opacity))
            yield np.concatenate(parts, axis=1)


def _limits(predictor: Predictor, path: Path, tiff: TiffFacts) -> tuple[float, float] | None:
    """Return the values that are black and white in the whole overlay; None for 8-bit RGB, which stays as it is."""
    if predictor.bit_depth == 8 and predictor.in_chans == 3:
        return None
    rows, columns = (slice(max(side - SAMPLE, 0) // 2, min((side + SAMPLE) // 2, side)) for side in tiff.size)
    shown = predictor.read_image(path, Window(rows, columns, tiff.size))[..., :3]
    low, high = np.percentile(shown[..., : 3 if shown.shape[2] == 3 else 1], (1, 99))
    return float(low), float(high)
