"""One process at a time writes into a run folder."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlpmatch_pl.utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)
LOCK = "run.lock"
_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Claim a run folder for this process until the block ends or the process does, however it ends.

    The lock is the system's, on a file ``run.lock`` that names host and process; it goes with the process, and a file
    that a killed one left behind locks nothing. It is a record lock, which forked workers do not inherit: those of a
    killed process live on for seconds. Where the system or a network disk has no locks, there is none.

    Args:
        folder: The run folder, which is made if need be, and removed again if nothing is written into it.

    Raises:
        UserError: If another process has claimed it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as place:
        ...     with run_lock(Path(place) / "run"):
        ...         print(*(path.name for path in Path(place).rglob("*")))
        ...     print(len(list(Path(place).iterdir())))
        run run.lock
        0
    """
    if fcntl is None:
        yield
        return
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(folder / LOCK)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        if new:
            with suppress(OSError):  # the run is in it
                folder.rmdir()


def _lock(path: Path) -> int:
    """Return the descriptor of the locked file."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                holder = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
                os.close(descriptor)
                raise UserError(
                    f"expected a run folder that nobody writes to, but {path.parent} is in use by {holder}; wait for "
                    "its end, or choose another hydra.run.dir"
                ) from error
            log.debug("no locks in %s (%s)", path.parent, error.strerror)
        if _is_still(path, descriptor):
            with suppress(OSError):  # a full disk is for others to name
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)  # its process ended, and removed it, in between


def _is_still(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False
