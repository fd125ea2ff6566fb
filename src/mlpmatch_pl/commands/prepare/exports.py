"""Exports of annotation tools: which images they list, and the regions in them.

Formats are recognized by content. A shape that is not a region becomes a region of the kind `OTHER`, and what cannot be
read raises an error with the name of the file.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from mlpmatch_pl.commands.prepare.regions import Region
from mlpmatch_pl.data.readers.image import IMAGE_SUFFIXES
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import load_yaml

OTHER = "other"  # kind of a shape that is no region: its name, its bounding box or None, and the kind of that
FORMATS = (
    "COCO JSON, YOLO polygons with data.yaml or classes.txt, labelme JSON, CVAT for images (XML), Label Studio JSON, "
    "or masks with labelmap.txt or _classes.csv"
)
_SUFFIXES = (".json", ".xml", ".yaml", ".yml", ".names", ".txt")
_CLASS_LISTS = ("classes.txt", "obj.names")
_WRONG = (KeyError, TypeError, ValueError, AttributeError, IndexError, ET.ParseError)
_REGION_TYPES = ("any", "polygon", "mask", "rectangle", "ellipse", "")  # of labels in CVAT


class Entry(NamedTuple):
    """An image of an export.

    Attributes:
        image: Its name as the export has it, perhaps with other folders or without suffix.
        source: The file of the export.
        size: Its height and width according to the export; None if that does not say.
        regions: In the order of drawing.
        is_annotated: Whether someone has annotated it, perhaps without finding a region.
        words: Words that may name its part, such as ``train``.
    """

    image: str
    source: Path
    size: tuple[int, int] | None
    regions: list[Region]
    is_annotated: bool
    words: tuple[str, ...] = ()


class Export(NamedTuple):
    """The content of an export.

    Attributes:
        title: The name of its format.
        classes: In the order of the export; sorted by name if it has none.
        entries: Its images.
        by_size: Whether it has no order of drawing, so that larger regions are drawn first.
    """

    title: str
    classes: tuple[str, ...]
    entries: list[Entry]
    by_size: bool


class _Format(NamedTuple):
    title: str
    read: Callable[[Path, Any], tuple[list[str], Iterable[Entry]]]
    by_size: bool = False
    has_class_order: bool = True


def read_export(path: Path, files: Iterable[Path]) -> Export | None:
    """Read an export.

    Args:
        path: Its file or folder.
        files: All files below that folder.

    Returns:
        The export, or None if no format is recognized.

    Raises:
        UserError: If a file is wrong, or there are exports of several formats.
    """
    found: dict[str, Path] = {}
    classes: dict[str, None] = {}
    entries: list[Entry] = []
    form = None
    for file in sorted(file for file in files if file.suffix.lower() in _SUFFIXES):
        recognized = _recognize(file)
        if recognized is None:
            continue
        form, content = recognized
        found.setdefault(form.title, file)
        if len(found) > 1:
            (one, first), (two, second) = found.items()
            raise UserError(
                f"expected one export in {path}, but {first} is {one} and {second} is {two}; name one of them by "
                "annotations="
            )
        with _wrong_is_user_error(form, file):
            names, images = form.read(file, content)
            classes |= dict.fromkeys(" ".join(str(name).split()) for name in names)
            entries += images
    if form is None:
        return None
    return Export(form.title, tuple(classes if form.has_class_order else sorted(classes)), entries, form.by_size)


def _recognize(file: Path) -> tuple[_Format, Any] | None:
    """Return the format and the parsed content of a file; None for one that is no export."""
    suffix = file.suffix.lower()
    try:
        if suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8-sig"))
            return _recognize_json(file, content)
        if suffix == ".xml":
            return _recognize_xml(file)
        if suffix in (".yaml", ".yml"):
            content = load_yaml(file)
            if isinstance(content, dict) and "names" in content:
                return _YOLO, content
        elif file.name in _CLASS_LISTS and not any(file.parent.glob("*.y*ml")):
            return _YOLO, {"names": [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n") if line]}
    except UserError:
        raise
    except (*_WRONG, RecursionError) as error:
        raise UserError(f"cannot read {file} ({' '.join(str(error).split())}); export it again") from error
    return None


def _recognize_json(file: Path, content: Any) -> tuple[_Format, Any] | None:
    first = content[0] if isinstance(content, list) and content else None
    if isinstance(content, dict) and {"images", "categories"} <= content.keys():
        return _COCO, content
    if isinstance(content, dict) and "shapes" in content:
        return _LABELME, content
    if isinstance(first, dict) and "annotations" in first and "data" in first:
        return _LABEL_STUDIO, content
    if isinstance(first, dict) and "annotation_id" in first:
        raise UserError(f"expected Label Studio's format JSON, but {file} is JSON-MIN; export it as JSON")
    return None


def _recognize_xml(file: Path) -> tuple[_Format, Any] | None:
    tree = ET.parse(file).getroot()
    if tree.tag == "annotation":
        raise UserError(
            f"expected one of {FORMATS}, but {file} is XML of Pascal VOC or of the old LabelMe; export it in another "
            "format"
        )
    if tree.tag != "annotations":
        return None
    if tree.find("track") is not None:
        raise UserError(f"expected CVAT for images, but {file} is CVAT for video; export it as CVAT for images")
    return _CVAT, tree


@contextmanager
def _wrong_is_user_error(form: _Format, file: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except _WRONG as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"expected {form.title} in {file}, but found {reason}; export it again") from error


def _rings(*rings: Any) -> list[np.ndarray]:
    """Return polygons as arrays of points, without those of one or two points, which cover no pixel."""
    return [points for ring in rings if len(points := np.asarray(ring, np.float64).reshape(-1, 2)) > 2]


def _box(left: float, top: float, width: float, height: float) -> np.ndarray:
    return np.array([(left, top), (left + width, top), (left + width, top + height), (left, top + height)], np.float64)


def _bounds(points: Any) -> np.ndarray:
    """Return the bounding box of points."""
    array = np.asarray(points, np.float64).reshape(-1, 2)
    return _box(*array.min(0), *np.ptp(array, 0))


def _other(name: str, box: np.ndarray | None, kind: str = "polygons") -> Region:
    return Region(None, OTHER, (name, box, kind))


def _coco(file: Path, content: dict[str, Any]) -> tuple[list[str], list[Entry]]:
    categories = sorted(content["categories"], key=lambda category: int(category["id"]))
    annotations = content.get("annotations") or []
    # Roboflow begins with a category for the whole project, the parent of the others, without annotations.
    used = {annotation["category_id"] for annotation in annotations}
    parents = {category.get("supercategory") for category in categories}
    kept = [
        category
        for category in categories
        if category["id"] in used or category["name"] not in parents or category.get("supercategory") != "none"
    ]
    names = {category["id"]: " ".join(str(category["name"]).split()) for category in categories}
    regions: dict[Any, list[Region]] = defaultdict(list)
    for annotation in annotations:
        regions[annotation["image_id"]].append(_coco_region(annotation, names))
    entries = [
        Entry(
            str(image["file_name"]),
            file,
            (int(image["height"]), int(image["width"])),
            regions.pop(image["id"], []),
            False,
            tuple(re.split(r"[_\-. ]", file.stem)),
        )
        for image in content["images"]
    ]
    if regions:
        raise ValueError(f"annotations of the image {next(iter(regions))}, which is not listed")
    return [names[category["id"]] for category in kept], [
        entry._replace(is_annotated=bool(entry.regions)) for entry in entries
    ]


def _coco_region(annotation: Mapping[str, Any], names: Mapping[Any, str]) -> Region:
    if annotation["category_id"] not in names:
        raise ValueError(f"the category {annotation['category_id']}, which is not listed")
    is_ignored = annotation.get("iscrowd") or annotation.get("ignore")
    label = None if is_ignored else names[annotation["category_id"]]
    shape = annotation.get("segmentation")
    if isinstance(shape, dict):
        return Region(label, "coco", {"size": shape["size"], "counts": shape["counts"]})
    if shape and any(shape):
        return Region(label, "polygons", _rings(*shape))
    box = annotation.get("bbox")
    return _other("box", _box(*map(float, box)) if box else None)


def _labelme(file: Path, content: dict[str, Any]) -> tuple[list[str], list[Entry]]:
    regions = [_labelme_region(shape) for shape in content["shapes"]]
    name = str(content.get("imagePath") or file.stem).replace("\\", "/")
    height, width = content.get("imageHeight"), content.get("imageWidth")
    size = (int(height), int(width)) if height and width else None
    return _labels(regions), [Entry(name, file, size, regions, True)]


def _labelme_region(shape: Mapping[str, Any]) -> Region:
    label, kind, points = str(shape["label"]), shape.get("shape_type") or "polygon", shape["points"]
    if kind == "polygon":
        return Region(label, "polygons", _rings(points))
    if kind == "mask":
        return Region(label, "png", (shape["mask"], round(points[0][0]), round(points[0][1])))
    if kind == "circle":  # center and a point on it
        radius = float(np.hypot(*np.subtract(points[0], points[1])))
        return _other(kind, _box(points[0][0] - radius, points[0][1] - radius, 2 * radius, 2 * radius))
    return _other(kind, _bounds(points) if len(points) > 1 else None)


def _labels(regions: Iterable[Region]) -> list[str]:
    return [region.label for region in regions if region.label is not None]


def _cvat(file: Path, tree: ET.Element) -> tuple[list[str], list[Entry]]:
    classes = [
        label.findtext("name", "")
        for label in tree.iterfind("meta//labels/label")
        if label.find("parent") is None and label.findtext("type", "") in _REGION_TYPES
    ]
    entries = []
    for image in tree.iterfind("image"):
        shapes = [shape for shape in image if shape.tag != "tag"]
        shapes.sort(key=lambda shape: int(shape.get("z_order", 0)))
        regions = [_cvat_region(shape) for shape in shapes]
        classes += _labels(regions)
        size = (int(image.attrib["height"]), int(image.attrib["width"]))
        entries.append(
            Entry(image.attrib["name"], file, size, regions, bool(regions), (image.get("subset", "").lower(),))
        )
    return classes, entries


def _cvat_region(shape: ET.Element) -> Region:
    get = shape.attrib
    if float(get.get("rotation", 0)):
        raise ValueError(f"a rotated {shape.tag}")
    if shape.tag == "mask":
        box = (int(get[key]) for key in ("left", "top", "width", "height"))
        return Region(get["label"], "cvat", ([int(count) for count in get["rle"].split(",")], *box))
    if shape.tag == "box":
        corners = [(float(get["xtl"]), float(get["ytl"])), (float(get["xbr"]), float(get["ybr"]))]
        return _other("box", _bounds(corners))
    if shape.tag == "ellipse":
        x, y, across, down = (float(get[key]) for key in ("cx", "cy", "rx", "ry"))
        return _other("ellipse", _box(x - across, y - down, 2 * across, 2 * down))
    points = [tuple(map(float, point.split(","))) for point in get.get("points", "").split(";") if point]
    if shape.tag == "polygon":
        return Region(get["label"], "polygons", _rings(points))
    return _other(shape.tag, _bounds(points) if len(points) > 1 else None)


def _yolo(file: Path, content: dict[str, Any]) -> tuple[list[str], list[Entry]]:
    if "kpt_shape" in content:
        raise ValueError("keypoints (kpt_shape)")
    names = content["names"]
    names = dict(enumerate(names)) if isinstance(names, list) else {int(key): name for key, name in names.items()}
    base = file.parent.parent if file.parent.name == "labels" else file.parent
    texts = [path for path in sorted(base.rglob("*.txt")) if path.name not in _CLASS_LISTS]
    inside = [path for path in texts if "labels" in path.relative_to(base).parts]
    images = {path.with_suffix("") for path in base.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES}
    entries = []
    for path in inside or [path for path in texts if path.with_suffix("") in images]:
        parts = ["images" if part == "labels" else part for part in path.relative_to(base).parts]
        regions = []
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            if line.strip():
                regions.append(_yolo_region(line, names, path))
        entries.append(Entry(str(PurePosixPath(*parts).with_suffix("")), path, None, regions, True))
    return [str(names[key]) for key in sorted(names)], entries


def _yolo_region(line: str, names: Mapping[int, str], path: Path) -> Region:
    try:
        label, numbers = int(line.split()[0]), [float(number) for number in line.split()[1:]]
        if label in names and len(numbers) == 4:
            x, y, width, height = numbers
            return _other("box", _box(x - width / 2, y - height / 2, width, height), "relative")
        if label in names and len(numbers) >= 6 and len(numbers) % 2 == 0:
            return Region(" ".join(str(names[label]).split()), "relative", _rings(numbers))
    except ValueError:
        pass
    raise UserError(
        f"expected lines 'class x y x y x y ...' in {path}, with a class from 0 to {max(names, default=0)}, but found "
        f"{line[:60]!r}; export it again as polygons"
    )


def _label_studio(file: Path, content: list[dict[str, Any]]) -> tuple[list[str], list[Entry]]:
    entries = []
    for task in content:
        done = [one for one in task["annotations"] if not one.get("was_cancelled")]
        done = [one for one in done if one.get("ground_truth")] or done
        if len(done) > 1:
            raise UserError(
                f"expected one annotation of each image, but the task {task.get('id')} in {file} has {len(done)}; mark "
                "one as ground truth, or delete the others"
            )
        if not done:
            continue
        results = done[0]["result"]
        size = next(
            ((int(one["original_height"]), int(one["original_width"])) for one in results if "original_width" in one),
            None,
        )
        entries.append(Entry(_task_image(task), file, size, _label_studio_regions(results), True))
    return [label for entry in entries for label in _labels(entry.regions)], entries


def _task_image(task: Mapping[str, Any]) -> str:
    """Return the path of a task's image: that of a URL, or the one in the query of a local file's URL."""
    values = [str(value) for value in task["data"].values() if isinstance(value, str)]
    for value in values:
        url = urlsplit(value.replace("\\", "/"))
        path = unquote(parse_qs(url.query).get("d", [url.path])[0])
        if PurePosixPath(path).suffix:
            return path
    raise ValueError(f"no image in the data of the task {task.get('id')}")


def _label_studio_regions(results: list[dict[str, Any]]) -> list[Region]:
    regions: dict[Any, Region] = {}
    labels: dict[Any, list[str]] = {}
    for number, result in enumerate(results):
        value, id_ = result.get("value", {}), result.get("id", number)  # results of scripts may have none
        if not isinstance(value, dict) or not ({"points", "rle", "x"} & value.keys()):
            continue  # of the whole image, such as a choice
        if names := next((value[key] for key in value if key.endswith("labels") and value[key]), None):
            labels[id_] = names
        if result.get("image_rotation"):
            raise ValueError(f"an image turned by {result['image_rotation']} degrees")
        if "rle" in value:
            regions[id_] = Region(None, "brush", value["rle"])
        elif "points" in value and value.get("closed", True):
            regions[id_] = Region(None, "relative", _rings(np.asarray(value["points"]) / 100))
        else:
            regions[id_] = _label_studio_other(result["type"].removesuffix("labels"), value)
    for id_, region in regions.items():
        if region.kind != OTHER:
            if len(labels.get(id_, ())) != 1:
                raise ValueError(f"a region with {len(labels.get(id_, ()))} labels instead of one ({id_})")
            regions[id_] = region._replace(label=str(labels[id_][0]))
    return list(regions.values())


def _label_studio_other(name: str, value: Mapping[str, Any]) -> Region:
    if value.get("rotation"):
        raise ValueError(f"a rotated {name}")
    x, y, box = value.get("x", 0), value.get("y", 0), None
    if "points" in value:
        box = _bounds(value["points"])
    elif "radiusX" in value:
        box = _box(x - value["radiusX"], y - value["radiusY"], 2 * value["radiusX"], 2 * value["radiusY"])
    elif "height" in value:
        box = _box(x, y, value["width"], value["height"])
    return _other(name, None if box is None else box / 100, "relative")


_COCO = _Format("COCO JSON", _coco, by_size=True)
_YOLO = _Format("YOLO polygons", _yolo, by_size=True)
_LABELME = _Format("labelme JSON", _labelme, has_class_order=False)
_CVAT = _Format("CVAT for images", _cvat)
_LABEL_STUDIO = _Format("Label Studio JSON", _label_studio, has_class_order=False)
