"""Checkpoints as files: written whole or not at all, and checked before they are used."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import atomic_write, free_name

LAST, PREVIOUS, BEST = "last.ckpt", "last-1.ckpt", "best.ckpt"


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; the last.ckpt before stays as last-1.ckpt, in case the disk breaks the new one later.

    Args:
        content: What `torch.save` takes.
        path: The file to write.

    Raises:
        UserError: If the disk is full; the file that was there before is untouched.
    """
    _write(content, path, keep_as=PREVIOUS if path.name == LAST else None)


def write_anew(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint that does not follow on the one of its name, which is set aside: ``last_aside-1.ckpt``.

    Args:
        content: What `torch.save` takes.
        path: The file to write.

    Raises:
        UserError: If the disk is full; the file that was there before is untouched.
    """
    _write(content, path, keep_as=free_name(path, "_aside").name if path.exists() else None)


def _write(content: dict[str, Any], path: Path, keep_as: str | None) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, buffer.getbuffer(), keep_as)


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


def read_tensors(path: Path) -> Any:
    """Read a file of `torch.save` that nobody has cut off, changed or inflated: plain data and tensors only.

    Raises:
        ValueError: If its checksums do not fit; nearly anything else if it is no such file.
    """
    if not is_whole(path):
        raise ValueError("its checksums do not fit")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def refuse_expanded(tensors: Iterable[Tensor], path: Path) -> None:
    """Refuse tensors that are larger than the file which they come from: one number may stand for any size in it.

    Raises:
        ValueError: If they are.
    """
    if sum(tensor.nbytes for tensor in tensors) > path.stat().st_size:
        raise ValueError("its tensors are larger than the file")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the checkpoint of a training, plain data and tensors only.

    Raises:
        UserError: If it is broken, or no checkpoint of a training.
    """
    try:
        content: dict[str, Any] = read_tensors(path)
        int(content["global_step"]), dict(content["hyper_parameters"])
        refuse_expanded(content["state_dict"].values(), path)
    except Exception as error:  # likewise
        raise UserError(
            f"expected a checkpoint of a training, but {path} cannot be read as one ({type(error).__name__}); "
            "published weights are loaded by init_weights"
        ) from error
    return content
