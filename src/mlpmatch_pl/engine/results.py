"""Train, test the best checkpoint, and collect the content of metrics.json."""

from __future__ import annotations

import logging
import platform
import time
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
from lightning.pytorch import Trainer

import mlpmatch_pl
from mlpmatch_pl.callbacks.checkpoints import Resume
from mlpmatch_pl.callbacks.progress import DataWait, ProcessorTime, duration
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.engine.resume import Start
from mlpmatch_pl.engine.run_folder import describe_split
from mlpmatch_pl.engine.trainer import images_per_update
from mlpmatch_pl.evaluation.table import metrics_table
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.checkpoint import is_whole, read_checkpoint

log = logging.getLogger(__name__)
Kind = TypeVar("Kind")


def train_and_test(
    trainer: Trainer, module: MLPMatch, datamodule: SemiSupervisedDataModule, start: Start
) -> dict[str, Any]:
    """Train, test the best checkpoint, log the table of classes, and return the results.

    If there is no best checkpoint, or it is damaged, the last weights are tested; ``tested`` in the results says which.
    """
    started = time.monotonic()
    checkpoint = None if start.checkpoint is None else str(start.checkpoint)
    trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint)
    seconds = time.monotonic() - started
    first_step = _callback(trainer, Resume).first_step
    steps = 0 if first_step is None else trainer.global_step - first_step
    last = _floats(trainer.callback_metrics) if steps else dict(start.metrics)
    best_path = _whole_best(trainer)
    best_val = getattr(trainer.checkpoint_callback, "best_model_score", None)
    tested = "last weights" if best_path is None else "best checkpoint"
    costs = _costs(trainer, datamodule, seconds, steps)  # before the test, which loads the callbacks of its checkpoint
    trainer.test(module, datamodule=datamodule, ckpt_path=best_path, verbose=False)
    test = _floats(trainer.callback_metrics)
    part = "test" if datamodule.data.test else "validation"
    log.info("%s", metrics_table(module.last_counts_CC, module.class_names, module.absent, f"{tested}, {part}"))
    log.info(
        "%s mIoU %.4f, accuracy %.4f (%s); best validation mIoU %s; trained %s",
        part, *(test.get(f"test/{key}", float("nan")) for key in ("miou", "acc")), tested,
        "none" if best_val is None else f"{float(best_val):.4f}", duration(seconds),
    )  # fmt: skip
    return {
        **_identity(module, datamodule),
        "steps": trainer.global_step,
        "best": {
            "val/miou": None if best_val is None else float(best_val),
            "step": None if best_path is None else read_checkpoint(Path(best_path))["global_step"],
            "checkpoint": best_path,
        },
        "last": last,
        "test": test,
        "tested": tested,
        "evaluated_on": part,
        **costs,
    }


def _whole_best(trainer: Trainer) -> str | None:
    """Return the best checkpoint if there is one and it is undamaged, the same on all processes."""
    path = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
    whole = path is not None and bool(trainer.strategy.broadcast(is_whole(Path(path))))
    if path is None or whole:
        return path
    log.warning("%s is damaged; testing the last weights instead", path)
    return None


def _identity(module: MLPMatch, datamodule: SemiSupervisedDataModule) -> dict[str, Any]:
    return {
        "method": module.method.name,
        "seed": module.hparams["seed"],
        "labeled": describe_split(datamodule.data.labeled),
        "unlabeled": len(datamodule.data.unlabeled),
    }


def _costs(trainer: Trainer, datamodule: SemiSupervisedDataModule, seconds: float, steps: int) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 1),  # since this start, validation included
        "processor_seconds": round(_callback(trainer, ProcessorTime).seconds, 1),  # of all starts, without validation
        "images_per_second": round(steps * images_per_update(datamodule, trainer) / max(seconds, 1e-9), 2),
        "skipped": datamodule.skipped.report(),  # since this start
        "data_wait": round(_callback(trainer, DataWait).share, 4),
        "device": describe_device(trainer),
        "versions": {
            "mlpmatch_pl": mlpmatch_pl.__version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
    }


def _callback(trainer: Trainer, kind: type[Kind]) -> Kind:
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))  # type: ignore[attr-defined]


def describe_device(trainer: Trainer) -> str:
    """Describe the devices of a trainer."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{trainer.world_size} x {name}"


def _floats(metrics: Any) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items()}
