"""Pseudo-labels: the network's confident predictions for the weak views.

Letters: B images, C classes, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PseudoLabels:
    """Targets for the unlabeled views, without gradient.

    Attributes:
        label_BHW: Most probable class, int64.
        confidence_BHW: Its probability, float32 also under autocast (float64 for float64 logits).
        valid_BHW: False on padding, bool.

    Example:
        >>> logits = torch.tensor([4.0, 0.0]).reshape(1, 2, 1, 1)
        >>> pseudo = PseudoLabels.from_logits(logits, torch.ones(1, 1, 1, dtype=torch.bool))
        >>> pseudo.label_BHW.item(), round(pseudo.confidence_BHW.item(), 3)
        (0, 0.982)
    """

    label_BHW: Tensor
    confidence_BHW: Tensor
    valid_BHW: Tensor

    @classmethod
    @torch.no_grad()
    def from_logits(cls, logits_BCHW: Tensor, valid_BHW: Tensor) -> PseudoLabels:
        """Return argmax and maximum of the softmax of logits (B, C, H, W)."""
        logits_BCHW = logits_BCHW.detach()
        if logits_BCHW.dtype in (torch.float16, torch.bfloat16):
            logits_BCHW = logits_BCHW.float()
        highest_BHW, label_BHW = logits_BCHW.max(dim=1)
        # exp(max - logsumexp) is faster than a full softmax.
        return cls(label_BHW, torch.exp(highest_BHW - logits_BCHW.logsumexp(dim=1)), valid_BHW)

    def roll(self, shift: int) -> PseudoLabels:
        """Roll the batch: image ``i`` gets the pseudo-labels of image ``i - shift``."""
        return PseudoLabels(
            self.label_BHW.roll(shift, 0), self.confidence_BHW.roll(shift, 0), self.valid_BHW.roll(shift, 0)
        )

    def flip(self) -> PseudoLabels:
        """Reverse the batch."""
        return PseudoLabels(self.label_BHW.flip(0), self.confidence_BHW.flip(0), self.valid_BHW.flip(0))

    def mix(self, partner: PseudoLabels, inside_BHW: Tensor) -> PseudoLabels:
        """Return pseudo-labels with the partner's inside the CutMix box."""
        return PseudoLabels(
            torch.where(inside_BHW, partner.label_BHW, self.label_BHW),
            torch.where(inside_BHW, partner.confidence_BHW, self.confidence_BHW),
            torch.where(inside_BHW, partner.valid_BHW, self.valid_BHW),
        )

    def counted_BHW(self, threshold: float) -> Tensor:
        """Return which pixels count: valid and with a confidence of at least ``threshold``, bool."""
        return self.valid_BHW & (self.confidence_BHW >= threshold)

    def confident_ratio(self, threshold: float) -> Tensor:
        """Return the fraction of valid pixels that count, a scalar from 0 to 1 (0 if none is valid)."""
        return self.counted_BHW(threshold).sum() / self.valid_BHW.sum().clamp_min(1)
