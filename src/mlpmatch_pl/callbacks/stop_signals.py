"""Finish the step, save and exit on SIGTERM, SIGINT (Ctrl-C) and SIGUSR1."""

import os
import signal
import threading
from typing import Any, NoReturn

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from mlpmatch_pl.callbacks.async_flag import AsyncFlag

SIGNALS = [signal.Signals[name] for name in ("SIGTERM", "SIGINT", "SIGUSR1") if name in signal.Signals.__members__]


class Stopped(SystemExit):
    """A signal stops the training; the exit code is 128 plus the signal's number, as in a shell.

    Args:
        signum: The signal.
        saved: Whether the checkpoints are up to date.

    Example:
        >>> Stopped(signal.SIGTERM).code
        143
    """

    def __init__(self, signum: int, saved: bool = False) -> None:
        super().__init__(128 + signum)
        self.name = signal.Signals(signum).name
        self.saved = saved


class StopOnSignal(Checkpoint):
    """Raises `Stopped` at the next point where a checkpoint is exact, on all processes at once.

    That is after an optimizer step; with one process also after any validation image, as a resumed run repeats the
    validation. Several processes exchange a flag in each step and read it after the next one, so that no device waits
    for it. During the test there is nothing to save, and it stops at once. A second Ctrl-C ends the process.

    This is a `Checkpoint` for Lightning, which calls those after all other callbacks. It must come after the others of
    that kind in the trainer's list, because an epoch ends when its checkpoints are written.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._told: AsyncFlag | None = None  # the flag exchanged in the previous step
        self._trainer: Trainer | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's handlers, which save in the middle of a step."""
        self._listen(trainer)
        self._stop_if_received_before(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle signals in the test, too; Lightning restores the previous handlers."""
        self._listen(trainer)
        self._stop_if_received_before(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after an optimizer step, but validate after the last batch of an epoch first."""
        if after_update(trainer, batch_idx) and not validates_next(trainer, batch_idx):
            if trainer.world_size == 1:
                self._stop_if_asked(trainer)
            else:
                self._stop_if_told(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop in a validation, unless other processes may be at another image or gradients are accumulated."""
        in_training = trainer.state.fn == "fit" and trainer.world_size == 1
        if in_training and after_update(trainer, trainer.fit_loop.batch_idx):
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after an epoch, once its checkpoints are written."""
        self._stop_if_asked(trainer, saved=True)

    def _listen(self, trainer: Trainer) -> None:
        self._trainer = trainer
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: Any) -> None:
        trainer = self._trainer
        if trainer is None or trainer.testing:
            raise Stopped(signum)
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self._signum and trainer.is_global_zero:
            again = "; press Ctrl-C again to exit immediately" if signum == signal.SIGINT else ""
            name = signal.Signals(signum).name
            os.write(2, f"{name}: finishing the step, then saving{again}\n".encode())  # logging may be locked
        launcher = trainer.strategy.launcher
        if not self._signum and isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGTERM)  # not SIGINT: a terminal has sent that one to them, too
        self._signum = self._signum or signum

    def _stop_if_received_before(self, trainer: Trainer) -> None:
        """Stop before the first step or the test, if Lightning received the signal or it came after the last epoch."""
        if trainer.received_sigterm:
            self._signum = self._signum or signal.SIGTERM
        self._stop_if_asked(trainer, saved=True)

    def _stop_if_asked(self, trainer: Trainer, saved: bool = False) -> None:
        self._told = None
        if trainer.strategy.reduce_boolean_decision(bool(self._signum), all=False):
            self._stop(trainer, saved)

    def _stop_if_told(self, trainer: Trainer) -> None:
        told = self._told is not None and self._told.read()
        asked = torch.full((), int(bool(self._signum)), device=trainer.strategy.root_device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        self._told = AsyncFlag(asked)
        if told:
            self._stop(trainer)

    def _stop(self, trainer: Trainer, saved: bool = False) -> NoReturn:
        if trainer.training and not saved and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            # Lightning logs a step after the callbacks.
            metrics = {key: float(value) for key, value in trainer.logged_metrics.items() if key.startswith("train/")}
            for logger in trainer.loggers:
                logger.log_metrics({"epoch": trainer.current_epoch, **metrics}, trainer.global_step - 1)
        raise Stopped(self._signum or signal.SIGTERM, saved)


def after_update(trainer: Trainer, batch_idx: int) -> bool:
    """Tell whether the optimizer has just stepped; between two steps, a checkpoint would lose accumulated gradients."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def validates_next(trainer: Trainer, batch_idx: int) -> bool:
    """Tell whether a validation follows this batch; a run resumed from here would skip it."""
    return trainer.is_last_batch or (batch_idx + 1) % (trainer.val_check_batch or 1) == 0
