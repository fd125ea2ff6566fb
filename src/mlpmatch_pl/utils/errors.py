"""Errors the user can fix: one sentence with what was expected, what was found and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Wrong configuration, data or files. Commands print it as one line, without a traceback."""


def suggest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """Return ``" Did you mean a, b?"`` with the nearest choices, or an empty string.

    Example:
        >>> suggest("resnet5O", ["resnet50", "vgg16"])
        ' Did you mean resnet50?'
        >>> suggest("zzz", ["resnet50"])
        ''
    """
    near = get_close_matches(name, list(choices), n=count, cutoff=0.6)
    return f" Did you mean {', '.join(near)}?" if near else ""
