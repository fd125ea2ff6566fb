"""Seeds that are pure functions of seed, step, sample and purpose.

Training never uses a global random generator. Each draw has its own seed, so that it is the same for any number of
workers, on all ranks that should share it, and after a resume.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar


def derive_seed(*parts: int | str) -> int:
    """Hash integers and strings to one seed in ``[0, 2**63)``.

    Args:
        parts: Identify the draw, for example ``derive_seed(seed, "cutmix", epoch, sample)``.

    Returns:
        The same number in every process and on every platform.

    Example:
        >>> derive_seed(0, "views", 1) == derive_seed(0, "views", 1)
        True
        >>> derive_seed(0, 1) == derive_seed(1, 0)
        False
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


T = TypeVar("T")


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """Take at most ``count`` items, in order, including the first and the last.

    Example:
        >>> evenly_spaced([3, 5, 7, 9, 11], 3), evenly_spaced("ab", 5), evenly_spaced("abc", 1)
        ([3, 7, 11], ['a', 'b'], ['a'])
    """
    count = min(count, len(items))
    gaps = max(count - 1, 1)
    return [items[round(number * (len(items) - 1) / gaps)] for number in range(count)]
