"""Diagnostics during training: quality of the pseudo-labels, the fitting gap, and the deactivated blocks.

Masks of unlabeled images, if there are any, are read only here and never for training.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image as PILImage
from torch import Tensor

from mlpmatch_pl.callbacks.images import log_image
from mlpmatch_pl.data.base import SegmentationData, has_mask
from mlpmatch_pl.data.dataset import EvalDataset
from mlpmatch_pl.evaluation import Scores, confidence_and_class, confusion_matrix
from mlpmatch_pl.methods.batch import split_batch
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.seeding import evenly_spaced
from mlpmatch_pl.visualization.plots import bar_plot

log = logging.getLogger(__name__)


class PseudoLabelDiagnostics(Callback):
    """Compares predictions on fixed training images with the truth, after each validation, on the first process.

    Logs fractions, 0..1: ``pseudo/labeled_acc`` and ``pseudo/unlabeled_acc`` (all pixels), ``pseudo/fitting_gap``
    (their difference, which volatile learning is meant to reduce), ``pseudo/confident_ratio`` and
    ``pseudo/confident_acc`` (the unlabeled pixels that would become pseudo-labels), and ``pseudo/precision/<class>``
    among these. If the unlabeled images have no masks, only the first is logged.

    Args:
        num_images: Number of labeled images, and of unlabeled ones, spread evenly over each set.
    """

    def __init__(self, num_images: int = 16) -> None:
        self.num_images = num_images

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        data = getattr(getattr(trainer, "datamodule", None), "data", None)
        if data is None or trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.is_global_zero:
            return
        metrics = {"epoch": trainer.current_epoch, **self.measure(pl_module, data)}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step - 1)  # the step of Lightning's validation metrics

    def measure(self, module: Any, data: SegmentationData) -> dict[str, float]:
        """Return the metrics by name."""
        threshold, num_classes = module.hparams["confidence_threshold"], len(data.class_names)
        labeled = _counts(module, data, evenly_spaced(data.labeled_indices, self.num_images), threshold)
        metrics = {"pseudo/labeled_acc": Scores.of(labeled.all_CC).accuracy}
        chosen = [index for index in data.unlabeled if has_mask(data.train, index)]
        if not chosen:
            return metrics
        unlabeled = _counts(module, data, evenly_spaced(chosen, self.num_images), threshold)
        accuracy = Scores.of(unlabeled.all_CC).accuracy
        metrics |= {
            "pseudo/unlabeled_acc": accuracy,
            "pseudo/fitting_gap": metrics["pseudo/labeled_acc"] - accuracy,
            "pseudo/confident_ratio": unlabeled.confident / max(unlabeled.pixels, 1),
            "pseudo/confident_acc": Scores.of(unlabeled.confident_CC).accuracy,
        }
        precision_C = unlabeled.confident_CC.diag() / unlabeled.confident_CC.sum(0)
        metrics |= {
            f"pseudo/precision/{data.class_names[label]}": float(precision_C[label]) for label in range(num_classes)
        }
        return {name: value for name, value in metrics.items() if value == value}


class DeactivatedBlocks(Callback):
    """Counts how often each block is deactivated, for the loggers after every validation and in files at the end.

    Args:
        dirpath: Folder for deactivated.json and deactivated.png.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)
        self.counts: Counter[str] = Counter()
        self.steps = 0
        self._logged = 0  # steps in the last logged chart

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Repeat the step's draw, which is a function of the seed and the step; there is none during burn-in."""
        self.steps += 1
        if split_batch(batch)[1]:
            self.counts.update(map(str, sorted(pl_module.deactivated_blocks(batch_idx))))

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log the counts so far."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.is_global_zero and self.counts:
            self._log(trainer, self._chart(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the counts by block, in the encoder's order, and by stage, and their chart."""
        stages = pl_module.segmentor.encoder.stages
        if not trainer.is_global_zero or not self.counts:
            return
        by_block = {str(block): self.counts[str(block)] for stage in stages for block in stage}
        by_stage = [sum(self.counts[str(block)] for block in stage) for stage in stages]
        report = {"steps": self.steps, "blocks": by_block, "stages": by_stage}
        (self.dirpath / "deactivated.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        chart = self._chart(pl_module)
        chart.save(self.dirpath / "deactivated.png")
        if self._logged < self.steps:
            self._log(trainer, chart)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts so far."""
        return {"counts": dict(self.counts), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self.counts, self.steps = Counter(state_dict["counts"]), state_dict["steps"]

    def _chart(self, module: Any) -> PILImage.Image:
        stages = module.segmentor.encoder.stages
        groups = [[(str(block), self.counts[str(block)]) for block in stage] for stage in stages]
        title = f"how often each block was deactivated in {self.steps} steps; colors: stages"
        return bar_plot(groups, title, "block of the encoder", "steps")

    def _log(self, trainer: Trainer, chart: PILImage.Image) -> None:
        log_image(trainer, "train/deactivated_blocks", chart)
        self._logged = self.steps


class _Counts:
    """Confusion matrices of all pixels and of the confident ones, and their numbers."""

    def __init__(self, num_classes: int) -> None:
        self.all_CC = torch.zeros(num_classes, num_classes, dtype=torch.long)
        self.confident_CC = self.all_CC.clone()
        self.pixels = self.confident = 0

    def add(self, truth_BHW: Tensor, label_BHW: Tensor, confidence_BHW: Tensor, threshold: float) -> None:
        """Count an image."""
        is_confident = confidence_BHW >= threshold
        ignored = torch.full_like(truth_BHW, -1)
        num_classes = len(self.all_CC)
        self.all_CC += confusion_matrix(label_BHW, truth_BHW, num_classes)
        self.confident_CC += confusion_matrix(label_BHW, torch.where(is_confident, truth_BHW, ignored), num_classes)
        self.pixels += is_confident.numel()
        self.confident += int(is_confident.sum())


@torch.no_grad()
def _counts(module: Any, data: SegmentationData, indices: Sequence[int], threshold: float) -> _Counts:
    images, counts = EvalDataset(data.train, len(data.class_names), data.ignore_index), _Counts(len(data.class_names))
    for index in indices:
        try:
            sample = images[index]
        except (UserError, OSError) as error:  # masks of unlabeled images are not validated
            log.warning("%s is left out of the diagnostics: %s", data.train.name(index), error)
            continue
        confidence_BHW, label_BHW = confidence_and_class(module(sample["image"][None].to(module.device)))
        counts.add(sample["mask"][None].long(), label_BHW.cpu(), confidence_BHW.cpu(), threshold)
    return counts
