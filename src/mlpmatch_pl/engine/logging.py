"""What is logged before a training starts, and which messages of libraries are hidden."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.engine.resume import Start
from mlpmatch_pl.engine.trainer import describe_processes
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.distributed import is_first_process, tasks_without_srun, waits_for_others

log = logging.getLogger(__name__)


def describe_training(
    module: MLPMatch, datamodule: SemiSupervisedDataModule, trainer: Trainer, output_dir: Path, synchronized: bool
) -> None:
    """Log what will be trained: images, network, length and processes."""
    data = datamodule.data
    log.info(
        "%s: %d labeled images (%s, sha256 %s), %d unlabeled, %d validation, %d test; %d classes",
        module.method.name, len(data.labeled.names), data.labeled.label, data.labeled.sha256[:8], len(data.unlabeled),
        len(data.val), len(data.test or ()), len(data.class_names),
    )  # fmt: skip
    for note in data.notes:
        log.warning("note: %s", note)
    parameters = sum(parameter.numel() for parameter in module.segmentor.parameters()) / 1e6
    log.info(
        "%s, %.1f million parameters; %d epochs of %d steps; run folder %s",
        module.hparams["backbone"], parameters, trainer.max_epochs, datamodule.steps_per_epoch(trainer.world_size),
        output_dir,
    )  # fmt: skip
    kept, pixels = (
        module.criterion.options.get("min_kept", 0),
        datamodule.batch_sizes["labeled"] * datamodule.crop_size**2,
    )
    if kept >= pixels:
        log.warning(
            "note: ohem keeps min_kept=%d pixels, but a batch of a device has only %d: that is cross entropy; lower "
            "objective.criterion.min_kept",
            kept, pixels,
        )  # fmt: skip
    tasks = tasks_without_srun(os.environ)
    if tasks > 1 and tasks != trainer.world_size:
        log.warning(
            "note: the SLURM job has %d tasks, but srun was not used, and this command trains with %d; start it as "
            "srun python ..., or set trainer.devices",
            tasks, trainer.world_size,
        )  # fmt: skip
    if trainer.world_size > 1:
        log.info("%s", describe_processes(trainer.world_size, synchronized))
        if waits_for_others(os.environ):
            log.info(
                "waiting for the other processes at %s:%s; if nothing starts them, unset LOCAL_RANK",
                os.environ["MASTER_ADDR"],
                os.environ["MASTER_PORT"],
            )


def describe_learning_rate(schedule: dict[str, Any], module: MLPMatch, images: int, start: Start) -> None:
    """Log where a training resumes and its learning rate."""
    if start.checkpoint is not None:
        log.info(
            "continuing from %s at epoch %d (%d%% of it done); the configured learning rate is used, it was %.4g",
            start.checkpoint, start.epoch + 1, round(100 * start.fraction), start.hparams["lr"],
        )  # fmt: skip
    log.info(
        "learning rate %.4g for %d images in an optimizer step (%g for %d); decoder x %g",
        module.hparams["lr"], images, schedule["lr"], schedule["reference_images"], schedule["lr_multi"],
    )  # fmt: skip


def quiet() -> None:
    """Hide messages of Lightning that do not apply here."""
    for chatty in ("lightning.pytorch", "lightning.fabric.utilities.distributed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its messages itself
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # the report of trainer.profiler=...
    if not is_first_process():
        logging.getLogger("mlpmatch_pl").setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",  # chosen by measurement or by the user
        r".*The number of training batches .* is smaller than the logging interval.*",
        r".*module\(s\) in eval mode at the start of training.*",  # the teacher
        r".*LeafSpec.*",  # Lightning 2.6 with torch 2.14
        r".*recommended to use `self.log\(.*sync_dist=True.*",  # metrics come from one matrix, summed over ranks
        r".*your dataloader is not resumable.*",  # it is: the data module restores the position
        r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
    ):
        warnings.filterwarnings("ignore", message=message)
