"""What is collected beside the confusion matrix while testing: the score of each image, and boundaries."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image as PILImage
from torch import Tensor, nn
from torchmetrics import Metric

from mlpmatch_pl.commands.evaluate.dataset import EvaluatedPart
from mlpmatch_pl.commands.evaluate.outputs import draw_worst
from mlpmatch_pl.evaluation import SlidingWindowInference, predict_logits
from mlpmatch_pl.evaluation.boundary import boundary_counts
from mlpmatch_pl.evaluation.calibration import Calibration, CalibrationError
from mlpmatch_pl.evaluation.confusion import image_confusion_matrices
from mlpmatch_pl.module import MLPMatch


class ImageScores(Metric):
    """Mean IoU of each image, and boundary counts over all of them; summed over processes.

    Args:
        num_images: Number of images in the dataset.
        num_classes: Number of classes.
        boundary: Distance of the boundary IoU as a share of the diagonal; None to omit it.

    Example:
        >>> metric = ImageScores(2, 2, boundary=None)
        >>> metric.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]]), torch.tensor([1]))
        >>> metric.compute()[0].tolist()
        [nan, 0.25]
    """

    full_state_update = False
    areas_N2C: Tensor
    boundary_3C: Tensor

    def __init__(self, num_images: int, num_classes: int, boundary: float | None) -> None:
        super().__init__()
        self.num_classes, self.boundary = num_classes, boundary
        # Intersection and union
        self.add_state("areas_N2C", torch.zeros(num_images, 2, num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("boundary_3C", torch.zeros(3, num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, label_BHW: Tensor, mask_BHW: Tensor, index_B: Tensor) -> None:
        """Add a batch of images with these indices, or of parts of images."""
        matrices_BCC = image_confusion_matrices(label_BHW, mask_BHW, self.num_classes)
        hit_BC = matrices_BCC.diagonal(dim1=1, dim2=2)
        union_BC = matrices_BCC.sum(2) + matrices_BCC.sum(1) - hit_BC
        self.areas_N2C.index_add_(0, index_B, torch.stack([hit_BC, union_BC], dim=1))
        if self.boundary is not None:
            self.boundary_3C += boundary_counts(label_BHW, mask_BHW, self.num_classes, self.boundary)

    def compute(self) -> tuple[Tensor, Tensor | None]:
        """Return the mean IoU of each image, (N,), and the boundary counts, (3, C); NaN for images without pixels."""
        miou_N = (self.areas_N2C[:, 0] / self.areas_N2C[:, 1]).nanmean(dim=1)
        return miou_N, None if self.boundary is None else self.boundary_3C


class RecordedInference:
    """Inference that keeps the logits of the last batch, or the logarithms of its probabilities."""

    logits_BCHW: Tensor

    def __init__(self, inference: SlidingWindowInference) -> None:
        self.inference = inference

    def label(self, segmentor: nn.Module, image_BCHW: Tensor) -> Tensor:
        """Return the class of each pixel, (B, H, W)."""
        if self.inference.mode == "whole" and self.inference.has_one_view:
            self.logits_BCHW = predict_logits(segmentor, image_BCHW)
        else:
            self.logits_BCHW = self.inference(segmentor, image_BCHW).clamp_min(1e-12).log()
        return self.logits_BCHW.argmax(dim=1)


class CollectScores(Callback):
    """Collects `ImageScores` and confidences while testing, and draws the worst images at the end.

    Args:
        part: What is tested.
        boundary: See `ImageScores`.
        num_worst: Number of images to draw, without those that are read in blocks.
        calibration: Pixels of each image to compare confidences with; None to omit it.
        in_blocks: Indices of the images that are read in blocks.

    Attributes:
        miou_N: Mean IoU of each image, on the CPU.
        boundary_3C: Boundary counts, on the CPU; None if omitted.
        calibration: How far confidences can be trusted; None if omitted.
        worst: Indices of the images with the lowest mean IoU, lowest first.
        seconds: Duration of the test, without the start of processes.
        picture: These images; None if there are none, and in all processes but the first.
    """

    miou_N: Tensor
    boundary_3C: Tensor | None
    worst: list[int]
    seconds: float
    picture: PILImage.Image | None = None
    calibration: Calibration | None = None

    def __init__(
        self,
        part: EvaluatedPart,
        boundary: float | None,
        num_worst: int,
        calibration: int | None = None,
        in_blocks: Collection[int] = (),
    ) -> None:
        self.part, self.num_worst, self.in_blocks = part, num_worst, in_blocks
        self.metric = ImageScores(part.split["count"], len(part.data.class_names), boundary)
        self.errors = CalibrationError(calibration) if calibration and not in_blocks else None

    def on_test_start(self, trainer: Trainer, pl_module: MLPMatch) -> None:  # type: ignore[override]
        """Count on the module's device, from now on."""
        self.metric.to(pl_module.device)
        if self.errors is not None:
            self.errors.to(pl_module.device)
            self.recorded = pl_module.inference = RecordedInference(pl_module.inference)  # type: ignore[assignment]
        self._started = time.monotonic()

    def on_test_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: Tensor, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch; the module's test step returns the class of each pixel."""
        self.metric.update(outputs, batch["mask"], batch["index"])
        if self.errors is not None:
            self.errors.update(self.recorded.logits_BCHW, batch["mask"])

    def on_test_end(self, trainer: Trainer, pl_module: MLPMatch) -> None:  # type: ignore[override]
        """Gather the scores of all processes; the first one draws."""
        miou_N, boundary_3C = self.metric.compute()
        self.miou_N = miou_N.reshape(-1).cpu()  # torchmetrics makes a scalar of one element
        self.boundary_3C = None if boundary_3C is None else boundary_3C.cpu()
        if self.errors is not None:
            self.calibration, pl_module.inference = self.errors.compute(), self.recorded.inference
        self.seconds = time.monotonic() - self._started
        self.worst = lowest(self.miou_N, self.num_worst)
        drawn = [index for index in self.worst if index not in self.in_blocks]
        if drawn and trainer.is_global_zero:
            self.picture = draw_worst(pl_module, self.part, drawn, self.miou_N)


def lowest(miou_N: Tensor, number: int) -> list[int]:
    """Return the indices of the lowest values, lowest first, without NaN.

    Example:
        >>> lowest(torch.tensor([0.5, float("nan"), 0.1, 0.9]), 2)
        [2, 0]
    """
    order = miou_N.argsort(stable=True).tolist()  # NaN is last
    return [index for index in order[:number] if not miou_N[index].isnan()]
