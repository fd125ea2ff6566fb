"""Report runs: tables of mean and standard deviation, plots, and one HTML page.

Arguments without a key are run folders, or folders with run folders below. Writes report.html (everything, in one
file), summary.md, summary.csv, runs.csv (a line for each run) and the plots. Runs that differ only in their seed are
averaged; labeled lists are compared by hash. Unfinished and failed runs are reported as they are; the exit code is 1 if
a file is broken.

Examples:
    python -m mlpmatch_pl.report runs
    python -m mlpmatch_pl.report multirun/2026-01-31_12-00-00 runs/mine output=reports/mine
    python -m mlpmatch_pl.report runs=[multirun/a,runs/b] pool_splits=true
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from mlpmatch_pl.commands.cli import literal_paths, plain, run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def report(cfg: DictConfig) -> bool:
    """Write the report of a composed configuration, and print its tables.

    Args:
        cfg: As composed from ``conf/report.yaml``.

    Returns:
        Whether all files could be read.

    Raises:
        UserError: If the configuration is wrong, or there is nothing to report.
    """
    from mlpmatch_pl.commands.report.run import Options, write_report
    from mlpmatch_pl.utils.validation import read_options

    complete = write_report(read_options(Options, plain(cfg)))
    if not complete:
        print("error: some files are broken, see the table of problems", file=sys.stderr)
    return complete


def _report_job(cfg: DictConfig) -> None:
    if not report(cfg):
        sys.exit(1)


def named_folders(arguments: Sequence[str]) -> list[str]:
    """Turn folders among a command's arguments into ``runs=[...]``, and quote paths for Hydra.

    Example:
        >>> named_folders(["multirun/a", "runs/b", "output=x", "--cfg", "job"])
        ["runs=['multirun/a','runs/b']", "output='x'", '--cfg', 'job']
        >>> named_folders(["runs=multirun/a, b"]), named_folders(["runs=[a,b]"])
        (["runs='multirun/a, b'"], ['runs=[a,b]'])
    """
    folders, others = [], []
    for before, argument in pairwise(["", *arguments]):
        is_option = argument.startswith("-") or before.startswith("-")
        if is_option or ("=" in argument and not Path(argument).is_dir()):
            others += [argument] if argument.startswith("runs=[") else literal_paths([argument], ("runs", "output"))
        else:
            folders += [quoted.removeprefix("runs=") for quoted in literal_paths([f"runs={argument}"], ("runs",))]
    return [f"runs=[{','.join(folders)}]", *others] if folders else others


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1, and so do broken files, after all the rest."""
    sys.argv[1:] = named_folders(sys.argv[1:])
    run_command("report", _report_job, __doc__)


if __name__ == "__main__":
    main()
