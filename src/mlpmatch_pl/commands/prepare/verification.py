"""Sentences about what a folder lacks."""

from collections.abc import Collection

_NAMED = 5


def name_some(names: Collection[str]) -> str:
    """Name the first few of many files.

    Example:
        >>> name_some({"b.png", "a.png"})
        'a.png, b.png'
        >>> name_some([f"{i}.png" for i in range(7)])
        '0.png, 1.png, 2.png, 3.png, 4.png and 2 more'
    """
    shown = ", ".join(sorted(names)[:_NAMED])
    return shown + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")


def compare_count(what: str, found: int, expected: int) -> list[str]:
    """Return a problem if a number is not the published one.

    Example:
        >>> compare_count("images in train2017", 3, 118287)
        ['expected 118,287 images in train2017, found 3']
        >>> compare_count("images", 3, 3)
        []
    """
    return [] if found == expected else [f"expected {expected:,} {what}, found {found:,}"]


def missing_files(what: str, names: Collection[str]) -> list[str]:
    """Return a problem if files are missing.

    Example:
        >>> missing_files("mask", {"a.png"})
        ['1 mask missing: a.png']
        >>> missing_files("mask", [])
        []
    """
    return [f"{len(names):,} {what}{'s' * (len(names) > 1)} missing: {name_some(names)}"] if names else []
