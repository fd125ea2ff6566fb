"""What the machine lacks while a training runs, as a sentence: memory, shared memory, a process that was killed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.utils.errors import UserError

_NO_MEMORY = re.compile(r"can(?:'t|not) allocate memory|not enough memory|unable to allocate", re.IGNORECASE)
_NO_SHARED_MEMORY = re.compile(r"Bus error|out of shared memory|shared memory object|/torch_\d+\S*.*No space left")
_KILLED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal|exited unexpectedly)")
_TOO_MANY_FILES = re.compile(r"Too many open files")
_NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")
_RESUME = "and go on with resume=auto"


@contextmanager
def translate_errors(datamodule: SemiSupervisedDataModule) -> Iterator[None]:
    """Turn what the machine lacks into a sentence that says what to lower; other errors pass.

    Args:
        datamodule: What the batches are made of.

    Raises:
        UserError: If memory ran out, of the device, of the machine or shared, or a worker was killed.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        sentence = _explain(error, datamodule)
        if sentence is None:
            raise
        raise UserError(sentence) from error


def _explain(error: Exception, datamodule: SemiSupervisedDataModule) -> str | None:
    """Return the sentence, or None for an error of another kind."""
    text = str(error)
    if _TOO_MANY_FILES.search(text):
        return (
            f"expected to open more files, but the system allows no more; raise its limit (ulimit -n 65536), {_RESUME}"
        )
    if match := _NOT_DETERMINISTIC.search(text):
        return (
            f"expected operations that repeat exactly for trainer.deterministic=true, but {match[1]} does not on this "
            "device; set trainer.deterministic=warn, which repeats all the others"
        )
    if _NO_SHARED_MEMORY.search(text):
        return (
            "expected room in shared memory (/dev/shm) for batches, but it is full; give the container more (as docker "
            f"run --shm-size=8g does), or lower loader.num_workers, {_RESUME}"
        )
    if match := _KILLED.search(text):
        return (
            f"expected the processes that load images to live, but process {match[1]} was killed, as the system does "
            f"when memory runs out; lower loader.num_workers, {_RESUME}"
        )
    if is_out_of_memory(error):
        return _out_of_memory("GPU" if isinstance(error, torch.OutOfMemoryError) else "machine", datamodule)
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether the memory of the device or of the machine was too small."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY.search(str(error)) is not None


def _out_of_memory(where: str, datamodule: SemiSupervisedDataModule) -> str:
    labeled, unlabeled, size = datamodule.batch_size, datamodule.unlabeled_batch_size, datamodule.crop_size
    images = (
        f"{labeled} labeled and {unlabeled} unlabeled"
        if datamodule.method.uses_unlabeled
        else f"{labeled + unlabeled} labeled"
    )
    halve = "halve loader.batch_size with trainer.accumulate_grad_batches=2 (the same learning rate), "
    return (
        f"expected steps of {images} images of {size} x {size} pixels, and whole validation images, to fit into the "
        f"memory of the {where}, but it ran out; {halve if labeled > 1 else ''}lower loader.crop_size, or set "
        "trainer.precision=bf16-mixed"
    )
