"""Errors the user can fix: one sentence with what was expected, what was found and what to do."""

from collections.abc import Iterable, Sequence
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


def require_choice(option: str, value: str, choices: Sequence[str]) -> str:
    """Return the value of an option, if it is one of its choices.

    Raises:
        UserError: If it is none of them.

    Example:
        >>> require_choice("batch_per", "step", ["device", "step"])
        'step'
        >>> require_choice("batch_per", "steps", ["device", "step"])
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected batch_per as device or step, but got 'steps'. Did you mean step?
    """
    if value not in choices:
        *others, last = choices
        listed = f"{', '.join(others)} or {last}" if others else last
        near = suggest(str(value), choices)
        raise UserError(f"expected {option} as {listed}, but got {value!r}{'.' if near else ''}{near}")
    return value
