"""CutMix partners of the unlabeled images: another image of the batch, or another view of the same image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlpmatch_pl.methods.pseudo_labels import PseudoLabels
from mlpmatch_pl.perturbation.input import partner_shift
from mlpmatch_pl.segmentor import Segmentor
from mlpmatch_pl.segmentor.blocks import eval_mode

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Partner:
    """What CutMix pastes.

    Attributes:
        strong_BV3HW: Strong views of the partners.
        labels: Returns the partners' pseudo-labels, given those of the batch.
    """

    strong_BV3HW: Tensor
    labels: Callable[[PseudoLabels], PseudoLabels]


class BatchPartner:
    """The partner is another image of the batch, which needs no extra images and no extra pass."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, unlabeled: Batch, step: int) -> Partner:
        """Pair every image with a different one of the batch."""
        shift = partner_shift(len(unlabeled["weak"]), self.seed, step)
        return Partner(unlabeled["strong"].roll(shift, 0), lambda pseudo: pseudo.roll(shift))


class FlippedPartner:
    """The partner is the image at the same place from the end of the batch, as in UniMatch V2.

    The middle image of an odd batch is its own partner.
    """

    def __call__(self, unlabeled: Batch, step: int) -> Partner:
        """Pair the first image with the last, and so on."""
        return Partner(unlabeled["strong"].flip(0), PseudoLabels.flip)


class SameImagePartner:
    """The partner is a second view of the same image, labeled in eval mode as in the authors' code."""

    def __init__(self, segmentor: Segmentor) -> None:
        self.segmentor = segmentor

    def __call__(self, unlabeled: Batch, step: int) -> Partner:
        """Predict pseudo-labels for the second views."""
        partner = unlabeled["partner"]
        with eval_mode(self.segmentor), torch.no_grad():
            labels = PseudoLabels.from_logits(self.segmentor(partner["weak"]), partner["valid"])
        return Partner(partner["strong"], lambda pseudo: labels)
