"""Checkpoints: best.ckpt and last.ckpt, how Lightning reads and writes them, and what a resumed run takes from one."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from mlpmatch_pl.callbacks.stop_signals import Stopped, after_update, validates_next
from mlpmatch_pl.utils.checkpoint import LAST, write_checkpoint
from mlpmatch_pl.utils.errors import UserError

log = logging.getLogger(__name__)

# Keys of a checkpoint.
DATA = "SemiSupervisedDataModule"  # position in the dataset
LENGTH = "length_of_training"  # see `Resume`
METRICS = "logged_metrics"  # metrics when it was written
ACCUMULATED = "accumulate_grad_batches"  # batches per optimizer step

STEPS_BETWEEN_CLOCK_READS = 10  # processes agree on the time by a message


class AtomicCheckpointIO(TorchCheckpointIO):
    """A plugin for the Trainer: ``Trainer(plugins=[AtomicCheckpointIO()])``.

    Files are written by `mlpmatch_pl.utils.checkpoint.write_checkpoint` and read without running code in them.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; a full disk is a `UserError` and leaves the previous file."""
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint with ``weights_only=True``, whatever the caller asks for."""
        return super().load_checkpoint(path, map_location, weights_only=True)


class Resume(Callback):
    """Applies the configuration to a restored training.

    Lightning restores the optimizer's hyperparameters from the checkpoint, which would ignore an override or another
    number of devices. Without such a change, this changes no bit.

    If an epoch now has another number of batches or steps (other devices, batch size or accumulation), the interrupted
    epoch starts again at its beginning. Steps are counted as if all epochs before had had the new number, so learning
    rate and lambda continue at the same epoch of their schedules.

    Args:
        length: ``steps`` as configured, or None, and the resulting ``epochs`` and validation interval ``every``.
            Checkpoints keep them, so that another number of devices does not change the schedule.
        batches: Batches per epoch and process now; None to restore the position in any case.

    Attributes:
        first_step: Optimizer steps done when this process started to train; None if it did not.
    """

    def __init__(self, length: Mapping[str, int | None], batches: int | None = None) -> None:
        self.length, self.batches = dict(length), batches
        self.first_step: int | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the length."""
        checkpoint[LENGTH] = self.length

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Start the epoch again if it has another length now; Lightning restores loops and schedulers after this."""
        data, accumulate = checkpoint.get(DATA), trainer.accumulate_grad_batches
        now = (self.batches, accumulate)
        if trainer.state.fn != "fit" or self.batches is None or not data:
            return
        if now == (data["batches"], checkpoint.get(ACCUMULATED, accumulate)):
            return
        ended = data["batch"] >= data["batches"]
        epoch = data["epoch"] + ended
        step = epoch * -(-self.batches // accumulate)
        if not ended:
            log.warning(
                "an epoch has %d batches now and %d in the checkpoint: epoch %d starts again at its beginning",
                self.batches, data["batches"], epoch + 1,
            )  # fmt: skip
        checkpoint["global_step"] = step
        for scheduler in checkpoint["lr_schedulers"]:
            scheduler.update(last_epoch=step, _step_count=step + 1)
        trainer.datamodule.load_state_dict({"epoch": epoch, "batch": 0, "batches": self.batches})  # type: ignore[attr-defined]
        del checkpoint["loops"]  # those of a new training, with these counts
        loop = trainer.fit_loop
        for count in (loop.epoch_progress.total, loop.epoch_progress.current):
            count.ready = count.started = count.processed = count.completed = epoch  # type: ignore[attr-defined]
        steps = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        steps.ready = steps.completed = step
        loop.epoch_loop.on_load_checkpoint({"_batches_that_stepped": step})  # the step of the loggers

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the hyperparameters, once everything is restored."""
        self.first_step = trainer.global_step
        if trainer.ckpt_path is None:
            return
        configured = pl_module.configure_optimizers()["optimizer"].param_groups  # type: ignore[index, call-overload, union-attr]
        groups = trainer.optimizers[0].param_groups
        for group, fresh in zip(groups, configured, strict=True):
            group.update({key: value for key, value in fresh.items() if key not in ("params", "lr")})
        scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)


def best_and_last(
    dirpath: str,
    monitor: str = "val/miou",
    every_n_steps: int | None = None,
    every_minutes: float | None = None,
) -> list[Checkpoint]:
    """Keep the best checkpoint by a metric, and the last one.

    These are two callbacks, so that last.ckpt is written after every epoch, whether or not it is the best.

    Args:
        dirpath: Folder to write to.
        monitor: Metric to maximize.
        every_n_steps: Optimizer steps between two writes of last.ckpt within an epoch.
        every_minutes: Minutes between two writes of last.ckpt within an epoch.

    Raises:
        UserError: If an interval is not positive.
    """
    best = BestCheckpoint(
        dirpath=dirpath, filename="best", monitor=monitor, mode="max", save_top_k=1, enable_version_counter=False
    )
    return [best, LastCheckpoint(dirpath, every_n_steps, every_minutes)]


class BestCheckpoint(ModelCheckpoint):
    """Continues with the best.ckpt of its folder, even if the folder has been moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score if its file is in this folder."""
        here = Path(str(self.dirpath)) / "best.ckpt"
        if not here.is_file() or state_dict["best_model_score"] is None:
            return
        path, score = str(here), state_dict["best_model_score"]
        moved = {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
        super().load_state_dict({**state_dict, **moved, "best_k_models": {path: score}})


class LastCheckpoint(Checkpoint):
    """Writes last.ckpt after every epoch, within epochs on request, and when a signal stops the training.

    A run resumes from each of them bit for bit. Within an epoch none is written between accumulated batches or right
    before a validation.

    Args:
        dirpath: Folder to write to.
        every_n_steps: Optimizer steps between two writes within an epoch.
        every_minutes: Minutes between two writes within an epoch.

    Raises:
        UserError: If an interval is not positive.
    """

    def __init__(self, dirpath: str, every_n_steps: int | None = None, every_minutes: float | None = None) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_minutes", every_minutes)):
            if value is not None and value <= 0:
                raise UserError(f"expected callbacks.checkpoint.{name} above 0, but got {value}; null switches it off")
        self.path = Path(dirpath) / LAST
        self.every_n_steps, self.every_minutes = every_n_steps, every_minutes
        self._saved_at = time.monotonic()
        self._validation_interrupted = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write within an epoch, if it is due."""
        if after_update(trainer, batch_idx) and not validates_next(trainer, batch_idx) and self._due(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write after an epoch and its validation."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write when a signal stops the training; after other exceptions the state may be half a step's."""
        if isinstance(exception, Stopped) and trainer.state.fn == "fit" and not exception.saved:
            self._validation_interrupted = trainer.validating
            self._save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the metrics, and let a resumed run restart an interrupted validation."""
        checkpoint[METRICS] = {key: float(value) for key, value in trainer.callback_metrics.items()}
        checkpoint[ACCUMULATED] = trainer.accumulate_grad_batches
        if self._validation_interrupted:
            # Lightning would continue the validation after its last batch, with a loader that starts at the first.
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"].update(
                total=dict(begun), current=dict(begun), is_last_batch=False
            )

    def _due(self, trainer: Trainer) -> bool:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            return True
        if not self.every_minutes or trainer.global_step % STEPS_BETWEEN_CLOCK_READS:
            return False
        return bool(trainer.strategy.broadcast(time.monotonic() - self._saved_at >= 60 * self.every_minutes))

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        trainer.save_checkpoint(self.path)
        self._saved_at = time.monotonic()
