"""What a user reads after a measurement."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from mlpmatch_pl.callbacks.progress import duration
from mlpmatch_pl.utils.progress import megabytes

log = logging.getLogger(__name__)
Report = Mapping[str, Any]  # what benchmark.json holds


def show(report: Report) -> None:
    """Log the table of the parts, and a line for everything else."""
    log.info("%s", parts_table(report["parts"]))
    for line in lines(report):
        log.info("%s", line)


def parts_table(parts: Mapping[str, Mapping[str, float]]) -> str:
    """Write milliseconds and share by part; the last row is the whole batch.

    Example:
        >>> rows = {name: {"mean": 0.5, "median": 0.4, "low": 0.3, "high": 0.7} for name in ("forward", "batch")}
        >>> print(parts_table(rows).splitlines()[4])
        │ forward │   500.0 │   100.0 │     400.0 │  300.0 - 700.0 │
    """
    table = Table(title="one batch", title_justify="left")
    table.add_column("part")
    for column in ("mean ms", "share %", "median ms", "10 % - 90 % ms"):
        table.add_column(column, justify="right")
    for name, part in parts.items():
        if name == "batch":
            table.add_section()
        cells = (1000 * part["mean"], 100 * part["mean"] / parts["batch"]["mean"], 1000 * part["median"])
        spread = f"{1000 * part['low']:.1f} - {1000 * part['high']:.1f}"
        table.add_row(name, *(f"{cell:.1f}" for cell in cells), spread)
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def lines(report: Report) -> Iterator[str]:
    """Write everything but the table."""
    yield _throughput(report)
    yield _memory(report)
    yield _loading(report["loading"])
    yield _schedule(report["schedule"], report["validation"])
    yield _learning_rate(report["learning_rate"], report["batch"])
    yield f"first: {report['advice']}"


def _throughput(report: Report) -> str:
    batch = report["batch"]
    images = f"{batch['labeled']} + {batch['unlabeled']}" if batch["unlabeled"] else f"{batch['labeled']} labeled"
    several = f", {batch['accumulated']} batches an optimizer step" if batch["accumulated"] > 1 else ""
    return (
        f"{report['images_per_second']:.1f} images a second: batches of {images}, {batch['crop_size']} pixels{several}"
    )


def _memory(report: Report) -> str:
    memory = report["memory"]
    used = megabytes(memory["peak_bytes"])
    if "device_bytes" not in memory:
        return f"memory: the process grew by {used}, without workers (a batch size is suggested on a GPU only)"
    peak = f"memory: {used} at most, {100 * memory['share']:.0f} % of {megabytes(memory['device_bytes'])}"
    return f"{peak}; {_largest_batch(memory)}"


def _largest_batch(memory: Report) -> str:
    second = f"loader.batch_size={memory['second_batch']}"
    if not memory["second_fits"]:
        return f"{second} did not fit"
    if memory["largest_batch"] is None:
        return f"it does not rise with the batch ({second} was tried), so the largest batch is not known"
    return f"up to loader.batch_size={memory['largest_batch']} fits with a tenth to spare"


def _loading(loading: Report) -> str:
    total, workers = sum(loading["seconds_a_batch"].values()), sum(loading["workers"].values())
    needed = "no number of" if loading["workers_needed"] is None else loading["workers_needed"]
    keep_up = f"{needed} worker{'s' * (needed != 1)} would keep up with the step" if needed else "no worker is needed"
    return (
        f"loading: one process takes {1000 * total:.0f} ms a batch; {keep_up} (num_workers is {workers}; "
        f"{loading['cores']} cores are usable)"
    )


def _schedule(schedule: Report, validation: Report) -> str:
    times, share = schedule["validations"], 100 * schedule["validation_share"]
    return (
        f"whole schedule: about {duration(schedule['total'])} for {schedule['epochs']} epochs, {schedule['batches']} "
        f"batches; of that {times} times {validation['images']} validation images, {duration(schedule['validation'])} "
        f"({share:.0f} %); without checkpoints and the test"
    )


def _learning_rate(rate: Report, batch: Report) -> str:
    line = (
        f"learning rate {rate['scaled']:.4g}: {rate['configured']:g} belongs to {rate['reference_images']} images in "
        f"an optimizer step, here there are {rate['images']}"
    )
    if not batch["unlabeled"]:
        line += " (without unlabeled images, batches hold as many more labeled ones)"
    if rate["images"] < rate["reference_images"]:
        line += f"; trainer.accumulate_grad_batches={rate['reaching_accumulation']} reaches the reference"
    return line
