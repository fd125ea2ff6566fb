"""Prediction panels and confusion matrices, as files and in W&B and TensorBoard."""

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

from mlpmatch_pl.data.base import ImageSource, SegmentationData
from mlpmatch_pl.data.dataset import EvalDataset
from mlpmatch_pl.evaluation import confidence_and_class
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.seeding import evenly_spaced
from mlpmatch_pl.visualization.panels import Array, prediction_panels, save_panels, to_rgb
from mlpmatch_pl.visualization.plots import confusion_matrix_plot


def log_image(trainer: Trainer, key: str, picture: PILImage.Image) -> None:
    """Log a picture to W&B and TensorBoard; other loggers do not take pictures."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [picture])
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, np.asarray(picture), trainer.global_step, dataformats="HWC")


@dataclass(frozen=True)
class Predicted:
    """An image with its truth, prediction and confidence.

    Attributes:
        name: Name of the image.
        image_HWC: Its values, 0..255 for 8 bits per channel.
        truth_HW: True classes.
        label_HW: Predicted classes.
        confidence_HW: Probability of the predicted class, 0..1.
        threshold: Confidence from which a pixel becomes a pseudo-label; None to show no pseudo-labels.
    """

    name: str
    image_HWC: Array
    truth_HW: Array
    label_HW: Array
    confidence_HW: Array
    threshold: float | None

    def panels(self, data: SegmentationData) -> PILImage.Image:
        """Draw all parts side by side."""
        return prediction_panels(
            self.image_HWC, self.truth_HW, self.label_HW, self.confidence_HW, data.class_names, data.colors,
            self.threshold,
        )  # fmt: skip

    def labels(self, ignore_index: int) -> dict[str, Array]:
        """Return the maps of classes by name, (H, W) uint8."""
        labels = {"truth": self.truth_HW, "prediction": self.label_HW}
        if self.threshold is not None:
            labels["pseudo_label"] = np.where(self.confidence_HW >= self.threshold, self.label_HW, ignore_index)
        return {name: label_HW.astype(np.uint8) for name, label_HW in labels.items()}


class PredictionPanels(Callback):
    """Draws image, truth, prediction and confidence of some evaluation images, as files and in the loggers.

    The images are spread evenly over the test set, or over the validation set if there is no test set. Panels are
    written after the test and, on request, of validation images during training. In W&B truth, prediction and (during
    training) pseudo-label are masks to toggle. Only the first process writes.

    Args:
        dirpath: Folder to write to.
        num_images: Number of images.
        every_n_validations: Validations between two sets of panels during training, in ``step_<step>`` below the
            folder; None for none.

    Raises:
        UserError: If that number is not positive.
    """

    def __init__(self, dirpath: str, num_images: int = 8, every_n_validations: int | None = None) -> None:
        if every_n_validations is not None and every_n_validations < 1:
            raise UserError(
                f"expected callbacks.predictions.every_n_validations of at least 1, but got {every_n_validations}; "
                "null switches it off"
            )
        self.dirpath, self.num_images, self.every_n_validations = Path(dirpath), num_images, every_n_validations
        self._validations = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write panels of validation images during training, if they are due."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validations += 1
        if self.every_n_validations is None or self._validations % self.every_n_validations:
            return
        if (data := _data(trainer)) is not None:
            self._write(trainer, pl_module, data, data.val, self.dirpath / f"step_{trainer.global_step:06}", "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write panels of test images."""
        if (data := _data(trainer)) is not None:
            self._write(trainer, pl_module, data, data.test or data.val, self.dirpath, "test")

    def state_dict(self) -> dict[str, Any]:
        """Return the number of validations so far."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self._validations = state_dict["validations"]

    def _write(
        self,
        trainer: Trainer,
        module: LightningModule,
        data: SegmentationData,
        source: ImageSource,
        folder: Path,
        part: str,
    ) -> None:
        if not trainer.is_global_zero or not self.num_images:
            return
        samples = EvalDataset(source, len(data.class_names), data.ignore_index)
        folder.mkdir(parents=True, exist_ok=True)
        chosen = evenly_spaced(range(len(source)), self.num_images)
        threshold = module.hparams["confidence_threshold"] if part == "val" else None
        predicted = [_predict(module, samples[index], source.name(index), threshold) for index in chosen]
        pictures = [item.panels(data) for item in predicted]
        for item, picture in zip(predicted, pictures, strict=True):
            save_panels(picture, folder / f"{item.name.replace('/', '_').rsplit('.', 1)[0]}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _log_masks(logger, part, predicted, data)
            elif isinstance(logger, TensorBoardLogger):
                for item, picture in zip(predicted, pictures, strict=True):
                    tag = f"{part}/{item.name}"
                    logger.experiment.add_image(tag, np.asarray(picture), trainer.global_step, dataformats="HWC")


def _data(trainer: Trainer) -> SegmentationData | None:
    return getattr(getattr(trainer, "datamodule", None), "data", None)


@torch.no_grad()
def _predict(module: LightningModule, sample: dict[str, Any], name: str, threshold: float | None) -> Predicted:
    confidence_BHW, label_BHW = confidence_and_class(module(sample["image"][None].to(module.device)))
    return Predicted(
        name,
        sample["image"].permute(1, 2, 0).numpy(),
        sample["mask"].numpy(),
        label_BHW[0].cpu().numpy(),
        confidence_BHW[0].cpu().numpy(),
        threshold,
    )


def _log_masks(logger: WandbLogger, part: str, predicted: Sequence[Predicted], data: SegmentationData) -> None:
    """Log images to W&B with their masks, and the confidences as gray images, black for 0."""
    classes = {**dict(enumerate(data.class_names)), data.ignore_index: "ignored"}
    masks = [
        {name: {"mask_data": label_HW, "class_labels": classes} for name, label_HW in labels.items()}
        for labels in (item.labels(data.ignore_index) for item in predicted)
    ]
    names = [item.name for item in predicted]
    images: list[Any] = [to_rgb(item.image_HWC) for item in predicted]
    logger.log_image(f"{part}/predictions", images, caption=names, masks=masks)
    grays: list[Any] = [PILImage.fromarray((item.confidence_HW * 255).astype(np.uint8)) for item in predicted]
    logger.log_image(f"{part}/confidence", grays, caption=names)


class ConfusionMatrixPlot(Callback):
    """Draws the confusion matrix of the last validation and of the test, as files and in W&B and TensorBoard.

    The first process writes ``confusion_val.png`` after every validation, replacing the previous one, and
    ``confusion_test.png`` after the test.

    Args:
        dirpath: Folder to write to.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)

    def on_validation_end(self, trainer: Trainer, pl_module: MLPMatch) -> None:  # type: ignore[override]
        """Draw the matrix of a validation during training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._draw(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: MLPMatch) -> None:  # type: ignore[override]
        """Draw the matrix of the test."""
        self._draw(trainer, pl_module, "test")

    def _draw(self, trainer: Trainer, module: MLPMatch, part: str) -> None:
        if trainer.is_global_zero:
            picture = confusion_matrix_plot(module.last_counts_CC.numpy(), module.class_names)
            self.dirpath.mkdir(parents=True, exist_ok=True)
            picture.save(self.dirpath / f"confusion_{part}.png")
            log_image(trainer, f"{part}/confusion", picture)
