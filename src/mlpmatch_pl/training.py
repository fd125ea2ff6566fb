"""Train, evaluate the best checkpoint, and gather what metrics.json holds."""

from __future__ import annotations

import logging
import platform
import time
from typing import Any, TypeVar

import lightning
import torch
from lightning.pytorch import Trainer

import mlpmatch_pl
from mlpmatch_pl.callbacks.progress import DataWait, duration
from mlpmatch_pl.callbacks.resuming import Resuming
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.resume import Start
from mlpmatch_pl.run_folder import describe_split
from mlpmatch_pl.summary import class_table
from mlpmatch_pl.trainer import images_per_update

log = logging.getLogger(__name__)
Kind = TypeVar("Kind")


def train_and_test(
    trainer: Trainer, module: MLPMatch, datamodule: SemiSupervisedDataModule, start: Start
) -> dict[str, Any]:
    """Train from where the checkpoint was written, test the best checkpoint, print the table, return the results."""
    started = time.monotonic()
    checkpoint = None if start.checkpoint is None else str(start.checkpoint)
    trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint)
    seconds = time.monotonic() - started
    first_step = _callback(trainer, Resuming).first_step
    steps = 0 if first_step is None else trainer.global_step - first_step
    last = _floats(trainer.callback_metrics) if steps else dict(start.metrics)
    best_path = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
    best_val = getattr(trainer.checkpoint_callback, "best_model_score", None)
    trainer.test(module, datamodule=datamodule, ckpt_path=best_path, verbose=False)
    test = _floats(trainer.callback_metrics)
    part = "test" if datamodule.data.test else "validation"
    log.info("%s", class_table(module.last_counts_CC, module.class_names, module.absent, f"best checkpoint, {part}"))
    log.info(
        "%s mIoU %.4f (best checkpoint); best validation mIoU %s; trained %s",
        part, test.get("test/miou", float("nan")), "none" if best_val is None else f"{float(best_val):.4f}",
        duration(seconds),
    )  # fmt: skip
    return {
        **_identity(module, datamodule),
        "steps": trainer.global_step,
        "best": {"val/miou": None if best_val is None else float(best_val), "checkpoint": best_path},
        "last": last,
        "test": test,
        "evaluated_on": part,
        **_costs(trainer, datamodule, seconds, steps),
    }


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
    """Name what a trainer computes on."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{trainer.world_size} x {name}"


def _floats(metrics: Any) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items()}
