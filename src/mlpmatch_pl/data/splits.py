"""Splits: named, hashed lists of images, chosen by fraction, count or file.

Choices by fraction or count with the same seed are nested: the 1/16 is a subset of the 1/8. Results are reported with
the name and hash of their list, because several incompatible splits are called "1/16".
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
        label: Its name in results, such as ``1/8 (seed 0)`` or a file name.
        names: The images, in order.

    Example:
        >>> Split("two", ("a.png", "b.png")).sha256[:8]
        '1baca9d4'
    """

    label: str
    names: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of the names; lists with the same names have the same hash, regardless of their label."""
        return hashlib.sha256("\n".join(self.names).encode(errors="surrogateescape")).hexdigest()


def read_split(path: str, known: Sequence[str]) -> Split:
    """Read a list of names, one per line, as runs save it.

    Args:
        path: The file.
        known: The names of all images.

    Raises:
        UserError: If the file is missing or empty, or has a duplicate or unknown name.
    """
    if not Path(path).is_file():
        raise UserError(f"expected a list file, but {path} does not exist; write a fraction as 1/8 or a count as 92")
    names = tuple(line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip())
    wrong = sorted(set(names) - set(known))
    if wrong or not names or len(set(names)) < len(names):
        found = f"the unknown name {wrong[0]!r}" if wrong else "none, or a duplicate"
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
        what: Name of the key, for messages and to make choices for different keys independent.
        order: Reorders the shuffled names before the first ones are taken, such as `cover_first`.

    Returns:
        The chosen names, sorted, at least one.

    Raises:
        UserError: If the choice is not a fraction or count, is empty, or is larger than the number of names.

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


def choose_groups(names: Sequence[str], spec: Choice, seed: int, group_by: str) -> set[str]:
    r"""Choose whole groups of validation images, as near to a fraction or count as they allow.

    Args:
        names: What to choose from.
        spec: A fraction or a count of images.
        seed: Seed of the choice.
        group_by: ``folder``, or a regular expression whose match in a name is its group.

    Raises:
        UserError: If the expression is invalid or does not match a name, or all names are in one group.

    Example:
        >>> sorted(choose_groups(["a/1", "a/2", "b/1", "b/2"], "1/2", seed=0, group_by="folder"))
        ['a/1', 'a/2']
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(_group(name, group_by), []).append(name)
    if len(groups) < 2:
        raise UserError(
            f"expected at least 2 groups of images for dataset.group_by={group_by}, but {len(names)} images are all in "
            f"{next(iter(groups), 'none')!r}; choose another dataset.group_by, or set dataset.val to a list or folder"
        )
    count, order = _count(spec, len(names), "val"), sorted(groups)
    random.Random(derive_seed(seed, "val")).shuffle(order)
    chosen: set[str] = set()
    for group in order[:-1]:  # one stays for training
        if not chosen or abs(len(chosen) + len(groups[group]) - count) < abs(len(chosen) - count):
            chosen.update(groups[group])
    return chosen


def _group(name: str, group_by: str) -> str:
    if group_by == "folder":
        return name.rpartition("/")[0]
    try:
        match = re.search(group_by, name)
    except re.error as error:
        raise UserError(
            f"expected dataset.group_by as folder or a regular expression, but got {group_by!r} ({error})"
        ) from error
    if match is None:
        raise UserError(
            f"expected dataset.group_by={group_by} to match every image's path, but it does not match {name}; correct "
            "it, or set dataset.group_by=folder"
        )
    return match[1] if match.re.groups else match[0]


def cover_first(names: Iterable[str], classes: Mapping[str, frozenset[int]]) -> list[str]:
    """Move images to the front that together contain every class, the rarest class first.

    The order does not depend on the number taken, so choices stay nested.

    Args:
        names: Shuffled names.
        classes: The classes in each image.

    Returns:
        All names. The first ones, at most one per class, contain every class.

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
        raise UserError(f"expected dataset.{what} as a fraction of at most 1 or an integer count, but got {spec}")
    return max(round(total * number), 1 if number else 0)


def _is_number(spec: object) -> bool:
    # float("1_8") is 18, but 1_8 is a common name of split folders.
    if isinstance(spec, bool) or (isinstance(spec, str) and "_" in spec):
        return False
    try:
        return math.isfinite(float(spec))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
