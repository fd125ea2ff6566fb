"""``--help``: a command's docstring, the keys of its config file with their comments, and the docstring's examples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from textwrap import fill, indent
from typing import Any

import yaml

_HIDDEN = re.compile(r"\A(?:#.*\n)+|^(?:defaults|hydra):\n(?:(?: |-|#|$).*\n?)*", re.M)


def help_page(name: str, package: str, doc: str) -> str:
    """Return the help of a command.

    Args:
        name: Name of the command and of its primary config.
        package: Package of the primary config.
        doc: Docstring: one line, an explanation, and at the end ``Examples:``.
    """
    about, _, examples = doc.partition("Examples:\n")
    keys, groups = "", []
    for text in _config_files(package, name):
        keys += _HIDDEN.sub("", text).strip() + "\n"
        groups += [
            f"{key}={default or 'null'} ".ljust(22) + fill(", ".join(_choices(key)), 98, subsequent_indent=" " * 24)
            for entry in yaml.safe_load(text).get("defaults", ()) if isinstance(entry, dict)
            for key, default in entry.items() if not key.startswith("override ")
        ]  # fmt: skip
    parts = [about.strip(), f"Usage: python -m mlpmatch_pl.{name} KEY=VALUE ...  (or: mlpmatch {name} KEY=VALUE ...)"]
    if groups:
        parts.append("Groups, with their defaults and choices:\n" + indent("\n".join(groups), "  "))
    parts.append("Keys, with their defaults (???: required):\n" + indent(re.sub(r"\n{2,}", "\n", keys).strip(), "  "))
    parts.append("--cfg job prints the whole configuration, -m runs a sweep over values separated by commas.")
    return "\n\n".join([*parts, "Examples:\n" + examples.rstrip()])


def _config_files(package: str, name: str) -> Iterator[str]:
    """Yield the config file of a command, then those that its defaults list without a group."""
    text = files(package).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    yield text
    for entry in yaml.safe_load(text).get("defaults", ()):
        if isinstance(entry, str) and entry != "_self_":
            yield from _config_files(package, entry)


def _choices(group: str) -> list[str]:
    folder: Any = files("mlpmatch_pl.conf").joinpath(group)
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())
