"""Random regions with holes that overlap, drawn by matplotlib, and written as annotation tools export them."""

import base64
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.path import Path as Outline
from PIL import Image
from pycocotools import mask as rle

CLASSES = ("car", "tree", "road")  # in the order of the exports, not of the alphabet
HEIGHT, WIDTH = 240, 320


class Shape(NamedTuple):
    label: str
    outer: np.ndarray  # (points, 2), x and y
    hole: np.ndarray | None
    inside: np.ndarray  # (HEIGHT, WIDTH) bool

    @property
    def keyhole(self):
        """One ring, in which a bridge leads to the hole and back."""
        if self.hole is None:
            return self.outer
        return np.concatenate([self.outer, self.outer[:1], self.hole, self.hole[:1]])


def _inside(ring):
    x, y = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    return Outline(ring).contains_points(np.stack([x, y], -1).reshape(-1, 2)).reshape(HEIGHT, WIDTH)


def random_shapes(rng, count):
    shapes = []
    for number in range(count):
        corners = int(rng.integers(3, 13))
        angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
        radius = rng.uniform(0.4, 1, corners) * rng.uniform(0.15, 0.5) * HEIGHT
        star = np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]
        outer = (star + rng.uniform(0.2, 0.8, 2) * (WIDTH, HEIGHT)).clip(0, (WIDTH, HEIGHT)).round(3)
        hole = ((outer - outer.mean(0)) * 0.4 + outer.mean(0)).round(3) if number % 3 == 0 else None
        inside = _inside(outer) if hole is None else _inside(outer) ^ _inside(hole)
        shapes.append(Shape(CLASSES[int(rng.integers(3))], outer, hole, inside))
    return shapes


