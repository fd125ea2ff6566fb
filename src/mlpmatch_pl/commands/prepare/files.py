"""Members of archives, and the files of a dataset that they become."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import parent_process
from pathlib import Path, PurePosixPath
from typing import TypeVar

from mlpmatch_pl.utils.cpu import usable_cores
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.progress import megabytes, progress

Task = TypeVar("Task")

_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # RuntimeError: encrypted zip
_SHOWN = 5  # missing files that are named


def list_members(path: Path) -> dict[str, int]:
    """Return names and sizes of the files in a tar or zip archive, after checking all members.

    Raises:
        UserError: If the archive is damaged, a member is a link or a device, or its path is not inside the archive.
    """
    with _damage_is_user_error(path):
        return {name: size for name, size, _ in _members(path)}


def read_members(path: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of some files of an archive, in the archive's order."""
    with _damage_is_user_error(path):
        for name, _, read in _members(path):
            if name in names:
                yield name, read()


def unpack(path: Path, root: Path, relocate: Callable[[str], str | None]) -> int:
    """Unpack an archive, skipping files that exist already.

    Args:
        path: The archive.
        root: Folder to unpack into.
        relocate: Maps the name of a member to a path below ``root``, or to None to leave it out.

    Returns:
        The number of files written.

    Raises:
        UserError: If the archive is damaged, unsafe or another one, the disk is too small, or a different file exists.
            All but damage within a file is found before the first file is written.
    """
    sizes = list_members(path)
    targets = {name: root / target for name in sizes if (target := relocate(name)) is not None}
    if not targets:
        raise UserError(
            f"expected the files of the dataset in {path}, but it holds {len(sizes)} other files "
            f"({name_some(sizes) or 'none'}); it is another archive: download it again"
        )
    missing = {name: target for name, target in targets.items() if _is_missing(target)}
    for name in targets.keys() - missing.keys():
        if not targets[name].is_file() or targets[name].stat().st_size != sizes[name]:
            raise different_file(targets[name])
    require_space(root, sum(sizes[name] for name in missing), f"the content of {path.name}")
    if missing:
        with progress(f"unpacking {path.name}", len(missing)) as advance:
            for name, content in read_members(path, missing):
                write_new(missing[name], content)
                advance(1)
    return len(missing)


def convert(
    title: str, function: Callable[[Task], tuple[Path, bytes]], tasks: Collection[Task], num_workers: int | None
) -> None:
    """Write the files that a function makes of many tasks, in parallel.

    Args:
        title: Shown with the progress.
        function: Returns path and content of a file; a function of a module, so that other processes can import it.
        tasks: Its arguments.
        num_workers: Number of processes; 0 runs in this one, None starts one per core.
    """
    count = usable_cores() if num_workers is None else num_workers
    pool = ProcessPoolExecutor(count, initializer=_end_with_parent) if count else None
    try:
        results = pool.map(function, tasks, chunksize=8) if pool else map(function, tasks)
        with progress(title, len(tasks)) as advance:
            for path, content in results:
                write_new(path, content)
                advance(1)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def write_new(path: Path, content: bytes) -> None:
    """Write a file atomically; an existing file with the same content is left alone, an empty one replaced.

    Raises:
        UserError: If a different file exists.
    """
    if not _is_missing(path):
        if not path.is_file() or path.read_bytes() != content:
            raise different_file(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def _is_missing(path: Path) -> bool:
    return not path.exists() or not path.stat().st_size  # a power cut leaves empty files


def different_file(path: Path) -> UserError:
    """Build the error for an existing file that is not overwritten."""
    return UserError(
        f"expected to create {path}, but a different file exists there; move it away, or choose another root"
    )


def names_in(folder: Path, suffix: str) -> set[str]:
    """Return the names, without the suffix, of the non-empty files of a folder; a missing folder has none."""
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {
            entry.name.removesuffix(suffix)
            for entry in entries
            if entry.name.endswith(suffix) and entry.is_file() and entry.stat().st_size
        }


def require_space(folder: Path, needed: int, what: str) -> None:
    """Check that the disk has enough free space.

    Raises:
        UserError: If not.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"expected {megabytes(needed)} of free space in {folder} for {what}, but there are {megabytes(free)}; "
            "free some space, or choose another root"
        )


def name_some(names: Collection[str]) -> str:
    """Name the first of many files.

    Example:
        >>> name_some({"b.png", "a.png"})
        'a.png, b.png'
        >>> name_some([f"{i}.png" for i in range(7)])
        '0.png, 1.png, 2.png, 3.png, 4.png and 2 more'
    """
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def compare_count(what: str, found: int, expected: int) -> list[str]:
    """Return a problem if a number is not the published one.

    Example:
        >>> compare_count("images in train2017", 3, 118287)
        ['expected 118,287 images in train2017, found 3']
    """
    return [] if found == expected else [f"expected {expected:,} {what}, found {found:,}"]


def missing_files(what: str, names: Collection[str]) -> list[str]:
    """Return a problem if files are missing.

    Example:
        >>> missing_files("mask", {"a.png"}), missing_files("mask", [])
        (['1 mask missing: a.png'], [])
    """
    return [f"{len(names):,} {what}{'s' * (len(names) > 1)} missing: {name_some(names)}"] if names else []


def _members(path: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """Yield name, size and reader of each file of an archive."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                regular = info.is_dir() or kind in (0, stat.S_IFREG, stat.S_IFDIR)
                name = _safe_name(path, info.orig_filename, regular)
                if not info.is_dir():
                    yield name, info.file_size, partial(archive.read, info)
    else:
        with tarfile.open(path) as tar:
            for member in tar:
                name = _safe_name(path, member.name, member.isreg() or member.isdir())
                if file := tar.extractfile(member):
                    yield name, member.size, file.read


def _safe_name(path: Path, name: str, regular: bool) -> str:
    # Stricter than tarfile's data filter, which checks members against the folder that they are unpacked into: here,
    # a leading folder is removed from their names first.
    inside = not (name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"))
    if not (inside and regular):
        wrong = "is a link or a device" if inside else "lies outside the archive's folder"
        raise UserError(
            f"expected plain files in {path}, but its member {name!r} {wrong}; nothing was unpacked: "
            "delete the archive and download it from its original source"
        )
    return str(PurePosixPath(name))


@contextmanager
def _damage_is_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise UserError(
            f"expected a complete tar or zip archive, but {path} is damaged ({error}); download it again"
        ) from error


def _end_with_parent() -> None:
    """Leave Ctrl-C to the main process, and end with it even if it is killed."""

    def watch() -> None:
        if parent := parent_process():
            parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()
