"""COCO 2017: 118,287 training and 5,000 validation images, 80 kinds of things and background."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlpmatch_pl.data.base import SegmentationData
from mlpmatch_pl.data.datasets.base import DatasetInfo, Selection, find_root, public_dataset
from mlpmatch_pl.data.files import FileIndex, Pair
from mlpmatch_pl.data.readers.mask import MaskReader
from mlpmatch_pl.data.splits import Choice
from mlpmatch_pl.utils.errors import UserError

INFO = DatasetInfo(
    key="coco",
    title="COCO 2017",
    class_names=(
        "background", "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
        "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep",
        "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
        "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
        "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
        "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
        "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven",
        "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier",
        "toothbrush",
    ),
    palette=(),
    license="annotations CC BY 4.0; Flickr photos under Flickr's terms of use",
    citation="Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014",
    homepage="https://cocodataset.org",
)  # fmt: skip


def coco(
    root: str,
    labeled: Choice | None = None,
    unlabeled: str | Sequence[str] | None = None,
    val: Choice | None = None,
    split_seed: int = 0,
    cover_classes: bool = False,
) -> SegmentationData:
    """Return COCO 2017: photos in train2017 and val2017, PNG masks of classes in masks/train2017 and masks/val2017.

    The masks are those that ``prepare`` makes from the annotations, or UniMatch's, which are in masks without
    subfolders. Lists may use either path.

    Args:
        root: The folder with these.
        labeled: See `mlpmatch_pl.data.datasets.base.Selection`.
        unlabeled: See there.
        val: See there.
        split_seed: See there.
        cover_classes: See there.

    Raises:
        UserError: If files or lists are not there.
    """
    base = find_root(root, "train2017", INFO)
    train, own_val = _part(base, "train2017"), _part(base, "val2017")
    masks = {pair.mask.rpartition("/")[2]: pair.mask for pair in (*train, *own_val) if pair.mask}

    def find_mask(name: str) -> str:
        return masks.get(name.rpartition("/")[2], name)

    files = FileIndex([base], "train2017", "masks/train2017", [*train, *own_val], find_mask)
    selection = Selection(labeled, unlabeled, val, split_seed, cover_classes)
    return public_dataset(INFO, files, MaskReader(), train, own_val, selection)


def _part(base: Path, name: str) -> list[Pair]:
    folder = f"masks/{name}" if (base / "masks" / name).is_dir() else "masks"
    masks = {path.stem for path in (base / folder).glob("*.png")}
    stems = sorted(path.stem for path in (base / name).glob("*.jpg"))
    if not stems or not masks:
        missing = base / name if not stems else base / folder
        raise UserError(
            f"expected files in {missing}, but found none; get them with "
            f"'python -m mlpmatch_pl.prepare dataset=coco root={base}'"
        )
    if name == "val2017":
        stems = [stem for stem in stems if stem in masks]
    return [Pair(f"{name}/{stem}.jpg", f"{folder}/{stem}.png" if stem in masks else None) for stem in stems]
