"""Some of many, spread evenly."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def spread(items: Sequence[T], count: int) -> list[T]:
    """Take at most ``count`` items, in order, the first and the last among them.

    Example:
        >>> spread([3, 5, 7, 9, 11], 3), spread("ab", 5), spread("abc", 1)
        ([3, 7, 11], ['a', 'b'], ['a'])
    """
    count = min(count, len(items))
    gaps = max(count - 1, 1)
    return [items[round(place * (len(items) - 1) / gaps)] for place in range(count)]
