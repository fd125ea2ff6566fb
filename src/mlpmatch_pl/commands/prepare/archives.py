"""Tar and zip archives, unpacked without trust: every member is looked at before the first file is written."""

import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from mlpmatch_pl.commands.prepare.files import other_file, require_space, write_new
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.progress import progress

_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # RuntimeError: encrypted zip


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    size: int


def list_members(path: Path) -> list[Member]:
    """List the files of an archive, after a look at all members.

    Raises:
        UserError: If the archive is damaged, or a member is a link or a device, or its name leads out of the folder
            that the archive is unpacked into.
    """
    with _named_damage(path):
        return list(_zip_members(path) if zipfile.is_zipfile(path) else _tar_members(path))


def read_members(path: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Read files of an archive, in its order.

    Args:
        path: The archive.
        names: Names as `list_members` gives them.

    Yields:
        Each name with its content.
    """
    with _named_damage(path):
        yield from _read_zip(path, names) if zipfile.is_zipfile(path) else _read_tar(path, names)


def unpack(path: Path, root: Path, place: Callable[[str], str | None]) -> int:
    """Unpack an archive; files that are there already are left, so an interrupted call can be repeated.

    Args:
        path: The archive.
        root: Folder to unpack into.
        place: Gives the path below `root` for a member's name, or None to leave it out.

    Returns:
        The number of files that were written.

    Raises:
        UserError: As `list_members` does, or if no member has a place, the disk is too small, or another file is in
            the way.
    """
    members = list_members(path)
    placed = {member: root / target for member in members if (target := place(member.name)) is not None}
    if not placed:
        raise UserError(
            f"expected the data set's files in {path}, but found none among its {len(members)} files"
            + (f" (the first is {members[0].name})" if members else "")
            + "; it is another archive: get it again"
        )
    missing = {member: target for member, target in placed.items() if not _is_there(target, member.size)}
    require_space(root, sum(member.size for member in missing), f"the content of {path.name}")
    targets = {member.name: target for member, target in missing.items()}
    if not targets:
        return 0
    with progress(f"unpacking {path.name}", len(targets)) as advance:
        for name, content in read_members(path, targets):
            write_new(targets[name], content)
            advance(1)
    return len(targets)


def _is_there(target: Path, size: int) -> bool:
    if not target.exists():
        return False
    if not target.is_file() or target.stat().st_size != size:
        raise other_file(target)
    return True


def _zip_members(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            regular = info.is_dir() or kind in (0, stat.S_IFREG, stat.S_IFDIR)
            _require_safe(path, info.orig_filename, regular)
            if not info.is_dir():
                yield Member(_normal(info.filename), info.file_size)


def _tar_members(path: Path) -> Iterator[Member]:
    with tarfile.open(path) as archive:
        for info in archive:
            _require_safe(path, info.name, info.isreg() or info.isdir())
            if info.isreg():
                yield Member(_normal(info.name), info.size)


def _read_zip(path: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if (name := _normal(info.filename)) in names and not info.is_dir():
                yield name, archive.read(info)


def _read_tar(path: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for info in archive:
            if (name := _normal(info.name)) in names and (file := archive.extractfile(info)) is not None:
                yield name, file.read()


def _normal(name: str) -> str:
    return str(PurePosixPath(name))


def _require_safe(path: Path, name: str, regular: bool) -> None:
    inside = not (
        name.startswith("/") or "\\" in name or PureWindowsPath(name).drive or ".." in PurePosixPath(name).parts
    )
    if inside and regular:
        return
    wrong = "is a link or a device" if inside else "leads out of the folder that it is unpacked into"
    raise UserError(
        f"expected plain files in {path}, but its member {name!r} {wrong}; nothing was unpacked: "
        "delete the archive and get it from its original source"
    )


@contextmanager
def _named_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise UserError(
            f"expected a whole tar or zip archive, but {path} is damaged ({error}); get it again"
        ) from error
