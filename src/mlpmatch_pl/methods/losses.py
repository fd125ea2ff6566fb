"""Losses for the labeled and the unlabeled terms.

Every loss maps logits (B, C, H, W) and a target (B, H, W) to a scalar. Pixels with the ignore index do not count. If
all pixels are ignored, the loss is 0 with zero gradient instead of NaN.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlpmatch_pl.methods.pseudo_labels import PseudoLabels
from mlpmatch_pl.utils.errors import UserError, suggest

Criterion = Callable[[Tensor, Tensor], Tensor]
"""A loss of the labeled terms."""


def cross_entropy(
    logits_BCHW: Tensor, mask_BHW: Tensor, ignore_index: int = 255, class_weights_C: Tensor | None = None
) -> Tensor:
    """Return the mean cross entropy over the pixels that are not ignored.

    Args:
        logits_BCHW: Logits, (B, C, H, W).
        mask_BHW: Classes or the ignore index, uint8 or int64, (B, H, W).
        ignore_index: Mask value of ignored pixels.
        class_weights_C: Weight of each class, (C,), for a weighted mean as in torch.

    Example:
        >>> logits = torch.zeros(1, 2, 1, 2)
        >>> round(cross_entropy(logits, torch.tensor([[[0, 255]]])).item(), 4)
        0.6931
        >>> cross_entropy(logits, torch.tensor([[[255, 255]]])).item()
        0.0
    """
    mask_BHW = mask_BHW.long()
    # Summed here because torch's own reduction is nondeterministic on a GPU: trainer.deterministic=true refuses it.
    loss_BHW = F.cross_entropy(logits_BCHW, mask_BHW, class_weights_C, ignore_index=ignore_index, reduction="none")
    loss = loss_BHW.sum()
    valid_BHW = mask_BHW != ignore_index
    if class_weights_C is None:
        return loss / valid_BHW.sum().clamp_min(1)
    weight = (class_weights_C[mask_BHW.where(valid_BHW, 0)] * valid_BHW).sum()
    return loss / weight.where(weight > 0, torch.ones_like(weight))


def ohem_cross_entropy(
    logits_BCHW: Tensor, mask_BHW: Tensor, ignore_index: int = 255, threshold: float = 0.7, min_kept: int = 100_000
) -> Tensor:
    """Return the mean cross entropy over hard pixels (online hard example mining, as UniMatch uses it for Cityscapes).

    A pixel counts when the probability of its true class is at most
    ``max(threshold, the min_kept-th smallest such probability in the batch)``. With fewer than ``min_kept``
    pixels that are not ignored, all of them count.

    Args:
        logits_BCHW: Logits, (B, C, H, W).
        mask_BHW: Classes or the ignore index, (B, H, W).
        ignore_index: Mask value of ignored pixels.
        threshold: Largest probability of a hard pixel, from 0 to 1.
        min_kept: Minimum number of pixels to keep in the batch.

    Example:
        >>> logits = torch.tensor([[[[9.0, 0.0]], [[0.0, 0.0]]]])  # p(true class 0): 0.9999, 0.5
        >>> round(ohem_cross_entropy(logits, torch.tensor([[[0, 0]]]), min_kept=1).item(), 4)
        0.6931
    """
    mask_BHW = mask_BHW.long()
    valid_N = (mask_BHW != ignore_index).flatten()
    loss_N = F.cross_entropy(logits_BCHW, mask_BHW, ignore_index=ignore_index, reduction="none").flatten()
    # exp(-CE) is the probability of the true class; 2 keeps ignored pixels out of the smallest.
    probability_N = torch.exp(-loss_N.detach()).masked_fill(~valid_N, 2.0)
    # kthvalue runs in a single thread block on a GPU and is nondeterministic, so trainer.deterministic=true refuses it.
    kth = probability_N.topk(min(min_kept, probability_N.numel()), largest=False, sorted=False).values.max()
    limit = torch.where(valid_N.sum() < min_kept, torch.full_like(kth, 2.0), kth.clamp_min(threshold))
    kept_N = valid_N & (probability_N <= limit)
    return (loss_N * kept_N).sum() / kept_N.sum().clamp_min(1)


def dice_loss(logits_BCHW: Tensor, mask_BHW: Tensor, ignore_index: int = 255) -> Tensor:
    """Return the soft Dice loss: one minus the mean Dice over the classes in the masks of the batch.

    Args:
        logits_BCHW: Logits, (B, C, H, W).
        mask_BHW: Classes or the ignore index, (B, H, W).
        ignore_index: Mask value of ignored pixels.

    Returns:
        A scalar from 0 to 1; 0 if all pixels are ignored.

    Example:
        >>> logits = torch.tensor([[[[20.0]], [[-20.0]]]])
        >>> round(dice_loss(logits, torch.tensor([[[0]]])).item(), 4)
        0.0
    """
    num_classes = logits_BCHW.shape[1]
    valid_BHW = mask_BHW != ignore_index
    truth_BCHW = F.one_hot(mask_BHW.long().where(valid_BHW, 0), num_classes).movedim(-1, 1) * valid_BHW[:, None]
    probability_BCHW = logits_BCHW.softmax(dim=1) * valid_BHW[:, None]
    overlap_C = (probability_BCHW * truth_BCHW).sum((0, 2, 3))
    size_C = (probability_BCHW + truth_BCHW).sum((0, 2, 3))
    present_C = truth_BCHW.sum((0, 2, 3)) > 0
    missed_C = 1 - 2 * overlap_C / size_C.clamp_min(torch.finfo(size_C.dtype).tiny)
    return (missed_C * present_C).sum() / present_C.sum().clamp_min(1)


class SupervisedCriterion(nn.Module):
    """A labeled loss with its options bound.

    Args:
        function: One of the functions above.
        ignore_index: Mask value of ignored pixels.
        options: Keyword arguments of the function.
        class_weights: Weight of each class, for cross entropy only.
        dice_weight: Weight of an additional Dice loss.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        ignore_index: int,
        options: Mapping[str, Any],
        class_weights: Sequence[float] | None = None,
        dice_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.function, self.ignore_index, self.options, self.dice_weight = function, ignore_index, options, dice_weight
        weights = None if class_weights is None else torch.tensor([float(weight) for weight in class_weights])
        self.register_buffer("class_weights_C", weights, persistent=False)

    def forward(self, logits_BCHW: Tensor, mask_BHW: Tensor) -> Tensor:
        """Return the scalar loss for logits (B, C, H, W) and a mask (B, H, W)."""
        weights = {} if self.class_weights_C is None else {"class_weights_C": self.class_weights_C}
        loss = self.function(logits_BCHW, mask_BHW, self.ignore_index, **weights, **self.options)
        if self.dice_weight:
            loss = loss + self.dice_weight * dice_loss(logits_BCHW, mask_BHW, self.ignore_index)
        return loss


