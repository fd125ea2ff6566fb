"""How much may run side by side."""

import os


def usable_cores() -> int:
    """Return the number of cores that this process may use: containers and batch systems give fewer than there are.

    Example:
        >>> 1 <= usable_cores() <= os.cpu_count()
        True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reader_threads(most: int = 8) -> int:
    """Return how many threads read and decode files; decoding releases the interpreter's lock."""
    return min(usable_cores(), most)
