"""Writing files so that a kill, a power loss or a full disk leaves no half of one, and reading YAML of others."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mlpmatch_pl.utils.errors import UserError

MAX_YAML_BYTES, MAX_YAML_DEPTH = 2**18, 20  # the configuration of a run has about 3 kB and 4 levels
OTHER_OUTPUT = "choose another output, or set overwrite=true"
OTHER_FOLDER = "choose another folder by hydra.run.dir"
FAILURE = "error.txt"  # in the folder of a failed job of a sweep: why it failed
_UNFINISHED = ".unfinished"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # network and FUSE disks that cannot sync a folder


def atomic_write(path: Path, content: bytes | memoryview | str, keep_as: str | None = None) -> None:
    """Write a file under a temporary name, sync it to the disk, and rename it.

    At any moment ``path`` is either the previous file or the new one, complete.

    Args:
        path: The file to write.
        content: Its bytes, or its text.
        keep_as: Name in the same folder under which the previous file is kept, if given.

    Raises:
        UserError: If the disk is full; the previous file is untouched.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "numbers.txt"
        ...     atomic_write(path, "1")
        ...     atomic_write(path, "2", keep_as="before.txt")
        ...     path.read_text(), path.with_name("before.txt").read_text()
        ('2', '1')
    """
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + _UNFINISHED)
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            _keep(path, path.with_name(keep_as))
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        if error.errno not in _NO_SPACE:
            raise
        size = max(memoryview(data).nbytes / 2**20, 0.1)
        raise UserError(
            f"expected {size:.1f} MiB of free space for {path}, but the disk is full (existing files are untouched); "
            "free some space and continue with resume=auto"
        ) from error
    unfinished.replace(path)
    _sync_folder(path.parent)


def _keep(path: Path, previous: Path) -> None:
    """Give a file a second name by a hard link, or copy it on disks without hard links."""
    unfinished = previous.with_name(previous.name + _UNFINISHED)
    unfinished.unlink(missing_ok=True)
    try:
        os.link(path, unfinished)
    except OSError:
        try:
            shutil.copyfile(path, unfinished)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
    unfinished.replace(previous)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def set_aside(path: Path, label: str = "") -> Path | None:
    """Rename a file to the next free name, such as ``metrics-1.json``.

    Args:
        path: The file.
        label: Added to the name before the number.

    Returns:
        The new path; None if there is no such file.
    """
    if not path.exists():
        return None
    aside = free_name(path, label)
    path.replace(aside)
    _sync_folder(path.parent)
    return aside


def free_name(path: Path, label: str = "") -> Path:
    """Return the first numbered name beside a file that does not exist."""
    numbers = range(1, 2 + len(list(path.parent.iterdir())))
    names = (path.with_name(f"{path.stem}{label}-{number}{path.suffix}") for number in numbers)
    return next(name for name in names if not name.exists())


@contextmanager
def full_disk_is_user_error(folder: Path) -> Iterator[None]:
    """Translate a full disk, whatever is being written, into one sentence.

    Args:
        folder: Named in the message if the error does not name a file.

    Raises:
        UserError: If the disk or a quota is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise UserError(
            f"expected free space to write {error.filename or 'into ' + str(folder)}, but the disk is full; free some "
            "space and continue with resume=auto"
        ) from error


def remove_unfinished(folder: Path) -> None:
    """Remove temporary files that a killed process left in a folder."""
    for path in folder.glob(f"*{_UNFINISHED}"):
        path.unlink(missing_ok=True)


def load_yaml(path: Path) -> Any:
    r"""Read a YAML file as plain data; ``${...}`` stays a string.

    The file may come from anyone. Aliases, which let a small file fill the memory, are refused, as is a file that is
    larger or nested deeper than a configuration.

    Raises:
        ValueError: If the file is not such YAML.
        OSError: If it cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "config.yaml"
        ...     _ = path.write_text("seed: 3\nloader: {seed: '${seed}'}", encoding="utf-8")
        ...     load_yaml(path)
        {'seed': 3, 'loader': {'seed': '${seed}'}}
    """
    with path.open("rb") as file:
        content = file.read(MAX_YAML_BYTES + 1)
    if len(content) > MAX_YAML_BYTES:
        raise ValueError(f"expected at most {MAX_YAML_BYTES} bytes")
    try:
        depth = 0
        for event in yaml.parse(content, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_YAML_DEPTH:
                raise ValueError(f"expected no aliases and at most {MAX_YAML_DEPTH} levels")
        return yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def refuse_overwrite(paths: Iterable[Path], remedy: str) -> None:
    """Refuse to overwrite files, before anything is written.

    Args:
        paths: Files that must not exist.
        remedy: What the user can do, such as `OTHER_OUTPUT`.

    Raises:
        UserError: With the first file that exists and the number of others.

    Example:
        >>> refuse_overwrite([Path("nowhere"), Path(".")], OTHER_OUTPUT)
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected to write new files only, but . exists; choose another ...
    """
    existing = [path for path in paths if os.path.lexists(path)]
    if existing:
        more = f" (and {len(existing) - 1:,} more)" if existing[1:] else ""
        raise UserError(f"expected to write new files only, but {existing[0]} exists{more}; {remedy}")
