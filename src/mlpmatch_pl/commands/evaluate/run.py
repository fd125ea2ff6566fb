"""Evaluate a checkpoint with `Trainer.test`, print the scores and write them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader

import mlpmatch_pl
from mlpmatch_pl.callbacks.progress import duration
from mlpmatch_pl.commands.evaluate.dataset import EvaluatedPart, Part, check_compatible, open_part
from mlpmatch_pl.commands.evaluate.outputs import FILES, write_results
from mlpmatch_pl.commands.evaluate.scores import CollectScores
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.data.dataset import EvalDataset
from mlpmatch_pl.engine.logging import quiet
from mlpmatch_pl.engine.runtime_errors import is_out_of_memory
from mlpmatch_pl.evaluation import Scores, SlidingWindowInference
from mlpmatch_pl.evaluation.boundary import boundary_iou, boundary_width
from mlpmatch_pl.evaluation.calibration import Calibration
from mlpmatch_pl.evaluation.confusion import Absent, class_mean
from mlpmatch_pl.evaluation.table import metrics_table
from mlpmatch_pl.predictor import Weights, resolve_device, restore
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import OTHER_OUTPUT, refuse_overwrite
from mlpmatch_pl.utils.validation import read_options
from mlpmatch_pl.visualization.plots import reliability_plot

log = logging.getLogger(__name__)
PART_NAMES = {"val": "validation", "test": "test", "train": "labeled training"}
FOR_TRAINING = ("backbone", "loader", "objective", "schedule")  # keys that the files in conf/dataset set for train
OVERALL = {"fw_iou": "frequency-weighted IoU", "acc": "accuracy", "kappa": "kappa", "boundary_iou": "boundary IoU"}


@dataclass(frozen=True)
class Scoring:
    """How pixels are scored.

    Attributes:
        absent: How classes absent from truth and prediction count in means; None for the rule of the training.
        boundary: Distance of the boundary IoU as a share of the diagonal; None to omit it.
        calibration: Pixels of each image to compare confidences with; None to omit it.
    """

    absent: Absent | None
    boundary: float | None
    calibration: int | None


@dataclass(frozen=True)
class EvaluateOptions:
    """The configuration of ``python -m mlpmatch_pl.evaluate``.

    Attributes:
        checkpoint: Checkpoint of a training run.
        weights: ``teacher`` or ``student``; None for the teacher if there is one.
        dataset: See `mlpmatch_pl.commands.evaluate.dataset.open_part`.
        part: Likewise.
        output: Folder for the results.
        overwrite: Whether existing files are replaced.
        device: See `mlpmatch_pl.predictor.load`.
        devices: Number of devices.
        inference: How probabilities are inferred.
        evaluation: How pixels are scored.
        worst: Number of images in worst.png.
        batch_size: Images per batch and device.
        num_workers: Processes per device that load images; None for as many as there are free cores.

    Raises:
        UserError: If a number is out of range.
    """

    checkpoint: Path
    weights: Weights | None
    dataset: Mapping[str, Any] | None
    part: Part | None
    output: Path
    overwrite: bool
    device: str
    devices: int
    inference: SlidingWindowInference
    evaluation: Scoring
    worst: int
    batch_size: int
    num_workers: int | None

    def __post_init__(self) -> None:
        least = {"devices": 1, "worst": 0, "batch_size": 1, "num_workers": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UserError(f"expected {name} of at least {minimum}, but got {value}")
        if self.evaluation.boundary is not None:
            boundary_width(1, 1, self.evaluation.boundary)  # refuses a share out of range
        if self.evaluation.calibration is not None and self.evaluation.calibration < 1:
            raise UserError(
                "expected evaluation.calibration of at least 1 pixel per image, but got "
                f"{self.evaluation.calibration}; null switches it off"
            )


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate with a composed configuration, see `mlpmatch_pl.evaluate.evaluate`."""
    quiet()
    options = _read_options(cfg)
    output = options.output.resolve()
    if not options.overwrite:
        refuse_overwrite((output / name for name in FILES), OTHER_OUTPUT)
    module = restore(options.checkpoint, options.weights)
    module.inference = options.inference
    part = open_part(options.checkpoint, options.dataset, options.part)
    check_compatible(module, part.data, options.checkpoint)
    _describe(part)

    images = part.images(options.inference)
    in_blocks = {index for index, _, block in images.samples if block}
    boundary = options.evaluation.boundary
    if in_blocks and boundary is not None:
        log.warning("note: no boundary IoU, as %d large images are read in blocks", len(in_blocks))
        boundary = None
    scores = CollectScores(part, boundary, options.worst, options.evaluation.calibration, in_blocks)
    trainer = _build_trainer(options, scores)
    loader = _build_loader(options, part, images, trainer)
    with _translate_errors():
        trainer.test(module, dataloaders=loader, verbose=False)

    absent = options.evaluation.absent or module.absent
    confusion_CC, boundary_3C = module.last_counts_CC, scores.boundary_3C
    boundary_C = None if boundary_3C is None else boundary_iou(boundary_3C)
    names = [images.source.name(index) for index in range(len(images.source))]
    result = {
        "checkpoint": str(options.checkpoint.resolve()),
        "part": part.part,
        **part.split,
        "same_as_run": part.same_as_run,
        "options": {
            "weights": options.weights,
            "inference": asdict(options.inference),
            "absent": absent,
            "boundary": boundary,
        },
        **_summarize(Scores.of(confusion_CC, absent), boundary_C, part.data.class_names, absent),
        "calibration": _describe_calibration(scores.calibration),
        "worst": [{"image": names[index], "miou": float(scores.miou_N[index])} for index in scores.worst],
        "seconds": round(scores.seconds, 2),
        "images_per_second": round(len(names) / max(scores.seconds, 1e-9), 2),
        "device": str(trainer.strategy.root_device),
        "devices": trainer.world_size,
        "versions": {"mlpmatch_pl": mlpmatch_pl.__version__, "torch": torch.__version__},
    }
    if trainer.is_global_zero:
        title = f"{options.checkpoint}, {PART_NAMES[part.part]}"
        log.info("%s", metrics_table(confusion_CC, part.data.class_names, absent, title, boundary_C))
        _describe_scores(result, absent)
        image_miou = zip(names, map(_defined, scores.miou_N.tolist()), strict=True)
        reliability = None if scores.calibration is None else reliability_plot(scores.calibration)
        write_results(output, result, confusion_CC, image_miou, {"worst": scores.picture, "reliability": reliability})
        log.info("results in %s", output)
    return result


