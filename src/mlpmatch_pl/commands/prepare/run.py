"""From options to a complete dataset."""

import errno
import shlex
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from mlpmatch_pl.commands.prepare.download import Workspace
from mlpmatch_pl.commands.prepare.published_lists import COMMIT, FOLDERS, REPOSITORY, fetch_lists
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.progress import say

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True, kw_only=True)
class Options(Workspace):
    """The configuration of ``python -m mlpmatch_pl.prepare``.

    Attributes:
        dataset: The dataset.
        splits: Family of published lists to fetch, or None.
        data: Whether to prepare images and masks; False prepares the lists alone.
        annotations: Export of an annotation tool, a file or folder; None for root.
        other_shapes: What to do with its shapes that are no regions; see
            `mlpmatch_pl.commands.prepare.annotations.draw_annotations`.
        empty: What its images without a region are, see there.

    Raises:
        UserError: If options contradict each other or do not exist on this machine.
    """

    dataset: Literal["voc", "cityscapes", "coco", "ade20k", "camvid", "annotations"]
    splits: Literal["unimatch"] | None = None
    data: bool = True
    annotations: Path | None = None
    other_shapes: Literal["refuse", "ignore"] = "refuse"
    empty: Literal["unlabeled", "background"] = "unlabeled"

    def __post_init__(self) -> None:
        if self.splits is None and not self.data:
            raise UserError("expected something to do, but got data=false and no splits; add splits=unimatch")
        if self.splits is not None and self.dataset not in FOLDERS:
            raise UserError(
                f"expected splits={self.splits} with dataset={' or dataset='.join(FOLDERS)}, "
                f"but got dataset={self.dataset}; leave splits out"
            )
        if self.annotations and self.dataset != "annotations":
            raise UserError(f"expected annotations= with dataset=annotations, but got dataset={self.dataset}")
        if self.num_workers is not None and self.num_workers < 0:
            raise UserError(f"expected num_workers to be an integer >= 0 or null, but got {self.num_workers}")
        if self.mirror is not None and urlsplit(self.mirror).scheme not in ("http", "https"):
            raise UserError(
                f"expected mirror to be a URL that begins with http:// or https://, but got {self.mirror}; "
                "for a local folder use archives="
            )
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"expected root to be a folder, but {self.root} is a file; choose another root")
        if self.archives is not None and not self.archives.is_dir():
            raise UserError(
                f"expected archives to be an existing folder, but got {self.archives}; "
                "name the folder that holds the archives"
            )


def prepare_dataset(options: Options) -> None:
    """Prepare a dataset, skipping what an earlier run has finished.

    Raises:
        UserError: If something is missing, damaged, or incomplete at the end.
    """
    try:
        if options.dataset == "annotations":
            from mlpmatch_pl.commands.prepare.annotations import draw_annotations  # it imports torch

            draw_annotations(
                options.root, options.annotations, options.other_shapes, options.empty, options.num_workers
            )
            return
        if options.data:
            _prepare_data(options)
        if options.splits is not None:
            count = fetch_lists(options, options.dataset)
            say(
                f"{options.root / 'splits'}: {count} lists of UniMatch verified ({REPOSITORY}, commit {COMMIT[:7]}, "
                "MIT license)"
            )
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise UserError(
            f"expected to read and write in {options.root}, but {error}; fix this, or choose another root, and run the "
            "same command again to continue"
        ) from error
    info = import_module(f"mlpmatch_pl.data.datasets.{options.dataset}").INFO  # only now, because it imports torch
    overrides = f"dataset={options.dataset} dataset.root={shlex.quote(str(options.root.absolute()))}"
    say(
        f"\n{info.title}\n  license: {info.license}\n  cite: {info.citation}\n  {info.homepage}\n\nnext:\n"
        f"  python -m mlpmatch_pl.check {overrides}\n  python -m mlpmatch_pl.train {overrides}"
    )


def _prepare_data(options: Options) -> None:
    root, preparation = options.root, import_module(f"mlpmatch_pl.commands.prepare.{options.dataset}")
    if not (problems := preparation.find_problems(root)):
        say(f"{root} is complete, nothing to do: {preparation.summarize(root)}")
        return
    if root.is_dir() and any(root.iterdir()):
        say("\n  ".join([f"{root} is incomplete:", *problems]))
    preparation.build(options)
    if problems := preparation.find_problems(root):
        raise UserError(
            f"expected the complete dataset {options.dataset} in {root}, but {'; '.join(problems)}; "
            "compare the archives with the original ones and run the same command again"
        )
    say(f"{root} is complete: {preparation.summarize(root)}")
