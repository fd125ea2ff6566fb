"""Run some steps of a training and predict how long all of it will take."""

from __future__ import annotations

import gc
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig

import mlpmatch_pl
from mlpmatch_pl.commands.benchmark.summary import advise, summarize
from mlpmatch_pl.commands.benchmark.timing import (
    largest_batch,
    predicted_wait,
    time_loading,
    workers_needed,
)
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.engine.build import build_datamodule, build_module, read_config
from mlpmatch_pl.engine.logging import quiet
from mlpmatch_pl.engine.results import describe_device
from mlpmatch_pl.engine.resume import Start
from mlpmatch_pl.engine.short_training import ShortTraining, set_steps
from mlpmatch_pl.methods.method import resolve_method
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.cpu import usable_cores
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import OTHER_FOLDER, refuse_overwrite
from mlpmatch_pl.utils.progress import megabytes
from mlpmatch_pl.utils.validation import read_options

log = logging.getLogger(__name__)

_MEMORY_STEPS = 2  # optimizer steps until the peak memory: the first one creates the momentum
_SMALLEST_BATCH = 2  # BatchNorm and CutMix need two images


@dataclass(frozen=True)
class Options:
    """The group ``benchmark`` of the configuration.

    Attributes:
        steps: Optimizer steps that are timed.
        warmup: Optimizer steps before them.
        validation: Validation batches that are timed.
        loading: Batches that are loaded in one process.

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
                raise UserError(f"expected benchmark.{key} to be an integer >= {least}, but got {value}")


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
    config = set_steps(config, target.parent, datamodule, Start())
    training = MeasuredTraining(config, target.parent, datamodule)
    trainer = training.trainer()
    device, accumulated = describe_device(trainer), trainer.accumulate_grad_batches
    module = build_module(config, method, datamodule, trainer)
    datamodule.prepare_data()
    log.info("measuring %d steps of %s on %s", options.steps, method.name, device)
    timer = training.fit(module, (options.warmup + options.steps) * accumulated)
    if timer is None:
        raise training.refuse_batch(module, trainer.strategy.root_device)
    measured_wait, step = timer.seconds(options.warmup * accumulated)
    loading = _time_loading(datamodule, options.loading, step)
    # In a short measurement, batches that were loaded ahead hide that workers are too slow.
    wait = max(measured_wait, loading.pop("predicted_wait"))
    mean = step + wait
    if method.burn_in:
        burning_in = training.fit(module, (options.warmup + options.steps) * accumulated, burn_in=True)
        assert burning_in is not None  # smaller batches
        mean += method.burn_in * (sum(burning_in.seconds(options.warmup * accumulated)) - mean)
    report = {
        "method": method.name,
        "device": device,
        "precision": str(trainer.precision),
        "batch": {
            "labeled": datamodule.batch_sizes["labeled"],
            "unlabeled": datamodule.batch_sizes.get("unlabeled", 0),
            "crop_size": datamodule.crop_size,
        },
        "step_seconds": step,
        "data_wait_seconds": wait,
        "images_per_second": sum(datamodule.batch_sizes.values()) / (step + wait),
        "loading": loading,
        "memory": training.memory(module, timer.peak_bytes, trainer.strategy.root_device),
        "total": _predict_total(trainer, datamodule, mean, training.validate(module, options.validation)),
        "versions": {"mlpmatch_pl": mlpmatch_pl.__version__, "torch": torch.__version__},
    }
    report["advice"] = advise(report, config["trainer"])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for line in summarize(report):
        log.info("%s", line)
    log.info("wrote %s", target)
    return report


class MeasuredTraining(ShortTraining):
    """A short training whose memory is measured too."""

    @property
    def _memory_batches(self) -> int:
        return _MEMORY_STEPS * int(self.config["trainer"]["accumulate_grad_batches"])

    def memory(self, module: MLPMatch, peak: int, device: torch.device) -> dict[str, int | None]:
        """Return peak memory, memory of the device, and the largest batch size that fits; None where unknown."""
        batch = self.datamodule.batch_size
        if device.type != "cuda":
            return {"peak_bytes": peak, "device_bytes": None, "largest_batch": None}
        total = int(torch.cuda.get_device_properties(device).total_memory)
        other = batch // 2 if batch >= 2 * _SMALLEST_BATCH else 2 * batch
        gc.collect()  # frees the momentum of the first training
        with resized(self.datamodule, other):
            timer = self.fit(module, self._memory_batches)
        largest = None if timer is None else largest_batch((batch, peak), (other, timer.peak_bytes), total)
        return {"peak_bytes": peak, "device_bytes": total, "largest_batch": largest}

    def refuse_batch(self, module: MLPMatch, device: torch.device) -> UserError:
        """Build the error for a batch that does not fit into memory, with the batch size that does."""
        wanted, accumulated = self.datamodule.batch_size, self._memory_batches // _MEMORY_STEPS
        total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        message = (
            f"expected batches of loader.batch_size={wanted} to fit into "
            f"{'memory' if total is None else f'the {megabytes(total)} of {device}'}, but they do not"
        )
        fits = wanted // 2
        while fits >= _SMALLEST_BATCH:
            with resized(self.datamodule, fits):
                if self.fit(module, self._memory_batches) is not None:
                    batch = "" if self.datamodule.batch_per == "step" else f"loader.batch_size={fits} "
                    accumulate = math.ceil(wanted * accumulated / fits)
                    return UserError(f"{message}; use {batch}trainer.accumulate_grad_batches={accumulate}")
            fits //= 2
        return UserError(f"{message}, nor do batches of {_SMALLEST_BATCH}; use a smaller loader.crop_size or backbone")


@contextmanager
def resized(datamodule: SemiSupervisedDataModule, batch: int) -> Iterator[None]:
    """Change the labeled images in a batch, and the unlabeled ones in proportion."""
    labeled, unlabeled = datamodule.batch_size, datamodule.unlabeled_batch_size
    datamodule.batch_size = batch
    datamodule.unlabeled_batch_size = max(round(unlabeled * batch / labeled), min(unlabeled, _SMALLEST_BATCH))
    try:
        yield
    finally:
        datamodule.batch_size, datamodule.unlabeled_batch_size = labeled, unlabeled


def _time_loading(datamodule: SemiSupervisedDataModule, batches: int, step: float) -> dict[str, Any]:
    seconds = time_loading(datamodule, batches)
    workers = {name: loader.num_workers for name, loader in datamodule.train_dataloader().iterables.items()}
    return {
        "seconds_per_batch": seconds,
        "workers": workers,
        "workers_needed": workers_needed(seconds, step),
        "cores": usable_cores(),
        "predicted_wait": predicted_wait(seconds, workers, step),
    }


def _predict_total(
    trainer: Trainer, datamodule: SemiSupervisedDataModule, batch: float, validation_batch: float
) -> dict[str, Any]:
    """Predict the seconds of the whole training, without checkpoints and the test."""
    epochs, batches = trainer.max_epochs or 1, datamodule.steps_per_epoch()
    validations = epochs // (trainer.check_val_every_n_epoch or 1)
    validation = validations * math.ceil(len(datamodule.data.val) / datamodule.eval_batch_size) * validation_batch
    seconds = epochs * batches * batch + validation
    return {
        "epochs": epochs, "batches_per_epoch": batches, "validations": validations, "seconds": seconds,
        "validation_share": validation / seconds,
    }  # fmt: skip
