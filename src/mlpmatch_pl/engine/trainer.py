"""The trainer of a run: its length, its processes, its progress. Everything that can be refused is refused here."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from mlpmatch_pl.callbacks.checkpoints import AtomicCheckpointIO, Resuming
from mlpmatch_pl.callbacks.cudnn import SearchForCrops
from mlpmatch_pl.callbacks.progress import DataWait, ProgressBar, ProgressLines
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.utils.distributed import Launch
from mlpmatch_pl.utils.errors import UserError

_SET_HERE = {
    "callbacks", "default_root_dir", "enable_model_summary", "logger", "max_epochs", "max_steps",
    "num_sanity_val_steps", "plugins", "strategy", "use_distributed_sampler",
}  # fmt: skip

MODULE_OPTIONS = ("channels_last", "compile_blocks", "activation_checkpointing", "fused_optimizer")
"""What stands in the group trainer, because it is about speed and memory, but is for the module."""


def build_trainer(
    config: dict[str, Any],
    output_dir: Path,
    datamodule: SemiSupervisedDataModule,
    callbacks: list[Callback],
    before: Mapping[str, Any] | None = None,
) -> Trainer:
    """Build the trainer with its length from the schedule, its processes and its progress; loggers come later.

    Args:
        config: The whole configuration.
        output_dir: The run folder.
        datamodule: The data.
        callbacks: Those of the run.
        before: The length that a checkpoint of this training keeps, see `length_of_training`.

    Raises:
        UserError: If an option is not for the user to set, or the schedule or the processes do not fit.
    """
    options = dict(config["trainer"])
    if taken := sorted(set(options) & _SET_HERE):
        raise UserError(
            f"expected trainer.{taken[0]} to be left to this command; set schedule.epochs or schedule.steps, "
            "the groups logger and callbacks, or hydra.run.dir"
        )
    if options.get("max_time") is not None:  # Lightning would end it in the middle of an epoch, as if it were over
        raise UserError(
            "expected the length in schedule.epochs or schedule.steps, but got trainer.max_time; let a signal end a "
            "run whose time is limited (timeout -s TERM 55m python ..., SLURM's --signal), and go on with resume=auto"
        )
    for option in MODULE_OPTIONS:
        options.pop(option)
    if options.get("accumulate_grad_batches", 1) < 1:
        raise UserError(
            f"expected trainer.accumulate_grad_batches of at least 1, but got {options['accumulate_grad_batches']}"
        )
    options["sync_batchnorm"] = uses_sync_batchnorm(options)
    data_wait, launch = DataWait(), Launch.of(os.environ)
    trainer = _trainer(options, launch, str(output_dir), [data_wait, SearchForCrops(), *callbacks])
    launch.check(trainer.num_devices, trainer.num_nodes)
    datamodule.check_world_size(trainer.world_size)
    steps = math.ceil(datamodule.steps_per_epoch(trainer.world_size) / trainer.accumulate_grad_batches)
    epochs, every = length_of_training(config["schedule"], steps, before)
    trainer.fit_loop.max_epochs = epochs
    length = {"steps": config["schedule"]["steps"], "epochs": epochs, "every": every}
    trainer.callbacks.insert(0, Resuming(length))  # type: ignore[attr-defined]
    if options["check_val_every_n_epoch"] is None:
        trainer.check_val_every_n_epoch = every
    if options["enable_progress_bar"]:
        images = images_per_update(datamodule, trainer)
        progress = ProgressBar(images, data_wait) if sys.stdout.isatty() else ProgressLines(images, data_wait)
        trainer.callbacks = [c for c in trainer.callbacks if "ProgressBar" not in type(c).__name__]  # type: ignore[attr-defined]
        trainer.callbacks.insert(0, progress)  # type: ignore[attr-defined]
    return trainer


def _trainer(options: dict[str, Any], launch: Launch, output_dir: str, callbacks: list[Callback]) -> Trainer:
    # DDP begins every step and every validation with the first process's BatchNorm statistics, which are those that are
    # saved: so it must stay, although with SyncBatchNorm all have the same.
    ddp = DDPStrategy(gradient_as_bucket_view=True) if _several(options) else "auto"
    try:
        # It saves and exits when a signal comes; whether the job is queued again is for its script to say.
        cluster = [SLURMEnvironment(auto_requeue=False)] if launch.by == "srun" else []
        return Trainer(
            **options,
            strategy=ddp,
            max_epochs=1,  # set by the caller, once the number of processes is known
            default_root_dir=output_dir,
            logger=False,  # set once everything is checked: a refused run leaves no trace
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO(), *cluster],
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
    except Exception as error:  # Lightning has many kinds of refusal
        reason = " ".join(str(error).split()).removesuffix(".")
        raise UserError(f"expected options of trainer that Lightning takes, but it refuses them: {reason}") from error


def uses_sync_batchnorm(options: dict[str, Any]) -> bool:
    """Tell whether BatchNorm is synchronized: by default on several GPUs, and never on the CPU, which cannot.

    Raises:
        UserError: If it is asked for without a GPU.
    """
    on_cpu = options["accelerator"] == "cpu" or not torch.cuda.is_available()
    if options["sync_batchnorm"] and on_cpu:
        raise UserError("expected a GPU for trainer.sync_batchnorm=true, but torch has none; leave it null")
    return _several(options) and not on_cpu if options["sync_batchnorm"] is None else bool(options["sync_batchnorm"])


def describe_processes(processes: int, synchronized: bool) -> str:
    """Say in a line how several processes train together.

    Example:
        >>> describe_processes(4, synchronized=True)
        '4 processes; BatchNorm over the images of all of them'
    """
    if synchronized:
        return f"{processes} processes; BatchNorm over the images of all of them"
    return (
        f"{processes} processes; BatchNorm over each one's own images, as SyncBatchNorm needs GPUs and "
        "trainer.sync_batchnorm; the first one's statistics are shared and saved"
    )


def _several(options: dict[str, Any]) -> bool:
    return options["devices"] not in (1, "1", [0]) or options["num_nodes"] > 1


def length_of_training(
    schedule: dict[str, Any], steps_per_epoch: int, before: Mapping[str, Any] | None = None
) -> tuple[int, int]:
    """Return the number of epochs, and after how many of them to validate.

    ``schedule.steps`` is rounded up to whole epochs, so that every image counts alike and the last step is validated;
    many short epochs are validated about twenty times in all. A training that goes on keeps its epochs while
    ``schedule.steps`` is what it was, whatever the number of steps in an epoch is now.

    Args:
        schedule: The group of the configuration.
        steps_per_epoch: Optimizer steps in an epoch.
        before: ``steps``, ``epochs`` and ``every`` when the checkpoint was written.

    Raises:
        UserError: If not exactly one of ``epochs`` and ``steps`` is given, or it is not positive.

    Example:
        >>> length_of_training({"epochs": None, "steps": 500}, steps_per_epoch=59)
        (9, 1)
        >>> length_of_training({"epochs": None, "steps": 500}, steps_per_epoch=4)
        (126, 6)
    """
    epochs, steps = schedule["epochs"], schedule["steps"]
    given = [value for value in (epochs, steps) if value is not None]
    if len(given) != 1 or not isinstance(given[0], int) or given[0] < 1:
        raise UserError(
            f"expected a positive whole schedule.epochs or schedule.steps, but got epochs={epochs}, steps={steps}; "
            "set the other to null"
        )
    if epochs is not None:
        return epochs, 1
    if before and before["steps"] == steps:
        return before["epochs"], before["every"]
    whole = math.ceil(steps / steps_per_epoch)
    every = max(whole // 20, 1)
    return math.ceil(whole / every) * every, every


def images_per_update(datamodule: SemiSupervisedDataModule, trainer: Trainer) -> int:
    """Return the number of images, labeled and unlabeled, in an optimizer step over all devices."""
    return datamodule.images_per_step * trainer.world_size * trainer.accumulate_grad_batches
