"""Plain values against type annotations: does 2 fit ``tuple[float, float]``, and how is that said in words.

Strict, as nobody wants ``batch_size="8"`` or ``lr=True`` to pass; numbers are finite. Two things are forgiven, because
YAML and the command line know no better: a list stands for a tuple, and a number for a text (a folder called 2019).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mlpmatch_pl.errors import UserError, suggest

_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
_ONE: dict[Any, str] = {
    Any: "a value",
    NoneType: "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
}
_MANY: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts"}
_COUNTS = ("no", "one", "two", "three", "four", "five", "six")
LONGEST = 80  # characters of a wrong value that are shown


def parameters(target: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Return the annotations of what a function or a class takes, and whether it takes other keywords too.

    What has no annotation, or one that cannot be resolved, takes any value.

    Example:
        >>> def crop(size: int, *, scale: tuple[float, float] = (0.5, 2.0)) -> None: ...
        >>> parameters(crop)[1], describe(parameters(crop)[0]["scale"])
        (False, 'a list of two numbers')
    """
    try:
        found = inspect.signature(target, eval_str=True).parameters.values()
    except (NameError, TypeError):  # names of a user's module that exist for type checkers only
        found = inspect.signature(target).parameters.values()
    named = [entry for entry in found if entry.kind in (entry.POSITIONAL_OR_KEYWORD, entry.KEYWORD_ONLY)]
    types = {entry.name: Any if isinstance(entry.annotation, str) else entry.annotation for entry in named}
    types = {name: Any if kind is inspect.Parameter.empty else kind for name, kind in types.items()}
    return types, any(entry.kind is entry.VAR_KEYWORD for entry in found)


def fit(key: str, value: Any, annotation: Any) -> Any:
    """Return a value that fits an annotation: the value itself, or with texts in place of numbers.

    Args:
        key: What the value is called in the message.
        value: Numbers, texts, lists and mappings.
        annotation: What it is to fit.

    Raises:
        UserError: If it does not fit.

    Example:
        >>> fit("dataset.classes", [1, "road"], Sequence[str])
        ['1', 'road']
        >>> fit("loader.scale", 2, tuple[float, float])
        Traceback (most recent call last):
        ...
        mlpmatch_pl.errors.UserError: expected loader.scale as a list of two numbers, but got 2
    """
    if annotation is Any or _fits(value, annotation):
        return value
    if _fits(texts := _texts(value), annotation):
        return texts
    shown = {None: "null", True: "true", False: "false"}[value] if isinstance(value, bool | NoneType) else repr(value)
    shown = shown if len(shown) <= LONGEST else f"{shown[:LONGEST]} ..."
    choices = [*map(str, _choices(annotation))]
    raise UserError(f"expected {key} as {describe(annotation)}, but got {shown}" + _advice(str(value), choices))


def _advice(value: str, choices: Sequence[str]) -> str:
    near = suggest(value, choices)
    return f".{near}" if near else ""


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=_STRICT)


def _fits(value: Any, annotation: Any) -> bool:
    for form in (value, _tuples(value)):
        try:
            _adapter(annotation).validate_python(form)
        except ValidationError:
            continue
        return True
    return False


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _texts(value: Any) -> Any:
    if isinstance(value, list):
        return [_texts(item) for item in value]
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def describe(annotation: Any) -> str:
    """Say in words what fits an annotation.

    Example:
        >>> describe(int | None), describe(Sequence[float]), describe(Literal["raise", "skip"])
        ('a whole number or null', 'a list of numbers', "'raise' or 'skip'")
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _ONE:
        return _ONE[annotation]
    if origin in (Union, UnionType):
        # Classes cannot be written in a configuration.
        kinds = [kind for kind in arguments if get_origin(kind) or kind in _ONE]
        return " or ".join(dict.fromkeys(map(describe, kinds)))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple and Ellipsis not in arguments and len(set(arguments)) == 1 and len(arguments) < len(_COUNTS):
        return f"a list of {_COUNTS[len(arguments)]} {_many(arguments[0])}"
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return "a mapping of keys to values"
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return f"a list of {_many(arguments[0])}"
    return f"a {getattr(annotation, '__name__', annotation)}"


def _many(annotation: Any) -> str:
    if annotation in _MANY:
        return _MANY[annotation]
    inner = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_many, inner)))
    if inspect.isclass(origin := get_origin(annotation)) and issubclass(origin, Sequence):
        return f"lists of {_many(inner[0])}"
    return "mappings" if inspect.isclass(origin) and issubclass(origin, Mapping) else "values"


def _choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return [*get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)] if get_origin(annotation) else []
