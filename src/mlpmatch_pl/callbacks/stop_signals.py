"""SIGTERM, SIGINT (Ctrl-C) and SIGUSR1: finish the step, save, and exit."""

import os
import signal
import threading
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from mlpmatch_pl.callbacks.async_flag import AsyncFlag

SIGNALS = [signal.Signals[name] for name in ("SIGTERM", "SIGINT", "SIGUSR1") if name in signal.Signals.__members__]


class Stopped(SystemExit):
    """The training stops because a signal asks for it; the exit code is 128 and the signal's number, as in a shell.

    Args:
        signum: The signal.
        saved: Whether the checkpoints are as the training is, so that nothing has to be saved.

    Example:
        >>> Stopped(signal.SIGTERM).code
        143
    """

    def __init__(self, signum: int, saved: bool = False) -> None:
        super().__init__(128 + signum)
        self.name = signal.Signals(signum).name
        self.saved = saved


class StopOnSignal(Checkpoint):
    """Turns a signal into `Stopped` at the next place where a checkpoint is exact, on all processes at once.

    That is after an optimizer step; with one process also after any validation image, as the validation is done again
    after a resume. Several processes tell each other in every step and read it after the next one, so that no device
    has to wait for it. While testing, there is nothing to save, and it stops at once. A second Ctrl-C ends the process.

    It is a `Checkpoint` for Lightning, which calls these last: an epoch has ended when its checkpoints are written. So
    it has to come after them in the trainer's list.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._told: AsyncFlag | None = None  # what the processes told each other a step ago
        self._trainer: Trainer | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals from Lightning, which saves inside the handler and so in the middle of a step."""
        self._listen(trainer)
        self._stop_if_received_before(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals for the test as well; Lightning gives them back to whoever had them before."""
        self._listen(trainer)
        self._stop_if_received_before(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after an optimizer step. The last batch of an epoch is validated first."""
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
        """Stop in a validation, unless other processes may be at another image, or gradients are being accumulated."""
        in_training = trainer.state.fn == "fit" and trainer.world_size == 1
        if in_training and after_update(trainer, trainer.fit_loop.batch_idx):
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after an epoch, whose checkpoints have just been written."""
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
            again = "; press Ctrl-C again to end at once" if signum == signal.SIGINT else ""
            name = signal.Signals(signum).name
            os.write(2, f"{name}: finishing the step, then saving{again}\n".encode())  # the log may be locked
        launcher = trainer.strategy.launcher
        if not self._signum and isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGTERM)  # not SIGINT: a terminal has sent that one to them already
        self._signum = self._signum or signum

    def _stop_if_received_before(self, trainer: Trainer) -> None:
        """Stop before the first step, or the test, if the signal came to Lightning or after the last epoch."""
        if trainer.received_sigterm:
            self._signum = self._signum or signal.SIGTERM
        self._stop_if_asked(trainer, saved=True)

    def _stop_if_asked(self, trainer: Trainer, saved: bool = False) -> None:
        self._told = None
        if trainer.strategy.reduce_boolean_decision(bool(self._signum), all=False):
            raise Stopped(self._signum or signal.SIGTERM, saved)

    def _stop_if_told(self, trainer: Trainer) -> None:
        told = self._told is not None and self._told.read()
        asked = torch.full((), int(bool(self._signum)), device=trainer.strategy.root_device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        self._told = AsyncFlag(asked)
        if told:
            raise Stopped(self._signum or signal.SIGTERM)


def after_update(trainer: Trainer, batch_idx: int) -> bool:
    """Tell whether the optimizer has just stepped: in between, accumulated gradients would be lost."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def validates_next(trainer: Trainer, batch_idx: int) -> bool:
    """Tell whether a batch ends an epoch or comes before a validation, which a resume from here would leave out."""
    return trainer.is_last_batch or (batch_idx + 1) % (trainer.val_check_batch or 1) == 0
