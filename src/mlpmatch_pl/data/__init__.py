"""Files to batches: sources, splits, views, samplers, checks, and the data module.

The functions that describe a data set have the names of their modules here, so `folder` and `shapes` stand at the top
of the package: ``from mlpmatch_pl import folder, shapes``. Names are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlpmatch_pl.data.base import ImageSource, SegmentationData
    from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
    from mlpmatch_pl.data.transforms.strong import StrongView
    from mlpmatch_pl.data.transforms.weak import WeakView

__all__ = ["ImageSource", "SegmentationData", "SemiSupervisedDataModule", "StrongView", "WeakView"]

_HOMES = {
    "SegmentationData": "base",
    "SemiSupervisedDataModule": "datamodule",
    "ImageSource": "base",
    "StrongView": "transforms.strong",
    "WeakView": "transforms.weak",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"mlpmatch_pl.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mlpmatch_pl.data' has no attribute {name!r}")
