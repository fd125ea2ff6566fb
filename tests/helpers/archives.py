"""Tiny archives with the layout of the real ones, and a web server whose connections can break."""

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from mlpmatch_pl.utils.palette import default_palette

COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
CITIES = {"train": ("aachen", 3), "val": ("frankfurt", 2), "test": ("berlin", 1)}


def encode(pixels, kind="PNG", palette=None) -> bytes:
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if palette is not None:
        image.putpalette(palette)
    image.save(buffer, kind)
    return buffer.getvalue()


def photo(seed: int, height=20, width=30) -> bytes:
    return encode(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8), "JPEG")


def labels(seed: int, classes: int, height=20, width=30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, (height, width), np.uint8)


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def apply_facts(facts: dict, set_attribute=setattr) -> None:
    """Replace the published checksums and counts by those of tiny archives."""
    module = import_module(f"mlpmatch_pl.commands.prepare.{facts['module']}")
    set_attribute(module, "COUNTS", facts["counts"])
    for name, value in facts.get("md5", {}).items():
        archive = getattr(module, name)
        if isinstance(archive, dict):
            set_attribute(module, name, {key: replace(archive[key], md5=value[key]) for key in archive})
        else:
            set_attribute(module, name, replace(archive, md5=value))


def lines(names) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()


VOC_TRAIN = ["2007_000001", "2007_000002", "2007_000003"]
VOC_VAL = ["2007_000010", "2007_000011"]
SBD_ONLY = ["2008_000020", "2008_000021", "2009_000022"]
SBD_TRAIN = [VOC_TRAIN[0], SBD_ONLY[2], SBD_ONLY[0]]
SBD_VAL = [VOC_VAL[0], SBD_ONLY[1]]


def voc_archives(folder: Path, without: str = "") -> dict:
    """VOC's tar and SBD's tgz; SBD has masks, all of class 20, for one train and one val image of VOC's too."""
    names = [*VOC_TRAIN, *VOC_VAL, *SBD_ONLY, "2010_000099"]
    base = "VOCdevkit/VOC2012"
    files = {f"{base}/Annotations/{name}.xml": b"<annotation/>" for name in names}
    files |= {f"{base}/ImageSets/Main/train.txt": lines(names)}
    for part, listed in (("train", VOC_TRAIN), ("val", VOC_VAL), ("trainval", VOC_TRAIN + VOC_VAL)):
        files[f"{base}/ImageSets/Segmentation/{part}.txt"] = lines(listed)
    files |= {f"{base}/JPEGImages/{name}.jpg": photo(i) for i, name in enumerate(names)}
    colors = [value for color in default_palette(21) for value in color]
    palette = [*colors, *[0] * (3 * 234), 224, 224, 192]  # void is 255
    files |= {
        f"{base}/SegmentationClass/{name}.png": encode(labels(i, 20), palette=palette)
        for i, name in enumerate(VOC_TRAIN + VOC_VAL)
    }
    files |= {f"{base}/SegmentationObject/{name}.png": b"not needed" for name in VOC_TRAIN}
    files = {name: content for name, content in files.items() if not without or without not in name}
    voc = write_tar(folder / "VOCtrainval_11-May-2012.tar", files)
    base = "benchmark_RELEASE/dataset"
    files = {
        "benchmark_RELEASE/README": b"SBD",
        f"{base}/train.txt": lines(SBD_TRAIN),
        f"{base}/val.txt": lines(SBD_VAL),
    }
    for name in SBD_TRAIN + SBD_VAL:
        ids = sbd_ids(name)
        files[f"{base}/cls/{name}.mat"] = mat(ids)
        files[f"{base}/inst/{name}.mat"] = b"not needed"
    sbd = write_tar(folder / "benchmark.tgz", files, "w:gz")
    counts = {"train": 3, "val": 2, "train_aug": 6}
    return {"module": "voc", "counts": counts, "md5": {"VOC": md5(voc), "SBD": md5(sbd)}}


def sbd_ids(name: str) -> np.ndarray:
    return labels(int(name[-2:]), 2) * 20


def mat(ids: np.ndarray) -> bytes:
    boundaries = np.empty((20, 1), object)
    boundaries[:] = [[np.zeros((2, 2), np.uint8)]]
    buffer = io.BytesIO()
    content = {"Boundaries": boundaries, "Segmentation": ids, "CategoriesPresent": np.unique(ids)[:, None]}
    savemat(buffer, {"GTcls": content}, do_compression=True)
    return buffer.getvalue()


