"""Files put in place whole, and never over another one."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.progress import megabytes

PART = ".part"
"""Ending of a file that is being written; one that is left by an interrupted run is written again."""


def write_new(path: Path, content: bytes) -> bool:
    """Write a file in one step, so that it is either whole or not there.

    Args:
        path: Where to; folders are made.
        content: All of it.

    Returns:
        Whether it was written; False where the same file is there already.

    Raises:
        UserError: If another file is there; it is kept.
    """
    if path.exists():
        if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
            return False
        raise other_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    part.write_bytes(content)
    os.replace(part, path)
    return True


def other_file(path: Path) -> UserError:
    """Build the error for a file of the user's that is in the way."""
    return UserError(
        f"expected no {path}, or the same file, but another one is there, which is kept; "
        "move it away, or choose another root"
    )


def file_hash(path: Path, algorithm: str) -> str:
    """Hash a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def names_in(folder: Path, suffix: str) -> set[str]:
    """Return the names of the files of a folder that have a suffix and are not empty, without it.

    A missing folder has none.
    """
    return {name.removesuffix(suffix) for name in _filled_files(folder) if name.endswith(suffix)}


def _filled_files(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file() and entry.stat().st_size:
                yield entry.name


def require_space(folder: Path, needed: int, what: str) -> None:
    """Check that a disk has room, before it is filled.

    Raises:
        UserError: If there is less than is needed.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"expected {megabytes(needed)} of free space in {folder} for {what}, but there are only "
            f"{megabytes(free)}; free some, or choose another root"
        )
