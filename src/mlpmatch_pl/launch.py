"""From a configuration to a finished run. The only caller of hydra.utils.instantiate.

The order is the promise: everything that can be refused is refused first, then the run folder is written.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf

from mlpmatch_pl.callbacks.one_run import OneRun
from mlpmatch_pl.callbacks.resuming import Resuming
from mlpmatch_pl.callbacks.signals import Stopped, StopSignals
from mlpmatch_pl.config_types import checked
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.data.sources import SegmentationData
from mlpmatch_pl.durable import full_disk_is_user_error, remove_unfinished, write_durably
from mlpmatch_pl.errors import UserError
from mlpmatch_pl.faults import explained
from mlpmatch_pl.loggers import build_loggers, finish_wandb
from mlpmatch_pl.methods import Method, resolve_method
from mlpmatch_pl.module import MLPMatch, check_architecture
from mlpmatch_pl.processes import Launch, loss_of_a_process_explained
from mlpmatch_pl.resume import Start, check_unfinished, find_start, move_place
from mlpmatch_pl.run_folder import check_splits, describe_splits, write_run_folder
from mlpmatch_pl.segmentor.weights import load_published
from mlpmatch_pl.trainer import (
    MODULE_OPTIONS,
    build_trainer,
    describe_processes,
    images_per_update,
    uses_sync_batchnorm,
)
from mlpmatch_pl.training import train_and_test

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Built:
    """What a configuration describes, checked, with nothing written yet."""

    config: dict[str, Any]
    output_dir: Path
    datamodule: SemiSupervisedDataModule
    trainer: Trainer
    module: MLPMatch
    start: Start


def run(cfg: DictConfig) -> dict[str, Any]:
    """Build everything, train, evaluate the best checkpoint, write the results. See `mlpmatch_pl.train.train`."""
    quiet()
    built = _build(read_config(cfg))
    exit_code = 1
    try:
        with (
            _stopped_by_signal(built),
            full_disk_is_user_error(built.output_dir),
            loss_of_a_process_explained(built.trainer.world_size),
            explained(built.datamodule),
        ):
            _open(built, cfg)
            metrics = train_and_test(built.trainer, built.module, built.datamodule, built.start)
            if built.trainer.is_global_zero:
                write_durably(built.output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
                log.info("results in %s", built.output_dir)
        exit_code = 0
        return metrics
    finally:
        finish_wandb(exit_code)


def _build(config: dict[str, Any]) -> _Built:
    """Build everything, and refuse whatever can be refused."""
    output_dir = Path(config["output_dir"]).resolve()
    launch = Launch.of(os.environ)
    start = find_start(config["resume"], output_dir, launch.first)
    seed_everything(config["seed"], workers=True, verbose=False)
    method = resolve_method(config["method"])
    datamodule = build_datamodule(config, method)
    one_run = OneRun(_facts(output_dir, start, datamodule.data))
    callbacks = [*_callbacks(config["callbacks"]), one_run, Resuming(), StopSignals()]
    trainer = build_trainer(config, output_dir, datamodule, callbacks)
    _refuse_sweep_over_processes(trainer)
    module = build_module(config, method, datamodule, trainer)
    built = _Built(config, output_dir, datamodule, trainer, module, start)
    if start.checkpoint is not None:
        _prepare_resume(built, start.checkpoint)
    if launch.first_here:  # it checks all; without torchrun and srun, the others are started after that
        datamodule.prepare_data()
    return built


def _prepare_resume(built: _Built, checkpoint: Path) -> None:
    """Refuse a checkpoint that the training cannot go on from, and fit its place to the present length of an epoch."""
    trainer = built.trainer
    check_architecture(built.start.hparams, built.module.hparams)
    check_splits(checkpoint, built.output_dir, built.datamodule.data)
    check_unfinished(built.start, built.output_dir, trainer.max_epochs or 0)
    if trainer.limit_train_batches == 1.0:
        batches, accumulate = built.datamodule.steps_per_epoch(trainer.world_size), trainer.accumulate_grad_batches
        move = partial(move_place, batches=batches, accumulate=accumulate)
        trainer.strategy.checkpoint_io.adapt[str(checkpoint)] = move  # type: ignore[attr-defined]


def _open(built: _Built, cfg: DictConfig) -> None:
    """Open the loggers, write the run folder, and say what will be trained."""
    config, trainer, start, data = built.config, built.trainer, built.start, built.datamodule.data
    trainer.loggers = build_loggers(config, built.output_dir, data.labeled, start.step)
    metrics_csv: Any = trainer.loggers[0]
    metrics_csv.go_on(start.step, {**start.metrics, "epoch": start.epoch}, config["trainer"]["log_every_n_steps"])
    if trainer.is_global_zero:
        remove_unfinished(built.output_dir)
        remove_unfinished(built.output_dir / "checkpoints")
        write_run_folder(cfg, built.output_dir, data)
    _describe(built)
    _describe_learning_rate(config["schedule"], built.module, images_per_update(built.datamodule, trainer), start)


@contextmanager
def _stopped_by_signal(built: _Built) -> Iterator[None]:
    """Say how to go on, and let the first process's exit code be the run's."""
    try:
        yield
    except Stopped as stopped:
        log.info(
            "%s: stopped after step %d; go on with the same command and hydra.run.dir=%s resume=auto",
            stopped.name, built.trainer.global_step, built.output_dir,
        )  # fmt: skip
        if built.trainer.is_global_zero:
            raise
        raise SystemExit(0) from stopped


def read_config(cfg: DictConfig) -> dict[str, Any]:
    """Return a training's configuration as plain data, with its types checked.

    Raises:
        UserError: If a value is of another type than what reads it wants, or out of the range of a seed.
    """
    config = checked(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))  # type: ignore[arg-type]
    if not 0 <= config["seed"] < 2**32:  # numpy's range
        raise UserError(f"expected seed as a whole number from 0 to {2**32 - 1}, but got {config['seed']}")
    return config


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
    if schedule["reference_images"] < 1:
        raise UserError(f"expected schedule.reference_images of at least 1, but got {schedule['reference_images']}")
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
        **{option: config["trainer"][option] for option in MODULE_OPTIONS},
        seed=config["seed"],
    )
    if config["init_weights"]:
        load_published(module.segmentor, config["init_weights"])
    return module


def _facts(output_dir: Path, start: Start, data: SegmentationData) -> dict[str, str]:
    """Return what all processes must agree in."""
    images = {f"{name} images": split["sha256"] for name, split in describe_splits(data).items()}
    return {"run folder": str(output_dir), "checkpoint to go on from": str(start.checkpoint), **images}


def _refuse_sweep_over_processes(trainer: Trainer) -> None:
    sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep and trainer.world_size > 1:
        raise UserError(
            f"expected one device a job in a sweep, but got {trainer.world_size} processes; set trainer.devices=1 and "
            "run jobs beside each other (hydra/launcher=submitit_slurm or joblib), or start one command a job, no -m"
        )


def _callbacks(config: dict[str, Any]) -> list[Callback]:
    callbacks: list[Callback] = []
    for node in config.values():
        if node is not None:
            built = instantiate(node, _convert_="all")
            callbacks += built if isinstance(built, list) else [built]
    return callbacks


def _describe_learning_rate(schedule: dict[str, Any], module: MLPMatch, images: int, start: Start) -> None:
    if start.checkpoint is not None:
        log.info(
            "going on from %s: epoch %d, %d %% of it done; its learning rate was %.4g, now the configuration's holds",
            start.checkpoint, start.epoch + 1, round(100 * start.fraction), start.hparams["lr"],
        )  # fmt: skip
    log.info(
        "learning rate %.4g for %d images in an optimizer step (%g for %d); decoder x %g",
        module.hparams["lr"], images, schedule["lr"], schedule["reference_images"], schedule["lr_multi"],
    )  # fmt: skip


def _describe(built: _Built) -> None:
    module, datamodule, trainer, data = built.module, built.datamodule, built.trainer, built.datamodule.data
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
        built.output_dir,
    )  # fmt: skip
    if trainer.world_size > 1:
        log.info("%s", describe_processes(trainer.world_size, uses_sync_batchnorm(built.config["trainer"])))


def quiet() -> None:
    """Keep the log to what this package says; warnings of substance still come through."""
    for chatty in ("lightning.pytorch", "lightning.fabric.utilities.distributed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if not Launch.of(os.environ).first:
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
