"""Losses and their weights: pure functions and small dataclasses. Pure torch."""

from mlpmatch_pl.objective.consistency import consistency_loss
from mlpmatch_pl.objective.criteria import build_criterion, cross_entropy, dice_loss, ohem_cross_entropy
from mlpmatch_pl.objective.pseudo_labels import PseudoLabels
from mlpmatch_pl.objective.volatile import volatile_weight

__all__ = [
    "PseudoLabels",
    "build_criterion",
    "consistency_loss",
    "cross_entropy",
    "dice_loss",
    "ohem_cross_entropy",
    "volatile_weight",
]
