"""Time of a training step by method and precision: forward, loss, backward and optimizer, with peak memory.

    python benchmarks/step.py                                   # on a GPU: resnet50s, 8 + 8 images of 321 px
    python benchmarks/step.py --device cpu --backbone test_resnet --crop 65 --batch 2 --precisions float32

All methods are timed in one process on the same images, which lie on the device. What each costs relative to
the first method, `supervised`, is the last column.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from mlpmatch_pl import MLPMatch
from mlpmatch_pl.module import total_loss

METHODS = ("supervised", "fixmatch", "unimatch", "mlpmatch", "mlpmatch_official")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbone", default="resnet50s")
    parser.add_argument("--crop", type=int, default=321)
    parser.add_argument("--batch", type=int, default=8, help="labeled images, and as many unlabeled ones")
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()

    rows = []
    for precision in arguments.precisions:
        for method in arguments.methods:
            rows.append(measure(method, precision, arguments))
            base = next(
                (row for row in rows if row["precision"] == precision and row["method"] == "supervised"), rows[-1]
            )
            rows[-1]["relative"] = rows[-1]["ms"] / base["ms"]
            print("{method:18} {precision:9} {ms:9.1f} ms {images_per_second:8.1f} img/s {memory:>9} {relative:5.2f} x"
                  .format(**rows[-1], memory=f"{rows[-1]['peak_mib']:.0f} MiB" if rows[-1]["peak_mib"] else "-"),
                  flush=True)  # fmt: skip
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: str(value) for key, value in vars(arguments).items() if key != "out"}
        result = {"machine": machine(arguments.device), "settings": settings, "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(method: str, precision: str, arguments: argparse.Namespace) -> dict:
    """Return median time of a step and peak memory, after a warm-up."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    channels_last = precision == "bfloat16" and device.type == "cuda"
    module = MLPMatch(arguments.classes, method=method, backbone=arguments.backbone, channels_last=channels_last)
    module = module.to(device).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    batch = random_batch(module, arguments, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for number in range(arguments.warmup + arguments.steps):
        started = synchronized(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            result = module.step(batch["labeled"], batch["unlabeled"], number)
            loss = total_loss(result.terms, module.method, module.method.lambda_max / 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(synchronized(device) - started)
    median = sorted(times[arguments.warmup :])[arguments.steps // 2]
    return {
        "method": method,
        "precision": precision,
        "ms": 1000 * median,
        "images_per_second": 2 * arguments.batch / median,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None,
    }


def random_batch(module: MLPMatch, arguments: argparse.Namespace, device: torch.device) -> dict:
    """Make a batch as the data module gives it; for `supervised` with twice the labeled images."""
    size, crop, generator = arguments.batch, arguments.crop, torch.Generator().manual_seed(0)

    def images(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)

    def views() -> dict:
        valid = torch.ones(size, crop, crop, dtype=torch.bool, device=device)
        return {"weak": images(size, 3, crop, crop), "strong": images(size, num_strong, 3, crop, crop), "valid": valid}

    num_strong = len(module.method.strong_weights)
    labeled = size if num_strong else 2 * size
    mask = torch.randint(0, arguments.classes, (labeled, crop, crop), dtype=torch.uint8, generator=generator).to(device)
    box = torch.tensor([crop // 4, crop // 4, crop // 2, crop // 2], device=device)
    unlabeled = {**views(), "boxes": box.expand(size, num_strong, 4), "partner": views()} if num_strong else {}
    return {"labeled": {"image": images(labeled, 3, crop, crop), "mask": mask}, "unlabeled": unlabeled}


def synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def machine(device: str) -> dict:
    """Describe the machine, so that figures can be compared."""
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {
        "gpu": gpu,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
    }


if __name__ == "__main__":
    main()
