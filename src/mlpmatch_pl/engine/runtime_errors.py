"""Errors of the machine during a training, translated into a sentence that says what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.utils.errors import UserError

_OUT_OF_MEMORY = re.compile(r"can(?:'t|not) allocate memory|not enough memory|unable to allocate", re.IGNORECASE)
_LOST_PROCESS = re.compile(
    r"Connection (?:closed|reset) by peer|Broken pipe|[Ss]ocket closed|recvBytes failed|Timed out waiting|Read timeout"
    r"|Unexpected .*byte|remote process exited|[Cc]ommunicator was aborted|Watchdog caught|collective operation timeout"
)
_SENTENCES = (
    (
        re.compile(r"Too many open files"),
        "expected to open more files, but the system allows no more; raise its limit (ulimit -n 65536) and continue "
        "with resume=auto",
    ),
    (
        re.compile(r"(\S+) does not have a deterministic implementation"),
        "expected deterministic operations for trainer.deterministic=true, but {0} has no deterministic implementation "
        "on this device; set trainer.deterministic=warn, which makes all others deterministic",
    ),
    (
        re.compile(r"Bus error|out of shared memory|shared memory object|/torch_\d+\S*.*No space left"),
        "expected room for batches in shared memory (/dev/shm), but it is full; give the container more, as in docker "
        "run --shm-size=8g, or lower loader.num_workers, and continue with resume=auto",
    ),
    (
        re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal|exited unexpectedly)"),
        "expected the loading workers to keep running, but process {0} was killed, usually because memory ran out; "
        "lower loader.num_workers and continue with resume=auto",
    ),
)  # the order matters: messages may match several


@contextmanager
def translate_errors(datamodule: SemiSupervisedDataModule, processes: int = 1) -> Iterator[None]:
    """Translate errors of the machine; others pass unchanged.

    Args:
        datamodule: Makes the batches.
        processes: Number of processes of the run.

    Raises:
        UserError: If memory, shared memory or file handles ran out, or a worker or another process of the run died.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        text = str(error)
        sentences = [(found, sentence) for pattern, sentence in _SENTENCES if (found := pattern.search(text))]
        if sentences:
            found, sentence = sentences[0]
            raise UserError(sentence.format(*found.groups())) from error
        if is_out_of_memory(error):
            raise UserError(_out_of_memory(error, datamodule)) from error
        if processes > 1 and (found := _LOST_PROCESS.search(text)):
            raise UserError(
                f"expected all {processes} processes to keep running, but another one died or does not answer "
                f"({found[0]}); see its output, and continue with resume=auto"
            ) from error
        raise


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether the device or the machine ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


def _out_of_memory(error: Exception, datamodule: SemiSupervisedDataModule) -> str:
    labeled, unlabeled, size = datamodule.batch_size, datamodule.unlabeled_batch_size, datamodule.crop_size
    images = f"{labeled} labeled and {unlabeled} unlabeled"
    if not datamodule.method.uses_unlabeled:
        images = f"{labeled + unlabeled} labeled"
    half = "" if datamodule.batch_per == "step" else "halve loader.batch_size and "
    halve = f"{half}double trainer.accumulate_grad_batches (the same learning rate), "
    return (
        f"expected steps of {images} images of {size} x {size} pixels, and whole validation images, to fit into the "
        f"memory of the {'GPU' if isinstance(error, torch.OutOfMemoryError) else 'machine'}, but it ran out; "
        f"{halve if labeled > 1 else ''}lower loader.crop_size, or set trainer.precision=bf16-mixed"
    )
