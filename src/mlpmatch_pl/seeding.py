"""Random draws as pure functions of what they are for.

Nothing in the package draws from a global generator during training. Every draw is seeded by the
things that name it (seed, step, sample ...), so that it is the same for any number of workers, on
every rank that should share it, and after a resume.
"""

import hashlib


def mix(*parts: int | str) -> int:
    """Hash integers and strings to one seed in ``[0, 2**63)``.

    Args:
        parts: What names the draw, for example ``mix(seed, "cutmix", epoch, sample)``.

    Returns:
        The same number in every process and on every platform.

    Example:
        >>> mix(0, "views", 1) == mix(0, "views", 1)
        True
        >>> mix(0, 1) == mix(1, 0)
        False
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
