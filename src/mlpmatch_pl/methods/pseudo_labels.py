"""Pseudo labels: what the network says of a weak view, how sure it is, and where it counts.

Letters: B images, C classes, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PseudoLabels:
    """Targets for the unlabeled views. They never carry a gradient.

    Attributes:
        label_BHW: int64, the most probable class.
        confidence_BHW: Its probability, float32 (float64 for float64 logits), whatever the autocast.
        valid_BHW: bool, False on padding.

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
        """Take the argmax, and the softmax maximum as exp(max - logsumexp), which is faster than a softmax."""
        logits_BCHW = logits_BCHW.detach()
        if logits_BCHW.dtype in (torch.float16, torch.bfloat16):
            logits_BCHW = logits_BCHW.float()
        highest_BHW, label_BHW = logits_BCHW.max(dim=1)
        return cls(label_BHW, torch.exp(highest_BHW - logits_BCHW.logsumexp(dim=1)), valid_BHW)

    def roll(self, shift: int) -> PseudoLabels:
        """Give every image the labels of the image ``shift`` places before it in the batch."""
        return PseudoLabels(
            self.label_BHW.roll(shift, 0), self.confidence_BHW.roll(shift, 0), self.valid_BHW.roll(shift, 0)
        )

    def mix(self, partner: PseudoLabels, inside_BHW: Tensor) -> PseudoLabels:
        """Take label, confidence and validity from the partner inside the CutMix box."""
        return PseudoLabels(
            torch.where(inside_BHW, partner.label_BHW, self.label_BHW),
            torch.where(inside_BHW, partner.confidence_BHW, self.confidence_BHW),
            torch.where(inside_BHW, partner.valid_BHW, self.valid_BHW),
        )

    def counted_BHW(self, threshold: float) -> Tensor:
        """Return where the label counts: valid, and at least as confident as the threshold."""
        return self.valid_BHW & (self.confidence_BHW >= threshold)

    def confident_ratio(self, threshold: float) -> Tensor:
        """Return the share of the valid pixels that count, a scalar from 0 to 1 (0 when none is valid)."""
        return self.counted_BHW(threshold).sum() / self.valid_BHW.sum().clamp_min(1)
