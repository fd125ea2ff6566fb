"""Checkpoint files: written whole or not at all, and verified before they are used."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import atomic_write

LAST, PREVIOUS, BEST = "last.ckpt", "last-1.ckpt", "best.ckpt"
ARCHITECTURE = ("num_classes", "backbone", "in_chans", "output_stride", "decoder", "pos_embed")


def write_checkpoint(content: dict[str, Any], path: Path, keep_as: str | None = None) -> None:
    """Write a checkpoint atomically.

    Args:
        content: Tensors and plain data, for `torch.save`.
        path: The file to write.
        keep_as: Name under which the previous file is kept; by default ``last-1.ckpt`` for ``last.ckpt``, in case the
            new file turns out to be damaged, and none for others.

    Raises:
        UserError: If the disk is full; the previous file is untouched.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, buffer.getbuffer(), keep_as or (PREVIOUS if path.name == LAST else None))


def refuse_inflated(path: Path) -> None:
    """Refuse a file of `torch.save` that would unpack to more than its size; torch never writes such files.

    Raises:
        ValueError: If an entry is compressed, or entries overlap.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its entries overlap")


def is_whole(path: Path) -> bool:
    """Tell whether a checkpoint matches the checksums inside it, which `torch.load` ignores.

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
    except Exception:  # a damaged file makes zipfile raise nearly anything
        return False


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint with ``weights_only=True`` and verify its checksums.

    Raises:
        UserError: If it is damaged, or not a training checkpoint.
    """
    try:
        if not is_whole(path):
            raise ValueError("its checksums do not match")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        int(content["global_step"]), dict(content["hyper_parameters"])
        # A tensor of stride 0 may claim any size.
        if sum(tensor.nbytes for tensor in content["state_dict"].values()) > path.stat().st_size:
            raise ValueError("its tensors are larger than the file")
    except Exception as error:  # as above
        raise UserError(
            f"expected a training checkpoint, but {path} cannot be read as one ({type(error).__name__}); load "
            "published weights with init_weights"
        ) from error
    return content


def check_architecture(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Compare the hyperparameters that define the network.

    Raises:
        UserError: For the first one that differs.
    """
    for key in ARCHITECTURE:
        if key in saved and _as_list(saved[key]) != _as_list(here[key]):
            raise UserError(
                f"expected a checkpoint of this architecture, but it has {key}={saved[key]} and the configuration "
                f"{key}={here[key]}; resume with the configuration of the run that wrote it"
            )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
