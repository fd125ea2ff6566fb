"""Files from the network: resumed where a connection breaks, and taken only with the right checksum."""

import http.client
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlpmatch_pl.commands.prepare.files import PART, file_hash, require_space
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.progress import megabytes, progress, say

TIMEOUT = 30.0
ATTEMPTS = 5
FIRST_WAIT = 1.0
_BLOCK = 1 << 20
_BROKEN = (urllib.error.URLError, http.client.HTTPException, OSError)


@dataclass(frozen=True)
class Archive:
    """A file that a data set is published in.

    Attributes:
        name: Its file name.
        url: Where it can be had without a login; None if nowhere.
        md5: Its checksum, if one is published.
    """

    name: str
    url: str | None = None
    md5: str | None = None


def check_archive(path: Path, archive: Archive) -> None:
    """Compare a file with the checksum of what it should be.

    Raises:
        UserError: If they differ; the file is left as it is.
    """
    if archive.md5 is None:
        return
    say(f"{archive.name}: comparing the checksum")
    if (found := file_hash(path, "md5")) != archive.md5:
        raise UserError(
            f"expected {path} to have the md5 checksum {archive.md5} of {archive.name}, but found {found}; "
            "it is damaged or another version: get it again"
        )


def mirrored(url: str, mirror: str | None) -> str:
    """Replace scheme and host of a URL by a mirror's base URL.

    Example:
        >>> mirrored("https://example.org/voc/a.tar", "http://mirror.lan/data/")
        'http://mirror.lan/data/voc/a.tar'
    """
    return url if mirror is None else mirror.rstrip("/") + urlsplit(url).path


def download(archive: Archive, folder: Path, mirror: str | None = None) -> Path:
    """Fetch an archive, going on with what an earlier call has left.

    The bytes go to ``<name>.part``; the file gets its name when its checksum is right.

    Args:
        archive: What to fetch; it must have a URL.
        folder: Where to.
        mirror: Base URL in place of the original host.

    Returns:
        The file.

    Raises:
        UserError: If the server refuses, the connection breaks `ATTEMPTS` times without progress (what has arrived is
            kept), the disk is too small, or the checksum is wrong (what has arrived is deleted).
    """
    path = folder / archive.name
    if path.is_file():
        check_archive(path, archive)
        return path
    assert archive.url is not None
    url, part = mirrored(archive.url, mirror), folder / (archive.name + PART)
    folder.mkdir(parents=True, exist_ok=True)
    _fetch_all(url, part)
    if archive.md5 is not None and (found := file_hash(part, "md5")) != archive.md5:
        part.unlink()
        raise UserError(
            f"expected {archive.name} from {url} to have the md5 checksum {archive.md5}, but found {found}; "
            "what was downloaded is deleted: run the same command again, or get the file another way and give its "
            "folder as archives="
        )
    os.replace(part, path)
    return path


def fetch_bytes(url: str) -> bytes:
    """Fetch a small file.

    Raises:
        UserError: If the server refuses, or the connection breaks `ATTEMPTS` times.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _open(url) as response:
                content: bytes = response.read()
                return content
        except _BROKEN as error:
            _wait_or_raise(error, url, attempt, "")
    raise AssertionError("the last attempt raises")


def _fetch_all(url: str, part: Path) -> None:
    """Fetch a file into `part`, attempt by attempt; one that brings new bytes starts the count again."""
    attempt = 1
    while True:
        size = part.stat().st_size if part.exists() else 0
        try:
            if _fetch_more(url, part, size):
                return
            error: Exception = http.client.HTTPException("the connection was closed too early")
        except _BROKEN as broken:
            error = broken
        arrived = part.stat().st_size if part.exists() else 0
        attempt = 1 if arrived > size else attempt
        _wait_or_raise(error, url, attempt, f" after {megabytes(arrived)}, which are kept" if arrived else "")
        attempt += 1


def _fetch_more(url: str, part: Path, size: int) -> bool:
    """Append what is missing; return whether that was all."""
    try:
        response = _open(url, start=size)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not size:
            raise
        whole = error.headers.get("Content-Range", "").rpartition("/")[2]
        if whole == str(size):
            return True  # only the checksum was missing
        part.unlink()  # longer than the file, so it is of another one
        return _fetch_more(url, part, 0)
    with response:
        start = _start(response, size)
        if start != size:
            say(f"{part.stem}: the server cannot resume, starting again")
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        if total is not None:
            # As much again, because what is unpacked is at least as large.
            require_space(part.parent, 2 * total - start, f"{part.stem} and its content")
        with part.open("ab" if start else "wb") as file, progress(part.stem, total, in_bytes=True, start=start) as step:
            while block := response.read(_BLOCK):
                file.write(block)
                step(len(block))
    return total is None or part.stat().st_size == total


def _start(response: Any, size: int) -> int:
    """Return the first byte that a response brings: `size` if the server resumes, 0 if it starts again."""
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return 0
    first = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    if first != str(size):
        raise http.client.HTTPException(f"asked for bytes from {size}, got from {first or 'somewhere'}")
    return size


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects on the web, but from https to http none."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> Any:
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new not in ("http", "https") or (old == "https" and new == "http"):
            raise UserError(
                f"expected {req.full_url} to lead to an https address, but it leads to {newurl}; "
                "get the file another way and give its folder as archives="
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, start: int = 0) -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": "mlpmatch_pl", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    return urllib.request.build_opener(_SafeRedirects).open(request, timeout=TIMEOUT)


def _wait_or_raise(error: Exception, url: str, attempt: int, kept: str) -> None:
    """Wait before another attempt, or say that there is no sense in one."""
    if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429):
        raise UserError(
            f"expected the file {url}, but the server answers {error.code} {error.reason}; "
            "get it another way and give its folder as archives="
        ) from error
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
        raise error  # of the disk, not of the network
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if attempt >= ATTEMPTS:
        raise UserError(
            f"expected the file {url}, but the connection failed {attempt} times in a row{kept} ({reason}); "
            "run the same command again to go on, or give a folder with the file as archives="
        ) from error
    wait = FIRST_WAIT * 2 ** (attempt - 1)
    say(f"{url}: {reason}; trying again in {wait:.0f} s")
    time.sleep(wait)
