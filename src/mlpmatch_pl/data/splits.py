"""Which images are labeled: a named, hashed list, chosen by fraction, count or file.

Choices by fraction or count are nested: with one seed, the 1/16 is inside the 1/8. A result is always
labeled by its list's name and hash, because several incompatible splits are called "1/16".
"""

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.seeding import derive_seed

Choice = str | int | float
_FRACTION = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class Split:
    """A list of image names.

    Attributes:
        label: What it is called in results, as in ``1/8 (seed 0)`` or a file's name.
        names: The images, in order.

    Example:
        >>> Split("two", ("a.png", "b.png")).sha256[:8]
        '1baca9d4'
    """

    label: str
    names: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of the names: equal for equal lists, whatever they are called."""
        return hashlib.sha256("\n".join(self.names).encode(errors="surrogateescape")).hexdigest()


def read_split(path: str, known: Sequence[str]) -> Split:
    """Read a list of names, a line each, as a run saves it.

    Args:
        path: The file.
        known: All names that there are.

    Raises:
        UserError: If the file is missing or empty, or holds a name twice or an unknown one.
    """
    if not Path(path).is_file():
        raise UserError(f"expected a list file, but {path} does not exist; a fraction is written 1/8, a count 92")
    names = tuple(line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip())
    wrong = sorted(set(names) - set(known))
    if wrong or not names or len(set(names)) < len(names):
        found = f"{wrong[0]!r}, which is none of them" if wrong else "none, or one twice"
        raise UserError(f"expected different names of images in the list {path}, but found {found}")
    return Split(path, names)


def is_path(spec: object) -> bool:
    """Tell whether a choice names a file or folder rather than a fraction or a count.

    Example:
        >>> is_path("splits/92/labeled.txt"), is_path("1/8"), is_path(92)
        (True, False, False)
    """
    return isinstance(spec, str) and not _FRACTION.fullmatch(spec) and not _is_number(spec)


def choose(
    names: Sequence[str],
    spec: Choice,
    seed: int,
    what: str = "labeled",
    order: Callable[[list[str]], list[str]] | None = None,
) -> Split:
    """Choose images by fraction or count.

    Args:
        names: What to choose from.
        spec: A fraction (``"1/8"`` or ``0.125``) or a count (``92``).
        seed: Seed of the choice; another seed is another list.
        what: Name of the key, for messages and so that several choices are independent.
        order: Rearranges the shuffled names before the first ones are taken, as `cover_first` does.

    Returns:
        The chosen names, sorted, at least one.

    Raises:
        UserError: If the choice is no such number, or is empty or larger than the set.

    Example:
        >>> choose(["a", "b", "c", "d"], "1/2", seed=0).names
        ('a', 'b')
        >>> choose(["a", "b", "c", "d"], "1/4", seed=0).names
        ('b',)
    """
    count = _count(spec, len(names), what)
    if count < 1:
        raise UserError(f"expected dataset.{what} to choose at least 1 image, but {spec} chooses none of {len(names)}")
    if count > len(names):
        raise UserError(
            f"expected dataset.{what} of at most {len(names)}, the number of images with a mask to choose from, "
            f"but got {spec}"
        )
    ordered = sorted(names)
    random.Random(derive_seed(seed, what)).shuffle(ordered)
    label = f"{spec} (seed {seed}{', every class' if order else ''})"
    return Split(label, tuple(sorted((order(ordered) if order else ordered)[:count])))


def cover_first(names: Iterable[str], classes: Mapping[str, frozenset[int]]) -> list[str]:
    """Move some images to the front that together hold every class, the rarest class first.

    The order does not depend on how many are taken, so choices stay nested.

    Args:
        names: Shuffled names.
        classes: The classes in each image.

    Returns:
        All names; every class is in the first images, one image a class at most.

    Example:
        >>> cover_first("abc", {"a": frozenset({0}), "b": frozenset({0}), "c": frozenset({0, 1})})
        ['c', 'a', 'b']
    """
    rest = list(names)
    images = Counter(label for found in classes.values() for label in found)
    first: list[str] = []
    for label, _ in sorted(images.items(), key=lambda item: (item[1], item[0])):
        if not any(label in classes[name] for name in first):
            first.append(next(name for name in rest if label in classes[name]))
    taken = set(first)
    return first + [name for name in rest if name not in taken]


def _count(spec: Choice, total: int, what: str) -> int:
    if isinstance(spec, str) and (match := _FRACTION.fullmatch(spec)):
        part, whole = int(match[1]), int(match[2])
        if whole == 0 or part > whole:
            raise UserError(f"expected dataset.{what} as a fraction of at most 1, but got {spec}")
        return max(round(total * part / whole), min(part, 1))
    number = float(spec) if _is_number(spec) else None
    if number is None or number < 0:
        raise UserError(
            f"expected dataset.{what} as a fraction such as 1/8, a count such as 92, or a list file, but got {spec!r}"
        )
    if number == int(number) and not isinstance(spec, float):
        return int(number)
    if number > 1:
        raise UserError(f"expected dataset.{what} as a fraction of at most 1 or a whole count, but got {spec}")
    return max(round(total * number), 1 if number else 0)


def _is_number(spec: object) -> bool:
    # float() reads "1_8" as 18: underscores are refused, because split folders are called so.
    if isinstance(spec, bool) or (isinstance(spec, str) and "_" in spec):
        return False
    try:
        return math.isfinite(float(spec))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
