"""What the command can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlpmatch_pl.errors import UserError, suggest

DATASETS = ("voc", "cityscapes", "coco", "ade20k", "camvid")
SPLITS = {"unimatch": ("voc", "cityscapes")}
"""Published families of lists, and the data sets that each covers."""


@dataclass(frozen=True)
class Options:
    """The configuration of ``python -m mlpmatch_pl.prepare``, checked.

    Attributes:
        dataset: One of `DATASETS`.
        root: Folder that the data set is put into.
        archives: Folder with the archives; nothing is downloaded where it is given.
        splits: Family of published lists to fetch, or None.
        data: Whether to prepare images and masks; False for the lists only.
        keep_archives: Whether downloaded archives stay in ``archives/`` below the root.
        mirror: Base URL that replaces scheme and host of the original URLs.
        num_workers: Processes that convert masks; 0 for none beside this one, None for one for each core.
    """

    dataset: str
    root: Path
    archives: Path | None = None
    splits: str | None = None
    data: bool = True
    keep_archives: bool = False
    mirror: str | None = None
    num_workers: int | None = None


def read_options(values: dict[str, Any]) -> Options:
    """Check the values of a configuration.

    Raises:
        UserError: If one is not of its kind; the nearest name is added for a mistyped one.

    Example:
        >>> read_options({"dataset": "voc", "root": "/data/voc"}).root
        PosixPath('/data/voc')
        >>> read_options({"dataset": "vco", "root": "/data/voc"})
        Traceback (most recent call last):
        ...
        mlpmatch_pl.errors.UserError: expected dataset to be one of voc, ..., but got vco. Did you mean voc?
    """
    options = Options(
        **{
            **values,
            "dataset": str(values["dataset"]),
            "root": Path(str(values["root"])).expanduser(),
            "archives": None if values.get("archives") is None else Path(str(values["archives"])).expanduser(),
        }
    )
    _check_names(options)
    _check_kinds(options)
    if options.root.exists() and not options.root.is_dir():
        raise UserError(f"expected root to be a folder, but {options.root} is a file; choose another root")
    if options.archives is not None and not options.archives.is_dir():
        raise UserError(
            f"expected archives to be a folder, but {options.archives} is none; name the folder that holds the archives"
        )
    return options


def _check_names(options: Options) -> None:
    if options.dataset not in DATASETS:
        raise UserError(
            f"expected dataset to be one of {', '.join(DATASETS)}, but got {options.dataset}."
            + suggest(options.dataset, DATASETS)
        )
    if options.splits is None:
        if not options.data:
            raise UserError("expected something to do, but data=false and no splits; add splits=unimatch")
        return
    if options.splits not in SPLITS:
        raise UserError(
            f"expected splits to be {' or '.join(SPLITS)}, but got {options.splits}."
            + suggest(str(options.splits), SPLITS)
        )
    if options.dataset not in SPLITS[options.splits]:
        raise UserError(
            f"expected splits={options.splits} with dataset={' or dataset='.join(SPLITS[options.splits])}, "
            f"but got dataset={options.dataset}, which it has no lists for; leave splits out"
        )


def _check_kinds(options: Options) -> None:
    for key in ("data", "keep_archives"):
        if not isinstance(getattr(options, key), bool):
            raise UserError(f"expected {key} to be true or false, but got {getattr(options, key)!r}")
    count = options.num_workers
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise UserError(f"expected num_workers to be a whole number from 0, or null, but got {count!r}")
    if options.mirror is not None and urlsplit(str(options.mirror)).scheme not in ("http", "https"):
        raise UserError(
            f"expected mirror to be a URL that begins with http:// or https://, but got {options.mirror}; "
            "for a folder on this machine use archives="
        )
