"""Archives from the network or from a local folder, accepted only with the right checksum."""

import os
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mlpmatch_pl.commands.prepare.files import require_space
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.progress import megabytes, say

if TYPE_CHECKING:
    import requests

ATTEMPTS = 5
FIRST_WAIT = 1.0  # seconds before the second attempt; doubled before each further one
TIMEOUT = 30.0


@dataclass(frozen=True)
class Archive:
    """A published file.

    Attributes:
        name: Its file name.
        url: Where it can be downloaded without a login, if anywhere.
        md5: Its checksum, if one is published.
    """

    name: str
    url: str | None = None
    md5: str | None = None


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Where a dataset is prepared, and where its archives come from.

    Attributes:
        root: Folder of the dataset.
        archives: Local folder with the archives; if given, nothing is downloaded.
        mirror: Base URL that replaces scheme and host of the original URLs.
        keep_archives: Whether downloaded archives stay in ``archives/`` below the root.
        num_workers: Processes that convert masks; 0 converts in the main process, None starts one per core.
    """

    root: Path
    archives: Path | None = None
    mirror: str | None = None
    keep_archives: bool = False
    num_workers: int | None = None

    @property
    def archive_folder(self) -> Path:
        """Return the folder that is searched for archives."""
        return self.archives or self.root / "archives"

    def get(self, archive: Archive, instructions: str = "") -> Path:
        """Find or download an archive and verify its checksum.

        Args:
            archive: The archive.
            instructions: How to get it by hand, printed if it cannot be downloaded.

        Raises:
            UserError: If it is missing, cannot be downloaded, or has another checksum.
        """
        path = self.archive_folder / archive.name
        if path.is_file():
            _verify(path, archive)
        elif self.archives is None and archive.url is not None:
            url = mirrored(archive.url, self.mirror)
            # The unpacked files take at least as much space as the archive.
            require_space(self.root, 2 * _content_length(url), f"{archive.name} and its content")
            download(url, path, f"md5:{archive.md5}" if archive.md5 else None, progressbar=sys.stderr.isatty())
        else:
            if instructions:
                say(instructions)
            remedy = "put it there" if archive.url is None else "put it there, or leave archives out to download it"
            raise UserError(
                f"expected {archive.name} in {self.archive_folder}, but it is not there; "
                f"{remedy} and run the same command again"
            )
        return path

    def discard(self, archives: Iterable[Archive]) -> None:
        """Delete downloaded archives unless ``keep_archives`` is set; local archives are never deleted."""
        if self.keep_archives or self.archives is not None:
            return
        for archive in archives:
            if archive.url is not None and (path := self.archive_folder / archive.name).is_file():
                path.unlink()
                say(f"{archive.name}: deleted after unpacking (keep_archives=true keeps it)")
        if self.archive_folder.is_dir() and not any(self.archive_folder.iterdir()):
            self.archive_folder.rmdir()


def mirrored(url: str, mirror: str | None) -> str:
    """Replace scheme and host of a URL by the base URL of a mirror.

    Example:
        >>> mirrored("https://example.org/voc/a.tar", "http://mirror.lan/data/")
        'http://mirror.lan/data/voc/a.tar'
    """
    return url if mirror is None else mirror.rstrip("/") + urlsplit(url).path


def download(url: str, path: Path, known_hash: str | None = None, progressbar: bool = False) -> None:
    """Download a file; it appears under its name only once it is complete and verified.

    Args:
        url: An http or https URL.
        path: The new file.
        known_hash: Algorithm and hexadecimal digest, such as ``md5:0123...``.
        progressbar: Whether to show the progress.

    Raises:
        UserError: If the server refuses, the connection fails `ATTEMPTS` times, or the checksum is wrong.
    """
    import pooch
    from requests import RequestException

    pooch.get_logger().setLevel("WARNING")
    # Bytes as they are on the server: some of them declare .tgz files as compressed pages, to be unpacked on arrival.
    fetch = pooch.HTTPDownloader(
        progressbar=progressbar,
        chunk_size=1 << 20,
        timeout=TIMEOUT,
        headers={"User-Agent": "mlpmatch_pl", "Accept-Encoding": "identity"},
    )
    # A folder of its own, because pooch gives unfinished files random names, and a kill leaves them behind.
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                pooch.retrieve(url, known_hash, fname=path.name, path=part, downloader=fetch)
                break
            except RequestException as error:
                _wait_or_raise(url, attempt, error)
            except ValueError as error:  # pooch found a wrong checksum
                raise UserError(
                    f"expected {url} to have the checksum {known_hash}, but it has another one; "
                    "get the file another way and give its folder as archives="
                ) from error
        os.replace(part / path.name, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _wait_or_raise(url: str, attempt: int, error: "requests.RequestException") -> None:
    status = None if error.response is None else error.response.status_code
    if status is not None and status < 500 and status not in (408, 429):
        raise UserError(
            f"expected to download {url}, but the server answers {status}; "
            "get the file another way and give its folder as archives="
        ) from error
    reason: BaseException = error
    while reason.__context__ is not None:  # "Connection refused" instead of urllib3's report
        reason = reason.__context__
    if attempt == ATTEMPTS:
        raise UserError(
            f"expected to download {url}, but the connection failed {ATTEMPTS} times ({reason}); "
            "run the same command again later, or give a folder with the file as archives="
        ) from error
    wait = FIRST_WAIT * 2 ** (attempt - 1)
    say(f"{url.rpartition('/')[2]}: {reason}; retrying in {wait:.0f} s")
    time.sleep(wait)


def _content_length(url: str) -> int:
    """Return the size of a file on a server, 0 if unknown."""
    import requests

    try:
        response = requests.head(url, timeout=TIMEOUT, allow_redirects=True, headers={"Accept-Encoding": "identity"})
    except requests.RequestException:  # the download itself retries, and reports what is wrong
        return 0
    length = int(response.headers.get("Content-Length", 0)) if response.ok else 0
    say(f"downloading {url}" + (f", {megabytes(length)}" if length else ""))
    return length


def _verify(path: Path, archive: Archive) -> None:
    import pooch

    if archive.md5 is None:
        return
    say(f"{archive.name}: verifying the checksum")
    if (found := pooch.file_hash(str(path), alg="md5")) != archive.md5:
        raise UserError(
            f"expected {path} to have the md5 checksum {archive.md5}, but found {found}; "
            "it is damaged or another version: download it again"
        )
