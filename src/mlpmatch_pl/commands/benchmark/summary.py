"""The lines that a user reads after a measurement, with one piece of advice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlpmatch_pl.callbacks.progress import MAX_DATA_WAIT, duration
from mlpmatch_pl.commands.benchmark.timing import MOST_WORKERS
from mlpmatch_pl.utils.progress import megabytes

Report = Mapping[str, Any]  # the content of benchmark.json
MOST_VALIDATION = 0.2  # share of the time
GOOD_VALIDATION = 0.1  # the share that the advice aims at


def summarize(report: Report) -> list[str]:
    """Return the figures of benchmark.json as lines."""
    batch, step, wait = report["batch"], report["step_seconds"], report["data_wait_seconds"]
    images = f"{batch['labeled']} + {batch['unlabeled']}" if batch["unlabeled"] else f"{batch['labeled']} labeled"
    loading, needed = report["loading"], report["loading"]["workers_needed"]
    many = f"more than {MOST_WORKERS}" if needed is None else f"{needed}"
    total = report["total"]
    return [
        f"training  {report['images_per_second']:.1f} images/s: {1000 * step:.0f} ms a batch of {images} images of "
        f"{batch['crop_size']} px, {1000 * wait:.0f} ms waiting for data ({100 * wait / (step + wait):.0f}%)",
        f"loading   {1000 * sum(loading['seconds_per_batch'].values()):.0f} ms a batch in one process: {many} "
        f"worker{'s' * (needed != 1)} needed (loader.num_workers={sum(loading['workers'].values())}, "
        f"{loading['cores']} cores)",
        f"memory    {_memory(report['memory'])}",
        f"total     about {duration(total['seconds'])} for {total['epochs']} epochs of {total['batches_per_epoch']} "
        f"batches, {100 * total['validation_share']:.0f}% of it validation",
        f"advice    {report['advice']}",
    ]


def _memory(memory: Report) -> str:
    peak = f"peak {megabytes(memory['peak_bytes'])}"
    if memory["device_bytes"] is None:
        return f"{peak} in the main process"
    batch = memory["largest_batch"]
    fits = "the largest batch is unknown" if batch is None else f"up to loader.batch_size={batch} fits"
    return f"{peak} of {megabytes(memory['device_bytes'])}; {fits}"


def advise(report: Report, options: Mapping[str, Any]) -> str:
    """Return what to change first.

    Args:
        report: The figures.
        options: The group ``trainer`` of the configuration.
    """
    step, wait, total = report["step_seconds"], report["data_wait_seconds"], report["total"]
    wait_share, validation_share = wait / (step + wait), total["validation_share"]
    if validation_share > max(MOST_VALIDATION, wait_share) and total["validations"] > 1:
        epoch = (1 - validation_share) * total["seconds"] / total["epochs"]
        validation = validation_share * total["seconds"] / total["validations"]
        every = min(math.ceil(validation * (1 - GOOD_VALIDATION) / (GOOD_VALIDATION * epoch)), total["epochs"])
        return f"validate less often: trainer.check_val_every_n_epoch={every}"
    if wait_share > MAX_DATA_WAIT:
        return _advise_on_loading(report["loading"])
    if report["memory"]["device_bytes"] is not None:
        if report["precision"].startswith("32"):
            return "use bfloat16 and channels-last: trainer=gpu"
        for option in ("channels_last", "compile_blocks"):
            if not options[option]:
                return f"try trainer.{option}=true"
    elif not report["precision"].startswith("bf16"):
        return "use a GPU, or try trainer.precision=bf16-mixed"
    return "only a smaller loader.crop_size or backbone is faster on this device"


def _advise_on_loading(loading: Report) -> str:
    needed, workers = loading["workers_needed"], sum(loading["workers"].values())
    # Loading in the main process delays every step: if that was measured, a worker helps even if none is predicted.
    needed = None if needed is None else max(needed, 1)
    if needed is None or workers >= needed or needed > loading["cores"]:
        return "loading is limited by the cores or the disk: loader.cache=FOLDER keeps decoded images"
    return f"loader.num_workers={needed} (now {workers})"
