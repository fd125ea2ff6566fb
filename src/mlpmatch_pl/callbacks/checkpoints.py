"""How Lightning writes and reads checkpoints: whole or not at all, and plain data only."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from mlpmatch_pl.callbacks.stop_signals import Stopped, after_update, validates_next
from mlpmatch_pl.utils.checkpoint import LAST, write_checkpoint
from mlpmatch_pl.utils.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """A plugin for the Trainer: ``Trainer(plugins=[AtomicCheckpointIO()])``.

    Files are written as `mlpmatch_pl.utils.checkpoint.write_checkpoint` does, and never unpickled into code.

    Attributes:
        adapt: What to change in a checkpoint after it has been read, by its path; nothing if left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapt: dict[str, Callable[[dict[str, Any]], None]] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; a full disk is a UserError and leaves the file before."""
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint with ``weights_only=True``, whatever is asked for."""
        content = super().load_checkpoint(path, map_location, weights_only=True)
        if str(path) in self.adapt:
            self.adapt[str(path)](content)
        return content


LENGTH = "length_of_training"
"""The checkpoint's key for the length of the training, see `Resuming`."""


class Resuming(Callback):
    """Gives the restored optimizer the hyperparameters of the configuration; the schedule goes on at its place.

    Lightning restores those of the checkpoint, and so ignores an override or another number of devices. Without such a
    change this changes no bit.

    Args:
        length: ``steps`` as configured, or None, and the ``epochs`` and the validation interval ``every`` that came of
            it. Checkpoints keep them, so that another number of devices does not make another schedule.

    Attributes:
        first_step: Optimizer steps done when this process began to train; None if it did not.
    """

    def __init__(self, length: Mapping[str, int | None]) -> None:
        self.length = dict(length)
        self.first_step: int | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the length."""
        checkpoint[LENGTH] = self.length

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything has been restored."""
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


METRICS = "logged_metrics"
"""The checkpoint's key for the metrics at the time it was written."""
ACCUMULATED = "accumulate_grad_batches"
"""The checkpoint's key for the number of batches in an optimizer step."""

TIME_IS_READ_EVERY = 10  # steps: processes agree on the time by a message


def best_and_last(
    dirpath: str,
    monitor: str = "val/miou",
    every_n_steps: int | None = None,
    every_minutes: float | None = None,
) -> list[Checkpoint]:
    """Keep the best checkpoint by a metric, and the last one.

    Two callbacks, so that last.ckpt is written after every epoch, whether or not it was the best.

    Args:
        dirpath: Folder to write to.
        monitor: Metric to maximize.
        every_n_steps: Write last.ckpt also within epochs, after so many optimizer steps.
        every_minutes: Write last.ckpt also within epochs, after so much time.

    Raises:
        UserError: If an interval is not positive.
    """
    best = BestCheckpoint(
        dirpath=dirpath, filename="best", monitor=monitor, mode="max", save_top_k=1, enable_version_counter=False
    )
    return [best, LastCheckpoint(dirpath, every_n_steps, every_minutes)]


class BestCheckpoint(ModelCheckpoint):
    """Goes on with the best.ckpt of its folder, also when the folder has been moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best score if its file is here; the best of another folder is of no use in this one."""
        here = Path(str(self.dirpath)) / "best.ckpt"
        if not here.is_file() or state_dict["best_model_score"] is None:
            return
        path, score = str(here), state_dict["best_model_score"]
        moved = {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
        super().load_state_dict({**state_dict, **moved, "best_k_models": {path: score}})


class LastCheckpoint(Checkpoint):
    """Writes last.ckpt after every epoch, within epochs if asked for, and when a signal stops the training.

    Each of them can be resumed bit for bit. Within an epoch none is written between accumulated batches or right before
    a validation.

    Args:
        dirpath: Folder to write to.
        every_n_steps: Optimizer steps between two within an epoch.
        every_minutes: Minutes between two within an epoch.

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
        self._validation_broke_off = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write within an epoch, if it is time."""
        if after_update(trainer, batch_idx) and not validates_next(trainer, batch_idx) and self._due(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write after an epoch and its validation."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write when a signal stops the training; after other exceptions the state may be half a step's."""
        if isinstance(exception, Stopped) and trainer.state.fn == "fit" and not exception.saved:
            self._validation_broke_off = trainer.validating
            self._save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the metrics, which are logged after a step's checkpoint; and let a broken off validation start anew."""
        checkpoint[METRICS] = {key: float(value) for key, value in trainer.callback_metrics.items()}
        checkpoint[ACCUMULATED] = trainer.accumulate_grad_batches
        if self._validation_broke_off:
            # Lightning goes on with a validation that broke off in a first batch; its images are read anew.
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"].update(
                total=dict(begun), current=dict(begun), is_last_batch=False
            )

    def _due(self, trainer: Trainer) -> bool:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            return True
        if not self.every_minutes or trainer.global_step % TIME_IS_READ_EVERY:
            return False
        return bool(trainer.strategy.broadcast(time.monotonic() - self._saved_at >= 60 * self.every_minutes))

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        trainer.save_checkpoint(self.path)
        self._saved_at = time.monotonic()
