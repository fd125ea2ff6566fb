"""Samples per second on one core: the datasets of this package and the published input pipeline.

    python -m benchmarks.loader --root /data/voc2012             # or MLPMATCH_DATA=/data with a folder voc2012
    python -m benchmarks.loader --root /data/voc2012 --formats voc --rounds 3

Reads JPEG files of VOC, and PNG files of Cityscapes' size that are made from them in a temporary folder. All pipelines
read the same files in one process and thread, in short alternating rounds. Results are medians over the rounds of
processor times, so that other processes on the machine matter little:

    reference       benchmarks/loader_reference.py: PIL and torchvision; a step loads two unlabeled samples
    mlpmatch_pl     LabeledDataset and UnlabeledDataset
    with cache      the same, with decoded images as memory-mapped files (loader.cache)

A step is 1 labeled and 1 unlabeled sample (and, in the reference, its CutMix partner); ratios are of steps per second.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import cv2
import torch

from benchmarks.loader_photos import CLASSES, Pair, make_cityscapes_pairs, voc_pairs
from benchmarks.loader_reference import ReferenceLabeled, ReferenceUnlabeled, read_image
from mlpmatch_pl.data.base import ImageSource
from mlpmatch_pl.data.cache import CachedSource
from mlpmatch_pl.data.dataset import LabeledDataset, UnlabeledDataset
from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.data.transforms.strong import StrongView
from mlpmatch_pl.data.transforms.weak import WeakView
from mlpmatch_pl.perturbation import CutMix

FORMATS = {"voc": 321, "cityscapes": 801}  # crop sizes
VOC_CLASSES = 21
Pipeline = dict[str, Callable[[int, int], object]]  # loads a sample, given its index and the number of the draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("MLPMATCH_DATA")
    parser.add_argument("--root", type=Path, default=Path(data, "voc2012") if data else None)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--voc-images", type=int, default=100)
    parser.add_argument("--cityscapes-images", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samples", type=int, default=24, help="samples of each kind per round")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.root is None:
        parser.error("set --root to a folder with JPEGImages and SegmentationClass, or MLPMATCH_DATA")

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    rows = []
    for name in arguments.formats:
        with tempfile.TemporaryDirectory() as scratch:
            pairs = voc_pairs(arguments.root, arguments.voc_images)
            if name == "cityscapes":
                photos = voc_pairs(arguments.root, 1000)
                pairs = make_cityscapes_pairs(photos, Path(scratch, "cityscapes"), arguments.cityscapes_images)
            rows += measure(name, pairs, Path(scratch), arguments)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("out", "root")}
        result = {"machine": machine(), "settings": settings, "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(name: str, pairs: list[Pair], scratch: Path, arguments: argparse.Namespace) -> list[dict]:
    """Time all pipelines on one format, and print and return a row for each."""
    classes = CLASSES if name == "cityscapes" else VOC_CLASSES
    source = file_source(pairs, classes, scratch)
    cached = CachedSource(source, scratch / "cache")
    cached.folder.mkdir()
    for index in range(len(pairs)):
        cached.image(index), cached.mask(index)  # decoded and stored here, not in the timed rounds
    size = FORMATS[name]
    pipelines = {
        "reference": reference(pairs, size),
        "mlpmatch_pl": own(source, classes, size),
        "with cache": own(cached, classes, size),
        "decoding, PIL": {"image": lambda index, draw: read_image(pairs[index][0])},
        "decoding": {"image": lambda index, draw: source.image(index)},
    }
    times = timed(pipelines, len(pairs), arguments.rounds, arguments.samples)
    rows = [summarize(name, size, pipeline, seconds) for pipeline, seconds in times.items()]
    for row in rows:
        if "steps_per_second" in row:
            row["ratio"] = row["steps_per_second"] / rows[0]["steps_per_second"]
        print(line(row), flush=True)
    return rows


def line(row: dict) -> str:
    start = f"{row['format']:10} {row['pipeline']:13} "
    if "image_ms" in row:
        return start + f"{row['image_ms']:.2f} ms per image"
    rates = (f"{kind} {row[f'{kind}_per_second']:6.1f}/s" for kind in ("labeled", "unlabeled", "steps"))
    return start + "  ".join(rates) + f"  {row['ratio']:5.1f} x"


def file_source(pairs: list[Pair], classes: int, scratch: Path) -> ImageSource:
    """Read the files as a training does, through `folder` with list files."""
    lists = {"labeled": pairs[:1], "unlabeled": pairs[1:-1], "val": pairs[-1:], "train": pairs}
    root = pairs[0][0].parent.parent
    for name, part in lists.items():
        lines = [f"{image.relative_to(root)}\t{mask.relative_to(root)}\n" for image, mask in part]
        (scratch / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
    paths = {name: str(scratch / f"{name}.txt") for name in lists}
    return folder(str(root), [f"class {number}" for number in range(classes)], **paths).train


def reference(pairs: list[Pair], size: int) -> Pipeline:
    labeled, unlabeled = ReferenceLabeled(pairs, size), ReferenceUnlabeled(pairs, size)

    def seeded(draw: int) -> None:
        random.seed(draw)
        torch.manual_seed(draw)

    def load_labeled(index: int, draw: int) -> object:
        seeded(draw)
        return labeled[index]

    def load_unlabeled(index: int, draw: int) -> object:
        seeded(draw)
        return unlabeled[index], unlabeled[index]

    return {"labeled": load_labeled, "unlabeled": load_unlabeled}


def own(source: ImageSource, classes: int, size: int) -> Pipeline:
    weak, indices = WeakView(size), range(len(source))
    labeled = LabeledDataset(source, indices, classes, weak, seed=0)
    unlabeled = UnlabeledDataset(source, indices, weak, StrongView(), CutMix(), num_strong=2, second_view=False, seed=0)
    return {
        "labeled": lambda index, draw: labeled[index, draw],
        "unlabeled": lambda index, draw: unlabeled[index, draw],
    }


def timed(pipelines: dict[str, Pipeline], count: int, rounds: int, samples: int) -> dict[str, dict[str, list[float]]]:
    """Return seconds per sample in each round; a first round warms up and is dropped."""
    times = {name: {kind: [] for kind in pipeline} for name, pipeline in pipelines.items()}
    for number in range(rounds + 1):
        draws = range(number * samples, (number + 1) * samples)
        for name, pipeline in pipelines.items():
            for kind, load in pipeline.items():
                seconds = time_samples(load, [draw % count for draw in draws], draws)
                if number:
                    times[name][kind].append(seconds)
    return times


def time_samples(load: Callable[[int, int], object], indices: Sequence[int], draws: Sequence[int]) -> float:
    started = time.process_time()
    for index, draw in zip(indices, draws, strict=True):
        load(index, draw)
    return (time.process_time() - started) / len(draws)


def summarize(name: str, size: int, pipeline: str, times: dict[str, list[float]]) -> dict:
    row: dict = {"format": name, "crop": size, "pipeline": pipeline}
    medians = {kind: statistics.median(seconds) for kind, seconds in times.items()}
    if "image" in medians:
        return {**row, "image_ms": 1000 * medians["image"]}
    step = statistics.median(map(sum, zip(*times.values(), strict=True)))
    rates = {f"{kind}_per_second": 1 / seconds for kind, seconds in medians.items()}
    return {**row, **rates, "steps_per_second": 1 / step}


def machine() -> dict:
    """Describe the machine, for comparisons of results."""
    packages = ("torch", "torchvision", "pillow", "opencv-python-headless", "albumentations", "numpy")
    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        **{package: version(package) for package in packages},
    }


if __name__ == "__main__":
    main()
