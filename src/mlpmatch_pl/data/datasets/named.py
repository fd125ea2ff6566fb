"""The datasets by name, with their arguments as plain data."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from mlpmatch_pl.data.base import SegmentationData
from mlpmatch_pl.utils.errors import require_choice
from mlpmatch_pl.utils.validation import arguments_type, validate

DATASETS = ("folder", "shapes", "voc", "cityscapes", "coco", "ade20k", "camvid")


def resolve_dataset(spec: SegmentationData | Mapping[str, Any]) -> SegmentationData:
    """Return a dataset, or build it from a mapping.

    Args:
        spec: A dataset, or a mapping of its ``name``, one of `DATASETS`, and the arguments of that function in
            `mlpmatch_pl.data.datasets`.

    Raises:
        UserError: If the name is unknown, an argument is wrong, or the data is.

    Example:
        >>> len(resolve_dataset({"name": "shapes", "labeled": 4, "train": 16}).unlabeled)
        12
    """
    if isinstance(spec, SegmentationData):
        return spec
    arguments = dict(spec)
    name = require_choice("data.name", arguments.pop("name", None), DATASETS)
    function = getattr(import_module(f"mlpmatch_pl.data.datasets.{name}"), name)
    data: SegmentationData = function(**validate(arguments_type(function), arguments, "data"))
    return data
