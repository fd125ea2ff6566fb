"""Plain values against type annotations: does 2 fit ``tuple[float, float]``, and how is that said in words.

Strict, as nobody wants ``batch_size="8"`` or ``lr=True`` to pass; numbers are finite. Three things are forgiven, as the
command line knows no better: a list stands for a tuple, a number for a text (a folder called 2019), a text for a path.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mlpmatch_pl.utils.errors import UserError, suggest

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
Options = TypeVar("Options")


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


def read_options(cls: type[Options], values: Any, key: str = "") -> Options:
    """Build a dataclass from plain values: the door of every command.

    Args:
        cls: Each field's annotation says what its value must be; one that is a dataclass itself reads a mapping.
        values: By the fields' names, as a configuration holds them. A single value stands for a list of one.
        key: What they are called together; nothing at the top of a configuration.

    Raises:
        UserError: For the first value that does not fit, key that is missing, or key that nothing reads, and whatever
            the dataclass itself refuses.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Draw:
        ...     output: Path
        ...     scales: tuple[float, ...] = (1.0,)
        ...     overwrite: bool = False
        >>> read_options(Draw, {"output": "x", "scales": 2}).scales
        (2,)
        >>> read_options(Draw, {"output": "x", "overwrite": "no"})
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected overwrite as true or false, but got 'no'
    """
    node, types = mapping(key, values), parameters(cls)[0]
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
    check_keys(key, node, types, needed)
    return cls(**{name: _option(_below(key, name), value, types[name]) for name, value in node.items()})


def _option(key: str, value: Any, annotation: Any) -> Any:
    if is_dataclass(annotation):
        return read_options(annotation, value, key)  # type: ignore[arg-type]
    alone = get_origin(annotation) is tuple and isinstance(value, str | int | float)
    return _tuples(fit(key, [value] if alone else value, annotation))


def fitted(
    key: str, node: Mapping[str, Any], types: Mapping[str, Any], required: Iterable[str] = (), is_open: bool = False
) -> dict[str, Any]:
    """Return a mapping whose values fit the types; keys without one are refused, unless it is open.

    Raises:
        UserError: For the first value that does not fit, key that is missing, or key that nothing reads.
    """
    check_keys(key, node, node if is_open else types, required)
    return {name: fit(_below(key, name), value, types.get(name, Any)) for name, value in node.items()}


def check_keys(key: str, node: Mapping[str, Any], known: Collection[str], required: Iterable[str]) -> None:
    """Refuse a mapping without a key that is required, or with one that nothing reads.

    Raises:
        UserError: For the first such key.
    """
    if missing := [name for name in required if name not in node]:
        raise UserError(f"expected a value for {_below(key, missing[0])}, but the configuration lacks it; put it back")
    if unknown := [str(name) for name in node if name not in known]:
        raise UserError(f"the configuration has no key {_below(key, unknown[0])}." + suggest(unknown[0], known))


def mapping(key: str, value: Any) -> dict[str, Any]:
    """Return a value that is a mapping.

    Raises:
        UserError: If it is none.
    """
    if not isinstance(value, dict):
        raise UserError(
            f"expected {key} as a mapping of keys to values, but got {_shown(value)}; set its keys, as {key}.a=1"
        )
    return value


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def fit(key: str, value: Any, annotation: Any) -> Any:
    """Return a value that fits an annotation: the value itself, or with texts in place of numbers, or a path.

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
        mlpmatch_pl.utils.errors.UserError: expected loader.scale as a list of two numbers, but got 2
    """
    texts = _texts(value)
    for form in (value, texts, _path(texts)):
        if annotation is Any or _fits(form, annotation):
            return form
    choices = [*map(str, _choices(annotation))]
    raise UserError(f"expected {key} as {describe(annotation)}, but got {_shown(value)}" + _advice(value, choices))


def _shown(value: Any) -> str:
    shown = {None: "null", True: "true", False: "false"}[value] if isinstance(value, bool | NoneType) else repr(value)
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]} ..."


def _advice(value: Any, choices: Sequence[str]) -> str:
    wrong = [str(item) for item in (value if isinstance(value, list) else [value]) if str(item) not in choices]
    near = suggest(wrong[0], choices) if wrong else ""
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


def _path(value: Any) -> Any:
    is_path = isinstance(value, str) and value and "\0" not in value
    return Path(os.path.expanduser(value)) if is_path else value


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
    if get_origin(annotation) is Literal:
        return " or ".join(map(repr, inner))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_many, inner)))
    if inspect.isclass(origin := get_origin(annotation)) and issubclass(origin, Sequence):
        return f"lists of {_many(inner[0])}"
    return "mappings" if inspect.isclass(origin) and issubclass(origin, Mapping) else "values"


def _choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return [*get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)] if get_origin(annotation) else []
