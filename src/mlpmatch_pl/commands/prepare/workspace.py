"""Where a data set is prepared, and where its archives come from."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mlpmatch_pl.commands.prepare.download import Archive, check_archive, download
from mlpmatch_pl.commands.prepare.options import Options
from mlpmatch_pl.utils.cpu import usable_cores
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.progress import say

Task = TypeVar("Task")
Result = TypeVar("Result")

_WAITING = 4  # tasks a process may have waiting: they hold a file's content each


@dataclass(frozen=True)
class Workspace:
    """The options of a run, and what is done with them for every data set.

    Attributes:
        options: What the command was told.
    """

    options: Options

    @property
    def root(self) -> Path:
        """The folder that is filled."""
        return self.options.root

    @property
    def downloads(self) -> Path:
        """The folder for downloaded archives."""
        return self.root / "archives"

    def get(self, archive: Archive, steps: str = "") -> Path:
        """Find or fetch an archive, with its checksum compared.

        Args:
            archive: What is needed.
            steps: How a user gets it by hand, printed where it cannot be downloaded.

        Raises:
            UserError: If it cannot be had, or is another file than expected.
        """
        given = self.options.archives
        if given is None and archive.url is not None:
            return download(archive, self.downloads, self.options.mirror)
        folders = (self.downloads, self.root) if given is None else (given,)
        for path in (folder / archive.name for folder in folders):
            if path.is_file():
                check_archive(path, archive)
                return path
        if steps:
            say(steps)
        raise UserError(
            f"expected {archive.name} in {folders[0]}, but it is not there; "
            + ("put it there" if archive.url is None else "put it there, or leave archives out to download it")
            + " and run the same command again"
        )

    def forget(self, archives: Iterable[Archive]) -> None:
        """Delete downloaded archives, unless they are to be kept; archives of the user's stay."""
        if self.options.keep_archives or self.options.archives is not None:
            return
        for archive in archives:
            path = self.downloads / archive.name
            if archive.url is not None and path.is_file():
                path.unlink()
                say(f"{archive.name}: deleted after unpacking; keep_archives=true keeps it")
        if self.downloads.is_dir() and not any(self.downloads.iterdir()):
            self.downloads.rmdir()

    def convert(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Apply a function to many tasks, in parallel and in their order, with few of them in memory at a time.

        Args:
            function: A function of a module, so that processes can find it.
            tasks: Its arguments.
        """
        count = usable_cores() if self.options.num_workers is None else self.options.num_workers
        if count == 0:
            yield from map(function, tasks)
            return
        with _pool(count) as pool:
            waiting: deque[Future[Result]] = deque()
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) >= _WAITING * count:
                    yield waiting.popleft().result()
            for future in waiting:
                yield future.result()


@dataclass(frozen=True)
class Preparation:
    """How a data set is prepared.

    Attributes:
        build: Puts its files in place; may be called again after an interruption.
        find_problems: Says what a folder lacks of the whole data set; nothing if it is whole.
        summarize: Says what a whole folder holds.
    """

    build: Callable[[Workspace], None]
    find_problems: Callable[[Path], list[str]]
    summarize: Callable[[Path], str]


@contextmanager
def _pool(count: int) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(count, initializer=_follow_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Leave Ctrl-C to the main process, and end with it, even if it is killed: a pool's processes would wait on."""
    import signal
    import threading
    from multiprocessing import connection, parent_process

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (connection.wait([sentinel]), os._exit(1)), daemon=True).start()
