"""From options to a data set that is whole."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from mlpmatch_pl.commands.prepare.lists import COMMIT, REPOSITORY, fetch_lists, list_hashes
from mlpmatch_pl.commands.prepare.options import Options
from mlpmatch_pl.commands.prepare.workspace import Preparation, Workspace
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.progress import say

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def prepare_dataset(options: Options) -> None:
    """Prepare what the options name, and say what was done; nothing is done twice.

    Raises:
        UserError: If something cannot be had, is damaged, or is not whole at the end.
    """
    workspace = Workspace(options)
    preparation: Preparation = import_module(f"mlpmatch_pl.commands.prepare.{options.dataset}").PREPARATION
    with _named_disk_errors(options):
        if options.data:
            _prepare_data(workspace, preparation)
        if options.splits is not None:
            _prepare_lists(workspace)
    _say_the_rest(options)


@contextmanager
def _named_disk_errors(options: Options) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        raise UserError(
            f"expected to read and write in {options.root}, but {error}; mend that, or choose another root, and run "
            "the same command again to go on"
        ) from error


def _prepare_data(workspace: Workspace, preparation: Preparation) -> None:
    root = workspace.root
    missing = preparation.find_problems(root)
    if not missing:
        say(f"{root} is whole already, nothing to do: {preparation.summarize(root)}")
        return
    if root.is_dir() and any(root.iterdir()):
        say("\n  ".join([f"{root} is not whole yet:", *missing]))
    preparation.build(workspace)
    if problems := preparation.find_problems(root):
        raise UserError(
            f"expected all of {workspace.options.dataset} in {root}, but {'; '.join(problems)}; "
            "compare the archives with the original ones and run the same command again"
        )
    say(f"{root} is whole: {preparation.summarize(root)}")


def _prepare_lists(workspace: Workspace) -> None:
    folder, count = workspace.root / "splits", len(list_hashes(workspace.options.dataset))
    if fetch_lists(workspace):
        say(f"{folder} has UniMatch's {count} lists ({REPOSITORY}, commit {COMMIT[:7]}, MIT license), hashes verified")
    else:
        say(f"{folder} has UniMatch's {count} lists already, hashes verified, nothing to do")


def _say_the_rest(options: Options) -> None:
    # Only now, because it imports torch.
    info = import_module(f"mlpmatch_pl.data.datasets.{options.dataset}").INFO
    chosen = f"dataset={options.dataset} dataset.root={shlex.quote(str(options.root.absolute()))}"
    say(
        f"\n{info.title}\n  license: {info.license}\n  cite: {info.citation}\n"
        f"  {info.homepage}\n\ngo on with:\n"
        f"  python -m mlpmatch_pl.check {chosen}\n  python -m mlpmatch_pl.train {chosen}"
    )
