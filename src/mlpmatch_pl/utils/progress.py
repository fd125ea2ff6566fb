"""Progress bars in a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 30.0


def say(text: str) -> None:
    """Print a line and flush it."""
    print(text, flush=True)


def megabytes(count: float) -> str:
    """Format a number of bytes.

    Example:
        >>> megabytes(1_999_639_040), megabytes(12_300)
        ('2.0 GB', '0.0 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@contextmanager
def progress(title: str, total: int | None, in_bytes: bool = False, start: int = 0) -> Iterator[Callable[[int], None]]:
    """Show the progress of a task.

    Args:
        title: Description of the task.
        total: Number of items, if known.
        in_bytes: Whether items are bytes.
        start: Number of items completed before.

    Yields:
        A function to call with the number of items completed since its last call.
    """
    from rich.console import Console

    console = Console()
    shown = _bar if console.is_terminal else _lines
    with shown(title, total, in_bytes, start) as advance:
        yield advance


@contextmanager
def _bar(title: str, total: int | None, in_bytes: bool, start: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    sizes = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    with Progress(TextColumn("{task.description}"), BarColumn(), *sizes, TimeRemainingColumn()) as bar:
        task = bar.add_task(title, total=total, completed=start)
        yield lambda count: bar.advance(task, count)


@contextmanager
def _lines(title: str, total: int | None, in_bytes: bool, start: int) -> Iterator[Callable[[int], None]]:
    write = megabytes if in_bytes else "{:,}".format
    done, printed = start, time.monotonic()
    of_total = "" if total is None else f" of {write(total)}"

    def advance(count: int) -> None:
        nonlocal done, printed
        done += count
        if time.monotonic() - printed >= SECONDS_BETWEEN_LINES:
            printed = time.monotonic()
            say(f"{title}: {write(done)}{of_total}")

    say(f"{title}{of_total.replace(' of ', ', ')}" + (f", continuing at {write(start)}" if start else ""))
    yield advance
