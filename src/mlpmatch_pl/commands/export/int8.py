"""8-bit ONNX files, by onnxruntime's static quantization, and what they cost in mIoU and gain in speed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from torch import Tensor

from mlpmatch_pl.commands.evaluate.dataset import check_compatible, open_part
from mlpmatch_pl.commands.export.formats import DTYPES, FORMATS, InputDtype, Model
from mlpmatch_pl.data.dataset import EvalDataset, image_tensor
from mlpmatch_pl.evaluation import ConfusionMatrix, Scores, predict_logits
from mlpmatch_pl.evaluation.sliding_window import SMALLEST
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.seeding import evenly_spaced

log = logging.getLogger(__name__)

CALIBRATION, SCORED = 32, 50  # images whose activations set the ranges, and images both files are scored on


class Score(NamedTuple):
    """What a file costs and gives.

    Attributes:
        megabytes: Its size.
        miou: Mean IoU, 0..1.
        seconds: Mean seconds per image.
    """

    megabytes: float
    miou: float
    seconds: float


def int8_path(file: Path) -> Path:
    """Return the path of the 8-bit file beside an ONNX file.

    Example:
        >>> int8_path(Path("run/best.onnx")).as_posix()
        'run/best.int8.onnx'
    """
    return file.with_suffix(".int8.onnx")


def write_int8(file: Path, module: MLPMatch, checkpoint: Path, dtype: InputDtype) -> tuple[Score, Score]:
    """Quantize an ONNX file to 8 bits, compare both on images of the checkpoint's own dataset, and log it.

    Training images without their masks set the ranges of the activations.

    Returns:
        The scores of the file and of the 8-bit file.

    Raises:
        UserError: If the run's dataset cannot be opened.
    """
    part = open_part(checkpoint, None, None)
    check_compatible(module, part.data, checkpoint)
    target = int8_path(file)
    train, images = part.data.train, part.images()
    shown = (image_tensor(train.image(index))[None] for index in evenly_spaced(range(len(train)), CALIBRATION))
    quantize(file, target, (image.to(DTYPES[dtype]) for image in shown if min(image.shape[2:]) >= SMALLEST))
    chosen = evenly_spaced(range(len(images)), SCORED)
    scores = [_score(path, images, chosen, len(part.data.class_names), dtype) for path in (file, target)]
    log.info("compared on %d images of %s:", len(chosen), part.part)
    for path, score in zip((file, target), scores, strict=True):
        log.info(
            "  %s: %.1f MB, mIoU %.2f %%, %.3f s per image", path, score.megabytes, 100 * score.miou, score.seconds
        )
    return scores[0], scores[1]


def quantize(file: Path, target: Path, images: Iterator[Tensor]) -> None:
    """Write an ONNX file with 8-bit convolutions.

    Args:
        file: The ONNX file.
        target: The file to write.
        images: Images (1, C, H, W) that set the ranges of the activations.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, object] | None:
            image_BCHW = next(images, None)
            return None if image_BCHW is None else {"image": image_BCHW.numpy()}

    with TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(file, prepared, skip_symbolic_shape=True)  # it cannot follow dynamic sizes
        quantize_static(
            prepared, target, Reader(), op_types_to_quantize=["Conv"], per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip


def _score(file: Path, images: EvalDataset, chosen: Sequence[int], num_classes: int, dtype: InputDtype) -> Score:
    model: Model = FORMATS["onnx"].read(file)
    counts, seconds = ConfusionMatrix(num_classes), 0.0
    for index in chosen:
        sample = images[index]
        image_BCHW, started = sample["image"][None].to(DTYPES[dtype]), time.perf_counter()
        label_BHW = predict_logits(model, image_BCHW).argmax(dim=1)
        seconds += time.perf_counter() - started
        counts.update(label_BHW, sample["mask"][None].long())
    return Score(file.stat().st_size / 1e6, Scores.of(counts.compute()).miou, seconds / len(chosen))
