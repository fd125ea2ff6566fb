"""PASCAL VOC 2012 with the masks of SBD ("aug"): 10,582 training and 1,449 validation images, 21 classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlpmatch_pl.data.base import SegmentationData
from mlpmatch_pl.data.datasets.base import DatasetInfo, Selection, find_root, public_dataset
from mlpmatch_pl.data.files import FileIndex, Pair
from mlpmatch_pl.data.readers.mask import MaskReader
from mlpmatch_pl.data.splits import Choice
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.palette import default_palette

INFO = DatasetInfo(
    key="voc",
    title="PASCAL VOC 2012",
    class_names=(
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    ),
    palette=default_palette(21),
    license="Flickr photos under Flickr's terms of use; research use",
    citation=(
        "Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010; "
        "Hariharan et al., Semantic Contours from Inverse Detectors, ICCV 2011 (SBD)"
    ),
    homepage="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
)  # fmt: skip

VOID_COLOR = (224, 224, 192)  # of object borders, in masks saved as colors


def voc(
    root: str,
    labeled: Choice | None = None,
    unlabeled: str | Sequence[str] | None = None,
    val: Choice | None = None,
    image_set: str = "train_aug",
    split_seed: int = 0,
    cover_classes: bool = False,
) -> SegmentationData:
    """Return VOC 2012 in its original layout: JPEGImages, SegmentationClass, ImageSets/Segmentation.

    Args:
        root: The folder with these, or with VOC2012 or VOCdevkit/VOC2012 in it.
        labeled: See `mlpmatch_pl.data.datasets.base.Selection`; published lists are 92, 183, 366, 732 and 1464 (of
            VOC's own train set), blended/1-16, 1-8 and 1-4, and u2pl/1-16, 1-8 and 1-4.
        unlabeled: See there.
        val: See there.
        image_set: List of training images in ImageSets/Segmentation: train_aug (VOC and SBD) or train (VOC's 1,464).
        split_seed: See there.
        cover_classes: See there.

    Raises:
        UserError: If files or lists are not there.
    """
    base = find_root(root, "JPEGImages", INFO, inside=("VOC2012", "VOCdevkit/VOC2012"))
    train, own_val = _image_set(base, image_set), _image_set(base, "val")
    files = FileIndex([base], "JPEGImages", "SegmentationClass", known=[*train, *own_val])
    selection = Selection(labeled, unlabeled, val, split_seed, cover_classes)
    return public_dataset(
        INFO, files, MaskReader(colors=INFO.palette, ignore_colors=(VOID_COLOR,)), train, own_val, selection
    )


def _image_set(base: Path, name: str) -> list[Pair]:
    path = base / "ImageSets" / "Segmentation" / f"{name}.txt"
    if not path.is_file():
        raise UserError(
            f"expected the list {path}, but it does not exist; make it with "
            f"'python -m mlpmatch_pl.prepare dataset=voc root={base}', or set dataset.image_set=train"
        )
    names = dict.fromkeys(path.read_text(encoding="utf-8").split())
    return [Pair(f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png") for name in names]
