"""Pair images and masks by name.

A name is a path below a folder without suffix, in Unicode's composed form: Macs decompose accents, others don't.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import NamedTuple

from mlpmatch_pl.utils.errors import UserError

_SEPARATORS = re.compile(r"([_\-. ()]+)")
_MASK_WORDS = re.compile(
    r"masks?|labels?|annotations?|seg|segmentations?|gt|ground-?truth|gt(fine|coarse)|label(ids|trainids)|trainids"
)
_MAX_COMPARED = 2000  # names among which a similar one is looked for


class NameRule(NamedTuple):
    """How the name of a mask follows from that of its image; ``*`` is the part they share.

    Attributes:
        image: Pattern of an image's file name, such as ``*_sat``.
        mask: Pattern of a mask's file name, such as ``*_mask``.

    Example:
        >>> NameRule("*", "*_mask").key("day/a_mask", "mask"), NameRule("*", "*_mask").key("day/a", "mask")
        ('day/a', None)
    """

    image: str = "*"
    mask: str = "*"

    def key(self, name: str, kind: str) -> str | None:
        """Return what an image's or mask's name shares with the other one's; None if its pattern does not match."""
        before, _, after = getattr(self, kind).partition("*")
        folder, slash, last = name.rpartition("/")
        if len(last) <= len(before) + len(after) or not (last.startswith(before) and last.endswith(after)):
            return None
        return f"{folder}{slash}{last[len(before) : len(last) - len(after)]}"

    def options(self) -> str:
        """Return the options that set this rule."""
        image = "" if self.image == "*" else f"'dataset.image_name={self.image}' "
        return f"{image}'dataset.mask_name={self.mask}'"


def normalized(name: str) -> str:
    """Return a name in Unicode's composed form.

    Example:
        >>> normalized("fore\u0302t") == "for\u00eat"
        True
    """
    return unicodedata.normalize("NFC", name)


def require_pattern(option: str, pattern: str | None) -> None:
    """Refuse a pattern of names without exactly one ``*``.

    Raises:
        UserError: With the option.
    """
    if pattern is not None and (pattern.count("*") != 1 or "/" in pattern):
        raise UserError(
            f"expected {option} with one * for the part that an image and its mask share, as in {option}=*_mask, but "
            f"got {pattern!r}"
        )


def find_rule(images: Iterable[str], masks: Iterable[str]) -> NameRule | None:
    """Find how the masks are named after the images: the same, or with one word more or another word.

    Returns:
        The only rule by which every mask has an image of its own; the same names if any mask has them; None if there is
        no rule, or several.

    Example:
        >>> find_rule(["a", "b"], ["a_mask", "b_mask"])
        NameRule(image='*', mask='*_mask')
        >>> find_rule(["img_1", "img_2"], ["gt_1", "gt_2"])
        NameRule(image='img*', mask='gt*')
        >>> find_rule(["a", "b"], ["c", "d"]) is None
        True
    """
    names, masks = set(images), sorted(masks)
    if not masks or names & set(masks):
        return NameRule()
    folder = masks[0].rpartition("/")[0]
    beside = [name for name in names if name.rpartition("/")[0] == folder]
    rules = {rule for name in beside for rule in _rules(name, masks[0]) if _pairs_all(rule, names, masks)}
    shortest = sorted(rules, key=lambda rule: len(rule.image) + len(rule.mask))
    if len(shortest) > 1 and len("".join(shortest[0])) == len("".join(shortest[1])):
        return None
    return shortest[0] if shortest else None


def _rules(image: str, mask: str) -> Iterator[NameRule]:
    """Yield the rules that pair two names which differ in words at the end or the start."""
    one, two = (_SEPARATORS.split(name.rpartition("/")[2]) for name in (image, mask))
    shorter = min(len(one), len(two))
    start = next((i for i in range(shorter) if one[i] != two[i]), shorter)
    end = next((i for i in range(shorter) if one[-1 - i] != two[-1 - i]), shorter)
    if start and not _numbered(one[start:] + two[start:]):
        yield NameRule(f"*{''.join(one[start:])}", f"*{''.join(two[start:])}")
    if end and not _numbered(one[: len(one) - end] + two[: len(two) - end]):
        yield NameRule(f"{''.join(one[: len(one) - end])}*", f"{''.join(two[: len(two) - end])}*")


def _numbered(words: Iterable[str]) -> bool:
    """Tell whether a word is a number, which tells files apart."""
    return any(word.isdigit() for word in words)


def _pairs_all(rule: NameRule, images: set[str], masks: Iterable[str]) -> bool:
    keys = {key for name in images if (key := rule.key(name, "image")) is not None}
    return all(rule.key(name, "mask") in keys for name in masks)


def mask_pattern(names: Iterable[str], folder: str) -> str | None:
    """Find the pattern of the masks among images and masks in one folder, by words such as ``mask`` or ``label``.

    Raises:
        UserError: If several patterns match.

    Example:
        >>> mask_pattern(["a", "a_mask", "b"], "data"), mask_pattern(["a", "b"], "data")
        ('*_mask', None)
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        words = _SEPARATORS.split(name.rpartition("/")[2])
        at = next((i for i, word in enumerate(words) if _MASK_WORDS.fullmatch(word.lower())), None)
        if at is None or len(words) == 1:
            continue
        ends = at > 0 and not _numbered(words[at:])
        found.setdefault("*" + "".join(words[at - 1 :]) if ends else "".join(words[: at + 2]) + "*", name)
    if len(found) > 1:
        one, two = list(found)[:2]
        raise UserError(
            f"expected masks of one pattern beside the images in {folder}, but {found[one]} and {found[two]} "
            f"follow two; choose one, as in 'dataset.mask_name={one}'"
        )
    return next(iter(found), None)


def nearest(name: str, others: Iterable[str]) -> str | None:
    """Return the name that is most similar, if any is."""
    choices = sorted(others)[:_MAX_COMPARED]
    found = get_close_matches(name, choices, n=1, cutoff=0.4)
    return found[0] if found else None


def suggested_rule(image: str, mask: str) -> NameRule | None:
    """Return a rule that would pair two names.

    Example:
        >>> suggested_rule("a", "a_mask")
        NameRule(image='*', mask='*_mask')
    """
    return next((rule for rule in _rules(image, mask) if rule.key(image, "image") == rule.key(mask, "mask")), None)


def pair_names(
    images: Mapping[str, str], masks: Mapping[str, str], rule: NameRule
) -> tuple[dict[str, str | None], list[str]]:
    """Pair images with masks by a rule.

    Args:
        images: The files of the images by name.
        masks: The files of the masks by name.
        rule: How they are named.

    Returns:
        The mask's file, or None, for the file of each image that the rule's pattern matches; and the names of the masks
        that match theirs but have no image.
    """
    by_key = {key: file for name, file in masks.items() if (key := rule.key(name, "mask")) is not None}
    keys = {key: file for name, file in images.items() if (key := rule.key(name, "image")) is not None}
    lonely = [name for name in masks if (key := rule.key(name, "mask")) is not None and key not in keys]
    return {file: by_key.get(key) for key, file in keys.items()}, lonely
