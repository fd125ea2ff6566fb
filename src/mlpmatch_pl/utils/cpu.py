"""The number of usable CPU cores."""

import os


def usable_cores() -> int:
    """Return the number of cores available to this process, which containers and batch systems may restrict.

    Example:
        >>> 1 <= usable_cores() <= os.cpu_count()
        True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reader_threads(maximum: int = 8) -> int:
    """Return the number of threads for reading and decoding files; decoding releases the GIL."""
    return min(usable_cores(), maximum)
