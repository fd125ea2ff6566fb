"""Read a whole data set, say what is in it and what is wrong with it, and draw what training will see."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlpmatch_pl.data.base import SegmentationData
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.data.validation import (
    PARTS,
    Finding,
    ScannedFile,
    all_jobs,
    find_problems,
    pixels_by_class,
    require_validation,
    scan_files,
)
from mlpmatch_pl.engine.build import build_datamodule, read_config
from mlpmatch_pl.engine.logging import quiet
from mlpmatch_pl.engine.run_folder import describe_splits, save_lists
from mlpmatch_pl.methods.method import resolve_method
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import OTHER_FOLDER, refuse_overwrite
from mlpmatch_pl.visualization.batch_preview import batch_preview

log = logging.getLogger(__name__)
MOST_PRINTED = 20  # findings; check.json has all
FILES = ("check.json", "labeled.txt", "val.txt", "views.png")
OF_A_RUN = ("config.yaml", "splits.json")  # its lists say what it was trained on


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check the data of a training configuration. See `mlpmatch_pl.check.check`."""
    quiet()
    config = read_config(cfg)
    output_dir = Path(config["output_dir"]).resolve()
    refuse_overwrite((output_dir / name for name in (*OF_A_RUN, *FILES)), OTHER_FOLDER)
    config["loader"] |= {"num_workers": 0}  # one batch is drawn
    datamodule = build_datamodule(config, resolve_method(config["method"]))
    data = datamodule.data
    require_validation(data)
    inspected = _read(data)
    notes = [Finding(False, note) for note in data.notes]
    findings = find_problems(data, inspected, datamodule.crop_size) + notes
    report = _report(data, inspected, findings)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "check.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    save_lists(output_dir, data)
    _print(report, findings)
    _draw(datamodule, inspected, output_dir / "views.png", config["seed"])
    log.info("report, lists and picture of the views in %s", output_dir)
    if errors := sum(finding.is_error for finding in findings):
        raise UserError(f"expected data without errors, but found {errors}; correct what {output_dir}/check.json lists")
    return report


def _read(data: SegmentationData) -> list[ScannedFile]:
    jobs = all_jobs(data)
    console = Console(file=sys.stderr)
    progress = track(
        scan_files(data, jobs, thorough=True),
        description="reading",
        total=len(jobs),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    return list(progress)


def _report(data: SegmentationData, inspected: Sequence[ScannedFile], findings: Sequence[Finding]) -> dict[str, Any]:
    """Gather what check.json holds."""
    splits = describe_splits(data)
    parts = {part: [item for item in inspected if item.part == part] for part in PARTS}
    return {
        "errors": [finding.message for finding in findings if finding.is_error],
        "warnings": [finding.message for finding in findings if not finding.is_error],
        "sets": {
            part: {**splits[part], "sizes": _sizes(items), **_class_shares(data, items, part)}
            for part, items in parts.items()
            if items
        },
        "channels": _channels(item for part in ("labeled", "unlabeled") for item in parts[part]),
    }


def _sizes(items: Iterable[ScannedFile]) -> dict[str, int]:
    """Count the images of each size, width x height, the most frequent first."""
    sizes = Counter(item.size for item in items if item.problem is None)
    return {f"{width}x{height}": count for (height, width), count in sizes.most_common()}


def _class_shares(data: SegmentationData, items: Sequence[ScannedFile], part: str) -> dict[str, Any]:
    if part == "unlabeled":
        return {}
    pixels, images = pixels_by_class(items, part, len(data.class_names))
    names = (*data.class_names, "ignored")
    total = max(int(pixels.sum()), 1)
    return {
        "classes": {
            name: {"images": int(count), "pixels": int(number), "share": round(int(number) / total, 6)}
            for name, number, count in zip(names, pixels, images, strict=True)
        }
    }


def _channels(items: Iterable[ScannedFile]) -> dict[str, Any]:
    """Return mean and standard deviation of each channel over all pixels of the training images."""
    good = [item for item in items if item.channel_sums is not None]
    if not good:
        return {}
    pixels = sum(item.size[0] * item.size[1] for item in good)
    total, squares = np.sum([np.asarray(item.channel_sums) for item in good], axis=0) / pixels
    return {
        "mean": np.round(total, 3).tolist(),
        "std": np.round(np.sqrt(np.maximum(squares - total**2, 0)), 3).tolist(),
        "images": len(good),
    }


def _print(report: dict[str, Any], findings: Sequence[Finding]) -> None:
    for part, held in report["sets"].items():
        sizes = [f"{size} ({count})" for size, count in held["sizes"].items()]
        more = f" and {len(sizes) - 3} more sizes" if len(sizes) > 3 else ""
        log.info(
            "%s: %d images%s, sha256 %s: %s%s",
            part, held["count"], f" ({held['split']})" if part == "labeled" else "", held["sha256"][:8],
            ", ".join(sizes[:3]) or "none can be read", more,
        )  # fmt: skip
    log.info("%s", _table(report))
    if channels := report["channels"]:
        mean, std = (json.dumps(channels[key]).replace(" ", "") for key in ("mean", "std"))
        log.info("mean and deviation of the training images: backbone.mean=%s backbone.std=%s", mean, std)
    for finding in findings[:MOST_PRINTED]:
        log.log(logging.ERROR if finding.is_error else logging.WARNING, "%s: %s", _word(finding), finding.message)
    if len(findings) > MOST_PRINTED:
        log.warning("and %d more in check.json", len(findings) - MOST_PRINTED)
    if not findings:
        log.info("nothing is wrong with the data")


def _word(finding: Finding) -> str:
    return "error" if finding.is_error else "warning"


def _table(report: dict[str, Any]) -> str:
    """Write the share of the pixels and the number of images by class and set."""
    sets = {part: held["classes"] for part, held in report["sets"].items() if "classes" in held}
    table = Table(title="classes", title_justify="left")
    table.add_column("class")
    for part in sets:
        table.add_column(f"{part}: pixels %", justify="right")
        table.add_column("images", justify="right")
    for name in next(iter(sets.values()), {}):
        cells = [text for held in sets.values() for text in _cells(held[name])]
        table.add_row(name, *cells)
    console = Console(width=120, file=io.StringIO())
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def _cells(held: dict[str, Any]) -> tuple[str, str]:
    return f"{100 * held['share']:.2f}" if held["pixels"] else "-", str(held["images"])


def _draw(datamodule: SemiSupervisedDataModule, inspected: Sequence[ScannedFile], path: Path, seed: int) -> None:
    if any(item.problem for item in inspected if item.part in ("labeled", "unlabeled")):
        log.warning("no picture of the views, because some training files cannot be read")
        return
    batch = next(iter(datamodule.train_dataloader()))[0]
    batch_preview(batch, datamodule.data, seed).save(path)
