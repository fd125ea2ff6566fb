"""From a configuration to a finished run.

The order is the promise: everything that can be refused is refused first, then the run folder is written.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig

from mlpmatch_pl.callbacks.one_run import OneRun
from mlpmatch_pl.callbacks.stop_signals import StopOnSignal, Stopped
from mlpmatch_pl.data.base import SegmentationData
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.engine.build import build_callbacks, build_datamodule, build_module, read_config
from mlpmatch_pl.engine.loggers import CountedRows, build_loggers, finish_wandb
from mlpmatch_pl.engine.logging import describe_learning_rate, describe_training, quiet
from mlpmatch_pl.engine.place import move_place
from mlpmatch_pl.engine.results import train_and_test
from mlpmatch_pl.engine.resume import Start, check_classes, check_unfinished, find_start, make_last
from mlpmatch_pl.engine.run_folder import check_splits, describe_splits, write_run_folder
from mlpmatch_pl.engine.runtime_errors import translate_errors
from mlpmatch_pl.engine.trainer import build_trainer, images_per_update, uses_sync_batchnorm
from mlpmatch_pl.methods.method import resolve_method
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.distributed import Launch, loss_of_a_process_explained
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import atomic_write, full_disk_is_user_error, remove_unfinished, set_aside
from mlpmatch_pl.utils.hyperparameters import check_architecture
from mlpmatch_pl.utils.run_lock import run_lock

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
    config = read_config(cfg)
    first, folder = Launch.of(os.environ).first, Path(config["output_dir"]).resolve()
    with full_disk_is_user_error(folder), run_lock(folder) if first else nullcontext():
        return _run(_build(config), cfg)


def _run(built: _Built, cfg: DictConfig) -> dict[str, Any]:
    exit_code = 1
    try:
        with (
            _stopped_by_signal(built),
            loss_of_a_process_explained(built.trainer.world_size),
            translate_errors(built.datamodule),
        ):
            _open(built, cfg)
            metrics = train_and_test(built.trainer, built.module, built.datamodule, built.start)
            if built.trainer.is_global_zero:
                atomic_write(built.output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
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
    one_run = OneRun(_facts(output_dir, config["resume"], start, datamodule.data))
    callbacks = [*build_callbacks(config["callbacks"]), one_run, CountedRows(), StopOnSignal()]
    trainer = build_trainer(config, output_dir, datamodule, callbacks, start.length)
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
    check_classes(built.start, built.datamodule.data.class_names)
    check_splits(checkpoint, built.output_dir, built.datamodule.data)
    check_unfinished(built.start, built.output_dir, trainer.max_epochs or 0)
    if trainer.limit_train_batches == 1.0:
        batches, accumulate = built.datamodule.steps_per_epoch(trainer.world_size), trainer.accumulate_grad_batches
        move = partial(move_place, batches=batches, accumulate=accumulate)
        trainer.strategy.checkpoint_io.adapt[str(checkpoint)] = move  # type: ignore[attr-defined]


def _open(built: _Built, cfg: DictConfig) -> None:
    """Open the loggers, write the run folder, and say what will be trained."""
    config, trainer, start, data = built.config, built.trainer, built.start, built.datamodule.data
    if trainer.is_global_zero:
        remove_unfinished(built.output_dir)
        remove_unfinished(built.output_dir / "checkpoints")
        make_last(start, built.output_dir)  # before metrics.csv and metrics.json change with it
        set_aside(built.output_dir / "metrics.json")
    trainer.loggers = build_loggers(config, built.output_dir, data.labeled, start.step)
    metrics_csv: Any = trainer.loggers[0]
    metrics, every = {**start.metrics, "epoch": start.epoch}, config["trainer"]["log_every_n_steps"]
    metrics_csv.go_on(start.step, metrics, every, start.rows)
    if trainer.is_global_zero:
        write_run_folder(cfg, built.output_dir, data)
    synchronized = uses_sync_batchnorm(config["trainer"])
    describe_training(built.module, built.datamodule, trainer, built.output_dir, synchronized)
    describe_learning_rate(config["schedule"], built.module, images_per_update(built.datamodule, trainer), start)


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


def _facts(output_dir: Path, resume: str | None, start: Start, data: SegmentationData) -> dict[str, str]:
    """Return what all processes must agree in; not in the file that ``auto`` finds, which the first makes last.ckpt."""
    checkpoint = f"{resume if resume in (None, 'auto') else start.checkpoint}, after step {start.step}"
    images = {f"{name} images": split["sha256"] for name, split in describe_splits(data).items()}
    return {"run folder": str(output_dir), "checkpoint to go on from": checkpoint, **images}


def _refuse_sweep_over_processes(trainer: Trainer) -> None:
    sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep and trainer.world_size > 1:
        raise UserError(
            f"expected one device a job in a sweep, but got {trainer.world_size} processes; set trainer.devices=1 and "
            "run jobs beside each other (hydra/launcher=submitit_slurm or joblib), or start one command a job, no -m"
        )
