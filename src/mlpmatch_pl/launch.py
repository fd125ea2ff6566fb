"""From a configuration to a finished run. The only caller of hydra.utils.instantiate.

The order is the promise: everything that can be refused is refused first, then the run folder is written.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf

import mlpmatch_pl
from mlpmatch_pl.callbacks.progress import DataWait, duration
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.data.sources import SegmentationData
from mlpmatch_pl.errors import UserError
from mlpmatch_pl.loggers import build_loggers, finish_wandb
from mlpmatch_pl.methods import Method, resolve_method
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.run_folder import check_checkpoint, describe_split, find_checkpoint, write_run_folder
from mlpmatch_pl.segmentor.weights import load_published
from mlpmatch_pl.summary import class_table
from mlpmatch_pl.trainer import build_trainer, images_per_update, uses_sync_batchnorm

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Build everything, train, evaluate the best checkpoint, write the results. See `mlpmatch_pl.train.train`."""
    quiet()
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    output_dir = Path(config["output_dir"]).resolve()
    place = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    first = int(place) == 0  # the others are started by the first, once it has checked all
    checkpoint = find_checkpoint(config["resume"], output_dir) if first or config["resume"] else None
    if not isinstance(config["seed"], int):
        raise UserError(f"expected seed as a whole number, but got {config['seed']!r}")
    seed_everything(config["seed"], workers=True, verbose=False)
    method = resolve_method(config["method"])
    datamodule = build_datamodule(config, method)
    trainer = build_trainer(config, output_dir, datamodule, _callbacks(config["callbacks"]))
    _refuse_sweep_over_processes(trainer)
    module = build_module(config, method, datamodule, trainer)
    start_step = check_checkpoint(checkpoint, module) if checkpoint else 0
    if first:
        datamodule.prepare_data()
    exit_code = 1
    try:
        trainer.loggers = build_loggers(config, output_dir, datamodule.data.labeled)
        if trainer.is_global_zero:
            write_run_folder(cfg, output_dir, datamodule.data)
        _describe(module, datamodule, trainer, output_dir)
        _describe_learning_rate(config["schedule"], module, images_per_update(datamodule, trainer), checkpoint)
        metrics = _train_and_test(trainer, module, datamodule, checkpoint, start_step)
        if trainer.is_global_zero:
            (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
            log.info("results in %s", output_dir)
        exit_code = 0
        return metrics
    finally:
        finish_wandb(exit_code)


def build_data(dataset: dict[str, Any]) -> SegmentationData:
    """Build the data set that a configuration describes."""
    data: SegmentationData = instantiate(dataset, _convert_="all")
    return data


def build_datamodule(config: dict[str, Any], method: Method) -> SemiSupervisedDataModule:
    """Build the data module with the views that the method needs."""
    return SemiSupervisedDataModule(
        build_data(config["dataset"]),
        **config["loader"],
        num_strong=len(method.strong_weights),
        partner=method.partner,
        cutmix=method.cutmix,
        seed=config["seed"],
    )


def build_module(
    config: dict[str, Any], method: Method, datamodule: SemiSupervisedDataModule, trainer: Trainer
) -> MLPMatch:
    """Build the module with the learning rate scaled to the images in an optimizer step."""
    backbone, schedule, data = dict(config["backbone"]), config["schedule"], datamodule.data
    labeled, unlabeled = datamodule.batch_size, datamodule.unlabeled_batch_size
    synchronized = trainer.world_size if uses_sync_batchnorm(config["trainer"]) else 1
    method.check_batch(labeled if method.uses_unlabeled else labeled + unlabeled, unlabeled, synchronized)
    lr = schedule["lr"] * images_per_update(datamodule, trainer) / schedule["reference_images"]
    module = MLPMatch(
        len(data.class_names),
        method=config["method"],
        backbone=backbone.pop("name"),
        in_chans=data.in_chans,
        **backbone,
        **config["objective"],
        ignore_index=data.ignore_index,
        lr=lr,
        **{key: schedule[key] for key in ("lr_multi", "momentum", "weight_decay", "power")},
        class_names=list(data.class_names),
        palette=[list(color) for color in data.colors],
        bit_depth=data.bit_depth,
        absent=config["evaluation"]["absent"],
        channels_last=config["trainer"]["channels_last"],
        seed=config["seed"],
    )
    if config["init_weights"]:
        load_published(module.segmentor, config["init_weights"])
    return module


def _refuse_sweep_over_processes(trainer: Trainer) -> None:
    sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep and trainer.world_size > 1:
        raise UserError(
            f"expected one device a job in a sweep, but got {trainer.world_size} processes; leave out -m, or start one "
            "command a job"
        )


def _callbacks(config: dict[str, Any]) -> list[Callback]:
    callbacks: list[Callback] = []
    for node in config.values():
        if node is not None:
            built = instantiate(node, _convert_="all")
            callbacks += built if isinstance(built, list) else [built]
    return callbacks


def _describe_learning_rate(schedule: dict[str, Any], module: MLPMatch, images: int, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        log.info("going on from %s, with its learning rate and schedule", checkpoint)
        return
    log.info(
        "learning rate %.4g for %d images in an optimizer step (%g for %d); decoder x %g",
        module.hparams["lr"], images, schedule["lr"], schedule["reference_images"], schedule["lr_multi"],
    )  # fmt: skip


def _describe(module: MLPMatch, datamodule: SemiSupervisedDataModule, trainer: Trainer, output_dir: Path) -> None:
    data = datamodule.data
    log.info(
        "%s: %d labeled images (%s, sha256 %s), %d unlabeled, %d validation, %d test; %d classes",
        module.method.name, len(data.labeled.names), data.labeled.label, data.labeled.sha256[:8], len(data.unlabeled),
        len(data.val), len(data.test or ()), len(data.class_names),
    )  # fmt: skip
    for note in data.notes:
        log.warning("note: %s", note)
    parameters = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    log.info(
        "%s, %.1f million parameters; %d epochs of %d steps; run folder %s",
        module.hparams["backbone"], parameters, trainer.max_epochs, datamodule.steps_per_epoch(trainer.world_size),
        output_dir,
    )  # fmt: skip


def _train_and_test(
    trainer: Trainer, module: MLPMatch, datamodule: SemiSupervisedDataModule, checkpoint: Path | None, start_step: int
) -> dict[str, Any]:
    """Train, evaluate the best checkpoint, print the table, and gather what metrics.json holds."""
    started = time.monotonic()
    trainer.fit(module, datamodule=datamodule, ckpt_path=None if checkpoint is None else str(checkpoint))
    seconds, steps = time.monotonic() - started, trainer.global_step - start_step
    if not steps:
        raise UserError(
            f"expected epochs left to train, but {checkpoint} has finished all {trainer.max_epochs}; "
            "raise schedule.epochs"
        )
    last = _floats(trainer.callback_metrics)
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
        "method": module.method.name,
        "seed": module.hparams["seed"],
        "labeled": describe_split(datamodule.data.labeled),
        "unlabeled": len(datamodule.data.unlabeled),
        "steps": trainer.global_step,
        "best": {"val/miou": None if best_val is None else float(best_val), "checkpoint": best_path},
        "last": last,
        "test": test,
        "evaluated_on": part,
        "seconds": round(seconds, 1),  # since this start, validation included
        "images_per_second": round(steps * images_per_update(datamodule, trainer) / max(seconds, 1e-9), 2),
        "data_wait": round(next(c.share for c in trainer.callbacks if isinstance(c, DataWait)), 4),  # type: ignore[attr-defined]
        "device": _device(trainer),
        "versions": {
            "mlpmatch_pl": mlpmatch_pl.__version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
    }


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{trainer.world_size} x {name}"


def _floats(metrics: Any) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items()}


def quiet() -> None:
    """Keep the log to what this package says; warnings of substance still come through."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        logging.getLogger("mlpmatch_pl").setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",  # the number is chosen by measurement or by the user
        r".*The number of training batches .* is smaller than the logging interval.*",
        r".*LeafSpec.*",  # Lightning 2.6 with torch 2.14
        r".*recommended to use `self.log\(.*sync_dist=True.*",  # metrics come from one matrix, summed over the ranks
        r".*your dataloader is not resumable.*",  # it is: the data module keeps its place in both streams
        r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
    ):
        warnings.filterwarnings("ignore", message=message)
