"""One file of arrays: written once, in full or not at all, and then memory-mapped by every process that reads it.

    arrays, each at a multiple of 64 bytes | table of them | footer: magic, table's position, number of arrays, key

The footer is written last, so that a file that was cut off has none.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64
KEY_BYTES = 32
LEFT_BEHIND = 3600.0  # seconds without a write after which a build is taken for dead
_MAGIC = b"mlpcach1"
_FOOTER = struct.Struct(f"<8sQQ{KEY_BYTES}s")
_ENTRY = np.dtype([("offset", "<u8"), ("shape", "<u4", 3), ("bits", "<u4")])
_TYPES: dict[int, np.dtype[Any]] = {8: np.dtype(np.uint8), 16: np.dtype("<u2")}
Array = NDArray[Any]


class ArrayFile:
    """Arrays of a file, read-only and mapped: processes share the system's copy of what they read.

    Args:
        path: A file that `write_arrays` has written.
        key: What it must have been written for.

    Raises:
        ValueError: If the file is missing, cut off, or was written for something else; the message says which.
    """

    def __init__(self, path: Path, key: bytes) -> None:
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ValueError("there is none yet") from None
        except ValueError:  # an empty file cannot be mapped
            raise ValueError("it is incomplete") from None
        size = len(self._map)
        if size < _FOOTER.size:
            raise ValueError("it is incomplete")
        magic, table, count, found = _FOOTER.unpack(self._map[-_FOOTER.size :])
        if magic != _MAGIC or table + count * _ENTRY.itemsize + _FOOTER.size != size:
            raise ValueError("it is incomplete")
        if found != key:
            raise ValueError("files, options or the choice of images have changed")
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._table = np.frombuffer(self._map, _ENTRY, count, table)
        offset, shape, bits = (self._table[name].astype(np.float64) for name in self._table.dtype.names or ())
        if not np.isin(bits, [*_TYPES]).all() or (offset + shape.prod(axis=1) * bits / 8 > table).any():
            raise ValueError("its index is damaged")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> Array:
        """Return an array as `write_arrays` got it, (H, W, C); read-only."""
        offset, shape, bits = self._table[number].tolist()
        dtype = _TYPES[bits]
        length = int(np.prod(shape)) * dtype.itemsize
        array: Array = self._bytes[offset : offset + length].view(dtype).reshape(shape)
        return array


def write_arrays(path: Path, arrays: Iterable[Array], key: bytes) -> None:
    """Write a file for `ArrayFile`. It appears under its name only when it is whole.

    Args:
        path: The file; one that is there is replaced.
        arrays: uint8 or uint16, (H, W, C).
        key: What the file is written for, 32 bytes.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> folder = TemporaryDirectory()
        >>> path, key = Path(folder.name, "arrays"), bytes(32)
        >>> write_arrays(path, [np.full((2, 3, 1), 7, np.uint8)], key)
        >>> ArrayFile(path, key)[0].tolist()
        [[[7], [7], [7]], [[7], [7], [7]]]
    """
    _remove_left_behind(path)
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")  # other processes may build at the same time
    try:
        with part.open("xb") as file:
            _write(file, arrays, key)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:  # nothing is left of a build that failed or was interrupted
        part.unlink(missing_ok=True)


def _write(file: BinaryIO, arrays: Iterable[Array], key: bytes) -> None:
    entries = []
    for array in arrays:
        offset = _aligned(file)
        dtype = _TYPES[array.dtype.itemsize * 8]
        file.write(np.ascontiguousarray(array, dtype).data)
        entries.append((offset, array.shape, dtype.itemsize * 8))
    table = _aligned(file)
    file.write(np.array(entries, _ENTRY).tobytes())
    file.write(_FOOTER.pack(_MAGIC, table, len(entries), key))


def _aligned(file: BinaryIO) -> int:
    file.write(bytes(-file.tell() % ALIGNMENT))
    return file.tell()


def _remove_left_behind(path: Path) -> None:
    """Remove what builds left that were killed; another process may be building just now, and writes all the time."""
    for part in path.parent.glob(f"{path.name}.*.part"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > LEFT_BEHIND:
                part.unlink()
