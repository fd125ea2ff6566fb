"""Read a whole dataset, report its content and its errors, and draw the views that training will see."""

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
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule, require_unlabeled
from mlpmatch_pl.data.validation import (
    PARTS,
    Finding,
    ScannedFile,
    all_jobs,
    find_problems,
    pixels_by_class,
    require_images,
    scan_files,
)
from mlpmatch_pl.engine.build import build_data, read_config
from mlpmatch_pl.engine.logging import quiet
from mlpmatch_pl.engine.run_folder import describe_splits, save_lists
from mlpmatch_pl.methods.method import resolve_method
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import OTHER_FOLDER, refuse_overwrite
from mlpmatch_pl.visualization.batch_preview import batch_preview

log = logging.getLogger(__name__)
MAX_PRINTED = 20  # findings; check.json has all
FILES = ("check.json", "labeled.txt", "val.txt", "views.png")
RUN_FILES = ("config.yaml", "splits.json")  # the lists beside them are those of a training


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check the data of a training configuration. See `mlpmatch_pl.check.check`."""
    quiet()
    config = read_config(cfg)
    output_dir = Path(config["output_dir"]).resolve()
    refuse_overwrite((output_dir / name for name in (*RUN_FILES, *FILES)), OTHER_FOLDER)
    config["loader"]["num_workers"] = 0  # only one batch is loaded
    method, data = resolve_method(config["method"]), build_data(config["dataset"])
    require_images(data)
    notes = [Finding(False, note) for note in data.notes]
    try:
        require_unlabeled(data, method)
    except UserError as error:  # a property of the configuration: the data are worth reading nevertheless
        notes.append(Finding(False, f"{error}; train refuses method={method.name}"))
        method = resolve_method("supervised")
    datamodule = SemiSupervisedDataModule(data, **config["loader"], method=method, seed=config["seed"])
    scanned = _scan(data)
    findings = find_problems(data, scanned, datamodule.crop_size) + notes
    report = _report(data, scanned, findings)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "check.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    save_lists(output_dir, data)
    _print(report, findings)
    if any(file.problem for file in scanned if file.part in ("labeled", "unlabeled")):
        log.warning("no picture of the views, because some training files cannot be read")
    else:
        batch = next(iter(datamodule.train_dataloader()))[0]
        batch_preview(batch, data, config["seed"]).save(output_dir / "views.png")
    log.info("report, lists and picture of the views in %s", output_dir)
    if report["errors"]:
        raise UserError(
            f"expected data without errors, but found {len(report['errors'])}; correct what {output_dir}/check.json "
            "lists"
        )
    return report


def _scan(data: SegmentationData) -> list[ScannedFile]:
    jobs, console = all_jobs(data), Console(file=sys.stderr)
    files = scan_files(data, jobs, thorough=True)
    hidden = not console.is_terminal
    return list(track(files, "reading", len(jobs), console=console, disable=hidden, transient=True))


def _report(data: SegmentationData, scanned: Sequence[ScannedFile], findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the content of check.json."""
    splits, sets = describe_splits(data), {}
    for part in PARTS:
        if files := [file for file in scanned if file.part == part]:
            sizes = Counter(file.size for file in files if file.problem is None).most_common()
            sets[part] = {**splits[part], "sizes": {f"{width}x{height}": count for (height, width), count in sizes}}
            if part != "unlabeled":
                sets[part]["classes"] = _class_shares(files, part, data.class_names)
    return {
        "errors": [finding.message for finding in findings if finding.is_error],
        "warnings": [finding.message for finding in findings if not finding.is_error],
        "sets": sets,
        "channels": _channels(file for file in scanned if file.part in ("labeled", "unlabeled")),
    }


def _class_shares(files: Sequence[ScannedFile], part: str, class_names: Sequence[str]) -> dict[str, Any]:
    pixels, images = pixels_by_class(files, part, len(class_names))
    total = max(int(pixels.sum()), 1)
    return {
        name: {"images": int(count), "pixels": int(number), "share": round(int(number) / total, 6)}
        for name, number, count in zip((*class_names, "ignored"), pixels, images, strict=True)
    }


def _channels(files: Iterable[ScannedFile]) -> dict[str, Any]:
    """Return mean and standard deviation of each channel over all pixels of the training images."""
    readable = [file for file in files if file.channel_sums is not None]
    if not readable:
        return {}
    pixels = sum(file.size[0] * file.size[1] for file in readable)
    mean, squares = np.sum([np.asarray(file.channel_sums) for file in readable], axis=0) / pixels
    std = np.sqrt(np.maximum(squares - mean**2, 0))
    return {"mean": mean.round(3).tolist(), "std": std.round(3).tolist(), "images": len(readable)}


def _print(report: dict[str, Any], findings: Sequence[Finding]) -> None:
    for part, content in report["sets"].items():
        sizes = [f"{size} ({count})" for size, count in content["sizes"].items()]
        more = f" and {len(sizes) - 3} more sizes" if len(sizes) > 3 else ""
        split = f" ({content['split']})" if part == "labeled" else ""
        shown = (", ".join(sizes[:3]) or "none can be read") + more
        log.info("%s: %d images%s, sha256 %s: %s", part, content["count"], split, content["sha256"][:8], shown)
    log.info("%s", _table(report["sets"]))
    if channels := report["channels"]:
        mean, std = (json.dumps(channels[key]).replace(" ", "") for key in ("mean", "std"))
        log.info("mean and standard deviation of the training images: backbone.mean=%s backbone.std=%s", mean, std)
    for finding in findings[:MAX_PRINTED]:
        level = logging.ERROR if finding.is_error else logging.WARNING
        log.log(level, "%s: %s", logging.getLevelName(level).lower(), finding.message)
    if len(findings) > MAX_PRINTED:
        log.warning("and %d more in check.json", len(findings) - MAX_PRINTED)
    if not findings:
        log.info("no errors or warnings")


def _table(sets: dict[str, Any]) -> str:
    """Format each class's share of the pixels and number of images, for each set with masks."""
    classes = {part: content["classes"] for part, content in sets.items() if "classes" in content}
    table = Table(title="classes", title_justify="left")
    table.add_column("class")
    for part in classes:
        table.add_column(f"{part}: pixels %", justify="right")
        table.add_column("images", justify="right")
    for name in next(iter(classes.values()), {}):
        cells = [name]
        for shares in classes.values():
            share = shares[name]
            cells += [f"{100 * share['share']:.2f}" if share["pixels"] else "-", str(share["images"])]
        table.add_row(*cells)
    console = Console(width=120, file=io.StringIO())
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()
