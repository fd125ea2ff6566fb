"""Pictures in loggers."""

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image as PILImage


def show(trainer: Trainer, key: str, picture: PILImage.Image) -> None:
    """Show a picture in W&B and TensorBoard; other loggers have no place for one."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [picture])
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, np.asarray(picture), trainer.global_step, dataformats="HWC")
