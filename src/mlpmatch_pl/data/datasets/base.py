"""Shared by the public datasets: metadata, and published lists of labeled images by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlpmatch_pl.data.base import SegmentationData
from mlpmatch_pl.data.datasets.published import PublishedList, is_original, published_list
from mlpmatch_pl.data.files import FileIndex, Pair
from mlpmatch_pl.data.label_selection import LabelSelection, hold_out, make_format, select
from mlpmatch_pl.data.readers.image import ImageReader
from mlpmatch_pl.data.readers.mask import MaskReader
from mlpmatch_pl.data.splits import Choice
from mlpmatch_pl.utils.errors import UserError


@dataclass(frozen=True)
class DatasetInfo:
    """Metadata of a public dataset.

    Attributes:
        key: Its name in ``dataset=...``.
        title: Its name in text.
        class_names: Names of the classes, in the order of the mask values.
        palette: Its usual RGB colors, one per class. Empty: the default colors.
        license: Summary of the terms of use; the publisher's terms apply.
        citation: The publication to cite.
        homepage: Its website.
    """

    key: str
    title: str
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    license: str
    citation: str
    homepage: str


@dataclass(frozen=True)
class Selection:
    """The options of every public dataset; see `mlpmatch_pl.data.datasets.folder.folder`.

    Attributes:
        labeled: Name of a published list (``92``, ``blended/1-16``), fraction, count, list file or folder. None: all
            training images.
        unlabeled: List files or folders. None: those of the published list, or the remaining training images.
        val: List file of the validation images, fraction or count. None: the dataset's validation images.
        split_seed: Seed of choices by fraction or count.
        cover_classes: Whether a choice of labeled images starts with images that together contain every class.
    """

    labeled: Choice | None
    unlabeled: str | Sequence[str] | None
    val: Choice | None
    split_seed: int
    cover_classes: bool


def public_dataset(
    info: DatasetInfo,
    files: FileIndex,
    read_mask: MaskReader,
    train: list[Pair],
    val: list[Pair],
    selection: Selection,
    test: list[Pair] | None = None,
) -> SegmentationData:
    """Return a public dataset.

    Args:
        info: Its metadata.
        files: Finds its files.
        read_mask: Reads its masks.
        train: Its training images.
        val: Its validation images.
        selection: The user's options.
        test: Its test images, if their masks are public.

    Raises:
        UserError: If a published list is missing, or a list or choice is invalid.
    """
    form = make_format(info.class_names, info.palette or None, ImageReader(), read_mask)
    wanted = _wanted(info, files.base, selection)
    if selection.val is not None:
        train, val = hold_out(files, train, wanted, selection.val)
    return select(files, form, train, val, test or [], wanted)


def find_root(root: str, marker: str, info: DatasetInfo, inside: Sequence[str] = ()) -> Path:
    """Return the folder with a dataset: the root, or a usual folder inside it.

    Raises:
        UserError: If none of them contains the folder ``marker``.
    """
    base = Path(root).expanduser()
    for path in (base, *(base / name for name in inside)):
        if (path / marker).is_dir():
            return path
    raise UserError(
        f"expected {info.title} with the folder {marker} in {base}, but it does not exist; get it with "
        f"'python -m mlpmatch_pl.prepare dataset={info.key} root={base}', or set dataset.root"
    )


def _wanted(info: DatasetInfo, base: Path, selection: Selection) -> LabelSelection:
    unlabeled = selection.unlabeled
    names = () if unlabeled is None else (unlabeled,) if isinstance(unlabeled, str) else tuple(unlabeled)
    published = published_list(info.key, selection.labeled)
    if published is None:
        return LabelSelection(selection.labeled, names, selection.split_seed, selection.cover_classes)
    parts = ("labeled",) if names else ("labeled", "unlabeled")
    lists = {part: base / "splits" / published.folder / f"{part}.txt" for part in parts}
    if missing := [path for path in lists.values() if not path.is_file()]:
        raise UserError(
            f"expected the published list {published.name} of {info.title} at {missing[0]}, but it does not exist; get "
            f"it with 'python -m mlpmatch_pl.prepare dataset={info.key} root={base} splits=unimatch data=false', or "
            "choose by fraction, as in dataset.labeled=1/8"
        )
    return LabelSelection(
        str(lists["labeled"]), names or (str(lists["unlabeled"]),), label=_label(info, published, lists)
    )


def _label(info: DatasetInfo, published: PublishedList, lists: Mapping[str, Path]) -> str:
    hashes = {"labeled": published.labeled_sha256, "unlabeled": published.unlabeled_sha256}
    original = all(is_original(path, hashes[part]) for part, path in lists.items())
    return f"{info.key}/{published.name}{'' if original else ', changed: not the published list'}"
