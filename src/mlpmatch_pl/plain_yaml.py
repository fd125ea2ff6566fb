"""Reading a config.yaml that may come from anywhere: small files expand to small configurations only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # OmegaConf's own reader
from omegaconf import OmegaConf

# A run's own file has about 10 kB and 10 interpolations. Values that double with each that they refer to fill the
# memory after thirty, and so do YAML's aliases, which a run never writes.
MOST_BYTES, MOST_INTERPOLATIONS, DEEPEST = 2**18, 20, 20


def load_yaml(path: Path) -> Any:
    """Read a YAML file with OmegaConf, interpolations unresolved.

    Raises:
        ValueError: If it is no YAML, or one that would become larger in memory than any configuration is.
        OSError: If it cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "config.yaml"
        ...     _ = path.write_text("seed: 3", encoding="utf-8")
        ...     load_yaml(path).seed
        3
    """
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES or content.count(b"${") > MOST_INTERPOLATIONS:
        raise ValueError(f"expected at most {MOST_BYTES} bytes and {MOST_INTERPOLATIONS} interpolations")
    try:
        _refuse_growth(content)
        return OmegaConf.create(content.decode("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _refuse_growth(content: bytes) -> None:
    depth = 0
    for event in yaml.parse(content):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
            raise ValueError(f"expected no aliases, and at most {DEEPEST} levels")
