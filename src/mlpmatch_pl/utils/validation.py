"""Types of plain values, checked with pydantic: configurations, options of commands, hyperparameters in checkpoints.

Neither ``batch_size="8"`` nor ``lr=True`` passes, and numbers are finite. But YAML and the command line have neither
tuples nor paths, and read a folder called 2019 as a number: a list is accepted as a tuple, a string as a path, and a
number as a string.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Strict, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict, is_typeddict  # noqa: UP035  # pydantic refuses typing's below 3.12

from mlpmatch_pl.utils.errors import UserError, suggest

Options = TypeVar("Options")
LONGEST = 80  # characters of a wrong value that a message shows
_CONFIG = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True, coerce_numbers_to_str=True)
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping of keys to values",
    "float_type": "a number",
    "int_type": "an integer",
    "list_type": "a list",
    "literal_error": "{expected}",
    "mapping_type": "a mapping of keys to values",
    "missing": "a longer list",
    "none_required": "null",
    "path_type": "a path",
    "sequence_str": "a list",
    "string_type": "a string",
    "too_long": "a list of at most {max_length} values",
    "tuple_type": "a list",
}


def _strict(kind: Any) -> Any:
    """Return an annotation with strict numbers and booleans, and with paths below ``~``."""
    if kind in (bool, int, float):
        return Annotated[kind, Strict()]
    if kind is Path:
        return Annotated[Path, BeforeValidator(_expanded)]
    origin, arguments = get_origin(kind), tuple(map(_strict, get_args(kind)))
    if origin in (Union, UnionType):
        return Union[arguments]  # noqa: UP007
    return kind if origin in (None, Annotated, Literal) else origin[arguments]


def _expanded(value: Any) -> str | None:
    text = str(value) if isinstance(value, str | int | float | Path) and not isinstance(value, bool) else ""
    return os.path.expanduser(text) if text and "\0" not in text else None


def mapping_type(types: Mapping[str, Any], optional: Collection[str] = (), is_open: bool = False) -> Any:
    """Return the type of a mapping with the given keys.

    Args:
        types: Type of each key's value.
        optional: Keys that may be missing.
        is_open: Whether other keys are allowed, with any values.
    """
    kinds = {key: _strict(kind) for key, kind in types.items()}
    kinds |= {key: NotRequired[kinds[key]] for key in optional}
    mapping = TypedDict("mapping", kinds)  # type: ignore[misc]
    extra: Any = "allow" if is_open else "forbid"
    return with_config(ConfigDict(**_CONFIG, extra=extra))(mapping)


@cache
def arguments_type(target: Any) -> Any:
    """Return the type of a mapping that can be passed to a function or class as keyword arguments.

    Parameters without an annotation, or with one that cannot be resolved, take any value.

    Example:
        >>> def crop(size: int, *, scale: tuple[float, float] = (0.5, 2.0)) -> None: ...
        >>> validate(arguments_type(crop), {"size": 8, "scale": [1, 2]})
        {'size': 8, 'scale': (1.0, 2.0)}
    """
    try:
        signature = inspect.signature(target, eval_str=True)
    except (NameError, TypeError):  # names that a user's module imports for type checkers only
        signature = inspect.signature(target)
    entries = signature.parameters.values()
    named = {entry.name: entry for entry in entries if entry.kind in (entry.POSITIONAL_OR_KEYWORD, entry.KEYWORD_ONLY)}
    kinds = {
        name: Any if isinstance(entry.annotation, str) or entry.annotation is entry.empty else entry.annotation
        for name, entry in named.items()
    }
    optional = [name for name, entry in named.items() if entry.default is not entry.empty]
    return mapping_type(kinds, optional, any(entry.kind is entry.VAR_KEYWORD for entry in entries))


def read_options(cls: type[Options], values: Any, key: str = "") -> Options:
    """Build a dataclass, and the dataclasses in its fields, from plain values.

    Args:
        cls: The dataclass. A single value is accepted for a field that is a tuple.
        values: Values by field name, as in a configuration.
        key: Key of the mapping in the configuration; empty at the top.

    Raises:
        UserError: For the first wrong value, missing key or unknown key, and for whatever the dataclass itself refuses.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Draw:
        ...     scales: tuple[float, ...] = (1.0,)
        ...     overwrite: bool = False
        >>> read_options(Draw, {"scales": 2}).scales
        (2.0,)
        >>> read_options(Draw, {"overwrite": "no"})
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected overwrite as true or false, but got 'no'
    """
    kinds, node = get_type_hints(cls), validate(dict[str, Any], values, key)
    node = {
        name: read_options(kinds[name], value, _joined(key, name)) if is_dataclass(kinds.get(name))
        else [value] if get_origin(kinds.get(name)) is tuple and isinstance(value, str | int | float) else value
        for name, value in node.items()
    }  # fmt: skip
    return cls(**validate(arguments_type(cls), node, key))  # type: ignore[arg-type]


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind) if is_typeddict(kind) else TypeAdapter(_strict(kind), config=_CONFIG)


def validate(kind: Any, value: Any, key: str = "") -> Any:
    """Return a plain value converted to a type.

    Args:
        kind: A type annotation, or the result of `mapping_type` or `arguments_type`.
        value: Numbers, strings, lists and mappings.
        key: Key of the value in the configuration.

    Raises:
        UserError: For the first value that does not fit.

    Example:
        >>> validate(tuple[float, float], 2, "loader.scale")
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected loader.scale as a list, but got 2
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        raise UserError(_sentence(kind, value, key, error.errors(include_url=False))) from None


