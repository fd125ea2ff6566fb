"""Images per second of an evaluation, compared with the usual loop over single images.

    python -m benchmarks.evaluate --root /data/voc2012           # or MLPMATCH_DATA=/data with a folder voc2012
    python -m benchmarks.evaluate --backbone resnet101s          # on a GPU
    python -m benchmarks.evaluate --generated                    # without data

The same untrained network on the same files, in one process, alternating; the figures are medians over the rounds, and
the ratio is the median of the ratios of the rounds:

    plain           one image at a time: PIL, a forward pass, argmax, a copy to the CPU, numpy.bincount
    mlpmatch_pl     `Trainer.test` as in mlpmatch_pl.evaluate: channels last, loading processes, counting on the device
    with boundary   the same with boundary IoU and the score of each image

Before they are timed, the confusion matrices of all loops are compared.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.loader_photos import Pair, voc_pairs
from mlpmatch_pl import MLPMatch, Segmentor
from mlpmatch_pl.commands.evaluate.scores import ImageScores
from mlpmatch_pl.data import files as file_source
from mlpmatch_pl.data.dataset import EvalDataset
from mlpmatch_pl.data.datasets.shapes import Shapes
from mlpmatch_pl.data.readers.image import ImageReader
from mlpmatch_pl.data.readers.mask import MaskReader
from mlpmatch_pl.engine.logging import quiet
from mlpmatch_pl.evaluation import predict_logits
from mlpmatch_pl.utils.cpu import usable_cores

CLASSES = 21
TOLERANCE = 0.01  # share of pixels that may differ, since two decoders of JPEG and batches of other sizes round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("MLPMATCH_DATA")
    parser.add_argument("--root", type=Path, default=Path(data, "voc2012") if data else None)
    parser.add_argument("--generated", action="store_true", help="generate images in a temporary folder")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbone", default="resnet50s" if torch.cuda.is_available() else "mobilenetv2_100")
    parser.add_argument("--decoder-channels", type=int, default=256)
    parser.add_argument("--num-workers", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    quiet()
    if arguments.root is None and not arguments.generated:
        parser.error("set --root to a folder with JPEGImages and SegmentationClass, or MLPMATCH_DATA, or --generated")
    with tempfile.TemporaryDirectory() as scratch:
        make = generated_pairs if arguments.generated else voc_pairs
        pairs = make(Path(scratch) if arguments.generated else arguments.root, arguments.images)
        rows = measure(pairs, arguments)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("out", "root")}
        result = {"machine": machine(arguments.device), "settings": settings, "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(pairs: list[Pair], arguments: argparse.Namespace) -> list[dict]:
    """Time all loops alternately, print a line for each, and return the rows."""
    torch.manual_seed(0)
    module = MLPMatch(CLASSES, backbone=arguments.backbone, decoder={"channels": arguments.decoder_channels}).eval()
    segmentor = deepcopy(module.segmentor).to(arguments.device)
    module.to(arguments.device, memory_format=torch.channels_last)
    files = [file_source.Pair(*map(str, pair)) for pair in pairs]
    images = EvalDataset(file_source.FileSource(Path("/"), files, ImageReader(3, 8), MaskReader()), CLASSES, 255)
    workers = max(usable_cores() - 1, 0) if arguments.num_workers is None else arguments.num_workers
    loops: dict[str, Callable[[], np.ndarray]] = {
        "plain": lambda: plain(segmentor, pairs, torch.device(arguments.device)),
        "mlpmatch_pl": lambda: run_test(module, images, arguments.device, workers),
        "with boundary": lambda: run_test(module, images, arguments.device, workers, boundary=True),
    }
    compare([loop() for loop in loops.values()])  # a warm-up, too
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(arguments.rounds):
        for name, loop in loops.items():
            started = time.perf_counter()
            loop()
            seconds[name].append(time.perf_counter() - started)
    rows = []
    for name, times in seconds.items():
        ratio = statistics.median(base / own for base, own in zip(seconds["plain"], times, strict=True))
        row = {"loop": name, "images_per_second": len(pairs) / statistics.median(times), "ratio": ratio}
        print("{loop:14} {images_per_second:7.1f} images/s {ratio:5.2f} x".format(**row), flush=True)
        rows.append(row)
    return rows


def run_test(
    module: MLPMatch, images: EvalDataset, device: str, workers: int, boundary: float | None = None
) -> np.ndarray:
    """Evaluate with `Trainer.test`, and return the confusion matrix."""
    callbacks = [Boundaries(ImageScores(len(images), CLASSES, boundary=0.02))] if boundary else []
    trainer = Trainer(
        accelerator=torch.device(device).type, devices=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.test(module, DataLoader(images, num_workers=workers), verbose=False)
    module.to(device)  # the trainer moves it to the CPU
    return module.last_counts_CC.numpy()


class Boundaries(Callback):
    def __init__(self, metric: ImageScores) -> None:
        self.metric = metric

    def on_test_start(self, trainer, pl_module):
        self.metric.to(pl_module.device)

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metric.update(outputs, batch["mask"], batch["index"])


@torch.no_grad()
def plain(segmentor: Segmentor, pairs: list[Pair], device: torch.device) -> np.ndarray:
    """Evaluate with the usual loop, and return the confusion matrix."""
    counts = np.zeros((CLASSES, CLASSES), np.int64)
    for image_path, mask_path in pairs:
        image = torch.from_numpy(np.array(Image.open(image_path).convert("RGB"))).permute(2, 0, 1)[None]
        mask = np.array(Image.open(mask_path))
        label = predict_logits(segmentor, image.to(device)).argmax(1)[0].cpu().numpy()
        counted = mask < CLASSES
        bins = mask[counted].astype(np.int64) * CLASSES + label[counted]
        counts += np.bincount(bins, minlength=CLASSES**2).reshape(CLASSES, CLASSES)
    return counts


def compare(matrices: list[np.ndarray]) -> None:
    """Stop where the loops do not count the same."""
    first = matrices[0]
    for other in matrices[1:]:
        if not (first.sum(1) == other.sum(1)).all() or np.abs(first - other).sum() > 2 * TOLERANCE * first.sum():
            raise SystemExit(f"expected equal confusion matrices, but got\n{first}\nand\n{other}")


def generated_pairs(folder: Path, count: int) -> list[Pair]:
    """Write scenes of VOC's size, in portrait and landscape format."""
    scenes, pairs = Shapes("photos", count, size=500), []
    for index in range(count):
        height, width = (375, 500) if index % 3 else (500, 375)
        pair = (folder / f"{index}.jpg", folder / f"{index}.png")
        Image.fromarray(scenes.image(index)[:height, :width]).save(pair[0], quality=90)
        Image.fromarray(scenes.mask(index)[:height, :width]).save(pair[1])
        pairs.append(pair)
    return pairs


def machine(device: str) -> dict:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


if __name__ == "__main__":
    main()
