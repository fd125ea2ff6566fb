"""CamVid as SegNet's authors reduced it: 367 training, 101 validation and 233 test images of 480 x 360, 11 classes."""

from __future__ import annotations

from collections.abc import Sequence

from mlpmatch_pl.data.base import SegmentationData
from mlpmatch_pl.data.datasets.base import DatasetInfo, Selection, find_root, public_dataset
from mlpmatch_pl.data.files import FileIndex
from mlpmatch_pl.data.readers.mask import MaskReader
from mlpmatch_pl.data.splits import Choice

INFO = DatasetInfo(
    key="camvid",
    title="CamVid",
    class_names=(
        "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
    ),
    palette=(
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
        (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    ),
    license="CC BY-NC 4.0 as its source states; research use",
    citation="Brostow et al., Semantic Object Classes in Video: A High-Definition Ground Truth Database, PRL 2009",
    homepage="http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/",
)  # fmt: skip


def camvid(
    root: str,
    labeled: Choice | None = None,
    unlabeled: str | Sequence[str] | None = None,
    val: Choice | None = None,
    split_seed: int = 0,
    cover_classes: bool = False,
) -> SegmentationData:
    """Return CamVid: folders images and masks, and lists splits/train.txt, val.txt and test.txt.

    Report results on test: val consists of frames of a single sequence, and train has other frames of it.

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
    files = FileIndex([find_root(root, "splits", INFO)], "images", "masks")
    train, own_val, test = (files.part(f"splits/{name}.txt") for name in ("train", "val", "test"))
    return public_dataset(
        INFO, files, MaskReader(), train, own_val, Selection(labeled, unlabeled, val, split_seed, cover_classes), test
    )
