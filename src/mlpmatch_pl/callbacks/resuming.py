"""A training that goes on has the learning rate of the present configuration, at the place it had come to."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

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