def coco_content(split: str) -> dict:
    """Two images: one without annotations, one where a crowd, a large and a small instance overlap."""
    first = 100 if split == "train2017" else 200
    images = [{"id": first + i, "file_name": f"{first + i:012}.jpg", "height": 20, "width": 30} for i in range(2)]
    box = {  # x0, y0, x1, y1 as a polygon
        name: [[x0, y0, x1, y0, x1, y1, x0, y1]]
        for name, (x0, y0, x1, y1) in {"large": (2, 2, 22, 18), "small": (10, 6, 16, 12)}.items()
    }
    crowd = {"size": [20, 30], "counts": [0, 300, 300]}  # the left half, column by column
    entries = [  # the small one first, so that the file's order is the wrong one
        (90, box["small"], 0, 36.0),
        (1, box["large"], 0, 320.0),
        (13, crowd, 1, 300.0),
    ]
    annotations = [
        {
            "id": i,
            "image_id": first + 1,
            "category_id": category,
            "segmentation": shape,
            "iscrowd": crowded,
            "area": area,
        }
        for i, (category, shape, crowded, area) in enumerate(entries)
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": i, "name": str(i)} for i in COCO_IDS]}


def coco_archives(folder: Path) -> dict:
    paths, annotations = {}, {}
    for split in ("train2017", "val2017"):
        content = coco_content(split)
        annotations[f"annotations/instances_{split}.json"] = json.dumps(content).encode()
        annotations[f"annotations/captions_{split}.json"] = b"not needed"
        images = {f"{split}/{image['file_name']}": photo(image["id"]) for image in content["images"]}
        paths[split] = write_zip(folder / f"{split}.zip", {f"{split}/": b"", **images})
    path = write_zip(folder / "annotations_trainval2017.zip", annotations)
    return {
        "module": "coco",
        "counts": {"train2017": 2, "val2017": 2},
        "md5": {"IMAGES": {split: md5(paths[split]) for split in paths}, "ANNOTATIONS": md5(path)},
    }


def ade20k_archives(folder: Path) -> dict:
    base, files = "ADEChallengeData2016", {}
    for split, part, count in (("training", "train", 3), ("validation", "val", 2)):
        for i in range(1, count + 1):
            files[f"{base}/images/{split}/ADE_{part}_{i:08}.jpg"] = photo(i)
            files[f"{base}/annotations/{split}/ADE_{part}_{i:08}.png"] = encode(labels(i, 151))
    files |= {f"{base}/objectInfo150.txt": b"Idx\tRatio\n", f"{base}/sceneCategories.txt": b"a b\n"}
    path = write_zip(folder / "ADEChallengeData2016.zip", files)
    return {"module": "ade20k", "counts": {"training": 3, "validation": 2}, "md5": {"ARCHIVE": md5(path)}}


def cityscapes_archives(folder: Path, without: str = "") -> dict:
    images, masks = {"README": b"", "license.txt": b""}, {"README": b"", "license.txt": b""}
    for split, (city, count) in CITIES.items():
        for i in range(count):
            stem = f"{city}_{i:06}_000019"
            images[f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png"] = encode(labels(i, 256))
            for kind in ("labelIds", "instanceIds", "color"):
                masks[f"gtFine/{split}/{city}/{stem}_gtFine_{kind}.png"] = encode(labels(i, 34))
            masks[f"gtFine/{split}/{city}/{stem}_gtFine_polygons.json"] = b"{}"
    masks = {name: content for name, content in masks.items() if not without or without not in name}
    write_zip(folder / "leftImg8bit_trainvaltest.zip", images)
    write_zip(folder / "gtFine_trainvaltest.zip", masks)
    return {"module": "cityscapes", "counts": {split: count for split, (_, count) in CITIES.items()}}


def camvid_files() -> dict[str, bytes]:
    files = {}
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        names = [f"0001TP_{i:06}.png" for i in range(count)][::-1]  # the order of the list, not of the names
        files[f"{split}.txt"] = lines(f"/SegNet/CamVid/{split}/{n} /SegNet/CamVid/{split}annot/{n}" for n in names)
        for i, name in enumerate(names):
            files[f"{split}/{name}"] = encode(np.repeat(labels(i, 256)[..., None], 3, axis=2))
            files[f"{split}annot/{name}"] = encode(labels(i, 12))
    return files


CAMVID_FACTS = {"module": "camvid", "counts": {"train": 3, "val": 2, "test": 1}}


class Server:
    """A web server on this machine.

    Attributes:
        files: Content by path.
        redirects: Location by path.
        cuts: How many more answers break off half way.
        failures: How many more answers are 503.
        requests: Path of each GET request, in order.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.cuts = self.failures = 0
        self.requests: list[str] = []
        self.url = ""

    def publish(self, url: str, content: bytes) -> None:
        self.files["/" + url.split("/", 3)[3]] = content


@contextmanager
def run_server():
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests.append(self.path)
            if state.failures:
                state.failures -= 1
                return self.send_error(503)
            if self.path in state.redirects:
                self.send_response(302)
                self.send_header("Location", state.redirects[self.path])
                self.send_header("Content-Length", "0")
                return self.end_headers()
            if (content := state.files.get(self.path)) is None:
                return self.send_error(404)
            self.do_HEAD()
            if state.cuts:
                state.cuts -= 1
                content = content[: len(content) // 2]
                self.close_connection = True
            self.wfile.write(content)
            return None

        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(state.files.get(self.path, b""))))
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
