"""From image files to prediction files.

Wrong input is refused before anything is written. Images are decoded and encoded in threads while the network runs.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from mlpmatch_pl.commands.predict.blocks import predict_blocks
from mlpmatch_pl.commands.predict.outputs import (
    KINDS,
    ImageFile,
    Kind,
    Prediction,
    draw,
    encode,
    find_images,
    refuse_same_outputs,
    write_file,
    write_tiff,
)
from mlpmatch_pl.data.base import Image
from mlpmatch_pl.data.files import count_suffixes
from mlpmatch_pl.data.readers.image import ImageReader
from mlpmatch_pl.engine.runtime_errors import is_out_of_memory
from mlpmatch_pl.evaluation import SlidingWindowInference
from mlpmatch_pl.evaluation.calibration import MiouEstimate, temper
from mlpmatch_pl.predictor import Predictor, Weights, load
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import refuse_overwrite
from mlpmatch_pl.utils.prefetch import ordered_map
from mlpmatch_pl.utils.progress import progress, say
from mlpmatch_pl.visualization.panels import Colors

OTHERS = "choose another output, or set overwrite=missing (only images without predictions) or overwrite=true"
THREADS = 4  # that decode, and as many that encode
AHEAD = 8  # images decoded before, or not yet encoded after, the one in the network


@dataclass(frozen=True)
class PredictOptions:
    """The configuration of ``python -m mlpmatch_pl.predict``.

    Attributes:
        checkpoint: Checkpoint of a training run.
        weights: ``teacher`` or ``student``; None for the teacher if there is one.
        input: An image file, a folder or a glob pattern.
        output: Folder to write to.
        save: What to write for each image.
        opacity: Share of the class color in an overlay, 0..1.
        temperature: Divisor of the logits, as `evaluate` fits it, for confidences and probabilities.
        overwrite: False refuses existing files, except those of the same command that was interrupted, which
            continues; True replaces them; ``missing`` predicts only images without predictions.
        device: See `mlpmatch_pl.predictor.load`.
        inference: How probabilities are inferred.

    Raises:
        UserError: If nothing is to be saved, the opacity is out of range, or the output is a file.
    """

    checkpoint: Path
    weights: Weights | None
    input: Path
    output: Path
    save: tuple[Kind, ...]
    opacity: float
    temperature: float
    overwrite: bool | Literal["missing"]
    device: str
    inference: SlidingWindowInference

    def __post_init__(self) -> None:
        if not self.save:
            raise UserError(f"expected something to save, but save is empty; choose from {', '.join(KINDS)}")
        if not 0 <= self.opacity <= 1:
            raise UserError(f"expected opacity from 0 to 1, but got {self.opacity!r}")
        if self.temperature <= 0:
            raise UserError(f"expected a temperature above 0, but got {self.temperature!r}")
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"expected output to be a folder, but {self.output} is a file; choose another output")


def run(options: PredictOptions) -> None:
    """Predict all images; those that cannot be read or do not fit into memory are skipped and named at the end.

    Raises:
        UserError: Before anything is written, or at the end if images were skipped.
    """
    unread: list[str] = []
    images = find_images(str(options.input), options.output, unread)
    refuse_same_outputs(images)
    images = [image.with_head(options.inference) for image in images]
    if options.temperature != 1 and "confidence" in options.save:
        for image in (image for image in images if image.blocks):
            raise UserError(
                f"expected temperature=1 for confidences of images that are read in blocks, as {image.path} is; omit "
                "temperature, or confidence in save"
            )
    record = Record(options)
    if options.overwrite == "missing" or (options.overwrite is False and record.is_interrupted()):
        record.refuse_others()
        found = len(images)
        images = [image for image in images if not _is_predicted(image, options)]
        say(f"{found - len(images):,} of {found:,} images have predictions in {options.output}; predicting the others")
    elif not options.overwrite:
        paths = (image.output(options.output, kind) for image in images for kind in options.save)
        refuse_overwrite(paths, OTHERS)
    predictor = load(options.checkpoint, options.device, options.inference, options.weights)
    write_classes(predictor, options.output / "classes.json", options.overwrite is True)
    record.write(finished=False)
    started = time.monotonic()
    estimate = MiouEstimate(len(predictor.class_names))
    failures = predict_files(predictor, images, options, estimate)
    record.write(finished=True)
    seconds, done = time.monotonic() - started, len(images) - len(failures)
    rate = done / max(seconds, 1e-9)
    say(f"predicted {done:,} of {len(images):,} in {seconds:.1f} s ({rate:.1f} a second), written to {options.output}")
    if estimate.miou == estimate.miou:
        note = "" if options.temperature != 1 else "; too high unless temperature is what evaluate fits"
        say(f"estimated mIoU {100 * estimate.miou:.1f} %, from the confidences{note}")
    if unread:
        print(f"left out: {len(unread):,} files that cannot be read: {count_suffixes(unread)}", file=sys.stderr)
    if failures:
        for failure in failures:
            print(f"skipped: {failure}", file=sys.stderr)
        raise UserError(
            f"expected images that can be predicted, but {len(failures):,} of {len(images):,} could not be (see "
            "above); fix or remove them"
        )


def _is_predicted(image: ImageFile, options: PredictOptions) -> bool:
    return all(image.output(options.output, kind).exists() for kind in options.save)


class Record:
    """What made the predictions in a folder, in its predict.json: an interrupted command continues from it.

    Args:
        options: The command's.
    """

    def __init__(self, options: PredictOptions) -> None:
        self.path = options.output / "predict.json"
        checkpoint = options.checkpoint.read_bytes() if options.checkpoint.is_file() else b""  # load() explains
        self._made_by = {
            "checkpoint_sha256": hashlib.sha256(checkpoint).hexdigest(),
            "weights": options.weights,
            "opacity": options.opacity,
            "temperature": options.temperature,
            "inference": json.loads(json.dumps(asdict(options.inference))),
        }
        try:
            self._previous = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # missing or damaged
            self._previous = None

    def _is_same(self) -> bool:
        previous = self._previous
        return isinstance(previous, dict) and all(previous.get(key) == value for key, value in self._made_by.items())

    def is_interrupted(self) -> bool:
        """Tell whether a command of the same checkpoint and options did not finish."""
        return self._is_same() and not self._previous["finished"]

    def refuse_others(self) -> None:
        """Refuse to add to the predictions of another checkpoint or of other options.

        Raises:
            UserError: If there are such.
        """
        if self._previous is not None and not self._is_same():
            raise UserError(
                f"expected predictions of one checkpoint with one set of options in a folder, but those of {self.path} "
                "differ; choose another output, or set overwrite=true"
            )

    def write(self, finished: bool) -> None:
        """Write predict.json."""
        content = {**self._made_by, "finished": finished}
        write_file(self.path, (json.dumps(content, indent=2) + "\n").encode())


def write_classes(predictor: Predictor, path: Path, overwrite: bool) -> None:
    """Write the name and color of each class; refuse to mix predictions of other classes into one folder.

    Raises:
        UserError: If the file exists with other classes and must not be overwritten.
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


