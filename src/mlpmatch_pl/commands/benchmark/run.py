"""Measure a training, and say what its parts take and what to change first."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig

import mlpmatch_pl
from mlpmatch_pl.commands.benchmark.advice import Hardware, Loading, first_to_fix, sentence, shares
from mlpmatch_pl.commands.benchmark.clock import PARTS
from mlpmatch_pl.commands.benchmark.figures import (
    Schedule,
    Spread,
    reaching_accumulation,
    spread_of_parts,
    whole_schedule,
)
from mlpmatch_pl.commands.benchmark.fitting import Training, second_size
from mlpmatch_pl.commands.benchmark.loading import predicted_wait, present_workers, time_loading, workers_needed
from mlpmatch_pl.commands.benchmark.memory import device_bytes
from mlpmatch_pl.commands.benchmark.report import show
from mlpmatch_pl.engine.build import build_datamodule, build_module, read_config
from mlpmatch_pl.engine.logging import quiet
from mlpmatch_pl.engine.results import describe_device
from mlpmatch_pl.engine.trainer import images_per_update
from mlpmatch_pl.methods.method import resolve_method
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.cpu import usable_cores
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import OTHER_FOLDER, refuse_overwrite
from mlpmatch_pl.utils.validation import read_options

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """The group benchmark of the configuration.

    Attributes:
        steps: Optimizer steps that are measured.
        warmup: Optimizer steps before them, which do not count.
        validation: Validation batches that are measured.
        loading: Batches that this process loads alone.

    Raises:
        UserError: If one is too small.
    """

    steps: int
    warmup: int
    validation: int
    loading: int

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            least = 0 if key == "warmup" else 1
            if value < least:
                raise UserError(f"expected benchmark.{key} as a whole number from {least} on, but got {value}")


def run(cfg: DictConfig) -> dict[str, Any]:
    """Measure the training of a configuration. See `mlpmatch_pl.benchmark.benchmark`."""
    quiet()
    config = read_config(cfg, "benchmark")
    options = read_options(Options, config["benchmark"], "benchmark")
    target = Path(config["output_dir"]).resolve() / "benchmark.json"
    refuse_overwrite([target], OTHER_FOLDER)
    seed_everything(config["seed"], workers=True, verbose=False)
    method = resolve_method(config["method"])
    datamodule = build_datamodule(config, method)
    training = Training(config, target.parent, datamodule)
    trainer = training.trainer()
    module = build_module(config, method, datamodule, trainer)
    datamodule.prepare_data()
    accumulated = trainer.accumulate_grad_batches
    log.info("measuring %d steps of %s on %s", options.steps, method.name, describe_device(trainer))
    measured = training.fit(module, (options.warmup + options.steps) * accumulated)
    if measured is None:
        raise training.refuse_batch(module)
    clock, used = measured
    parts = spread_of_parts(clock.seconds(options.warmup * accumulated))
    validation_batch = training.validate(module, options.validation)
    loading, report_of_loading = _loading(training, parts, options.loading)
    schedule = _schedule(training, trainer, parts["batch"].mean, loading, parts["data wait"].mean, validation_batch)
    report = {
        "method": method.name,
        "device": describe_device(trainer),
        "precision": str(trainer.precision),
        "batch": _batch(training, trainer, module),
        "parts": {name: asdict(part) for name, part in parts.items()},
        "images_per_second": datamodule.images_per_step / parts["batch"].mean,
        "memory": _memory(training, trainer, module, used),
        "loading": report_of_loading,
        "validation": {"images": len(datamodule.data.val), "seconds_a_batch": validation_batch},
        "schedule": schedule.as_dict(),
        "learning_rate": _learning_rate(config["schedule"], module, trainer, training),
        "advice": _advice(config, trainer, parts, loading, schedule),
        "versions": {"mlpmatch_pl": mlpmatch_pl.__version__, "torch": torch.__version__},
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report)
    log.info("all figures in %s", target)
    return report


def _loading(training: Training, parts: dict[str, Spread], batches: int) -> tuple[Loading, dict[str, Any]]:
    """Compare what a process loads with what the step takes."""
    step = sum(parts[name].mean for name in PARTS[1:])
    seconds, present = time_loading(training.datamodule, batches), present_workers(training.datamodule)
    predicted = predicted_wait(seconds, present, step)
    needed = workers_needed(seconds, step)
    # Batches that workers had ready hide in a short measurement that they fall behind in a long one.
    wait = max(predicted, parts["data wait"].mean)
    report = {
        "seconds_a_batch": seconds, "workers": present, "predicted_wait": predicted, "wait": wait,
        "workers_needed": needed, "cores": usable_cores(),
    }  # fmt: skip
    return Loading(wait, sum(present.values()), needed, usable_cores()), report


def _schedule(
    training: Training, trainer: Trainer, batch: float, loading: Loading, waited: float, validation_batch: float
) -> Schedule:
    datamodule = training.datamodule
    return whole_schedule(
        trainer.max_epochs or 1,
        datamodule.steps_per_epoch(),
        trainer.check_val_every_n_epoch or 1,
        batch - waited + loading.wait,
        math.ceil(len(datamodule.data.val) / datamodule.eval_batch_size),
        validation_batch,
    )


def _batch(training: Training, trainer: Trainer, module: MLPMatch) -> dict[str, Any]:
    datamodule, unlabeled = training.datamodule, training.datamodule.unlabeled_batch_size
    semi = module.method.uses_unlabeled
    return {
        "labeled": datamodule.batch_size if semi else datamodule.images_per_step,
        "unlabeled": unlabeled if semi else 0,
        "crop_size": datamodule.crop_size,
        "accumulated": trainer.accumulate_grad_batches,
    }


def _memory(training: Training, trainer: Trainer, module: MLPMatch, used: int) -> dict[str, Any]:
    device, batch = trainer.strategy.root_device, training.datamodule.batch_size
    if device.type != "cuda":
        return {"peak_bytes": used}
    total, line = device_bytes(device), training.memory_line(module, batch, used)
    return {
        "peak_bytes": used, "device_bytes": total, "share": used / total, "second_batch": second_size(batch),
        "second_fits": line is not None, "largest_batch": None if line is None else line.largest_batch(total),
    }  # fmt: skip


def _learning_rate(schedule: dict[str, Any], module: MLPMatch, trainer: Trainer, training: Training) -> dict[str, Any]:
    images = images_per_update(training.datamodule, trainer)
    reference = schedule["reference_images"]
    return {
        "scaled": module.hparams["lr"],
        "images": images,
        "configured": schedule["lr"],
        "reference_images": reference,
        "reaching_accumulation": reaching_accumulation(training.datamodule.images_per_step, reference),
    }


def _advice(
    config: dict[str, Any], trainer: Trainer, parts: dict[str, Spread], loading: Loading, schedule: Schedule
) -> str:
    part_shares = shares({name: parts[name].mean for name in PARTS}, loading, schedule)
    options = config["trainer"]
    hardware = Hardware(
        trainer.strategy.root_device.type,
        str(trainer.precision),
        channels_last=bool(options["channels_last"]),
        compile_blocks=bool(options["compile_blocks"]),
        fused_optimizer=bool(options["fused_optimizer"]),
        clipping=bool(options["gradient_clip_val"]),
    )
    return sentence(first_to_fix(part_shares), part_shares, loading, schedule, hardware)
