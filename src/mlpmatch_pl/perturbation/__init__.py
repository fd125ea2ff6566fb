"""The three levels of perturbation: input, feature, network. Pure torch."""

from mlpmatch_pl.perturbation.feature import FeaturePerturbation
from mlpmatch_pl.perturbation.input import CutMix
from mlpmatch_pl.perturbation.network import NetworkPerturbation, bypass, deactivate, has_shortcut

__all__ = ["CutMix", "FeaturePerturbation", "NetworkPerturbation", "bypass", "deactivate", "has_shortcut"]