def predict_files(
    predictor: Predictor, images: Sequence[ImageFile], options: PredictOptions, estimate: MiouEstimate
) -> list[str]:
    """Predict and write; return one sentence per skipped image. Images in blocks do not count for the estimate."""
    failures: list[str] = []
    read = partial(_read, predictor.read_image)
    save = partial(_save, predictor.colors, options)
    whole, large = ([image for image in images if bool(image.blocks) is is_large] for is_large in (False, True))
    with progress("predicting", len(whole) + sum(len(image.blocks) for image in large)) as advance:

        def predictions() -> Iterator[tuple[ImageFile, Prediction]]:
            for image, pixels in zip(whole, ordered_map(read, whole, THREADS, AHEAD), strict=True):
                try:
                    if isinstance(pixels, UserError):
                        raise pixels
                    with _memory_is_user_error(image.path, pixels.shape[:2]):
                        prediction = _infer(predictor, pixels, options, estimate)
                except UserError as error:
                    failures.append(str(error))
                    advance(1)
                else:
                    yield image, prediction

        for _ in ordered_map(save, predictions(), THREADS, AHEAD):
            advance(1)
        for image in large:
            try:
                with _memory_is_user_error(image.path, image.tiff.size if image.tiff else (0, 0)):
                    predict_blocks(predictor, image, options, advance)
            except UserError as error:
                failures.append(str(error))
    return failures


@contextmanager
def _memory_is_user_error(path: Path, size: Sequence[int]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"expected an image that fits into memory, but {path} is {size[1]} x {size[0]} pixels; set "
            "inference.mode=slide and inference.window, lower inference.scales or inference.window_batch, or set "
            "device=cpu"
        ) from error


def _infer(predictor: Predictor, image_HWC: Image, options: PredictOptions, estimate: MiouEstimate) -> Prediction:
    probability_CHW = temper(predictor.infer(image_HWC), options.temperature)
    estimate.add(probability_CHW)
    confidence_HW, label_HW = probability_CHW.max(dim=0)
    return Prediction(
        image_HWC,
        label_HW.to(torch.uint8).cpu().numpy(),
        confidence_HW.cpu().numpy(),
        probability_CHW.cpu().numpy() if "probabilities" in options.save else None,
    )


def _read(reader: ImageReader, image: ImageFile) -> Image | UserError:
    try:
        return reader(image.path)
    except UserError as error:
        return error


def _save(colors: Colors, options: PredictOptions, item: tuple[ImageFile, Prediction]) -> None:
    image, prediction = item
    for kind in options.save:
        path = image.output(options.output, kind)
        if image.tiff and kind != "probabilities":
            pixels = draw(prediction, kind, colors, options.opacity)
            channels = 1 if pixels.ndim == 2 else 3
            write_tiff(path, [pixels], image.tiff, channels, colors if kind == "index" else None)
        else:
            write_file(path, encode(prediction, kind, colors, options.opacity))
