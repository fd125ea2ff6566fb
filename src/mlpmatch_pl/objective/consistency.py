"""The loss of every unlabeled term."""

import torch.nn.functional as F
from torch import Tensor

from mlpmatch_pl.objective.pseudo_labels import PseudoLabels


def consistency_loss(logits_BCHW: Tensor, pseudo: PseudoLabels, threshold: float) -> Tensor:
    """Cross entropy with the pseudo labels: ``sum(CE * counted) / number of valid pixels``.

    Divided by the valid pixels, not by the confident ones, so that an unsure batch weighs little
    (UniMatch and MLPMatch). With no valid pixel it is zero, with zero gradient.

    Args:
        logits_BCHW: Prediction on a perturbed view, (B, C, H, W).
        pseudo: Labels, confidences and validity of the weak view, (B, H, W).
        threshold: Least confidence that counts (tau).

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 2, 1, 2)
        >>> pseudo = PseudoLabels(torch.zeros(1, 1, 2, dtype=torch.long), torch.tensor([[[0.99, 0.5]]]),
        ...                       torch.ones(1, 1, 2, dtype=torch.bool))
        >>> round(consistency_loss(logits, pseudo, 0.95).item(), 4)  # ln(2) / 2
        0.3466
    """
    loss_BHW = F.cross_entropy(logits_BCHW, pseudo.label_BHW, reduction="none")
    return (loss_BHW * pseudo.counted_BHW(threshold)).sum() / pseudo.valid_BHW.sum().clamp_min(1)
