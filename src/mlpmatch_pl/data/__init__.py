"""From files to batches: sources, splits, views, samplers, validation, and the data module.

Names are imported when they are first used. The dataset functions are in `mlpmatch_pl.data.datasets`; ``folder`` and
``shapes`` can also be imported from `mlpmatch_pl`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers then report unknown names
    from mlpmatch_pl.data.base import ImageSource, SegmentationData
    from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
    from mlpmatch_pl.data.transforms.strong import StrongView
    from mlpmatch_pl.data.transforms.weak import WeakView

__all__ = ["ImageSource", "SegmentationData", "SemiSupervisedDataModule", "StrongView", "WeakView"]

_MODULES = {
    "ImageSource": "base",
    "SegmentationData": "base",
    "SemiSupervisedDataModule": "datamodule",
    "StrongView": "transforms.strong",
    "WeakView": "transforms.weak",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return getattr(import_module(f"mlpmatch_pl.data.{_MODULES[name]}"), name)
        raise AttributeError(f"module 'mlpmatch_pl.data' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return __all__
