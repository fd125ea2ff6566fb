"""Cityscapes: 2,975 training and 500 validation images of 2048 x 1024 pixels, 19 classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlpmatch_pl.data.base import Mask, SegmentationData
from mlpmatch_pl.data.datasets.base import DatasetInfo, Selection, find_root, public_dataset
from mlpmatch_pl.data.files import FileIndex, Pair
from mlpmatch_pl.data.readers.mask import MaskReader
from mlpmatch_pl.data.readers.windows import Window
from mlpmatch_pl.data.splits import Choice
from mlpmatch_pl.utils.errors import UserError

INFO = DatasetInfo(
    key="cityscapes",
    title="Cityscapes",
    class_names=(
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
        "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    ),
    palette=(
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
        (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142),
        (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    ),
    license="Cityscapes' own terms: non-commercial research and teaching, after registration",
    citation="Cordts et al., The Cityscapes Dataset for Semantic Urban Scene Understanding, CVPR 2016",
    homepage="https://www.cityscapes-dataset.com",
)  # fmt: skip

# The ids of the 19 classes in labelIds files; all others are ignored.
_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_IMAGE, _TRAIN_IDS, _LABEL_IDS = "_leftImg8bit.png", "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"


class CityscapesMasks(MaskReader):
    """Reads labelTrainIds files, and maps labelIds files to the same classes."""

    def __init__(self) -> None:
        super().__init__()
        self._label_ids = MaskReader({**{value: label for label, value in enumerate(_IDS)}, "other": self.ignore_index})

    def __call__(self, path: str | Path, window: Window | None = None) -> Mask:
        """Read a mask, see `MaskReader`."""
        return (self._label_ids if str(path).endswith(_LABEL_IDS) else super().__call__)(path, window)

    def describe(self) -> str:
        """Return the options as a string."""
        return f"{super().describe()} labelIds: {self._label_ids.describe()}"


def cityscapes(
    root: str,
    labeled: Choice | None = None,
    unlabeled: str | Sequence[str] | None = None,
    val: Choice | None = None,
    split_seed: int = 0,
    cover_classes: bool = False,
) -> SegmentationData:
    """Return Cityscapes in its original layout: leftImg8bit and gtFine, with train and val below each.

    Args:
        root: The folder with these.
        labeled: See `mlpmatch_pl.data.datasets.base.Selection`; published lists are 1-30, 1-16, 1-8, 1-4 and 1-2.
        unlabeled: See there.
        val: See there.
        split_seed: See there.
        cover_classes: See there.

    Raises:
        UserError: If files or lists are not there.
    """
    base = find_root(root, "leftImg8bit", INFO)

    def find_mask(name: str) -> str:
        return name if (base / name).is_file() else name.replace(_TRAIN_IDS, _LABEL_IDS)

    train, own_val = _part(base, "train"), _part(base, "val")
    files = FileIndex([base], "leftImg8bit", "gtFine", [*train, *own_val], find_mask)
    selection = Selection(labeled, unlabeled, val, split_seed, cover_classes)
    return public_dataset(INFO, files, CityscapesMasks(), train, own_val, selection)


def _part(base: Path, name: str) -> list[Pair]:
    """Pair the images of a part with their masks: labelTrainIds, or else labelIds."""
    pairs = []
    for path in sorted((base / "leftImg8bit" / name).glob(f"*/*{_IMAGE}")):
        image = path.relative_to(base).as_posix()
        stem = image.replace("leftImg8bit/", "gtFine/", 1).removesuffix(_IMAGE)
        mask = next((stem + suffix for suffix in (_TRAIN_IDS, _LABEL_IDS) if (base / (stem + suffix)).is_file()), None)
        pairs.append(Pair(image, mask))
    if not pairs:
        raise UserError(f"expected images *{_IMAGE} in {base / 'leftImg8bit' / name}/<city>, but found none")
    if name == "val" and (bare := [pair.image for pair in pairs if not pair.mask]):
        raise UserError(
            f"expected a mask for every validation image, but {bare[0]} has none ({len(bare)} in total); add gtFine/val"
        )
    return pairs
