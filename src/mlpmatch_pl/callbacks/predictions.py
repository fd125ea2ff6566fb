"""Pictures of what the network predicts: image, truth, prediction, confidence, and a legend of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image as PILImage

from mlpmatch_pl.data.samples import WholeImages
from mlpmatch_pl.data.sources import SegmentationData, Source
from mlpmatch_pl.evaluation import confidence_and_class
from mlpmatch_pl.pictures import Array, prediction_sheet, to_rgb
from mlpmatch_pl.spread import spread


@dataclass(frozen=True)
class Predicted:
    """An image with its truth and its prediction."""

    name: str
    image_HWC: Array
    truth_HW: Array
    label_HW: Array
    confidence_HW: Array

    def sheet(self, data: SegmentationData, threshold: float | None) -> PILImage.Image:
        """Draw everything side by side."""
        return prediction_sheet(
            self.image_HWC, self.truth_HW, self.label_HW, self.confidence_HW, data.class_names, data.colors, threshold
        )


class PredictionSheets(Callback):
    """Writes a sheet for some fixed evaluation images, and shows it in W&B (with masks to toggle) and TensorBoard.

    The images are spread evenly over the test set, or the validation set where there is no other. Sheets are written at
    the end of testing, with the weights that were tested; and, if asked for, of validation images while training. The
    first process writes alone.

    Args:
        dirpath: Folder to write to.
        num_images: Number of images.
        every_n_validations: Write also after every so many validations while training, to ``step_<step>`` below the
            folder; never if left out.
    """

    def __init__(self, dirpath: str, num_images: int = 8, every_n_validations: int | None = None) -> None:
        self.dirpath, self.num_images, self.every_n_validations = Path(dirpath), num_images, every_n_validations
        self._validations = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write sheets of validation images while training, if it is their turn."""
        if self.every_n_validations is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every_n_validations == 0 and (data := _data(trainer)) is not None:
            self._show(trainer, pl_module, data, data.val, self.dirpath / f"step_{trainer.global_step:06}", "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the sheets of the test images."""
        if (data := _data(trainer)) is not None:
            self._show(trainer, pl_module, data, data.test or data.val, self.dirpath, "test")

    def _show(
        self, trainer: Trainer, module: LightningModule, data: SegmentationData, source: Source, folder: Path, part: str
    ) -> None:
        if not trainer.is_global_zero or not self.num_images:
            return
        samples = WholeImages(source, len(data.class_names), data.ignore_index)
        folder.mkdir(parents=True, exist_ok=True)
        chosen = spread(range(len(source)), self.num_images)
        predicted = [_predict(module, samples[index], source.name(index)) for index in chosen]
        threshold = module.hparams["confidence_threshold"] if part == "val" else None
        sheets = [item.sheet(data, threshold) for item in predicted]
        for item, sheet in zip(predicted, sheets, strict=True):
            sheet.save(folder / f"{item.name.replace('/', '_').rsplit('.', 1)[0]}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _log_masks(logger, f"{part}/predictions", predicted, data)
            elif isinstance(logger, TensorBoardLogger):
                for item, sheet in zip(predicted, sheets, strict=True):
                    tag = f"{part}/{item.name}"
                    logger.experiment.add_image(tag, np.asarray(sheet), trainer.global_step, dataformats="HWC")


def _data(trainer: Trainer) -> SegmentationData | None:
    return getattr(getattr(trainer, "datamodule", None), "data", None)


@torch.no_grad()
def _predict(module: LightningModule, sample: dict[str, Any], name: str) -> Predicted:
    confidence_BHW, label_BHW = confidence_and_class(module(sample["image"][None].to(module.device)))
    return Predicted(
        name,
        sample["image"].permute(1, 2, 0).numpy(),
        sample["mask"].numpy(),
        label_BHW[0].cpu().numpy(),
        confidence_BHW[0].cpu().numpy(),
    )


def _log_masks(logger: WandbLogger, key: str, predicted: Sequence[Predicted], data: SegmentationData) -> None:
    """Show images in W&B with truth and prediction as masks that can be switched on and off."""
    labels = {**dict(enumerate(data.class_names)), data.ignore_index: "ignored"}
    masks = [
        {
            kind: {"mask_data": mask.astype(np.uint8), "class_labels": labels}
            for kind, mask in (("truth", item.truth_HW), ("prediction", item.label_HW))
        }
        for item in predicted
    ]
    images: list[Any] = [to_rgb(item.image_HWC) for item in predicted]
    logger.log_image(key, images, caption=[item.name for item in predicted], masks=masks)
