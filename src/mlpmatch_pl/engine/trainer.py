"""The Trainer of a run: its length, processes and progress, with invalid options refused."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from mlpmatch_pl.callbacks.checkpoints import AtomicCheckpointIO, Resume
from mlpmatch_pl.callbacks.progress import DataWait, ProcessorTime, ProgressBar, ProgressLines, Throughput
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.utils.distributed import cluster_environment, refuse_leftovers, refuse_other_numbers
from mlpmatch_pl.utils.errors import UserError

_SET_HERE = {
    "callbacks", "default_root_dir", "enable_model_summary", "logger", "max_epochs", "max_steps",
    "num_sanity_val_steps", "plugins", "strategy", "use_distributed_sampler",
}  # fmt: skip

MODULE_OPTIONS = ("channels_last", "compile_blocks", "activation_checkpointing")
"""Options of the group trainer, because they concern speed and memory, that are passed to the module."""


def build_trainer(
    config: dict[str, Any],
    output_dir: Path,
    datamodule: SemiSupervisedDataModule,
    callbacks: list[Callback],
    before: Mapping[str, Any] | None = None,
) -> Trainer:
    """Build the trainer, without loggers, which are added once everything is validated.

    Args:
        config: The whole configuration.
        output_dir: The run folder.
        datamodule: The data module.
        callbacks: The callbacks of the run.
        before: The length in the checkpoint to resume from, see `length_of_training`.

    Raises:
        UserError: If an option is set elsewhere, or the schedule or the number of processes is invalid.
    """
    options = _lightning_options(config["trainer"])
    data_wait = DataWait()
    trainer = _trainer(options, str(output_dir), [data_wait, ProcessorTime(), *callbacks])
    datamodule.share_batches(trainer.world_size, trainer.accumulate_grad_batches)
    datamodule.check_world_size(trainer.world_size)
    datamodule.max_batches = None
    accumulate, steps = trainer.accumulate_grad_batches, config["schedule"]["steps"]
    per_epoch = math.ceil(datamodule.steps_per_epoch(trainer.world_size) / accumulate)
    given = options["check_val_every_n_epoch"]
    epochs, every = length_of_training(config["schedule"], per_epoch, before, given)
    if steps is not None:
        datamodule.max_batches = math.ceil(steps / epochs) * accumulate
    batches = datamodule.steps_per_epoch(trainer.world_size)
    trainer.fit_loop.max_epochs = epochs
    length = {**{key: config["schedule"][key] for key in ("minutes", "steps")}, "epochs": epochs, "every": every}
    whole = trainer.limit_train_batches == 1.0
    trainer.callbacks.insert(0, Resume(length, batches if whole else None))  # type: ignore[attr-defined]
    if given is None:
        trainer.check_val_every_n_epoch = every
    if options["enable_progress_bar"]:
        throughput = Throughput(images_per_update(datamodule, trainer), data_wait)
        progress = ProgressBar(throughput) if sys.stdout.isatty() else ProgressLines(throughput)
        trainer.callbacks = [c for c in trainer.callbacks if "ProgressBar" not in type(c).__name__]  # type: ignore[attr-defined]
        trainer.callbacks.insert(0, progress)  # type: ignore[attr-defined]
    return trainer


def _lightning_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the group that are Lightning's, and refuse those that this command sets or cannot take."""
    options = dict(group)
    if taken := sorted(set(options) & _SET_HERE):
        raise UserError(
            f"expected trainer.{taken[0]} to be left to this command; set schedule.epochs or schedule.steps, "
            "the groups logger and callbacks, or hydra.run.dir"
        )
    if options.get("max_time") is not None:  # Lightning would stop within an epoch as if the run were finished
        raise UserError(
            "expected the length in schedule.epochs, steps or minutes, but got trainer.max_time; let a signal end a "
            "run whose time is limited (timeout -s TERM 55m python ..., SLURM's --signal), then use resume=auto"
        )
    for option in MODULE_OPTIONS:
        options.pop(option)
    if options.get("accumulate_grad_batches", 1) < 1:
        raise UserError(
            f"expected trainer.accumulate_grad_batches of at least 1, but got {options['accumulate_grad_batches']}"
        )
    return options | {"sync_batchnorm": uses_sync_batchnorm(options)}


def _trainer(options: dict[str, Any], output_dir: str, callbacks: list[Callback]) -> Trainer:
    # DDP broadcasts the first process's BatchNorm statistics, which are saved, before every step and validation. That
    # must stay on, although with SyncBatchNorm all processes have the same.
    refuse_leftovers(os.environ, _several(options))
    ddp = DDPStrategy(gradient_as_bucket_view=True) if _several(options) else "auto"
    try:
        environment = cluster_environment()
        trainer = Trainer(
            **options,
            strategy=ddp,
            max_epochs=1,  # set by the caller, who needs the number of processes for it
            default_root_dir=output_dir,
            logger=False,  # added once everything is validated: a refused run leaves no trace
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO(), environment],
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        environment.validate_settings(trainer.num_devices, trainer.num_nodes)
        refuse_other_numbers(os.environ, trainer.num_devices, trainer.num_nodes)
        return trainer
    except UserError:
        raise
    except Exception as error:  # Lightning raises many kinds
        reason = " ".join(str(error).split()).removesuffix(".")
        raise UserError(f"expected options of trainer that Lightning takes, but it refuses them: {reason}") from error


def uses_sync_batchnorm(options: dict[str, Any]) -> bool:
    """Tell whether BatchNorm is synchronized: by default on several GPUs; the CPU does not support it.

    Raises:
        UserError: If it is requested without a GPU.
    """
    on_cpu = options["accelerator"] == "cpu" or not torch.cuda.is_available()
    if options["sync_batchnorm"] and on_cpu:
        raise UserError("expected a GPU for trainer.sync_batchnorm=true, but torch has none; leave it null")
    return _several(options) and not on_cpu if options["sync_batchnorm"] is None else bool(options["sync_batchnorm"])


def describe_processes(processes: int, synchronized: bool) -> str:
    """Describe in one line how several processes train together.

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
    schedule: dict[str, Any],
    steps_per_epoch: int,
    before: Mapping[str, Any] | None = None,
    every: int | None = None,
) -> tuple[int, int]:
    """Return the number of epochs, and after how many of them to validate.

    ``schedule.steps`` is divided into epochs of equal length, none longer than a pass over the images, so that the last
    step is validated; many short epochs are validated about twenty times in total. A resumed training keeps its epochs
    if ``schedule.steps`` is unchanged, whatever the number of steps per epoch is now.

    Args:
        schedule: The group of the configuration.
        steps_per_epoch: Optimizer steps in an epoch.
        before: ``steps``, ``epochs`` and ``every`` when the checkpoint was written.
        every: After how many epochs to validate, if that is given.

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
            "expected one of schedule.epochs, schedule.steps and schedule.minutes, above 0 and whole for the first "
            f"two, but got epochs={epochs}, steps={steps}; set the others to null"
        )
    if epochs is not None:
        return epochs, every or 1
    if before and before["steps"] == steps:
        return before["epochs"], before["every"]
    whole = math.ceil(steps / steps_per_epoch)
    every = every or max(whole // 20, 1)
    return math.ceil(whole / every) * every, every


def images_per_update(datamodule: SemiSupervisedDataModule, trainer: Trainer) -> int:
    """Return the number of images, labeled and unlabeled, in an optimizer step over all devices."""
    return datamodule.images_per_step * trainer.world_size * trainer.accumulate_grad_batches