def reference(shapes, order=CLASSES, by_size=False):
    """Draw shapes over each other: 0, or 1 + the position of their class."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for shape in sorted(shapes, key=lambda shape: -shape.inside.sum()) if by_size else shapes:
        mask[shape.inside] = 1 + order.index(shape.label)
    return mask


def save_photos(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)).save(folder / name)


def write_coco(path, scenes, placeholder=False):
    """``placeholder``: as Roboflow, with a category for the project."""
    categories = [{"id": 3 * number + 2, "name": name, "supercategory": "all"} for number, name in enumerate(CLASSES)]
    images, annotations = [], []
    for number, (name, shapes) in enumerate(scenes.items(), 10):
        images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
        for shape in shapes:
            if shape.hole is None:
                segmentation = [shape.outer.ravel().tolist()]
            elif len(annotations) % 2:
                flat = shape.inside.ravel(order="F").astype(int)
                edges = np.flatnonzero(np.diff(flat)) + 1
                counts = np.diff([0, *edges, flat.size]).tolist()
                segmentation = {"size": [HEIGHT, WIDTH], "counts": [0, *counts] if flat[0] else counts}
            else:
                segmentation = rle.encode(np.asfortranarray(shape.inside.astype(np.uint8)))
                segmentation["counts"] = segmentation["counts"].decode()
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": 3 * CLASSES.index(shape.label) + 2,
                    "segmentation": segmentation,
                    "iscrowd": 0,
                }
            )
    if placeholder:
        categories.insert(0, {"id": 0, "name": "all", "supercategory": "none"})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories[::-1]}))


def write_yolo(root, scenes):
    (root / "labels").mkdir(parents=True)
    names = "\n".join(f"  {number}: {name}" for number, name in enumerate(CLASSES))
    (root / "data.yaml").write_text(f"path: .\ntrain: images\nnames:\n{names}\n")
    for name, shapes in scenes.items():
        lines = []
        for shape in shapes:
            numbers = (shape.keyhole / (WIDTH, HEIGHT)).ravel()
            lines.append(f"{CLASSES.index(shape.label)} {' '.join(f'{number:.6f}' for number in numbers)}\n")
        (root / "labels" / f"{Path(name).stem}.txt").write_text("".join(lines))


def write_labelme(folder, scenes):
    folder.mkdir(parents=True, exist_ok=True)
    for name, shapes in scenes.items():
        written = []
        for shape in shapes:
            entry = {"label": shape.label, "points": shape.outer.tolist(), "shape_type": "polygon", "flags": {}}
            if shape.hole is not None:
                (top, left), (bottom, right) = (
                    edge(np.argwhere(shape.inside), 0).tolist() for edge in (np.min, np.max)
                )
                buffer = io.BytesIO()
                Image.fromarray(shape.inside[top : bottom + 1, left : right + 1]).save(buffer, "PNG")
                entry |= {"shape_type": "mask", "points": [[left, top], [right, bottom]]}
                entry["mask"] = base64.b64encode(buffer.getvalue()).decode()
            written.append(entry)
        content = {"version": "5.4.1", "shapes": written, "imagePath": f"..\\photos\\{name}", "imageData": None}
        content |= {"imageHeight": HEIGHT, "imageWidth": WIDTH}
        (folder / f"{Path(name).stem}.json").write_text(json.dumps(content))


def write_cvat(path, scenes):
    """The shapes in reverse order; ``z_order`` puts them right."""
    labels = "".join(f"<label><name>{name}</name><color>#aa0000</color></label>" for name in CLASSES)
    images = []
    for number, (name, shapes) in enumerate(scenes.items()):
        written = []
        for order, shape in reversed(list(enumerate(shapes))):
            common = f'label="{shape.label}" source="manual" occluded="0" z_order="{order}"'
            if shape.hole is None:
                points = ";".join(f"{x},{y}" for x, y in shape.outer)
                written.append(f'<polygon {common} points="{points}"><attribute name="a">1</attribute></polygon>')
                continue
            (top, left), (bottom, right) = (edge(np.argwhere(shape.inside), 0).tolist() for edge in (np.min, np.max))
            flat = shape.inside[top : bottom + 1, left : right + 1].ravel().astype(int)
            counts = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]).tolist()
            counts = [0, *counts] if flat[0] else counts
            box = f'left="{left}" top="{top}" width="{right + 1 - left}" height="{bottom + 1 - top}"'
            written.append(f'<mask {common} rle="{", ".join(map(str, counts))}" {box}></mask>')
        images.append(
            f'<image id="{number}" name="{name}" width="{WIDTH}" height="{HEIGHT}"><tag label="car"/>'
            f"{''.join(written)}</image>"
        )
    meta = f"<meta><task><labels>{labels}</labels></task></meta>"
    path.write_text(f'<?xml version="1.0"?><annotations><version>1.1</version>{meta}{"".join(images)}</annotations>')


def brush(inside):
    """Pack RGBA pixels as the JavaScript library rle-pack does: runs where values repeat, single values otherwise."""
    values = np.where(inside, 255, 0).astype(np.uint8)[..., None].repeat(4, axis=2)
    values[0, :, :3] = 7  # colors where alpha is 0 don't count
    flat = values.ravel()
    bits = [f"{flat.size:032b}", f"{7:05b}", *(f"{size - 1:04b}" for size in (3, 4, 8, 16))]
    starts = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
    at = 0
    while at < len(starts) - 1:
        length = starts[at + 1] - starts[at]
        if length == 1:  # a packet of up to 8 single values
            end = at + 1
            while end < len(starts) - 1 and starts[end + 1] - starts[end] == 1 and end - at < 8:
                end += 1
            words = "".join(f"{value:08b}" for value in flat[starts[at] : starts[end]])
            bits.append(f"000{end - at - 1:03b}{words}")
            at = end
            continue
        value = flat[starts[at]]
        for piece in [1 << 16] * (length >> 16) + [length & 0xFFFF] * bool(length & 0xFFFF):
            kind, size = next((kind, size) for kind, size in enumerate((3, 4, 8, 16)) if piece <= 1 << size)
            bits.append(f"1{kind:02b}{piece - 1:0{size}b}{value:08b}")
        at += 1
    joined = "".join(bits)
    joined += "0" * (-len(joined) % 8)
    return [int(joined[start : start + 8], 2) for start in range(0, len(joined), 8)]


def write_label_studio(path, scenes):
    tasks = []
    for number, (name, shapes) in enumerate(scenes.items()):
        results = [{"type": "choices", "value": {"choices": ["day"]}, "id": "c"}]
        for order, shape in enumerate(shapes):
            common = {} if number % 2 else {"id": f"r{order}"}  # results of scripts have none
            common |= {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
            if shape.hole is None:
                points = (shape.outer / (WIDTH, HEIGHT) * 100).tolist()
                value = {"points": points, "closed": True, "polygonlabels": [shape.label]}
                results.append({**common, "type": "polygonlabels", "value": value})
            else:
                value = {"format": "rle", "rle": brush(shape.inside), "brushlabels": [shape.label]}
                results.append({**common, "type": "brushlabels", "value": value})
        image = f"/data/upload/7/0a1b2c3d-{name.replace(' ', '_')}"
        done = [{"id": 1, "was_cancelled": True, "result": []}, {"id": 2, "was_cancelled": False, "result": results}]
        tasks.append({"id": number, "data": {"image": image}, "annotations": done, "predictions": []})
    path.write_text(json.dumps(tasks))
