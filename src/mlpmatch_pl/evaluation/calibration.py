"""How far confidences can be trusted: temperature scaling, calibration errors, and an estimate of mIoU without masks.

Temperature scaling and the expected calibration error: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural
Networks" (ICML 2017), equations 3 and 9.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

BINS = 15
TEMPERATURES = torch.logspace(-1, 3, 81, base=2.0, dtype=torch.float64)  # 0.5 to 8 in steps of 3.5 %

_EXPECTED_SHARE = 0.001  # of the pixels, from which on a class is taken to be in the images


class Calibration(NamedTuple):
    """Confidences compared with the share of pixels that are right.

    Attributes:
        temperature: Divisor of the logits that fits the masks best.
        ece: Expected calibration error, 0..1: the mean difference of confidence and accuracy over the bins.
        fitted_ece: The same at that temperature.
        count_B: Pixels in each of 15 bins of equal width from confidence 0 to 1.
        confidence_B: Their mean confidence; NaN in empty bins.
        accuracy_B: The share of them that is right; NaN in empty bins.
    """

    temperature: float
    ece: float
    fitted_ece: float
    count_B: Tensor
    confidence_B: Tensor
    accuracy_B: Tensor


class CalibrationError(Metric):
    """Collects pixels, some of each image, at all candidate temperatures; summed over processes.

    Args:
        pixels: Most pixels per image, spread evenly over those with a class.

    Example:
        >>> metric = CalibrationError(pixels=1000)
        >>> logits = torch.tensor([2.0, 0.0]).log().nan_to_num(neginf=-9.0).reshape(1, 2, 1, 1).expand(1, 2, 10, 10)
        >>> metric.update(logits, torch.zeros(1, 10, 10, dtype=torch.long))
        >>> result = metric.compute()
        >>> result.temperature, round(result.ece, 3)
        (0.5, 0.0)
    """

    full_state_update = False
    nll_T: Tensor
    bins_T3B: Tensor

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels
        self.add_state("nll_T", torch.zeros(len(TEMPERATURES), dtype=torch.float64), dist_reduce_fx="sum")
        bins_T3B = torch.zeros(len(TEMPERATURES), 3, BINS, dtype=torch.float64)  # count, confidence, right
        self.add_state("bins_T3B", bins_T3B, dist_reduce_fx="sum")

    def update(self, logits_BCHW: Tensor, mask_BHW: Tensor) -> None:
        """Add a batch.

        Args:
            logits_BCHW: Logits, or logarithms of probabilities, (B, C, H, W).
            mask_BHW: Masks; pixels that are no class are left out.
        """
        for logits_CHW, mask_HW in zip(logits_BCHW, mask_BHW.long(), strict=True):
            inside_N = ((mask_HW >= 0) & (mask_HW < len(logits_CHW))).flatten().nonzero()[:, 0]
            step = max(len(inside_N) // self.pixels, 1)
            chosen_P = inside_N[::step][: self.pixels]
            self._add(logits_CHW.flatten(1).T[chosen_P].float(), mask_HW.flatten()[chosen_P])

    def _add(self, logits_PC: Tensor, truth_P: Tensor) -> None:
        right_P = logits_PC.argmax(1) == truth_P
        for number, temperature in enumerate(TEMPERATURES.tolist()):
            log_PC = (logits_PC / temperature).log_softmax(1)
            self.nll_T[number] -= log_PC.gather(1, truth_P[:, None]).sum()
            confidence_P = log_PC.max(1).values.exp().double()
            bin_P = (confidence_P * BINS).long().clamp(0, BINS - 1)
            for row, weight_P in enumerate((torch.ones_like(confidence_P), confidence_P, right_P.double())):
                self.bins_T3B[number, row] += torch.bincount(bin_P, weight_P, minlength=BINS)

    def compute(self) -> Calibration:
        """Return the calibration at temperature 1, and the temperature of the lowest negative log-likelihood."""
        best, plain = int(self.nll_T.argmin()), int((TEMPERATURES - 1).abs().argmin())
        count_B, confidence_B, right_B = self.bins_T3B[plain].cpu()
        return Calibration(
            float(TEMPERATURES[best]), _ece(self.bins_T3B[plain]), _ece(self.bins_T3B[best]),
            count_B.long(), confidence_B / count_B, right_B / count_B,
        )  # fmt: skip


def _ece(bins_3B: Tensor) -> float:
    count_B, confidence_B, right_B = bins_3B
    return float((confidence_B - right_B).abs().sum() / count_B.sum())


def temper(probability_CHW: Tensor, temperature: float) -> Tensor:
    """Return probabilities whose logits are divided by a temperature; the order of classes stays.

    Args:
        probability_CHW: Probabilities over the first axis.
        temperature: Above 0; 1 changes nothing.

    Example:
        >>> temper(torch.tensor([0.8, 0.2]), 2.0)
        tensor([0.6667, 0.3333])
    """
    return probability_CHW if temperature == 1 else (probability_CHW.log() / temperature).softmax(dim=0)


class MiouEstimate:
    """Estimates the mIoU of predictions without masks, from their probabilities.

    If probabilities are calibrated, ``p_c`` is the chance that a pixel is of class ``c``, so sums of them are the
    expected intersection and area of each class. A class that is predicted nowhere counts, with 0, if at least 0.1 % of
    the pixels are expected to be of it. The estimate is as good as the calibration: on images unlike those of the
    training it is too high.

    Example:
        >>> estimate = MiouEstimate(2)
        >>> estimate.add(torch.tensor([0.9, 0.1]).reshape(2, 1, 1).expand(2, 4, 4))
        >>> round(estimate.miou, 3)  # the mean of 0.9 and 0, as class 1 is predicted nowhere
        0.45
    """

    def __init__(self, num_classes: int) -> None:
        self.hit_C, self.truth_C, self.predicted_C = torch.zeros(3, num_classes, dtype=torch.float64)

    def add(self, probability_CHW: Tensor) -> None:
        """Add an image's probabilities, (C, H, W)."""
        confidence_HW, label_HW = probability_CHW.max(dim=0)
        classes, flat = len(self.hit_C), label_HW.flatten()
        self.hit_C += torch.bincount(flat, confidence_HW.flatten().double(), classes).cpu()
        self.predicted_C += torch.bincount(flat, minlength=classes).cpu()
        self.truth_C += probability_CHW.sum(dim=(1, 2), dtype=torch.float64).cpu()

    @property
    def miou(self) -> float:
        """The mean over the classes that are predicted or expected; NaN without images."""
        iou_C = self.hit_C / (self.predicted_C + self.truth_C - self.hit_C)
        expected_C = self.truth_C >= _EXPECTED_SHARE * self.predicted_C.sum()
        return float(iou_C[(self.predicted_C > 0) | expected_C].mean())