def _read_options(cfg: DictConfig) -> EvaluateOptions:
    values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    if isinstance(values["dataset"], dict) and "_target_" in values["dataset"]:
        values = {key: value for key, value in values.items() if key not in FOR_TRAINING}
    return read_options(EvaluateOptions, values)


def _describe(part: EvaluatedPart) -> None:
    log.info("%d %s images, sha256 %s", part.split["count"], PART_NAMES[part.part], part.split["sha256"][:8])
    for note in part.data.notes:
        log.warning("note: %s", note)
    if part.same_as_run is False:
        log.warning(
            "note: these are not the run's %s images (splits.json), some may have been used in training; "
            "dataset=folder dataset.root=... scores every image with a mask of another folder",
            PART_NAMES[part.part],
        )


def _build_trainer(options: EvaluateOptions, scores: Callback) -> Trainer:
    device = resolve_device(options.device)
    first, count = device.index or 0, options.devices
    return Trainer(
        accelerator=device.type,
        devices=list(range(first, first + count)) if device.type == "cuda" else count,
        strategy="ddp" if count > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        callbacks=[scores],
    )


def _build_loader(
    options: EvaluateOptions, part: EvaluatedPart, images: EvalDataset, trainer: Trainer
) -> DataLoader[Any]:
    datamodule = SemiSupervisedDataModule(
        part.data, method="supervised", strong=(), eval_batch_size=options.batch_size, num_workers=options.num_workers
    )
    datamodule.trainer = trainer
    # The trainer gets the loader, not the data module, whose prepare_data validates the training images as well.
    return datamodule.eval_loader(PART_NAMES[part.part], images)


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Turn memory that runs out and images that do not stack into one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "stack expects each tensor to be equal size" in str(error):
            raise UserError(
                "expected images of one size for batch_size greater than 1, but their sizes differ; set batch_size=1"
            ) from error
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "expected images that fit into memory, but it ran out; set batch_size=1, or inference.mode=slide and "
            "inference.window, lower inference.scales, or set device=cpu"
        ) from error


def _summarize(scores: Scores, boundary_C: Tensor | None, class_names: Sequence[str], absent: Absent) -> dict[str, Any]:
    """Return the overall scores and those per class; None for undefined ones."""
    overall = {
        "miou": scores.miou,
        "acc": scores.accuracy,
        "dice": scores.dice,
        "fw_iou": scores.fw_iou,
        "kappa": scores.kappa,
    }
    columns = {
        "iou": scores.iou_C,
        "dice": scores.dice_C,
        "recall": scores.recall_C,
        "support": scores.support_C,
    }
    if boundary_C is not None:
        columns["boundary_iou"] = boundary_C
        overall["boundary_iou"] = class_mean(boundary_C, absent)
    rows = zip(*(map(_defined, column.tolist()) for column in columns.values()), strict=True)
    return {
        "metrics": {key: _defined(value) for key, value in overall.items()},
        "classes": {name: dict(zip(columns, row, strict=True)) for name, row in zip(class_names, rows, strict=True)},
    }


def _describe_calibration(calibration: Calibration | None) -> dict[str, float] | None:
    if calibration is None:
        return None
    pixels = int(calibration.count_B.sum())
    values = {"temperature": round(calibration.temperature, 3), "ece": calibration.ece}
    return {**values, "fitted_ece": calibration.fitted_ece, "pixels": pixels}


def _describe_scores(result: dict[str, Any], absent: Absent) -> None:
    classes, metrics = result["classes"], result["metrics"]
    missing = sum(row["iou"] is None for row in classes.values())
    counted = len(classes) - missing if absent == "exclude" else len(classes)
    rule = f"mean of {counted} classes" if missing else f"mean of all {counted} classes"
    if missing:
        rule += f", {missing} absent from truth and prediction " + ("excluded" if absent == "exclude" else "as zero")
    others = ", ".join(f"{name} {_four(metrics[key])}" for key, name in OVERALL.items() if key in metrics)
    log.info("mIoU %s (%s); %s", _four(metrics["miou"]), rule, others)
    if result["calibration"] is not None:
        log.info(
            "calibration error %(ece).4f; %(fitted_ece).4f at temperature %(temperature)g, which predict takes as "
            "temperature=%(temperature)g",
            result["calibration"],
        )
    log.info(
        "%d images in %s, %.1f a second", result["count"], duration(result["seconds"]), result["images_per_second"]
    )


def _defined(value: float) -> float | None:
    return value if value == value else None


def _four(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
