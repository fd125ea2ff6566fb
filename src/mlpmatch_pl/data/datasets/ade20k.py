"""ADE20K of the 2016 scene parsing challenge: 20,210 training and 2,000 validation images, 150 classes."""

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
    key="ade20k",
    title="ADE20K",
    class_names=(
        "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass", "cabinet",
        "sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair", "car", "water",
        "painting", "sofa", "shelf", "house", "sea", "mirror", "rug", "field", "armchair", "seat", "fence", "desk",
        "rock", "wardrobe", "lamp", "bathtub", "railing", "cushion", "base", "box", "column", "signboard",
        "chest of drawers", "counter", "sand", "sink", "skyscraper", "fireplace", "refrigerator", "grandstand", "path",
        "stairs", "runway", "case", "pool table", "pillow", "screen door", "stairway", "river", "bridge", "bookcase",
        "blind", "coffee table", "toilet", "flower", "book", "hill", "bench", "countertop", "stove", "palm",
        "kitchen island", "computer", "swivel chair", "boat", "bar", "arcade machine", "hovel", "bus", "towel", "light",
        "truck", "tower", "chandelier", "awning", "streetlight", "booth", "television receiver", "airplane",
        "dirt track", "apparel", "pole", "land", "bannister", "escalator", "ottoman", "bottle", "buffet", "poster",
        "stage", "van", "ship", "fountain", "conveyer belt", "canopy", "washer", "plaything", "swimming pool", "stool",
        "barrel", "basket", "waterfall", "tent", "bag", "minibike", "cradle", "oven", "ball", "food", "step", "tank",
        "trade name", "microwave", "pot", "animal", "bicycle", "lake", "dishwasher", "screen", "blanket", "sculpture",
        "hood", "sconce", "vase", "traffic light", "tray", "ashcan", "fan", "pier", "crt screen", "plate", "monitor",
        "bulletin board", "shower", "radiator", "glass", "clock", "flag",
    ),
    palette=(),
    license="images for non-commercial research and education; annotations BSD-3-Clause",
    citation="Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017",
    homepage="http://sceneparsing.csail.mit.edu",
)  # fmt: skip


def ade20k(
    root: str,
    labeled: Choice | None = None,
    unlabeled: str | Sequence[str] | None = None,
    val: Choice | None = None,
    split_seed: int = 0,
    cover_classes: bool = False,
) -> SegmentationData:
    """Return ADE20K in its original layout: images and annotations, with training and validation below each.

    Mask value 0 ("other") is ignored; 1 to 150 are the classes.

    Args:
        root: The folder with these, or with ADEChallengeData2016 in it.
        labeled: See `mlpmatch_pl.data.datasets.base.Selection`.
        unlabeled: See there.
        val: See there.
        split_seed: See there.
        cover_classes: See there.

    Raises:
        UserError: If files or lists are not there.
    """
    base = find_root(root, "annotations", INFO, inside=("ADEChallengeData2016",))
    values: dict[int | float | str, int] = {0: 255, **{label + 1: label for label in range(len(INFO.class_names))}}
    train, own_val = _part(base, "training"), _part(base, "validation")
    files = FileIndex([base], "images", "annotations", known=[*train, *own_val])
    selection = Selection(labeled, unlabeled, val, split_seed, cover_classes)
    return public_dataset(INFO, files, MaskReader(values), train, own_val, selection)


def _part(base: Path, name: str) -> list[Pair]:
    stems = sorted(path.stem for path in (base / "annotations" / name).glob("*.png"))
    if not stems:
        raise UserError(
            f"expected files in {base / 'annotations' / name}, but found none; get them with "
            f"'python -m mlpmatch_pl.prepare dataset=ade20k root={base}'"
        )
    return [Pair(f"images/{name}/{stem}.jpg", f"annotations/{name}/{stem}.png") for stem in stems]
