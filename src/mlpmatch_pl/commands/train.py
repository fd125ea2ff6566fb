"""From a configuration to a finished run: validate everything, then write the run folder, train and test."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig

from mlpmatch_pl.callbacks.stop_signals import StopOnSignal, Stopped
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.engine.build import build_callbacks, build_datamodule, build_module, check_monitors, read_config
from mlpmatch_pl.engine.loggers import build_loggers, finish_wandb, log_results
from mlpmatch_pl.engine.logging import describe_learning_rate, describe_training, quiet
from mlpmatch_pl.engine.results import train_and_test
from mlpmatch_pl.engine.resume import Start, check_classes, check_optimizer, check_unfinished, find_start, make_last
from mlpmatch_pl.engine.run_folder import check_splits, run_lock, write_run_folder
from mlpmatch_pl.engine.runtime_errors import translate_errors
from mlpmatch_pl.engine.short_training import set_steps
from mlpmatch_pl.engine.trainer import build_trainer, images_per_update, uses_sync_batchnorm
from mlpmatch_pl.methods.method import resolve_method
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.checkpoint import check_architecture
from mlpmatch_pl.utils.distributed import cluster_environment, is_first_process
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import FAILURE, atomic_write, full_disk_is_user_error, remove_unfinished, set_aside

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Training:
    """The validated parts of a training, before anything is written."""

    config: dict[str, Any]
    output_dir: Path
    datamodule: SemiSupervisedDataModule
    trainer: Trainer
    module: MLPMatch
    start: Start


def run(cfg: DictConfig) -> dict[str, Any]:
    """Build everything, train, test the best checkpoint and write the results. See `mlpmatch_pl.train.train`."""
    quiet()
    config = read_config(cfg)
    folder = Path(config["output_dir"]).resolve()
    with full_disk_is_user_error(folder), run_lock(folder) if is_first_process() else nullcontext():
        return _run(_build(config, folder), cfg)


def _build(config: dict[str, Any], output_dir: Path) -> _Training:
    """Build everything, and refuse whatever is invalid."""
    start = find_start(config["resume"], output_dir, is_first_process())
    if config["backbone"]["pretrained"] == "auto" and (start.checkpoint or config["init_weights"]):
        config = {**config, "backbone": {**config["backbone"], "pretrained": False}}  # other weights follow
    seed_everything(config["seed"], workers=True, verbose=False)
    method = resolve_method(config["method"])
    datamodule = build_datamodule(config, method)
    config = set_steps(config, output_dir, datamodule, start)
    seed_everything(config["seed"], workers=True, verbose=False)  # again: timed steps have drawn numbers
    callbacks = [*build_callbacks(config["callbacks"]), StopOnSignal()]
    trainer = build_trainer(config, output_dir, datamodule, callbacks, start.length)
    _refuse_sweep_over_processes(trainer)
    module = build_module(config, method, datamodule, trainer)
    check_monitors(callbacks, module)
    if start.checkpoint is not None:
        check_architecture(start.hparams, module.hparams)
        check_classes(start, datamodule.data.class_names)
        check_optimizer(start, module.hparams)
        check_splits(start.checkpoint, output_dir, datamodule.data)
        check_unfinished(start, output_dir, trainer.max_epochs or 0, config["schedule"])
    if cluster_environment().local_rank() == 0:  # validates the data, before Lightning starts other processes
        datamodule.prepare_data()
    return _Training(config, output_dir, datamodule, trainer, module, start)


def _in_sweep() -> bool:
    return bool(HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN)


def _refuse_sweep_over_processes(trainer: Trainer) -> None:
    if _in_sweep() and trainer.world_size > 1:
        raise UserError(
            f"expected one device per job in a sweep, but got {trainer.world_size} processes; set trainer.devices=1 "
            "and run jobs in parallel (hydra/launcher=submitit_slurm or joblib), or start one command per job, no -m"
        )


def _run(training: _Training, cfg: DictConfig) -> dict[str, Any]:
    trainer, datamodule, exit_code = training.trainer, training.datamodule, 1
    try:
        with _stopped_by_signal(training), translate_errors(datamodule, trainer.world_size):
            _open(training, cfg)
            metrics = train_and_test(trainer, training.module, datamodule, training.start)
            if trainer.is_global_zero:
                atomic_write(training.output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
                log_results(trainer, metrics, training.config)
                log.info("results in %s", training.output_dir)
        exit_code = 0
        return metrics
    finally:
        finish_wandb(exit_code)


def _open(training: _Training, cfg: DictConfig) -> None:
    """Open the loggers, write the run folder and log what will be trained."""
    config, trainer, start, folder = training.config, training.trainer, training.start, training.output_dir
    data = training.datamodule.data
    trainer.loggers = build_loggers(config, folder, data.labeled, start.step)  # first, as it may refuse
    if trainer.is_global_zero:
        remove_unfinished(folder)
        remove_unfinished(folder / "checkpoints")
        make_last(start, folder)  # before the files of the previous results change
        set_aside(folder / "metrics.json")
        (folder / FAILURE).unlink(missing_ok=True)
        write_run_folder(cfg, folder, data)
    synchronized = uses_sync_batchnorm(config["trainer"])
    describe_training(training.module, training.datamodule, trainer, folder, synchronized)
    images = images_per_update(training.datamodule, trainer)
    describe_learning_rate(config["schedule"], training.module, images, start)


@contextmanager
def _stopped_by_signal(training: _Training) -> Iterator[None]:
    """Log the command that continues; the exit code of the first process is that of the run."""
    try:
        yield
    except Stopped as stopped:
        again = f"hydra.run.dir={training.output_dir} resume=auto"
        if _in_sweep():
            again = f"hydra.sweep.dir={HydraConfig.get().sweep.dir}"
        step = training.trainer.global_step
        log.info("%s: stopped after step %d; continue with the same command and %s", stopped.name, step, again)
        if training.trainer.is_global_zero:
            raise
        raise SystemExit(0) from stopped
