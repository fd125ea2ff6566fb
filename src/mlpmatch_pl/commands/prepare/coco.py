"""COCO 2017 with masks of 81 classes, made from the instance annotations.

Class 0 is background, 1 to 80 are the categories in the order of their ids. Where instances overlap, crowd regions lie
lowest, then instances from the largest to the smallest (by area of their mask, equal ones by annotation id), so that
what is small stays visible. A pixel of a crowd region counts as its category. There is no ignore value.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpmatch_pl.commands.prepare.archives import unpack
from mlpmatch_pl.commands.prepare.download import Archive
from mlpmatch_pl.commands.prepare.files import names_in, write_new
from mlpmatch_pl.commands.prepare.verification import compare_count, missing_files
from mlpmatch_pl.commands.prepare.workspace import Preparation, Workspace
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.progress import progress, say

# The host's certificate is for another name, hence http. Checksums as in MLPerf's and PaddleDetection's scripts.
IMAGES = {
    "train2017": Archive(
        "train2017.zip", "http://images.cocodataset.org/zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2"
    ),
    "val2017": Archive(
        "val2017.zip", "http://images.cocodataset.org/zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80"
    ),
}
ANNOTATIONS = Archive(
    "annotations_trainval2017.zip",
    "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
    "f4bbac642086de4f52a3fdda2de5fa2c",
)
COUNTS = {"train2017": 118287, "val2017": 5000}
CATEGORIES = 80


class Instance(NamedTuple):
    """An annotation: its class 1..80, its polygons or run lengths, whether it is a crowd region, and its id."""

    label: int
    segmentation: Any
    crowd: bool
    id: int


class Drawing(NamedTuple):
    """An image to make a mask for."""

    stem: str
    height: int
    width: int
    instances: list[Instance]


def build(workspace: Workspace) -> None:
    """Unpack images and annotations, and draw the masks that are missing."""
    _require_pycocotools()
    for split in COUNTS:
        root = workspace.root
        if len(names_in(root / split, ".jpg")) != COUNTS[split]:
            unpack(workspace.get(IMAGES[split]), root, lambda name: name if name.startswith(tuple(COUNTS)) else None)
            workspace.forget([IMAGES[split]])
        if len(names_in(root / "masks" / split, ".png")) != COUNTS[split]:
            draw_masks(workspace, split)
    workspace.forget([ANNOTATIONS])


def draw_masks(workspace: Workspace, split: str) -> None:
    """Write ``masks/<split>/<image>.png`` for all images of a split that have none yet."""
    annotations = workspace.root / _annotations(split)
    if not annotations.is_file():
        unpack(
            workspace.get(ANNOTATIONS),
            workspace.root,
            lambda name: name if name in {_annotations(part) for part in COUNTS} else None,
        )
    say(f"reading {annotations}")
    folder = workspace.root / "masks" / split
    done = names_in(folder, ".png")
    drawings = [drawing for drawing in read_drawings(annotations) if drawing.stem not in done]
    with progress(f"drawing masks/{split}", len(drawings)) as advance:
        for stem, png in workspace.convert(draw_png, drawings):
            write_new(folder / f"{stem}.png", png)
            advance(1)


def read_drawings(annotations: Path) -> Iterator[Drawing]:
    """Read all images of an annotation file with their instances.

    Raises:
        UserError: If the file has not COCO's 80 categories.
    """
    content = json.loads(annotations.read_bytes())
    ids = sorted(category["id"] for category in content["categories"])
    if len(ids) != CATEGORIES:
        raise UserError(
            f"expected {CATEGORIES} categories in {annotations}, but found {len(ids)}; "
            f"delete it and run the same command again to take it from {ANNOTATIONS.name}"
        )
    labels = {category: label for label, category in enumerate(ids, start=1)}
    instances: dict[int, list[Instance]] = defaultdict(list)
    for entry in content["annotations"]:
        instances[entry["image_id"]].append(
            Instance(labels[entry["category_id"]], entry["segmentation"], bool(entry["iscrowd"]), entry["id"])
        )
    for image in content["images"]:
        stem = Path(image["file_name"]).stem
        yield Drawing(stem, image["height"], image["width"], instances.get(image["id"], []))


def draw_mask(drawing: Drawing) -> NDArray[np.uint8]:
    """Draw the instances of an image over each other.

    Args:
        drawing: The image.

    Returns:
        Class ids 0..80, uint8, (H, W).
    """
    from pycocotools import mask as rle

    size = (drawing.height, drawing.width)
    layers = [(instance, _encode(instance.segmentation, *size)) for instance in drawing.instances]
    layers.sort(key=lambda layer: (not layer[0].crowd, -int(rle.area(layer[1])), layer[0].id))
    mask = np.zeros(size, np.uint8)
    for instance, encoded in layers:
        mask[rle.decode(encoded).astype(bool)] = instance.label
    return mask


def draw_png(drawing: Drawing) -> tuple[str, bytes]:
    """Draw a mask as the content of a gray PNG; returned with the stem of the image."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(draw_mask(drawing)).save(buffer, "PNG")
    return drawing.stem, buffer.getvalue()


def find_problems(root: Path) -> list[str]:
    """Compare the numbers of images and masks, and the masks' names with the images'."""
    problems = []
    for split, count in COUNTS.items():
        images, masks = names_in(root / split, ".jpg"), names_in(root / "masks" / split, ".png")
        problems += compare_count(f"images in {split}", len(images), count)
        problems += missing_files("mask", [f"masks/{split}/{name}.png" for name in images - masks])
    return problems


def summarize(root: Path) -> str:
    """Count what training and validation have."""
    counts = [len(names_in(root / "masks" / split, ".png")) for split in COUNTS]
    return "{:,} training images with masks, {:,} validation images, 81 classes".format(*counts)


def _encode(segmentation: Any, height: int, width: int) -> Any:
    from pycocotools import mask as rle

    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    return segmentation


def _annotations(split: str) -> str:
    return f"annotations/instances_{split}.json"


def _require_pycocotools() -> None:
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise UserError(
            "expected the package pycocotools, which draws COCO's masks, but it is not installed; "
            "run: pip install 'mlpmatch_pl[prepare]'"
        ) from error


PREPARATION = Preparation(build, find_problems, summarize)