def _sentence(kind: Any, value: Any, key: str, details: list[Any]) -> str:
    """Translate pydantic's errors about the first wrong value into one sentence."""
    located = [(_path(value, detail["loc"]), detail) for detail in details]
    path = max((path for path, _ in located if path[:1] == located[0][0][:1]), key=len)  # of the members of a union
    found = [detail for where, detail in located if where == path]
    name = _joined(key, *path)
    if any(detail["type"] == "extra_forbidden" for detail in found):
        return f"the configuration has no key {name}." + suggest(str(path[-1]), _known_keys(kind, path[:-1]))
    for last in [detail["loc"][-1] for detail in found if detail["type"] == "missing"]:
        if isinstance(last, str):
            missing = _joined(name, last)
            return f"expected a value for {missing}, but the configuration lacks it; set {missing}=..."
    for part in path:
        value = value[part]
    expected = " or ".join(dict.fromkeys(filter(None, map(_describe, found))))
    advice = suggest(str(value), re.findall("'([^']*)'", expected))
    return f"expected {name or 'the configuration'} as {expected}, but got {_shown(value)}" + (
        f".{advice}" if advice else ""
    )


def _path(node: Any, location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Return the keys and indices in an error's location, without the names of a union's members."""
    path = []
    for part in location:
        is_index = isinstance(node, list | tuple) and isinstance(part, int) and part < len(node)
        if is_index or (isinstance(node, Mapping) and part in node):
            path.append(part)
            node = node[part]
    return tuple(path)


def _describe(detail: Any) -> str:
    if detail["type"] == "is_instance_of":  # a configuration holds no instances
        return ""
    text = _EXPECTED.get(detail["type"]) or str(detail["msg"]).removeprefix("Input should be ")
    return text.format(**detail.get("ctx", {}))


def _known_keys(kind: Any, path: tuple[str | int, ...]) -> list[str]:
    """Return the keys that a type has at a path."""
    for member in (kind, *get_args(kind)):
        if is_typeddict(member):
            hints = get_type_hints(member)
            return _known_keys(hints[str(path[0])], path[1:]) if path else list(hints)
    return []


def _joined(key: str, *path: str | int) -> str:
    for part in path:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
    return key


def _shown(value: Any) -> str:
    shown = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]} ..."
