"""Apply a function to many items in parallel, in order, with few items in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    in_flight: int | None = None,
    pool: Callable[[int], Executor] = ThreadPoolExecutor,
) -> Iterator[Result]:
    """Yield ``function(item)`` for each item, in order, computed ahead of the caller.

    If the caller stops early or a call raises, calls that have not started are canceled.

    Args:
        function: Called in a worker.
        items: Consumed in the caller's thread, ``in_flight`` items ahead of the results.
        workers: Number of threads. With 0, each item is computed when its result is requested.
        in_flight: Number of items computed ahead of the result that was yielded last. Default: ``4 * workers``.
        pool: Makes the executor, given the number of workers. With a process pool, ``function`` must be picklable.

    Example:
        >>> list(ordered_map(abs, range(-3, 1), workers=2))
        [3, 2, 1, 0]
    """
    if workers == 0:
        yield from map(function, items)
        return
    ahead = 4 * workers if in_flight is None else in_flight
    pending: deque[Future[Result]] = deque()
    executor = pool(workers)
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)
