"""COCO 2017 with masks of 81 classes, drawn from the instance annotations.

Class 0 is background, 1 to 80 are the categories in the order of their ids. Where instances overlap, crowd regions are
drawn first, then instances from the largest to the smallest (by the area of their mask, then by annotation id), so that
small ones stay visible. A pixel of a crowd region counts as its category. There is no ignore value.
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

from mlpmatch_pl.commands.prepare.download import Archive, Workspace
from mlpmatch_pl.commands.prepare.files import compare_count, convert, missing_files, names_in, unpack
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.progress import say

# http, because the host's certificate is for another name. Checksums as in the scripts of MLPerf and PaddleDetection.
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
    """An annotated instance.

    Attributes:
        label: Class id 1..80.
        segmentation: Polygons, or run lengths.
        crowd: Whether it is a region of many instances.
        id: Id of the annotation.
    """

    label: int
    segmentation: Any
    crowd: bool
    id: int


class Drawing(NamedTuple):
    """A mask to draw: its file, its size in pixels, and the instances in it."""

    path: Path
    height: int
    width: int
    instances: list[Instance]


def build(workspace: Workspace) -> None:
    """Unpack images and annotations, and draw the missing masks."""
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise UserError(
            "expected the package pycocotools, which draws COCO's masks, but it is not installed; "
            "run: pip install 'mlpmatch_pl[prepare]'"
        ) from error
    root = workspace.root
    for split, count in COUNTS.items():
        if len(names_in(root / split, ".jpg")) != count:
            unpack(workspace.get(IMAGES[split]), root, lambda name: name if name.startswith(tuple(COUNTS)) else None)
            workspace.discard([IMAGES[split]])
        if len(names_in(root / "masks" / split, ".png")) != count:
            _draw_masks(workspace, split)
    workspace.discard([ANNOTATIONS])


def read_drawings(annotations: Path, folder: Path) -> Iterator[Drawing]:
    """Yield a mask to draw in a folder for each image of an annotation file.

    Raises:
        UserError: If the file does not have COCO's 80 categories.
    """
    content = json.loads(annotations.read_bytes())
    ids = sorted(category["id"] for category in content["categories"])
    if len(ids) != CATEGORIES:
        raise UserError(
            f"expected {CATEGORIES} categories in {annotations}, but found {len(ids)}; "
            f"delete it and run the same command again to unpack it from {ANNOTATIONS.name}"
        )
    labels = {category: label for label, category in enumerate(ids, start=1)}
    instances: dict[int, list[Instance]] = defaultdict(list)
    for entry in content["annotations"]:
        instances[entry["image_id"]].append(
            Instance(labels[entry["category_id"]], entry["segmentation"], bool(entry["iscrowd"]), entry["id"])
        )
    for image in content["images"]:
        path = folder / f"{Path(image['file_name']).stem}.png"
        yield Drawing(path, image["height"], image["width"], instances.get(image["id"], []))


def draw_mask(drawing: Drawing) -> NDArray[np.uint8]:
    """Draw the instances of an image over each other; returns class ids 0..80, (H, W)."""
    from pycocotools import mask as rle

    size = (drawing.height, drawing.width)
    layers = []
    for instance in drawing.instances:
        shape = instance.segmentation
        if isinstance(shape, list):  # polygons
            shape = rle.merge(rle.frPyObjects(shape, *size))
        elif isinstance(shape["counts"], list):  # uncompressed run lengths
            shape = rle.frPyObjects(shape, *size)
        layers.append((not instance.crowd, -int(rle.area(shape)), instance.id, instance.label, shape))
    mask = np.zeros(size, np.uint8)
    for *_, label, shape in sorted(layers, key=lambda layer: layer[:3]):
        mask[rle.decode(shape).astype(bool)] = label
    return mask


def draw_png(drawing: Drawing) -> tuple[Path, bytes]:
    """Draw a mask; returns path and content of a gray PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(draw_mask(drawing)).save(buffer, "PNG")
    return drawing.path, buffer.getvalue()


def find_problems(root: Path) -> list[str]:
    """Compare the number of images, and the names of masks and images."""
    problems = []
    for split, count in COUNTS.items():
        images, masks = names_in(root / split, ".jpg"), names_in(root / "masks" / split, ".png")
        problems += compare_count(f"images in {split}", len(images), count)
        problems += missing_files("mask", [f"masks/{split}/{name}.png" for name in images - masks])
    return problems


def summarize(root: Path) -> str:
    """Count the images for training and validation."""
    counts = [len(names_in(root / "masks" / split, ".png")) for split in COUNTS]
    return "{:,} training images with masks, {:,} validation images, 81 classes".format(*counts)


def _draw_masks(workspace: Workspace, split: str) -> None:
    annotations = [workspace.root / f"annotations/instances_{part}.json" for part in COUNTS]
    path = workspace.root / f"annotations/instances_{split}.json"
    if not path.is_file():
        unpack(
            workspace.get(ANNOTATIONS),
            workspace.root,
            lambda name: name if workspace.root / name in annotations else None,
        )
    say(f"reading {path}")
    drawings = [
        drawing for drawing in read_drawings(path, workspace.root / "masks" / split) if not drawing.path.exists()
    ]
    convert(f"drawing masks/{split}", draw_png, drawings, workspace.num_workers)
