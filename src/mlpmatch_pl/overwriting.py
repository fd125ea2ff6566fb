"""Nothing is written over, unless the user says so: one refusal for all commands."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mlpmatch_pl.errors import UserError

OTHER_OUTPUT = "choose another output, or set overwrite=true"
OTHER_FOLDER = "choose another folder by hydra.run.dir"


def require_new(paths: Iterable[Path], remedy: str) -> None:
    """Refuse files that are there, before anything is written.

    Args:
        paths: What is going to be written, or must not be there for another reason.
        remedy: What to do, as `OTHER_OUTPUT`.

    Raises:
        UserError: With the first of them, and how many more there are.

    Example:
        >>> require_new([Path("nowhere"), Path(".")], OTHER_OUTPUT)
        Traceback (most recent call last):
        ...
        mlpmatch_pl.errors.UserError: expected to write new files only, but . exists; choose another output, or set ...
    """
    existing = [path for path in paths if os.path.lexists(path)]
    if existing:
        more = f" (and {len(existing) - 1:,} more)" if existing[1:] else ""
        raise UserError(f"expected to write new files only, but {existing[0]} exists{more}; {remedy}")
