"""What the command can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from mlpmatch_pl.utils.errors import UserError

Dataset = Literal["voc", "cityscapes", "coco", "ade20k", "camvid"]
Family = Literal["unimatch"]
SPLITS: dict[Family, tuple[Dataset, ...]] = {"unimatch": ("voc", "cityscapes")}
"""Published families of lists, and the data sets that each covers."""


@dataclass(frozen=True)
class Options:
    """The configuration of ``python -m mlpmatch_pl.prepare``.

    Attributes:
        dataset: Which data set.
        root: Folder that the data set is put into.
        archives: Folder with the archives; nothing is downloaded where it is given.
        splits: Family of published lists to fetch, or None.
        data: Whether to prepare images and masks; False for the lists only.
        keep_archives: Whether downloaded archives stay in ``archives/`` below the root.
        mirror: Base URL that replaces scheme and host of the original URLs.
        num_workers: Processes that convert masks; 0 for none beside this one, None for one for each core.

    Raises:
        UserError: If they do not go together, a number is out of range, or a folder is none.
    """

    dataset: Dataset
    root: Path
    archives: Path | None = None
    splits: Family | None = None
    data: bool = True
    keep_archives: bool = False
    mirror: str | None = None
    num_workers: int | None = None

    def __post_init__(self) -> None:
        self._check_choices()
        if self.num_workers is not None and self.num_workers < 0:
            raise UserError(f"expected num_workers to be a whole number from 0, or null, but got {self.num_workers}")
        if self.mirror is not None and urlsplit(self.mirror).scheme not in ("http", "https"):
            raise UserError(
                f"expected mirror to be a URL that begins with http:// or https://, but got {self.mirror}; "
                "for a folder on this machine use archives="
            )
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"expected root to be a folder, but {self.root} is a file; choose another root")
        if self.archives is not None and not self.archives.is_dir():
            raise UserError(
                f"expected archives to be a folder, but {self.archives} is none; name the folder that holds the "
                "archives"
            )

    def _check_choices(self) -> None:
        if self.splits is None and not self.data:
            raise UserError("expected something to do, but data=false and no splits; add splits=unimatch")
        if self.splits is not None and self.dataset not in SPLITS[self.splits]:
            raise UserError(
                f"expected splits={self.splits} with dataset={' or dataset='.join(SPLITS[self.splits])}, "
                f"but got dataset={self.dataset}, which it has no lists for; leave splits out"
            )
