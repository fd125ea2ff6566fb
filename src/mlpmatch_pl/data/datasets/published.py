"""Published lists of labeled images: their names, and hashes that identify the original files.

The lists are UniMatch's (MIT license) and not part of this package. ``python -m mlpmatch_pl.prepare dataset=voc
splits=unimatch root=...`` downloads them into ``splits/`` below the dataset's root.

Papers call three different selections of VOC images "1/16". ``92`` to ``1464`` select from VOC's own train set;
``blended`` lists select from VOC and SBD together; ``u2pl`` lists do too, but take VOC's own masks first.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True)
class PublishedList:
    """A list of labeled images and the list of the other training images, as published.

    Attributes:
        name: Its name in ``dataset.labeled`` and in results, such as ``92`` or ``blended/1-16``.
        folder: Its folder below ``splits/``, which holds ``labeled.txt`` and ``unlabeled.txt``.
        labeled_sha256: Hash of the bytes of ``labeled.txt``.
        unlabeled_sha256: Hash of the bytes of ``unlabeled.txt``.
    """

    name: str
    folder: str
    labeled_sha256: str
    unlabeled_sha256: str


_ENTRIES = json.loads((files(__package__) / "published.json").read_text(encoding="utf-8"))

PUBLISHED: Mapping[str, Mapping[str, PublishedList]] = {
    dataset: {name: PublishedList(name, **values) for name, values in entry["lists"].items()}
    for dataset, entry in _ENTRIES.items()
}
"""The published lists of a dataset, by the dataset's key and the list's name."""

VAL_SHA256: Mapping[str, str] = {dataset: entry["val_sha256"] for dataset, entry in _ENTRIES.items()}
"""Hash of ``val.txt``, which all lists of a dataset share."""


def published_list(dataset: str, choice: object) -> PublishedList | None:
    """Find the published list with a name.

    Args:
        dataset: Key of the dataset, such as ``voc``.
        choice: The value of ``dataset.labeled``: a name, or a number if the name is one.

    Returns:
        The list, or None if the choice is not a published name but a fraction, another count, or a file.

    Example:
        >>> published_list("voc", 92).folder, published_list("voc", "blended/1-16").folder
        ('92', '1_16')
        >>> published_list("voc", "1/16") is None, published_list("camvid", 92) is None
        (True, True)
    """
    if isinstance(choice, bool) or not isinstance(choice, str | int):
        return None
    return PUBLISHED.get(dataset, {}).get(str(choice))


def is_original(path: Path, sha256: str) -> bool:
    """Tell whether a file exists and has exactly the published bytes.

    Example:
        >>> is_original(Path("no such file"), VAL_SHA256["voc"])
        False
    """
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256
