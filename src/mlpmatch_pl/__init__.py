"""Semi-supervised semantic segmentation with MLPMatch, as PyTorch Lightning modules.

Importing the package is light: names are loaded when they are first used.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
    from mlpmatch_pl.data.datasets.folder import folder
    from mlpmatch_pl.data.datasets.shapes import shapes
    from mlpmatch_pl.module import MLPMatch
    from mlpmatch_pl.perturbation import CutMix, FeaturePerturbation, NetworkPerturbation
    from mlpmatch_pl.predictor import load
    from mlpmatch_pl.segmentor import Segmentor
    from mlpmatch_pl.utils.errors import UserError

__all__ = [
    "CutMix",
    "FeaturePerturbation",
    "MLPMatch",
    "NetworkPerturbation",
    "Segmentor",
    "SemiSupervisedDataModule",
    "UserError",
    "__version__",
    "folder",
    "load",
    "shapes",
]

_HOMES = {
    "CutMix": "perturbation",
    "FeaturePerturbation": "perturbation",
    "MLPMatch": "module",
    "NetworkPerturbation": "perturbation",
    "Segmentor": "segmentor",
    "SemiSupervisedDataModule": "data.datamodule",
    "UserError": "utils.errors",
    "folder": "data.datasets.folder",
    "load": "predictor",
    "shapes": "data.datasets.shapes",
}

try:
    __version__ = version("mlpmatch_pl")
except PackageNotFoundError:  # used from a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"mlpmatch_pl.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mlpmatch_pl' has no attribute {name!r}")
