"""Many file names in little memory: the names of a hundred thousand images as two tensors.

A list of strings is copied into every worker process, a page at a time, because Python counts references inside the
objects. Tensors are not: forked workers share their pages, and spawned ones get them as shared memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
import torch


class PathTable:
    """An immutable sequence of strings.

    Args:
        paths: The strings, as the file system gives them.

    Example:
        >>> table = PathTable(["images/a.jpg", "", "images/b.jpg"])
        >>> len(table), table[2], list(table)
        (3, 'images/b.jpg', ['images/a.jpg', '', 'images/b.jpg'])
    """

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._text = torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy())
        self._ends = torch.from_numpy(np.cumsum([0, *map(len, encoded)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} paths")
        index %= len(self)
        start, end = self._ends[index : index + 2].tolist()
        return os.fsdecode(self._text[start:end].numpy().tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))