_OPTIONS: dict[str, set[str]] = {
    "ce": {"class_weights", "dice_weight"},
    "ohem": {"threshold", "min_kept", "dice_weight"},
    "dice": set(),
}


def build_criterion(spec: str | Mapping[str, Any], num_classes: int, ignore_index: int = 255) -> SupervisedCriterion:
    """Build the loss of the labeled terms from plain data.

    Args:
        spec: ``"ce"``, ``"ohem"`` or ``"dice"``, or a mapping with that ``name`` and its options:
            ``class_weights`` (ce), ``threshold`` and ``min_kept`` (ohem), ``dice_weight`` (ce, ohem).
        num_classes: Number of classes.
        ignore_index: Mask value of ignored pixels.

    Raises:
        UserError: If the name or an option is unknown, or the number of class weights is not ``num_classes``.

    Example:
        >>> criterion = build_criterion({"name": "ohem", "min_kept": 10}, num_classes=3)
        >>> criterion(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.uint8)).item() > 0
        True
    """
    options: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", "ce")
    if name not in _OPTIONS:
        raise UserError(f"expected a criterion of {', '.join(_OPTIONS)}, but got {name!r}." + suggest(name, _OPTIONS))
    if unknown := sorted(set(options) - _OPTIONS[name]):
        raise UserError(
            f"criterion {name} takes {', '.join(sorted(_OPTIONS[name])) or 'no options'}, but got {', '.join(unknown)}"
        )
    class_weights = options.pop("class_weights", None)
    if class_weights is not None and len(class_weights) != num_classes:
        raise UserError(f"expected {num_classes} class weights, one per class, but got {len(class_weights)}")
    if "min_kept" in options:
        if options["min_kept"] < 1:
            raise UserError(f"expected min_kept of at least 1 pixel, but got {options['min_kept']}")
        options["min_kept"] = int(options["min_kept"])
    dice_weight = float(options.pop("dice_weight", 0.0))
    functions: dict[str, Callable[..., Tensor]] = {"ce": cross_entropy, "ohem": ohem_cross_entropy, "dice": dice_loss}
    return SupervisedCriterion(functions[name], ignore_index, options, class_weights, dice_weight)


def consistency_loss(logits_BCHW: Tensor, pseudo: PseudoLabels, threshold: float) -> Tensor:
    """Return the cross entropy with pseudo-labels: ``sum(CE * confident) / number of valid pixels``.

    As in UniMatch and MLPMatch, the sum is divided by the number of valid pixels rather than confident ones, so that
    batches with few confident pixels have little weight.

    Args:
        logits_BCHW: Prediction for a perturbed view, (B, C, H, W).
        pseudo: Pseudo-labels from the weak view, (B, H, W).
        threshold: Minimum confidence (tau).

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
