"""Checkpoints as files: written whole or not at all, and checked before they are used."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from mlpmatch_pl.durable import write_durably
from mlpmatch_pl.errors import UserError

LAST, PREVIOUS, BEST = "last.ckpt", "last-1.ckpt", "best.ckpt"


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; the last.ckpt before stays as last-1.ckpt, in case the disk breaks the new one later.

    Args:
        content: What `torch.save` takes.
        path: The file to write.

    Raises:
        UserError: If the disk is full; the file that was there before is untouched.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_durably(path, buffer.getbuffer(), keep_as=PREVIOUS if path.name == LAST else None)


def refuse_inflated(path: Path) -> None:
    """Refuse a file of `torch.save` that would become larger in memory than it is; torch never writes such files.

    Raises:
        ValueError: If something in it is compressed, or there several times.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its parts overlap")


def is_whole(path: Path) -> bool:
    """Tell whether a checkpoint file is as it was written, by the checksums inside it; `torch.load` ignores them.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "last.ckpt"
        ...     write_checkpoint({"weight": torch.zeros(1000)}, path)
        ...     whole = is_whole(path)
        ...     _ = path.write_bytes(path.read_bytes()[:-100])
        ...     whole, is_whole(path)
        (True, False)
    """
    try:
        refuse_inflated(path)
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a broken file makes the reader raise nearly anything
        return False


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the checkpoint of a training, plain data and tensors only.

    Raises:
        UserError: If it is broken, or no checkpoint of a training.
    """
    try:
        if not is_whole(path):
            raise ValueError("its checksums do not fit")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        int(content["global_step"]), dict(content["hyper_parameters"])
        if sum(tensor.nbytes for tensor in content["state_dict"].values()) > path.stat().st_size:
            raise ValueError("its tensors are larger than the file")
    except Exception as error:  # likewise
        raise UserError(
            f"expected a checkpoint of a training, but {path} cannot be read as one ({type(error).__name__}); "
            "published weights are loaded by init_weights"
        ) from error
    return content
