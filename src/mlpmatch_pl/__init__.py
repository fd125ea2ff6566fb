"""Semi-supervised semantic segmentation with MLPMatch, as PyTorch Lightning modules.

Public names are imported on first use, so ``import mlpmatch_pl`` loads neither torch nor Lightning.
"""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
    from mlpmatch_pl.data.datasets.folder import folder
    from mlpmatch_pl.data.datasets.shapes import shapes
    from mlpmatch_pl.module import MLPMatch
    from mlpmatch_pl.perturbation import CutMix, FeaturePerturbation, NetworkPerturbation
    from mlpmatch_pl.predictor import load
    from mlpmatch_pl.segmentor import Segmentor
    from mlpmatch_pl.utils.errors import UserError

    __version__: str
else:  # a __getattr__ that type checkers see would make every name valid
    _MODULES = {
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

    def __getattr__(name):  # noqa: ANN001, ANN202
        if name == "__version__":
            from importlib.metadata import version

            return version("mlpmatch_pl")
        if name in _MODULES:
            from importlib import import_module

            return getattr(import_module(f"mlpmatch_pl.{_MODULES[name]}"), name)
        raise AttributeError(f"module 'mlpmatch_pl' has no attribute {name!r}")

    def __dir__():  # noqa: ANN202
        return __all__
