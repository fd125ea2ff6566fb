"""Pictures of what the network predicts: image, truth, prediction, confidence, and a legend of the classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image as PILImage

from mlpmatch_pl.data.samples import WholeImages
from mlpmatch_pl.evaluation import confidence_and_class
from mlpmatch_pl.pictures import Colors, prediction_sheet


class PredictionSheets(Callback):
    """Writes a sheet for some fixed evaluation images, once they have been validated or tested.

    The images are spread evenly over the test set, or the validation set where there is no other. Sheets are written
    at the end of testing, by the first process alone, with the weights that were tested.

    Args:
        dirpath: Folder to write to.
        num_images: Number of images.
    """

    def __init__(self, dirpath: str, num_images: int = 8) -> None:
        self.dirpath, self.num_images = Path(dirpath), num_images

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the sheets."""
        data = getattr(getattr(trainer, "datamodule", None), "data", None)
        if data is None or not trainer.is_global_zero or not self.num_images:
            return
        source = data.test or data.val
        indices = np.linspace(0, len(source) - 1, min(self.num_images, len(source))).round().astype(int)
        self.dirpath.mkdir(parents=True, exist_ok=True)
        for index in indices.tolist():
            sample = WholeImages(source, len(data.class_names), data.ignore_index)[index]
            sheet = self._sheet(pl_module, sample, data.class_names, data.colors)
            sheet.save(self.dirpath / f"{source.name(index).replace('/', '_').rsplit('.', 1)[0]}.png")

    @staticmethod
    def _sheet(
        module: LightningModule, sample: dict[str, Any], class_names: Sequence[str], colors: Colors
    ) -> PILImage.Image:
        with torch.no_grad():
            confidence_BHW, label_BHW = confidence_and_class(module(sample["image"][None].to(module.device)))
        return prediction_sheet(
            sample["image"].permute(1, 2, 0).numpy(),
            sample["mask"].numpy(),
            label_BHW[0].cpu().numpy(),
            confidence_BHW[0].cpu().numpy(),
            class_names,
            colors,
        )
