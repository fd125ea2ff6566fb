"""cuDNN's search for the fastest algorithms, where it pays."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class SearchForCrops(Callback):
    """Switches `trainer.benchmark` off for validation and test: cuDNN would search anew for every size of image.

    Crops are all of one size, whole images of nearly as many sizes as there are images.
    """

    def __init__(self) -> None:
        self._kept: list[bool] = []  # what was set before, while it is off

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before whole images."""
        self._switch_off()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After them."""
        self._restore()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before whole images."""
        self._switch_off()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After them."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """What comes after it in this process finds what was set."""
        self._restore()

    def _switch_off(self) -> None:
        self._kept.append(torch.backends.cudnn.benchmark)
        torch.backends.cudnn.benchmark = False

    def _restore(self) -> None:
        while self._kept:
            torch.backends.cudnn.benchmark = self._kept.pop()
