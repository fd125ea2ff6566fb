"""Reading a config.yaml that may come from anywhere: it stays small in memory, and shows nothing of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # OmegaConf's own reader
from omegaconf import OmegaConf

# A run's own file has about 10 kB and 10 interpolations. Values that double with each that they refer to fill the
# memory after thirty, and so do YAML's aliases, which a run never writes.
MOST_BYTES, MOST_INTERPOLATIONS, DEEPEST = 2**18, 20, 20
_KEY = re.compile(r"\$\{(\.*)(\w+(?:\.\w+)*)\}")  # ${dataset.root}, ${.batch_size}
# The environment holds secrets, and what is read here ends in reports and messages: this package's own variables only.
_VARIABLE = re.compile(r"\$\{oc\.env:(MLPMATCH_\w+)(?:,([^\\${}]*))?\}")


def load_yaml(path: Path) -> Any:
    r"""Read a YAML file as plain data.

    Interpolations of other keys, and of environment variables that begin with ``MLPMATCH_``, are replaced by their
    values. OmegaConf's resolvers are not called: what is meant for them stays text, see `unresolved`.

    Raises:
        ValueError: If it is no YAML, or one that would become larger in memory than any configuration is.
        OSError: If it cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "config.yaml"
        ...     _ = path.write_text("seed: 3\nloader: {seed: '${seed}', key: '${oc.env:SECRET}'}", encoding="utf-8")
        ...     load_yaml(path)["loader"]
        {'seed': 3, 'key': '${oc.env:SECRET}'}
    """
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"expected at most {MOST_BYTES} bytes")
    try:
        _refuse_growth(content)
        root = OmegaConf.to_container(OmegaConf.create(content.decode("utf-8")), resolve=False)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return _resolved(root, root, ())


def unresolved(value: Any) -> Iterator[str]:
    """Yield the texts in plain data that still hold an interpolation; `hydra.utils.instantiate` would resolve them.

    Example:
        >>> list(unresolved({"root": "${oc.env:HOME}/x", "classes": ["a", "${hydra:job.num}"]}))
        ['${oc.env:HOME}/x', '${hydra:job.num}']
    """
    if isinstance(value, str) and "${" in value:
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from unresolved(part)


def _refuse_growth(content: bytes) -> None:
    depth = interpolations = 0
    for event in yaml.parse(content):
        interpolations += event.value.count("${") if isinstance(event, yaml.ScalarEvent) else 0
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
            raise ValueError(f"expected no aliases, and at most {DEEPEST} levels")
    if interpolations > MOST_INTERPOLATIONS:
        raise ValueError(f"expected at most {MOST_INTERPOLATIONS} interpolations")


def _resolved(value: Any, root: Any, place: tuple[Any, ...], through: tuple[tuple[Any, ...], ...] = ()) -> Any:
    """Return a value with its interpolations replaced.

    Args:
        value: What stands at the place.
        root: The whole file.
        place: The keys that lead there.
        through: The places on the way from which this one is meant; none of them is followed again.
    """
    if isinstance(value, dict):
        return {key: _resolved(part, root, (*place, key)) for key, part in value.items()}
    if isinstance(value, list):
        return [_resolved(part, root, (*place, index)) for index, part in enumerate(value)]
    if not isinstance(value, str) or "${" not in value or "\\" in value or place in through:
        return value

    def meant(match: re.Match[str]) -> Any:
        up, keys = match.groups()
        target = (*(place[: max(len(place) - len(up), 0)] if up else ()), *keys.split("."))
        found = _at(root, target)
        return match[0] if found is None else _resolved(found, root, target, (*through, place))

    if whole := _KEY.fullmatch(value):
        return meant(whole)
    text = _VARIABLE.sub(lambda match: os.environ.get(match[1], match[2]) or match[0], value)
    text = _KEY.sub(lambda match: str(meant(match)), text)
    if len(text) > MOST_BYTES:
        raise ValueError(f"expected at most {MOST_BYTES} characters in a value")
    return text


def _at(root: Any, target: tuple[Any, ...]) -> Any:
    """Return the scalar at a place; None if there is none."""
    for key in target:
        root = root.get(key) if isinstance(root, dict) else None
    return root if isinstance(root, str | int | float) else None
