"""From image files to prediction files: the work of ``python -m mlpmatch_pl.predict``.

Everything that can be refused is refused before anything is written. Decoding and encoding run in threads beside the
network.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from mlpmatch_pl.commands.predict.outputs import (
    KINDS,
    ImageFile,
    Kind,
    Prediction,
    encode,
    find_images,
    refuse_same_outputs,
    write_file,
)
from mlpmatch_pl.data.base import Image
from mlpmatch_pl.data.readers.image import ImageReader
from mlpmatch_pl.engine.runtime_errors import is_out_of_memory
from mlpmatch_pl.evaluation.sliding_window import SlidingWindowInference
from mlpmatch_pl.predictor import Predictor, load
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import OTHER_OUTPUT, refuse_overwrite
from mlpmatch_pl.utils.progress import progress, say
from mlpmatch_pl.visualization.panels import Colors

THREADS = 4  # that decode, and as many that encode
AHEAD = 8  # images that are decoded before, or encoded after, the one in the network
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Options:
    """The configuration of ``python -m mlpmatch_pl.predict``.

    Attributes:
        checkpoint: Checkpoint of a training.
        input: An image file, a folder or a glob pattern.
        output: Folder to write to.
        save: What to write of each image.
        opacity: Share of the class color in an overlay, 0..1.
        overwrite: Whether existing files may be replaced.
        device: See `mlpmatch_pl.predictor.load`.
        inference: How images are inferred.

    Raises:
        UserError: If nothing is to be saved, the opacity is out of range, or the output is a file.
    """

    checkpoint: Path
    input: Path
    output: Path
    save: tuple[Kind, ...]
    opacity: float
    overwrite: bool
    device: str
    inference: SlidingWindowInference

    def __post_init__(self) -> None:
        if not self.save:
            raise UserError(f"expected something to save, but save is empty; choose of {', '.join(KINDS)}")
        if not 0 <= self.opacity <= 1:
            raise UserError(f"expected opacity from 0 to 1, but got {self.opacity!r}")
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"expected output to be a folder, but {self.output} is a file; choose another output")


def run(options: Options) -> None:
    """Predict all images; those that cannot be read, or are too large, are left out and named at the end.

    Raises:
        UserError: If nothing can be done, or after everything has been written, if images were left out.
    """
    images = find_images(str(options.input), options.output)
    refuse_same_outputs(images)
    if not options.overwrite:
        refuse_overwrite(
            (image.output(options.output, kind) for image in images for kind in options.save), OTHER_OUTPUT
        )
    predictor = load(options.checkpoint, options.device, options.inference)
    write_classes(predictor, options.output / "classes.json", options.overwrite)
    started = time.monotonic()
    failures = predict_files(predictor, images, options)
    seconds, done = time.monotonic() - started, len(images) - len(failures)
    rate = done / max(seconds, 1e-9)
    say(f"predicted {done:,} of {len(images):,} in {seconds:.1f} s ({rate:.1f} a second), written to {options.output}")
    if failures:
        for failure in failures:
            print(f"skipped: {failure}", file=sys.stderr)
        raise UserError(
            f"expected images that can be predicted, but {len(failures):,} of {len(images):,} could not be and are "
            "named above; mend or remove them"
        )


def write_classes(predictor: Predictor, path: Path, overwrite: bool) -> None:
    """Write name and color of each class; refuse to put predictions of other classes into one folder.

    Raises:
        UserError: If the file is there with other classes, and must not be overwritten.
    """
    classes = [
        {"index": index, "name": name, "color": list(color)}
        for index, (name, color) in enumerate(zip(predictor.class_names, predictor.colors, strict=True))
    ]
    content = (json.dumps(classes, indent=2, ensure_ascii=False) + "\n").encode()
    if path.exists() and not overwrite and path.read_bytes() != content:
        raise UserError(
            f"expected predictions of the same classes in one folder, but {path} has others; choose another output, or "
            "set overwrite=true"
        )
    write_file(path, content)


def predict_files(predictor: Predictor, images: Sequence[ImageFile], options: Options) -> list[str]:
    """Predict and write; return why images were left out, a sentence each."""
    failures: list[str] = []
    reader = ImageReader(predictor.in_chans, predictor.bit_depth)
    with progress("predicting", len(images)) as advance:

        def predictions() -> Iterator[tuple[ImageFile, Prediction]]:
            for image, pixels in zip(images, _ahead(partial(_read, reader), images), strict=True):
                try:
                    if isinstance(pixels, UserError):
                        raise pixels
                    predicted = infer(predictor, pixels, image.path, options.save)
                except UserError as error:
                    failures.append(str(error))
                    advance(1)
                else:
                    yield image, predicted

        for _ in _ahead(partial(_save, predictor.colors, options), predictions()):
            advance(1)
    return failures


def infer(predictor: Predictor, image_HWC: Image, path: Path, save: Sequence[str]) -> Prediction:
    """Predict an image.

    Raises:
        UserError: If the memory is too small for it.
    """
    try:
        probability_CHW = predictor.infer(image_HWC)
        confidence_HW, label_HW = probability_CHW.max(dim=0)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        height, width = image_HWC.shape[:2]
        raise UserError(
            f"expected an image that the memory is large enough for, but {path} is {width} x {height} pixels; set "
            "inference.mode=slide and inference.window, lower inference.scales, or set device=cpu"
        ) from error
    return Prediction(
        image_HWC,
        label_HW.to(torch.uint8).cpu().numpy(),
        confidence_HW.cpu().numpy(),
        probability_CHW.cpu().numpy() if "probabilities" in save else None,
    )


def _read(reader: ImageReader, image: ImageFile) -> Image | UserError:
    try:
        return reader(image.path)
    except UserError as error:
        return error


def _save(colors: Colors, options: Options, item: tuple[ImageFile, Prediction]) -> None:
    image, prediction = item
    for kind in options.save:
        write_file(image.output(options.output, kind), encode(prediction, kind, colors, options.opacity))


def _ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Apply a function in threads, some items ahead of the one asked for; results come in order."""
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(THREADS)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
