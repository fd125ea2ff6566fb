"""Jobs of a sweep: a repeated sweep skips finished ones, continues stopped ones and runs failed ones again."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mlpmatch_pl.commands.cli import JobError, one_sentence
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import FAILURE, atomic_write

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)


def run_job(cfg: DictConfig, folder: Path) -> float:
    """Train a job of a sweep, unless it is finished, and return its best validation mIoU; NaN if nothing was validated.

    Args:
        cfg: The configuration of the job.
        folder: Its run folder.

    Raises:
        JobError: With one sentence, which is also written into the folder.
    """
    from mlpmatch_pl.commands.train import run
    from mlpmatch_pl.engine.run_folder import has_settings

    try:
        if cfg.resume is None and (folder / "config.yaml").exists():
            if not has_settings(folder, cfg):
                raise UserError(
                    f"expected a new folder, or the job that {folder} holds, but its configuration differs; choose "
                    "another hydra.sweep.dir, or continue it with this configuration by resume=auto"
                )
            cfg.resume = "auto"
            if (folder / "metrics.json").exists():
                log.info("%s is finished; skipped", folder)
                return _best(json.loads((folder / "metrics.json").read_text()))
        return _best(run(cfg))
    except Exception as error:
        sentence = one_sentence(error, "train")
        if sentence is None:
            log.exception("failed")
            sentence = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            log.error("failed: %s", sentence)
        atomic_write(folder / FAILURE, sentence + "\n")
        raise JobError(sentence) from None


def _best(metrics: dict[str, Any]) -> float:
    score = metrics["best"]["val/miou"]
    return math.nan if score is None else float(score)


@contextmanager
def summary(arguments: Sequence[str]) -> Iterator[None]:
    """Print a summary of the jobs when a sweep ends, however it ends; nothing for a single run.

    Args:
        arguments: Those of the command.
    """
    if not {"-m", "--multirun"} & set(arguments):
        yield
        return
    signal.signal(signal.SIGTERM, _stop)  # a training replaces this handler
    ended = False
    try:
        yield
        ended = True
    finally:
        named = [argument.partition("=")[2] for argument in arguments if argument.startswith("hydra.sweep.dir=")]
        folder = Path(named[-1].strip("'\"") if named else f"multirun/{os.environ.get('MLPMATCH_STAMP')}")
        print("\n".join(_summary(folder, ended)), end="")


def _stop(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)


def _summary(folder: Path, ended: bool) -> Iterator[str]:
    jobs = {path.parent for name in ("metrics.json", "splits.json", FAILURE) for path in folder.glob(f"**/{name}")}
    failed = sorted(job for job in jobs if (job / FAILURE).exists())
    finished = [job for job in jobs if (job / "metrics.json").exists() and job not in failed]
    if not jobs:
        return
    stopped = len(jobs) - len(finished) - len(failed)
    counts = {"finished": len(finished), "failed": len(failed), "stopped": stopped}
    yield f"jobs in {folder}: " + ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    for job in failed:
        yield f"failed: {job}: {(job / FAILURE).read_text(encoding='utf-8').strip()}"
    if failed or not ended:
        yield (
            f"to continue, repeat the command with hydra.sweep.dir={folder}: it skips finished jobs, continues stopped "
            "ones and runs failed ones again"
        )
    yield f"compare the runs: python -m mlpmatch_pl.report {folder}\n"
