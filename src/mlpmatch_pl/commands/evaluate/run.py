"""From a checkpoint and data to scores: evaluate, print, write."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import mlpmatch_pl
from mlpmatch_pl.callbacks.progress import duration
from mlpmatch_pl.commands.evaluate.dataset import EvaluatedPart, open_part, require_fit
from mlpmatch_pl.commands.evaluate.loop import Counts, Evaluator
from mlpmatch_pl.commands.evaluate.options import Options
from mlpmatch_pl.commands.evaluate.outputs import FILES, WORST, draw_worst, worst_images, write_tables
from mlpmatch_pl.data.dataset import EvalDataset
from mlpmatch_pl.engine.logging import quiet
from mlpmatch_pl.engine.runtime_errors import is_out_of_memory
from mlpmatch_pl.evaluation import Scores
from mlpmatch_pl.evaluation.boundary import boundary_iou
from mlpmatch_pl.evaluation.confusion import Absent, class_mean
from mlpmatch_pl.evaluation.table import metrics_table
from mlpmatch_pl.predictor import load
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import OTHER_OUTPUT, refuse_overwrite
from mlpmatch_pl.utils.validation import read_options

log = logging.getLogger(__name__)
PART_NAMES = {"val": "validation", "test": "test"}
FOR_TRAINING = ("loader", "objective")  # set by the files in conf/dataset


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate what a configuration names. See `mlpmatch_pl.evaluate.evaluate`."""
    quiet()
    options = read_options(Options, _without_training(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)))
    output, checkpoint, evaluator = options.output.resolve(), options.checkpoint, options.evaluator
    if not options.overwrite:
        refuse_overwrite((output / name for name in FILES), OTHER_OUTPUT)
    predictor = load(checkpoint, options.device)
    module = predictor.module
    absent = options.evaluation.absent or module.absent
    part = open_part(checkpoint, options.dataset, options.part)
    require_fit(module, part.data, checkpoint)
    _describe(part)
    images = EvalDataset(part.source, len(part.data.class_names), part.data.ignore_index)
    started = time.monotonic()
    counts = _evaluate(evaluator, predictor.segmentor, images)
    seconds = time.monotonic() - started
    worst = worst_images(counts, options.worst)
    result = {
        "checkpoint": str(checkpoint.resolve()),
        "part": part.part,
        **part.split,
        "same_as_run": part.same_as_run,
        "options": {"inference": asdict(evaluator.inference), "absent": absent, "boundary": evaluator.boundary},
        **_scores(counts, part.data.class_names, absent),
        "worst": [{"image": images.source.name(index), "miou": float(counts.miou_N[index])} for index in worst],
        "seconds": round(seconds, 2),
        "images_per_second": round(len(images) / max(seconds, 1e-9), 2),
        "device": str(module.device),
        "versions": {"mlpmatch_pl": mlpmatch_pl.__version__, "torch": torch.__version__},
    }
    _print(result, counts, absent, f"{checkpoint}, {PART_NAMES[part.part]}")
    write_tables(output, result, counts, [images.source.name(index) for index in range(len(images))])
    if worst:
        draw_worst(predictor, evaluator, images, part.data, worst, counts).save(output / WORST)
    log.info("results in %s", output)
    return result


def _without_training(values: Any) -> dict[str, Any]:
    """Leave out what the configuration of a data set holds for trainings with it."""
    chosen = isinstance(values.get("dataset"), dict) and "_target_" in values["dataset"]
    return {key: value for key, value in values.items() if not (chosen and key in FOR_TRAINING)}


def _describe(part: EvaluatedPart) -> None:
    log.info("%d %s images, sha256 %s", part.split["count"], PART_NAMES[part.part], part.split["sha256"][:8])
    for note in part.data.notes:
        log.warning("note: %s", note)
    if part.same_as_run is False:
        log.warning(
            "note: these are not the images that the run had for %s (splits.json): some may have been trained on",
            PART_NAMES[part.part],
        )


def _evaluate(evaluator: Evaluator, segmentor: nn.Module, images: EvalDataset) -> Counts:
    console = Console(file=sys.stderr)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("evaluating", total=len(images))
        try:
            return evaluator(segmentor, images, lambda count: progress.advance(task, count))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                "expected images that the memory is large enough for, but it ran out; set batch_size=1, or "
                "inference.mode=slide and inference.window, lower inference.scales, or set device=cpu"
            ) from error


def _scores(counts: Counts, class_names: Sequence[str], absent: Absent) -> dict[str, Any]:
    """Gather the scores over all and by class; None for what is not defined."""
    scores = Scores.of(counts.confusion_CC, absent)
    overall = {
        "miou": scores.miou,
        "acc": scores.accuracy,
        "dice": scores.dice,
        "fw_iou": scores.fw_iou,
        "kappa": scores.kappa,
    }
    columns: dict[str, Tensor] = {
        "iou": scores.iou_C,
        "dice": scores.dice_C,
        "recall": scores.recall_C,
        "support": scores.support_C,
    }
    if counts.boundary_3C is not None:
        columns["boundary_iou"] = boundary_iou(counts.boundary_3C)
        overall["boundary_iou"] = class_mean(columns["boundary_iou"], absent)
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return {
        "metrics": {key: _defined(value) for key, value in overall.items()},
        "classes": {
            name: dict(zip(columns, map(_defined, row), strict=True))
            for name, row in zip(class_names, rows, strict=True)
        },
    }


def _print(result: dict[str, Any], counts: Counts, absent: Absent, title: str) -> None:
    boundary_C = None if counts.boundary_3C is None else boundary_iou(counts.boundary_3C)
    log.info("%s", metrics_table(counts.confusion_CC, list(result["classes"]), absent, title, boundary_C))
    metrics = result["metrics"]
    names = {"fw_iou": "frequency-weighted IoU", "acc": "accuracy", "kappa": "kappa", "boundary_iou": "boundary IoU"}
    others = ", ".join(f"{name} {_four(metrics[key])}" for key, name in names.items() if key in metrics)
    log.info("mIoU %s (%s); %s", _four(metrics["miou"]), _absent_rule(result["classes"], absent), others)
    log.info(
        "%d images in %s, %.1f a second", result["count"], duration(result["seconds"]), result["images_per_second"]
    )


def _absent_rule(classes: dict[str, dict[str, Any]], absent: Absent) -> str:
    missing = sum(row["iou"] is None for row in classes.values())
    if not missing:
        return f"mean of all {len(classes)} classes"
    if absent == "zero":
        return f"mean of all {len(classes)} classes, zero for {missing} that are in no truth or prediction"
    return f"mean of {len(classes) - missing} classes, without {missing} that are in no truth or prediction"


def _defined(value: float) -> float | None:
    return value if value == value else None


def _four(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
