"""Memory of loading from a long list of images: of the main process, and of each worker without shared memory.

    python -m benchmarks.memory --images 100000

The images are links to one small file, so that their names determine the memory. The reference holds the same names
as Python lists of strings. Every measurement runs in its own process; Linux only (/proc).
"""

import argparse
import gc
import json
import multiprocessing
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

LABELED, VAL = 8, 2
SAMPLES = 2000  # loaded before the workers are measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for count in (1000, arguments.images):
            list_bytes = make_data(root, count)
            for names in ("tensors", "strings"):
                for context in ("fork", "spawn"):
                    row = in_a_process(measure, root, names, context)
                    rows.append(
                        {"images": count, "list_mb": list_bytes / 1e6, "names": names, "context": context, **row}
                    )
                    print(
                        "{images:>7} images, list of {list_mb:6.2f} MB, {names:7} {context:5}: "
                        "main +{main_mb:6.1f} MB, each worker {worker_mb:6.1f} MB".format(**rows[-1]),
                        flush=True,
                    )
    for names in ("tensors", "strings"):
        for context in ("fork", "spawn"):
            few, many = (row for row in rows if (row["names"], row["context"]) == (names, context))
            print(f"{names}, {context}: {many['worker_mb'] - few['worker_mb']:+.1f} MB per worker for the longer list")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"samples": SAMPLES, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def make_data(root: Path, count: int) -> int:
    """Create links to an image and a list of them; returns the size of the list in bytes."""
    for name in ("images", "masks"):
        (root / name).mkdir(exist_ok=True)
    image, mask = root / "image.jpg", root / "mask.png"
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(image)
    Image.fromarray(np.arange(48 * 48, dtype=np.uint8).reshape(48, 48) % 2).save(mask)
    lines = []
    for index in range(count):
        name = f"images/a_folder_with_a_name_of_usual_length_{index:09}.jpg"
        if not (root / name).exists():
            os.symlink(image, root / name)
        lines.append(name)
    for index in range(LABELED + VAL):
        target = root / f"masks/{Path(lines[index]).stem}.png"
        if not target.exists():
            os.symlink(mask, target)
    paired = [f"{line} masks/{Path(line).stem}.png" for line in lines[: LABELED + VAL]]
    (root / "labeled.txt").write_text("\n".join(paired[:LABELED]))
    (root / "val.txt").write_text("\n".join(paired[LABELED:]))
    (root / "unlabeled.txt").write_text("\n".join(lines[LABELED + VAL :]))
    return (root / "unlabeled.txt").stat().st_size


def measure(root: Path, names: str, context: str) -> dict[str, float]:
    """Return the memory of the dataset in the main process, and the private memory of a worker, in MB."""
    from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
    from mlpmatch_pl.data.datasets.folder import folder

    gc.collect()
    before = resident(os.getpid())
    data = folder(str(root), ["a", "b"], labeled="labeled.txt", unlabeled="unlabeled.txt", val="val.txt")
    if names == "strings":
        source = data.train
        source._images, source._masks = [list(table) for table in (source._images, source._masks)]
    datamodule = SemiSupervisedDataModule(
        data, crop_size=33, batch_size=8, num_workers=2, multiprocessing_context=context
    )
    gc.collect()
    main = resident(os.getpid()) - before
    batches = iter(datamodule.train_dataloader())
    for _ in range(SAMPLES // 8):
        next(batches, None)
    workers = [private(child.pid) for child in multiprocessing.active_children()]
    return {"main_mb": main / 1e6, "worker_mb": max(workers) / 1e6}


def in_a_process(function, *arguments):
    """Call a function in a new process and return its result."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_answer, args=(queue, function, *arguments))
    process.start()
    result = queue.get()
    process.join()
    return result


def _answer(queue, function, *arguments):
    queue.put(function(*arguments))


def resident(pid: int) -> int:
    return _fields(f"/proc/{pid}/smaps_rollup")["Rss"]


def private(pid: int) -> int:
    fields = _fields(f"/proc/{pid}/smaps_rollup")
    return fields["Private_Clean"] + fields["Private_Dirty"]


def _fields(path: str) -> dict[str, int]:
    lines = [line.split() for line in Path(path).read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if len(line) == 3}


if __name__ == "__main__":
    main()
