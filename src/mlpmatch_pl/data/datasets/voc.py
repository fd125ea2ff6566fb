"""PASCAL VOC 2012 with the masks of SBD ("aug"): 10,582 training and 1,449 validation images, 21 classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

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

MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")
ALIASES = {"train_aug": ("trainaug",), "trainaug": ("train_aug",)}
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

    The masks of SBD may also be in SegmentationClassAug.

    Args:
        root: The folder with these, or with VOC2012 or VOCdevkit/VOC2012 in it.
        labeled: See `mlpmatch_pl.data.datasets.base.Selection`; published lists are 92, 183, 366, 732 and 1464 (of
            VOC's own train set), blended/1-16, 1-8 and 1-4, and u2pl/1-16, 1-8 and 1-4.
        unlabeled: See there.
        val: See there.
        image_set: List of training images in ImageSets/Segmentation: train_aug or trainaug (VOC and SBD), or train
            (VOC's 1,464).
        split_seed: See there.
        cover_classes: See there.

    Raises:
        UserError: If files or lists are not there.
    """
    base = find_root(root, "JPEGImages", INFO, inside=("VOC2012", "VOCdevkit/VOC2012"))
    find_mask = _mask_finder(base)
    train, own_val = (
        [Pair(f"JPEGImages/{name}.jpg", find_mask(name)) for name in _image_set(base, part)]
        for part in (image_set, "val")
    )
    files = FileIndex([base], "JPEGImages", "SegmentationClass", [*train, *own_val], find_mask)
    selection = Selection(labeled, unlabeled, val, split_seed, cover_classes)
    return public_dataset(
        INFO, files, MaskReader(colors=INFO.palette, ignore_colors=(VOID_COLOR,)), train, own_val, selection
    )


def _image_set(base: Path, name: str) -> list[str]:
    """Return the names in a list, of images or, as DeepLab has them, of paths of an image and its mask."""
    folder = base / "ImageSets" / "Segmentation"
    names = (name, *ALIASES.get(name, ()))
    path = next((path for path in (folder / f"{name}.txt" for name in names) if path.is_file()), None)
    if path is None:
        raise UserError(
            f"expected the list {folder / name}.txt, but it does not exist; make it with "
            f"'python -m mlpmatch_pl.prepare dataset=voc root={base}', or set dataset.image_set=train"
        )
    lines = path.read_text(encoding="utf-8-sig").replace("\\", "/").splitlines()
    return list(dict.fromkeys(PurePosixPath(line.split()[0]).stem for line in lines if line.strip()))


def _mask_finder(base: Path) -> Callable[[str], str]:
    """Return a function from a mask's name to its path: most repositories keep SBD's masks in a folder of their own."""
    own, merged = ({path.stem for path in (base / folder).glob("*.png")} for folder in MASK_FOLDERS)

    def find(name: str) -> str:
        stem = PurePosixPath(name).stem
        return f"{MASK_FOLDERS[stem in merged and stem not in own]}/{stem}.png"

    return find
